"""Head exchanges on their own: who gets which heads, what travels, what arrives; and views of a part of the ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distattn import ContextParallel
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.comm import Awaited, Communicator, PeerError
from distattn.parallel.comm_group import GroupView
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.exchange import HeadExchange, RowFormat
from distattn.parallel.head_split import HeadSlice, HeadSplit
from distattn.parallel.layout import Layout
from distattn.parallel.schedule import Schedule, make_schedule
from distattn.parallel.schedules import SCHEDULES
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import exchange_bytes, schedule_bytes
from distattn.parallel.steps import run
from distattn.parallel.strategy import Strategy
from distattn.parallel.verify import PlanError, _heads_once, verify_schedule
from tests.parallel.plans import MASKS, make_mask

HEADS = [(4, 4), (8, 1), (32, 8), (6, 6), (6, 2), (5, 5), (9, 3), (12, 3), (1, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_head_is_in_one_slice_with_its_own_key_head(heads: tuple[int, int]) -> None:
    for parts in range(1, heads[0] + 1):
        split = HeadSplit(*heads, parts)
        assert list(_heads_once(split)) == []
        sizes = [piece.heads for piece in split.slices]
        assert len(sizes) == parts and max(sizes) - min(sizes) <= 1
        if heads[1] % parts == 0:
            assert not split.replicated and all(piece.kv_held == heads[1] // parts for piece in split.slices)


def cost(heads: int, kv_heads: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(key heads held, key heads sent) of slices of these sizes."""
    group, held, sent, start = heads // kv_heads, 0, 0, 0
    for size in sizes:
        owners = [h // group for h in range(start, start + size)]
        counts = [owners.count(owner) for owner in sorted(set(owners))]
        held, sent, start = held + size // math.gcd(*counts), sent + len(counts), start + size
    return held, sent


@pytest.mark.parametrize("heads", HEADS[1:-1], ids=str)
def test_larger_slices_stand_where_they_cost_least(heads: tuple[int, int]) -> None:
    """Against all ways to place them."""
    for parts in range(2, min(heads[0], 7)):
        fewer, longer = divmod(heads[0], parts)
        ways = [tuple(fewer + (i in chosen) for i in range(parts)) for chosen in itertools.combinations(range(parts), longer)]
        found = tuple(piece.heads for piece in HeadSplit(*heads, parts).slices)
        assert found == min(ways, key=lambda sizes: (*cost(*heads, sizes), [-s for s in sizes]))


def test_key_heads_are_copied_only_where_groups_differ() -> None:
    first, second = HeadSplit(12, 3, 2).slices  # key head 1 serves the last two heads of one slice and the first two of the other
    assert first == HeadSlice(0, 6, 0, 2, (2, 1), True) and second == HeadSlice(6, 12, 1, 3, (1, 2), True)
    assert [piece.copies for piece in HeadSplit(8, 2, 3).slices] == [(1,), (1, 1), (1,)]  # 3, 2 and 3 heads: nothing is copied


def test_more_slices_than_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="ulysses=8 ranks cannot share 4 query heads.*Use an ulysses of 4 or less"):
        HeadSplit(4, 2, 8)


@pytest.mark.parametrize(
    ("slices", "text"),
    [
        ((HeadSlice(0, 2, 0, 1, (1,), False), HeadSlice(3, 4, 1, 2, (1,), False)), "query head 2 is in 0 slices"),
        ((HeadSlice(0, 3, 0, 2, (2, 1), True), HeadSlice(2, 4, 1, 2, (1,), True)), "query head 2 is in 2 slices"),
        ((HeadSlice(0, 3, 0, 2, (1, 1), True), HeadSlice(3, 4, 1, 2, (1,), True)), "slice 0 has 3 query heads for 2 key heads"),
        ((HeadSlice(0, 2, 1, 2, (1,), False), HeadSlice(2, 4, 1, 2, (1,), False)), "0 in slice 0 reads key head 1 instead of 0"),
        ((HeadSlice(0, 3, 0, 2, (1, 2), True), HeadSlice(3, 4, 1, 2, (1,), True)), "1 in slice 0 reads key head 1 instead of 0"),
    ],
)
def test_wrong_slices_are_found(slices: tuple[HeadSlice, ...], text: str) -> None:
    split = HeadSplit(4, 2, 2)
    split.__dict__["slices"] = slices
    assert any(text in finding for finding in _heads_once(split)), list(_heads_once(split))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_of_bytes_hold_aligned_tensors(rows: int) -> None:
    row = RowFormat([(torch.bfloat16, (3, 5)), (torch.float32, (3,)), (torch.float64, (1, 2))])
    assert row.offsets == [0, 32, 48, 64]
    memory = torch.zeros(rows * row.size, dtype=torch.uint8)
    views = row.views(memory)
    assert [(x.dtype, *x.shape) for x in views] == [
        (torch.bfloat16, rows, 3, 5),
        (torch.float32, rows, 3),
        (torch.float64, rows, 1, 2),
    ]
    for number, x in enumerate(views, 1):
        x.fill_(number)
    assert all(bool((x == number).all()) for number, x in enumerate(row.views(memory.clone()), 1))


