"""Gather: every rank fetches exactly the keys that its bands touch, straight from their owners, in a few parts.

Llama 3's all-gather context parallelism (Grattafiori et al., "The Llama 3 Herd of Models", section 3.3.2) without the rows
that nobody asked for, and without waiting for all of them: part s travels while the keys of part s - 1 are worked on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import INF, K0, K1, Q0, Q1, areas, clip
from distattn.parallel.intervals import Intervals, expand, groups, union
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import KV_OWNER, KV_START, Q_OWNER, RANK, STAGE, Plan, What
from distattn.parallel.schedules.build import PlacedBands, check_rank, forward_plan, local_tasks

LANE = 1
SAMPLE = 8  # ranks that are asked what they need, to decide where all cut
GRAIN = 128  # rows: kernels slow down on less
PARTS = (1, 2, 4, 8)
# In (query, key) pairs that a device computes meanwhile: 32:8 heads of 128 in bf16, figures of configs/clusters/h200.yaml. Who
# describes other heads or devices has them priced ("auto").
PAIRS_A_ROW = 330  # one key row from a device of the same node
PAIRS_A_ROW_FAR = 2600  # from another node
PAIRS_A_PART = 1_600_000  # a stage, a launch and a message more


class _Runs(NamedTuple):
    """Rows [start, stop) of ``owner`` that ``rank`` needs in part ``part``; all int64 [n]."""

    rank: np.ndarray
    owner: np.ndarray
    part: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class _Sampled(NamedTuple):
    """What some ranks need of others, and their pairs with own and with others' keys; ``runs`` by distance of the owner."""

    runs: Intervals
    rows: np.ndarray
    own: np.ndarray
    foreign: np.ndarray


def gather(layout: Layout, mask: Mask, stages: int | None = 1, rank: int | None = None, pairs_a_row: float = PAIRS_A_ROW) -> Plan:
    """The gather schedule of any layout: own keys in stage 0, then ``stages`` parts of the others', nearest owner first.

    Rank r takes the keys of rank r - 1 first, then those of r - 2, and so on, so that no owner serves all ranks at once.
    All ranks cut at the same place (a distance, and a row of the owner at it); the places split what the neediest of a few
    sampled ranks receives into equal numbers of rows.

    Volume: the rows that bands touch, each once; P - 1 shards for a full mask. Memory: two parts, and the shards that a part
    boundary cuts.

    Args:
        stages: None: as many parts as hide what travels behind the work, and no more than that is worth.
        rank: make only what this rank computes, sends and receives, at a cost linear in that.
        pairs_a_row: pairs that are computed while one row travels.

    Raises:
        ValueError: for less than one part.
    """
    if stages is not None and (not isinstance(stages, (int, np.integer)) or stages < 1):
        raise ValueError(f"gather was asked for in stages = {stages!r} received parts. Pass a whole number of 1 or more.")
    world = layout.world
    check_rank(rank, world)
    sampled = None if stages == 1 or world == 1 else _sampled(layout, mask)
    if stages is None:
        stages = 1 if sampled is None else _parts_by_cost(sampled, pairs_a_row)
    cuts = _cuts(layout, sampled, int(stages))
    here, there = (x.ravel() for x in np.meshgrid(np.arange(world) if rank is None else [rank], np.arange(world), indexing="ij"))
    table, pair = local_bands(mask, layout, here, there)
    q_owner, kv_owner = here[pair], there[pair]
    runs = [_touched(cuts, layout, q_owner, kv_owner, table[:, K0], table[:, K1])]
    if rank is not None:
        runs.append(_asked_of(cuts, layout, mask, rank))
    needed = _Runs(*(np.concatenate(column) for column in zip(*runs, strict=True)))
    tasks = _tasks(layout, needed)
    index, _, start, stop = _split(cuts, layout, q_owner, kv_owner, table[:, K0], table[:, K1])
    bands = PlacedBands(clip(table[index], 0, INF, start, stop), q_owner[index], kv_owner[index])
    bound = _bound(needed, world)
    return forward_plan(
        "gather", layout, mask, 1 + int(stages) * (world > 1), tasks, bands, _transfers(needed, world), "kv", bound, rank
    )


def _parts_by_cost(sampled: _Sampled, pairs_a_row: float) -> int:
    """The parts, 1, 2, 4 or 8, with which the neediest of the sampled ranks is done first; the same on all ranks.

    Part 1 travels behind the work on own keys, each later one behind the work on the part before.
    """
    at = int(sampled.rows.argmax())
    own, foreign, travel = sampled.own[at], sampled.foreign[at], sampled.rows[at] * pairs_a_row

    def lasts(parts: int) -> float:
        behind = max(foreign, travel) / parts
        return max(own, travel / parts) + (parts - 1) * behind + foreign / parts + parts * PAIRS_A_PART

    return min(PARTS, key=lasts)


def _sampled(layout: Layout, mask: Mask) -> _Sampled:
    world, span = layout.world, _span(layout)
    sample = np.unique(np.linspace(0, world - 1, min(world, SAMPLE)).astype(np.int64))
    here, there = (x.ravel() for x in np.meshgrid(np.arange(len(sample)), np.arange(world), indexing="ij"))
    table, pair = local_bands(mask, layout, sample[here], there)
    foreign = (sample[here] != there)[pair]
    at = ((sample[here] - there) % world - 1)[pair] * span
    runs = union(Intervals(here[pair][foreign], (at + table[:, K0])[foreign], (at + table[:, K1])[foreign]))
    rows = np.bincount(runs.key, weights=runs.rows, minlength=len(sample)).astype(np.int64)
    pairs = areas(table).astype(np.float64)
    own, others = (np.bincount(here[pair][side], pairs[side], minlength=len(sample)) for side in (~foreign, foreign))
    return _Sampled(runs, rows, own, others)


