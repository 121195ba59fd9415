"""The simulator against times worked out by hand, on clusters whose figures are round numbers."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn.kernels.bands import Band, Bands, areas
from distattn.parallel.cluster import Cluster, load_cluster
from distattn.parallel.layout import contiguous
from distattn.parallel.mask import causal, documents, full
from distattn.parallel.plan import Plan, What, no_kept
from distattn.parallel.schedules import make_plan
from distattn.parallel.shape import Shape
from distattn.parallel.simulate import COMPUTE, Simulation, peak_buffer_bytes, simulate, simulate_pass
from distattn.parallel.statistics import statistics, work
from distattn.parallel.timeline import chrome_trace
from distattn.parallel.transpose import transpose
from distattn.parallel.workload import Exchange
from tests.parallel.clusters import PAIR, ROW, SHAPE, cluster, seconds
from tests.parallel.plans import make_layout, make_mask, random_servers_plan, tree_plan

EXACT = {"rel": 1e-9, "abs": 1e-12}


def plan_of(world: int, transfers: list[list[int]], tasks: list[list[int]], stages: int, rows: int = 1000) -> Plan:
    """A plan of keys [src, dst, rows of src, lane, post, need] and full tasks [stage, rank, queries, keys] on own rows."""
    table = [[src, dst, src, 0, n, What.KV, lane, post, need] for src, dst, n, lane, post, need in transfers]
    work_ = [[stage, rank, rank, 0, q, rank, 0, k] for stage, rank, q, k in tasks]
    bands = np.concatenate([Bands([Band(0, q, 0, k)]).table for _, _, q, k in tasks] or [np.zeros((0, 6), np.int64)])
    return Plan(
        name="by hand",
        direction="forward",
        layout=contiguous(world * rows, world),
        mask=full(world * rows),
        stages=stages,
        tasks=np.array(work_, dtype=np.int64).reshape(-1, 8),
        band_ptr=np.arange(len(tasks) + 1),
        bands=bands,
        transfers=np.array(table, dtype=np.int64).reshape(-1, 9),
        kept=no_kept(),
    )


def test_one_message() -> None:
    times = simulate(plan_of(2, [[0, 1, 1000, 0, 0, 1]], [], 1), SHAPE, cluster(inside__latency_us=7)).forward
    assert times.seconds == pytest.approx(1000 * ROW / 1e9 + 7e-6, **EXACT)
    assert times.finish == pytest.approx([times.seconds] * 2, **EXACT)
    assert times.exposed == pytest.approx([times.seconds] * 2, **EXACT)
    assert (times.bytes_inside, times.bytes_between) == (1000 * ROW, 0)


@pytest.mark.parametrize(
    ("transfers", "changes", "messages"),
    [
        ([[0, 1, 500, 0, 0, 1], [2, 3, 500, 0, 0, 1]], {}, 1),
        ([[0, 1, 500, 0, 0, 1], [1, 0, 500, 0, 0, 1]], {}, 1),  # out and in are two ports
        ([[0, 1, 500, 0, 0, 1], [0, 2, 500, 0, 0, 1]], {}, 2),  # one port out
        ([[0, 2, 500, 0, 0, 1], [1, 2, 500, 0, 0, 1], [3, 2, 500, 0, 0, 1]], {}, 3),  # one port in
        ([[0, 1, 500, 0, 0, 1], [2, 3, 500, 0, 0, 1]], {"inside__shared_gb_s": 1}, 2),
        ([[0, 1, 500, 0, 0, 1], [2, 3, 500, 1, 0, 1]], {"inside__shared_gb_s": 1}, 2),  # lanes share links
        ([[0, 1, 500, 0, 0, 1], [2, 3, 500, 0, 0, 1]], {"inside__shared_gb_s": 2}, 1),
    ],
)
def test_contention(transfers: list[list[int]], changes: dict[str, Any], messages: int) -> None:
    times = simulate(plan_of(4, transfers, [], 1), SHAPE, cluster(**changes)).forward
    assert times.seconds == pytest.approx(messages * 500 * ROW / 1e9, **EXACT)


def test_overlap_hides() -> None:
    message = 1000 * ROW / 1e9
    q = math.ceil(message / seconds(1, 1000))
    hidden = simulate(plan_of(2, [[0, 1, 1000, 0, 0, 1]], [[0, 0, q, 1000], [0, 1, q, 1000]], 2, q), SHAPE, cluster()).forward
    assert hidden.seconds == pytest.approx(seconds(q, 1000), **EXACT)
    assert hidden.exposed.max() == 0 and hidden.waiting.max() == 0
    late = simulate(plan_of(2, [[0, 1, 1000, 0, 1, 2]], [[0, 0, q, 1000], [0, 1, q, 1000]], 2, q), SHAPE, cluster()).forward
    assert late.seconds == pytest.approx(seconds(q, 1000) + message, **EXACT)
    assert late.exposed == pytest.approx([message] * 2, **EXACT)


def test_both_ends_must_have_posted() -> None:
    """Rank 0 has nothing to do, rank 1 posts after a stage of work: rank 0 waits for it, which is not communication."""
    times = simulate(plan_of(2, [[0, 1, 100, 0, 1, 2]], [[0, 1, 1000, 1000]], 2), SHAPE, cluster()).forward
    assert times.seconds == pytest.approx(seconds(1000, 1000) + 100 * ROW / 1e9, **EXACT)
    assert times.waiting[0] == pytest.approx(times.seconds, **EXACT)
    assert times.exposed[0] == pytest.approx(100 * ROW / 1e9, **EXACT)


@pytest.mark.parametrize(("lane", "rows"), [(0, 1300), (1, 1000)])
def test_lanes_are_first_in_first_out(lane: int, rows: int) -> None:
    """Rank 1 receives 1000 rows, and a boundary later sends 300 to rank 2 through a port that is free."""
    times = simulate(plan_of(3, [[0, 1, 1000, 0, 0, 2], [1, 2, 300, lane, 1, 2]], [], 2), SHAPE, cluster()).forward
    assert times.seconds == pytest.approx(rows * ROW / 1e9, **EXACT)


def test_what_is_needed_later_is_a_batch_of_its_own() -> None:
    """Rank 1 awaits 100 rows at boundary 1; 900 that it sends at the same boundary and lane it awaits at the end only."""
    plan = plan_of(3, [[0, 1, 100, 0, 0, 1], [1, 2, 900, 0, 0, 2]], [[1, 1, 1000, 1000]], 2)
    times = simulate(plan, SHAPE, cluster()).forward
    first, other, work = 100 * ROW / 1e9, 900 * ROW / 1e9, seconds(1000, 1000)
    assert times.finish[1] == pytest.approx(max(first + work, other), **EXACT)
    assert times.waiting[1] == pytest.approx(first + max(0.0, other - first - work), **EXACT)


def test_nodes_and_rails() -> None:
    """Two nodes of two devices in a ring: two hops stay inside, two share a rail or have one each."""
    ring = [[r, (r + 1) % 4, 1000, 0, 0, 1] for r in range(4)]
    between = {"nics": 1, "nic_gb_s": 0.5, "latency_us": 3, "through_port": False}
    times = simulate(plan_of(4, ring, [], 1), SHAPE, cluster(nodes=2, devices=2, between=between)).forward
    assert times.seconds == pytest.approx(1000 * ROW / 0.5e9 + 3e-6, **EXACT)
    assert times.bytes_inside == times.bytes_between == 2000 * ROW
    across = [[0, 2, 1000, 0, 0, 1], [1, 3, 1000, 0, 0, 1]]
    for nics, factor in ((1, 2), (2, 1)):
        one = cluster(nodes=2, devices=2, between=between | {"nics": nics})
        times = simulate(plan_of(4, across, [], 1), SHAPE, one).forward
        assert times.seconds == pytest.approx(factor * 1000 * ROW / 0.5e9 + 3e-6, **EXACT)
    both_ways = [[0, 1, 1000, 0, 0, 1], [0, 2, 1000, 1, 0, 1]]
    for through, factor in ((False, 1), (True, 2)):
        one = cluster(nodes=2, devices=2, between=between | {"nic_gb_s": 1, "latency_us": 0, "through_port": through})
        assert simulate(plan_of(4, both_ways, [], 1), SHAPE, one).seconds == pytest.approx(factor * 1000 * ROW / 1e9, **EXACT)


def test_compute_is_work_over_rate() -> None:
    """Links for nothing: a pass lasts as long as the busiest rank's pairs, forward and backward."""
    fast = cluster(inside__port_gb_s=1e12, kernel__peak_tflops={"float32": 1})
    plan = make_plan("zigzag", causal(4096), 8)
    times = simulate(plan, SHAPE, fast, transpose(plan))
    assert times.forward.seconds == pytest.approx(work(plan).max() * PAIR / 1e12, rel=1e-6)
    assert times.backward is not None
    assert times.backward.seconds == pytest.approx(work(plan).max() * 2.5 * PAIR / 1e12, rel=1e-6)
    assert times.seconds == times.forward.seconds + times.backward.seconds


