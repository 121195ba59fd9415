"""The executor on strict ranks as threads: exact, overlapping, in constant memory, bitwise repeatable; and mutants."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.aten import Aten
from distattn.kernels.contract import State
from distattn.kernels.reference import Reference
from distattn.parallel import mask as masks
from distattn.parallel.comm import PeerError
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.schedules import make_plan
from distattn.parallel.schedules.ring import ring
from distattn.parallel.transpose import transpose
from tests.parallel.attend import attend, check, errors, exact, make_problem, on_threads, one_device, programs
from tests.parallel.plans import LAYOUTS, MASKS, make_layout, make_mask, tree_plan
from tests.parallel.test_plan import make

FLOAT32 = 1e-6  # relative L2: sums of a few hundred float32 terms, each rounded to 6e-8


@settings(max_examples=30, deadline=None)
@given(
    schedule=st.sampled_from(["ring", "query_ring", "tree", "random_servers"]),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    world=st.integers(1, 8),
    n=st.integers(1, 40),
    keep=st.sampled_from(["last", "none", "all"]),
    seed=st.integers(0, 99),
    sinks=st.booleans(),
    pad=st.booleans(),
)
def test_any_plan_computes_attention(schedule, layout, mask, world, n, keep, seed, sinks, pad):
    """Rounding aside, in float64: queries and partials that travel, tasks on parts of runs, kept and re-sent inputs."""
    the_mask = make_mask(mask, n, seed)
    plan = make(schedule, make_layout(layout, the_mask, world, pad), the_mask, seed)
    problem = make_problem(the_mask, torch.float64, d=4, d_v=6, sinks=sinks, seed=seed)
    check(on_threads(plan, transpose(plan, keep), problem, Reference()), exact(problem), 1e-12)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ring_on_every_layout_and_mask_in_float32(layout, world):
    for kind in MASKS:
        mask = make_mask(kind, 60 + world)
        plan = ring(make_layout(layout, mask, world), mask)
        problem = make_problem(mask, heads=(4, 2), d=16)
        check(on_threads(plan, transpose(plan), problem), exact(problem), FLOAT32)


@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"sinks": True}, {"d": 16, "d_v": 24}, {"heads": (6, 1)}, {"heads": (3, 3)}]
)
def test_options_reach_the_kernels(options):
    mask = masks.causal(97)
    plan = make_plan("zigzag", mask, 3)
    problem = make_problem(mask, **options)
    check(on_threads(plan, transpose(plan), problem), exact(problem), FLOAT32)


@pytest.mark.parametrize("schedule", ["ring", "zigzag", "striped"])
@pytest.mark.parametrize("kind", ["causal", "documents", "sinks"])
def test_bf16_is_as_exact_as_one_device(schedule, kind):
    """States and sums in float32 keep 8 ranks within 1.05 of one device's error, in every tensor."""
    mask = make_mask(kind, 1024)
    plan = make_plan(schedule, mask, 8)
    problem = make_problem(mask, torch.bfloat16, heads=(4, 2), d=64, d_v=64)
    want = exact(problem)
    rounded = lambda r: (r[0], r[1], *(x.to(torch.bfloat16) for x in r[2:]))  # noqa: E731  gradients leave in the input dtype
    one, many = (
        errors(rounded(one_device(problem, Aten())), want),
        errors(rounded(on_threads(plan, transpose(plan), problem)), want),
    )
    for name in ("out", "dq", "dk", "dv"):
        assert many[name] <= 1.05 * one[name], (name, many[name], one[name])
        assert 1e-4 < one[name] < 1e-2, one  # bf16 keeps 8 bits: 2^-9 per element


def test_gradients_may_travel_in_bf16():
    mask = masks.causal(256)
    plan = make_plan("zigzag", mask, 4)
    problem = make_problem(mask)
    narrow = problem.shape.__class__(**{**problem.shape.__dict__, "home": torch.bfloat16})

    def rank_main(communicator):
        return attend(communicator, programs(plan, transpose(plan), communicator.rank, narrow), plan.layout, problem, Aten())

    results = run_ranks(4, rank_main, timeout=30.0)
    found = errors(tuple(plan.layout.unshard([r[i] for r in results]) for i in range(5)), exact(problem))
    assert max(found["out"], found["dq"]) < FLOAT32  # nothing of these travels unfinished in a ring
    assert 1e-4 < found["dk"] < 8e-3 and 1e-4 < found["dv"] < 8e-3, found  # up to 3 hops rounded to 8 bits


