"""Exact figures of a plan: work per rank, balance, bytes by link, rows moved in vain, peak buffer rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas
from distattn.parallel.head_split import HeadSplit, Parts, bytes_of, inner_shape, row_parts
from distattn.parallel.intervals import Intervals, groups, subtract, union
from distattn.parallel.packing import NO_TIME, in_stores, time_of_use, visits
from distattn.parallel.plan import (
    DST,
    KV_OWNER,
    KV_START,
    KV_STOP,
    LANE,
    NEED,
    OWNER,
    POST,
    Q_OWNER,
    Q_START,
    Q_STOP,
    RANK,
    SRC,
    STAGE,
    START,
    STOP,
    WHAT,
    Plan,
    What,
)
from distattn.parallel.schedule import Schedule
from distattn.parallel.shape import Shape


@dataclass(frozen=True)
class Statistics:
    """Exact figures of one plan. Arrays are int64 [P] or [P, P]; bytes are payload bytes without alignment."""

    work: np.ndarray
    bytes_by_link: np.ndarray
    wasted_rows: int
    peak_buffer_rows: np.ndarray
    messages: int

    @property
    def balance(self) -> float:
        """Work of the busiest rank over the mean; 1.0 where there is no work."""
        mean = self.work.mean() if len(self.work) else 0
        return float(self.work.max() / mean) if mean else 1.0


def statistics(plan: Plan, shape: Shape) -> Statistics:
    """Statistics of a whole plan for the heads, head sizes and dtypes of ``shape``."""
    t = plan.transfers
    volume = bytes_by_link(plan, shape)
    _, first = groups(t[:, SRC], t[:, DST], t[:, LANE], t[:, POST])
    return Statistics(work(plan), volume, wasted_rows(plan), peak_buffer_rows(plan), len(first))


def bytes_by_link(plan: Plan, shape: Shape) -> np.ndarray:
    """Payload bytes from rank to rank, int64 [P, P]."""
    t = plan.transfers
    per_row = np.array([shape.row_bytes(what) for what in What], dtype=np.int64)
    volume = np.zeros((plan.world, plan.world), dtype=np.int64)
    np.add.at(volume, (t[:, SRC], t[:, DST]), (t[:, STOP] - t[:, START]) * per_row[t[:, WHAT]])
    return volume


def exchange_bytes(schedule: Schedule, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Payload bytes from rank to rank of a schedule's head exchanges, forward and backward, int64 [P, P] of all its ranks.

    Args:
        shape: of the calls, with all heads.
    """
    u, rows = schedule.ulysses, schedule.layout.rows_all
    parts = [row_parts(shape, piece) for piece in HeadSplit(shape.heads, shape.kv_heads, u).slices]
    group, place = np.divmod(np.arange(schedule.world), u)
    trade = (group[:, None] == group) & (place[:, None] != place)

    def there_and_back(there: list[Parts], back: list[Parts]) -> np.ndarray:
        go, come = (np.array([bytes_of(p) for p in side], dtype=np.int64)[place] for side in (there, back))
        return np.where(trade, rows[:, None] * go + come[:, None] * rows, 0)

    forward = there_and_back([p.inputs for p in parts], [p.outputs for p in parts])
    return forward, there_and_back([p.upstream for p in parts], [p.gradients for p in parts])


