"""disaggregate: any assignment of pieces to ranks becomes an exact plan that stores each row once, with four launches a stage."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.reference import Reference
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel import relays
from distattn.parallel.assign_cost import Cost
from distattn.parallel.assignment import Assignment
from distattn.parallel.comm import PeerError
from distattn.parallel.layout import Layout
from distattn.parallel.plan import DST, LANE, NEED, OWNER, POST, SRC, START, STOP, WHAT, Plan, What
from distattn.parallel.program import compile_program
from distattn.parallel.schedule import make_schedule
from distattn.parallel.schedules import pace
from distattn.parallel.schedules.disaggregate import disaggregate
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import peak_buffer_rows, wasted_rows, work
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import PlanError, verify, verify_schedule
from tests.parallel.attend import check, exact, make_problem, on_threads, one_device
from tests.parallel.plans import MASKS, make_layout, make_mask
from tests.parallel.test_plan import dense_cover

KEEPS = ("none", "all", "last")


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Parts and relays of few rows, so that small plans have them."""
    with pytest.MonkeyPatch.context() as patch:
        for where, name, rows in ((pace, "TILE", 2), (pace, "PART_ROWS", 3), (relays, "LEAST", 2)):
            patch.setattr(where, name, rows)
        yield


def random_assignment(layout: Layout, seed: int, longest: int = 9) -> Assignment:
    """Runs of rows at their owner or at any rank; some are cut by keys and shared by two."""
    rng = random.Random(seed)
    rows = []
    for owner in range(layout.world):
        a, n = 0, layout.rows(owner)
        while a < n:
            b = min(n, a + rng.randrange(1, longest))
            server = rng.choice([owner, rng.randrange(layout.world)])
            middle = rng.choice([layout.n_tokens, rng.randrange(layout.n_tokens + 1)])
            rows.append((server, owner, a, b, 0, middle))
            rows.append((rng.randrange(layout.world), owner, a, b, middle, layout.n_tokens))
            a = b
    return Assignment(*np.array(rows, dtype=np.int64).reshape(-1, 6).T)


@st.composite
def cases(draw):
    """(plan, mask)"""
    world, n, seed = draw(st.integers(1, 6)), draw(st.integers(0, 50)), draw(st.integers(0, 999))
    mask = make_mask(draw(st.sampled_from(MASKS)), n, seed)
    layout = make_layout(draw(st.sampled_from(["contiguous", "zigzag", "document_zigzag"])), mask, world, draw(st.booleans()))
    stages, devices = draw(st.integers(1, 3)), draw(st.sampled_from([0, 2, 3]))
    hops, cost = draw(st.integers(1, 3 if 1 < devices < world else 2)), Cost(devices=devices)
    return disaggregate(layout, mask, random_assignment(layout, seed), stages, hops, cost), mask


@settings(max_examples=30, deadline=None)
@given(cases())
def test_any_assignment_becomes_a_plan_that_verifies(case):
    plan, mask = case
    n, total = plan.layout.n_valid, plan.layout.n_tokens
    want = torch.zeros(total, total, dtype=torch.int32)
    want[:n, :n] = mask.bands.dense(n, n)
    assert torch.equal(dense_cover(plan), want)
    assert work(plan).sum() == mask.bands.area and wasted_rows(plan) == 0
    assert peak_buffer_rows(plan).max(initial=0) <= plan.buffer_bound
    verify(plan)
    verify([plan.view(r) for r in range(plan.world)])
    for keep in KEEPS:
        back = transpose(plan, keep)
        verify(back)
        verify([back.view(r) for r in range(plan.world)])


@settings(max_examples=20, deadline=None)
@given(cases(), st.sampled_from(KEEPS), st.booleans())
def test_any_assignment_computes_attention(case, keep, sinks):
    """Rounding aside, in float64."""
    plan, mask = case
    problem = make_problem(mask, torch.float64, d=4, d_v=6, sinks=sinks)
    check(on_threads(plan, transpose(plan, keep), problem, Reference()), exact(problem), 1e-12)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_a_stage_has_four_launches_at_most(case):
    plan, _ = case
    shape = Shape(2, 1, 4, 4, torch.float32)
    for one in (plan, transpose(plan, "none")):
        for rank in range(plan.world):
            program = compile_program(one.view(rank), shape)
            assert max((len(stage) for stage in program.launches), default=0) <= 4
            assert len(program.launches[0]) <= 1 and len(program.launches[-1]) <= 1
            kinds = [what for what, _ in program.buffers]
            assert len(kinds) == len(set(kinds)), "one buffer a kind, whoever owns its rows"


def two_servers(hops: int = 1) -> tuple[Plan, Layout]:
    """One document on rank 0 of three; rank 1 does its second quarter, ranks 1 and 2 share its last half by keys."""
    layout, mask = layouts.contiguous(96, 3), masks.documents([32, 32, 32])
    whole = (0, 96)
    rows = [(0, 0, 0, 8, *whole), (1, 0, 8, 16, *whole), (1, 0, 16, 32, 0, 16), (2, 0, 16, 32, 16, 96)]
    rows += [(1, 1, 0, 32, *whole), (2, 2, 0, 32, *whole)]
    return disaggregate(layout, mask, Assignment(*np.array(rows).T), 1, hops), layout


