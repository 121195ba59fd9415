"""Cells: what a mask asks of each run of rows on each rank, document by document, in closed form.

A *group* is a connected part of the mask: the bands whose queries or keys have positions in common, a packed document in most
masks. A *cell* is the rows of one group in one segment of one rank. In a *plain* group, one band without a lower limit, row i
sees the first ``seen(i) = min(keys, i - first + lead)`` keys of the group (causal, full), and its rows can also be cut by keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distattn.kernels.bands import HI, INF, K0, K1, LO, Q0, Q1, areas, clip
from distattn.parallel.intervals import expand
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask


@dataclass(frozen=True)
class Groups:
    """Connected parts of a mask, by rising position; int64 columns [groups]."""

    first: np.ndarray  # query positions [first, stop)
    stop: np.ndarray
    k0: np.ndarray  # the first key
    keys: np.ndarray  # keys of the group, as one run
    lead: np.ndarray  # keys that row `first` of a plain group sees
    plain: np.ndarray  # bool
    table: np.ndarray  # the bands, int64 [bands, 6], sorted by group
    ptr: np.ndarray  # int64 [groups + 1], bands of a group

    @classmethod
    def of(cls, mask: Mask) -> Groups:
        """The groups of a mask."""
        table = mask.bands.table
        begin = np.minimum(table[:, Q0], table[:, K0])
        order = np.argsort(begin, kind="stable")
        table, begin = table[order], begin[order]
        reach = np.maximum.accumulate(np.maximum(table[:, Q1], table[:, K1])) if len(table) else begin
        new = np.ones(len(table), dtype=bool)
        new[1:] = begin[1:] >= reach[:-1]
        ptr = np.append(np.flatnonzero(new), len(table)).astype(np.int64)
        at = ptr[:-1]
        if not len(at):
            none = np.zeros(0, dtype=np.int64)
            return cls(none, none, none, none, none, none.astype(bool), table, ptr)
        first, k0 = np.minimum.reduceat(table[:, Q0], at), np.minimum.reduceat(table[:, K0], at)
        stop, k1 = np.maximum.reduceat(table[:, Q1], at), np.maximum.reduceat(table[:, K1], at)
        plain = (np.diff(ptr) == 1) & (table[at, LO] <= -INF)
        hi = table[at, HI]
        lead = np.where(hi >= INF, k1 - k0, first + np.minimum(hi, k1) + 1 - k0)
        return cls(first, stop, k0, k1 - k0, lead, plain, table, ptr)

    def __len__(self) -> int:
        return len(self.first)

    def work_before(self, group: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Visible pairs of the rows of ``group`` before ``position``, int64 [n]."""
        rows = np.clip(position, self.first[group], self.stop[group]) - self.first[group]
        keys, lead = self.keys[group], self.lead[group]
        rising = np.clip(keys - lead, 0, rows)
        work = rising * lead + rising * (rising - 1) // 2 + (rows - rising) * keys
        mixed = np.flatnonzero(~self.plain[group])
        if len(mixed):
            which, band = expand(self.ptr[group[mixed]], self.ptr[group[mixed] + 1])
            part = areas(clip(self.table[band], -INF, position[mixed][which], -INF, INF))
            sums = np.concatenate([[0], np.cumsum(part)])
            ends = np.cumsum(np.bincount(which, minlength=len(mixed)))
            work[mixed] = np.diff(sums[np.concatenate([[0], ends])])
        return work

    @cached_property
    def _bands(self) -> list[list[int]]:
        return [[int(x) for x in row] for row in self.table]

    def rows_work(self, group: int, start: int, stop: int) -> int:
        """Visible pairs of the rows [start, stop) of ``group``, for single rows ranges: no arrays."""
        begin, end = int(self.ptr[group]), int(self.ptr[group + 1])
        work = 0
        for q0, q1, k0, k1, lo, hi in self._bands[begin:end]:
            work += _band_rows(max(q0, start), min(q1, stop), k0, k1, lo, hi)
        return work


def _band_rows(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int) -> int:
    """Pairs of one band."""
    if q0 >= q1:
        return 0
    n, m = q1 - q0, k1 - k0

    def below(limit: int) -> int:  # pairs with j - i <= limit
        t = min(max(limit + q0 - k0, -n), m)
        return _capped_sum(n + t, m) - _capped_sum(t, m)

    return below(hi) - below(lo - 1)


def _capped_sum(z: int, m: int) -> int:
    """Sum of min(u, m) for u in 1 .. z."""
    low = min(max(z, 0), m)
    return low * (low + 1) // 2 + (max(z, m) - m) * m


@dataclass(frozen=True)
class Cells:
    """Rows [first, stop) (positions) of one group on one rank; int64 columns [cells], sorted by (rank, row)."""

    rank: np.ndarray
    group: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    row: np.ndarray  # of the shard of `rank`, where `first` stands
    work: np.ndarray  # visible pairs

    @classmethod
    def of(cls, layout: Layout, groups: Groups) -> Cells:
        """Every meeting of a group with a segment of ``layout``, whose segments have runs of neighbouring positions."""
        order = np.argsort(layout.seg_start, kind="stable")
        start = layout.seg_start[order]
        stop = start + layout.seg_count[order]
        # Neither segments nor groups overlap among themselves, so both ends rise.
        group, place = expand(np.searchsorted(stop, groups.first, side="right"), np.searchsorted(start, groups.stop, side="left"))
        segment = order[place]
        first, last = np.maximum(groups.first[group], start[place]), np.minimum(groups.stop[group], stop[place])
        rank, row = layout.seg_rank[segment], layout.seg_row[segment] + first - start[place]
        by_rank = np.lexsort((row, rank))
        rank, row, group, first, last = (column[by_rank] for column in (rank, row, group, first, last))
        work = groups.work_before(group, last) - groups.work_before(group, first)
        return cls(rank, group, first, last, row, work)

    def __len__(self) -> int:
        return len(self.rank)

    def load(self, world: int, work: np.ndarray) -> np.ndarray:
        """Sums of ``work`` of the cells over each rank, int64 [world]."""
        sums = np.concatenate([[0], np.cumsum(work)])
        return np.diff(sums[np.searchsorted(self.rank, np.arange(world + 1))])