def test_bitwise_the_same_from_run_to_run():
    mask = make_mask("documents", 300)
    plan = ring(make_layout("document_zigzag", mask, 5), mask)
    problem = make_problem(mask)
    runs = [on_threads(plan, transpose(plan), problem, times=times) for times in (1, 3, 1)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_workspace_does_not_grow_with_the_ranks():
    """Bytes per rank at a constant 64 tokens a rank: two runs of keys forward; backward also two of their float32 sums."""
    sizes = {}
    for world in (2, 3, 4, 8, 32):
        mask = masks.causal(64 * world)
        plan = make_plan("striped", mask, world)
        problem = make_problem(masks.causal(8), heads=(2, 2))
        forward, backward = programs(plan, transpose(plan), 0, problem.shape)
        sizes[world] = forward.workspace_bytes, backward.workspace_bytes
    assert sizes[4] == sizes[8] == sizes[32]
    run = 64 * 2 * (16 + 16) * 4
    assert sizes[32][0] <= 2 * run
    assert sizes[32][1] <= 5 * run  # keys: two runs; sums: one made, one sent on, one arriving


class Recording(Aten):
    """Aten that counts its launches per thread."""

    def __init__(self):
        self.launches: dict[str, int] = {}
        self.lock = threading.Lock()

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        with self.lock:
            name = threading.current_thread().name
            self.launches[name] = self.launches.get(name, 0) + 1
        return result


def test_the_messages_of_a_stage_travel_while_the_one_before_computes():
    """The n-th message of a rank is withheld until its receiver has launched n + 1 stages. Code that waits early would hang."""
    world = 4
    mask = masks.full(64)
    plan = make_plan("striped", mask, world)
    problem = make_problem(mask)
    backend = Recording()

    def gate(src: int, dst: int, lane: int, number: int) -> bool:
        return backend.launches.get(f"rank {dst}", 0) >= min(number + 1, world)

    check(on_threads(plan, transpose(plan), problem, backend, gate=gate, timeout=10.0), exact(problem), FLOAT32)


def test_the_withheld_message_test_can_fail():
    """The same gate asking for one launch more than the plan allows: the run must end in an error, not pass."""
    mask = masks.full(64)
    plan = make_plan("striped", mask, 4)
    backend = Recording()
    gate = lambda src, dst, lane, number: backend.launches.get(f"rank {dst}", 0) >= number + 2  # noqa: E731
    with pytest.raises(PeerError):
        on_threads(plan, transpose(plan), make_problem(mask), backend, gate=gate, timeout=1.0)


class ZeroGradients(Aten):
    def backward(self, *args, **kwargs):
        pass


class SwappedGradients(Aten):
    def backward(self, dout, q, k, v, delta, lse, bands, scores, dq, dk, dv):
        super().backward(dout, q, k, v, delta, lse, bands, scores, dq, dv, dk)


class LseZero(Aten):
    """Rows without keys that come back with lse 0, as PyTorch's own op gives it."""

    def forward(self, q, k, v, bands, scores, state=None, out=None):
        new = super().forward(q, k, v, bands, scores, state, out)
        return State(new.o, new.lse.masked_fill_(new.lse == -torch.inf, 0.0))


@pytest.mark.parametrize("mutant", [ZeroGradients, SwappedGradients, LseZero])
def test_mutant_kernels_are_rejected(mutant):
    mask = masks.causal(80)  # in a tree, shards meet keys that only some of their rows see: partials with empty rows
    plan = tree_plan(make_layout("zigzag", mask, 4), mask)
    problem = make_problem(plan.mask)
    check(on_threads(plan, transpose(plan), problem), exact(problem), FLOAT32)
    found, want = on_threads(plan, transpose(plan), problem, mutant()), exact(problem)
    with pytest.raises(AssertionError):
        check(found, want, FLOAT32)


def test_a_lost_hop_is_rejected():
    """A plan without the tasks of its last stage runs to the end, and the comparison must see it."""
    plan = make_plan("striped", masks.causal(96), 4)
    problem = make_problem(plan.mask)
    want = exact(problem)
    shorter = make_plan("striped", masks.sliding_window(96, 60), 4)
    with pytest.raises(AssertionError):
        check(on_threads(shorter, transpose(shorter), problem), want, FLOAT32)