def _cuts(layout: Layout, sampled: _Sampled | None, stages: int) -> np.ndarray:
    """Where one part ends and the next begins, as (distance - 1) * span + row; int64 [stages - 1], rising."""
    world, span = layout.world, _span(layout)
    if sampled is None or stages == 1:
        return np.zeros(0, dtype=np.int64)
    runs, rows = sampled.runs, sampled.rows
    share = np.arange(1, stages)
    if not rows.any():
        return share * (world - 1) // stages * span
    neediest = runs.key == rows.argmax()
    begin, before = runs.start[neediest], np.cumsum(runs.rows[neediest]) - runs.rows[neediest]
    wanted = share * rows.max() // stages
    run = np.searchsorted(before, wanted, side="right") - 1
    cut = begin[run] + wanted - before[run]
    row = cut % span
    whole = np.minimum((row + GRAIN // 2) // GRAIN * GRAIN, span)
    return cut - row + whole


def _split(
    cuts: np.ndarray, layout: Layout, rank: np.ndarray, owner: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Rows [start, stop) of ``owner`` for ``rank`` cut at the ends of parts: (index, part, start, stop); own rows stay whole."""
    base = ((rank - owner) % layout.world - 1) * _span(layout)
    first = np.searchsorted(cuts, base + start, side="right")
    last = np.searchsorted(cuts, base + stop - 1, side="right")
    index, part = expand(np.where(rank == owner, 0, first), np.where(rank == owner, 1, last + 1))
    edges = np.concatenate([[np.iinfo(np.int64).min], cuts, [np.iinfo(np.int64).max]])
    own, base = (rank == owner)[index], base[index]
    begin = np.where(own, start[index], np.maximum(base + start[index], edges[part]) - base)
    end = np.where(own, stop[index], np.minimum(base + stop[index], edges[part + 1]) - base)
    some = begin < end  # parts may be empty where two cuts fall together
    return index[some], part[some], begin[some], end[some]


def _touched(cuts: np.ndarray, layout: Layout, rank: np.ndarray, owner: np.ndarray, start: np.ndarray, stop: np.ndarray) -> _Runs:
    """Maximal runs of foreign rows from those of single bands."""
    foreign, world = rank != owner, layout.world
    runs = union(Intervals((rank * world + owner)[foreign], start[foreign], stop[foreign]))
    rank, owner = runs.key // world, runs.key % world
    index, part, start, stop = _split(cuts, layout, rank, owner, runs.start, runs.stop)
    return _Runs(rank[index], owner[index], part, start, stop)


def _asked_of(cuts: np.ndarray, layout: Layout, mask: Mask, owner: int) -> _Runs:
    """What all other ranks need of ``owner``: the mask with queries and keys exchanged, seen from this one rank."""
    exchanged = Mask(mask.bands.transpose(), mask.n_tokens, mask.name)
    table, rank = local_bands(exchanged, layout, owner, np.arange(layout.world))
    return _touched(cuts, layout, rank, np.full_like(rank, owner), table[:, Q0], table[:, Q1])


def _tasks(layout: Layout, runs: _Runs) -> np.ndarray:
    rows, zero = layout.rows_all[runs.rank], np.zeros_like(runs.rank)
    foreign = np.stack([runs.part + 1, runs.rank, runs.rank, zero, rows, runs.owner, runs.start, runs.stop], 1)
    tasks = np.concatenate([local_tasks(layout), foreign])
    distance = (tasks[:, Q_OWNER] - tasks[:, KV_OWNER]) % layout.world
    return tasks[np.lexsort((tasks[:, KV_START], distance, tasks[:, RANK], tasks[:, STAGE]))]


def _transfers(runs: _Runs, world: int) -> np.ndarray:
    what, lane = np.full_like(runs.part, What.KV), np.full_like(runs.part, LANE)
    table = np.stack([runs.owner, runs.rank, runs.owner, runs.start, runs.stop, what, lane, runs.part, runs.part + 1], 1)
    return table[np.lexsort((runs.start, runs.rank, (runs.rank - runs.owner) % world, runs.part))]


def _bound(runs: _Runs, world: int) -> int:
    """Rows that a rank holds at most: a shard stays from the posting of its first part to the stage that uses its last."""
    number, first = groups(runs.rank, runs.owner)
    rows = np.bincount(number, weights=runs.stop - runs.start, minlength=len(first)).astype(np.int64)
    begin, end = np.full(len(first), np.iinfo(np.int64).max), np.zeros(len(first), dtype=np.int64)
    np.minimum.at(begin, number, runs.part)
    np.maximum.at(end, number, runs.part + 2)
    held = np.zeros((world, int(end.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(held, (runs.rank[first], begin), rows)
    np.add.at(held, (runs.rank[first], end), -rows)
    return int(np.cumsum(held, axis=1).max(initial=0))


def _span(layout: Layout) -> int:
    return int(layout.rows_all.max(initial=0)) + 1