def test_groups_are_worlds_of_their_own() -> None:
    """Two groups side by side on the lanes of one communicator: messages, gathers, sums, and errors that name its ranks."""

    def work(comm: Communicator) -> tuple[Any, ...]:
        view = GroupView(comm, 2)
        assert isinstance(view, Communicator) and (view.rank, view.world, view.lanes) == (comm.rank // 2, 3, 4)
        given, came = torch.full((4,), comm.rank, dtype=torch.uint8), torch.empty(4, dtype=torch.uint8)
        ahead, behind = (view.rank + 1) % 3, (view.rank - 1) % 3
        view.post(0, [(ahead, given)], [(behind, came)], Awaited("forward", 0, 1)).wait()
        mine = torch.full((view.rank, 2), float(comm.rank))
        rows = torch.cat(view.all_gather_rows(mine, [0, 1, 2]))[:, 0].tolist()
        return int(came[0]), view.all_gather_bytes(b"%d" % comm.rank), rows, view.all_reduce_sum(torch.tensor([comm.rank])).item()

    for rank, (came, texts, rows, total) in enumerate(run_ranks(6, work, timeout=20)):
        part = rank % 2
        assert came == (rank - 2) % 6
        assert texts == [b"%d" % r for r in (part, part + 2, part + 4)]
        assert rows == [part + 2, part + 4, part + 4] and total == 3 * part + 6


def exchanged(
    comm: Communicator, shape: Shape, rows: list[int], full: list[Tensor], grads: list[list[Tensor]]
) -> tuple[list[Tensor], ...]:
    """What one rank of a group gets in the four exchanges; ``grads`` by slice: dq, dk and dv as attention would give them."""
    part = comm.rank % len(rows)
    exchange = HeadExchange(shape, rows, part)
    local = slice(exchange.row_ptr[part], exchange.row_ptr[part + 1])
    q, k, v, out, lse = (x[local] for x in full)
    inputs = exchange.inputs(run(exchange.send_inputs(comm, q, k, v, 1)))
    heads = slice(exchange.mine.start, exchange.mine.stop)
    outputs = run(exchange.return_outputs(comm, full[3][:, heads], full[4][:, heads], 1))
    upstream = run(exchange.send_upstream(comm, out, lse, 2))
    gradients = run(exchange.return_gradients(comm, *grads[part], 2))  # type: ignore[arg-type]
    return tuple(list(x) for x in (inputs, outputs, upstream, gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "rows"), [((4, 4), [3, 4]), ((6, 2), [2, 1, 0, 2]), ((9, 3), [5, 6]), ((8, 1), [0, 0, 1])])
def test_rows_and_heads_arrive_and_return(heads: tuple[int, int], rows: list[int], dtype: torch.dtype) -> None:
    """Bit by bit; two groups side by side, ranks without rows, key heads that several slices read and that are copied."""
    shape = Shape(*heads, 5, 3, dtype)
    g = torch.Generator().manual_seed(1)
    draw = lambda *tail: torch.randn(sum(rows), *tail, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v, out = (x.to(dtype) for x in (draw(heads[0], 5), draw(heads[1], 5), draw(heads[1], 3), draw(heads[0], 3)))
    lse = draw(heads[0]).to(shape.accumulate)
    pieces = HeadSplit(*heads, len(rows)).slices
    grads = [[draw(*tail).to(shape.accumulate) for tail in ((p.heads, 5), (p.kv_held, 5), (p.kv_held, 3))] for p in pieces]
    world = 2 * len(rows)
    found = run_ranks(world, lambda comm: exchanged(comm, shape, rows, [q, k, v, out, lse], grads), timeout=20)
    borders = [0, *itertools.accumulate(rows)]
    group = heads[0] // heads[1]
    for rank, (inputs, outputs, upstream, gradients) in enumerate(found):
        part = rank % len(rows)
        piece, local = pieces[part], slice(borders[part], borders[part + 1])
        mine = slice(piece.start, piece.stop)
        held = [(piece.start + j) // group for j in range(0, piece.heads, piece.heads // piece.kv_held)]
        for x, want in zip(inputs, (q[:, mine], k[:, held], v[:, held]), strict=True):
            assert torch.equal(x, want) and x.stride(-1) == 1
        for x, want in zip((*outputs, *upstream), (out[local], lse[local], out[:, mine], lse[:, mine]), strict=True):
            assert torch.equal(x, want)
        sums = [torch.zeros(sum(rows), n, d, dtype=shape.accumulate) for n, d in ((heads[0], 5), (heads[1], 5), (heads[1], 3))]
        for other, given in zip(pieces, grads, strict=True):
            sums[0][:, other.start : other.stop] = given[0]
            at = [0, *itertools.accumulate(other.copies)]
            for n, h in enumerate(range(other.kv_start, other.kv_stop)):
                for target, source in zip(sums[1:], given[1:], strict=True):
                    target[:, h] += source[:, at[n] : at[n + 1]].sum(1)
        for x, want in zip(gradients, sums, strict=True):
            assert x.dtype == dtype and torch.equal(x, want[local].to(dtype)), "summed first, rounded once"


def test_sums_travel_in_the_dtype_that_was_asked_for() -> None:
    shape = Shape(4, 1, 8, 8, torch.bfloat16)
    for home, width in ((None, 4), (torch.bfloat16, 2)):
        exchange = HeadExchange(replace(shape, home=home), [3, 3], 0)
        assert [dtype.itemsize for dtype, _ in exchange._gradients[1].parts] == [2, width, width]
    alone = HeadExchange(replace(shape, kv_heads=2), [3, 3], 0)
    assert [dtype.itemsize for dtype, _ in alone._gradients[1].parts] == [2, 2, 2], "a gradient that is no sum is rounded at once"


def test_an_exchange_that_a_rank_does_not_come_to_is_an_error_that_says_so() -> None:
    shape = Shape(2, 2, 4, 4, torch.float32)

    def work(comm: Communicator) -> None:
        x = torch.zeros(2, 2, 4)
        if comm.rank != 1:
            run(HeadExchange(shape, [2, 2], comm.rank).send_inputs(comm, x, x, x, 7))

    with pytest.raises(PeerError, match="from rank 1.*forward pass 7: head exchange: q, k and v"):
        run_ranks(2, work, timeout=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("world", "ulysses"), [(3, 3), (4, 2), (6, 2), (8, 2), (8, 4)])
def test_schedules_with_ulysses_verify(schedule: str, world: int, ulysses: int) -> None:
    strategy = Strategy(schedule, ulysses=ulysses, devices=world // 2 if world == 8 else None)
    for seed, kind in list(enumerate(MASKS))[world % 3 :: 3]:
        made = make_schedule(strategy, make_mask(kind, 37, seed), world, pad_to_equal=seed % 2 == 0)
        verify_schedule(made, Shape(8, 4, 4, 4, torch.float32))


@pytest.mark.parametrize("tokens, world", [(1 << 16, 64), pytest.param(1 << 20, 512, marks=pytest.mark.slow)])
def test_large_schedules_verify(tokens: int, world: int) -> None:
    made = make_schedule(Strategy("zigzag", ulysses=8), masks.causal(tokens), world)
    verify_schedule(made, Shape(64, 8, 128, 128, torch.bfloat16))
    assert made.layout.rows_all.tolist() == [tokens // world] * world


def test_wrong_layouts_and_plans_are_found() -> None:
    made = make_schedule(Strategy("zigzag", ulysses=2), masks.causal(32), 4)

    def findings(schedule: Schedule) -> str:
        with pytest.raises(PlanError) as caught:
            verify_schedule(schedule)
        return str(caught.value)

    def wrong(**changes: Any) -> Schedule:
        fields = ("strategy", "mask", "layout", "inner", "forward", "rank")
        return Schedule(**{**{name: getattr(made, name) for name in fields}, **changes})

    assert "position 8 is row 0 of rank 1, but row 0 of inner shard 1" in findings(wrong(layout=layouts.contiguous(32, 4)))
    assert "the outer layout has 6 ranks, the inner one with ulysses 2 has 4" in findings(wrong(layout=layouts.zigzag(32, 6)))
    begin, count = np.array([0, 10, 20, 30]), np.array([10, 10, 10, 2])
    uneven = Layout("uneven", 32, 32, 4, 1, np.arange(4), begin, count)
    assert "ranks 0 to 1 hold 20 rows of the 16 of inner shard 0" in findings(wrong(layout=uneven))
    fewer = replace(made.forward, transfers=made.forward.transfers[1:])
    assert "forward: rank" in findings(wrong(forward=fewer)) and "backward (kv): " in findings(wrong(forward=fewer))
    with pytest.raises(ValueError, match="made for rank 1 alone"):
        verify_schedule(make_schedule(Strategy("zigzag", ulysses=2), masks.causal(32), 4, rank=3))


@pytest.mark.parametrize(("world", "ulysses"), [(4, 4), (8, 2), (6, 3)])
@pytest.mark.parametrize("heads", [(12, 12), (24, 12)], ids=str)
def test_exchanges_move_all_but_a_part(world: int, ulysses: int, heads: tuple[int, int]) -> None:
    """Heads that the degree divides: a rank keeps 1/u of its rows' heads and sends the rest, evenly to its neighbours."""
    u, rows, d, d_v, width = ulysses, 24, 16, 8, 2
    shape = Shape(*heads, d, d_v, torch.bfloat16)
    forward, backward = exchange_bytes(make_schedule(Strategy("ring", ulysses=u), masks.full(rows * world), world), shape)
    q, kv, out = heads[0] * d * width, heads[1] * (d + d_v) * width, heads[0] * (d_v * width + 4)
    for volume, a_row in ((forward, q + kv + out), (backward, out + q + kv)):
        assert (volume.sum(0) == rows * a_row * (u - 1) // u).all() and (volume.sum(1) == volume.sum(0)).all()
        groups = np.arange(world) // u
        assert not volume[groups[:, None] != groups].any() and not volume.diagonal().any()


def test_bytes_of_shared_key_heads_and_uneven_slices() -> None:
    """6:2 heads on 4 ranks, 2 + 1 + 2 + 1: every rank gets a key head, whose gradient is a float32 sum. Rows 3, 3, 3, 2."""
    shape = Shape(6, 2, 8, 4, torch.bfloat16)
    made = make_schedule(Strategy("ring", ulysses=4), masks.causal(11), 4)
    rows, queries = np.array([2, 3, 3, 3]), np.array([2, 1, 2, 1])
    assert made.layout.rows_all.tolist() == rows.tolist()
    forward, backward = exchange_bytes(made, shape)
    for a, b in itertools.permutations(range(4), 2):
        out = rows[a] * queries[b] * (4 * 2 + 4), rows[b] * queries[a] * (4 * 2 + 4)
        assert forward[a, b] == rows[a] * (queries[b] * 8 * 2 + (8 + 4) * 2) + out[1]
        assert backward[a, b] == out[0] + rows[b] * (queries[a] * 8 * 2 + (8 + 4) * 4)


class Counting:
    """Any communicator, with a count of the bytes that it sends, by pass and receiver."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.sent = {name: np.zeros(communicator.world, dtype=np.int64) for name in ("forward", "backward")}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.communicator, name)

    def post(self, lane: int, sends: Any, receives: Any, awaited: Awaited) -> Any:
        for peer, tensor in sends:
            self.sent[awaited.pass_name][peer] += tensor.numel()
        return self.communicator.post(lane, sends, receives, awaited)


@pytest.mark.parametrize("heads", [(24, 12), (24, 2)], ids=str)
@pytest.mark.parametrize(
    "strategy", [Strategy("zigzag", ulysses=2), Strategy("striped", ulysses=6), Strategy("tree", ulysses=2)], ids=str
)
def test_stated_bytes_are_those_of_a_run(strategy: Strategy, heads: tuple[int, int]) -> None:
    """Head sizes that need no alignment: all that any rank sends to any other in a forward and a backward pass."""
    mask = masks.causal(60)
    shape = Shape(*heads, 16, 16, torch.float32)

    def work(comm: Communicator) -> dict[str, np.ndarray]:
        counting = Counting(comm)
        cp = ContextParallel(schedule=strategy, communicator=counting)  # type: ignore[arg-type]
        plan = cp.plan(mask)
        q, k, v = (torch.ones(plan.rows, n, 16, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
        cp.attention(q, k, v, plan).sum().backward()
        return counting.sent

    found = run_ranks(6, work, timeout=20)
    for name, want in zip(("forward", "backward"), schedule_bytes(make_schedule(strategy, mask, 6), shape), strict=True):
        sent = np.stack([rank[name] for rank in found])
        assert np.array_equal(sent, want), (name, sent, want)
