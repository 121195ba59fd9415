"""Head exchanges around attention: values and every gradient on strict ranks and on processes, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import distattn
from distattn import ContextParallel, Strategy
from distattn.head_exchange import ulysses_attention
from distattn.kernels.contract import Scores
from distattn.ops import HANDLES, Kernels, Session
from distattn.parallel.comm import Communicator, PeerError, SoloCommunicator
from distattn.parallel.comm_group import GroupView
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.executor import Executor
from distattn.parallel.rank_plan import PlanMismatch, make_rank_plan
from distattn.parallel.schedules import SCHEDULES
from distattn.parallel.shape import Shape
from tests.distattn.dense import dense_attention, error
from tests.distattn.test_attention import SummedGradient, compare, draw, found_all, on_ranks, want_all
from tests.parallel.plans import MASKS, make_mask
from tests.workers import Pool

WORLDS = [(2, 2), (3, 3), (4, 2), (4, 4), (6, 2), (6, 3), (8, 2), (8, 4)]  # (ranks, ulysses)
# Multi-head; one key head; grouped, evenly; more ranks than key heads; uneven; uneven in the middle of groups, with copies.
HEADS = [(4, 4), (8, 1), (32, 8), (6, 6), (6, 2), (5, 5), (9, 3)]


def one(world: tuple[int, int], heads: tuple[int, int], mask: str, schedule: str, dtype: torch.dtype, **options: Any) -> None:
    half = world[0] // 2  # two nodes, where that fits
    two_nodes = world[0] % 2 == 0 and (half % world[1] == 0 or world[1] % half == 0)
    strategy = Strategy(schedule, ulysses=world[1], devices=half if two_nodes else None)
    compare(world[0], make_mask(mask, 41, 5), dtype, heads=heads, d=(4, 6), schedule=strategy, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_every_group_is_one_device(world: tuple[int, int]) -> None:
    """Outputs, lse, gradients of q, k, v and sinks, to 1e-13 in float64 and 1e-6 in float32; heads, masks, schedules in turn."""
    first = WORLDS.index(world)
    for turn, heads in enumerate(HEADS):
        i = first * len(HEADS) + turn
        if heads[0] < world[1] or (heads == (32, 8) and world != (8, 4)) or (world[0] >= 6 and (turn + first) % 2 == 0):
            continue  # the long tier has all
        dtype = (torch.float64, torch.float32)[turn % 2]
        one(world, heads, MASKS[i % 11], list(SCHEDULES)[i % len(SCHEDULES)], dtype, sinks=i % 2 == 0, pad=i % 4 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_every_group_head_layout_and_mask(world: tuple[int, int]) -> None:
    """And each mask with every schedule, each head layout with every schedule."""
    names = list(SCHEDULES)
    for (i, heads), (j, mask) in itertools.product(enumerate(HEADS), enumerate(MASKS)):
        if heads[0] >= world[1]:
            one(world, heads, mask, names[(i + j) % len(names)], (torch.float64, torch.float32)[i % 2], sinks=mask == "causal")


@pytest.mark.parametrize("rotate", ["kv", "q"])
@pytest.mark.parametrize("keep", ["none", "all"])
def test_either_backward_plan(rotate: str, keep: str) -> None:
    strategy = Strategy("zigzag", ulysses=2, rotate=rotate, keep=keep)  # type: ignore[arg-type]
    compare(6, make_mask("documents", 45), torch.float64, heads=(3, 3), d=(4, 4), schedule=strategy, keep=keep)  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "ulysses"), [((4, 2), 2), ((3, 1), 6)])
@pytest.mark.parametrize("format", ["bshd", "sbhd"])
def test_batches_share_the_slices(heads: tuple[int, int], ulysses: int, format: str) -> None:
    """The heads of all rows of a batch count together: two rows of three heads are enough for six ranks."""
    strategy = Strategy(ulysses=ulysses)
    compare(6, make_mask("window", 40), heads=heads, format=format, sinks=True, schedule=strategy)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_ranks_and_groups_without_rows(n: int) -> None:
    for ulysses in (2, 3, 6):
        compare(6, distattn.causal(n), torch.float64, heads=(6, 2), d=(4, 4), sinks=True, schedule=Strategy(ulysses=ulysses))  # type: ignore[arg-type]


@pytest.mark.parametrize("ulysses", [2, 4])
def test_bfloat16_is_rounded_as_on_one_device(ulysses: int) -> None:
    """One key head on all ranks: the parts of its gradient travel and are summed in float32."""
    mask = make_mask("documents", 96)
    tensors = draw(mask, torch.bfloat16, (8, 1), (16, 16))
    want = want_all(tensors, mask, sinks=False)
    alone = on_ranks(1, lambda cp: found_all(cp, tensors, mask, False, "thd"))[0]

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {name: error(found[name], want[name]) for name in ("out", "dq", "dk", "dv")}

    limit = errors(alone)
    found = on_ranks(4, lambda cp: found_all(cp, tensors, mask, False, "thd"), Strategy(ulysses=ulysses))[0]  # type: ignore[arg-type]
    assert all(value <= 1.05 * limit[name] for name, value in errors(found).items()), (errors(found), limit)


def test_shared_gradients_may_travel_in_bfloat16() -> None:
    mask = distattn.causal(64)
    tensors = draw(mask, torch.float32, (4, 1), (16, 16))
    want = want_all(tensors, mask, sinks=False)
    strategy = Strategy(ulysses=4)
    found = on_ranks(4, lambda cp: found_all(cp, tensors, mask, False, "thd"), strategy, home=torch.bfloat16)[0]  # type: ignore[arg-type]
    errors = {name: error(found[name], want[name]) for name in want}
    assert max(errors["out"], errors["lse"], errors["dq"]) < 1e-6, errors
    assert all(1e-4 < errors[name] < 8e-3 for name in ("dk", "dv")), errors  # four parts, each rounded to 8 bits


def test_two_runs_give_the_same_bits() -> None:
    mask = make_mask("documents", 61)
    tensors = draw(mask, torch.float32, (6, 2), (16, 8))

    def work(cp: ContextParallel) -> list[Tensor]:
        return [x for _ in range(2) for x in found_all(cp, tensors, mask, True, "thd").values()]

    runs = [on_ranks(8, work, Strategy("striped", ulysses=4)) for _ in range(2)]  # type: ignore[arg-type]
    for rank in (*runs[0], *runs[1]):
        assert all(torch.equal(x, y) for x, y in zip(rank, runs[0][0][:6] * 2, strict=True))


def test_gradient_only_into_lse_and_inference_mode() -> None:
    mask = distattn.causal(24)
    q, k, v, _, dlse, _ = draw(mask, torch.float64, (4, 2), (4, 4))
    leaf = q.clone().requires_grad_()
    want_out, lse = dense_attention(leaf, k, v, mask)
    lse.backward(dlse)

    def work(cp: ContextParallel) -> tuple[Tensor, Tensor]:
        plan, mine = cp.plan(mask), q.clone().requires_grad_()
        _, lse = cp.attention(cp.shard(mine, plan), cp.shard(k, plan), cp.shard(v, plan), plan, return_lse=True)
        cp.unshard(lse, plan).backward(dlse)
        assert mine.grad is not None
        with torch.inference_mode():
            return mine.grad, cp.unshard(cp.attention(*(cp.shard(x, plan) for x in (q, k, v)), plan), plan)

    for gradient, out in on_ranks(4, work, Strategy(ulysses=2)):  # type: ignore[arg-type]
        assert error(gradient, leaf.grad) < 1e-13 and error(out, want_out) < 1e-13  # type: ignore[arg-type]


def test_gradcheck_on_ranks_in_lockstep() -> None:
    mask = distattn.documents([1, 2])
    q, k, v, _, _, sinks = draw(mask, torch.float64, (3, 1), (1, 2))

    def work(cp: ContextParallel) -> bool:
        plan = cp.plan(mask)

        def whole(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
            local = [cp.shard(x, plan) for x in (q, k, v)]
            sinks = SummedGradient.apply(sinks, cp.communicator)
            out, lse = cp.attention(*local, plan, sinks=sinks, return_lse=True)
            return cp.unshard(out, plan), cp.unshard(lse, plan)

        return torch.autograd.gradcheck(whole, [x.clone().requires_grad_() for x in (q, k, v, sinks)])

    assert all(on_ranks(2, work, Strategy(ulysses=2)))  # type: ignore[arg-type]


def test_calls_whose_slices_coincide_on_some_ranks_only() -> None:
    """5 and 6 heads on two ranks: 3 + 2, 3 + 3. Ranks must come to the agreements on them equally often."""
    mask = distattn.causal(20)

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(mask)
        for heads in (5, 6, 4, 5):
            x = cp.shard(torch.randn(20, heads, 8, generator=torch.Generator().manual_seed(heads)), plan)
            assert (
                error(cp.unshard(cp.attention(x, x, x, plan), plan), dense_attention(*[cp.unshard(x, plan)] * 3, mask)[0]) < 1e-6
            )

    on_ranks(4, work, Strategy(ulysses=2))  # type: ignore[arg-type]


def test_plans_of_several_degrees_share_a_connection() -> None:
    """As schedule="auto" may choose by mask: forward passes one after the other, backward passes in another order."""
    n, degrees = 30, (1, 2, 4)
    kinds = [make_mask(kind, n) for kind in ("causal", "window", "full")]
    tensors = draw(kinds[0], torch.float64, (4, 2), (8, 8))
    want = [want_all([*tensors[:4], tensors[4] * 0, tensors[5]], mask, False) for mask in kinds]

    def work(cp: ContextParallel) -> list[tuple[Tensor, Tensor]]:
        passes = []
        for degree, mask in zip(degrees, kinds, strict=True):
            cp.strategy = Strategy(ulysses=degree)
            plan, q = cp.plan(mask), tensors[0].clone().requires_grad_()
            k, v = (cp.shard(x, plan) for x in tensors[1:3])
            passes.append((q, cp.unshard(cp.attention(cp.shard(q, plan), k, v, plan), plan)))
        for i in (0, 2, 1):
            passes[i][1].backward(tensors[3])
        return [(out, q.grad) for q, out in passes]  # type: ignore[misc]

    for found in on_ranks(4, work):
        for (out, dq), one in zip(found, want, strict=True):
            assert error(out, one["out"]) < 1e-13 and error(dq, one["dq"]) < 1e-13


def test_saved_are_the_slices_and_not_the_local_inputs() -> None:
    """Bytes for the backward pass: as much q, k and v as the rank has itself, and not both."""
    mask = distattn.causal(64)
    saved: dict[int, int] = {}

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(mask)
        q, k, v = (torch.randn(plan.rows, 4, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        found: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            found.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = cp.attention(q, k, v, plan)
        assert isinstance(out, Tensor)
        assert not any(x.data_ptr() == y.data_ptr() for x in found for y in (q, k, v))
        saved[cp.rank] = sum(x.nbytes for x in found)
        out.sum().backward()

    on_ranks(4, work, Strategy(ulysses=4))  # type: ignore[arg-type]
    rows, heads, d = 16, 4, 16
    assert set(saved.values()) == {4 * rows * heads * d * 2 + rows * heads * 4}, "q, k, v, out in bfloat16 and the lse"


@pytest.mark.parametrize(("dtype", "sinks"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_operator_passes_opcheck(dtype: torch.dtype, sinks: bool) -> None:
    """In a group of one: all that the operator does but for the messages."""
    mask = distattn.causal(20)
    q, k, v, _, _, sink = draw(mask, dtype, (4, 2), (8, 8))
    group = GroupView(SoloCommunicator(), 1)
    session = Session(make_rank_plan(group.parent, mask, Strategy()), Executor(group), Kernels(), None)
    handle = HANDLES.add(session)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    the_sink = sink.clone().requires_grad_() if sinks else None
    torch.library.opcheck(torch.ops.distattn.ulysses_attention.default, (*leaves, the_sink, handle, 0.3, 0.0))
    out, lse, *_ = ulysses_attention(q, k, v, sink if sinks else None, handle, 0.3, 0.0)
    want = torch.ops.distattn.attention(q, k, v, sink if sinks else None, ContextParallel().plan(mask).handle, 0.3, 0.0)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert set(session.exchanges) == {(Shape(4, 2, 8, 8, dtype, finished=dtype if sinks else None), Scores(0.3), sinks)}


def errors_of_rank(rank: int, world: int, cases: list[tuple[Strategy, str]]) -> list[dict[str, float]]:
    found = []
    for strategy, kind in cases:
        cp = ContextParallel(torch.distributed.group.WORLD, schedule=strategy, timeout=60.0)
        mask = make_mask(kind, 61)
        tensors = draw(mask, torch.float32, (6, 2), (16, 8))
        want = want_all(tensors, mask, sinks=True)
        runs = [found_all(cp, tensors, mask, True, "thd") for _ in range(2)]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in want), "not the same bits in another run"
        found.append({name: error(runs[0][name], want[name]) for name in want})
        cp.close()
    return found


def test_four_processes(gloo: Pool) -> None:
    cases = [
        (Strategy("zigzag", ulysses=2), "documents"),
        (Strategy("ring", ulysses=2), "sinks"),
        (Strategy(ulysses=4), "causal"),
    ]
    for rank in gloo(4).run(errors_of_rank, cases):
        assert all(max(errors.values()) <= 1e-6 for errors in rank), rank


def test_degrees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="ulysses=3 does not divide the 4 ranks of the group. Use one of 1, 2, 4"):
        on_ranks(4, lambda cp: None, Strategy(ulysses=3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ulysses=2 does not divide the 1 ranks"):
        ContextParallel(schedule=Strategy(ulysses=2))

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(distattn.causal(16))
        q, k = torch.zeros(plan.rows, 2, 8), torch.zeros(plan.rows, 1, 8)
        cp.attention(q, k, k, plan)

    with pytest.raises(ValueError, match="ulysses=4 ranks cannot share 2 query heads.*Use an ulysses of 2 or less.*Found q"):
        on_ranks(4, work, Strategy(ulysses=4))  # type: ignore[arg-type]


def test_ranks_with_other_heads_are_named() -> None:
    """In the group of heads, too, where they would not meet in one plan."""

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(distattn.causal(16))
        x = torch.zeros(plan.rows, 6 if cp.rank == 1 else 4, 8)
        cp.attention(x, x, x, plan)

    with pytest.raises(PlanMismatch, match=r"ranks 0, 2, 3: heads 4:4.*ulysses 2(.|\n)*rank 1: heads 6:6"):
        on_ranks(4, work, Strategy(ulysses=2))  # type: ignore[arg-type]


def test_a_plan_of_another_degree_is_refused() -> None:
    def work(comm: Communicator) -> None:
        one, two = (ContextParallel(communicator=comm, schedule=Strategy(ulysses=u)) for u in (1, 2))
        plan = one.plan(distattn.causal(16))
        x = torch.zeros(plan.rows, 4, 8)
        with pytest.raises(ValueError, match="needs a plan that this ContextParallel made"):
            two.attention(x, x, x, plan)

    run_ranks(2, work)


def test_an_error_in_a_kernel_stops_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that wait in an exchange for a rank whose heads were the trouble."""

    def forward(executor: Executor, *_: Any) -> Any:
        raise ArithmeticError("no more heads")

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(distattn.causal(16))
        x = torch.zeros(plan.rows, 4, 8)
        cp.attention(x, x, x, plan)

    monkeypatch.setattr("distattn.kernels.aten.Aten.forward", forward)
    with pytest.raises((ArithmeticError, PeerError), match="no more heads"):
        on_ranks(4, work, Strategy(ulysses=2))  # type: ignore[arg-type]