def test_zigzag_over_contiguous_ring() -> None:
    """2 - 1/P, the balance of work, where links cost nothing."""
    fast, n = cluster(inside__port_gb_s=1e12), 2**15
    ring, zigzag = (simulate(make_plan(name, causal(n), 8), SHAPE, fast).seconds for name in ("ring", "zigzag"))
    assert ring / zigzag == pytest.approx(2 - 1 / 8, rel=2e-3)


def test_a_launch_and_its_bands() -> None:
    curve = {"launch_us": 3, "band_us": 2, "memory_gb_s": 1e12, "efficiency": {64: {1: 0.5}}}
    times = simulate(plan_of(1, [], [[0, 0, 64, 64]], 1), SHAPE, cluster(kernel__forward=curve)).forward
    assert times.seconds == pytest.approx(5e-6 + 64 * 64 * PAIR / 0.5e12, **EXACT)


def test_hosts() -> None:
    """A host that runs ahead costs time only where it is slower than its device; a host that is the device always does."""
    plan = plan_of(1, [], [[stage, 0, 1000, 1000] for stage in range(3)], 3)
    one = seconds(1000, 1000)
    for stage_us, ahead in ((one * 0.5e6, one * 3.5), (one * 2e6, one * 7)):
        assert simulate(plan, SHAPE, cluster(host__stage_us=stage_us)).seconds == pytest.approx(ahead, **EXACT)
        slow = cluster(host__stage_us=stage_us, host__asynchronous=False)
        assert simulate(plan, SHAPE, slow).seconds == pytest.approx(3 * (one + stage_us * 1e-6), **EXACT)
    post = cluster(host__message_us=5, host__pass_us=11)
    times = simulate(plan_of(2, [[0, 1, 1000, 0, 0, 1]], [], 1), SHAPE, post)
    assert times.seconds == pytest.approx(1000 * ROW / 1e9 + 16e-6, **EXACT)


