"""Rings of several laps: the same attention in less memory, stage for stage as balanced, and buffers that are free in between."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import areas
from distattn.kernels.reference import Reference
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.cluster import load_cluster
from distattn.parallel.packing import NO_TIME, Packing, Visits, visits
from distattn.parallel.plan import KV_OWNER, RANK, STAGE, Plan, What
from distattn.parallel.price import price
from distattn.parallel.schedule import make_schedule
from distattn.parallel.schedules import make_plan
from distattn.parallel.schedules.laps import lap_parts
from distattn.parallel.schedules.ring import query_ring, ring
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import bytes_by_link, peak_buffer_rows
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import verify, verify_schedule
from tests.parallel.attend import check, exact, make_problem, on_threads, programs
from tests.parallel.plans import LAYOUTS, MASKS, make_layout, make_mask
from tests.parallel.test_plan import dense_cover
from tests.parallel.test_schedules import check_views

RINGS = {"keys": ring, "queries": query_ring}


@settings(max_examples=60, deadline=None)
@given(
    turned=st.sampled_from(list(RINGS)),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    world=st.integers(1, 8),
    n=st.integers(0, 60),
    laps=st.integers(2, 5),
    seed=st.integers(0, 99),
    grain=st.sampled_from([0, 1, 8, 128]),
)
def test_any_plan_covers_its_mask_and_passes_verify(turned, layout, mask, world, n, laps, seed, grain):
    the_mask = make_mask(mask, n, seed)
    the_layout = make_layout(layout, the_mask, world)
    plan = RINGS[turned](the_layout, the_mask, grain=grain, laps=laps)
    want = torch.zeros(the_layout.n_tokens, the_layout.n_tokens, dtype=torch.int32)
    want[:n, :n] = the_mask.bands.dense(n, n)
    assert torch.equal(dense_cover(plan), want)
    verify(plan)
    verify([plan.view(r) for r in range(world)])
    for keep in ("last", "none", "all"):
        back = transpose(plan, keep)
        verify(back)
        verify([back.view(r) for r in range(world)])
    check_views(plan, functools.partial(RINGS[turned], the_layout, the_mask, grain=grain, laps=laps))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_laps_on_every_layout_and_mask_in_float32(layout, world):
    for i, kind in enumerate(MASKS):
        mask = make_mask(kind, 60 + world, i)
        the_layout = make_layout(layout, mask, world)
        plan, turned = (RINGS[name](the_layout, mask, laps=2 + i % 2) for name in RINGS)
        problem = make_problem(mask, heads=(4, 2), d=16, sinks=i % 3 == 0)
        backward = transpose(turned, "none") if i % 2 else transpose(plan, ("last", "none", "all")[i // 2 % 3])
        check(on_threads(plan, backward, problem), exact(problem), 1e-6)


@settings(max_examples=20, deadline=None)
@given(
    turned=st.sampled_from(list(RINGS)),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    world=st.integers(1, 6),
    n=st.integers(1, 40),
    laps=st.integers(2, 4),
    keep=st.sampled_from(["last", "none", "all"]),
)
def test_any_plan_computes_attention(turned, layout, mask, world, n, laps, keep):
    """Rounding aside, in float64."""
    the_mask = make_mask(mask, n)
    plan = RINGS[turned](make_layout(layout, the_mask, world), the_mask, laps=laps)
    problem = make_problem(the_mask, torch.float64, d=4, d_v=6)
    check(on_threads(plan, transpose(plan, keep), problem, Reference()), exact(problem), 1e-12)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("laps", [1, 2, 3, 4])
def test_parts_are_all_rows_once_and_of_one_size(kind, laps):
    layout = getattr(layouts, kind)(8 * 960 + 5, 8)
    parts = lap_parts(layout, laps)
    for owner in range(8):
        mine = parts.owner == owner
        assert parts.start[mine].tolist() == [0, *parts.stop[mine][:-1]] and parts.stop[mine][-1] == layout.rows(owner)
        sizes = np.bincount(parts.lap[mine], weights=(parts.stop - parts.start)[mine])
        assert len(sizes) == laps and sizes.max() - sizes.min() <= 4


def most_over_mean(plan: Plan) -> np.ndarray:
    """Work of the busiest rank over the mean, by stage; of own rows only in stage 0."""
    work = np.zeros((plan.stages, plan.world))
    task = plan.tasks[plan.task_of_band]
    np.add.at(work, (task[:, STAGE], task[:, RANK]), areas(plan.bands))
    return work.max(1) / work.mean(1)


@pytest.mark.parametrize("kind", ["zigzag", "striped"])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_stage_stays_as_balanced_as_that_of_one_lap(kind, world):
    """Zigzag exactly; in a striped shard of n rows a diagonal is n of some n^2 / 2 pairs, and a part has its share of both."""
    mask, rows = masks.causal(world * 768), 768
    one, two = (most_over_mean(make_plan(Strategy(kind, laps=laps), mask, world)) for laps in (1, 2))
    assert len(two) == 2 * (world - 1) + 1
    if kind == "zigzag":
        assert one.max() == pytest.approx(1.0, abs=1e-12) and two.max() == pytest.approx(1.0, abs=1e-12)
    else:
        assert two[1:].max() <= one[1:].max() + 1e-9 + 0.1 / rows, (one, two)


@pytest.mark.parametrize("kind", ["zigzag", "striped"])
def test_laps_have_equal_shares_of_causal_work(kind):
    world = 4
    plan = make_plan(Strategy(kind, laps=2), masks.causal(world * 1024), world)
    task = plan.tasks[plan.task_of_band]
    work = np.bincount(task[:, STAGE], weights=areas(plan.bands))
    assert work[1:4].sum() == pytest.approx(work[4:7].sum(), rel=0.01)


def test_documents_of_any_length_stay_balanced():
    """Long documents are cut each for itself, short ones together: a few rows' difference, not a document's."""
    for lengths in ([4000, 3000, 1192], [64] * 128, [5000, *[40] * 79, 32]):
        mask = masks.documents(lengths)
        one, two = (most_over_mean(make_plan(Strategy("zigzag", laps=laps), mask, 4)) for laps in (1, 2))
        assert two.max() <= 1.06 * one.max(), (lengths[:3], one, two)


def held(kind: str, world: int, laps: int | None, tokens: int = 256) -> int:
    """Bytes that the rank which needs most holds of others, kept ones included; 8 heads, as the benchmark counts them."""
    made = make_schedule(Strategy(kind, laps=laps), masks.causal(world * tokens), world)
    shape = Shape(8, 8, 64, 64, torch.float32)
    backward = made.backward(made.rotation(shape))
    pairs = [programs(made.forward, backward, rank, shape) for rank in range(world)]
    return max(f.kept_bytes + max(f.workspace_bytes, b.workspace_bytes) for f, b in pairs)


@pytest.mark.parametrize("kind", ["zigzag", "striped"])
def test_memory_is_flat_from_two_ranks_on(kind):
    """With a rank's own 8 tensors, as launch/bench_attention.py counts: within 5% at constant tokens a rank, in two laps."""
    one = 256 * 8 * 64 * 4
    totals = {world: 8 * one + held(kind, world, 2) for world in (2, 3, 4, 5, 8, 32)}
    assert max(totals.values()) <= 1.05 * min(totals.values()), totals
    for world in (4, 8, 32):
        assert held(kind, world, 2) == pytest.approx(held(kind, world, 1) / 2, rel=0.01)


