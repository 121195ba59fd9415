"""What being distributed costs the kernels: all ranks' launches, one rank after the other on one device, against one device's.

Nothing is sent: the executor runs each rank's own program with messages that are there at once, so only the cut of the work
into launches shows: state in and out, more bands, ragged ends, shorter launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from distattn.kernels.contract import Backend
from distattn.launch.bench_attention_cost import Silent
from distattn.launch.bench_kernels_cases import Case, Inputs
from distattn.launch.bench_kernels_measure import Protocol, Rate, Work, in_turns
from distattn.parallel.executor import Executor
from distattn.parallel.mask import causal
from distattn.parallel.program import compile_program
from distattn.parallel.schedule import make_schedule
from distattn.parallel.shape import Shape

SCHEDULES = ("zigzag", "striped", "ring")


@dataclass(frozen=True)
class Distributed:
    """Rates of one direction: of one device with all tokens, and of each rank of each schedule."""

    direction: str
    world: int
    tokens: int
    one: Rate
    ranks: dict[str, list[Rate]]

    def share(self, schedule: str) -> float:
        """Sum over the ranks over one device."""
        return sum(rate.seconds for rate in self.ranks[schedule]) / self.one.seconds

    def imbalance(self, schedule: str) -> float:
        """Slowest rank over the mean, less 1."""
        seconds = [rate.seconds for rate in self.ranks[schedule]]
        return max(seconds) / (sum(seconds) / len(seconds)) - 1


def measure(case: Case, x: Inputs, backend: Backend, world: int, protocol: Protocol) -> list[Distributed]:
    """Forward and backward of a causal ``case`` over ``world`` ranks and on one device, all in turns."""
    found = []
    programs = {name: [_passes(case, x, backend, name, rank, world) for rank in range(world)] for name in SCHEDULES}
    whole = _passes(case, x, backend, "ring", 0, 1)
    for place, direction in enumerate(("forward", "backward")):
        contenders: dict[str, Work] = {"one": whole[place]}
        for name, ranks in programs.items():
            contenders |= {f"{name} {rank}": passes[place] for rank, passes in enumerate(ranks)}
        rates = in_turns(x.q.device, contenders, protocol)
        ranks_of = {name: [rates[f"{name} {rank}"] for rank in range(world)] for name in SCHEDULES}
        found.append(Distributed(direction, world, case.tokens, rates["one"], ranks_of))
    return found


def _passes(
    case: Case, x: Inputs, backend: Backend, schedule: str, rank: int, world: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, backward) of one rank, run once."""
    shape = Shape(case.heads, case.kv_heads, case.d, case.d_v, x.q.dtype)
    made = make_schedule(schedule, causal(case.tokens), world)
    view, back = made.forward.view(rank), made.backward(made.rotation(shape)).view(rank)
    program = compile_program(view, shape, back.kept)
    backward = compile_program(back, shape, forward=program)
    executor = Executor(Silent(rank, world))
    rows = view.layout.rows(rank)
    q, k, v, dout = (t[:rows].contiguous() for t in (x.q, x.k, x.v, x.dout))
    out, lse, kept = executor.forward(program, backend, q, k, v, case.scores)
    kept.zero_()  # what would have been received is finite
    delta = torch.zeros_like(lse)
    lse = lse.nan_to_num(0.0)
    executor.backward(backward, backend, dout, q, k, v, delta, lse, kept, case.scores)
    return (
        partial(executor.forward, program, backend, q, k, v, case.scores),
        partial(executor.backward, backward, backend, dout, q, k, v, delta, lse, kept, case.scores),
    )
