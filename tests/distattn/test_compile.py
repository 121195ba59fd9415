"""torch.compile over ever new document layouts, and checkpoints under which attention and its communication run once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distattn
from distattn import ContextParallel, Strategy
from distattn.attention import AttentionPlan
from distattn.kernels import Choice
from distattn.kernels.aten import Aten
from distattn.ops import save_attention
from distattn.parallel.comm import Communicator
from distattn.parallel.comm_threads import run_ranks
from tests.distattn.dense import error

HEADS, KV_HEADS, D = 4, 2, 8
WIDTH = HEADS * D


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Projections to q, k, v and back, and the sinks."""
    g = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, (HEADS + 2 * KV_HEADS) * D), (WIDTH, WIDTH), (HEADS,)]
    return [torch.randn(*s, generator=g, dtype=torch.float64).div(4).to(dtype).requires_grad_() for s in shapes]


def block(cp: ContextParallel, x: Tensor, plan: AttentionPlan, into: Tensor, out_of: Tensor, sinks: Tensor) -> Tensor:
    """An attention block on local rows, with a use of the lse."""
    q, k, v = (x @ into).unflatten(-1, (HEADS + 2 * KV_HEADS, D)).split([HEADS, KV_HEADS, KV_HEADS], 1)
    out, lse = cp.attention(q, k, v, plan, sinks=sinks, return_lse=True)
    return x + torch.tanh((out * torch.sigmoid(lse)[..., None].to(out.dtype)).flatten(1) @ out_of)


def layouts(count: int, total: int | None) -> list[list[int]]:
    """Document lengths, one document and many, long and short ones; packed into one ``total`` or each of another."""
    rng = random.Random(3)
    found = []
    while len(found) < count:
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(2, 9))]
        rest = total - sum(lengths) if total else 0
        if rest >= 0 and (total or sum(lengths) not in map(sum, found)):
            found.append([*lengths, rest] if rest else lengths)
    return found


def run(function: Callable[..., Tensor], cp: ContextParallel, lengths: list[int], weights: list[Tensor]) -> list[Tensor]:
    """Output and every gradient of one step."""
    plan = cp.plan(distattn.documents(lengths))
    full = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(len(lengths)), dtype=weights[0].dtype)
    x = cp.shard(full, plan).requires_grad_()
    leaves = [x, *(w.detach().clone().requires_grad_() for w in weights)]
    y = function(cp, x, plan, *leaves[1:])
    return [y.detach(), *torch.autograd.grad((y * torch.cos(y.detach())).sum(), leaves)]


def compare_with_eager(cp: ContextParallel, backend: str, tolerance: float, dtype: torch.dtype, many: list[list[int]]) -> int:
    """Compilations for all layouts; asserts that results are those without compilation."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for lengths in many:
        weights = parameters(dtype)
        for found, want in zip(run(compiled, cp, lengths, weights), run(block, cp, lengths, weights), strict=True):
            assert found.dtype == want.dtype
            assert error(found, want) <= tolerance
    return counter.frame_count


@pytest.mark.parametrize("total", [96, None], ids=["equal totals", "all totals different"])
def test_twenty_layouts_compile_twice(total: int | None) -> None:
    """Once for the first layout and once for all others: neither lengths nor plan are part of the program."""
    assert 1 <= compare_with_eager(ContextParallel(), "aot_eager", 1e-12, torch.float64, layouts(20, total)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_layouts_compile_twice_with_inductor(dtype: torch.dtype) -> None:
    # What inductor fuses it does not round in between; eager rounds each of some ten steps, by 2^-9 at most in bfloat16.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    assert 1 <= compare_with_eager(ContextParallel(), "inductor", tolerance, dtype, layouts(20, None)) <= 2


@pytest.mark.parametrize(("strategy", "count", "total"), [(Strategy(), 8, 96), (Strategy(ulysses=2), 4, None)], ids=str)
def test_ranks_as_threads_compile_twice_each(strategy: Strategy, count: int, total: int | None) -> None:
    def work(cp: ContextParallel) -> int:
        return compare_with_eager(cp, "aot_eager", 1e-12, torch.float64, layouts(count, total))

    counts = run_ranks(2, lambda comm: work(ContextParallel(communicator=comm, schedule=strategy)), timeout=60.0)
    assert all(1 <= count <= 2 for count in counts), counts


class CountingKernels(Aten):
    """Launches by rank and pass."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        self.lock = threading.Lock()

    def count(self, name: str) -> None:
        with self.lock:
            key = threading.current_thread().name, name
            self.counts[key] = self.counts.get(key, 0) + 1

    def forward(self, *args: Any, **options: Any) -> Any:
        self.count("forward")
        return super().forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> None:
        self.count("backward")
        super().backward(*args, **options)


class CountingCommunicator:
    """Any communicator, with a count of its posts."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.posts: dict[str, int] = {"forward": 0, "backward": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.communicator, name)

    def post(self, lane: int, sends: Any, receives: Any, awaited: Any) -> Any:
        self.posts[awaited.pass_name] += 1
        return self.communicator.post(lane, sends, receives, awaited)


def plainly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def selectively(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def directly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def counted(
    way: Callable[..., Tensor], compiled: bool, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[int]]:
    """Results of rank 0, and (forward launches, backward launches, forward posts, backward posts) of all ranks together."""
    kernels = CountingKernels()
    monkeypatch.setattr("distattn.ops.choose", lambda *_: Choice(kernels))
    posts = []

    def work(comm: Communicator) -> list[Tensor]:
        counting = CountingCommunicator(comm)
        posts.append(counting.posts)
        cp = ContextParallel(communicator=counting, schedule=strategy)  # type: ignore[arg-type]
        function = partial(way, block)
        step = torch.compile(function, backend="aot_eager") if compiled else function
        return run(step, cp, [30, 18], parameters())

    results = run_ranks(3 if strategy.ulysses == 1 else 4, work, timeout=60.0)[0]
    launches = [sum(n for (_, name), n in kernels.counts.items() if name == which) for which in ("forward", "backward")]
    return results, [*launches, *(sum(p[which] for p in posts) for which in ("forward", "backward"))]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("strategy", [Strategy(), Strategy(ulysses=2)], ids=str)
def test_selective_checkpoints_run_attention_and_its_messages_once(
    strategy: Strategy, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, once = counted(directly, False, strategy, monkeypatch)
    assert min(once) >= 3, "every rank launches and posts in both passes"
    again, twice = counted(plainly, compiled, strategy, monkeypatch)
    saved, selective = counted(selectively, compiled, strategy, monkeypatch)
    assert selective == once
    assert twice == [2 * once[0], once[1], 2 * once[2], once[3]], "the comparison shows what the policy saves"
    for found, other, expected in zip(saved, again, want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-12)


def test_other_operators_are_recomputed() -> None:
    policies = torch.utils.checkpoint.CheckpointPolicy
    for op in (torch.ops.distattn.attention, torch.ops.distattn.ulysses_attention):
        assert save_attention(None, op.default) == policies.MUST_SAVE
    assert save_attention(None, torch.ops.aten.mm.default) == policies.PREFER_RECOMPUTE
