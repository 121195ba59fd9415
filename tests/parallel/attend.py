"""Sharded attention against one device: what every test of the executor shares, on threads and on process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distattn.kernels import load
from distattn.kernels.contract import Backend, Scores, empty_state
from distattn.kernels.reference import Reference
from distattn.parallel.comm import Communicator
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.executor import Executor
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan
from distattn.parallel.program import Program, compile_program
from distattn.parallel.shape import Shape

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """A mask and the tensors to attend with, on one device; upstream gradients of order one into out and into lse."""

    mask: Mask
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    scores: Scores
    sinks: torch.Tensor | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.q.shape[1], self.k.shape[1], self.q.shape[2], self.v.shape[2], self.q.dtype)


def make_problem(mask: Mask, dtype=torch.float32, heads=(4, 2), d=16, d_v=16, softcap=0.0, sinks=False, seed=0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    n = mask.n_tokens
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v, dout = draw(n, heads[0], d), draw(n, heads[1], d), draw(n, heads[1], d_v), draw(n, heads[0], d_v)
    dlse = torch.where(mask.bands.dense(n, n).any(1)[:, None], draw(n, heads[0]), 0.0)
    sink = draw(heads[0]) if sinks else None
    return Problem(mask, *(x.to(dtype) for x in (q, k, v, dout)), dlse, Scores(d**-0.5, softcap), sink)


def one_device(problem: Problem, backend: Backend, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """(out, lse, dq, dk, dv) of the whole sequence by one backend, inputs cast to ``dtype`` first."""
    p = problem
    q, k, v, dout = (x.to(dtype or x.dtype) for x in (p.q, p.k, p.v, p.dout))
    state = empty_state(q, v.shape[-1], p.sinks)
    out = torch.empty_like(dout)
    state = backend.forward(q, k, v, p.mask.bands, p.scores, state, out)
    accumulate = state.lse.dtype
    delta = (dout.to(accumulate) * out.to(accumulate)).sum(-1) - p.dlse.to(accumulate)
    sums = [torch.zeros(x.shape, dtype=accumulate) for x in (q, k, v)]
    backend.backward(dout, q, k, v, delta, state.lse, p.mask.bands, p.scores, *sums)
    return out, state.lse, *sums


def exact(problem: Problem) -> tuple[torch.Tensor, ...]:
    """The float64 answer for the inputs as they are."""
    return one_device(problem, Reference(), torch.float64)


def programs(plan: Plan, back: Plan, rank: int, shape: Shape) -> tuple[Program, Program]:
    forward, backward = plan.view(rank), back.view(rank)
    program = compile_program(forward, shape, backward.kept)
    return program, compile_program(backward, shape, forward=program)


def attend(
    communicator: Communicator, pair: tuple[Program, Program], layout: Layout, problem: Problem, backend: Backend, times: int = 1
) -> tuple[torch.Tensor, ...]:
    """This rank's (out, lse, dq, dk, dv)."""
    p, rank = problem, communicator.rank
    executor = Executor(communicator)
    q, k, v, dout, dlse = (layout.shard(x, rank) for x in (p.q, p.k, p.v, p.dout, p.dlse))
    for _ in range(times):
        out, lse, kept = executor.forward(pair[0], backend, q, k, v, p.scores, p.sinks)
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - dlse.to(lse.dtype)
        gradients = executor.backward(pair[1], backend, dout, q, k, v, delta, lse, kept, p.scores)
    return out, lse, *gradients


def on_threads(plan: Plan, back: Plan, problem: Problem, backend: Backend | str = "aten", times: int = 1, **options):
    """(out, lse, dq, dk, dv) of the whole sequence, computed by ranks as threads."""
    the_backend = load(backend) if isinstance(backend, str) else backend
    shape, layout = problem.shape, plan.layout

    def rank_main(communicator: Communicator) -> tuple[torch.Tensor, ...]:
        return attend(communicator, programs(plan, back, communicator.rank, shape), layout, problem, the_backend, times)

    results = run_ranks(plan.world, rank_main, **{"timeout": 30.0, **options})
    return tuple(layout.unshard([r[i] for r in results]) for i in range(5))


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; rows without keys have lse -inf on both sides, and an all-zero tensor must be exactly that."""
    found, want = found.double(), want.double()
    if not torch.equal(found == -torch.inf, want == -torch.inf):
        return float("inf")
    found, want = (torch.where(x == -torch.inf, 0.0, x) for x in (found, want))
    if not want.any():
        return 0.0 if not found.any() else float("inf")
    value = float((found - want).norm() / want.norm())
    return value if value == value else float("inf")


def errors(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> dict[str, float]:
    return {name: error(f, w) for name, f, w in zip(NAMES, found, want, strict=True)}


def check(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], tolerance: float) -> None:
    worst = errors(found, want)
    assert max(worst.values()) <= tolerance, worst
