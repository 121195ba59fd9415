"""Sets of rows as keyed intervals: vectorised union, difference and common cuts on int64 columns.

An interval set is three arrays (key, start, stop), rows [start, stop) of the thing that ``key`` names (a rank's copy of an
owner's keys, say). All costs are n log n in the number of intervals; nothing here touches single rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Intervals(NamedTuple):
    """Rows [start, stop) of ``key``; all int64 [n]."""

    key: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Number of rows of each interval."""
        return self.stop - self.start


def _linear(*sets: Intervals) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """One axis on which keys do not touch: key * span + row."""
    span = 1 + max((int(s.stop.max()) for s in sets if len(s.stop)), default=0) + 1
    return span, [(s.key * span + s.start, s.key * span + s.stop) for s in sets]


def _from_linear(span: int, start: np.ndarray, stop: np.ndarray) -> Intervals:
    key = start // span
    return Intervals(key, start - key * span, stop - key * span)


def union(a: Intervals) -> Intervals:
    """The same rows as disjoint, maximal intervals sorted by (key, start)."""
    span, [(start, stop)] = _linear(a)
    keep = start < stop
    start, stop = start[keep], stop[keep]
    order = np.argsort(start, kind="stable")
    start, stop = start[order], np.maximum.accumulate(stop[order]) if len(order) else stop[order]
    first = np.ones(len(start), dtype=bool)
    first[1:] = start[1:] > stop[:-1]
    last = np.roll(first, -1) if len(first) else first
    return _from_linear(span, start[first], stop[last])


def subtract(a: Intervals, b: Intervals) -> Intervals:
    """Rows of ``a`` that are not in ``b``, as disjoint intervals sorted by (key, start)."""
    span, [(a0, a1), (b0, b1)] = _linear(a, b)
    at = np.concatenate([a0, a1, b0, b1])
    in_a = np.concatenate([np.ones_like(a0), -np.ones_like(a1), np.zeros_like(b0), np.zeros_like(b1)])
    in_b = np.concatenate([np.zeros_like(a0), np.zeros_like(a1), np.ones_like(b0), -np.ones_like(b1)])
    order = np.argsort(at, kind="stable")
    at, in_a, in_b = at[order], np.cumsum(in_a[order]), np.cumsum(in_b[order])
    hit = np.flatnonzero((in_a[:-1] > 0) & (in_b[:-1] == 0) & (at[1:] > at[:-1])) if len(at) else np.zeros(0, np.int64)
    return union(_from_linear(span, at[hit], at[hit + 1]))


def cut(*sets: Intervals) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cuts all sets at each other's ends, per key, so that any two pieces are equal or disjoint.

    Returns for each set (index, start, stop): piece ``p`` is rows [start[p], stop[p]) of interval ``index[p]`` of that set.
    """
    span, linear = _linear(*sets)
    ends = np.unique(np.concatenate([x for pair in linear for x in pair])) if linear else np.zeros(0, np.int64)
    pieces = []
    for start, stop in linear:
        lo, hi = np.searchsorted(ends, start), np.searchsorted(ends, np.maximum(start, stop))
        index, cell = expand(lo, hi)
        key = start[index] // span
        pieces.append((index, ends[cell] - key * span, ends[cell + 1] - key * span))
    return pieces


def expand(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [lo[i], hi[i]): (i, integer) as two int64 arrays, in order."""
    count = np.maximum(hi - lo, 0)
    index = np.repeat(np.arange(len(lo)), count)
    offset = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    return index, lo[index] + offset


def groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers equal tuples of the columns: (group number of each row, index of the first row of each group), in sorted order."""
    if not len(columns[0]):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key, size = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:  # one key to sort by is several times faster than a lexicographic sort
        low, span = int(column.min()), int(column.max()) - int(column.min()) + 1
        size *= span
        assert size < 1 << 62, "too many different tuples to number"
        key = key * span + (column - low)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return number, order[new]
