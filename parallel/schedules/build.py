"""What schedules share that compute every pair of shards on one rank: a forward plan from tasks, bands and transfers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from distattn.kernels.bands import K0, Q0, shift
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import KV_OWNER, KV_START, Q_OWNER, Q_START, Plan, no_kept


class PlacedBands(NamedTuple):
    """Bands in the rows of whole shards, and whose shards: int64 [n, 6], [n], [n]."""

    table: np.ndarray
    q_owner: np.ndarray
    kv_owner: np.ndarray


def forward_plan(
    name: str,
    layout: Layout,
    mask: Mask,
    stages: int,
    tasks: np.ndarray,
    bands: PlacedBands,
    transfers: np.ndarray,
    visiting: Literal["q", "kv"],
    buffer_bound: int,
    rank: int | None,
    quiet: int = 0,
) -> Plan:
    """The plan in which each band goes to the one task that holds its rows.

    Args:
        tasks: int64 [n, 8], in the order of execution. Those of a pair of shards have disjoint runs on the ``visiting`` side.
        bands: each inside the runs of one task.
        transfers: int64 [t, 9], in plan order.
        rank: the rank whose bands these are, None for all.
    """
    begin, first_row = (Q_START, Q0) if visiting == "q" else (KV_START, K0)
    world, span = layout.world, int(layout.rows_all.max(initial=0)) + 1
    key = (tasks[:, Q_OWNER] * world + tasks[:, KV_OWNER]) * span + tasks[:, begin]
    order = np.argsort(key, kind="stable")
    wanted = (bands.q_owner * world + bands.kv_owner) * span + bands.table[:, first_row]
    task = order[np.searchsorted(key[order], wanted, side="right") - 1]
    by_task = np.argsort(task, kind="stable")
    task = task[by_task]
    return Plan(
        name=name,
        direction="forward",
        layout=layout,
        mask=mask,
        stages=stages,
        tasks=tasks,
        band_ptr=np.concatenate([[0], np.cumsum(np.bincount(task, minlength=len(tasks)))]).astype(np.int64),
        bands=shift(bands.table[by_task], -tasks[task, Q_START], -tasks[task, KV_START]),
        transfers=transfers,
        kept=no_kept(),
        buffer_bound=buffer_bound,
        quiet=quiet,
        bands_of=rank,
    )


def local_tasks(layout: Layout) -> np.ndarray:
    """A task in stage 0 for every rank that has rows, on its own queries and keys; int64 [ranks, 8]."""
    rank = np.flatnonzero(layout.rows_all)
    rows, zero = layout.rows_all[rank], np.zeros_like(rank)
    return np.stack([zero, rank, rank, zero, rows, rank, zero, rows], 1)


def nodes_of(world: int, devices: int) -> int:
    """Nodes of ``devices`` ranks each.

    Raises:
        ValueError: where ``devices`` does not divide the world.
    """
    if not isinstance(devices, (int, np.integer)) or devices < 1 or world % devices:
        fitting = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(
            f"{world} ranks were asked for in nodes of devices = {devices!r} ranks each. "
            f"Pass a number of devices a node that divides {world}: {', '.join(map(str, fitting))}."
        )
    return world // int(devices)


def check_rank(rank: int | None, world: int) -> None:
    """Raises ValueError for a rank that the layout does not have."""
    if rank is not None and not 0 <= rank < world:
        raise ValueError(f"The plan of rank {rank} was asked for on a layout of {world} ranks. Pass 0 to {world - 1}, or None.")
