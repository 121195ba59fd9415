"""The part of a mask that falls on pairs of shards, in the rows of the shards: where every schedule begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import HI, K0, K1, LO, Q0, Q1, localize, shift
from distattn.parallel.intervals import Intervals, union
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask

_AT_ONCE = 1 << 18  # rows of an intermediate table: bounds memory to some 100 MB; more is slower, not faster


class LocalBands(NamedTuple):
    """Bands of many (query rank, key rank) pairs, sorted by pair."""

    table: np.ndarray  # int64 [n, 6], columns of Band, rows of the whole shard of the query rank and of the key rank
    pair: np.ndarray  # int64 [n], index of the pair that each band belongs to


class _Touched(NamedTuple):
    """Query segments that bands meet, and the keys that such a piece can see: one row a (rank, band, segment)."""

    ptr: np.ndarray  # [ranks + 1]
    band: np.ndarray
    segment: np.ndarray
    key_first: np.ndarray
    key_stop: np.ndarray


def local_bands(mask: Mask, layout: Layout, q_rank: np.ndarray | int, kv_rank: np.ndarray | int) -> LocalBands:
    """What the queries of ``q_rank[p]`` see of the keys of ``kv_rank[p]``, for all pairs p.

    Every band returned lies in one segment of either shard. The cost is that of the meetings of bands with segments of
    the query ranks, times the key ranks asked for each, plus the bands returned.

    Args:
        q_rank, kv_rank: int64 [pairs], or what broadcasts to it.
    """
    if mask.n_tokens != layout.n_valid:
        raise ValueError(
            f"{mask!r} was asked for on {layout!r}, which holds {layout.n_valid} tokens. Make both for one length; "
            "padding belongs to the layout only."
        )
    q_rank, kv_rank = np.broadcast_arrays(np.atleast_1d(q_rank), np.atleast_1d(kv_rank))
    for ranks in (q_rank, kv_rank):
        assert ranks.size == 0 or (ranks.min() >= 0 and ranks.max() < layout.world)
    asked, asked_index = np.unique(q_rank, return_inverse=True)
    tables, pairs = [np.empty((0, 6), dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    by_query = np.argsort(asked_index, kind="stable")
    n_pairs = np.searchsorted(asked_index[by_query], np.arange(len(asked) + 1))
    at_once = max(1, _AT_ONCE // max(1, len(mask.bands)))
    for begin in range(0, len(asked), at_once):
        touched = _touched(mask.bands.table, layout, asked[begin : begin + at_once])
        mine = by_query[n_pairs[begin] : n_pairs[min(begin + at_once, len(asked))]]
        for table, pair in _meet(mask.bands.table, layout, touched, asked_index[mine] - begin, kv_rank[mine]):
            tables.append(table)
            pairs.append(mine[pair])
    table, pair = np.concatenate(tables), np.concatenate(pairs)
    if (pair[1:] < pair[:-1]).any():
        order = np.argsort(pair, kind="stable")
        table, pair = table[order], pair[order]
    return LocalBands(table, pair)


def seen_positions(mask: Mask, layout: Layout, ranks: np.ndarray) -> Intervals:
    """Positions of the keys that queries of each rank see, as runs; the key of a run is the index of the rank.

    What a segment sees of a window that is narrower than the layout's step has gaps, and is left out.
    """
    table = mask.bands.table
    touched = _touched(table, layout, ranks)
    gaps = (table[:, HI] - table[:, LO] + 1 < layout.step)[touched.band]
    rank = np.repeat(np.arange(len(ranks)), np.diff(touched.ptr))
    return union(Intervals(rank[~gaps], touched.key_first[~gaps], touched.key_stop[~gaps]))


def _touched(table: np.ndarray, layout: Layout, ranks: np.ndarray) -> _Touched:
    first, stop = layout.segments_meeting(ranks[:, None], table[:, Q0], table[:, Q1])  # [ranks, bands]
    owner, segment = _expand(first.ravel(), stop.ravel())
    band = owner % max(1, len(table))
    b, begin, step = table[band], layout.seg_start[segment], layout.step
    q_first = begin + np.maximum(0, -((begin - b[:, Q0]) // step)) * step
    q_last = begin + np.minimum(layout.seg_count[segment] - 1, (b[:, Q1] - 1 - begin) // step) * step
    some = q_first <= q_last  # a long stride can step over a band
    rank, band, segment, b = owner[some] // max(1, len(table)), band[some], segment[some], b[some]
    key_first = np.maximum(b[:, K0], q_first[some] + b[:, LO])
    key_stop = np.minimum(b[:, K1], q_last[some] + b[:, HI] + 1)
    return _Touched(np.searchsorted(rank, np.arange(len(ranks) + 1)), band, segment, key_first, key_stop)


def _meet(
    table: np.ndarray, layout: Layout, touched: _Touched, q_index: np.ndarray, kv_rank: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (local table, pair [n]) for pairs of an index into ``touched`` and a key rank, a bounded piece at a time."""
    begin, stop = touched.ptr[q_index], touched.ptr[q_index + 1]
    for pairs in _pieces(stop - begin):
        pair, piece = _expand(begin[pairs], stop[pairs])
        pair += pairs.start
        first, last = layout.segments_meeting(kv_rank[pair], touched.key_first[piece], touched.key_stop[piece])
        for rows in _pieces(last - first):
            row, kv_segment = _expand(first[rows], last[rows])
            row += rows.start
            key_first = touched.key_first[piece[row]]
            ahead = key_first - layout.seg_start[kv_segment]
            next_key = key_first + np.where(ahead > 0, -ahead % layout.step, -ahead)
            some = next_key < touched.key_stop[piece[row]]
            row, kv_segment = row[some], kv_segment[some]
            local, seen = _in_rows(table[touched.band[piece[row]]], layout, touched.segment[piece[row]], kv_segment)
            yield local, pair[row[seen]]


def _in_rows(table: np.ndarray, layout: Layout, q_segment: np.ndarray, kv_segment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each band on its own pair of segments, in rows of the shards; those that see something, and which these are."""
    start, count, row = layout.seg_start, layout.seg_count, layout.seg_row
    local = localize(table, start[q_segment], count[q_segment], start[kv_segment], count[kv_segment], layout.step)
    seen = np.flatnonzero(local[:, Q0] < local[:, Q1])
    return shift(local[seen], row[q_segment[seen]], row[kv_segment[seen]]), seen


def _expand(first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All items of the ranges [first, stop), with the index of the range that each comes from."""
    counts = stop - first
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) + np.repeat(first - (np.cumsum(counts) - counts), counts)


def _pieces(counts: np.ndarray) -> list[slice]:
    """Consecutive slices of about ``_AT_ONCE`` items each, for entries that have ``counts`` items."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(_AT_ONCE, total, _AT_ONCE), side="left") + 1
    edges = np.unique(np.concatenate([[0], cuts, [len(counts)]])).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