def test_copies() -> None:
    """Own rows are packed, a buffer that arrives whole is used where it lies, one that comes in two messages is not."""
    slow = cluster(host__copy_gb_s=2)
    message, copied = 1000 * ROW / 1e9, 1000 * ROW / 2e9
    whole = simulate(plan_of(2, [[0, 1, 1000, 0, 0, 1]], [], 1), SHAPE, slow)
    assert whole.seconds == pytest.approx(copied + message, **EXACT)
    plan = plan_of(2, [[0, 1, 500, 0, 0, 1], [0, 1, 1000, 0, 1, 2]], [], 2)
    plan.transfers[1, 3] = 500
    halves = simulate(plan, SHAPE, slow)
    # pack, send, (unpack while the sender packs,) send, unpack
    assert halves.seconds == pytest.approx(1.5 * copied + message, **EXACT)
    sums = plan_of(2, [[0, 1, 1000, 0, 0, 1]], [], 1)
    sums.transfers[0, [2, 5]] = 1, What.OUT
    size = 1000 * 4 * 65 * 4
    assert simulate(sums, SHAPE, slow).seconds == pytest.approx(size / 1e9 + 1.5 * size / 2e9, **EXACT)


@pytest.mark.parametrize(
    ("cores", "queries", "expected"),
    [
        (2, [1000, 1000, 1000, 1000], [2, 2, 2, 2]),
        (4, [1000, 1000, 1000, 1000], [1, 1, 1, 1]),
        (1, [1000, 2000, 0, 0], [2, 3, 0, 0]),
        (2, [500, 500, 1000, 1500], [1, 1, 1.5, 2]),
    ],
)
def test_shared_cores(cores: int, queries: list[int], expected: list[float]) -> None:
    plan = plan_of(4, [], [[0, rank, q, 1000] for rank, q in enumerate(queries) if q], 1, 2000)
    shared = cluster(host__cores=cores, host__asynchronous=False)
    assert simulate(plan, SHAPE, shared).forward.finish == pytest.approx(np.array(expected) * seconds(1000, 1000), **EXACT)


