"""gather, the double ring and the tree: exact covers, exact numbers, exact volumes, and views that cost no whole plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.reference import Reference
from distattn.parallel.plan import Plan
from distattn.parallel.schedules.double_ring import double_ring
from distattn.parallel.schedules.gather import gather
from distattn.parallel.schedules.tree import tree
from distattn.parallel.statistics import wasted_rows, work
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import verify
from tests.parallel.attend import check, exact, make_problem, on_threads
from tests.parallel.plans import LAYOUTS, MASKS, make_layout, make_mask
from tests.parallel.test_plan import dense_cover

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


def check_views(whole: Plan, of: Callable[[int], Plan]) -> None:
    """A plan made for one rank gives that rank what the whole plan does, forward and backward."""
    backs = {keep: transpose(whole, keep) for keep in KEEPS}
    for rank in range(whole.world):
        part = of(rank)
        assert part.bands_of == rank
        assert part.view(rank).digest == whole.view(rank).digest
        for keep, back in backs.items():
            if keep == "none" and transpose(part, keep).stages != back.stages:
                continue
            assert transpose(part, keep).view(rank).digest == back.view(rank).digest, keep


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_plan_covers_its_mask_and_passes_verify(case):
    schedule, chosen, layout, mask = case
    plan = schedule(layout, mask, **chosen)
    check_plan(plan)
    check_views(plan, lambda rank: schedule(layout, mask, **chosen, rank=rank))


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
        for chosen in options(schedule, world):
            plan = schedule(placed, mask, **chosen)
            check_plan(plan)
            check_views(plan, lambda rank, placed=placed, mask=mask, chosen=chosen: schedule(placed, mask, **chosen, rank=rank))
            check(on_threads(plan, transpose(plan, KEEPS[number % 3]), problem, Reference()), want, 1e-12)