class Counting(Reference):
    """Counts its forward launches per thread."""

    def __init__(self):
        self.launches: Counter[str] = Counter()

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        self.launches[threading.current_thread().name] += 1  # a key a thread
        return result


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("late", [0, 1])
def test_messages_travel_while_the_stages_before_their_use_compute(hops, late):
    """Each is withheld until its receiver has launched all stages before the one that needs it; one launch more would hang."""
    layout, mask = layouts.contiguous(240, 6), masks.documents([130, 30, 80])
    plan = disaggregate(layout, mask, random_assignment(layout, 5), 3, hops, Cost(devices=2))
    problem, backend = make_problem(mask, torch.float64, d=4, d_v=6), Counting()
    allowed: dict[tuple[int, int, int], list[int]] = {}
    for rank in range(6):
        program = compile_program(plan.view(rank), problem.shape)
        done = np.cumsum([0, *map(len, program.launches)])
        for batch in (batch for boundary in program.posts for batch in boundary):
            for message in batch.receives:
                allowed.setdefault((message.peer, rank, batch.lane), []).append(min(int(done[batch.need]) + late, int(done[-1])))

    def gate(src: int, dst: int, lane: int, number: int) -> bool:
        wanted = allowed.get((src, dst, lane), ())
        return number >= len(wanted) or backend.launches[f"rank {dst}"] >= wanted[number]  # the rest is the backward pass

    if late:
        with pytest.raises(PeerError):
            on_threads(plan, transpose(plan, "none"), problem, backend, gate=gate, timeout=1.0)
    else:
        check(on_threads(plan, transpose(plan, "none"), problem, backend, gate=gate, timeout=20.0), exact(problem), 1e-12)


def test_rows_that_one_server_finishes_come_home_in_the_output_dtype():
    plan, _ = two_servers()
    t = plan.transfers
    home = t[t[:, WHAT] >= What.OUT][:, [SRC, START, STOP, WHAT]].tolist()
    assert sorted(home) == [[1, 8, 16, What.DONE], [1, 16, 32, What.OUT], [2, 16, 32, What.OUT]]
    shape = Shape(4, 2, 16, 24, torch.bfloat16)
    assert shape.row_bytes(What.DONE) == 4 * 24 * 2 + 4 * 4
    assert shape.row_bytes(What.OUT) == 4 * 24 * 4 + 4 * 4
    keys = t[t[:, WHAT] == What.KV]
    assert keys[:, [DST, OWNER, START, STOP]].tolist() == [[1, 0, 0, 16], [2, 0, 16, 32]], "each key once, only what is seen"
    assert np.all(t[:, NEED] - t[:, POST] == 1)


def test_inputs_leave_at_once_and_results_are_awaited_at_the_end():
    """A rank that sends late keeps its servers waiting, and one that waits for results early does nothing meanwhile."""
    layout, mask = layouts.contiguous(240, 4), masks.documents([130, 30, 80])
    plan = disaggregate(layout, mask, random_assignment(layout, 5), 3, 1)
    for one in (plan, transpose(plan, "none")):
        t, inputs = one.transfers, (What.Q, What.KV, What.DOUT)
        there = np.isin(t[:, WHAT], inputs)
        assert there.any() and np.all(t[there, POST] == 0)
        assert np.all(t[~there, NEED] == one.stages) and len(np.unique(t[~there, POST])) == 3
        assert not np.isin(t[t[:, WHAT] == What.KV, LANE], t[~there, LANE]).any(), "results block no keys"


def test_rows_of_several_servers_are_merged_on_the_way_and_come_home_finished():
    """Ranks 1 and 2 each merge a half of what both worked on."""
    plan, _ = two_servers(hops=2)
    t = plan.transfers
    home = t[t[:, WHAT] >= What.OUT][:, [SRC, DST, START, STOP, WHAT]].tolist()
    assert sorted(home) == [
        [1, 0, 8, 16, What.DONE],
        [1, 0, 16, 24, What.DONE],
        [1, 2, 24, 32, What.OUT],
        [2, 0, 24, 32, What.DONE],
        [2, 1, 16, 24, What.OUT],
    ]
    back = transpose(plan, "none").transfers
    dout = back[back[:, WHAT] == What.DOUT][:, [SRC, DST, START, STOP]].tolist()
    assert sorted(dout) == [[0, 1, 8, 16], [0, 1, 16, 24], [0, 2, 24, 32], [1, 2, 16, 24], [2, 1, 24, 32]], "each row once"


def test_verify_names_messages_that_their_ends_lay_out_in_different_ways():
    """One end keeps its own rows apart from those of others, the other end stores both together."""
    plan, _ = two_servers(hops=2)
    wrong = plan.transfers.copy()
    passed = np.flatnonzero((wrong[:, WHAT] == What.Q) & (wrong[:, SRC] != 0))[0]
    own = wrong[passed].copy()
    own[OWNER], own[START], own[STOP] = own[SRC], 0, 1
    with pytest.raises(PlanError, match="its message carries rows of others too"):
        verify(Plan(**{**plan.__dict__, "transfers": np.concatenate([wrong, own[None]])}))