def test_traffic_takes_cores() -> None:
    """A message of half the stage's time takes its share of busy cores, and nothing where a core is idle."""
    message = 1000 * ROW / 1e9
    q = round(2 * message / seconds(1, 1000))
    plan = plan_of(2, [[0, 1, 1000, 0, 0, 1]], [[0, 0, q, 1000], [0, 1, q, 1000]], 1, max(q, 1000))
    for cores, extra in ((2, message * 0.4), (8, 0.0)):
        shared = cluster(host__cores=cores, host__traffic_us_mb=400, host__asynchronous=False)
        assert simulate(plan, SHAPE, shared).seconds == pytest.approx(seconds(q, 1000) + extra, **EXACT)


def test_cores_enough_for_all() -> None:
    """With a core for each rank the events say what the boundaries say; ports by the clock may only be fairer."""
    one = {"inside__port_gb_s": 0.3, "inside__latency_us": 20, "host__asynchronous": False, "host__copy_gb_s": 2}
    one |= {"host__stage_us": 3, "host__message_us": 1, "host__pass_us": 9}
    for plan in plans_to_price():
        times = [simulate_pass([plan], [SHAPE], cluster(**one, **more)) for more in ({}, {"host__cores": 8})]
        exact = plan.direction == "forward" and plan.name == "ring"
        assert times[1].finish == pytest.approx(times[0].finish, rel=1e-9 if exact else 0.1), (plan.name, plan.direction)
        assert times[1].compute == pytest.approx(times[0].compute, rel=1e-9)
        assert np.all(times[1].exposed <= times[1].waiting + 1e-12)
        assert (times[1].bytes_inside, times[1].bytes_between) == (times[0].bytes_inside, times[0].bytes_between)


def test_fewer_cores_are_slower() -> None:
    """Never faster than work over cores, nor than with a core more; a contiguous ring leaves no core idle for long."""
    plan = make_plan("ring", causal(2048), 4)
    total = work(plan).sum() * PAIR / 1e12
    spent = [
        simulate_pass([plan], [SHAPE], cluster(inside__port_gb_s=1e3, host__cores=n, host__asynchronous=False)).seconds
        for n in (1, 2, 3, 4)
    ]
    assert spent[0] == pytest.approx(total, rel=1e-3) and sorted(spent, reverse=True) == spent
    assert total / 2 <= spent[1] * (1 + 1e-9) <= 1.15 * total / 2 * (1 + 1e-9)


