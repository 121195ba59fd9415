"""Assignment: which server computes which queries against which keys, and what that asks of every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas, clip
from distattn.parallel.cells import Groups
from distattn.parallel.intervals import Intervals, expand, subtract, union
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask

KV, FINISHED, PARTIAL = range(3)


@dataclass(frozen=True)
class Assignment:
    """Pieces that together cover every visible pair once; int64 columns, sorted by (server, owner, row, key).

    Args:
        server: the rank that computes.
        owner: the rank that holds the queries.
        q_start, q_stop: rows of the owner's shard.
        k_first, k_stop: global positions of the keys; from 0, to n_tokens where no key before, after is left to another piece.
    """

    server: np.ndarray
    owner: np.ndarray
    q_start: np.ndarray
    q_stop: np.ndarray
    k_first: np.ndarray
    k_stop: np.ndarray

    def __len__(self) -> int:
        return len(self.server)

    def runs(self, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The queries of the pieces as runs of neighbouring global positions: (piece, first, stop), int64 [n]."""
        assert layout.step == 1 or (layout.seg_count <= 1).all(), "shards with a step have no runs of neighbouring positions"
        base = layout.row_ptr[layout.seg_rank] + layout.seg_row
        begin, end = layout.row_ptr[self.owner] + self.q_start, layout.row_ptr[self.owner] + self.q_stop
        piece, segment = expand(
            np.searchsorted(base + layout.seg_count, begin, side="right"), np.searchsorted(base, end, side="left")
        )
        first = np.maximum(begin[piece], base[segment])
        stop = np.minimum(end[piece], base[segment] + layout.seg_count[segment])
        offset = layout.seg_start[segment] - base[segment]
        return piece, first + offset, stop + offset


class Flows(NamedTuple):
    """Rows that travel from ``src`` to ``dst``; int64 [n]. Of queries the result comes back the same way."""

    src: np.ndarray
    dst: np.ndarray
    kind: np.ndarray  # KV, FINISHED (queries whose output is whole there) or PARTIAL (queries that are split by keys)
    rows: np.ndarray


@dataclass(frozen=True)
class Load:
    """What an assignment asks of each rank, exact."""

    work: np.ndarray  # visible pairs, int64 [world]
    flows: Flows
    smallest: int  # fewest rows of a document in a piece that leaves other rows of it, on the same rank, to others; 0: none does

    @classmethod
    def of(cls, assignment: Assignment, layout: Layout, mask: Mask) -> Load:
        """The load of an assignment to the ranks of ``layout``."""
        piece, first, stop = assignment.runs(layout)
        table = mask.bands.table[np.argsort(mask.bands.table[:, Q0], kind="stable")]
        reach = np.maximum.accumulate(table[:, Q1])
        run, band = expand(np.searchsorted(reach, first, side="right"), np.searchsorted(table[:, Q0], stop, side="left"))
        own = piece[run]
        bands = clip(table[band], first[run], stop[run], assignment.k_first[own], assignment.k_stop[own])
        work = np.zeros(layout.world, dtype=np.int64)
        np.add.at(work, assignment.server[own], areas(bands))
        some = bands[:, Q0] < bands[:, Q1]
        keys = _foreign_keys(assignment.server[own[some]], bands[some], layout)
        flows = Flows(*(np.concatenate(columns) for columns in zip(keys, _queries(assignment, layout), strict=True)))
        return cls(work, flows, _smallest(piece, first, stop, layout, mask))

    def received(self, kv_row: int, query_row: int, partial_row: int) -> np.ndarray:
        """Weight of what each rank receives as a server, results of queries included; int64 [world]."""
        weight = np.array([kv_row, query_row, partial_row])[self.flows.kind] * self.flows.rows
        total = np.zeros(len(self.work), dtype=np.int64)
        np.add.at(total, self.flows.dst, weight)
        return total

    def rows(self, kind: int) -> int:
        """Rows of one kind that travel."""
        return int(self.flows.rows[self.flows.kind == kind].sum())


def _foreign_keys(server: np.ndarray, bands: np.ndarray, layout: Layout) -> Flows:
    own = Intervals(layout.seg_rank, layout.seg_start, layout.seg_start + layout.seg_count)
    foreign = subtract(union(Intervals(server, bands[:, K0], bands[:, K1])), own)
    order = np.argsort(layout.seg_start, kind="stable")
    start = layout.seg_start[order]
    stop = start + layout.seg_count[order]
    index, place = expand(np.searchsorted(stop, foreign.start, side="right"), np.searchsorted(start, foreign.stop, side="left"))
    rows = np.minimum(stop[place], foreign.stop[index]) - np.maximum(start[place], foreign.start[index])
    return Flows(layout.seg_rank[order[place]], foreign.key[index], np.full_like(rows, KV), rows)


def _queries(a: Assignment, layout: Layout) -> Flows:
    world, away = layout.world, a.server != a.owner
    whole = (a.k_first <= 0) & (a.k_stop >= layout.n_tokens)
    parts = []
    for kind, chosen in ((FINISHED, away & whole), (PARTIAL, away & ~whole)):
        rows = union(Intervals((a.owner * world + a.server)[chosen], a.q_start[chosen], a.q_stop[chosen]))
        parts.append(Flows(rows.key // world, rows.key % world, np.full_like(rows.key, kind), rows.rows))
    return Flows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _smallest(piece: np.ndarray, first: np.ndarray, stop: np.ndarray, layout: Layout, mask: Mask) -> int:
    groups = Groups.of(mask)
    run, group = expand(np.searchsorted(groups.stop, first, side="right"), np.searchsorted(groups.first, stop, side="left"))
    begin, end = np.maximum(first[run], groups.first[group]), np.minimum(stop[run], groups.stop[group])
    order = np.argsort(layout.seg_start, kind="stable")
    segment = order[np.searchsorted(layout.seg_start[order], begin, side="right") - 1]
    seg_first = layout.seg_start[segment]
    seg_stop = seg_first + layout.seg_count[segment]
    held = np.minimum(seg_stop, groups.stop[group]) - np.maximum(seg_first, groups.first[group])
    parts = (end - begin)[end - begin < held]
    return int(parts.min()) if len(parts) else 0
