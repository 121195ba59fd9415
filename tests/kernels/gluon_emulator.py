"""The Hopper backend on a CPU: the product's own launches and kernels over the emulated language, with the tiles asked for."""

from __future__ import annotations

from typing import Any

import torch

from distattn.kernels.gluon_backend import GluonBackend
from distattn.kernels.gluon_division import Costs
from distattn.kernels.gluon_launch import FORWARD, KEYS, QUERIES
from distattn.kernels.gluon_plans import Plan, Shape
from tests.kernels.gluon_language import Kernel, load

MODULES = {
    "forward": ("gluon_forward", "forward_kernel"),
    "key_gradient": ("gluon_backward", "key_gradient_kernel"),
    "fused_gradient": ("gluon_backward", "key_gradient_kernel"),
    "ordered_gradient": ("gluon_backward", "key_gradient_kernel"),
    "query_gradient": ("gluon_query_backward", "query_gradient_kernel"),
    "add_scratch": ("gluon_query_backward", "add_scratch_kernel"),
    "merge_pieces": ("gluon_merge", "merge_pieces_kernel"),
    "add_pieces": ("gluon_merge", "add_pieces_kernel"),
}
# more tiles, hence more laps of the stages, at small sizes
SMALL: dict[str, dict[str, Any]] = {FORWARD: {"block_k": 32}, KEYS: {"block_q": 32}, QUERIES: {"block_k": 32}}


FREE = Costs(write=0.0, merge=0.0, least=1, gain=0.0)  # of cutting: as often as there are programs for it


class Emulated(GluonBackend):
    """``rows`` changes fields of the launch rows by kind; ``seed`` draws who runs when; ``processors`` is how many there are.

    ``costs`` of cutting instead of the real ones, which small sizes do not repay. ``pieces`` counts what was cut.
    """

    def __init__(
        self,
        seed: int = 0,
        processors: int = 3,
        rows: dict[str, dict[str, Any]] | None = None,
        deterministic: bool = True,
        costs: Costs | None = None,
        ordered: bool = False,
        **load_options: Any,
    ):
        super().__init__(deterministic, ordered)
        self.seed, self.processors, self.rows, self.load_options = seed, processors, rows or {}, load_options
        self.launches = 0
        self.costs = costs
        self.pieces: dict[str, int] = {}

    def _reject_device(self, device: torch.device) -> str | None:
        return None

    def _processors(self, device: torch.device) -> int:
        return self.processors

    def _row(self, kind: str, d: int, d_v: int, softcap: float = 0.0) -> Any:
        return super()._row(kind, d, d_v, softcap)._replace(**self.rows.get(kind, {}))

    def _costs(self, kind: str, row: Any, shape: Shape) -> Costs | None:
        found = super()._costs(kind, row, shape)
        return self.costs if found and self.costs else found

    def _plan(self, kind: str, *arguments: Any, **named: Any) -> Plan:
        made = super()._plan(kind, *arguments, **named)
        self.pieces[kind] = self.pieces.get(kind, 0) + (made.work.pieces if made.work else 0)
        return made

    def _kernel(self, kind: str) -> Kernel:
        module, function = MODULES[kind]
        kernel: Kernel = getattr(load(module, **self.load_options), function)
        self.launches += 1
        kernel.seed = self.seed * 100 + self.launches
        return kernel
