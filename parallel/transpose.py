"""The backward plan, derived from the forward plan by transposition.

Stages run in reverse order and transfers are reversed: where kv went out dkv comes home, where q went out dq comes home,
where out came home dout goes out. Inputs that a rank no longer holds travel again, along the forward chain run backwards
(each rank hands its copy to the one that it had it from) or, where the chain has no holder, straight from their owner. Where
servers share rows out among themselves (relays.py) keys are shared out anew, by when they are needed in this pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from distattn.kernels.bands import INF, Q0, Q1, clip, shift
from distattn.parallel.intervals import Intervals, cut, expand, groups, subtract, union
from distattn.parallel.plan import (
    DST,
    HOME_LANE,
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
from distattn.parallel.relays import Needs, home_lane, input_lane, relayed

Keep = Literal["all", "last", "none"]
GRADIENT_OF = {What.Q: What.DQ, What.KV: What.DKV, What.OUT: What.DOUT, What.DONE: What.DOUT}


def transpose(plan: Plan, keep: Keep = "last") -> Plan:
    """The backward plan of a whole forward plan; of one made with the bands of one rank, what that rank's view needs.

    Args:
        keep: which received keys and queries stay on their rank until the backward pass. ``"all"``: nothing is sent again;
            ``"last"``: those of the last forward stage, with which the backward begins (a ring: 3P - 4 shards sent in float32
            terms of the design); ``"none"``: all are sent again, the least memory (3P - 3).

    Raises:
        ValueError: for a view of one rank, a backward plan, or an unknown ``keep``.
    """
    if plan.rank is not None or plan.direction != "forward":
        raise ValueError(f"Only a whole forward plan can be transposed. Found a {plan.direction} plan of rank {plan.rank}.")
    if keep not in ("all", "last", "none"):
        raise ValueError(f"keep must be 'all', 'last' or 'none'. Found {keep!r}.")
    inputs = plan.transfers[np.isin(plan.transfers[:, WHAT], (What.Q, What.KV))]
    lead = int(keep == "none" and plan.stages > 1 and not plan.quiet)  # a stage in which the first ones travel
    stages, received = plan.stages + lead, plan.stages > 1
    longest = _longest_hops(plan.world, inputs)
    if plan.bands_of is not None:
        plan = _neighbourhood(plan, plan.bands_of)
        inputs = plan.transfers[np.isin(plan.transfers[:, WHAT], (What.Q, What.KV))]
    back = _reversed(plan.transfers, stages, plan.pooled)
    resent, kept = _inputs(plan, inputs, keep, stages, longest)
    queries = _with_dout(back, kept, plan.world)
    tasks, task_of_band, bands = plan.tasks.copy(), plan.task_of_band, plan.bands
    tasks[:, STAGE] = stages - 1 - tasks[:, STAGE]
    if keep == "none" and received:
        tasks, task_of_band, bands = _first_and_last(stages, tasks, task_of_band, bands)
    order = np.lexsort((-np.arange(len(tasks)), tasks[:, STAGE]))
    band_order = np.argsort(np.argsort(order, kind="stable")[task_of_band], kind="stable")
    counts = np.bincount(task_of_band, minlength=len(tasks))
    transfers = np.concatenate([resent, queries, back])
    bound = plan.buffer_bound
    if bound is not None:
        held = np.bincount(kept[:, 0], weights=kept[:, 3] - kept[:, 2], minlength=1).max() if keep == "all" else 0
        early = int(longest[0].max(initial=1) > 1) * int(plan.layout.rows_all.max(initial=0))  # a long hop begins behind another
        bound = 2 * bound + early + int(held)
    return replace(
        plan,
        direction="backward",
        stages=stages,
        tasks=tasks[order],
        band_ptr=np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64),
        bands=bands[band_order],
        transfers=transfers[np.lexsort((transfers[:, START], transfers[:, OWNER], transfers[:, WHAT], transfers[:, POST]))],
        kept=kept,
        buffer_bound=bound,
    )


def _first_and_last(stages: int, tasks: np.ndarray, task_of_band: np.ndarray, bands: np.ndarray) -> tuple[np.ndarray, ...]:
    """The work on own rows cut in two: one half while the first inputs travel, the other while the last gradients go home.

    Where the forward plan has cut a rank's work so, it stays.
    """
    own = (tasks[:, RANK] == tasks[:, Q_OWNER]) & (tasks[:, RANK] == tasks[:, KV_OWNER])
    already = np.isin(tasks[:, RANK], tasks[own & (tasks[:, STAGE] == 0), RANK])
    local = own & (tasks[:, STAGE] == stages - 1) & ~already
    middle = (tasks[:, Q_START] + tasks[:, Q_STOP]) // 2
    early, late = tasks.copy(), tasks[local]
    early[local, STAGE], early[local, Q_STOP], late[:, Q_START] = 0, middle[local], middle[local]
    cut = np.where(local, middle - tasks[:, Q_START], INF)[task_of_band]
    before = clip(bands, -INF, cut, -INF, INF)
    late_bands = np.flatnonzero(local[task_of_band])
    after = clip(bands[late_bands], cut[late_bands], INF, -INF, INF)
    after = shift(after, -cut[late_bands], 0)
    late_number = len(tasks) - 1 + np.cumsum(local)[task_of_band[late_bands]]
    some, some_late = before[:, Q0] < before[:, Q1], after[:, Q0] < after[:, Q1]
    task_of_band = np.concatenate([task_of_band[some], late_number[some_late]])
    return np.concatenate([early, late]), task_of_band, np.concatenate([before[some], after[some_late]])


def _neighbourhood(plan: Plan, rank: int) -> Plan:
    """The tasks and transfers of a rank, of all that it exchanges rows with, and of its own rows wherever they go.

    Its part of the transposition depends on no more: it sends again what it passed on, or its own rows.
    """
    t = plan.transfers
    near = np.zeros(plan.world, dtype=bool)
    near[rank] = True
    near[t[t[:, SRC] == rank, DST]] = near[t[t[:, DST] == rank, SRC]] = True
    tasks = near[plan.tasks[:, RANK]] | (plan.tasks[:, Q_OWNER] == rank) | (plan.tasks[:, KV_OWNER] == rank)
    counts = np.diff(plan.band_ptr)
    return replace(
        plan,
        tasks=plan.tasks[tasks],
        band_ptr=np.concatenate([[0], np.cumsum(counts[tasks])]).astype(np.int64),
        transfers=t[near[t[:, SRC]] | near[t[:, DST]] | (t[:, OWNER] == rank)],
    )


def _reversed(transfers: np.ndarray, stages: int, pooled: bool) -> np.ndarray:
    """Gradients come back the way that their inputs went; dout goes out the way that out came home."""
    out = transfers.copy()
    out[:, SRC], out[:, DST] = transfers[:, DST], transfers[:, SRC]
    out[:, POST], out[:, NEED] = stages - transfers[:, NEED], stages - transfers[:, POST]
    for what, gradient in GRADIENT_OF.items():
        out[transfers[:, WHAT] == what, WHAT] = gradient
    dout = out[:, WHAT] == What.DOUT
    if pooled:
        inputs, sums = (column(out[:, end], out[:, OWNER]) for column, end in ((input_lane, SRC), (home_lane, DST)))
        out[:, LANE] = np.where(dout, inputs, sums)
    else:  # long hops block no short ones
        out[~dout & (out[:, NEED] - out[:, POST] == 1), LANE] = HOME_LANE
    return out


def _longest_hops(world: int, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each owner the boundaries that the longest hop of its rows takes, and that hop's lane."""
    hop, lane = np.ones(world, dtype=np.int64), np.zeros(world, dtype=np.int64)
    order = np.argsort(inputs[:, NEED] - inputs[:, POST], kind="stable")
    hop[inputs[order, OWNER]] = (inputs[:, NEED] - inputs[:, POST])[order]
    lane[inputs[order, OWNER]] = inputs[order, LANE]
    return hop, lane


