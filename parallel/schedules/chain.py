"""How far the rows of every rank travel down a ring, from where a mask's bands lie: the pruning of ring schedules.

No pair of shards is localised for that: for each segment it is enough to know which rank, counted from the far end of the
ring, is the last that holds a row on the other side of a band. The cost is that of the segments, times the ranks at the far
end that turn out to need nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import HI, K0, K1, LO, Q0, Q1
from distattn.parallel.intervals import Intervals, cut, expand, groups
from distattn.parallel.layout import Layout

GRAIN = 128  # rows: a shorter gap is sent along, since a run costs a copy and a row of a kernel's table on every hop
_AT_ONCE = 1 << 18  # pieces of segments looked at together: bounds memory to some 100 MB


class Runs(NamedTuple):
    """What travels: rows [start, stop) of ``owner`` go from rank owner + hop - 1 to rank owner + hop. All int64 [n]."""

    owner: np.ndarray
    hop: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def chain_runs(keys: np.ndarray, layout: Layout, grain: int = GRAIN) -> Runs:
    """What travels on each hop of a ring that is pruned: maximal runs of the rows that this hop or a later one needs.

    Args:
        keys: bands in global positions whose key side travels; exchange the sides (``Bands.transpose``) for queries.
        grain: rows; runs of a hop that lie closer together travel as one, and what is needed of a segment but for fewer rows
            at an end travels whole.

    Inside a segment all rows between two that a rank needs count as needed. Sorted by (owner, hop, start).
    """
    nothing = (np.zeros(0, dtype=np.int64),) * 4
    needs = [nothing, *_needs(keys, layout, grain)] if len(keys) else [nothing]
    runs = _maximal_runs(*(np.concatenate(column) for column in zip(*needs, strict=True)))
    if not len(runs.owner):
        return runs
    apart = np.ones(len(runs.owner), dtype=bool)
    apart[1:] = (runs.owner[1:] != runs.owner[:-1]) | (runs.hop[1:] != runs.hop[:-1])
    apart[1:] |= runs.start[1:] - runs.stop[:-1] >= max(grain, 1)
    first = np.flatnonzero(apart)
    last = np.append(first[1:], len(apart)) - 1
    return Runs(runs.owner[first], runs.hop[first], runs.start[first], runs.stop[last])


def _needs(keys: np.ndarray, layout: Layout, grain: int) -> Iterator[tuple[np.ndarray, ...]]:
    """(owner, hop, start, stop) of rows that the rank ``hop`` places after ``owner`` needs; less what a later hop covers."""
    n_bands, world = len(keys), layout.world
    at_once = max(1, _AT_ONCE // n_bands)
    for begin in range(0, world, at_once):
        ranks = np.arange(begin, min(begin + at_once, world))
        first, stop = layout.segments_meeting(ranks[:, None], keys[:, K0], keys[:, K1])
        piece, segment = expand(first.ravel(), stop.ravel())
        band = keys[piece % n_bands]
        k_first, k_stop = _rows_within(layout, segment, band[:, K0], band[:, K1])
        some = k_first < k_stop
        segment, band, k_first, k_stop = segment[some], band[some], k_first[some], k_stop[some]
        owner = layout.seg_rank[segment]
        for hop in range(world - 1, 0, -1):
            if not len(segment):
                break
            start, stop = _needed_by((owner + hop) % world, layout, segment, band, k_first, k_stop)
            hit = start < stop
            start = np.where(start - k_first < grain, np.minimum(start, k_first), start)
            stop = np.where(k_stop - stop < grain, np.maximum(stop, k_stop), stop)
            yield owner[hit], np.full(int(hit.sum()), hop), start[hit], stop[hit]
            left = (start > k_first) | (stop < k_stop) | ~hit
            segment, band, k_first, k_stop, owner = (x[left] for x in (segment, band, k_first, k_stop, owner))


def _rows_within(layout: Layout, segment: np.ndarray, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the shard that a segment has among the positions [first, stop), as [start, stop)."""
    begin, count, row, step = layout.seg_start[segment], layout.seg_count[segment], layout.seg_row[segment], layout.step
    return row + np.clip(-((begin - first) // step), 0, count), row + np.clip(-((begin - stop) // step), 0, count)


def _needed_by(
    rank: np.ndarray, layout: Layout, segment: np.ndarray, band: np.ndarray, k_first: np.ndarray, k_stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [start, stop) of each segment, among [k_first, k_stop), between the first and last that ``rank`` sees in its band."""
    begin, row, step = layout.seg_start[segment], layout.seg_row[segment], layout.step
    first_key, last_key = begin + (k_first - row) * step, begin + (k_stop - 1 - row) * step
    q_first = np.maximum(band[:, Q0], first_key - band[:, HI])
    q_stop = np.minimum(band[:, Q1], last_key - band[:, LO] + 1)
    low, high = layout.first_and_last(rank, q_first, q_stop)
    start, stop = _rows_within(layout, segment, low + band[:, LO], high + band[:, HI] + 1)
    return np.maximum(start, k_first), np.where(low <= high, np.minimum(stop, k_stop), 0)


def _maximal_runs(owner: np.ndarray, hop: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Runs:
    wanted = Intervals(owner, start, stop)
    [(index, start, stop)] = cut(wanted)
    number, first = groups(wanted.key[index], start)
    last_hop = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(last_hop, number, hop[index])
    key, start, stop = wanted.key[index][first], start[first], stop[first]
    touches = np.zeros(len(first) + 1, dtype=bool)  # touches[c]: cell c begins where cell c - 1 of the same owner ends
    touches[1:-1] = (key[1:] == key[:-1]) & (start[1:] == stop[:-1])
    before = np.where(touches[:-1], np.concatenate([[0], last_hop])[:-1], 0)
    after = np.where(touches[1:], np.concatenate([last_hop, [0]])[1:], 0)
    opening, t = expand(before + 1, last_hop + 1)
    closing, t_closing = expand(after + 1, last_hop + 1)
    opened, closed = np.lexsort((opening, t, key[opening])), np.lexsort((closing, t_closing, key[closing]))
    opening, closing = opening[opened], closing[closed]
    return Runs(key[opening], t[opened], start[opening], stop[closing])
