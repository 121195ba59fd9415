"""A layer in the simulator against times worked out by hand, and on plans of every kind."""

from __future__ import annotations

import numpy as np
import pytest

from distattn.parallel.mask import causal, documents
from distattn.parallel.plan import Plan, What
from distattn.parallel.price import exchanges, slices_of
from distattn.parallel.schedules import make_plan
from distattn.parallel.shape import Shape
from distattn.parallel.simulate import simulate_pass
from distattn.parallel.simulate_layer import Dense, call_load, layer_load, simulate_layer
from distattn.parallel.transpose import transpose
from distattn.parallel.workload import Workload, of_exchange, of_plan
from tests.parallel.clusters import PAIR, ROW, SHAPE, cluster, seconds
from tests.parallel.test_simulate import EXACT, plan_of

MESSAGE = 1000 * ROW / 1e9
NOTHING = Dense(0, 0, 0, 0)


def swap(queries: int) -> Plan:
    """Two ranks trade 1000 rows of keys and then attend with them for ``seconds(queries, 1000)``."""
    both = [[0, 1, 1000, 0, 0, 1], [1, 0, 1000, 0, 0, 1]]
    return plan_of(2, both, [[1, rank, queries, 1000] for rank in (0, 1)], 2, max(1000, queries))


@pytest.mark.parametrize("before", [0.0, 0.4, 0.9, 1.5, 3.0], ids=lambda b: f"dense {b} of a message")
@pytest.mark.parametrize("kernel", [0.5, 2.0], ids=lambda k: f"kernels {k} of a message")
def test_two_sequences_that_send_before_they_attend(before: float, kernel: float) -> None:
    """Alone a layer waits for each message; side by side only for what dense part and kernels of the other do not cover."""
    b, a = before * MESSAGE, 0.7 * MESSAGE
    plan = swap(round(kernel * MESSAGE / seconds(1, 1000)))
    k = seconds(round(kernel * MESSAGE / seconds(1, 1000)), 1000)
    dense = Dense(b, a, 0, 0)
    alone, beside = (simulate_layer([[plan]] * 2, [[plan]] * 2, [SHAPE], cluster(), dense, way).forward for way in (False, True))
    assert alone.seconds == pytest.approx(2 * (b + MESSAGE + k + a), **EXACT)
    assert alone.exposed == pytest.approx([2 * MESSAGE] * 2, **EXACT)
    first = max(2 * b, b + MESSAGE)  # the first is here, and the second has begun
    second = max(first + k, max(2 * b, b + MESSAGE) + MESSAGE)
    assert beside.seconds == pytest.approx(second + k + 2 * a, **EXACT)
    assert beside.exposed == pytest.approx([beside.seconds - 2 * (b + k + a)] * 2, **EXACT)
    assert beside.compute == pytest.approx([2 * (b + k + a)] * 2, **EXACT)


@pytest.mark.parametrize("after", [0.0, 0.5, 2.0])
def test_what_comes_home_last(after: float) -> None:
    """Sums of the first come home while the second computes, those of the second while the first goes on."""
    tasks = [[stage, rank, 1000, 1000] for stage in (0, 1) for rank in (0, 1)]
    plan = plan_of(2, [[0, 1, 1000, 2, 1, 2], [1, 0, 1000, 2, 1, 2]], tasks, 2)
    plan.transfers[:, 2], plan.transfers[:, 5] = [1, 0], What.OUT
    message, k = 1000 * 4 * 65 * 4 / 1e9, seconds(1000, 1000)
    a = after * message
    times = simulate_layer([[plan]] * 2, [[plan]] * 2, [SHAPE], cluster(), Dense(0, a, 0, 0), True).forward
    # In turns: both stages 0, then each posts its sums and computes the rest.
    home = [2 * k + message, max(3 * k, 2 * k + message) + message]
    first = max(4 * k, home[0]) + a
    assert times.seconds == pytest.approx(max(first, home[1]) + a, **EXACT)


@pytest.mark.parametrize("slots", [None, 2, 1])
def test_results_wait_for_those_of_another_call_only_on_shared_lanes(slots: int | None) -> None:
    """Rank 0 sends home what it computed in the first call while it receives its own results of the second."""
    message, k = 1000 * 4 * 65 * 4 / 1e9, seconds(1000, 1000)
    plans = []
    for server, owner in ((0, 1), (2, 0)):
        plan = plan_of(3, [[server, owner, 1000, 2, 1, 2]], [[0, server, 1000, 1000]], 2)
        plan.transfers[:, 2], plan.transfers[:, 5] = owner, What.OUT
        plans.append([plan])
    times = simulate_layer(plans, plans, [SHAPE], cluster(), NOTHING, True, slots=slots).forward
    assert times.seconds == pytest.approx(k + (2 if slots == 1 else 1) * message, **EXACT)


