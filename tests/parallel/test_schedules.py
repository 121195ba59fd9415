"""gather, the double ring and the tree: exact covers, exact numbers, exact volumes, and views that cost no whole plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import Band
from distattn.kernels.reference import Reference
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.cluster import load_cluster
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import DST, LANE, NEED, OWNER, POST, Q_OWNER, RANK, SRC, STAGE, START, STOP, WHAT, Plan, What
from distattn.parallel.price import price
from distattn.parallel.schedules import make_plan
from distattn.parallel.schedules.double_ring import double_ring
from distattn.parallel.schedules.gather import gather
from distattn.parallel.schedules.ring import ring
from distattn.parallel.schedules.tree import tree
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import peak_buffer_rows, wasted_rows, work
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import verify
from tests.parallel.attend import check, exact, make_problem, on_threads
from tests.parallel.plans import LAYOUTS, MASKS, make_layout, make_mask
from tests.parallel.test_plan import dense_cover

UNIT = Shape(heads=1, kv_heads=1, d=8, d_v=8, dtype=torch.bfloat16)
KEEPS = ("last", "none", "all")
Schedule = Callable[..., Plan]


def divisors(world: int) -> list[int]:
    return [d for d in range(1, world + 1) if world % d == 0]


def options(schedule: Schedule, world: int) -> list[dict]:
    if schedule is gather:
        return [{"stages": 1}, {"stages": 2}, {"stages": 5}]
    if schedule is double_ring:
        return [{"devices": d} for d in divisors(world)]
    return [{"devices": d, "in_flight": w} for d in (None, *divisors(world)[:-1]) for w in (None, 1, 3, 64)]


@st.composite
def cases(draw, least: int = 0):
    """(schedule, options, layout, mask)"""
    world, n = draw(st.integers(1, 8)), draw(st.integers(least, 40))
    schedule = draw(st.sampled_from([gather, double_ring, tree]))
    mask = make_mask(draw(st.sampled_from(MASKS)), n, draw(st.integers(0, 99)))
    layout = make_layout(draw(st.sampled_from(LAYOUTS)), mask, world, draw(st.booleans()))
    return schedule, draw(st.sampled_from(options(schedule, world))), layout, mask


def check_plan(plan: Plan) -> None:
    n, total = plan.layout.n_valid, plan.layout.n_tokens
    want = torch.zeros(total, total, dtype=torch.int32)
    want[:n, :n] = plan.mask.bands.dense(n, n)
    assert torch.equal(dense_cover(plan), want)
    verify(plan)
    verify([plan.view(r) for r in range(plan.world)])
    assert work(plan).sum() == plan.mask.bands.area
    assert wasted_rows(plan) == 0
    for keep in KEEPS:
        back = transpose(plan, keep)
        verify(back)
        verify([back.view(r) for r in range(plan.world)])


def check_views(whole: Plan, made_for: Callable[[int], Plan]) -> None:
    """A plan made for one rank gives that rank what the whole plan does, forward and backward."""
    backs = {keep: transpose(whole, keep) for keep in KEEPS}
    for rank in range(whole.world):
        part = made_for(rank)
        assert part.bands_of == rank
        assert part.view(rank).digest == whole.view(rank).digest
        for keep, back in backs.items():
            assert transpose(part, keep).view(rank).digest == back.view(rank).digest, keep


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_plan_covers_its_mask_and_passes_verify(case):
    schedule, chosen, layout, mask = case
    plan = schedule(layout, mask, **chosen)
    check_plan(plan)
    check_views(plan, functools.partial(made_for, schedule, layout, mask, chosen))


@settings(max_examples=30, deadline=None)
@given(cases(1), st.sampled_from(KEEPS), st.booleans())
def test_any_plan_computes_attention(case, keep, sinks):
    """Rounding aside, in float64."""
    schedule, chosen, layout, mask = case
    plan = schedule(layout, mask, **chosen)
    problem = make_problem(mask, torch.float64, d=4, d_v=6, sinks=sinks)
    check(on_threads(plan, transpose(plan, keep), problem, Reference()), exact(problem), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", [gather, double_ring, tree])
def test_every_mask_and_option(schedule, layout, world):
    for number, kind in enumerate(MASKS):
        mask = make_mask(kind, 60 + world)
        placed = make_layout(layout, mask, world)
        problem = make_problem(mask, torch.float64, d=4)
        want = exact(problem)
        chosen_here = options(schedule, world)[number % 4 :: 4] if schedule is tree else options(schedule, world)
        for chosen in chosen_here:  # of a tree, another number of owners in flight for each mask
            plan = schedule(placed, mask, **chosen)
            check_plan(plan)
            if number % 3 == 0:
                check_views(plan, functools.partial(made_for, schedule, placed, mask, chosen))
            check(on_threads(plan, transpose(plan, KEEPS[number % 3]), problem, Reference()), want, 1e-12)


def made_for(schedule: Schedule, layout: Layout, mask: Mask, chosen: dict, rank: int) -> Plan:
    return schedule(layout, mask, **chosen, rank=rank)


def rows(t: np.ndarray) -> int:
    return int((t[:, STOP] - t[:, START]).sum())


def of(plan: Plan, what: What) -> np.ndarray:
    return plan.transfers[plan.transfers[:, WHAT] == what]


def sent(t: np.ndarray, world: int) -> np.ndarray:
    """Rows that each rank sends, int64 [world]."""
    return np.bincount(t[:, SRC], weights=t[:, STOP] - t[:, START], minlength=world).astype(np.int64)


def units(plan: Plan, nodes_of: int | None = None) -> np.ndarray:
    """Bytes that each rank sends (to other nodes of so many ranks, if given), in units of one rank's bf16 K + V."""
    t = plan.transfers
    if nodes_of is not None:
        t = t[t[:, SRC] // nodes_of != t[:, DST] // nodes_of]
    weights = (t[:, STOP] - t[:, START]) * np.array([UNIT.row_bytes(what) for what in What])[t[:, WHAT]]
    shard = plan.layout.rows(0) * UNIT.row_bytes(What.KV)
    return np.bincount(t[:, SRC], weights=weights, minlength=plan.world) / shard


# --- gather -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MASKS)
def test_gather_receives_exactly_the_keys_that_dense_rows_see(kind, layout):
    mask = make_mask(kind, 45)
    placed = make_layout(layout, mask, 5)
    dense = mask.bands.dense(45, 45).bool()
    for stages in (1, 3):
        plan = gather(placed, mask, stages)
        for rank in range(5):
            keys = dense[torch.from_numpy(placed.positions(rank))].any(0)
            keys[torch.from_numpy(placed.positions(rank))] = False
            arrived = torch.zeros(45, dtype=torch.int32)
            for transfer in (t for t in plan.iter_transfers() if t.dst == rank):
                assert transfer.src == transfer.rows.owner
                arrived[torch.from_numpy(placed.positions(transfer.src)[transfer.rows.start : transfer.rows.stop])] += 1
            assert torch.equal(arrived, keys.int())


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_gather_volume_of_a_full_mask(kind, world):
    """Forward P - 1 shards out of every rank; backward 2 (P - 1) of float32 gradients and what was not kept once more.

    Parts are equal, so the last of s, which ``keep="last"`` keeps, is 1 / s of what a rank receives. A shard has 3 * 128 rows:
    ends of parts are multiples of 128.
    """
    n = 384 * world
    for stages in (1, 3):
        plan = gather(getattr(layouts, kind)(n, world), masks.full(n), stages)
        assert np.all(units(plan) == world - 1)
        assert np.all(units(transpose(plan, "none")) == 3 * (world - 1))
        assert np.all(units(transpose(plan, "all")) == 2 * (world - 1))
        assert units(transpose(plan, "last")).sum() == pytest.approx((3 - 1 / stages) * (world - 1) * world, rel=1e-12)
        assert set(of(transpose(plan), What.DKV)[:, LANE]) == {2}


def test_parts_of_a_gather_travel_while_the_one_before_is_worked_on():
    world, n, stages = 8, 8 * 1024, 4
    for kind in ("zigzag", "striped"):
        plan = gather(getattr(layouts, kind)(n, world), masks.causal(n), stages)
        t, tasks = plan.transfers, plan.tasks[plan.tasks[:, STAGE] > 0]
        assert plan.stages == 1 + stages and set(t[:, NEED]) == set(range(1, 1 + stages))
        assert np.array_equal(t[:, POST], t[:, NEED] - 1)
        arrivals = {tuple(x) for x in t[:, [NEED, DST, OWNER, START, STOP]].tolist()}
        assert arrivals == {tuple(x) for x in tasks[:, [STAGE, RANK, 5, 6, 7]].tolist()}
        parts = np.array([[rows(t[(t[:, DST] == r) & (t[:, NEED] == s)]) for s in range(1, 1 + stages)] for r in range(world)])
        neediest, share = parts[parts.sum(1).argmax()], parts.sum(1).max() / stages
        assert np.abs(neediest - share).max() <= 128 and parts.max() <= share + 128
    full = gather(layouts.striped(n, world), masks.full(n), 7)
    for r in range(world):  # one owner a part, another for each rank
        assert full.transfers[full.transfers[:, DST] == r][:, SRC].tolist() == [(r - t) % world for t in range(1, world)]


def test_a_part_may_end_inside_a_shard():
    """A window reaches only one neighbour: its keys come in four equal parts, up to multiples of 128 rows."""
    world, n = 4, 4 * 2048
    mask = masks.sliding_window(n, 1025)
    plan = gather(layouts.contiguous(n, world), mask, 4)
    mine = plan.transfers[plan.transfers[:, DST] == 2]
    assert [(int(t[START]), int(t[STOP])) for t in mine] == [(1024 + 256 * i, 1280 + 256 * i) for i in range(4)]
    assert np.diff(plan.view(2).band_ptr).min() > 0
    verify(plan)
    small = masks.sliding_window(640, 300)
    plan = gather(layouts.contiguous(640, 2), small, 2)
    assert plan.transfers[:, [START, STOP]].tolist() == [[21, 128], [128, 320]]
    problem = make_problem(small, torch.float64, d=4)
    for keep in KEEPS:
        check(on_threads(plan, transpose(plan, keep), problem, Reference()), exact(problem), 1e-12)


@pytest.mark.parametrize(
    ("mask", "world", "devices", "parts"),
    [
        (masks.sliding_window(32 * 8192, 4096), 32, 8, 1),  # a neighbour's rows hide behind own work
        (masks.full(8 * 8192), 8, None, 1),
        (masks.full(32 * 8192), 32, 8, 8),  # too much for the network to hide in one part
        (masks.causal(32 * 65536), 32, 8, 4),
    ],
)
def test_gather_by_name_takes_the_parts_that_cost_least(mask, world, devices, parts):
    """On the H200 nodes that its figures are from: what the simulator finds best of 1, 2, 4 and 8. The same on all ranks."""
    strategy = Strategy("gather", devices=devices)
    assert {make_plan(strategy, mask, world, rank=rank).stages for rank in (0, world // 2, world - 1)} == {parts + 1}
    cluster, shape = load_cluster("h200"), Shape(32, 8, 128, 128, torch.bfloat16)
    seconds = {n: price(replace(strategy, stages=n), mask, world, shape, cluster, compile_below=0).seconds for n in (1, 2, 4, 8)}
    assert seconds[parts] == min(seconds.values())


@pytest.mark.parametrize("seed", range(6))
def test_what_gather_of_documents_moves_beside_rings(seed):
    """32 documents of mean 4096 on 16 ranks of 8k, as multiples of the rows that gather moves on contiguous shards.

    The ring of the field sends P - 1 whole shards out of every rank: 12 to 51 times as much. Ours prunes. On the same contiguous
    shards it moves the very rows that gather moves, 1.0; on zigzag shards 4.8 to 15; on striped ones, and where each document is
    spread over all ranks, all that the field's ring moves but for the last hops.
    """
    world, shard = 16, 8192
    weights = np.random.default_rng(seed).lognormal(size=32)
    ends = np.round(np.cumsum(weights) / weights.sum() * world * shard).astype(int)
    lengths = np.diff(ends, prepend=0).tolist()
    mask, n = masks.documents(lengths), world * shard
    contiguous = layouts.contiguous(n, world)
    moved = rows(gather(contiguous, mask).transfers)
    unpruned = world * (world - 1) * shard
    assert unpruned / moved >= 12
    assert rows(ring(contiguous, mask, grain=0).transfers) == moved
    pruned = {
        layout.name: rows(ring(layout, mask).transfers) / moved
        for layout in (
            layouts.zigzag(n, world),
            layouts.striped(n, world),
            layouts.document_zigzag(lengths, world),
            layouts.document_striped(lengths, world),
        )
    }
    zigzag, *others = pruned.values()
    assert 4.5 <= zigzag < 0.5 * unpruned / moved
    assert all(0.95 * unpruned / moved <= ratio <= unpruned / moved for ratio in others)


def test_a_window_of_4k_in_a_million_tokens_asks_neighbours_only():
    world, n = 64, 1 << 20
    plan = gather(layouts.contiguous(n, world), masks.sliding_window(n, 4096))
    shard = n // world
    want = [[r - 1, r, r - 1, shard - 4095, shard] for r in range(1, world)]
    assert plan.transfers[:, [SRC, DST, OWNER, START, STOP]].tolist() == want
    back = transpose(plan)
    assert {(int(t[SRC]), int(t[DST])) for t in back.transfers} == {(r, r - 1) for r in range(1, world)}
    assert rows(of(back, What.DKV)) == 4095 * (world - 1)


# --- double ring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_double_ring_volume_of_a_full_mask(kind, world):
    """Between nodes: P / devices - 1 shards out of every rank, all to the same device of the next node; inside P - P / devices.

    Backward: twice that of float32 gradients, and the keys once more between nodes, less those that were kept.
    """
    n = 8 * world
    for devices in divisors(world):
        nodes = world // devices
        plan = double_ring(getattr(layouts, kind)(n, world), masks.full(n), devices)
        assert np.all(units(plan, devices) == nodes - 1)
        assert np.all(units(plan) == world - 1)
        t = plan.transfers
        across = t[:, SRC] // devices != t[:, DST] // devices
        assert np.array_equal(t[across, DST], (t[across, SRC] + devices) % world)
        assert np.array_equal(across, t[:, LANE] == 1)
        assert np.all(t[across, NEED] - t[across, POST] == devices) and np.all((t[:, NEED] - t[:, POST])[~across] == 1)
        for keep, again in (("none", nodes - 1), ("last", max(nodes - 2, 0)), ("all", 0)):
            back = transpose(plan, keep)
            assert np.all(units(back, devices) == 2 * (nodes - 1) + again), (devices, keep)
        assert np.all(sent(of(transpose(plan, "none"), What.KV), world) == 8 * (world - 1))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_double_ring_of_a_causal_mask_takes_keys_no_further_than_they_are_seen(devices):
    """Contiguous shards: those of node b go to the nodes after it, and inside their own node to the devices after theirs."""
    world, shard = 8, 4
    nodes = world // devices
    plan = double_ring(layouts.contiguous(world * shard, world), masks.causal(world * shard), devices)
    outer, inner = plan.transfers[plan.transfers[:, LANE] == 1], plan.transfers[plan.transfers[:, LANE] == 0]
    pairs_of_nodes, pairs_of_devices = nodes * (nodes - 1) // 2, devices * (devices - 1) // 2
    assert rows(outer) == shard * pairs_of_nodes * devices
    assert rows(inner) == shard * (pairs_of_nodes * devices * (devices - 1) + nodes * pairs_of_devices)


@pytest.mark.parametrize("kind", ["causal", "documents", "sinks"])
def test_one_node_or_one_device_a_node_is_a_ring(kind):
    mask = make_mask(kind, 61)
    layout = make_layout("zigzag", mask, 6)
    want = ring(layout, mask, grain=0)
    for devices, lane in ((6, 0), (1, 1)):
        plan = double_ring(layout, mask, devices)
        assert {tuple(t) for t in plan.tasks.tolist()} >= {tuple(t) for t in want.tasks.tolist()}
        moved = plan.transfers.copy()
        assert set(moved[:, LANE]) == {lane}
        moved[:, LANE] = 0
        assert sorted(moved.tolist()) == sorted(want.transfers.tolist())


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32])
def test_double_ring_holds_four_shards_at_most(devices):
    world = 32
    plan = double_ring(layouts.striped(world * 4, world), masks.full(world * 4), devices)
    want = min(2, world // devices - 1) + min(2, devices - 1)
    assert plan.buffer_bound == 4 * want
    assert np.all(peak_buffer_rows(plan) == 4 * want)


# --- tree -------------------------------------------------------------------------------------------------------------------


def depth_of(world: int, devices: int) -> int:
    """Doublings until one holder is as many as the nodes, and then as the devices."""
    depth = 0
    for n in (world // devices, devices):
        holders = 1
        while holders < n:
            holders, depth = 2 * holders, depth + 1
    return depth


@pytest.mark.parametrize("in_flight", [None, 1, 2, 3, 8, 1000])
@pytest.mark.parametrize("world, devices", [(1, 1), (2, 1), (2, 2), (3, 3), (6, 2), (8, 1), (8, 4), (8, 8), (12, 3), (16, 4)])
def test_edges_and_turns_of_a_tree(world, devices, in_flight):
    """Walks every owner's messages: a broadcast of one send a boundary and rank, back the same way, few owners at once."""
    n, shard = 4 * world, 4
    plan = tree(layouts.striped(n, world), masks.full(n), devices, in_flight)
    depth = depth_of(world, devices)
    queries, partials = of(plan, What.Q), of(plan, What.OUT)
    assert len(queries) == len(partials) == world * (world - 1) and np.all(partials[:, LANE] == 2)
    assert np.all(sent(partials, world) == shard * (world - 1))
    flights = []
    for owner in range(world):
        down, up = queries[queries[:, OWNER] == owner], partials[partials[:, OWNER] == owner]
        assert sorted(down[:, DST]) == [r for r in range(world) if r != owner]
        crossing = down[:, SRC] // devices != down[:, DST] // devices
        assert crossing.sum() == world // devices - 1 and np.array_equal(down[:, LANE], crossing)
        assert len({(int(t[SRC]), int(t[POST]), int(t[LANE])) for t in down}) == len(down)
        assert {(int(t[SRC]), int(t[DST])) for t in down} == {(int(t[DST]), int(t[SRC])) for t in up}
        [work_stage] = set(plan.tasks[(plan.tasks[:, Q_OWNER] == owner) & (plan.tasks[:, RANK] != owner)][:, STAGE]) or [0]
        for t in down:
            [answer] = up[(up[:, SRC] == t[DST]) & (up[:, DST] == t[SRC])]
            assert t[NEED] == t[POST] + 1 and answer[NEED] == answer[POST] + 1
            assert work_stage - t[NEED] == answer[POST] - work_stage - 1 >= 0
        if world > 1:
            assert down[:, POST].min() == work_stage - depth
            flights.append((down[:, POST].min(), up[:, NEED].max()))
    most = max((sum(a <= stage < b for a, b in flights) for stage in range(plan.stages)), default=0)
    assert most <= (in_flight or 2 * depth + 1)
    if in_flight is None and world > 1:
        assert most == min(world, 2 * depth + 1)
    verify(plan)


@pytest.mark.parametrize("world, devices", [(4, 2), (8, 4), (8, 8), (12, 3)])
def test_tree_volume(world, devices):
    """An edge carries bf16 queries down and float32 (o, lse) up; backward (dout, lse, delta) down and dq up."""
    n, shard = 4 * world, 4
    plan = tree(layouts.zigzag(n, world), masks.full(n), devices)
    edge = 8 * 2 + 8 * 4 + 4
    assert units(plan).sum() * shard * UNIT.row_bytes(What.KV) == world * (world - 1) * shard * edge
    across = world * (world // devices - 1) * shard
    assert units(plan, devices).sum() * shard * UNIT.row_bytes(What.KV) == across * edge
    back = transpose(plan)
    for what in (What.DOUT, What.DQ):
        assert np.all(np.bincount(of(back, what)[:, SRC if what == What.DQ else DST]) * shard == shard * (world - 1))
        slow = of(back, what)
        assert rows(slow[slow[:, SRC] // devices != slow[:, DST] // devices]) == across


def test_a_tree_sends_nothing_to_ranks_that_need_nothing():
    """Queries of rank 0 that see keys of rank 5 only: 0 -> 1 -> 5 and back; rank 1 passes on, and keeps nothing it does not."""
    world, shard = 8, 4
    mask = masks.from_bands(world * shard, [Band(1, 3, 5 * shard, 6 * shard)])
    plan = tree(layouts.contiguous(world * shard, world), mask)
    columns = [SRC, DST, OWNER, START, STOP, WHAT]
    want = [[0, 1, 0, 1, 3, 0], [1, 5, 0, 1, 3, 0], [5, 1, 0, 1, 3, 3], [1, 0, 0, 1, 3, 3]]
    assert plan.transfers[:, columns].tolist() == want
    assert set(plan.tasks[plan.tasks[:, STAGE] > 0][:, RANK]) == {5}
    check_plan(plan)
    problem = make_problem(mask, torch.float64, d=4)
    check(on_threads(plan, transpose(plan), problem, Reference()), exact(problem), 1e-12)


@pytest.mark.parametrize("in_flight", [1, 4, 9, 40])
def test_a_tree_holds_the_owners_in_flight_and_no_more(in_flight):
    world, shard = 16, 4
    plan = tree(layouts.striped(world * shard, world), masks.full(world * shard), 4, in_flight)
    together = max(1, in_flight // 9)  # of depth 4: nine stages from leaving to answer
    assert plan.buffer_bound == shard * (min(in_flight, 15) + min(together, 15))
    assert peak_buffer_rows(plan).max() <= plan.buffer_bound
    verify(plan)
    for keep in KEEPS:
        verify(transpose(plan, keep))


# --- all --------------------------------------------------------------------------------------------------------------------

AT_SCALE = {
    "gather": lambda layout, mask, rank=None: gather(layout, mask, 4, rank=rank),
    "double_ring": lambda layout, mask, rank=None: double_ring(layout, mask, 8, rank=rank),
    "tree": lambda layout, mask, rank=None: tree(layout, mask, 8, rank=rank),
}


@pytest.mark.parametrize("name", AT_SCALE)
@pytest.mark.parametrize("world", [32, pytest.param(512, marks=pytest.mark.slow)])
def test_a_million_causal_tokens_verify_and_a_rank_looks_at_little(name, world):
    mask = masks.causal(1 << 20)
    layout = layouts.zigzag(1 << 20, world)
    plan = AT_SCALE[name](layout, mask)
    verify(plan)
    back = transpose(plan)
    verify(back)
    rank = world // 2 + 3
    part = AT_SCALE[name](layout, mask, rank)
    assert part.view(rank).digest == plan.view(rank).digest
    assert transpose(part).view(rank).digest == back.view(rank).digest
    if world == 512:
        assert len(part.tasks) + len(part.transfers) < (len(plan.tasks) + len(plan.transfers)) / 6
        assert len(part.bands) == len(plan.view(rank).bands)


@pytest.mark.parametrize("devices", [3, 0, -2, 2.0, 16])
def test_nodes_that_do_not_fit_are_refused(devices):
    layout, mask = layouts.striped(64, 8), masks.causal(64)
    for schedule in (double_ring, tree):
        with pytest.raises(ValueError, match=r"8 ranks .* Pass a number of devices a node that divides 8: 1, 2, 4, 8"):
            schedule(layout, mask, devices=devices)


@pytest.mark.parametrize("bad", [0, -1, 1.5])
def test_no_parts_and_no_flights_are_refused(bad):
    layout, mask = layouts.striped(64, 8), masks.causal(64)
    with pytest.raises(ValueError, match="stages = .* Pass a whole number of 1 or more"):
        gather(layout, mask, bad)
    with pytest.raises(ValueError, match="in_flight = .* Pass a whole number of 1 or more"):
        tree(layout, mask, in_flight=bad)


@pytest.mark.parametrize("schedule", [gather, lambda *args, **given: double_ring(*args, 2, **given), tree])
def test_a_rank_or_a_length_that_the_layout_does_not_have_is_refused(schedule):
    layout = layouts.striped(64, 8)
    with pytest.raises(ValueError, match="rank 8 was asked for on a layout of 8 ranks"):
        schedule(layout, masks.causal(64), rank=8)
    with pytest.raises(ValueError, match="which holds 64 tokens"):
        schedule(layout, masks.causal(63))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("world", "devices"), [(6, 2), (8, 2), (12, 4)])
def test_double_rings_of_three_nodes_and_more(world, devices, keep):
    """Keys that are passed on over the long hop are sent again over it, together with others that are needed at other times."""
    for seed, kind in enumerate(("causal", "sinks", "documents")):
        mask = make_mask(kind, 16 * world, seed)
        for layout in ("zigzag", "contiguous"):
            plan = double_ring(make_layout(layout, mask, world), mask, devices)
            back = transpose(plan, keep)
            verify(back)
            problem = make_problem(mask, torch.float64, d=4, d_v=6, seed=seed)
            check(on_threads(plan, back, problem, Reference()), exact(problem), 1e-12)
