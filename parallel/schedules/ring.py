"""Ring attention: keys travel from neighbour to neighbour, the owner of the queries computes; or the other way round.

Liu et al., "Ring Attention with Blockwise Transformers"; on a zigzag or striped layout (Brandon et al., "Striped
Attention") the same hops give balanced causal work. Pruned: a row stops at the last rank that needs it.
"""

from __future__ import annotations

import numpy as np

from distattn.kernels.bands import K0, Q0, shift
from distattn.parallel.intervals import Intervals, subtract
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import HOME_LANE, KV_START, Q_START, Plan, What, no_kept
from distattn.parallel.schedules.chain import GRAIN, Runs, chain_runs

LANE = 0


def ring(layout: Layout, mask: Mask, rank: int | None = None, grain: int = GRAIN) -> Plan:
    """The ring schedule of any layout: in stage t rank r works on keys of rank r - t.

    Volume: at most P - 1 shards of keys and values out of each rank; memory: two runs of received keys.

    Args:
        rank: make the bands of this rank only, and of the tables what its view and its transposition depend on.
        grain: rows; what nobody needs is sent along where it is a shorter gap than this.
    """
    runs, stages = _around(chain_runs(mask.bands.table, layout, grain), layout.world, rank)
    transfers = _hops(layout.world, runs, What.KV)
    return _plan("ring", layout, mask, runs, rank, key_side=True, transfers=transfers, stages=stages)


def query_ring(layout: Layout, mask: Mask, rank: int | None = None, grain: int = GRAIN) -> Plan:
    """The ring turned round: in stage t rank r works on queries of rank r - t with its own keys.

    Partial results follow their queries one stage behind, merged on every rank, and the last one sends them home. Its
    transposition moves q, dout, lse, delta and dq: H (8 D + 8) bytes a row and hop, against 12 H_kv D of ring attention.
    """
    world = layout.world
    runs, stages = _around(chain_runs(mask.bands.transpose().table, layout, grain), world, rank)
    queries, partials = _hops(world, runs, What.Q), _hops(world, runs, What.OUT)
    last = _last_hops(runs, world)
    home = _hops(world, last, What.OUT)
    home[:, 0], home[:, 1] = home[:, 1], last.owner
    for out, late in ((partials, 1), (home, 2)):  # hop t takes the partials of hop t - 1
        out[:, 6], out[:, 7], out[:, 8] = HOME_LANE, out[:, 7] + late, out[:, 8] + late
    partials = partials[runs.hop > 1]
    transfers = np.concatenate([queries, partials, home])
    return _plan("query_ring", layout, mask, runs, rank, key_side=False, transfers=transfers, stages=stages + (stages > 1))


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
    own = np.flatnonzero(rows)
    owner, hop = np.concatenate([own, runs.owner]), np.concatenate([np.zeros_like(own), runs.hop])
    start, stop = np.concatenate([np.zeros_like(own), runs.start]), np.concatenate([rows[own], runs.stop])
    at = (owner + hop) % world
    resident, visiting = (at, np.zeros_like(at), rows[at]), (owner, start, stop)
    sides = (*resident, *visiting) if key_side else (*visiting, *resident)
    tasks = np.stack([hop, at, *sides], 1)
    order = np.lexsort((start, owner, hop))
    tasks = tasks[order]
    here, there = (x.ravel() for x in np.meshgrid(np.arange(world) if rank is None else [rank], np.arange(world), indexing="ij"))
    bands, pair = local_bands(mask, layout, here, there) if key_side else local_bands(mask, layout, there, here)
    hops = (here[pair] - there[pair]) % world
    first_row = K0 if key_side else Q0
    task = _containing(tasks, KV_START if key_side else Q_START, world, hops, there[pair], bands[:, first_row])
    by_task = np.argsort(task, kind="stable")
    task, bands = task[by_task], bands[by_task]
    bands = shift(bands, 0, -tasks[task, KV_START]) if key_side else shift(bands, -tasks[task, Q_START], 0)
    key = [transfers[:, c] for c in (3, 2, 5, 7)]
    return Plan(
        name=name,
        direction="forward",
        layout=layout,
        mask=mask,
        stages=stages,
        tasks=tasks,
        band_ptr=np.concatenate([[0], np.cumsum(np.bincount(task, minlength=len(tasks)))]).astype(np.int64),
        bands=bands,
        transfers=transfers[np.lexsort(key)],
        kept=no_kept(),
        buffer_bound=(2 if key_side else 4) * int(rows.max(initial=0)),
        bands_of=rank,
    )


def _containing(tasks: np.ndarray, start: int, world: int, hop: np.ndarray, owner: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The task of each (hop, owner of the visiting rows, row): the last one that begins at or before that row."""
    span = int(max(tasks[:, start].max(initial=0), row.max(initial=0))) + 1
    keys = (tasks[:, 0] * world + tasks[:, start - 1]) * span + tasks[:, start]
    return np.searchsorted(keys, (hop * world + owner) * span + row, side="right") - 1


def _last_hops(runs: Runs, world: int) -> Runs:
    """The rows of each run that no later hop carries."""
    ends = subtract(
        Intervals(runs.owner * world + runs.hop, runs.start, runs.stop),
        Intervals(runs.owner * world + runs.hop - 1, runs.start, runs.stop),
    )
    return Runs(ends.key // world, ends.key % world, ends.start, ends.stop)