def test_backward_is_the_reverse() -> None:
    """The dense part after attention comes first, and that of the second sequence before that of the first."""
    b, a, k = 0.3 * MESSAGE, 2.0 * MESSAGE, seconds(1000, 1000)
    quick = plan_of(2, [], [[0, rank, 1000, 1000] for rank in (0, 1)], 1)
    backward = simulate_layer([[quick], [quick]], [[quick], [swap(1000)]], [SHAPE], cluster(), Dense(0, 0, b, a), True).backward
    assert backward is not None
    assert backward.exposed == pytest.approx([0, 0], abs=1e-12)  # the second's message is behind the first's dense part
    assert backward.seconds == pytest.approx(2 * (a + b + k), **EXACT)


@pytest.mark.parametrize("name", ["ring", "zigzag", "gather", "tree"])
def test_one_sequence_is_a_pass_with_dense_parts_around(name: str) -> None:
    plan, one = make_plan(name, causal(4096), 8), cluster()
    back = transpose(plan)
    for way in (False, True):
        layer = simulate_layer([[plan]], [[back]], [SHAPE], one, Dense(1e-3, 2e-3, 3e-3, 5e-3), way)
        assert layer.forward.seconds == pytest.approx(simulate_pass([plan], [SHAPE], one).seconds + 3e-3, **EXACT)
        assert layer.backward is not None
        assert layer.backward.seconds == pytest.approx(simulate_pass([back], [SHAPE], one).seconds + 8e-3, **EXACT)


@pytest.mark.parametrize("name", ["ring", "zigzag", "gather", "tree"])
@pytest.mark.parametrize("cores", [None, 4])
def test_side_by_side_hides(name: str, cores: int | None) -> None:
    """Bytes and work stay; waiting and the time of the layer shrink, on devices of their own and where ranks share cores."""
    machine = cluster(
        kernel__peak_tflops={"float32": 0.2}, **({"host__cores": cores, "host__asynchronous": False} if cores else {})
    )
    plans = [make_plan(name, mask, 4) for mask in (causal(2048), documents([100, 1000, 948]))]
    forward, backward = [[plan] for plan in plans], [[transpose(plan)] for plan in plans]
    dense = Dense.of_flops(512 * 2 * PAIR * 1000, 512 * 8 * PAIR * 1000, 1e12)
    alone, beside = (simulate_layer(forward, backward, [SHAPE], machine, dense, way, timeline=True) for way in (False, True))
    for a, b in zip(alone.passes, beside.passes, strict=True):
        assert (a.bytes_inside, a.bytes_between) == (b.bytes_inside, b.bytes_between)
        assert np.allclose(a.compute, b.compute)
        assert b.seconds <= a.seconds * (1 + 1e-9) and b.waiting.sum() <= a.waiting.sum() * (1 + 1e-9)
        assert b.timeline is not None
    if cores is None:
        assert beside.seconds < alone.seconds
        assert sum(p.exposed.sum() for p in beside.passes) < sum(p.exposed.sum() for p in alone.passes)


def test_heads_traded_are_one_call() -> None:
    """A head exchange, a plan and a head exchange chained into one workload take as long as phase after phase."""
    shape, one, plan = Shape(4, 2, 64, 64, SHAPE.dtype), cluster(), make_plan("zigzag", causal(4096), 2)
    shapes = slices_of(shape, 2)
    around, _ = exchanges(make_plan("zigzag", causal(4096), 4).layout, 2, shape)
    phases = [around[0], plan, around[1]]
    want = simulate_pass(phases, shapes, one)
    loads: list[Workload] = [of_exchange(around[0], one), of_plan(plan, shapes, one), of_exchange(around[1], one)]
    call = call_load(loads)
    assert call.load.stages == sum(load.stages for load in loads)
    assert layer_load([call], 0, 0).stages == call.load.stages + 2
    found = simulate_layer([phases], [phases], shapes, one, NOTHING, False).forward
    assert found.seconds == pytest.approx(want.seconds, **EXACT) and found.bytes_inside == want.bytes_inside
    beside = simulate_layer([phases] * 2, [phases] * 2, shapes, one, Dense(1e-3, 4e-3, 0, 0), True).forward
    assert (
        beside.seconds < simulate_layer([phases] * 2, [phases] * 2, shapes, one, Dense(1e-3, 4e-3, 0, 0), False).forward.seconds
    )


def test_calls_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="Found 1 and 0"):
        simulate_layer([[swap(1)]], [], [SHAPE], cluster(), NOTHING, True)
