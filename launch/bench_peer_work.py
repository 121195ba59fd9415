"""The block work of one rank without messages: what kernels cost, apart from the schedule that feeds them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distattn.attention import AttentionPlan, ContextParallel
from distattn.kernels import choose
from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores, State
from distattn.parallel.plan import What
from distattn.parallel.program import Launch, Place, Program
from distattn.parallel.shape import Shape


class Piece(NamedTuple):
    """The arguments of one kernel call: where its queries and keys come from, and what they are."""

    q: Place
    kv: Place
    q_rows: Tensor  # global positions
    kv_rows: Tensor
    tensors: dict[str, Tensor]
    bands: Bands


class LocalWork:
    """The kernel calls of one rank's passes, as its programs have them, with all rows at hand: nothing is sent, packed or merged.

    Args:
        full: q, k, v, dout and out [N, H, D], lse [N, H], in the order of the sequence.
    """

    def __init__(self, cp: ContextParallel, plan: AttentionPlan, full: dict[str, Tensor]):
        _, heads, size = full["q"].shape
        self.scores = Scores(size**-0.5)
        shape = Shape(heads, heads, size, size, full["q"].dtype)
        programs = plan.rank_plan.programs(shape, self.scores, False, cp.communicator)
        full = {**full, "delta": torch.linalg.vecdot(full["dout"], full["out"])}
        self.rank, self.layout = cp.rank, plan.layout
        self.forward, self.backward = ([self._piece(p, launch, full) for s in p.launches for launch in s] for p in programs)
        self.kernel = choose(full["q"], full["k"], full["v"], self.scores).backend

    def _piece(self, program: Program, launch: Launch, full: dict[str, Tensor]) -> Piece:
        q_rows, kv_rows = self._rows(program, What.Q, launch.q), self._rows(program, What.KV, launch.kv)
        of_keys = ("k", "v")
        tensors = {name: x[kv_rows if name in of_keys else q_rows] for name, x in full.items()}
        return Piece(launch.q, launch.kv, q_rows, kv_rows, tensors, launch.bands)

    def _rows(self, program: Program, what: What, place: Place) -> Tensor:
        """Global positions of what this rank holds of an owner's rows."""
        positions = torch.from_numpy(self.layout.positions(place.owner))
        if place.owner == self.rank:
            return positions
        packing = program.buffers[what, place].packing
        return torch.cat([positions[start:stop] for start, stop in zip(packing.start, packing.stop, strict=True)])

    def run(self, backward: bool) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """A forward pass, and a backward pass: (global positions, rows) of "out", and of the parts of "dq", "dk" and "dv"."""
        states: dict[Place, State] = {}
        for piece in self.forward:
            x = piece.tensors
            state = states.get(piece.q)
            states[piece.q] = self.kernel.forward(x["q"], x["k"], x["v"], piece.bands, self.scores, state)
        found = {"out": [(piece.q_rows, states[piece.q].o) for piece in self.forward[:1]]}
        if not backward:
            return found
        queries: dict[Place, tuple[Tensor, Tensor]] = {}
        keys: dict[Place, tuple[Tensor, Tensor, Tensor]] = {}
        for piece in self.backward:
            x = piece.tensors
            _, dq = queries.setdefault(piece.q, (piece.q_rows, torch.zeros_like(x["q"])))
            dkv = keys.setdefault(piece.kv, (piece.kv_rows, torch.zeros_like(x["k"]), torch.zeros_like(x["v"])))
            self.kernel.backward(
                x["dout"], x["q"], x["k"], x["v"], x["delta"], x["lse"], piece.bands, self.scores, dq, dkv[1], dkv[2]
            )
        found["dq"] = list(queries.values())
        found["dk"], found["dv"] = ([(part[0], part[i]) for part in keys.values()] for i in (1, 2))
        return found
