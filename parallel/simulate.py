"""The simulator: prices any plan on a described cluster, with a timeline of every rank's compute and transfers.

Boundaries follow the executor: await what the next stage needs, unpack, pack and post, launch the stage's kernels. A transfer
begins when both ends have posted it and the batch before it on its lane is done on both; links are shared as ``ports.py`` says.
One pass over the boundaries, vectorised over ranks and messages: 512 ranks and a quarter of a million tasks take about a second.
The same input gives the same output, to the bit.

Batches that one lane posts at one boundary begin together.

What is not modelled: clocks that fall with power, congestion inside switches, other traffic (FSDP), kernels slowed by NCCL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distattn.parallel.cluster import Cluster
from distattn.parallel.plan import Plan, What
from distattn.parallel.ports import Ports
from distattn.parallel.program import Program, compile_program
from distattn.parallel.shape import Shape
from distattn.parallel.shared_cores import SharedCores
from distattn.parallel.statistics import peak_buffer_rows
from distattn.parallel.workload import Exchange, Messages, Workload, of_exchange, of_plan

COMPUTE = -1  # the lane of what is no transfer


@dataclass(frozen=True)
class Timeline:
    """What each rank did when: kernels (lane ``COMPUTE``) and batches of transfers on their lanes. Columns, sorted by start.

    Attributes:
        rank, lane, phase, boundary: int64; ``phases[phase]`` is a pass or an exchange, boundary the stage of kernels.
        start, stop: float64 seconds.
        size: int64 bytes of a batch, both directions; 0 for kernels.
    """

    phases: tuple[str, ...]
    rank: np.ndarray
    lane: np.ndarray
    phase: np.ndarray
    boundary: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class PassTimes:
    """One pass with its head exchanges, from the moment that all ranks enter it. Arrays are float64 [P], seconds.

    Attributes:
        seconds: until the last rank is done.
        finish: until each rank is done.
        compute: in kernels.
        waiting: at boundaries, for whatever reason.
        exposed: the part of it in which what was awaited was on its way; the rest is waiting for late peers.
        bytes_inside, bytes_between: sent inside of nodes and between them, by all ranks together.
    """

    seconds: float
    finish: np.ndarray
    compute: np.ndarray
    waiting: np.ndarray
    exposed: np.ndarray
    bytes_inside: int
    bytes_between: int
    timeline: Timeline | None


@dataclass(frozen=True)
class Simulation:
    """A schedule on a cluster: its forward and its backward pass."""

    forward: PassTimes
    backward: PassTimes | None

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward.seconds + (self.backward.seconds if self.backward else 0.0)

    @property
    def passes(self) -> list[PassTimes]:
        """Those that there are."""
        return [p for p in (self.forward, self.backward) if p is not None]


def simulate(forward: Plan, shape: Shape, cluster: Cluster, backward: Plan | None = None, timeline: bool = False) -> Simulation:
    """A schedule without head exchange: its plans of all ranks.

    Raises:
        ValueError: the cluster cannot hold the ranks, or does not know the dtype; a plan is one rank's view.
    """
    back = None if backward is None else simulate_pass([backward], [shape], cluster, timeline)
    return Simulation(simulate_pass([forward], [shape], cluster, timeline), back)


def simulate_pass(
    phases: Sequence[Plan | Exchange], shapes: Sequence[Shape], cluster: Cluster, timeline: bool = False
) -> PassTimes:
    """Phases one after the other on every rank, without barriers between: a plan, and head exchanges before and after it.

    Args:
        shapes: of the head slices, one without head exchange. With u of them a plan of P ranks is run by u * P: rank g * u + i
            does what rank g does in the plan, for the heads of ``shapes[i]``. An exchange has a row for each of the u * P ranks.

    Raises:
        ValueError: see :func:`simulate`.
    """
    loads = [of_plan(p, shapes, cluster) if isinstance(p, Plan) else of_exchange(p, cluster) for p in phases]
    return simulate_loads(loads, cluster, timeline)


def simulate_loads(loads: Sequence[Workload], cluster: Cluster, timeline: bool = False) -> PassTimes:
    """Workloads one after the other on every rank, without barriers between."""
    worlds = {load.world for load in loads}
    if len(worlds) != 1:
        raise ValueError(
            f"Phases of one pass have the same ranks. Found {sorted(worlds)}: pass plans of P / u ranks and u shapes."
        )
    cluster.check_world(loads[0].world)
    run = _Run(cluster, loads[0].world, timeline)
    for load in loads:
        run.phase(load)
    return run.times([load.name for load in loads])


class _Run:
    """The clocks of all ranks while phases run. ``host``: until when it has issued work; ``device``: until when that is done."""

    def __init__(self, cluster: Cluster, world: int, timeline: bool):
        self.cluster, self.world, self.keeps_timeline = cluster, world, timeline
        self.host, self.device, self.compute = np.zeros(world), np.zeros(world), np.zeros(world)
        self.waiting, self.exposed = np.zeros(world), np.zeros(world)
        self.inside = self.between = self.phases = 0
        self.records: list[tuple[np.ndarray, ...]] = []

    def phase(self, load: Workload) -> None:
        """Runs one workload from where the clocks are."""
        messages, cluster, world = load.messages, self.cluster, self.world
        if cluster.host.cores is not None:
            self._phase_on_shared_cores(load)
            return
        posted = np.searchsorted(messages.post, np.arange(load.stages + 2))
        ports = Ports(cluster, messages, posted)
        lanes = int(messages.lane.max(initial=0)) + 1
        lane_free = np.zeros(lanes * world)
        # What is awaited at each boundary: when the last batch arrives, and since when it has been on its way.
        arrival, begun = np.zeros((load.stages + 1, world)), np.zeros((load.stages + 1, world))
        counts = _ends_by_boundary(messages, load)
        self._issue(load.begin)
        for boundary in range(load.stages + 1):
            self._await(arrival[boundary], begun[boundary])
            busy = counts[boundary] * cluster.host.message_us * 1e-6 + (boundary < load.stages) * cluster.host.stage_us * 1e-6
            self._issue(busy)
            self.device += load.unpack[boundary] + load.pack[boundary]
            now = slice(posted[boundary], posted[boundary + 1])
            if now.start < now.stop:
                self._send(messages, boundary, now, ports, lane_free, arrival, begun)
            if boundary < load.stages:
                self._launch(boundary, load.compute[boundary])
        self._end(messages)

    def _phase_on_shared_cores(self, load: Workload) -> None:
        """The same where ranks take cores from each other."""

        def record(rank: int, lane: int, boundary: int, start: float, stop: float, size: int) -> None:
            who, where, begin, end, total = (np.array([x]) for x in (rank, lane, start, stop, size))
            self._record(who, where, boundary, begin, end, total)

        run = SharedCores(load, self.cluster, self.device, record if self.keeps_timeline else None)
        self.host = self.device = run.finish
        self.compute, self.waiting = self.compute + run.compute, self.waiting + run.waiting
        self.exposed = self.exposed + run.exposed
        self._end(load.messages)

    def _end(self, messages: Messages) -> None:
        same_node = messages.src // self.cluster.devices == messages.dst // self.cluster.devices
        self.inside += int(messages.size[same_node].sum())
        self.between += int(messages.size[~same_node].sum())
        self.phases += 1

    def _issue(self, seconds: np.ndarray) -> None:
        """The host spends time; the device begins what comes next no sooner. A host that is the device ends its work first."""
        if not self.cluster.host.asynchronous:
            self.host = self.device
        self.host = self.host + seconds
        self.device = np.maximum(self.device, self.host)

    def _await(self, arrival: np.ndarray, begun: np.ndarray) -> None:
        late = arrival > self.device
        self.waiting += np.where(late, arrival - self.device, 0.0)
        self.exposed += np.where(late, arrival - np.clip(begun, self.device, arrival), 0.0)
        self.device = np.maximum(self.device, arrival)

    def _send(
        self,
        m: Messages,
        boundary: int,
        now: slice,
        ports: Ports,
        lane_free: np.ndarray,
        arrival: np.ndarray,
        begun: np.ndarray,
    ) -> None:
        """Carries what is posted at a boundary."""
        src, dst, size = m.src[now], m.dst[now], m.size[now]
        ends = m.lane[now] * self.world + src, m.lane[now] * self.world + dst
        start = np.maximum(np.maximum(self.device[src], self.device[dst]), np.maximum(lane_free[ends[0]], lane_free[ends[1]]))
        stop = ports.send(boundary, now, start)
        first = np.full(len(lane_free), np.inf)
        need = m.need[now]
        for end, rank in ((ends[0], src), (ends[1], dst)):
            np.maximum.at(lane_free, end, stop)
            np.minimum.at(first, end, start)
            np.maximum.at(arrival, (need, rank), stop)
            np.maximum.at(begun, (need, rank), start)
        if self.keeps_timeline:
            bytes_of = np.bincount(np.concatenate(ends), weights=np.tile(size, 2), minlength=len(first))
            batch = np.flatnonzero(np.isfinite(first))
            self._record(batch % self.world, batch // self.world, boundary, first[batch], lane_free[batch], bytes_of[batch])

    def _launch(self, stage: int, seconds: np.ndarray) -> None:
        """The kernels of a stage."""
        if self.keeps_timeline:
            rank = np.flatnonzero(seconds > 0)
            lane, size = np.full(len(rank), COMPUTE), np.zeros(len(rank))
            self._record(rank, lane, stage, self.device[rank], (self.device + seconds)[rank], size)
        self.compute += seconds
        self.device = self.device + seconds

    def _record(
        self, rank: np.ndarray, lane: np.ndarray, boundary: int, start: np.ndarray, stop: np.ndarray, size: np.ndarray
    ) -> None:
        phase = np.full(len(rank), self.phases)
        self.records.append((rank, lane, phase, np.full(len(rank), boundary), start, stop, size.astype(np.int64)))

    def times(self, names: Sequence[str]) -> PassTimes:
        """What the clocks say."""
        timeline = None
        if self.keeps_timeline:
            columns = (
                [np.concatenate(c) for c in zip(*self.records, strict=True)] if self.records else [np.zeros(0, np.int64)] * 7
            )
            order = np.lexsort((columns[1], columns[0], columns[4]))
            timeline = Timeline(tuple(names), *(c[order] for c in columns))
        finish = np.maximum(self.device, self.host)
        seconds = float(finish.max(initial=0.0))
        return PassTimes(seconds, finish, self.compute, self.waiting, self.exposed, self.inside, self.between, timeline)


def _ends_by_boundary(messages: Messages, load: Workload) -> np.ndarray:
    """Messages that each rank posts at each boundary, sends and receives; int64 [stages + 1, P]."""
    size = (load.stages + 1) * load.world
    end, post = np.concatenate([messages.src, messages.dst]), np.tile(messages.post, 2)
    return np.bincount(post * load.world + end, minlength=size).reshape(load.stages + 1, load.world)


def peak_buffer_bytes(forward: Plan, shape: Shape, backward: Plan | None = None, ranks: int = 8) -> int:
    """Bytes that the executor allocates for foreign rows and messages on the rank that needs most; kept keys included.

    Programs are compiled for the ``ranks`` that hold most foreign rows at once, in bytes: exact where the one that needs most is
    among them. Costs what compiling that many views costs.
    """
    plans = [forward] if backward is None else [forward, backward]
    weights = np.array([shape.row_bytes(what) for what in What], dtype=np.int64)
    rows = np.max([peak_buffer_rows(plan, weights) for plan in plans], axis=0)
    most = np.argsort(-rows, kind="stable")[:ranks]
    return max(_allocated(forward, shape, backward, int(rank)) for rank in most[rows[most] > 0]) if rows.any() else 0


def _allocated(forward: Plan, shape: Shape, backward: Plan | None, rank: int) -> int:
    back = None if backward is None else backward.view(rank)
    programs: list[Program] = [compile_program(forward.view(rank), shape, None if back is None else back.kept)]
    if back is not None:
        programs.append(compile_program(back, shape, forward=programs[0]))
    return programs[0].kept_bytes + max(program.workspace_bytes for program in programs)
