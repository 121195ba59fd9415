"""Core attention disaggregation: tokens stay where they are, and pieces of attention go where there is time.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (DistCA). Which rank computes
which queries is decided by :mod:`distattn.parallel.assign`; here the decision becomes a plan. A rank does half of the work on its
own rows while the first queries and keys of others travel, then what it does for others in ``stages`` parts, each while the next
one travels, then the other half of its own while the last results go home.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas, clip, shift
from distattn.parallel.assign import assign
from distattn.parallel.assignment import Assignment
from distattn.parallel.intervals import Intervals, cut, expand, groups, union
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import DST, HOME_LANE, NEED, OWNER, POST, RANK, SRC, STAGE, START, WHAT, Plan, What, no_kept
from distattn.parallel.strategy import Balance

LANE = 1


class _Work(NamedTuple):
    """Bands in the rows of whole shards, and who does them: int64 [n, 6] and [n] each."""

    bands: np.ndarray
    server: np.ndarray
    q_owner: np.ndarray
    kv_owner: np.ndarray
    run: np.ndarray  # number of the run of queries: what one server computes of it goes home together

    def take(self, some: np.ndarray) -> _Work:
        return _Work(*(column[some] for column in self))


class _Runs(NamedTuple):
    """Rows [start, stop) of ``owner`` at ``server``, in part ``part``; all int64 [n]."""

    server: np.ndarray
    owner: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    part: np.ndarray


def disaggregate(layout: Layout, mask: Mask, assignment: Assignment, stages: int = 2) -> Plan:
    """The plan of an assignment, for all ranks.

    Volume: each foreign row that a server needs, once. A query row that one server finishes alone comes home in the output dtype;
    partial results of rows that several ranks share are merged by their owner. Memory: all foreign rows that a server receives,
    and a partial result of each foreign query.

    Args:
        layout: segments of step 1 (contiguous or zigzag); ranks without rows may serve.
        stages: parts in which a rank does what it does not do on its own rows alone.

    Raises:
        ValueError: a striped layout, or less than one part.
    """
    if not isinstance(stages, (int, np.integer)) or stages < 1:
        raise ValueError(f"disaggregate was asked for in stages = {stages!r} parts. Pass a whole number of 1 or more.")
    check_step(layout)
    work = _placed(layout, mask, assignment)
    assert areas(work.bands).sum() == mask.bands.area, "an assignment covers every visible pair exactly once"
    own = (work.server == work.q_owner) & (work.server == work.kv_owner)
    inside, across = work.take(own), work.take(~own)
    part = _parts(across, int(stages))
    last = int(stages) + 1 if len(across.run) else 0
    inside, half = _halves(inside, layout.world, last)
    tasks, task_of_band, bands = _tasks(layout, inside, half, across, part)
    queries, keys = _query_runs(across, part), _key_runs(across, part)
    finished = _finished(queries, work)
    received = np.zeros(layout.world, dtype=np.int64)
    for runs, kinds in ((queries, 2), (keys, 1)):
        np.add.at(received, runs.server, kinds * (runs.stop - runs.start))
    return Plan(
        name="disaggregate",
        direction="forward",
        layout=layout,
        mask=mask,
        stages=last + 1,
        tasks=tasks,
        band_ptr=np.concatenate([[0], np.cumsum(np.bincount(task_of_band, minlength=len(tasks)))]).astype(np.int64),
        bands=bands,
        transfers=_transfers(queries, keys, finished, int(stages)),
        kept=no_kept(),
        buffer_bound=int(received.max(initial=0)),
        quiet=int(last > 0),
        pooled=True,
    )


def balanced(layout: Layout, mask: Mask, balance: Balance, backward: bool = False) -> Assignment:
    """The assignment that a balance asks for, for the forward or the backward pass; identical on all ranks.

    Raises:
        ValueError: a limit that cannot be met; names it.
    """
    return assign(
        layout,
        mask,
        cost=balance.backward if backward else balance.forward,
        tolerance=balance.tolerance,
        receive_rows=balance.receive_rows,
        smallest=balance.smallest,
        speeds=balance.speeds,
    )


def check_step(layout: Layout) -> None:
    """Raises ValueError for a layout in which neighbouring rows are not neighbouring tokens."""
    if layout.step != 1:
        raise ValueError(
            f"disaggregate works on runs of neighbouring tokens; {layout!r} has every {layout.step}th. "
            "Use layout 'contiguous' (tokens stay where they are) or 'zigzag'."
        )


def _placed(layout: Layout, mask: Mask, assignment: Assignment) -> _Work:
    """The bands of every piece of an assignment, each inside one segment of queries and one of keys."""
    a = assignment
    piece, start, stop = a.runs(layout)
    [(index, begin, end)] = cut(Intervals(np.zeros_like(start), start, stop))  # pieces of equal rows share their runs
    order = np.argsort(begin, kind="stable")
    piece, begin, end = piece[index][order], begin[order], end[order]
    table = mask.bands.table
    band, at = expand(np.searchsorted(end, table[:, Q0], side="right"), np.searchsorted(begin, table[:, Q1], side="left"))
    bands = clip(table[band], begin[at], end[at], a.k_first[piece[at]], a.k_stop[piece[at]])
    some = bands[:, Q0] < bands[:, Q1]
    bands, at = bands[some], at[some]
    by_start = np.argsort(layout.seg_start, kind="stable")
    starts = layout.seg_start[by_start]
    first = np.searchsorted(starts + layout.seg_count[by_start], bands[:, K0], side="right")
    index, place = expand(first, np.searchsorted(starts, bands[:, K1], side="left"))
    kv_segment, at = by_start[place], at[index]
    low = layout.seg_start[kv_segment]
    bands = clip(bands[index], 0, layout.n_tokens, low, low + layout.seg_count[kv_segment])
    some = bands[:, Q0] < bands[:, Q1]
    bands, at, kv_segment = bands[some], at[some], kv_segment[some]
    q_segment = by_start[np.searchsorted(starts, begin[at], side="right") - 1]
    to_row = layout.seg_row - layout.seg_start
    rows = shift(bands, to_row[q_segment], to_row[kv_segment])
    return _Work(rows, a.server[piece[at]], a.owner[piece[at]], layout.seg_rank[kv_segment], begin[at])


def _parts(across: _Work, stages: int) -> np.ndarray:
    """The part, 1 to ``stages``, in which each band is worked on: equal areas on every server, runs of queries whole."""
    number, first = groups(across.server, across.q_owner, across.run)
    area = np.bincount(number, weights=areas(across.bands), minlength=len(first))
    server = across.server[first]
    before = np.cumsum(area) - area
    begin = np.searchsorted(server, server, side="left")  # groups are sorted by server
    total = np.bincount(server, weights=area)[server] if len(first) else area
    middle = before - before[begin] + area / 2
    return (1 + np.minimum((middle * stages / np.maximum(total, 1)).astype(np.int64), stages - 1))[number]


def _halves(inside: _Work, world: int, last: int) -> tuple[_Work, np.ndarray]:
    """Bands of own rows cut where half of a rank's area is done; (bands, 0 for the first half and ``last`` for the second)."""
    order = np.lexsort((inside.bands[:, Q0], inside.server))
    inside = inside.take(order)
    if not last:
        return inside, np.zeros(len(order), dtype=np.int64)
    area = areas(inside.bands)
    done = np.cumsum(area)
    end_of = np.searchsorted(inside.server, np.arange(world), side="right")
    ends = np.concatenate([[0], done])[end_of]
    begins = np.concatenate([[0], ends[:-1]])
    middle = ((begins + ends) // 2)[inside.server]
    share = np.clip((middle - (done - area)) / np.maximum(area, 1), 0, 1)
    height = inside.bands[:, Q1] - inside.bands[:, Q0]
    at = inside.bands[:, Q0] + np.round(height * share).astype(np.int64)
    pieces = clip(inside.bands, 0, at, 0, 1 << 60), clip(inside.bands, at, 1 << 60, 0, 1 << 60)
    kept = [np.flatnonzero(p[:, Q0] < p[:, Q1]) for p in pieces]
    columns = [np.concatenate([column[some] for some in kept]) for column in inside[1:]]
    bands = np.concatenate([p[some] for p, some in zip(pieces, kept, strict=True)])
    return _Work(bands, *columns), np.repeat([0, last], [len(some) for some in kept])


def _tasks(
    layout: Layout, inside: _Work, half: np.ndarray, across: _Work, part: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tasks, task of each band, bands): own rows in one task a half; the rest in one task a band, on its rows alone."""
    number, first = groups(half, inside.server)
    rank, zero = inside.server[first], np.zeros_like(first)
    rows = layout.rows_all[rank]
    own = np.stack([half[first], rank, rank, zero, rows, rank, zero, rows], 1)
    b, whose = across.bands, across
    far = np.stack([part, whose.server, whose.q_owner, b[:, Q0], b[:, Q1], whose.kv_owner, b[:, K0], b[:, K1]], 1)
    tasks = np.concatenate([own, far])
    task_of_band = np.concatenate([number, len(own) + np.arange(len(far))])
    bands = np.concatenate([inside.bands, shift(b, -b[:, Q0], -b[:, K0])])
    order = np.lexsort((tasks[:, RANK], tasks[:, STAGE]))
    place = np.argsort(order, kind="stable")[task_of_band]
    by_task = np.argsort(place, kind="stable")
    return tasks[order], place[by_task], bands[by_task]


def _query_runs(across: _Work, part: np.ndarray) -> _Runs:
    """Foreign query rows that servers work on, by part."""
    foreign = across.server != across.q_owner
    w, part = across.take(foreign), part[foreign]
    number, first = groups(part, w.server, w.q_owner)
    runs = union(Intervals(number, w.bands[:, Q0], w.bands[:, Q1]))
    of = first[runs.key]
    return _Runs(w.server[of], w.q_owner[of], runs.start, runs.stop, part[of])


def _key_runs(across: _Work, part: np.ndarray) -> _Runs:
    """Foreign key rows that servers need, each in the first part that does."""
    foreign = across.server != across.kv_owner
    w, part = across.take(foreign), part[foreign]
    number, first = groups(w.server, w.kv_owner)
    [(piece, low, high)] = cut(Intervals(number, w.bands[:, K0], w.bands[:, K1]))
    cell, first_piece = groups(number[piece], low)
    earliest = np.full(len(first_piece), np.iinfo(np.int64).max)
    np.minimum.at(earliest, cell, part[piece])
    most = int(part.max(initial=0)) + 1
    at = first_piece
    runs = union(Intervals(number[piece[at]] * most + earliest, low[at], high[at]))
    of = first[runs.key // most]
    return _Runs(w.server[of], w.kv_owner[of], runs.start, runs.stop, runs.key % most)


def _finished(queries: _Runs, work: _Work) -> tuple[np.ndarray, _Runs]:
    """(whether one server alone does all of them, the runs cut where that changes)."""
    touched = Intervals(work.q_owner, work.bands[:, Q0], work.bands[:, Q1])
    (run, low, high), (band, band_low, _) = cut(Intervals(queries.owner, queries.start, queries.stop), touched)
    cell, first = groups(np.concatenate([queries.owner[run], work.q_owner[band]]), np.concatenate([low, band_low]))
    least, most = np.full(len(first), np.iinfo(np.int64).max), np.full(len(first), -1)
    np.minimum.at(least, cell[len(run) :], work.server[band])
    np.maximum.at(most, cell[len(run) :], work.server[band])
    alone = (least == most)[cell[: len(run)]]
    joined = union(Intervals(run * 2 + alone, low, high))
    of = joined.key // 2
    return joined.key % 2 == 1, _Runs(queries.server[of], queries.owner[of], joined.start, joined.stop, queries.part[of])


def _transfers(queries: _Runs, keys: _Runs, finished: tuple[np.ndarray, _Runs], stages: int) -> np.ndarray:
    alone, home = finished
    tables = []
    for runs, what in ((queries, What.Q), (keys, What.KV)):
        kind, lane = np.full_like(runs.part, what), np.full_like(runs.part, LANE)
        # Inputs are there from the beginning, and have buffers of their own: a late sender would keep its servers waiting.
        post = np.zeros_like(runs.part)
        tables.append(np.stack([runs.owner, runs.server, runs.owner, runs.start, runs.stop, kind, lane, post, runs.part], 1))
    kind, lane = np.where(alone, What.DONE, What.OUT), np.full_like(home.part, HOME_LANE)
    end = np.full_like(home.part, stages + 2)  # nothing waits for results but the end
    tables.append(np.stack([home.server, home.owner, home.owner, home.start, home.stop, kind, lane, home.part + 1, end], 1))
    table = np.concatenate(tables)
    # A rank serves those after it in turn, so that not all send to one at first.
    turn = (table[:, DST] - table[:, SRC]) % (table[:, [SRC, DST]].max(initial=0) + 1)
    return table[np.lexsort((table[:, START], table[:, OWNER], table[:, WHAT], turn, table[:, NEED], table[:, POST]))]
