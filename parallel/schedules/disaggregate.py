"""Core attention disaggregation: tokens stay where they are, and pieces of attention go where there is time.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (DistCA). Which rank computes
which queries is decided by :mod:`distattn.parallel.assign`; here the decision becomes a plan. A rank works on its own rows while
the first queries and keys of others travel, then does what it does for others in ``stages`` parts, each while the next one
travels, then works on its own rows again while the last results go home. Rows that several ranks need can be passed on among
these, so that the owners of long documents send and get each of theirs once (:mod:`distattn.parallel.relays`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas, clip, shift
from distattn.parallel.assign import assign
from distattn.parallel.assign_cost import Cost
from distattn.parallel.assignment import Assignment
from distattn.parallel.intervals import Intervals, cut, expand, groups, union
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import DST, NEED, OWNER, POST, RANK, SRC, STAGE, START, WHAT, Plan, What, no_kept
from distattn.parallel.relays import IN_NODES, SHARED, STRAIGHT, Hops, Needs, home_lane, input_lane, relayed
from distattn.parallel.schedules.pace import Time, Work, in_parts, in_slices
from distattn.parallel.strategy import Balance

PARTS, PARTS_RELAYED = 3, 6
MOST_PARTS = 64
FIRST_HOP = 0.6  # of the time of the first rows on their way that is filled with own work: simulated, more and less are slower
GAIN = 2  # times less for the busiest owner to send and get: then relays are worth the stages that they take


class _Runs(NamedTuple):
    """Rows [start, stop) of ``owner`` at ``server``, in part ``part``; all int64 [n]."""

    server: np.ndarray
    owner: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    part: np.ndarray

    def take(self, some: np.ndarray) -> _Runs:
        return _Runs(*(column[some] for column in self))


def disaggregate(
    layout: Layout,
    mask: Mask,
    assignment: Assignment,
    stages: int | None = None,
    hops: int | None = None,
    cost: Cost | None = None,
) -> Plan:
    """The plan of an assignment, for all ranks.

    Volume: each foreign row that a server needs, once. A query row that one server finishes alone comes home in the output dtype;
    partial results of rows that several ranks share are merged by their owner, or on the way to it. Memory: all foreign rows that
    a server receives, and a partial result of each foreign query.

    Args:
        layout: segments of step 1 (contiguous or zigzag); ranks without rows may serve.
        stages: parts in which a rank does what it does not do on its own rows alone; None: 3, with relays 6.
        hops: 1: rows travel straight from their owner and results straight home; 2: ranks that need the same rows pass them on to
            each other (:mod:`distattn.parallel.relays`); 3: so that each node gets them once. None: relays where the busiest
            owner has to send and get that much less.
        cost: what rows weigh, which ranks share a node, and how long rows travel; None: its default.

    Raises:
        ValueError: a striped layout, parts below 1 or above 64, hops other than 1 to 3, or 3 where costs know of no nodes.
    """
    cost = cost or Cost()
    _check(layout.world, stages, hops, cost)
    check_step(layout)
    work = _placed(layout, mask, assignment)
    assert areas(work.bands).sum() == mask.bands.area, "an assignment covers every visible pair exactly once"
    own = (work.server == work.q_owner) & (work.server == work.kv_owner)
    inside, across = work.take(own), work.take(~own)
    hops = int(hops or _hops(layout.world, across, cost))
    time = Time(hops, int(stages or (PARTS if hops == STRAIGHT else PARTS_RELAYED))) if len(across.run) else Time(0, 1)
    across, part = in_parts(across, time.parts)
    queries, keys = _runs(across, part, across.q_owner, Q0), _runs(across, part, across.kv_owner, K0)
    results = _runs(across, part, across.q_owner, Q0, last=True)
    inside, when = in_slices(inside, across, layout.world, time, _first_hop(queries, keys, layout.world, cost))
    tasks, task_of_band, bands = _tasks(layout, inside, when, across, part + time.hops - 1)
    finished = _finished(results, work, hops, cost.devices)
    received = np.zeros(layout.world, dtype=np.int64)
    for runs, kinds in ((queries, 2), (keys, 1)):
        np.add.at(received, runs.server, kinds * (runs.stop - runs.start))
    return Plan(
        name="disaggregate",
        direction="forward",
        layout=layout,
        mask=mask,
        stages=time.all,
        tasks=tasks,
        band_ptr=np.concatenate([[0], np.cumsum(np.bincount(task_of_band, minlength=len(tasks)))]).astype(np.int64),
        bands=bands,
        transfers=_transfers(queries, keys, finished, time, cost.devices),
        kept=no_kept(),
        buffer_bound=int(received.max(initial=0)),
        quiet=time.hops,
        pooled=True,
        node_devices=cost.devices,
    )


def _check(world: int, stages: int | None, hops: int | None, cost: Cost) -> None:
    for name, what, value, most in (("stages", " parts", stages, MOST_PARTS), ("hops", "", hops, IN_NODES)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= most):
            raise ValueError(
                f"disaggregate was asked for with {name} = {value!r}{what}. Pass a whole number of 1 to {most}, or None."
            )
    if hops == IN_NODES and not 1 < cost.devices < world:
        found = f"all {world} ranks in one node" if cost.devices >= world else "each rank in a node of its own"
        raise ValueError(
            f"hops={IN_NODES} brings rows to each node once, but the costs have {found}. Pass hops=2, or costs of a cluster with "
            "several nodes of several ranks (Balance.of(shape, cluster), parallel.cluster)."
        )


def balanced(layout: Layout, mask: Mask, balance: Balance, backward: bool = False, hops: int | None = None) -> Assignment:
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
        hops=hops,
    )


def check_step(layout: Layout) -> None:
    """Raises ValueError for a layout in which neighbouring rows are not neighbouring tokens."""
    if layout.step != 1:
        raise ValueError(
            f"disaggregate works on runs of neighbouring tokens; {layout!r} has every {layout.step}th. "
            "Use layout 'contiguous' (tokens stay where they are) or 'zigzag'."
        )


def _placed(layout: Layout, mask: Mask, assignment: Assignment) -> Work:
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
    return Work(rows, a.server[piece[at]], a.owner[piece[at]], layout.seg_rank[kv_segment], begin[at])


def _hops(world: int, across: Work, cost: Cost) -> int:
    """Own choice: relays where the busiest owner's rows go to several servers each, and it has far more to send than others."""
    straight, once = np.zeros(world), np.zeros(world)
    for owner, first, each in ((across.q_owner, Q0, cost.query_row), (across.kv_owner, K0, cost.kv_row)):
        away = owner != across.server
        start, stop = across.bands[away, first], across.bands[away, first + 1]
        sent = union(Intervals((across.server * world + owner)[away], start, stop))
        straight += each * np.bincount(sent.key % world, weights=sent.rows, minlength=world)
        distinct = union(Intervals(sent.key % world, sent.start, sent.stop))
        once += each * np.bincount(distinct.key, weights=distinct.rows, minlength=world)
    if straight.max(initial=0) < GAIN * max(once.max(initial=0), straight.mean()):
        return STRAIGHT
    return IN_NODES if 1 < cost.devices < world else SHARED


