"""relays: every server gets what it needs once and in time, owners send each row once, and nobody gets more than straight."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel import relays
from distattn.parallel.assign import assign
from distattn.parallel.assign_cost import Cost
from distattn.parallel.assignment import Load
from distattn.parallel.plan import DST, HOME_LANE, LANE, SRC, START, STOP, WHAT, What
from distattn.parallel.relays import FROM_OWNER, Needs, relayed
from distattn.parallel.schedules.disaggregate import disaggregate
from distattn.parallel.shape import Shape
from distattn.parallel.transpose import transpose

ROWS = 40
SHAPE = Shape(4, 1, 128, 128, torch.bfloat16)


@st.composite
def needs(draw):
    """(needs, hops, devices): random runs of rows of two owners at up to 7 servers, used at random stages."""
    hops = draw(st.integers(1, 3))
    devices = draw(st.sampled_from([2, 3] if hops == 3 else [0, 2, 3]))
    runs = []
    for owner in (0, 5):
        for server in set(range(8)) - {owner}:
            ends = sorted(draw(st.lists(st.integers(0, ROWS), max_size=4, unique=True)))
            for start, stop in zip(ends[::2], ends[1::2], strict=False):
                runs.append((server, owner, start, stop, hops + draw(st.integers(0, 3))))
    return Needs(*np.array(runs, dtype=np.int64).reshape(-1, 5).T), hops, devices


def by_row(hops: relays.Hops) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
    """(src, dst, post, need) of every hop of every row (owner, row)."""
    found = defaultdict(list)
    for src, dst, owner, start, stop, post, need in zip(*(column.tolist() for column in hops), strict=True):
        for row in range(start, stop):
            found[owner, row].append((src, dst, post, need))
    return found


@settings(max_examples=150, deadline=None)
@given(needs(), st.sampled_from([1, 4, 100]))
def test_rows_reach_every_server_once_and_in_time(case, least):
    wanted, hops, devices = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relays, "LEAST", least)
        found = relayed(wanted, hops, devices)
    use = {
        (owner, row, server): stage
        for server, owner, start, stop, stage in zip(*(c.tolist() for c in wanted), strict=True)
        for row in range(start, stop)
    }
    reached = set()
    for (owner, row), ways in by_row(found).items():
        arrival = {dst: need for _, dst, _, need in ways}
        assert len(arrival) == len(ways), "nobody gets a row twice"
        reached |= {(owner, row, dst) for dst in arrival}
        for src, dst, post, need in ways:
            assert 0 <= post < need <= use[owner, row, dst]
            assert src == owner or arrival[src] <= post, "what is passed on has come"
        near = [dst for _, dst, *_ in ways if hops == 3 and dst // devices == owner // devices]
        from_owner = {dst for src, dst, *_ in ways if src == owner}
        assert from_owner >= set(near)
        assert len(from_owner) - len(near) == (len(ways) if hops == 1 else len(ways) > len(near))
        if hops == 3:
            crossings = [dst // devices for src, dst, *_ in ways if src // devices != dst // devices]
            assert len(crossings) == len(set(crossings)) and owner // devices not in crossings, "a node gets a row once"
    assert reached == set(use)
    mirrored = found.mirrored(20)
    assert np.all(mirrored.src == found.dst) and np.all(mirrored.post == 20 - found.need)
    assert np.all((relays.input_lane(found.src, found.owner) == FROM_OWNER) == (found.src == found.owner))


def test_rows_of_many_servers_are_parted_among_a_few():
    """Else a plan of 512 ranks would have millions of transfers."""
    for count, parts in ((4, 4), (16, 8), (100, 1)):
        servers, zero = np.arange(1, 1 + count), np.zeros(count, dtype=np.int64)
        found = relayed(Needs(servers, zero, zero, zero + (1 << 17), zero + 3), 2)
        assert len(found.src) == parts * count and len(set(found.src.tolist())) == 1 + parts


def busiest(transfers: np.ndarray, end: int, world: int) -> float:
    """Bytes through the busiest rank's end over the mean."""
    each = np.array([SHAPE.row_bytes(what) for what in What])[transfers[:, WHAT]]
    moved = np.bincount(transfers[:, end], weights=each * (transfers[:, STOP] - transfers[:, START]), minlength=world)
    return moved.max() / moved.mean()


@pytest.mark.parametrize("backward", [False, True])
def test_a_long_document_binds_its_owners_links_no_more(backward):
    """One document of 32k tokens among short ones, on 64 ranks of 8k: its owners would send and get many times the mean."""
    world, each = 64, 8192
    mask = masks.documents([4 * each, *[512] * (60 * 16)])
    layout, cost = layouts.contiguous(world * each, world), Cost.of_rows(SHAPE, "backward" if backward else "forward")
    assignment = assign(layout, mask, cost=cost)
    straight, shared = (
        transpose(plan, "none").transfers if backward else plan.transfers
        for plan in (disaggregate(layout, mask, assignment, 2, hops, cost) for hops in (1, 2))
    )
    for end in (SRC, DST):
        assert busiest(shared, end, world) < 0.4 * busiest(straight, end, world)
    moved = [int((t[:, STOP] - t[:, START]).sum()) for t in (straight, shared)]
    assert moved[0] == moved[1], "relays move no more rows, others send them"
    assert set(shared[:, LANE].tolist()) == {relays.PASSED_ON, FROM_OWNER, HOME_LANE}


def test_relays_are_taken_where_an_owner_is_far_busier_than_others():
    world, each = 32, 2048
    layout = layouts.contiguous(world * each, world)

    def hops_of(lengths: list[int]) -> int:
        mask = masks.documents(lengths)
        return disaggregate(layout, mask, assign(layout, mask)).quiet

    assert hops_of([4 * each, *[256] * (28 * 8)]) == 2
    assert hops_of([2 * each] * 16) == 1
    mask = masks.documents([4 * each, *[256] * (28 * 8)])
    assert disaggregate(layout, mask, assign(layout, mask), cost=Cost(devices=8)).quiet == 3


def test_predicted_times_know_that_owners_send_rows_once():
    world, each = 32, 2048
    layout, mask = layouts.contiguous(world * each, world), masks.documents([8 * each, *[256] * (24 * 8)])
    cost = Cost(near_seconds=1.0, pair_seconds=1e-9)
    load = Load.of(assign(layout, mask, cost=Cost()), layout, mask)
    straight, shared = cost.seconds(load), cost.seconds(load, held=layout.rows_all)
    assert shared.max() < 0.7 * straight.max() and shared.sum() > 0.4 * straight.sum()
