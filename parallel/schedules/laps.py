"""Which rows of a shard travel in which lap of a ring: parts of equal size and, for causal masks, of equal work."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.parallel.intervals import expand, groups
from distattn.parallel.layout import Layout

CHUNKS = 8  # of a shard, at most, that are cut for themselves: more runs would cost more than better balance gains


class Parts(NamedTuple):
    """Rows [start, stop) of ``owner`` travel in ``lap``; sorted by (owner, start), all rows once. All int64 [n]."""

    owner: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    lap: np.ndarray

    def cut(self, owner: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, ...]:
        """Runs of rows cut where a part ends: (index of the run, start, stop, lap) of every piece, in order."""
        span = 1 + max(int(self.stop.max(initial=0)), int(stop.max(initial=0)))
        first = np.searchsorted(self.owner * span + self.stop, owner * span + start, side="right")
        behind = np.searchsorted(self.owner * span + self.start, owner * span + stop, side="left")
        run, part = expand(first, behind)
        return run, np.maximum(start[run], self.start[part]), np.minimum(stop[run], self.stop[part]), self.lap[part]

    def most_rows(self) -> int:
        """Rows of the largest part of a shard."""
        laps = int(self.lap.max(initial=0)) + 1
        return int(np.bincount(self.owner * laps + self.lap, weights=self.stop - self.start).max(initial=0))


def lap_parts(layout: Layout, laps: int) -> Parts:
    """Cuts every shard into ``laps`` parts, one for each lap.

    Every chunk of a zigzag shard is cut for itself, since a rank sees either all rows of another rank's chunk or none: a stage
    that is balanced stays so. In a striped shard later rows are seen by fewer queries; there and back (0 1 1 0) evens that out.
    """
    rows = layout.rows_all
    piece = layout.seg_row * CHUNKS // np.maximum(rows[layout.seg_rank], 1)
    _, chunk = groups(layout.seg_rank, piece)
    owner, begin = layout.seg_rank[chunk], layout.seg_row[chunk]
    following = np.append(begin[1:], 0)[: len(begin)]
    ends = np.where(following > 0, following, rows[owner])
    number = np.arange(len(owner)) - np.searchsorted(owner, owner)
    cuts = laps if layout.step == 1 else 2 * laps
    part = np.arange(cuts)
    edges = begin[:, None] + (ends - begin)[:, None] * np.arange(cuts + 1) // cuts
    turn = (number[:, None] * cuts + part) % (2 * laps)
    lap = np.where(turn < laps, turn, 2 * laps - 1 - turn)
    parts = Parts(*(c.ravel() for c in (np.broadcast_to(owner[:, None], lap.shape), edges[:, :-1], edges[:, 1:], lap)))
    return _joined(Parts(*(column[parts.start < parts.stop] for column in parts)))


def _joined(parts: Parts) -> Parts:
    """Neighbouring parts of the same lap as one."""
    first = np.ones(len(parts.owner), dtype=bool)
    first[1:] = (parts.owner[1:] != parts.owner[:-1]) | (parts.lap[1:] != parts.lap[:-1])
    begin = np.flatnonzero(first)
    last = np.append(begin[1:], len(first))[: len(begin)] - 1
    return Parts(parts.owner[begin], parts.start[begin], parts.stop[last], parts.lap[begin])