def _first_hop(queries: _Runs, keys: _Runs, world: int, cost: Cost) -> int | None:
    """Visible pairs that a rank works through while the busiest owner sends the rows of the first part once; None: not known."""
    if not cost.has_links:
        return None
    weight = np.zeros(world)
    for runs, each in ((queries, cost.query_row / 2), (keys, cost.kv_row)):
        first = runs.take(runs.part == 1)
        once = union(Intervals(first.owner, first.start, first.stop))
        weight += each * np.bincount(once.key, weights=once.rows, minlength=world)
    return int(FIRST_HOP * weight.max(initial=0) * max(cost.far_seconds, cost.near_seconds) / cost.pair_seconds)


def _tasks(
    layout: Layout, inside: Work, when: np.ndarray, across: Work, stage: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tasks, task of each band, bands): own rows in one task a stage; the rest in one task a band, on its rows alone."""
    number, first = groups(when, inside.server)
    rank, zero = inside.server[first], np.zeros_like(first)
    rows = layout.rows_all[rank]
    own = np.stack([when[first], rank, rank, zero, rows, rank, zero, rows], 1)
    b, whose = across.bands, across
    far = np.stack([stage, whose.server, whose.q_owner, b[:, Q0], b[:, Q1], whose.kv_owner, b[:, K0], b[:, K1]], 1)
    tasks = np.concatenate([own, far])
    task_of_band = np.concatenate([number, len(own) + np.arange(len(far))])
    bands = np.concatenate([inside.bands, shift(b, -b[:, Q0], -b[:, K0])])
    order = np.lexsort((tasks[:, RANK], tasks[:, STAGE]))
    place = np.argsort(order, kind="stable")[task_of_band]
    by_task = np.argsort(place, kind="stable")
    return tasks[order], place[by_task], bands[by_task]


def _runs(across: Work, part: np.ndarray, owner: np.ndarray, column: int, last: bool = False) -> _Runs:
    """Rows of others, in bands' columns ``column`` and the next, at servers, with the first (last) part that needs them."""
    foreign = np.flatnonzero(across.server != owner)
    server, owner, part, bands = (x[foreign] for x in (across.server, owner, part, across.bands))
    number, first = groups(server, owner)
    [(piece, low, high)] = cut(Intervals(number, bands[:, column], bands[:, column + 1]))
    cell, at = groups(number[piece], low)
    when = np.full(len(at), -1 if last else np.iinfo(np.int64).max)
    (np.maximum if last else np.minimum).at(when, cell, part[piece])
    most = int(part.max(initial=0)) + 1
    runs = union(Intervals(number[piece[at]] * most + when, low[at], high[at]))
    of = first[runs.key // most]
    return _Runs(server[of], owner[of], runs.start, runs.stop, runs.key % most)


def _finished(results: _Runs, work: Work, hops: int, devices: int) -> tuple[np.ndarray, _Runs]:
    """(whether all of a run comes home in one result that its owner adds nothing to, the runs cut where that changes)."""
    touched = Intervals(work.q_owner, work.bands[:, Q0], work.bands[:, Q1])
    (run, low, high), (band, band_low, _) = cut(Intervals(results.owner, results.start, results.stop), touched)
    cell, first = groups(np.concatenate([results.owner[run], work.q_owner[band]]), np.concatenate([low, band_low]))
    at, server, owner = cell[len(run) :], work.server[band], work.q_owner[band]
    straight = server == owner if hops > STRAIGHT else np.ones(len(server), dtype=bool)
    if hops == IN_NODES:
        straight |= server // devices == owner // devices
    source = np.where(straight, server, -1)  # who relay rows merge what they make of them
    least, most = np.full(len(first), np.iinfo(np.int64).max), np.full(len(first), -2)
    np.minimum.at(least, at, source)
    np.maximum.at(most, at, source)
    joined = union(Intervals(run * 2 + (least == most)[cell[: len(run)]], low, high))
    of = joined.key // 2
    return joined.key % 2 == 1, _Runs(results.server[of], results.owner[of], joined.start, joined.stop, results.part[of])


def _transfers(queries: _Runs, keys: _Runs, finished: tuple[np.ndarray, _Runs], time: Time, devices: int) -> np.ndarray:
    alone, home = finished
    tables = []

    def hops_of(runs: _Runs, part: np.ndarray) -> Hops:
        return relayed(Needs(*runs[:4], time.hops - 1 + part), time.hops, devices)

    def add(hops: Hops, what: np.ndarray, lane: np.ndarray) -> None:
        tables.append(np.stack([*hops[:5], what, lane, hops.post, hops.need], 1))

    for runs, kind in ((queries, What.Q), (keys, What.KV)):
        hops = hops_of(runs, runs.part)
        add(hops, np.full_like(hops.src, kind), input_lane(hops.src, hops.owner))
    for runs, kind in ((home.take(alone), What.DONE), (home.take(~alone), What.OUT)):
        # The way home is that of inputs in a time that runs backwards, in which the last part is the first.
        hops = hops_of(runs, time.parts + 1 - runs.part).mirrored(time.all)
        add(hops, np.where(hops.dst == hops.owner, kind, What.OUT), home_lane(hops.dst, hops.owner))
    table = np.concatenate(tables)
    # A rank serves those after it in turn, so that not all send to one at first.
    turn = (table[:, DST] - table[:, SRC]) % (table[:, [SRC, DST]].max(initial=0) + 1)
    return table[np.lexsort((table[:, START], table[:, OWNER], table[:, WHAT], turn, table[:, NEED], table[:, POST]))]
