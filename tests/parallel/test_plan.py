"""Plans as integers: exact cover, transposition, statistics, views and digests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import Bands
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.plan import Plan, What, assemble
from distattn.parallel.schedule import make_schedule
from distattn.parallel.schedules import SCHEDULES, make_plan
from distattn.parallel.schedules.ring import query_ring, ring
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import statistics, wasted_rows, work
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import verify
from tests.parallel.plans import LAYOUTS, MASKS, make_layout, make_mask, random_servers_plan, tree_plan

# A rank may see two runs of a segment: what lies between travels too.
HOLES = (
    "window",
    "document_windows",
    "symmetric",
    "sinks",
    "union",
)
UNIT = Shape(heads=1, kv_heads=1, d=8, d_v=8, dtype=torch.bfloat16)


def dense_cover(plan: Plan) -> torch.Tensor:
    """How often the tasks compute each pair, by brute force: [N, N]."""
    layout = plan.layout
    cover = torch.zeros(layout.n_tokens, layout.n_tokens, dtype=torch.int32)
    for task in plan.iter_tasks():
        rows = torch.from_numpy(layout.positions(task.q.owner)[task.q.start : task.q.stop])
        keys = torch.from_numpy(layout.positions(task.kv.owner)[task.kv.start : task.kv.stop])
        cover[rows[:, None], keys[None]] += task.bands.dense(len(rows), len(keys))
    return cover


def make(schedule: str, layout, mask, seed: int = 0) -> Plan:
    if schedule == "tree":
        return tree_plan(layout, mask)
    if schedule == "random_servers":
        return random_servers_plan(layout, mask, seed)
    if schedule == "query_ring":
        return query_ring(layout, mask, grain=0)
    return ring(layout, mask, grain=0)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(["ring", "query_ring", "tree", "random_servers"]),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    world=st.integers(1, 7),
    n=st.integers(0, 40),
    keep=st.sampled_from(["last", "none", "all"]),
    seed=st.integers(0, 99),
    pad=st.booleans(),
)
def test_any_plan_covers_its_mask_and_passes_verify(schedule, layout, mask, world, n, keep, seed, pad):
    the_mask = make_mask(mask, n, seed)
    plan = make(schedule, make_layout(layout, the_mask, world, pad), the_mask, seed)
    want = torch.zeros(plan.layout.n_tokens, plan.layout.n_tokens, dtype=torch.int32)
    want[:n, :n] = the_mask.bands.dense(n, n)
    assert torch.equal(dense_cover(plan), want)
    verify(plan)
    verify([plan.view(r) for r in range(world)])
    back = transpose(plan, keep)
    assert torch.equal(dense_cover(back), want)
    verify(back)
    verify([back.view(r) for r in range(world)])
    assert wasted_rows(plan) == 0 or schedule != "ring" or mask in HOLES
    assert work(plan).sum() == the_mask.bands.area


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from([ring, query_ring]),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    world=st.integers(1, 7),
    n=st.integers(0, 60),
    keep=st.sampled_from(["last", "none", "all"]),
    grain=st.integers(0, 8),
)
def test_a_plan_made_for_one_rank_is_its_view_of_the_whole(schedule, layout, mask, world, n, keep, grain):
    """Forward and backward, though nothing but its own bands was made; short gaps may travel, the plan stays right."""
    the_mask = make_mask(mask, n)
    the_layout = make_layout(layout, the_mask, world)
    plan = schedule(the_layout, the_mask, grain=grain)
    back = transpose(plan, keep)
    verify(plan)
    verify(back)
    for rank in range(world):
        own = schedule(the_layout, the_mask, rank=rank, grain=grain)
        assert own.view(rank).digest == plan.view(rank).digest
        assert transpose(own, keep).view(rank).digest == back.view(rank).digest
    if world > 1:
        with pytest.raises(ValueError, match="bands of rank"):
            own.view(0)


@pytest.mark.parametrize(("heads", "kv_heads", "moves"), [(8, 8, "q"), (32, 8, "kv"), (8, 1, "kv")])
@pytest.mark.parametrize("keep", ["last", "none", "all"])
def test_the_backward_pass_moves_what_is_fewer_bytes(heads, kv_heads, moves, keep):
    """Equal heads: the query side, H (8 D + 8) bytes a row and hop against 12 H_kv D. Counted in plans, not from the formula."""
    shape = Shape(heads, kv_heads, 128, 128, torch.bfloat16)
    world, t = 8, 16
    schedule = make_schedule(Strategy("zigzag", keep=keep), masks.full(world * t), world)
    counted = {}
    for rotation in ("kv", "q"):
        verify(schedule.backward(rotation))
        counted[rotation] = statistics(schedule.backward(rotation), shape).bytes_by_link.sum()
    kept = {"last": 1, "none": 0, "all": world - 1}[keep]
    assert counted["q"] == world * t * (world - 1) * heads * (8 * 128 + 8)
    assert counted["kv"] == world * t * (12 * (world - 1) - 4 * kept) * kv_heads * 128
    assert schedule.rotation(shape) == ("kv" if keep == "all" and counted["kv"] <= counted["q"] else moves)
    assert make_schedule(Strategy("zigzag", rotate="q"), masks.full(64), 4).rotation(shape) == "q"


def test_views_form_the_plan_that_they_came_from():
    mask = make_mask("documents", 60)
    plan = ring(make_layout("zigzag", mask, 5), mask)
    again = assemble([plan.view(r) for r in range(5)])
    assert sorted(map(tuple, again.transfers.tolist())) == sorted(map(tuple, plan.transfers.tolist()))
    assert work(again).tolist() == work(plan).tolist()
    assert again.tasks.tolist() == plan.tasks[np.lexsort((plan.tasks[:, 1], plan.tasks[:, 0]))].tolist()


def test_digests_name_content():
    plan = make_plan("zigzag", masks.causal(64), 4)
    assert plan.digest == make_plan("zigzag", masks.causal(64), 4).digest
    others = [make_plan("striped", masks.causal(64), 4), make_plan("zigzag", masks.causal(65), 4), transpose(plan), plan.view(1)]
    assert len({plan.digest, *(p.digest for p in others)}) == 5
    a, b = plan.view(0).message_digests(), plan.view(1).message_digests()
    assert a[1] == b[0]


def units(plan: Plan) -> np.ndarray:
    """Bytes sent per rank in units of one rank's bf16 K + V."""
    volume = statistics(plan, UNIT).bytes_by_link.sum(1)
    return volume / (plan.layout.rows(0) * UNIT.row_bytes(What.KV))


