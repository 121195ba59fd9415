"""Where foreign rows lie on a rank: which of them share a buffer (a visit), and in which order they stand in it (a packing).

Rows of one owner that are used together, arrive together or lie in one run are one visit: a kernel finds them in one buffer,
one after the other. A ring of several laps brings rows of an owner more than once; those of another lap come when the first
are gone, and may take their place.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from distattn.parallel.intervals import Intervals, groups, union
from distattn.parallel.plan import DST, KV_OWNER, NEED, OWNER, Q_OWNER, STAGE, START, STOP, WHAT, Plan, What

NO_TIME = -1


@dataclass(frozen=True)
class Packing:
    """Which rows of an owner's shard a buffer holds, one maximal run after the other without gaps."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    offset: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, starts: np.ndarray, stops: np.ndarray) -> Packing:
        runs = union(Intervals(np.zeros_like(starts), starts, stops))
        offset = np.concatenate([[0], np.cumsum(runs.rows)])
        start, stop, begin = (tuple(int(x) for x in column) for column in (runs.start, runs.stop, offset[:-1]))
        return cls(start, stop, begin, int(offset[-1]))

    def row(self, start: int, stop: int) -> int:
        """Where rows [start, stop) of the owner's shard begin in the packed buffer."""
        run = bisect_right(self.start, start) - 1
        assert run >= 0 and stop <= self.stop[run], f"rows [{start}, {stop}) are not held"
        return self.offset[run] + start - self.start[run]

    def common(self, other: Packing) -> list[tuple[int, int]]:
        """Runs of rows that both hold, as [start, stop) of the owner's shard."""
        ours, theirs = (list(zip(p.start, p.stop, strict=True)) for p in (self, other))
        both = ((max(a, c), min(b, d)) for a, b in ours for c, d in theirs)
        return [(start, stop) for start, stop in both if start < stop]


@dataclass(frozen=True)
class Visits:
    """The packings of all visits of one owner's rows."""

    packings: tuple[Packing, ...]

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        return sorted((start, number) for number, packing in enumerate(self.packings) for start in packing.start)

    def holding(self, row: int) -> int:
        """The visit that brings a row."""
        return self._runs[bisect_right(self._runs, (row, len(self.packings))) - 1][1]


def visits(key: np.ndarray, start: np.ndarray, stop: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The visit of every run of rows, numbered from 0; int64 [n].

    Args:
        key: whose rows, where; runs of different keys are never one visit.
        start, stop: rows [start, stop) of ``key``, all int64 [n]. Runs that share a row are one visit.
        time: runs of one key and time are one visit; ``NO_TIME``: at no time of their own.
    """
    if not len(key):
        return np.zeros(0, dtype=np.int64)
    span = int(stop.max()) + 1
    begin, end = key * span + start, key * span + stop
    order = np.argsort(begin, kind="stable")
    apart = np.ones(len(order), dtype=bool)
    apart[1:] = begin[order][1:] >= np.maximum.accumulate(end[order])[:-1]
    cluster = np.empty(len(order), dtype=np.int64)
    cluster[order] = np.cumsum(apart) - 1
    timed = np.flatnonzero(time >= 0)
    together, _ = groups(key[timed], time[timed])
    visit = np.arange(int(cluster.max()) + 1)
    while len(timed):  # as often as clusters hang together by a chain of times, which is seldom more than once
        least = np.full(int(together.max()) + 1, len(visit))
        np.minimum.at(least, together, visit[cluster[timed]])
        spread = visit.copy()
        np.minimum.at(spread, cluster[timed], least[together])
        if np.array_equal(spread, visit):
            break
        visit = spread
    return np.unique(visit[cluster], return_inverse=True)[1].reshape(-1)


def in_stores(
    plan: Plan, rank: np.ndarray, owner: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(store, start, stop) of rows of ``owner`` on ``rank``: in a pooled plan all foreign shards stand one after another."""
    base = 0
    if plan.pooled:
        base = np.where(owner == rank, 0, owner * (int(plan.layout.rows_all.max(initial=0)) + 1))
    return plan.stores(rank, owner), start + base, stop + base


def pool_rows(plan: Plan) -> Plan:
    """A rank's view in which the ``POOL`` owns all foreign rows of a pooled plan; any other view as it is."""
    if not plan.pooled:
        return plan
    tables = []
    for table, owners in ((plan.tasks, (Q_OWNER, KV_OWNER)), (plan.transfers, (OWNER,))):
        made = table.copy()
        for owner in owners:
            made[:, owner : owner + 3] = _pooled(plan, table[:, owner : owner + 3])
        tables.append(made)
    return replace(plan, tasks=tables[0], transfers=tables[1], kept=pool_kept(plan, plan.kept))


def pool_kept(plan: Plan, kept: np.ndarray) -> np.ndarray:
    """The same of a table of kept runs."""
    made = kept.copy()
    made[:, 1:4] = _pooled(plan, kept[:, 1:4])
    return made


def _pooled(plan: Plan, runs: np.ndarray) -> np.ndarray:
    return np.stack(in_stores(plan, np.full(len(runs), plan.rank), *runs.T), 1)


def time_of_use(what: np.ndarray, need: np.ndarray) -> np.ndarray:
    """When transferred rows are used together: inputs where they are awaited. Sums lie where the rows of their tasks do."""
    return np.where(what < What.OUT, need, NO_TIME)


def packings(plan: Plan, rank: int) -> dict[tuple[bool, int], Visits]:
    """For every foreign owner the visits of its query side (False) and of its key side (True), of a view of ``rank``."""
    t, tasks, kept = plan.transfers, plan.tasks, plan.kept
    arrives = np.where(t[:, DST] == rank, time_of_use(t[:, WHAT], t[:, NEED]), NO_TIME)
    blocks = [(np.isin(t[:, WHAT], (What.KV, What.DKV)), t[:, OWNER], t[:, START], t[:, STOP], arrives)]
    nowhen = np.full(len(kept), NO_TIME)
    blocks.append((np.isin(kept[:, 4], (What.KV, What.DKV)), kept[:, 1], kept[:, 2], kept[:, 3], nowhen))
    for key_side, owner in ((False, Q_OWNER), (True, KV_OWNER)):
        side = np.full(len(tasks), key_side)
        blocks.append((side, tasks[:, owner], tasks[:, owner + 1], tasks[:, owner + 2], tasks[:, STAGE]))
    side, owner, start, stop, time = (np.concatenate(c) for c in zip(*blocks, strict=True))
    foreign = owner != rank
    side, owner, start, stop, time = (c[foreign] for c in (side, owner, start, stop, time))
    time = np.zeros_like(time) if plan.pooled else time  # one visit
    visit = visits((owner + 1) * 2 + side, start, stop, time)
    order = np.argsort(visit, kind="stable")
    found: dict[tuple[bool, int], list[Packing]] = {}
    for mine in np.split(order, np.flatnonzero(np.diff(visit[order])) + 1) if len(order) else ():
        found.setdefault((bool(side[mine[0]]), int(owner[mine[0]])), []).append(Packing.of(start[mine], stop[mine]))
    return {place: Visits(tuple(packed)) for place, packed in found.items()}