def test_head_exchange() -> None:
    """Two slices of a plan of two ranks between exchanges in pairs: the plan's messages stay in their slice."""
    before = Exchange("heads", np.array([[9e9, 1e6], [2e6, 0], [0, 1e6], [1e6, 0]], dtype=np.int64))
    plan = plan_of(2, [[0, 1, 1000, 0, 0, 1]], [], 1)
    one, slices = cluster(), [Shape(3, 2, 64, 64, torch.float32), Shape(1, 1, 64, 64, torch.float32)]
    alone = simulate_pass([before], slices, one)
    assert alone.finish == pytest.approx([2e-3, 2e-3, 1e-3, 1e-3], **EXACT)
    assert alone.bytes_inside == 5_000_000
    times = simulate_pass([before, plan, before], slices, one, timeline=True)
    assert times.bytes_inside == 2 * 5_000_000 + 1000 * (ROW + ROW // 2)
    # ranks 0 and 2 are slice 0, ranks 1 and 3 slice 1; then pairs again
    assert times.seconds == pytest.approx(2e-3 + 1000 * ROW / 1e9 + 2e-3, **EXACT)
    assert times.timeline is not None and times.timeline.phases == ("heads", "forward", "heads")
    with pytest.raises(ValueError, match="the same ranks"):
        simulate_pass([before, plan], slices[:1], one)


def plans_to_price() -> list[Plan]:
    mask = make_mask("causal", 640)
    made = [make_plan(name, mask, 8) for name in ("ring", "zigzag", "striped")]
    made += [make_plan("zigzag", documents([100, 300, 17, 95]), 8), tree_plan(make_layout("contiguous", mask, 8), mask)]
    return made + [transpose(plan, keep) for plan in made for keep in ("last", "none")]


@pytest.mark.parametrize("worse", ["inside__latency_us", "between__latency_us", "host__message_us", "host__stage_us", "slow"])
def test_nothing_worse_makes_a_plan_faster(worse: str) -> None:
    between = {"nics": 2, "nic_gb_s": 0.5, "latency_us": 3, "through_port": False}
    for plan in plans_to_price():
        before = 0.0
        for factor in (1, 2, 5, 20, 100):
            change = (
                {"inside__port_gb_s": 3 / factor, "between__nic_gb_s": 1 / factor} if worse == "slow" else {worse: 10.0 * factor}
            )
            one = cluster(nodes=2, devices=4, **{"between": dict(between), "inside__shared_gb_s": 6, **change})
            now = simulate_pass([plan], [SHAPE], one).seconds
            assert now >= before * (1 - 1e-12), f"{plan.name} {plan.direction}: {now} after {before}"
            before = now


def one_by_one(plan: Plan, one: Cluster) -> list[float]:
    """When each rank is done, in plain loops: the meaning of the simulator for clusters of nodes whose hosts cost nothing."""
    t, devices = plan.transfers.tolist(), one.devices
    now, arrival = [0.0] * plan.world, [[0.0] * plan.world for _ in range(plan.stages + 1)]
    lane_free: dict[tuple[int, int], float] = {}
    port_free: dict[tuple[str, int], float] = {}
    for boundary in range(plan.stages + 1):
        now = [max(pair) for pair in zip(now, arrival[boundary], strict=True)]
        sizes: dict[tuple[int, int, int, int], int] = {}
        for src, dst, _, start, stop, what, lane, post, need in t:
            if post == boundary:
                size = (stop - start) * SHAPE.row_bytes(What(what))
                sizes[lane, need, src, dst] = sizes.get((lane, need, src, dst), 0) + size
        ends = {m: [(m[2], m[0]), (m[3], m[0])] for m in sorted(sizes)}
        begin = {m: max(max(now[r], lane_free.get((r, lane), 0.0)) for r, lane in ends[m]) for m in ends}
        done = dict(begin)
        for kind in ("out", "in", "node", "rail out", "rail in"):
            for m in sorted(ends, key=lambda m: round(begin[m], 10)):
                _, _, src, dst = m
                inside = src // devices == dst // devices
                if inside != (not kind.startswith("rail")):
                    continue
                place = {"out": src, "in": dst, "node": src // devices}.get(kind)
                if place is None:
                    assert one.between is not None
                    end = src if kind == "rail out" else dst
                    place = end // devices * one.between.nics + end % devices * one.between.nics // devices
                    rate = one.between.nic_gb_s
                else:
                    rate = one.inside.shared_gb_s if kind == "node" else one.inside.port_gb_s  # type: ignore[assignment]
                left = max(begin[m], port_free.get((kind, place), 0.0)) + sizes[m] / (rate * 1e9)
                port_free[kind, place] = left
                done[m] = max(done[m], left)
        for m, (_, need, src, dst) in zip(ends, ends, strict=True):
            assert one.between is not None
            near = src // devices == dst // devices
            done[m] += (one.inside.latency_us if near else one.between.latency_us) * 1e-6
            for rank, lane in ends[m]:
                lane_free[rank, lane] = max(lane_free.get((rank, lane), 0.0), done[m])
                arrival[need][rank] = max(arrival[need][rank], done[m])
        for i in np.flatnonzero(plan.tasks[:, 0] == boundary).tolist():
            table = plan.task(i).bands.table
            columns = areas(table), table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]
            now[int(plan.tasks[i, 1])] += float(one.task_seconds(*columns, SHAPE, plan.direction).sum())
    return now


@pytest.mark.parametrize("seed", range(2))
def test_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    between = {"nics": rng.choice([1, 2, 4]), "nic_gb_s": 0.3, "latency_us": 30, "through_port": False}
    one = cluster(nodes=2, devices=4, between=between, inside__shared_gb_s=rng.choice([0.5, 2]), inside__latency_us=10)
    mask = make_mask(rng.choice(["causal", "documents", "full"]), 400, seed)
    servers = random_servers_plan(make_layout("zigzag", mask, 8), mask, seed)
    for plan in [*plans_to_price(), servers, transpose(servers)]:
        assert simulate_pass([plan], [SHAPE], one).finish == pytest.approx(one_by_one(plan, one), rel=1e-9), plan.name


def test_bytes_are_those_of_statistics() -> None:
    one = cluster(nodes=2, devices=4, between={"nics": 4, "nic_gb_s": 1, "latency_us": 0, "through_port": False})
    node = np.arange(8) // 4
    for plan in plans_to_price():
        volume = statistics(plan, SHAPE).bytes_by_link
        times = simulate_pass([plan], [SHAPE], one)
        assert times.bytes_inside == volume[node[:, None] == node].sum()
        assert times.bytes_between == volume[node[:, None] != node].sum()


def test_bounds_that_no_schedule_beats() -> None:
    """At least the busiest rank's kernels, at least the fullest port's bytes; at most everything one after the other."""
    rng = random.Random(3)
    for plan in plans_to_price():
        one = cluster(inside__port_gb_s=rng.choice([0.01, 1, 100]))
        times = simulate_pass([plan], [SHAPE], one)
        volume = statistics(plan, SHAPE).bytes_by_link
        port = max(volume.sum(0).max(), volume.sum(1).max()) / (one.inside.port_gb_s * 1e9)
        assert max(port, times.compute.max()) <= times.seconds * (1 + 1e-12)
        assert times.seconds <= times.compute.sum() + volume.sum() / (one.inside.port_gb_s * 1e9) + 1e-12
        assert np.all(times.exposed <= times.waiting + 1e-15)
        assert np.allclose(times.compute + times.waiting, times.finish, rtol=1e-6)


def simulated(timeline: bool = True, **changes: Any) -> Simulation:
    plan = make_plan("zigzag", causal(1024), 4)
    return simulate(plan, SHAPE, cluster(inside__latency_us=5, host__stage_us=2, **changes), transpose(plan), timeline)


def test_same_input_same_output() -> None:
    a, b = simulated(), simulated()
    assert a.seconds == b.seconds == simulated(timeline=False).seconds
    for one, other in zip(a.passes, b.passes, strict=True):
        assert one.timeline is not None and other.timeline is not None
        for column in ("rank", "lane", "phase", "boundary", "start", "stop", "size"):
            assert np.array_equal(getattr(one.timeline, column), getattr(other.timeline, column))


@pytest.mark.parametrize("changes", [{}, {"host__cores": 2, "host__asynchronous": False}])
def test_timeline_is_consistent(changes: dict[str, Any]) -> None:
    """Kernels add up to the busy time, nothing on one lane of one rank overlaps, all ends by the end."""
    for times in simulated(**changes).passes:
        t = times.timeline
        assert t is not None and np.all(t.start <= t.stop) and np.all(np.diff(t.start) >= 0)
        assert t.stop.max() <= times.seconds + 1e-12
        for rank in range(4):
            mine = t.rank == rank
            kernels = mine & (t.lane == COMPUTE)
            assert (t.stop - t.start)[kernels].sum() == pytest.approx(times.compute[rank])
            for lane in set(t.lane[mine].tolist()):
                one = mine & (t.lane == lane)
                assert np.all(t.start[one][1:] >= t.stop[one][:-1] - 1e-12)
        assert t.size.sum() == 2 * times.bytes_inside  # each end lists its messages


def test_chrome_trace(tmp_path: Path) -> None:
    from distattn.launch.timeline_plot import write_png, write_trace

    simulation = simulated()
    write_trace(simulation, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert events and all({"name", "ph", "ts", "dur", "pid", "tid", "cat"} <= set(e) for e in events)
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events)
    assert {e["pid"] for e in events} == {0, 1, 2, 3}
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(simulation.seconds * 1e6)
    forward, backward = ([e for e in events if e["cat"] == name] for name in ("forward", "backward"))
    assert min(e["ts"] for e in backward) >= simulation.forward.seconds * 1e6 >= max(e["ts"] for e in forward)
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events} <= named
    assert {e["pid"] for e in chrome_trace(simulation, [2])["traceEvents"]} == {2}
    with pytest.raises(ValueError, match=r"not all in 0\.\.3"):
        chrome_trace(simulation, [4])
    with pytest.raises(ValueError, match="no timeline"):
        chrome_trace(simulated(timeline=False))
    write_png(simulation, tmp_path / "timeline.png", "zigzag")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_peak_buffer_bytes() -> None:
    """A ring of 4 holds two shards, the own one packed first; backward two of gradients and messages too."""
    plan = make_plan("ring", full(1024), 4)
    shard = 256 * ROW
    assert peak_buffer_bytes(plan, SHAPE) == 2 * shard
    assert 4 * shard <= peak_buffer_bytes(plan, SHAPE, transpose(plan)) <= 7 * shard


def test_refused() -> None:
    plan = make_plan("ring", causal(64), 4)
    with pytest.raises(ValueError, match="4 ranks do not fit cluster 'round numbers'"):
        simulate(plan, SHAPE, cluster(devices=2))
    between = {"nics": 1, "nic_gb_s": 1, "latency_us": 0, "through_port": False}
    with pytest.raises(ValueError, match="do not fill nodes"):
        simulate(plan, SHAPE, cluster(nodes=2, devices=3, between=between))
    with pytest.raises(ValueError, match=r"has no peak for float64; it has float32, bfloat16\. Add kernel\.peak_tflops\.float64"):
        simulate(plan, Shape(4, 2, 64, 64, torch.float64), cluster())
    with pytest.raises(ValueError, match="the plan of all ranks"):
        simulate(plan.view(0), SHAPE, cluster())


@pytest.mark.slow
def test_a_million_tokens_on_512_ranks() -> None:
    plan = make_plan("ring", causal(2**20), 512)
    begin = time.perf_counter()
    simulate(plan, Shape(32, 8, 128, 128, torch.bfloat16), load_cluster("h200"))
    assert time.perf_counter() - begin < 10  # about one second on an idle core
