"""Mutants of right plans: verify must reject each, and name the defect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distattn.kernels.bands import HI, LO
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.plan import DST, NEED, OWNER, POST, RANK, SRC, STAGE, WHAT, Plan, What
from distattn.parallel.schedules import make_plan
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import PlanError, verify
from tests.parallel.plans import random_servers_plan, tree_plan

WORLD, N = 4, 64


@pytest.fixture(params=["ring", "zigzag", "striped"])
def plan(request) -> Plan:
    return make_plan(request.param, masks.causal(N), WORLD)


def tree() -> Plan:
    mask = masks.causal(N)
    return tree_plan(layouts.zigzag(N, WORLD), mask)


def rejected(plan, *words: str) -> None:
    with pytest.raises(PlanError) as error:
        verify(plan)
    text = " ".join(error.value.findings)
    assert all(word in text for word in words), text


def without(table: np.ndarray, row: int) -> np.ndarray:
    return np.delete(table, row, axis=0)


def without_task(plan: Plan, i: int) -> Plan:
    counts = np.diff(plan.band_ptr)
    bands = np.delete(plan.bands, np.arange(plan.band_ptr[i], plan.band_ptr[i + 1]), axis=0)
    return replace(
        plan, tasks=without(plan.tasks, i), bands=bands, band_ptr=np.concatenate([[0], np.cumsum(np.delete(counts, i))])
    )


def with_task(plan: Plan, row: np.ndarray, bands: np.ndarray) -> Plan:
    ptr = np.append(plan.band_ptr, plan.band_ptr[-1] + len(bands))
    return replace(plan, tasks=np.vstack([plan.tasks, row]), bands=np.vstack([plan.bands, bands]), band_ptr=ptr)


def changed(table: np.ndarray, row: int, **columns: int) -> np.ndarray:
    names = {"src": SRC, "dst": DST, "post": POST, "need": NEED, "stage": STAGE, "hi": HI, "lo": LO}
    out = table.copy()
    for name, value in columns.items():
        out[row, names[name]] = value
    return out


def test_a_lost_hop(plan):
    for i in range(len(plan.transfers)):
        rejected(replace(plan, transfers=without(plan.transfers, i)), "which it never receives")
    back = transpose(plan)
    for i in np.flatnonzero(back.transfers[:, WHAT] == What.KV):
        rejected(replace(back, transfers=without(back.transfers, i)), "which it never receives")


def test_a_lost_task_and_a_doubled_task(plan):
    for i in range(len(plan.tasks)):
        rejected(without_task(plan, i), "do not cover the mask exactly once")
        own = plan.bands[plan.band_ptr[i] : plan.band_ptr[i + 1]]
        rejected(with_task(plan, plan.tasks[i], own), "do not cover the mask exactly once")


def test_a_doubled_pair_that_hides_a_lost_one():
    """Areas agree shard by shard, so only positions can tell."""
    plan = make_plan("ring", masks.full(N), WORLD)
    i = int(np.flatnonzero(plan.tasks[:, RANK] != plan.tasks[:, 5])[0])
    bands = plan.bands.copy()
    b = plan.band_ptr[i]
    assert bands[b].tolist()[:4] == [0, 16, 0, 16]
    first, second = bands[b].copy(), bands[b].copy()
    first[1] = 15  # rows 0..14
    second[0], second[1] = 14, 15  # row 14 again, row 15 never
    bands[b] = first
    rejected(
        with_task(replace(plan, bands=bands), plan.tasks[i], second[None]), "rank 0", "256 pairs in the mask and 256 in the tasks"
    )


def test_a_diagonal_off_by_one(plan):
    diagonals = np.flatnonzero(np.abs(plan.bands[:, HI]) < N)
    assert len(diagonals)
    for i in diagonals:
        for step in (-1, 1):
            mutant = replace(plan, bands=changed(plan.bands, i, hi=plan.bands[i, HI] + step))
            rejected(mutant, "do not cover the mask exactly once", "pairs in the mask")


def test_a_receive_without_its_send_and_a_send_without_its_receive(plan):
    views = [plan.view(r) for r in range(WORLD)]
    verify(views)
    mine = views[1].transfers
    sends, receives = np.flatnonzero(mine[:, SRC] == 1), np.flatnonzero(mine[:, DST] == 1)
    if len(sends):
        rejected([views[0], replace(views[1], transfers=without(mine, sends[0])), *views[2:]], "a receive without its send")
    rejected([views[0], replace(views[1], transfers=without(mine, receives[0])), *views[2:]], "a send without its receive")


def test_a_swapped_order_on_one_end():
    plan = make_plan("zigzag", masks.causal(N), WORLD)
    views = [plan.view(r) for r in range(WORLD)]
    mine = views[2].transfers
    receives = np.flatnonzero(mine[:, DST] == 2)[:2]
    swapped = mine.copy()
    swapped[receives] = mine[receives[::-1]]
    rejected([*views[:2], replace(views[2], transfers=swapped), views[3]], "a different order or content on the two ends")


def test_views_of_all_ranks_are_needed(plan):
    with pytest.raises(ValueError, match="one view of each rank"):
        verify([plan.view(0), plan.view(2)])
    with pytest.raises(ValueError, match="alone cannot be verified"):
        verify(plan.view(0))


def test_a_partial_or_gradient_that_never_goes_home(plan):
    back = transpose(plan)
    for i in np.flatnonzero(back.transfers[:, WHAT] == What.DKV):
        rejected(replace(back, transfers=without(back.transfers, i)), "the partial dkv", "never goes home")
    forward = tree()
    verify(forward)
    for i in np.flatnonzero(forward.transfers[:, WHAT] == What.OUT):
        rejected(replace(forward, transfers=without(forward.transfers, i)), "the partial out", "never goes home")
    back = transpose(forward)
    for i in np.flatnonzero(back.transfers[:, WHAT] == What.DQ):
        rejected(replace(back, transfers=without(back.transfers, i)), "the partial dq", "never goes home")
    for i in np.flatnonzero(back.transfers[:, WHAT] == What.DOUT):
        rejected(replace(back, transfers=without(back.transfers, i)), "dout", "which it never receives")


def test_a_partial_that_goes_home_twice_too_early_or_empty():
    forward = tree()
    i = int(np.flatnonzero(forward.transfers[:, WHAT] == What.OUT)[0])
    twice = np.vstack([forward.transfers, forward.transfers[i]])
    rejected(replace(forward, transfers=twice), "goes home 2 times")
    early = changed(forward.transfers, i, post=1, need=2)
    rejected(replace(forward, transfers=early), "before its last part")
    servers = random_servers_plan(layouts.striped(N, WORLD), masks.causal(N), 0)
    row = int(np.flatnonzero(servers.transfers[:, WHAT] == What.OUT)[0])
    gone = servers.transfers[row]
    tasks = np.flatnonzero(
        (servers.tasks[:, RANK] == gone[SRC]) & (servers.tasks[:, 2] == gone[OWNER]) & (servers.tasks[:, 3] == gone[3])
    )
    mutant = servers
    for task in tasks[::-1]:
        mutant = without_task(mutant, task)
    rejected(mutant, "but nobody computed it", "do not cover")


def test_a_relay_in_the_boundary_that_brings_it(plan):
    relays = np.flatnonzero(plan.transfers[:, SRC] != plan.transfers[:, OWNER])
    assert len(relays)
    for i in relays:
        mutant = changed(plan.transfers, i, post=plan.transfers[i, POST] - 1)
        rejected(replace(plan, transfers=mutant), "a relay in the boundary that brings it")


def test_keys_that_come_too_late_and_keys_that_come_twice(plan):
    late = changed(plan.transfers, 0, need=plan.transfers[0, NEED] + 1)
    rejected(replace(plan, transfers=late), "which it awaits only at boundary")
    rejected(replace(plan, transfers=np.vstack([plan.transfers, plan.transfers[0]])), "more than once")


def test_a_stated_bound_that_does_not_hold(plan):
    rejected(replace(plan, buffer_bound=1), "the schedule states at most 1")


def test_malformed_tables(plan):
    rejected(replace(plan, transfers=changed(plan.transfers, 0, dst=plan.transfers[0, SRC])), "from a rank to itself")
    rejected(replace(plan, tasks=changed(plan.tasks, 0, stage=99)), "is in stage 99")
    tasks = plan.tasks.copy()
    tasks[0, 4] += 1
    rejected(replace(plan, tasks=tasks), "who has 16")


def test_a_layout_that_disagrees_with_the_mask():
    """Tasks that are right for another placement of the same tokens are wrong for this one."""
    plan = make_plan("zigzag", masks.causal(N), WORLD)
    rejected(replace(plan, layout=layouts.striped(N, WORLD)), "do not cover the mask exactly once")
