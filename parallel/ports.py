"""Ports: what messages meet at on their way, and in which order they get through.

A message occupies every port on its way for its bytes over the port's bandwidth, all ports at the same time, and arrives when
the last has let it through, a latency later. A port serves messages in the order of the boundaries at which they were posted,
and within a boundary in the order in which both ends are ready; nothing is dropped, split or overtaken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.parallel.cluster import Cluster
from distattn.parallel.workload import Messages


@dataclass(frozen=True)
class _Kind:
    """One kind of port, for the messages that have one on their way; sorted by boundary.

    Attributes:
        begin: int64 [b + 1], boundary i has entries [begin[i], begin[i + 1]).
        message: int64, which message it is of those posted at its boundary.
        port, seconds: where it goes through, and for how long.
        crowded: by boundary, whether two messages meet at one port.
        free: float64 by port, when what was posted so far has left it.
    """

    begin: np.ndarray
    message: np.ndarray
    port: np.ndarray
    seconds: np.ndarray
    crowded: np.ndarray
    free: np.ndarray


class Ports:
    """The ports of a cluster, for the messages of one workload. Kinds: out of and into a device, of a node, of a rail."""

    def __init__(self, cluster: Cluster, messages: Messages, boundaries: np.ndarray):
        """
        Args:
            boundaries: int64 [b + 1]; messages [boundaries[i], boundaries[i + 1]) are posted at boundary i.
        """
        src, dst, devices = messages.src, messages.dst, cluster.devices
        self.same_node = src // devices == dst // devices
        inside, between = cluster.inside, cluster.between
        self.latency = np.full(len(src), inside.latency_us * 1e-6)
        size, everywhere = messages.size.astype(np.float64), np.ones(len(src), dtype=bool)
        uses_port = everywhere if between is not None and between.through_port else self.same_node
        ways = [(end, uses_port, inside.port_gb_s) for end in (src, dst)]
        if inside.shared_gb_s is not None:
            ways.append((src // devices, self.same_node, inside.shared_gb_s))
        if between is not None:
            self.latency[~self.same_node] = between.latency_us * 1e-6
            for end in (src, dst):
                rail = end // devices * between.nics + end % devices * between.nics // devices
                ways.append((rail, ~self.same_node, between.nic_gb_s))
        self._kinds = [self._kind(*way, size, boundaries) for way in ways if way[1].any()]

    @staticmethod
    def _kind(port: np.ndarray, used: np.ndarray, gb_s: float, size: np.ndarray, boundaries: np.ndarray) -> _Kind:
        index = np.flatnonzero(used)
        port, count = port[index], len(boundaries) - 1
        begin = np.searchsorted(index, boundaries)
        boundary = np.repeat(np.arange(count), np.diff(begin))
        span = int(port.max()) + 1
        meeting = np.bincount(boundary * span + port, minlength=count * span).reshape(count, span).max(axis=1)
        return _Kind(begin, index - boundaries[boundary], port, size[index] / (gb_s * 1e9), meeting > 1, np.zeros(span))

    def send(self, boundary: int, messages: slice, start: np.ndarray) -> np.ndarray:
        """When the messages of a boundary arrive, of which each could begin at ``start``; float64 [n]."""
        arrival = start.copy()
        for kind in self._kinds:
            here = slice(kind.begin[boundary], kind.begin[boundary + 1])
            if here.start == here.stop:
                continue
            message, port = kind.message[here], kind.port[here]
            serve = _in_turns if kind.crowded[boundary] else _alone
            left = serve(port, start[message], kind.seconds[here], kind.free)
            arrival[message] = np.maximum(arrival[message], left)
        return arrival + self.latency[messages]


def _alone(port: np.ndarray, start: np.ndarray, seconds: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Every message has its port for itself."""
    left = np.maximum(start, free[port]) + seconds
    free[port] = left
    return left


def _in_turns(port: np.ndarray, start: np.ndarray, seconds: np.ndarray, free: np.ndarray) -> np.ndarray:
    """First come, first served at each port: left = max(left of the one before, start) + seconds, for all ports at once."""
    order = np.lexsort((np.round(start, 10), port))  # seconds; what rounding alone makes early is not served first
    port, seconds = port[order], seconds[order]
    start = np.maximum(start[order], free[port])
    first = np.flatnonzero(np.concatenate([[True], port[1:] != port[:-1]]))
    count = np.diff(np.append(first, len(port)))
    row = np.repeat(np.arange(len(first)), count)
    column = np.arange(len(port)) - np.repeat(first, count)
    starts, spans = np.full((len(first), count.max()), -np.inf), np.zeros((len(first), count.max()))
    starts[row, column], spans[row, column] = start, seconds
    served = np.cumsum(spans, axis=1)
    left = served + np.maximum.accumulate(starts - (served - spans), axis=1)
    free[port[first]] = left[np.arange(len(first)), count - 1]
    result = np.empty(len(port))
    result[order] = left[row, column]
    return result