def test_buffers_are_parts_of_a_shard():
    for world, laps in ((4, 2), (8, 4), (64, 2)):
        plan = make_plan(Strategy("striped", laps=laps, rotate="kv"), masks.full(32 * world), world)
        assert plan.buffer_bound == 64 // laps
        assert np.all(peak_buffer_rows(plan) == 64 // laps)
        assert peak_buffer_rows(transpose(plan, "none")).max() <= 4 * 32 // laps
        kept = transpose(plan, "last").kept
        assert np.all(np.bincount(kept[:, 0], weights=kept[:, 3] - kept[:, 2]) == 32 // laps), "the last stage's part"


def test_bytes_are_those_of_one_lap_but_for_what_is_kept():
    """P - 1 shards forward; backward P - 1 shards of sums, and keys again less the part of a shard that the last stage kept."""
    world, shape = 8, Shape(2, 2, 16, 16, torch.float32)
    for laps in (1, 2, 4):
        plan = make_plan(Strategy("striped", laps=laps), masks.full(64 * world), world)
        shard = 64 * shape.row_bytes(What.KV)
        assert np.all(bytes_by_link(plan, shape).sum(1) == (world - 1) * shard)
        back = bytes_by_link(transpose(plan, "last"), shape).sum(1)
        assert np.all(back == (2 * (world - 1) - 1 / laps) * shard)


@pytest.mark.parametrize("world", [64, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["zigzag", "striped"])
def test_a_million_tokens_verify_and_a_rank_looks_at_little(kind, world):
    mask = masks.causal(1 << 20)
    for turned in (False, True):
        plan = make_plan(Strategy(kind, laps=2), mask, world, turned=turned)
        verify(plan)
        back = transpose(plan)
        verify(back)
        part = make_plan(Strategy(kind, laps=2), mask, world, rank=5, turned=turned)
        assert part.view(5).digest == plan.view(5).digest and transpose(part).view(5).digest == back.view(5).digest
        assert len(part.tasks) < len(plan.tasks) / 4


def test_a_schedule_with_laps_is_verified_and_priced():
    """Half the buffers. More and smaller stages take simulated time too, much where shards are short and little where long."""
    shape, cluster = Shape(32, 8, 128, 128, torch.bfloat16), load_cluster("h200")
    verify_schedule(make_schedule(Strategy("zigzag", laps=2, ulysses=2), masks.documents([300, 50, 162]), 8), shape)
    for tokens, most in ((1024, 2.0), (32768, 1.03)):
        one, two = (price(Strategy("zigzag", laps=laps), masks.causal(4 * tokens), 4, shape, cluster) for laps in (1, 2))
        assert two.buffer_bytes <= 0.6 * one.buffer_bytes and one.seconds < two.seconds < most * one.seconds


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (Strategy("gather", laps=2), "laps is an option of ring, zigzag, striped; gather has none"),
        (Strategy("zigzag", laps=0), "laps must be a whole number of 1 or more. Found 0"),
        (Strategy("zigzag", laps=True), "laps must be a whole number"),
    ],
    ids=["gather", "none", "bool"],
)
def test_laps_that_cannot_be_are_refused(strategy, text):
    with pytest.raises(ValueError, match=text):
        make_plan(strategy, masks.causal(64), 4)
    assert str(Strategy("zigzag", laps=2)) == "zigzag, keep last, laps 2"


def test_what_overlaps_or_is_used_together_is_one_visit():
    key, start, stop = (np.array(x) for x in ([0, 0, 0, 0, 0, 1], [0, 8, 4, 20, 30, 0], [8, 12, 6, 24, 34, 8]))
    assert visits(key, start, stop, np.full(6, NO_TIME)).tolist() == [0, 1, 0, 2, 3, 4], "touching runs are not one visit"
    assert visits(key, start, stop, np.array([1, 1, NO_TIME, 2, 2, 1])).tolist() == [0, 0, 0, 1, 1, 2]
    assert visits(key, start, stop, np.array([1, 2, 3, 2, 3, 3])).tolist() == [0, 1, 0, 1, 0, 2], "a chain: run 4 with 2 with 0"
    assert visits(*(np.zeros(0, np.int64),) * 4).tolist() == []
    first, second = (Packing.of(*(np.array(x) for x in rows)) for rows in (([0, 8], [4, 12]), ([4], [8])))
    assert [Visits((first, second)).holding(row) for row in (0, 3, 4, 7, 8, 11)] == [0, 0, 1, 1, 0, 0]
    assert first.common(second) == [] and first.common(first) == [(0, 4), (8, 12)] and first.row(8, 12) == 4


def test_rows_of_another_lap_are_another_buffer():
    world = 4
    plan = make_plan(Strategy("zigzag", laps=2), masks.causal(64 * world), world)
    forward, _ = programs(plan, transpose(plan), 1, Shape(2, 2, 8, 8, torch.float32))
    owners = sorted(place.owner for what, place in forward.buffers if what == What.KV)
    assert owners == [0, 0, 2, 2, 3, 3]
    assert sum(len(stage) for stage in forward.launches) == 1 + 2 * (world - 1), "a launch a stage, also of parts in several runs"
    assert {int(x) for x in plan.tasks[plan.tasks[:, RANK] == 1][:, KV_OWNER]} == set(range(world))
    assert sum(b.kept for b in forward.buffers.values()) == 1, "the last stage's part and no other"