def _with_dout(back: np.ndarray, kept: np.ndarray, world: int) -> np.ndarray:
    """Queries that are not kept travel once more, with the upstream gradients of the same rows."""
    queries = back[back[:, WHAT] == What.DOUT]
    held = kept[kept[:, 4] == What.Q]
    number = np.arange(len(queries))
    # Each transfer is a key of its own; what its receiver keeps of the owner's rows is cut out of it.
    pair, pair_held = queries[:, DST] * world + queries[:, OWNER], held[:, 0] * world + held[:, 1]
    order = np.argsort(pair_held, kind="stable")
    first, last = (np.searchsorted(pair_held[order], pair, side=side) for side in ("left", "right"))
    index, at = expand(first, last)
    at = order[at]
    left = subtract(Intervals(number, queries[:, START], queries[:, STOP]), Intervals(number[index], held[at, 2], held[at, 3]))
    out = queries[left.key]
    out[:, START], out[:, STOP], out[:, WHAT] = left.start, left.stop, What.Q
    return out


def _inputs(
    plan: Plan, inputs: np.ndarray, keep: Keep, stages: int, longest: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(transfers that bring q and kv once more, the table of kept runs)."""
    piece, start, stop, use = _pieces_with_last_use(plan, inputs)
    row = inputs[piece]
    kept = {"all": np.ones(len(row), bool), "last": use == plan.stages - 1, "none": np.zeros(len(row), bool)}[keep]
    again = ~kept & (row[:, WHAT] == What.KV)
    if plan.pooled:
        resent = _resent_in_trees(plan, row[again], start[again], stop[again], use[again])
    else:
        resent = _resent_in_chains(row, start, stop, use, again, stages, longest)
    # Rows that are used at different times are runs of their own: they are different visits, as in the forward pass.
    group, first = groups(*(c[kept] for c in (row[:, DST], row[:, OWNER], row[:, WHAT], use)))
    runs = union(Intervals(group, start[kept], stop[kept]))
    rank, owner, what = (row[kept][first][:, c] for c in (DST, OWNER, WHAT))
    table = np.stack([rank[runs.key], owner[runs.key], runs.start, runs.stop, what[runs.key]], 1)
    return resent, table


def _resent_in_chains(
    row: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    use: np.ndarray,
    again: np.ndarray,
    stages: int,
    longest: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Those pieces once more that ``again`` marks: from the rank to which they were passed on, else straight from their owner."""
    relay = _relay(row, start, use)
    passed = relay >= 0
    need = stages - 1 - np.where(passed, row[relay, POST], use)
    hop, long_lane = (column[row[:, OWNER]] for column in longest)
    far = ~passed & (hop > 1) & (use >= hop)  # straight from the owner, and it came over the longest hop
    ahead = np.where(passed, row[relay, NEED] - row[relay, POST], np.where(far, hop, 1))
    lane = np.where(passed, row[relay, LANE], np.where(far, long_lane, row[:, LANE]))
    columns = [np.where(passed, row[relay, DST], row[:, OWNER]), row[:, DST], row[:, OWNER], row[:, WHAT], lane, need]
    columns.append(np.maximum(need - ahead, 0))
    group, first = groups(*(c[again] for c in columns))
    src, dst, owner, what, lane, need, post = (c[again][first] for c in columns)
    runs = union(Intervals(group, start[again], stop[again]))
    g = runs.key
    return np.stack([src[g], dst[g], owner[g], runs.start, runs.stop, what[g], lane[g], post[g], need[g]], 1)


def _resent_in_trees(plan: Plan, row: np.ndarray, start: np.ndarray, stop: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Keys once more, on trees in which those stand next to the owner that need them first in the backward pass."""
    needs = Needs(row[:, DST], row[:, OWNER], start, stop, plan.stages - 1 - use)
    hops = relayed(needs, max(1, plan.quiet), plan.node_devices)
    what, lane = np.full_like(hops.src, What.KV), input_lane(hops.src, hops.owner)
    return np.stack([*hops[:5], what, lane, hops.post, hops.need], 1)


def _pieces_with_last_use(plan: Plan, inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Received runs cut where other transfers or tasks end: (transfer, start, stop, last forward stage that uses the piece)."""
    t, world = plan.tasks, plan.world
    arrivals = Intervals(inputs[:, WHAT] * world + inputs[:, OWNER], inputs[:, START], inputs[:, STOP])
    q_uses = Intervals(What.Q * world + t[:, Q_OWNER], t[:, Q_START], t[:, Q_STOP])
    kv_uses = Intervals(What.KV * world + t[:, KV_OWNER], t[:, KV_START], t[:, KV_STOP])
    (piece, start, stop), q_pieces, kv_pieces = cut(arrivals, q_uses, kv_uses)
    rank = np.concatenate([inputs[piece, DST], t[q_pieces[0], RANK], t[kv_pieces[0], RANK]])
    key = np.concatenate([arrivals.key[piece], q_uses.key[q_pieces[0]], kv_uses.key[kv_pieces[0]]])
    begin = np.concatenate([start, q_pieces[1], kv_pieces[1]])
    stage = np.concatenate([inputs[piece, NEED], t[q_pieces[0], STAGE], t[kv_pieces[0], STAGE]])
    number, first = groups(rank, key, begin)
    last = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(last, number, stage)
    return piece, start, stop, last[number[: len(piece)]]


def _relay(row: np.ndarray, start: np.ndarray, use: np.ndarray) -> np.ndarray:
    """For each received piece: the row with which it was passed on after its last use here, or -1."""
    n = len(row)
    place = np.concatenate([row[:, DST], row[:, SRC]])  # where the piece is needed; where a relay took it from
    number, first = groups(place, np.tile(row[:, WHAT], 2), np.tile(row[:, OWNER], 2), np.tile(start, 2))
    here, from_here = number[:n], number[n:]
    late_enough = np.full(len(first), -1, dtype=np.int64)
    last_use = np.full(len(first), -1, dtype=np.int64)
    last_use[here] = use
    valid = np.flatnonzero((row[:, SRC] != row[:, OWNER]) & (row[:, POST] >= last_use[from_here]))
    late_enough[from_here[valid]] = valid  # the last one in plan order, if several
    return late_enough[here]
