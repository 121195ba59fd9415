"""verify: the proof that a plan is right, for forward and backward plans, up to millions of tokens and hundreds of ranks.

Every check is vectorised over the plan's tables and costs n log n in their length, never anything per (query, key) pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distattn.kernels.bands import Q0, Q1, areas, clip, localize, shift
from distattn.parallel.cover import Fingerprint, P
from distattn.parallel.head_split import HeadSplit
from distattn.parallel.intervals import Intervals, cut, expand, groups
from distattn.parallel.localize import local_bands
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
    TRANSFER,
    WHAT,
    Plan,
    Rows,
    What,
    assemble,
)
from distattn.parallel.schedule import Schedule
from distattn.parallel.schedules import SCHEDULES
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import peak_buffer_rows
from distattn.parallel.workload import EXCHANGE_LANE


class PlanError(ValueError):
    """A plan that would compute something wrong, or hang. ``findings`` names each defect."""

    def __init__(self, findings: list[str]):
        self.findings = findings
        super().__init__("\n".join(["This plan is wrong:", *(f"  - {f}" for f in findings)]))


def verify(plan: Plan | Sequence[Plan]) -> None:
    """Checks a whole plan, or the views of all ranks against each other and then the plan that they form.

    The tasks cover the mask exactly once; every task finds its rows on its rank in time; every transfer has its data in time
    and is not relayed in the boundary that brings it; both ends of every lane see the same messages in the same order; every
    foreign partial result and gradient goes home exactly once; buffers stay within the bound that the plan states.

    Raises:
        PlanError: naming each defect found (at most 4 of one kind).
    """
    findings: list[str] = []
    if not isinstance(plan, Plan):
        findings += _first(_ends_agree(plan))
        plan = assemble(list(plan))
    if plan.rank is not None:
        raise ValueError("One rank's view alone cannot be verified: pass the whole plan or the views of all ranks.")
    if malformed := _first(_malformed(plan)):
        raise PlanError(findings + malformed)
    for check in (_cover, _inputs_in_time, _sums_go_home, _done_alone, _mixed_messages, _buffers):
        findings += _first(check(plan))
    if findings:
        raise PlanError(findings)


def verify_schedule(schedule: Schedule, shape: Shape | None = None) -> None:
    """Checks a whole schedule: its forward plan and every backward plan it has, and its head exchange.

    The ranks of a group hold the rows of their inner shard, in its order. With ``shape`` (of the calls, with all heads): the
    slices cover the query heads exactly once, and each reads the key heads of its queries.

    Raises:
        PlanError: naming each defect found, and the plan that has it.
        ValueError: the schedule was made for one rank.
    """
    if schedule.rank is not None:
        raise ValueError(f"A schedule made for rank {schedule.rank} alone cannot be verified: make it without a rank.")
    plans = {"forward": schedule.forward, "backward (kv)": schedule.backward("kv")}
    if SCHEDULES[schedule.strategy.schedule].turned is not None:
        plans |= {"forward (q)": schedule.turned, "backward (q)": schedule.backward("q")}
    findings = _first(_refines(schedule))
    if shape is not None:
        findings += _first(_heads_once(HeadSplit(shape.heads, shape.kv_heads, schedule.ulysses)))
    for name, plan in plans.items():
        try:
            verify(plan)
        except PlanError as error:
            findings += [f"{name}: {f}" for f in error.findings]
    if findings:
        raise PlanError(findings)


def _refines(schedule: Schedule) -> Iterator[str]:
    """The shards of each group of ranks, one after the other, are the inner shard that they share."""
    outer, inner, u = schedule.layout, schedule.inner, schedule.ulysses
    for name, a, b in (("ranks", outer.world, inner.world * u), ("tokens", outer.n_tokens, inner.n_tokens)):
        if a != b:
            yield f"the outer layout has {a} {name}, the inner one with ulysses {u} has {b}"
            return
    for group in np.flatnonzero(np.diff(outer.row_ptr[::u]) != inner.rows_all):
        rows = outer.row_ptr[u * (group + 1)] - outer.row_ptr[u * group]
        yield f"ranks {u * group} to {u * group + u - 1} hold {rows} rows of the {inner.rows(int(group))} of inner shard {group}"
    for position in np.flatnonzero(outer.unshard_index != inner.unshard_index)[:1]:
        (rank, row), (group, place) = (tuple(int(x) for x in layout.owner_of(position)) for layout in (outer, inner))
        yield f"position {position} is row {row} of rank {rank}, but row {place} of inner shard {group}"


def _heads_once(split: HeadSplit) -> Iterator[str]:
    """Every query head is in one slice, and meets its own key head there."""
    group = split.heads // split.kv_heads
    counts = np.zeros(split.heads, dtype=np.int64)
    for i, piece in enumerate(split.slices):
        counts[piece.start : piece.stop] += 1
        if not piece.kv_held or piece.heads % piece.kv_held:
            yield f"slice {i} has {piece.heads} query heads for {piece.kv_held} key heads"
            continue
        held = np.repeat(np.arange(piece.kv_start, piece.kv_stop), piece.copies)
        read = np.repeat(held, piece.heads // piece.kv_held)
        for j in np.flatnonzero(read != np.arange(piece.start, piece.stop) // group)[:1]:
            head = piece.start + j
            yield f"query head {head} in slice {i} reads key head {read[j]} instead of {head // group}"
    for head in np.flatnonzero(counts != 1):
        yield f"query head {head} is in {counts[head]} slices"


def _first(findings: Iterator[str], most: int = 4) -> list[str]:
    return [f for f, _ in zip(findings, range(most), strict=False)]


def _malformed(plan: Plan) -> Iterator[str]:
    """Rows outside of shards, stages that do not exist, transfers to oneself."""
    tasks, t, rows = plan.tasks, plan.transfers, plan.layout.rows_all
    known = {SRC: plan.world, DST: plan.world, OWNER: plan.world, WHAT: len(What), LANE: EXCHANGE_LANE}
    for column, most in known.items():
        for i in np.flatnonzero((t[:, column] < 0) | (t[:, column] >= most)):
            yield f"transfer {i} has {TRANSFER[column]} {t[i, column]}, which must be 0 to {most - 1}"
    if any(((t[:, column] < 0) | (t[:, column] >= most)).any() for column, most in known.items()):
        return
    for start, stop, owner in ((Q_START, Q_STOP, Q_OWNER), (KV_START, KV_STOP, KV_OWNER)):
        for i in np.flatnonzero((tasks[:, start] < 0) | (tasks[:, stop] > rows[tasks[:, owner]])):
            run = Rows(*tasks[i, owner : owner + 3])
            yield f"task {i} of rank {tasks[i, RANK]} works on {run}, who has {rows[run.owner]}"
    for i in np.flatnonzero((tasks[:, STAGE] < 0) | (tasks[:, STAGE] >= plan.stages)):
        yield f"task {i} of rank {tasks[i, RANK]} is in stage {tasks[i, STAGE]} of {plan.stages}"
    for i in np.flatnonzero((t[:, START] < 0) | (t[:, STOP] > rows[t[:, OWNER]]) | (t[:, START] >= t[:, STOP])):
        yield f"{plan.transfer(int(i))}: rank {t[i, OWNER]} has {rows[t[i, OWNER]]} rows"
    for i in np.flatnonzero(
        (t[:, SRC] == t[:, DST]) | (t[:, POST] >= t[:, NEED]) | (t[:, POST] < 0) | (t[:, NEED] > plan.stages)
    ):
        yield f"{plan.transfer(int(i))}: from a rank to itself, or not awaited after its posting and by boundary {plan.stages}"


def _ends_agree(views: Sequence[Plan]) -> Iterator[str]:
    """Each pair of ranks must list the same transfers between them in the same order: a lane has no tags."""
    views = sorted(views, key=lambda v: -1 if v.rank is None else v.rank)
    if [v.rank for v in views] != list(range(views[0].world)):
        raise ValueError(f"Need one view of each rank 0..{views[0].world - 1}. Found ranks {[v.rank for v in views]}.")
    sent = np.concatenate([v.transfers[v.transfers[:, SRC] == v.rank] for v in views])
    received = np.concatenate([v.transfers[v.transfers[:, DST] == v.rank] for v in views])
    lane = [TRANSFER.index(c) for c in ("src", "dst", "lane")]
    sent, received = (x[np.lexsort(x[:, lane[::-1]].T)] for x in (sent, received))
    number, _ = groups(*(np.concatenate([sent, received])[:, c] for c in lane))
    most = int(number.max(initial=-1)) + 1
    ptr_s = np.searchsorted(number[: len(sent)], np.arange(most + 1))
    ptr_r = np.searchsorted(number[len(sent) :], np.arange(most + 1))
    for g in range(most):
        a, b = sent[ptr_s[g] : ptr_s[g + 1]], received[ptr_r[g] : ptr_r[g + 1]]
        if np.array_equal(a, b):
            continue
        src, dst, lane_number = (a if len(a) else b)[0, lane]
        counts = f"rank {src} sends {len(a)} and rank {dst} receives {len(b)} messages on lane {lane_number}"
        if len(a) > len(b):
            yield f"a send without its receive: {counts}"
        elif len(a) < len(b):
            yield f"a receive without its send: {counts}"
        else:
            yield f"a different order or content on the two ends: {counts}, and they are not the same one by one"


def _cover(plan: Plan) -> Iterator[str]:
    """The tasks' pairs are the mask's pairs, each once; where not, which pair of shards is to blame."""
    layout = plan.layout
    here = Fingerprint(layout.n_tokens, layout.step)
    values, owners = _task_fingerprints(plan, here)
    mask = Fingerprint(layout.n_tokens)(plan.mask.bands.table)
    if np.array_equal(values.sum(1) % P, mask.sum(1) % P):
        return
    world = layout.world
    q, kv = (x.ravel() for x in np.meshgrid(np.arange(world), np.arange(world), indexing="ij"))
    bands, pair = local_bands(plan.mask, layout, q, kv)
    want = np.zeros((world * world, values.shape[0]), dtype=np.int64)
    table, starts = _in_segments(plan, bands, q[pair], kv[pair])
    np.add.at(want, pair[starts[0]], here(table, starts[1], starts[2]).T)
    have = np.zeros_like(want)
    np.add.at(have, owners, values.T)
    area = np.bincount(pair, weights=areas(bands), minlength=len(want)).astype(np.int64)
    task_area = np.bincount(
        (plan.tasks[:, Q_OWNER] * world + plan.tasks[:, KV_OWNER])[plan.task_of_band],
        weights=areas(plan.bands),
        minlength=len(want),
    ).astype(np.int64)
    wrong = np.flatnonzero((want % P != have % P).any(1))
    for p in wrong:
        yield (
            f"the tasks do not cover the mask exactly once: queries of rank {p // world} with keys of rank {p % world} "
            f"have {area[p]} pairs in the mask and {task_area[p]} in the tasks"
        )
    if not len(wrong):
        yield "the tasks' pairs are not those of the mask, although they are shard by shard: layout and mask disagree"


def _task_fingerprints(plan: Plan, fingerprint: Fingerprint) -> tuple[np.ndarray, np.ndarray]:
    """(values of each piece of a task's band, q_owner * world + kv_owner of the piece)."""
    t = plan.tasks[plan.task_of_band]
    bands = clip(plan.bands, 0, t[:, Q_STOP] - t[:, Q_START], 0, t[:, KV_STOP] - t[:, KV_START])
    shards = shift(bands, t[:, Q_START], t[:, KV_START])
    table, (index, q_start, k_start) = _in_segments(plan, shards, t[:, Q_OWNER], t[:, KV_OWNER])
    return fingerprint(table, q_start, k_start), (t[:, Q_OWNER] * plan.world + t[:, KV_OWNER])[index]


def _in_segments(
    plan: Plan, bands: np.ndarray, q_owner: np.ndarray, kv_owner: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Bands over whole shards as bands over single segments: (table, (index, start of query segment, start of key segment))."""
    layout = plan.layout
    span = int(layout.rows_all.max(initial=0)) + 1
    begins = layout.seg_rank * span + layout.seg_row

    def meets(owner: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = np.searchsorted(begins, owner * span + start, side="right") - 1
        return expand(np.where(start < stop, first, 0), np.where(start < stop, np.searchsorted(begins, owner * span + stop), 0))

    index, q_seg = meets(q_owner, bands[:, Q0], bands[:, Q1])
    again, k_seg = meets(kv_owner[index], bands[index, 2], bands[index, 3])
    index, q_seg = index[again], q_seg[again]
    q_row, k_row = layout.seg_row[q_seg], layout.seg_row[k_seg]
    table = localize(bands[index], q_row, layout.seg_count[q_seg], k_row, layout.seg_count[k_seg], 1)
    return table, (index, layout.seg_start[q_seg], layout.seg_start[k_seg])


def _inputs_in_time(plan: Plan) -> Iterator[str]:
    """Every task and every relay finds its rows on its rank by then: own, kept or awaited rows. Nothing comes twice."""
    tasks, t, kept, world = plan.tasks, plan.transfers, plan.kept, plan.world
    t = t[np.isin(t[:, WHAT], (What.Q, What.KV, What.DOUT))]
    uses = [(What.Q, Q_OWNER, Q_START), (What.KV, KV_OWNER, KV_START)]
    if plan.direction == "backward":
        uses.append((What.DOUT, Q_OWNER, Q_START))
    blocks = [(t[:, DST], t[:, WHAT], t[:, OWNER], t[:, START], t[:, STOP], t[:, NEED])]
    blocks.append((kept[:, 0], kept[:, 4], kept[:, 1], kept[:, 2], kept[:, 3], np.zeros(len(kept), np.int64)))
    blocks.append((t[:, SRC], t[:, WHAT], t[:, OWNER], t[:, START], t[:, STOP], t[:, POST]))
    for what, owner, start in uses:
        blocks.append(
            (tasks[:, RANK], np.full(len(tasks), what), tasks[:, owner], tasks[:, start], tasks[:, start + 1], tasks[:, STAGE])
        )
    rank, what, owner, start, stop, time = (np.concatenate(c) for c in zip(*blocks, strict=True))
    kind = np.repeat(np.arange(len(blocks)), [len(b[0]) for b in blocks])
    foreign = rank != owner
    rank, what, owner, start, stop, time, kind = (c[foreign] for c in (rank, what, owner, start, stop, time, kind))
    [(piece, lo, hi)] = cut(Intervals((rank * len(What) + what) * world + owner, start, stop))
    number, first = groups(rank[piece], what[piece], owner[piece], lo)
    arrival = np.full(len(first), np.iinfo(np.int64).max)
    brings = kind[piece] < 2
    np.minimum.at(arrival, number[brings], time[piece][brings])
    for g in np.flatnonzero(np.bincount(number[brings], minlength=len(first)) > 1):
        i, at = piece[first[g]], first[g]
        yield f"rank {rank[i]} receives {What(what[i]).name.lower()} {Rows(owner[i], lo[at], hi[at])} more than once"
    for p in np.flatnonzero(~brings & (time[piece] < arrival[number])):
        i = piece[p]
        name, rows = What(what[i]).name.lower(), Rows(owner[i], lo[p], hi[p])
        never = arrival[number[p]] == np.iinfo(np.int64).max
        when = "never receives" if never else f"awaits only at boundary {arrival[number[p]]}"
        if kind[i] == 2:
            late = "" if never else " (a relay in the boundary that brings it, or earlier)"
            yield f"rank {rank[i]} passes on {name} {rows} at boundary {time[i]}, which it {when}{late}"
        else:
            yield f"rank {rank[i]} computes with {name} {rows} in stage {time[i]}, which it {when}"


def _sums_go_home(plan: Plan) -> Iterator[str]:
    """Every foreign partial leaves its rank exactly once, after the last contribution to it; nothing empty is sent."""
    tasks, t, world = plan.tasks, plan.transfers, plan.world
    t = t[t[:, WHAT] >= What.OUT].copy()
    t[t[:, WHAT] == What.DONE, WHAT] = What.OUT
    if plan.direction == "forward":
        made = [(What.OUT, Q_OWNER, Q_START)]
    else:
        made = [(What.DQ, Q_OWNER, Q_START), (What.DKV, KV_OWNER, KV_START)]
    blocks = [(t[:, SRC], t[:, WHAT], t[:, OWNER], t[:, START], t[:, STOP], t[:, POST])]
    blocks.append((t[:, DST], t[:, WHAT], t[:, OWNER], t[:, START], t[:, STOP], t[:, NEED]))
    for what, owner, start in made:
        columns = (
            tasks[:, RANK],
            np.full(len(tasks), what),
            tasks[:, owner],
            tasks[:, start],
            tasks[:, start + 1],
            tasks[:, STAGE] + 1,
        )
        blocks.append(columns)
    rank, what, owner, start, stop, time = (np.concatenate(c) for c in zip(*blocks, strict=True))
    leaves = np.arange(len(rank)) < len(t)
    foreign = rank != owner
    for i in np.flatnonzero(leaves & ~foreign):
        yield f"rank {rank[i]} sends away the {What(what[i]).name.lower()} of its own {Rows(owner[i], start[i], stop[i])}"
    rank, what, owner, start, stop, time, leaves = (c[foreign] for c in (rank, what, owner, start, stop, time, leaves))
    [(piece, lo, hi)] = cut(Intervals((rank * len(What) + what) * world + owner, start, stop))
    number, first = groups(rank[piece], what[piece], owner[piece], lo)
    gone, made_by = np.zeros(len(first), np.int64), np.full(len(first), -1)
    departures, contributions = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
    out = leaves[piece]
    np.maximum.at(gone, number[out], time[piece][out])
    np.maximum.at(made_by, number[~out], time[piece][~out])
    np.add.at(departures, number[out], 1)
    np.add.at(contributions, number[~out], 1)
    for g in np.flatnonzero((departures != 1) | (contributions == 0) | (made_by > gone)):
        i = piece[first[g]]
        text = f"{What(what[i]).name.lower()} of {Rows(owner[i], lo[first[g]], hi[first[g]])} on rank {rank[i]}"
        if departures[g] == 0:
            yield f"the partial {text} never goes home"
        elif contributions[g] == 0:
            yield f"the partial {text} is sent home, but nobody computed it"
        elif departures[g] > 1:
            yield f"the partial {text} goes home {departures[g]} times"
        else:
            yield f"the partial {text} leaves at boundary {gone[g]}, before its last part at boundary {made_by[g]}"


def _done_alone(plan: Plan) -> Iterator[str]:
    """Rows that go home as finished go to their owner, who has no other part of them: no task on them, and nothing else comes."""
    t, task = plan.transfers, plan.tasks[plan.task_of_band]
    is_done = t[:, WHAT] == What.DONE
    if not is_done.any():
        return
    for i in np.flatnonzero(is_done & (t[:, DST] != t[:, OWNER])):
        yield f"{plan.transfer(int(i))}: only their owner takes rows as finished"
    home = np.isin(t[:, WHAT], (What.OUT, What.DONE)) & (t[:, DST] == t[:, OWNER])
    t, is_done, task_here = t[home], is_done[home], task[:, RANK] == task[:, Q_OWNER]
    task, bands = task[task_here], plan.bands[task_here]
    owner = np.concatenate([t[:, OWNER], task[:, Q_OWNER]])
    begin = np.concatenate([t[:, START], task[:, Q_START] + bands[:, Q0]])
    end = np.concatenate([t[:, STOP], task[:, Q_START] + bands[:, Q1]])
    [(piece, lo, hi)] = cut(Intervals(owner, begin, end))
    cell, first_piece = groups(owner[piece], lo)
    finished = np.bincount(cell, weights=np.concatenate([is_done, np.zeros(len(task))])[piece], minlength=len(first_piece))
    worked, parts = np.bincount(cell[piece >= len(t)], minlength=len(first_piece)), np.bincount(cell)
    for g in np.flatnonzero((finished > 0) & (parts > 1)):
        at = first_piece[g]
        rows = Rows(owner[piece[at]], lo[at], hi[at])
        other = "its own part of them" if worked[g] else "another result of them"
        yield f"{rows} come home as finished, but rank {rows.owner} has {other}"


def _mixed_messages(plan: Plan) -> Iterator[str]:
    """In a pooled plan a message carries rows of one kind of owner: else its two ends would lay them out in different ways."""
    t = plan.transfers
    if not plan.pooled or not len(t):
        return
    whose = np.where(t[:, OWNER] == t[:, SRC], 0, np.where(t[:, OWNER] == t[:, DST], 1, 2))
    message, first = groups(*(t[:, c] for c in (SRC, DST, LANE, POST, NEED, WHAT)))
    low, high = np.full(len(first), 2), np.zeros(len(first), dtype=np.int64)
    np.minimum.at(low, message, whose)
    np.maximum.at(high, message, whose)
    for i in first[low != high]:
        yield f"{plan.transfer(int(i))}: its message carries rows of others too, whom one end stores together with them"


def _buffers(plan: Plan) -> Iterator[str]:
    peak = peak_buffer_rows(plan)
    if plan.buffer_bound is not None:
        for rank in np.flatnonzero(peak > plan.buffer_bound):
            yield f"rank {rank} holds {peak[rank]} rows of foreign data at once; the schedule states at most {plan.buffer_bound}"