def test_verify_names_rows_that_are_not_finished():
    plan, _ = two_servers()
    wrong = plan.transfers.copy()
    shared = (wrong[:, WHAT] == What.OUT) & (wrong[:, SRC] == 2)
    wrong[shared, WHAT] = What.DONE
    with pytest.raises(PlanError, match=r"rows \[16, 32\) of rank 0 come home as finished, but rank 0 has another result"):
        verify(Plan(**{**plan.__dict__, "transfers": wrong}))
    relayed, _ = two_servers(hops=2)
    wrong = relayed.transfers.copy()
    wrong[(wrong[:, WHAT] == What.OUT) & (wrong[:, SRC] == 2), WHAT] = What.DONE
    with pytest.raises(PlanError, match="from rank 2 to rank 1 .*only their owner takes rows as finished"):
        verify(Plan(**{**relayed.__dict__, "transfers": wrong}))
    own = plan.transfers.copy()
    own[(own[:, WHAT] == What.DONE), STOP] -= 1  # and the row that is left has nowhere to go
    with pytest.raises(PlanError, match="never goes home"):
        verify(Plan(**{**plan.__dict__, "transfers": own}))


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, None)])
def test_precision(dtype, tolerance, hops):
    """float32 against float64; bf16 no worse than 1.05 times one device."""
    mask = masks.documents([300, 17, 1, 250, 72])
    layout = layouts.contiguous(640, 4)
    plan = disaggregate(layout, mask, random_assignment(layout, 3, longest=90), 2, hops)
    problem = make_problem(mask, dtype, heads=(4, 2), d=32, d_v=32)
    want = exact(problem)
    found = on_threads(plan, transpose(plan, "none"), problem)
    again = on_threads(plan, transpose(plan, "none"), problem, times=2)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits from run to run"
    if tolerance is not None:
        check(found, want, tolerance)
        return
    from distattn.kernels import load
    from tests.parallel.attend import errors

    alone = errors(one_device(problem, load("aten")), want)
    ours = errors(found, want)
    assert all(ours[name] <= 1.05 * alone[name] + 1e-7 for name in ours), (ours, alone)


@pytest.mark.parametrize(
    ("world", "servers", "heads", "stages", "hops"),
    [
        (2, 0, (4, 4), 1, 1),
        (3, 1, (4, 1), 2, 1),
        (16, 0, (4, 2), 2, 2),
        (16, 6, (2, 2), 1, 1),
        (64, 0, (4, 1), 2, 1),
        (64, 0, (2, 1), 4, 3),
        (64, 16, (2, 1), 3, 2),
    ],
)
def test_balanced_shares_on_many_ranks(world, servers, heads, stages, hops):
    """What the planner makes of documents of 1 token to longer than a rank's; forward and backward with pieces of their own."""
    rows = max(96, 12 * (world - servers))
    lengths = [1, rows // 2, 1, rows // 8, 7, 1]
    mask = masks.documents([*lengths, rows - sum(lengths)])
    balance = Balance(Cost(devices=4), Cost(1, 4, 4, devices=4), smallest=1)
    strategy = Strategy("disaggregate", servers=servers, stages=stages, hops=hops, balance=balance)
    schedule = make_schedule(strategy, mask, world)
    plan, back = schedule.forward, schedule.backward()
    verify_schedule(schedule)
    share = mask.bands.area / world
    assert {What.Q, What.KV} <= set(plan.transfers[:, WHAT])
    assert max(work(plan).max(), work(back).max()) <= 1.3 * share + 2, "few rows a rank: shares cannot be cut evenly"
    problem = make_problem(mask, torch.float32, heads=heads, d=8, d_v=8)
    found = on_threads(plan, back, problem, timeout=120.0)
    check(found, exact(problem), 1e-6)


def test_striped_rows_are_refused():
    mask = masks.causal(64)
    layout = layouts.striped(64, 4)
    with pytest.raises(ValueError, match="every 4th. Use layout 'contiguous'"):
        disaggregate(layout, mask, random_assignment(layout, 0))
    with pytest.raises(ValueError, match="stages = 0 parts"):
        disaggregate(layouts.contiguous(64, 4), mask, random_assignment(layouts.contiguous(64, 4), 0), 0)
    found = random_assignment(layouts.contiguous(64, 4), 0)
    for wrong, named in (({"hops": 4}, "hops = 4. Pass a whole number of 1 to 3"), ({"stages": True}, "stages = True parts")):
        with pytest.raises(ValueError, match=named):
            disaggregate(layouts.contiguous(64, 4), mask, found, **wrong)
    for devices, named in ((0, "each rank in a node of its own"), (8, "all 4 ranks in one node")):
        with pytest.raises(ValueError, match=f"hops=3 .* the costs have {named}. Pass hops=2"):
            disaggregate(layouts.contiguous(64, 4), mask, found, hops=3, cost=Cost(devices=devices))