def schedule_bytes(schedule: Schedule, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Payload bytes from rank to rank of a whole schedule, head exchanges and plans, forward and backward, int64 [P, P]."""
    forward, backward = exchange_bytes(schedule, shape)
    u = schedule.ulysses
    for i, piece in enumerate(HeadSplit(shape.heads, shape.kv_heads, u).slices):
        inner = inner_shape(shape, piece)
        forward[i::u, i::u] += bytes_by_link(schedule.forward, inner)
        backward[i::u, i::u] += bytes_by_link(schedule.backward(schedule.rotation(inner)), inner)
    return forward, backward


def work(plan: Plan) -> np.ndarray:
    """Visible (query, key) pairs that each rank computes, int64 [P]."""
    total = np.zeros(plan.world, dtype=np.int64)
    np.add.at(total, plan.tasks[plan.task_of_band, RANK], areas(plan.bands))
    return total


def wasted_rows(plan: Plan) -> int:
    """Received rows of queries and keys that no band of the receiver touches and that it does not pass on."""
    t = plan.transfers[np.isin(plan.transfers[:, WHAT], (What.Q, What.KV))]
    task = plan.tasks[plan.task_of_band]
    world = plan.world

    def rows(rank: np.ndarray, what: np.ndarray | int, owner: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Intervals:
        return Intervals((rank * len(What) + what) * world + owner, start, stop)

    q_use = rows(
        task[:, RANK], What.Q, task[:, Q_OWNER], task[:, Q_START] + plan.bands[:, Q0], task[:, Q_START] + plan.bands[:, Q1]
    )
    kv_use = rows(
        task[:, RANK], What.KV, task[:, KV_OWNER], task[:, KV_START] + plan.bands[:, K0], task[:, KV_START] + plan.bands[:, K1]
    )
    relayed = rows(t[:, SRC], t[:, WHAT], t[:, OWNER], t[:, START], t[:, STOP])
    used = Intervals(*(np.concatenate(c) for c in zip(q_use, kv_use, relayed, strict=True)))
    return int(subtract(rows(t[:, DST], t[:, WHAT], t[:, OWNER], t[:, START], t[:, STOP]), used).rows.sum())


def peak_buffer_rows(plan: Plan, weights: np.ndarray | None = None) -> np.ndarray:
    """Rows of foreign data (inputs and sums) that each rank holds at once, at most; int64 [P].

    A visit of an owner's rows is held from the boundary that posts its first arrival (or the stage of the first task that adds
    to it) to the end of the last stage that uses it, or the boundary that awaits its last departure. With ``weights``, int64
    by What, the most that these rows weigh together: bytes, say.
    """
    t, tasks = plan.transfers, plan.tasks
    stored = np.array([what.stored for what in What])[t[:, WHAT]]
    used = time_of_use(t[:, WHAT], t[:, NEED])
    nowhen = np.full(len(t), NO_TIME)
    at_start = np.zeros(len(plan.kept), np.int64)
    columns = [
        (t[:, DST], t[:, OWNER], stored, t[:, START], t[:, STOP], t[:, POST], t[:, NEED], used),
        (t[:, SRC], t[:, OWNER], stored, t[:, START], t[:, STOP], t[:, POST], t[:, NEED], nowhen),
        (*(plan.kept[:, c] for c in (0, 1, 4, 2, 3)), at_start, at_start, at_start + NO_TIME),
    ]
    uses = [(What.Q, Q_OWNER, Q_START, Q_STOP), (What.KV, KV_OWNER, KV_START, KV_STOP)]
    uses += (
        [(What.OUT, Q_OWNER, Q_START, Q_STOP)]
        if plan.direction == "forward"
        else [(What.DOUT, Q_OWNER, Q_START, Q_STOP), (What.DQ, Q_OWNER, Q_START, Q_STOP), (What.DKV, KV_OWNER, KV_START, KV_STOP)]
    )
    for what, owner, start, stop in uses:
        kind, stage = np.full(len(tasks), what), tasks[:, STAGE]
        columns.append((tasks[:, RANK], tasks[:, owner], kind, tasks[:, start], tasks[:, stop], stage, stage + 1, stage))
    rank, owner, what, start, stop, born, dies, time = (np.concatenate(c) for c in zip(*columns, strict=True))
    foreign = rank != owner
    rank, owner, what, start, stop, born, dies, time = (c[foreign] for c in (rank, owner, what, start, stop, born, dies, time))
    key_side = np.isin(what, (What.KV, What.DKV))
    store, start, stop = in_stores(plan, rank, owner, start, stop)
    time = np.zeros_like(time) if plan.pooled else time
    visit = visits((rank * (plan.world + 1) + store + 1) * 2 + key_side, start, stop, time)
    number, first = groups(visit, what)
    runs = union(Intervals(number, start, stop))
    rows = np.bincount(runs.key, weights=runs.rows, minlength=len(first)).astype(np.int64)
    if weights is not None:
        rows *= weights[what[first]]
    begin, end = np.full(len(first), plan.stages + 1), np.zeros(len(first), np.int64)
    np.minimum.at(begin, number, born)
    np.maximum.at(end, number, dies)
    held = np.zeros((plan.world, plan.stages + 2), dtype=np.int64)
    np.add.at(held, (rank[first], begin), rows)
    np.add.at(held, (rank[first], end), -rows)
    return np.cumsum(held, axis=1).max(axis=1, initial=0)
