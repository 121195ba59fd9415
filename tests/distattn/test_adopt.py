"""Plans prepared without other ranks, carried through a pickle and adopted: the same attention, and one agreement."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import distattn
from distattn import ContextParallel, Strategy
from distattn.kernels.contract import Scores
from distattn.parallel import rank_plan
from distattn.parallel.comm import Communicator
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.rank_plan import Call, PlanMismatch, RankPlan
from distattn.parallel.shape import Shape

MASK = distattn.documents([13, 1, 30, 9, 7])
CALL = Call(Shape(4, 2, 8, 8, torch.float32), Scores(8**-0.5))


def through_a_pickle(cp: ContextParallel, calls: tuple[Call, ...] = (CALL,)) -> RankPlan:
    return pickle.loads(pickle.dumps(cp.recipe(MASK).prepare(MASK, calls)))


def attend(cp: ContextParallel, plan: distattn.attention.AttentionPlan, d: int = 8) -> list[Tensor]:
    """out and the gradients of this rank's rows."""
    g = torch.Generator().manual_seed(cp.rank)
    q, k, v = (torch.randn(plan.rows, heads, d, generator=g, requires_grad=True) for heads in (4, 2, 2))
    out = cp.attention(q, k, v, plan)
    assert isinstance(out, Tensor)
    return [out, *torch.autograd.grad(out.square().sum(), [q, k, v])]


def gathers(communicator: Communicator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what this rank gives to each all_gather_bytes from now on."""
    sizes: list[int] = []
    real = communicator.all_gather_bytes
    monkeypatch.setattr(communicator, "all_gather_bytes", lambda payload: sizes.append(len(payload)) or real(payload))
    return sizes


@pytest.mark.parametrize(
    "strategy",
    [Strategy("zigzag"), Strategy("gather"), Strategy("tree"), Strategy("striped", rotate="q"), Strategy("ring", ulysses=2)],
    ids=str,
)
def test_an_adopted_plan_attends_as_a_planned_one(strategy: Strategy) -> None:
    def work(comm: Communicator) -> None:
        expected = attend(one := ContextParallel(communicator=comm, schedule=strategy), one.plan(MASK))
        two = ContextParallel(communicator=comm, schedule=strategy)
        prepared = through_a_pickle(two)
        programs = dict(prepared._programs)
        found = attend(two, two.adopt(prepared))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert prepared._programs == programs and programs, "the call compiled what should have been there"
        assert two.plan(MASK) is two.adopt(prepared) is two.adopt(through_a_pickle(two)), "cached like a planned one"

    run_ranks(4, work)


def test_a_prepared_call_is_agreed_on_once_in_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, call and messages both ways in one exchange; a plan that is asked for in line takes two."""

    def work(comm: Communicator) -> tuple[list[int], list[int]]:
        two = ContextParallel(communicator=comm), ContextParallel(communicator=comm)
        sizes = gathers(comm, monkeypatch)
        attend(two[0], two[0].adopt(through_a_pickle(two[0])))
        adopted = sizes.copy()
        attend(two[1], two[1].plan(MASK))
        return adopted, sizes[len(adopted) :]

    assert run_ranks(4, work) == [([32], [16, 32])] * 4


def test_a_shape_that_was_not_prepared_is_planned_when_it_comes() -> None:
    def work(comm: Communicator) -> None:
        one, two = ContextParallel(communicator=comm), ContextParallel(communicator=comm)
        expected = attend(one, one.plan(MASK), d=16)
        found = attend(two, two.adopt(through_a_pickle(two)), d=16)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    run_ranks(3, work)


def test_ranks_that_prepared_for_other_calls_are_named() -> None:
    def work(comm: Communicator) -> str:
        cp = ContextParallel(communicator=comm)
        calls = (CALL, Call(Shape(4, 2, 4, 4, torch.float32), Scores(0.5))) if comm.rank == 1 else (CALL,)
        with pytest.raises(PlanMismatch) as raised:
            cp.adopt(through_a_pickle(cp, calls))
        attend(cp, cp.adopt(through_a_pickle(cp)))  # nothing is left in the way
        return str(raised.value)

    for text in run_ranks(3, work):
        assert "ranks 0, 2: Mask(documents(5" in text and "rank 1: Mask(documents(5" in text and "head sizes 4 and 4" in text


def test_messages_that_differ_are_named_when_the_plan_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rank_plan.make_schedule

    def make(strategy: Any, mask: Any, world: int, pad: bool, rank: int) -> Any:
        schedule = real(strategy, distattn.documents([59, 1]) if rank == 1 else mask, world, pad, rank)
        schedule.mask, schedule.layout = mask, real(strategy, mask, world, pad, rank).layout
        return schedule

    def work(comm: Communicator) -> str:
        cp = ContextParallel(communicator=comm, schedule="gather")
        with pytest.raises(PlanMismatch) as raised:
            cp.adopt(cp.recipe(MASK).prepare(MASK, (CALL,)))
        return str(raised.value)

    monkeypatch.setattr(rank_plan, "make_schedule", make)
    for text in run_ranks(3, work):
        assert text.startswith("Ranks ") and "1" in text and "list different messages" in text


def test_the_plan_of_another_rank_is_refused() -> None:
    def work(comm: Communicator) -> None:
        cp = ContextParallel(communicator=comm)
        other = distattn.parallel.rank_plan.Recipe(Strategy(), 2, 1 - comm.rank, False, distattn.__version__)
        with pytest.raises(ValueError, match=f"Rank {comm.rank} of 2 .* was given a plan prepared by .*rank={1 - comm.rank}"):
            cp.adopt(other.prepare(MASK))

    run_ranks(2, work)
