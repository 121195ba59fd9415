"""Ring attention: keys travel from neighbour to neighbour, the owner of the queries computes; or the other way round.

Liu et al., "Ring Attention with Blockwise Transformers"; on a zigzag or striped layout (Brandon et al., "Striped
Attention") the same hops give balanced causal work. Pruned: a row stops at the last rank that needs it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from distattn.parallel.intervals import Intervals, subtract
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import HOME_LANE, KV_START, OWNER, POST, Q_START, STAGE, START, WHAT, Plan, What
from distattn.parallel.schedules.build import PlacedBands, forward_plan, local_tasks
from distattn.parallel.schedules.chain import GRAIN, Runs, chain_runs

LANE = 0


def ring(layout: Layout, mask: Mask, rank: int | None = None, grain: int = GRAIN) -> Plan:
    """The ring schedule of any layout: in stage t rank r works on keys of rank r - t.

    Volume: at most P - 1 shards of keys and values out of each rank; memory: two runs of received keys.

    Args:
        rank: make the bands of this rank only, and of the tables what its view and its transposition depend on.
        grain: rows; what nobody needs is sent along where it is a shorter gap than this.
    """
    runs, stages = _around(_chain(layout, mask, grain, True), layout.world, rank)
    transfers = _hops(layout.world, runs, What.KV)
    return _plan("ring", layout, mask, runs, rank, key_side=True, transfers=transfers, stages=stages)


def query_ring(layout: Layout, mask: Mask, rank: int | None = None, grain: int = GRAIN) -> Plan:
    """The ring turned round: in stage t rank r works on queries of rank r - t with its own keys.

    Partial results follow their queries one stage behind, merged on every rank, and the last one sends them home. Its
    transposition moves q, dout, lse, delta and dq: H (8 D + 8) bytes a row and hop, against 12 H_kv D of ring attention.
    """
    world = layout.world
    runs, stages = _around(_chain(layout, mask, grain, False), world, rank)
    queries, partials = _hops(world, runs, What.Q), _hops(world, runs, What.OUT)
    last = _last_hops(runs, world)
    home = _hops(world, last, What.OUT)
    home[:, 0], home[:, 1] = home[:, 1], last.owner
    for out, late in ((partials, 1), (home, 2)):  # hop t takes the partials of hop t - 1
        out[:, 6], out[:, 7], out[:, 8] = HOME_LANE, out[:, 7] + late, out[:, 8] + late
    partials = partials[runs.hop > 1]
    transfers = np.concatenate([queries, partials, home])
    return _plan("query_ring", layout, mask, runs, rank, key_side=False, transfers=transfers, stages=stages + (stages > 1))


@lru_cache(maxsize=1)
def _chain(layout: Layout, mask: Mask, grain: int, key_side: bool) -> Runs:
    """Kept for the views of several ranks, which are made one after the other."""
    return chain_runs((mask.bands if key_side else mask.bands.transpose()).table, layout, grain)


def _around(runs: Runs, world: int, rank: int | None) -> tuple[Runs, int]:
    """(runs that the view of a rank and its transposition depend on, stages of the ring)."""
    stages = int(runs.hop.max(initial=0)) + 1
    if rank is None:
        return runs, stages
    place = (runs.owner + runs.hop - rank) % world
    near = (place <= 2) | (place == world - 1) | (runs.owner == rank) | (runs.hop == stages - 1)
    return Runs(*(column[near] for column in runs)), stages


def _hops(world: int, runs: Runs, what: What) -> np.ndarray:
    owner, t, start, stop = runs
    columns = [(owner + t - 1) % world, (owner + t) % world, owner, start, stop, np.full_like(t, what), np.full_like(t, LANE)]
    return np.stack([*columns, t - 1, t], 1)


def _plan(
    name: str, layout: Layout, mask: Mask, runs: Runs, rank: int | None, key_side: bool, transfers: np.ndarray, stages: int
) -> Plan:
    """Tasks: every rank has one for its own rows and one for each run that reaches it."""
    world, rows = layout.world, layout.rows_all
    at, zero = (runs.owner + runs.hop) % world, np.zeros_like(runs.owner)
    resident, visiting = (at, zero, rows[at]), (runs.owner, runs.start, runs.stop)
    sides = (*resident, *visiting) if key_side else (*visiting, *resident)
    tasks = np.concatenate([local_tasks(layout), np.stack([runs.hop, at, *sides], 1)])
    start = KV_START if key_side else Q_START
    tasks = tasks[np.lexsort((tasks[:, start], tasks[:, start - 1], tasks[:, STAGE]))]
    here, there = (x.ravel() for x in np.meshgrid(np.arange(world) if rank is None else [rank], np.arange(world), indexing="ij"))
    q_rank, kv_rank = (here, there) if key_side else (there, here)
    table, pair = local_bands(mask, layout, q_rank, kv_rank)
    bands = PlacedBands(table, q_rank[pair], kv_rank[pair])
    transfers = transfers[np.lexsort([transfers[:, c] for c in (START, OWNER, WHAT, POST)])]
    bound = (2 if key_side else 4) * int(rows.max(initial=0))
    visits: Literal["q", "kv"] = "kv" if key_side else "q"
    quiet = int(not key_side and stages > 1)
    return forward_plan(name, layout, mask, stages, tasks, bands, transfers, visits, bound, rank, quiet)


def _last_hops(runs: Runs, world: int) -> Runs:
    """The rows of each run that no later hop carries."""
    ends = subtract(
        Intervals(runs.owner * world + runs.hop, runs.start, runs.stop),
        Intervals(runs.owner * world + runs.hop - 1, runs.start, runs.stop),
    )
    return Runs(ends.key // world, ends.key % world, ends.start, ends.stop)
