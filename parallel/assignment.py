"""Assignment: which server computes which rows of whose queries against which keys, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas, clip
from distattn.parallel.cells import Groups
from distattn.parallel.intervals import Intervals, expand, subtract, union
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask


@dataclass(frozen=True)
class Assignment:
    """Pieces of core attention that together cover every visible pair once; int64 columns, sorted by (server, owner, row).

    Args:
        server: the rank that computes.
        owner: the rank that holds the queries.
        q_start, q_stop: rows of the owner's shard.
        k_first, k_stop: global positions of the keys; 0 and n_tokens where the rows are whole.
    """

    server: np.ndarray
    owner: np.ndarray
    q_start: np.ndarray
    q_stop: np.ndarray
    k_first: np.ndarray
    k_stop: np.ndarray

    def __len__(self) -> int:
        return len(self.server)


@dataclass(frozen=True)
class Load:
    """What an assignment asks of each rank, exact; int64 [world]."""

    work: np.ndarray  # visible pairs
    kv_rows: np.ndarray  # rows of keys and values received, each once
    q_rows: np.ndarray  # query rows received
    partial_rows: np.ndarray  # of these, rows that are not finished there: their state goes home in float32
    smallest: int  # rows of the smallest piece that is not all that its owner holds of a document; 0: none was cut

    @classmethod
    def of(cls, assignment: Assignment, layout: Layout, mask: Mask) -> Load:
        """The loads of an assignment.

        Raises:
            AssertionError: the layout has a step.
        """
        world = layout.world
        bands = _Placed.of(assignment, layout, mask)
        work = np.zeros(world, dtype=np.int64)
        np.add.at(work, assignment.server[bands.piece], areas(bands.table))
        table, server = bands.table, assignment.server[bands.piece]
        keys = union(Intervals(server, table[:, K0], table[:, K1]))
        own = Intervals(layout.seg_rank, layout.seg_start, layout.seg_start + layout.seg_count)
        foreign = subtract(keys, own)
        kv_rows = _sum(foreign.key, foreign.rows, world)
        away = assignment.server != assignment.owner
        whole = (assignment.k_first <= 0) & (assignment.k_stop >= layout.n_tokens)
        q_rows = cls._rows(assignment, away, world)
        partial = cls._rows(assignment, away & ~whole, world)
        return cls(work, kv_rows, q_rows, partial, bands.smallest(assignment, layout, mask))

    @staticmethod
    def _rows(a: Assignment, chosen: np.ndarray, world: int) -> np.ndarray:
        rows = union(Intervals((a.server * world + a.owner)[chosen], a.q_start[chosen], a.q_stop[chosen]))
        return _sum(rows.key // world, rows.rows, world)


def _sum(key: np.ndarray, rows: np.ndarray, world: int) -> np.ndarray:
    total = np.zeros(world, dtype=np.int64)
    np.add.at(total, key, rows)
    return total


@dataclass(frozen=True)
class _Placed:
    """The bands of the pieces, in global positions, and the piece of each."""

    table: np.ndarray
    piece: np.ndarray

    @classmethod
    def of(cls, a: Assignment, layout: Layout, mask: Mask) -> _Placed:
        piece, start, stop = positions(a, layout)
        table = mask.bands.table[np.argsort(mask.bands.table[:, Q0], kind="stable")]
        reach = np.maximum.accumulate(table[:, Q1]) if len(table) else table[:, Q1]
        index, band = expand(np.searchsorted(reach, start, side="right"), np.searchsorted(table[:, Q0], stop, side="left"))
        own = piece[index]
        cut_table = clip(table[band], start[index], stop[index], a.k_first[own], a.k_stop[own])
        some = cut_table[:, Q0] < cut_table[:, Q1]
        return cls(cut_table[some], own[some])

    def smallest(self, a: Assignment, layout: Layout, mask: Mask) -> int:
        """The fewest rows of one document in a piece that leaves other rows of that document to its owner or to others."""
        groups = Groups.of(mask)
        piece, start, stop = positions(a, layout)
        index, group = expand(np.searchsorted(groups.stop, start, side="right"), np.searchsorted(groups.first, stop, side="left"))
        begin, end = np.maximum(start[index], groups.first[group]), np.minimum(stop[index], groups.stop[group])
        seg = np.searchsorted(np.sort(layout.seg_start), begin, side="right") - 1
        order = np.argsort(layout.seg_start, kind="stable")[seg]
        seg_first, seg_stop = layout.seg_start[order], layout.seg_start[order] + layout.seg_count[order]
        held = np.minimum(seg_stop, groups.stop[group]) - np.maximum(seg_first, groups.first[group])
        cut_rows = (end - begin)[(end - begin) < held]
        return int(cut_rows.min(initial=1 << 60)) if len(cut_rows) else 0


def positions(a: Assignment, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of neighbouring global positions of the pieces: (piece, first, stop), int64 [n]."""
    assert layout.step == 1 or (layout.seg_count <= 1).all(), "a layout with a step has no runs of neighbouring positions"
    base = layout.row_ptr[layout.seg_rank] + layout.seg_row
    begin, end = layout.row_ptr[a.owner] + a.q_start, layout.row_ptr[a.owner] + a.q_stop
    piece, segment = expand(
        np.searchsorted(base + layout.seg_count, begin, side="right"), np.searchsorted(base, end, side="left")
    )
    first = np.maximum(begin[piece], base[segment])
    stop = np.minimum(end[piece], base[segment] + layout.seg_count[segment])
    offset = layout.seg_start[segment] - base[segment]
    return piece, first + offset, stop + offset