@pytest.mark.parametrize("world", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_full_mask_volume_is_the_closed_form(world, kind):
    """Forward P - 1; backward 2 (P - 1) in float32 gradients, and P - 2 (keeping the last), P - 1 or 0 of keys again."""
    n = 8 * world
    plan = ring(getattr(layouts, kind)(n, world), masks.full(n))
    assert np.all(units(plan) == world - 1)
    assert np.all(units(transpose(plan, "last")) == 3 * world - 4)
    assert np.all(units(transpose(plan, "none")) == 3 * world - 3)
    assert np.all(units(transpose(plan, "all")) == 2 * world - 2)


@pytest.mark.parametrize("world", [2, 4, 8, 16, 64])
def test_causal_balance_is_the_closed_form(world):
    """Slowest rank over mean: contiguous 2 - 1/P up to the diagonal, zigzag exactly 1, striped 1 up to one diagonal row."""
    n = 64 * world
    mask = masks.causal(n)
    t = n // world
    balance = {kind: statistics(make_plan(kind, mask, world), UNIT).balance for kind in SCHEDULES}
    last, mean = t * (n - t) + t * (t + 1) / 2, n * (n + 1) / 2 / world
    assert balance["ring"] == pytest.approx(last / mean, rel=1e-12)
    assert abs(balance["ring"] - (2 - 1 / world)) < 2 / t
    assert balance["zigzag"] == 1.0
    assert balance["striped"] == pytest.approx((t * (t - 1) / 2 * world + t * world) / mean, rel=1e-12)


def test_windows_and_documents_send_almost_nothing():
    n, world, window = 4096, 8, 64
    plan = make_plan("ring", masks.sliding_window(n, window), world)
    assert plan.stages == 2 and len(plan.transfers) == world - 1
    assert {(d - s) % world for s, d in plan.transfers[:, :2].tolist()} == {1}
    assert set((plan.transfers[:, 4] - plan.transfers[:, 3]).tolist()) == {window - 1}
    documents = make_plan("ring", masks.documents([n // world] * world), world)
    assert len(documents.transfers) == 0 and documents.stages == 1


def test_buffers_do_not_grow_with_the_ring():
    for world in (2, 8, 64):
        plan = make_plan("striped", masks.causal(32 * world), world)
        assert (
            statistics(plan, UNIT).peak_buffer_rows.max()
            == (32 if world == 2 else 64)
            == (32 if world == 2 else plan.buffer_bound)
        )


@pytest.mark.parametrize(
    "kind", ["striped", pytest.param("zigzag", marks=pytest.mark.slow), pytest.param("ring", marks=pytest.mark.slow)]
)
def test_a_million_tokens_on_512_ranks(kind):
    """Some seconds on an idle machine; the time does not gate the test."""
    plan = make_plan(kind, masks.causal(1 << 20), 512)
    verify(plan)
    verify(transpose(plan))


def test_bands_of_a_million_tokens_in_documents_verify():
    lengths = [256] * 4096
    plan = make_plan("ring", masks.documents(lengths), 64)
    verify(plan)
    assert len(plan.transfers) == 0
    uneven = make_plan("ring", masks.documents([1000] * 1048 + [576]), 64)
    verify(uneven)
    verify(transpose(uneven))
    assert 0 < len(uneven.transfers) <= 2 * 64 and isinstance(uneven.task(0).bands, Bands)


def test_transpose_refuses_what_is_not_a_whole_forward_plan():
    plan = make_plan("zigzag", masks.causal(16), 2)
    with pytest.raises(ValueError, match="whole forward plan"):
        transpose(transpose(plan))
    with pytest.raises(ValueError, match="whole forward plan"):
        transpose(plan.view(0))
    with pytest.raises(ValueError, match="keep must be"):
        transpose(plan, "some")


def test_an_unknown_schedule_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'zigzag'"):
        make_plan("zigzga", masks.causal(16), 2)
