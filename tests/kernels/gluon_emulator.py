"""The Hopper backend on a CPU: the product's own launches and kernels over the emulated language, with the tiles asked for."""

from __future__ import annotations

from typing import Any

import torch

from distattn.kernels.gluon_backend import GluonBackend
from distattn.kernels.gluon_launch import FORWARD, KEYS, QUERIES
from tests.kernels.gluon_language import Kernel, load

MODULES = {
    "forward": ("gluon_forward", "forward_kernel"),
    "key_gradient": ("gluon_backward", "key_gradient_kernel"),
    "fused_gradient": ("gluon_backward", "key_gradient_kernel"),
    "ordered_gradient": ("gluon_backward", "key_gradient_kernel"),
    "query_gradient": ("gluon_query_backward", "query_gradient_kernel"),
    "add_scratch": ("gluon_query_backward", "add_scratch_kernel"),
}
# more tiles, hence more laps of the stages, at small sizes
SMALL: dict[str, dict[str, Any]] = {FORWARD: {"block_k": 32}, KEYS: {"block_q": 32}, QUERIES: {"block_k": 32}}


class Emulated(GluonBackend):
    """``rows`` changes fields of the launch rows by kind; ``seed`` draws who runs when; ``processors`` is how many there are."""

    def __init__(
        self,
        seed: int = 0,
        processors: int = 3,
        rows: dict[str, dict[str, Any]] | None = None,
        deterministic: bool = True,
        ordered: bool = False,
        **load_options: Any,
    ):
        super().__init__(deterministic, ordered)
        self.seed, self.processors, self.rows, self.load_options = seed, processors, rows or {}, load_options
        self.launches = 0

    def _reject_device(self, device: torch.device) -> str | None:
        return None

    def _processors(self, device: torch.device) -> int:
        return self.processors

    def _row(self, kind: str, d: int, d_v: int, softcap: float = 0.0) -> Any:
        return super()._row(kind, d, d_v, softcap)._replace(**self.rows.get(kind, {}))

    def _kernel(self, kind: str) -> Kernel:
        module, function = MODULES[kind]
        kernel: Kernel = getattr(load(module, **self.load_options), function)
        self.launches += 1
        kernel.seed = self.seed * 100 + self.launches
        return kernel
