"""pace: work for others is cut into even parts by rows, and own work fills stages so that they last alike on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from distattn.kernels.bands import K0, K1, Q0, Q1, areas
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.assign import assign
from distattn.parallel.assign_cost import Cost
from distattn.parallel.plan import KV_OWNER, Q_OWNER, RANK, STAGE, Plan
from distattn.parallel.schedules import pace
from distattn.parallel.schedules.disaggregate import disaggregate
from distattn.parallel.schedules.pace import PART_ROWS, TILE, Time, Work, in_parts, in_slices

WORLD, EACH = 16, 8192


def far_work() -> Work:
    """Server 1: 30,000 rows of rank 0; server 2: runs of 3,000 and 20,000; server 3: one of 500. On 20,000 keys of rank 4."""
    runs = [(1, 0, 30000), (2, 0, 3000), (2, 4000, 24000), (3, 0, 500)]
    bands = np.array([[start, stop, 0, 20000, -(1 << 40), 1 << 40] for _, start, stop in runs], dtype=np.int64)
    server, start = (np.array([run[i] for run in runs]) for i in (0, 1))
    zero = np.zeros_like(server)
    return Work(bands, server, zero, zero + 4, start)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_work_for_others_is_cut_into_blocks_along_a_diagonal(parts):
    work = far_work()
    cut, part = in_parts(work, parts)
    assert areas(cut.bands).sum() == areas(work.bands).sum() and set(part) <= set(range(1, parts + 1))
    by_rows, by_keys = parts // 2 + 1, (parts + 1) // 2
    for server in (1, 2, 3):
        mine = cut.server == server
        rows, keys = cut.bands[mine, Q1] - cut.bands[mine, Q0], cut.bands[mine, K1] - cut.bands[mine, K0]
        assert rows.min() >= min(500, PART_ROWS) and keys.min() >= PART_ROWS
        pieces = set(zip(cut.run[mine], cut.bands[mine, Q0], cut.bands[mine, K0], strict=True))
        assert len(pieces) == mine.sum(), "no block twice"
        assert abs(keys - 20000 / by_keys).max() <= TILE * by_keys
        places = [np.unique(cut.bands[mine, c], return_inverse=True)[1] for c in (Q0, K0)]
        if server == 1:
            assert abs(rows - 30000 / by_rows).max() <= TILE * by_rows
            assert np.array_equal(part[mine], 1 + places[0] + places[1])
        if server == 3:
            assert len(np.unique(cut.bands[mine, Q0])) == 1, "a short run stays whole"
    inner = ~np.isin(cut.bands[:, Q0], work.bands[:, Q0])
    assert np.all((cut.bands[inner, Q0] - cut.run[inner]) % TILE == 0)


@pytest.mark.parametrize("parts", [3, 4, 7])
def test_every_part_brings_few_rows_and_keys_and_is_the_last_for_as_many(parts):
    cut, part = in_parts(far_work(), parts)
    mine, blocks = cut.server == 1, (parts // 2 + 1, (parts + 1) // 2)
    for column, count, whole in ((Q0, blocks[0], 30000), (K0, blocks[1], 20000)):
        for end in (np.minimum, np.maximum):
            begin, block = np.unique(cut.bands[mine, column], return_inverse=True)
            when = np.full(len(begin), 0 if end is np.maximum else parts)
            end.at(when, block, part[mine])
            rows = np.bincount(when, weights=np.diff(np.append(begin, whole)), minlength=parts + 1)
            assert rows.max() <= whole / count + TILE * count


def one_long() -> tuple[Plan, Plan]:
    """A document of four ranks among short ones, straight and with relays."""
    layout, mask = layouts.contiguous(WORLD * EACH, WORLD), masks.documents([4 * EACH, *[1024] * (12 * 8)])
    assignment = assign(layout, mask)
    straight, relays = (disaggregate(layout, mask, assignment, 4, hops) for hops in (1, 2))
    return straight, relays


def stage_work(plan: Plan) -> np.ndarray:
    """Visible pairs, [stages, ranks]."""
    task = plan.tasks[plan.task_of_band]
    place = task[:, STAGE] * plan.world + task[:, RANK]
    return np.bincount(place, weights=areas(plan.bands), minlength=plan.stages * plan.world).reshape(plan.stages, plan.world)


def test_stages_last_alike_where_rows_are_passed_on(monkeypatch):
    """Whoever passes rows on does so after its stage, so a long one keeps others waiting."""
    monkeypatch.setattr(pace, "PART_ROWS", TILE)
    straight, relays = (stage_work(plan) for plan in one_long())
    mean = relays.sum() / relays.size
    assert relays.sum() == straight.sum() and len(relays) == 2 * 2 + 4 and len(straight) == 2 + 4
    outer = relays[[0, 1, -2, -1]]
    assert outer.max() <= 1.3 * mean, "own work in stages of travel is no longer than a stage on average"
    assert relays[2:-2].max() <= 1.1 * (8 / 3) * mean, "two of six blocks, of who has no own rows to work on"
    assert straight[[0, -1]].max() > 2 * mean


def test_nobody_works_on_rows_of_others_while_first_and_last_rows_travel():
    for plan, hops in zip(one_long(), (1, 2), strict=True):
        tasks = plan.tasks
        foreign = (tasks[:, RANK] != tasks[:, Q_OWNER]) | (tasks[:, RANK] != tasks[:, KV_OWNER])
        assert set(tasks[foreign, STAGE]) == set(range(hops, hops + 4)) and plan.quiet == hops


def test_own_work_before_the_first_rows_come_is_no_longer_than_these_take():
    """Where costs know links: a server of others' rows would wait for those who pass them on."""
    layout, mask = layouts.contiguous(WORLD * EACH, WORLD), masks.documents([4 * EACH, *[1024] * (12 * 8)])
    cost = Cost(near_seconds=1e-9, pair_seconds=1e-9)
    assignment = assign(layout, mask)
    slow, fast = (stage_work(disaggregate(layout, mask, assignment, 4, 2, c)) for c in (Cost(), cost))
    assert fast[:2].max() < 0.2 * slow[:2].max() and fast.sum() == slow.sum()


def test_slices_cover_own_work_once():
    bands = np.array([[0, 700, 0, 700, -(1 << 40), 0], [700, 1000, 0, 50, -(1 << 40), 1 << 40]], dtype=np.int64)
    zero = np.zeros(2, dtype=np.int64)
    inside = Work(bands, zero, zero, zero, zero)
    cut, stage = in_slices(inside, far_work(), 4, Time(2, 3), None)
    assert areas(cut.bands).sum() == areas(bands).sum() and set(stage) <= set(range(7))
    by_stage = np.bincount(stage, weights=areas(cut.bands), minlength=7)
    assert np.all(np.abs(by_stage[[0, 1, 5, 6]] - areas(bands).sum() / 4) < 1000), "few own rows: all where rows travel"
    ends = sorted(zip(cut.bands[:, Q0].tolist(), cut.bands[:, Q1].tolist(), strict=True))
    assert ends[0][0] == 0 and ends[-1][1] == 1000 and all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
