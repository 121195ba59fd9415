"""Ring attention: keys travel from neighbour to neighbour, the owner of the queries computes; or the other way round.

Liu et al., "Ring Attention with Blockwise Transformers"; on a zigzag or striped layout (Brandon et al., "Striped
Attention") the same hops give balanced causal work. Pruned: a row stops at the last rank that needs it. In several laps
the ring goes round with a part of every shard at a time, and a rank holds that much less of other ranks' rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from distattn.kernels.bands import INF, K0, K1, Q0, Q1, clip
from distattn.parallel.intervals import Intervals, subtract
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import HOME_LANE, KV_START, OWNER, POST, Q_START, STAGE, START, WHAT, Plan, What
from distattn.parallel.schedules.build import PlacedBands, forward_plan, local_tasks
from distattn.parallel.schedules.chain import GRAIN, Runs, chain_runs
from distattn.parallel.schedules.laps import Parts, lap_parts

LANE = 0


def ring(layout: Layout, mask: Mask, rank: int | None = None, grain: int = GRAIN, laps: int = 1) -> Plan:
    """The ring schedule of any layout: in stage t rank r works on keys of rank r - t.

    Volume: at most P - 1 shards of keys and values out of each rank; memory: two runs of received keys.

    Args:
        rank: make the bands of this rank only, and of the tables what its view and its transposition depend on.
        grain: rows; what nobody needs is sent along where it is a shorter gap than this.
        laps: rounds of the ring, each with its part of every shard: as many times the stages for that fraction of the memory.
    """
    parts = lap_parts(layout, laps)
    runs, stages = _around(_in_laps(_chain(layout, mask, grain, True), parts), layout.world, rank)
    transfers = _hops(layout.world, runs, What.KV)
    return _plan("ring", layout, mask, runs, rank, key_side=True, transfers=transfers, stages=stages, parts=parts)


def query_ring(layout: Layout, mask: Mask, rank: int | None = None, grain: int = GRAIN, laps: int = 1) -> Plan:
    """The ring turned round: in stage t rank r works on queries of rank r - t with its own keys.

    Partial results follow their queries one stage behind, merged on every rank, and the last one sends them home. Its
    transposition moves q, dout, lse, delta and dq: H (8 D + 8) bytes a row and hop, against 12 H_kv D of ring attention.
    """
    world = layout.world
    parts = lap_parts(layout, laps)
    runs, stages = _around(_in_laps(_chain(layout, mask, grain, False), parts), world, rank)
    queries, partials = _hops(world, runs, What.Q), _hops(world, runs, What.OUT)
    last = _last_hops(runs, world)
    home = _hops(world, last, What.OUT)
    home[:, 0], home[:, 1] = home[:, 1], last.owner
    for out, late in ((partials, 1), (home, 2)):  # hop t takes the partials of hop t - 1
        out[:, 6], out[:, 7], out[:, 8] = HOME_LANE, out[:, 7] + late, out[:, 8] + late
    partials = partials[runs.hop > 1]
    transfers = np.concatenate([queries, partials, home])
    stages += stages > 1
    return _plan("query_ring", layout, mask, runs, rank, key_side=False, transfers=transfers, stages=stages, parts=parts)


@lru_cache(maxsize=1)
def _chain(layout: Layout, mask: Mask, grain: int, key_side: bool) -> Runs:
    """Kept for the views of several ranks, which are made one after the other."""
    return chain_runs((mask.bands if key_side else mask.bands.transpose()).table, layout, grain)


class _Runs(NamedTuple):
    """As :class:`Runs`; rows that travel in a later lap arrive ``before`` stages later than in the first."""

    owner: np.ndarray
    hop: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    before: np.ndarray

    @property
    def stage(self) -> np.ndarray:
        """The stage in which the rank that a run reaches works on it."""
        return self.before + self.hop


def _in_laps(runs: Runs, parts: Parts) -> _Runs:
    """Every lap takes its part of the rows."""
    run, start, stop, lap = parts.cut(runs.owner, runs.start, runs.stop)
    return _Runs(runs.owner[run], runs.hop[run], start, stop, lap * int(runs.hop.max(initial=0)))


def _around(runs: _Runs, world: int, rank: int | None) -> tuple[_Runs, int]:
    """(runs that the view of a rank and its transposition depend on, stages of the ring)."""
    stages = int(runs.stage.max(initial=0)) + 1
    if rank is None:
        return runs, stages
    place = (runs.owner + runs.hop - rank) % world
    near = (place <= 2) | (place == world - 1) | (runs.owner == rank) | (runs.hop == runs.hop.max(initial=0))
    return _Runs(*(column[near] for column in runs)), stages


def _hops(world: int, runs: _Runs, what: What) -> np.ndarray:
    owner, t, start, stop, before = runs
    columns = [(owner + t - 1) % world, (owner + t) % world, owner, start, stop, np.full_like(t, what), np.full_like(t, LANE)]
    return np.stack([*columns, before + t - 1, before + t], 1)


def _plan(
    name: str,
    layout: Layout,
    mask: Mask,
    runs: _Runs,
    rank: int | None,
    key_side: bool,
    transfers: np.ndarray,
    stages: int,
    parts: Parts,
) -> Plan:
    """Tasks: every rank has one for its own rows and one for each run that reaches it."""
    world, rows = layout.world, layout.rows_all
    at, zero = (runs.owner + runs.hop) % world, np.zeros_like(runs.owner)
    resident, visiting = (at, zero, rows[at]), (runs.owner, runs.start, runs.stop)
    sides = (*resident, *visiting) if key_side else (*visiting, *resident)
    tasks = np.concatenate([local_tasks(layout), np.stack([runs.stage, at, *sides], 1)])
    start = KV_START if key_side else Q_START
    tasks = tasks[np.lexsort((tasks[:, start], tasks[:, start - 1], tasks[:, STAGE]))]
    here, there = (x.ravel() for x in np.meshgrid(np.arange(world) if rank is None else [rank], np.arange(world), indexing="ij"))
    q_rank, kv_rank = (here, there) if key_side else (there, here)
    table, pair = local_bands(mask, layout, q_rank, kv_rank)
    bands = _bands_in_laps(PlacedBands(table, q_rank[pair], kv_rank[pair]), parts, key_side)
    transfers = transfers[np.lexsort([transfers[:, c] for c in (START, OWNER, WHAT, POST)])]
    bound = (2 if key_side else 4) * parts.most_rows()
    visits: Literal["q", "kv"] = "kv" if key_side else "q"
    quiet = int(not key_side and stages > 1)
    return forward_plan(name, layout, mask, stages, tasks, bands, transfers, visits, bound, rank, quiet)


def _bands_in_laps(bands: PlacedBands, parts: Parts, key_side: bool) -> PlacedBands:
    """Bands cut where a part of the rows that travel ends; those of own rows, which do not, stay whole."""
    table, local = bands.table, bands.q_owner == bands.kv_owner
    owner, first, stop = (bands.kv_owner, K0, K1) if key_side else (bands.q_owner, Q0, Q1)
    band, low, high, _ = parts.cut(owner, table[:, first], np.where(local, table[:, first] + 1, table[:, stop]))
    low, high = np.where(local[band], 0, low), np.where(local[band], INF, high)
    table = clip(table[band], 0, INF, low, high) if key_side else clip(table[band], low, high, 0, INF)
    some = table[:, Q0] < table[:, Q1]
    return PlacedBands(table[some], bands.q_owner[band][some], bands.kv_owner[band][some])


def _last_hops(runs: _Runs, world: int) -> _Runs:
    """The rows of each run that no later hop carries."""
    span = int(runs.before.max(initial=0)) + 1
    lap = (runs.owner * span + runs.before) * world
    this, following = (Intervals(lap + runs.hop - back, runs.start, runs.stop) for back in (0, 1))
    ends = subtract(this, following)
    lap, hop = np.divmod(ends.key, world)
    return _Runs(lap // span, hop, ends.start, ends.stop, lap % span)
