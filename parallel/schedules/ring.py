"""Ring attention: keys travel from neighbour to neighbour, the owner of the queries computes.

Liu et al., "Ring Attention with Blockwise Transformers"; on a zigzag or striped layout (Brandon et al., "Striped
Attention") the same hops give balanced causal work. Pruned: a key row stops at the last rank that needs it.
"""

from __future__ import annotations

import numpy as np

from distattn.kernels.bands import K0, K1, shift
from distattn.parallel.intervals import Intervals, cut, expand, groups
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import KV_START, Plan, What, no_kept

LANE = 0


def ring(layout: Layout, mask: Mask) -> Plan:
    """The ring schedule of any layout: in stage t rank r works on keys of rank r - t.

    Volume: at most P - 1 shards of keys and values out of each rank; memory: two runs of received keys.
    """
    world = layout.world
    hop, rank = (x.ravel() for x in np.meshgrid(np.arange(world), np.arange(world), indexing="ij"))
    owner = (rank - hop) % world
    bands, pair = local_bands(mask, layout, rank, owner)
    runs = _runs(owner[pair], hop[pair], bands[:, K0], bands[:, K1], world)
    task_of_band, tasks = _tasks(layout, runs, bands, owner[pair], hop[pair])
    order = np.argsort(task_of_band, kind="stable")
    task_of_band, bands = task_of_band[order], bands[order]
    bands = shift(bands, 0, -tasks[task_of_band, KV_START])
    key, t, start, stop = runs
    transfers = np.stack(
        [(key + t - 1) % world, (key + t) % world, key, start, stop, np.full_like(t, What.KV), np.full_like(t, LANE), t - 1, t], 1
    )
    return Plan(
        name="ring",
        direction="forward",
        layout=layout,
        mask=mask,
        stages=int(tasks[:, 0].max(initial=0)) + 1,
        tasks=tasks,
        band_ptr=np.concatenate([[0], np.cumsum(np.bincount(task_of_band, minlength=len(tasks)))]).astype(np.int64),
        bands=bands,
        transfers=transfers[np.lexsort((start, key, t))],
        kept=no_kept(),
        buffer_bound=2 * int(layout.rows_all.max(initial=0)),
    )


def _runs(owner: np.ndarray, hop: np.ndarray, k0: np.ndarray, k1: np.ndarray, world: int) -> tuple[np.ndarray, ...]:
    """What travels on hop t >= 1: (owner, t, start, stop), maximal runs of the rows that hop t or a later one needs."""
    foreign = hop > 0
    wanted = Intervals(owner[foreign], k0[foreign], k1[foreign])
    [(index, start, stop)] = cut(wanted)
    number, first = groups(wanted.key[index], start)
    last_hop = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(last_hop, number, hop[foreign][index])
    key, start, stop = wanted.key[index][first], start[first], stop[first]
    touches = np.zeros(len(first) + 1, dtype=bool)  # touches[c]: cell c begins where cell c - 1 of the same owner ends
    touches[1:-1] = (key[1:] == key[:-1]) & (start[1:] == stop[:-1])
    before = np.where(touches[:-1], np.concatenate([[0], last_hop])[:-1], 0)
    after = np.where(touches[1:], np.concatenate([last_hop, [0]])[1:], 0)
    opening, t = expand(before + 1, last_hop + 1)
    closing, t_closing = expand(after + 1, last_hop + 1)
    opened, closed = np.lexsort((opening, t, key[opening])), np.lexsort((closing, t_closing, key[closing]))
    opening, closing = opening[opened], closing[closed]
    return key[opening], t[opened], start[opening], stop[closing]


def _tasks(
    layout: Layout, runs: tuple[np.ndarray, ...], bands: np.ndarray, owner: np.ndarray, hop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(task of each band, task table): a task per rank for its own keys and one for each received run that it uses."""
    world = layout.world
    key, t, start, stop = runs
    span = int(layout.rows_all.max(initial=0)) + 1
    run = np.searchsorted((key * world + t) * span + start, (owner * world + hop) * span + bands[:, K0], side="right") - 1
    local = hop == 0
    task_key = np.where(local, owner, world + run)  # local tasks first, then by run
    number, first = groups(np.where(local, 0, hop), task_key)
    o, t_task, r = owner[first], hop[first], run[first]
    rank = (o + t_task) % world
    k_start = np.where(t_task == 0, 0, start[r] if len(start) else 0)
    k_stop = np.where(t_task == 0, layout.rows_all[o], stop[r] if len(stop) else 0)
    tasks = np.stack([t_task, rank, rank, np.zeros_like(rank), layout.rows_all[rank], o, k_start, k_stop], 1)
    return number, tasks
