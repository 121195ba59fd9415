"""Ranks that share the cores of a node: one workload, event by event, since who computes slows down whoever else does.

CPU ranks over gloo are few, so plain loops do. Each rank is one thread. The cores of a node serve its busy ranks alike, none with
more than one core; messages in flight take their part of the cores first. Links are shared as in ``ports.py``, but by the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from distattn.parallel.cluster import Cluster
from distattn.parallel.workload import Workload

Record = Callable[[int, int, int, float, float, int], None]  # rank, lane (-1: kernels), boundary, start, stop, bytes
INSTANT = 1e-13  # seconds that are rounding


@dataclass
class _Rank:
    """Where one rank is: ``left`` core seconds of what it does, or waiting since ``since``."""

    doing: str = "asleep"
    boundary: int = 0
    left: float = 0.0
    since: float = 0.0
    posts: list[list[int]] = field(default_factory=list)  # messages by the boundary that posts them
    awaits: list[list[int]] = field(default_factory=list)
    compute: float = 0.0
    waiting: float = 0.0
    exposed: float = 0.0


@dataclass
class _Message:
    ends: tuple[int, int]
    lane: int
    post: int
    need: int
    size: int
    ports: list[tuple[tuple[int, int], float]]  # (kind and number of a port, seconds in it)
    latency: float
    posted: int = 0  # ends that have posted it
    start: float = math.inf
    stop: float = math.inf
    done: bool = False

    @property
    def turn(self) -> tuple[int, int]:
        """What its batch is called on a lane."""
        return self.post, self.need


class SharedCores:
    """Runs a workload; ``finish``, ``compute``, ``waiting`` and ``exposed`` (float64 [P]) are there afterwards.

    Args:
        start: when each rank enters.
        record: told of kernels and batches as they end, or None.
    """

    def __init__(self, load: Workload, cluster: Cluster, start: np.ndarray, record: Record | None):
        assert cluster.host.cores is not None
        self.load, self.cluster, self.record, self.cores = load, cluster, record, cluster.host.cores
        self.now = 0.0
        self.messages = _messages(load, cluster)
        self.ranks = [_Rank(since=float(start[r])) for r in range(load.world)]
        for rank in self.ranks:
            for _ in range(load.stages + 1):
                rank.posts.append([])
                rank.awaits.append([])
        self.queues: dict[tuple[int, int], list[tuple[int, int]]] = {}  # turns of unfinished batches, by (rank, lane), in order
        self.unfinished: dict[tuple[int, int, tuple[int, int]], list[int]] = {}  # messages of a batch (rank, lane, turn)
        self.carried: dict[tuple[int, int, tuple[int, int]], tuple[float, int]] = {}  # (begin, bytes) of a batch
        self.ports: dict[tuple[int, int], float] = {}
        for number, message in enumerate(self.messages):
            for end in message.ends:
                self.ranks[end].posts[message.post].append(number)
                self.ranks[end].awaits[message.need].append(number)
                self.unfinished.setdefault((end, message.lane, message.turn), []).append(number)
                queue = self.queues.setdefault((end, message.lane), [])
                if not queue or queue[-1] != message.turn:
                    queue.append(message.turn)
        self.pending: list[int] = []  # posted by both ends, not begun
        self.flying: list[int] = []
        self._run()
        self.finish, self.compute, self.waiting, self.exposed = (
            np.array([getattr(rank, name) for rank in self.ranks]) for name in ("since", "compute", "waiting", "exposed")
        )

    def _run(self) -> None:
        while any(rank.doing != "done" for rank in self.ranks):
            rates = self._rates()
            ends = [self.messages[m].stop for m in self.flying]
            for rank, rate in zip(self.ranks, rates, strict=True):
                if rank.doing == "asleep":
                    ends.append(rank.since)
                elif rank.doing in ("begin", "boundary", "kernels"):
                    ends.append(self.now + rank.left / rate)
            assert ends, "nobody can go on"
            passed, self.now = min(ends) - self.now, min(ends)
            for rank, rate in zip(self.ranks, rates, strict=True):
                rank.left -= passed * rate
            self._arrivals()
            for number, rank in enumerate(self.ranks):
                self._go_on(number, rank)

    def _rates(self) -> list[float]:
        """Core seconds a second that each rank gets."""
        devices, world = self.cluster.devices, self.load.world
        busy, traffic = ([0.0] * -(-world // devices) for _ in range(2))
        for number, rank in enumerate(self.ranks):
            busy[number // devices] += rank.doing in ("begin", "boundary", "kernels")
        for message in (self.messages[m] for m in self.flying):
            cost = message.size * self.cluster.host.traffic_us_mb * 1e-12
            for end in message.ends:
                traffic[end // devices] += cost / max(message.stop - message.start, cost, INSTANT)
        # Messages give way where they would take more than half of the cores.
        rates = [min(1.0, (self.cores - min(t, self.cores / 2)) / max(b, 1.0)) for b, t in zip(busy, traffic, strict=True)]
        return [rates[number // devices] for number in range(world)]

    def _arrivals(self) -> None:
        """Ends what has arrived; begins what its lanes and both ends allow."""
        for number in [m for m in self.flying if self.messages[m].stop <= self.now + INSTANT]:
            message = self.messages[number]
            message.done = True
            self.flying.remove(number)
            for end in message.ends:
                batch = end, message.lane, message.turn
                self.unfinished[batch].remove(number)
                begin, size = self.carried.get(batch, (message.start, 0))
                self.carried[batch] = min(begin, message.start), size + message.size
                if self.unfinished[batch]:
                    continue
                self.queues[end, message.lane].remove(message.turn)
                if self.record:
                    self.record(end, message.lane, message.post, self.carried[batch][0], self.now, self.carried[batch][1])
        self._begin_messages()

    def _begin_messages(self) -> None:
        for number in list(self.pending):
            message = self.messages[number]
            if any(self.queues[end, message.lane][0] != message.turn for end in message.ends):
                continue
            self.pending.remove(number)
            self.flying.append(number)
            message.start = message.stop = self.now
            for port, seconds in message.ports:
                self.ports[port] = max(self.now, self.ports.get(port, 0.0)) + seconds
                message.stop = max(message.stop, self.ports[port])
            message.stop += message.latency

    def _go_on(self, number: int, rank: _Rank) -> None:
        """Takes a rank through all that needs no time."""
        load, host = self.load, self.cluster.host
        while True:
            if rank.doing == "asleep" and rank.since <= self.now + INSTANT:
                rank.doing, rank.left = "begin", float(load.begin[number])
            elif rank.doing == "waiting":
                awaited = [self.messages[m] for m in rank.awaits[rank.boundary]]
                if not all(message.done for message in awaited):
                    return
                rank.waiting += self.now - rank.since
                rank.exposed += self.now - max([rank.since, *(m.start for m in awaited)]) if awaited else 0.0
                own = len(rank.posts[rank.boundary]) * host.message_us + (rank.boundary < load.stages) * host.stage_us
                copies = load.unpack[rank.boundary, number] + load.pack[rank.boundary, number]
                rank.doing, rank.left = "boundary", own * 1e-6 + float(copies)
            elif rank.doing in ("begin", "boundary", "kernels") and rank.left <= INSTANT:
                self._next(number, rank)
            else:
                return

    def _next(self, number: int, rank: _Rank) -> None:
        """What comes after what a rank has just done."""
        load, done = self.load, rank.doing
        if done == "boundary":
            for m in rank.posts[rank.boundary]:
                self.messages[m].posted += 1
                if self.messages[m].posted == 2:
                    self.pending.append(m)
            self._begin_messages()
            rank.since = self.now
            if rank.boundary == load.stages:
                rank.doing = "done"
            else:
                rank.doing, rank.left = "kernels", float(load.compute[rank.boundary, number])
            return
        if done == "kernels":
            rank.compute += self.now - rank.since
            if self.record and self.now > rank.since:
                self.record(number, -1, rank.boundary, rank.since, self.now, 0)
            rank.boundary += 1
        rank.doing, rank.since = "waiting", self.now


def _messages(load: Workload, cluster: Cluster) -> list[_Message]:
    """The messages with the ports on their way."""
    made, m, inside, between = [], load.messages, cluster.inside, cluster.between
    for src, dst, lane, post, need, size in zip(
        *(x.tolist() for x in (m.src, m.dst, m.lane, m.post, m.need, m.size)), strict=True
    ):
        nodes = src // cluster.devices, dst // cluster.devices
        near = nodes[0] == nodes[1]
        rates = {(0, src): inside.port_gb_s, (1, dst): inside.port_gb_s}
        if near and inside.shared_gb_s is not None:
            rates[2, nodes[0]] = inside.shared_gb_s
        if not near:
            assert between is not None
            if not between.through_port:
                rates.clear()
            for kind, end, node in ((3, src, nodes[0]), (4, dst, nodes[1])):
                rates[kind, node * between.nics + end % cluster.devices * between.nics // cluster.devices] = between.nic_gb_s
        latency = inside.latency_us if near or between is None else between.latency_us
        ports = [(port, size / (rate * 1e9)) for port, rate in rates.items()]
        made.append(_Message((src, dst), lane, post, need, size, ports, latency * 1e-6))
    return made
