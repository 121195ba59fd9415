"""Double ring: a ring of keys inside every node, and a ring over nodes that goes one step while the inner one goes round.

Gu et al., "LoongTrain" (Double-Ring-Attention). Every device hands its own keys to its counterpart in the next node, over
all network links at once and a whole inner ring ahead, so that the slow hop has the compute of ``devices`` stages to hide
behind, and a key row enters every node once. Pruned: rows go no further than to the last rank that needs them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import K0, K1
from distattn.parallel.intervals import Intervals, cut, expand, groups, union
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import KV_OWNER, KV_START, LANE, OWNER, POST, STAGE, START, Plan, What
from distattn.parallel.schedules.build import PlacedBands, check_rank, forward_plan, local_tasks, nodes_of

INNER_LANE, OUTER_LANE = 0, 1


class _Runs(NamedTuple):
    """Rows [start, stop) of ``owner`` that reach, ``outer`` nodes on, the device ``inner`` places on; all int64 [n]."""

    owner: np.ndarray
    outer: np.ndarray
    inner: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def double_ring(layout: Layout, mask: Mask, devices: int, rank: int | None = None) -> Plan:
    """The hierarchical ring: in stage n * devices + i rank (a, d) works on keys of rank (a - n, d - i).

    Ranks are (node, device) pairs, rank = node * devices + device. With one node, or one device a node, it is a ring.

    Volume: at most P / devices - 1 shards of keys and values out of each rank to another node, and P - P / devices to its
    neighbour inside. Memory: two runs of the inner ring and two of the outer one.

    Args:
        rank: make the bands of this rank only, and of the tables what its views need: P (devices + P / devices) pairs of
            shards are looked at instead of P^2.

    Raises:
        ValueError: where ``devices`` does not divide the world.
    """
    world, nodes = layout.world, nodes_of(layout.world, devices)
    check_rank(rank, world)
    here, there = _pairs(world, devices, rank)
    table, pair = local_bands(mask, layout, here, there)
    here, there = here[pair], there[pair]
    runs = _runs(here, there, table, nodes, devices)
    if rank is not None:  # of blocks that pass this rank's node on other devices no more is known than what the node needs
        at_home = (runs.owner // devices + runs.outer) % nodes == rank // devices
        known = at_home | (runs.owner % devices == rank % devices)
        runs = _Runs(*(column[known] for column in runs))
    tasks = np.concatenate([local_tasks(layout), _tasks(layout, runs, nodes, devices)])
    tasks = tasks[np.lexsort((tasks[:, KV_START], tasks[:, KV_OWNER], tasks[:, STAGE]))]
    mine = slice(None) if rank is None else here == rank
    bound = (min(2, nodes - 1) + min(2, devices - 1)) * int(layout.rows_all.max(initial=0))
    return forward_plan(
        "double_ring",
        layout,
        mask,
        world,
        tasks,
        PlacedBands(table[mine], here[mine], there[mine]),
        _transfers(runs, nodes, devices),
        "kv",
        bound,
        rank,
    )


def _pairs(world: int, devices: int, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(query rank, key rank) of the pairs of shards to look at."""
    q, kv = (x.ravel() for x in np.meshgrid(np.arange(world), np.arange(world), indexing="ij"))
    if rank is None:
        return q, kv
    own_node, own_column = q // devices == rank // devices, kv % devices == rank % devices
    return q[own_node | own_column], kv[own_node | own_column]


def _runs(here: np.ndarray, there: np.ndarray, table: np.ndarray, nodes: int, devices: int) -> _Runs:
    """What reaches which rank: a hop takes the rows that its node or device, or one further on, needs."""
    foreign = here != there
    wanted = Intervals(there[foreign], table[foreign, K0], table[foreign, K1])
    outer = ((here // devices - there // devices) % nodes)[foreign]
    inner = ((here - there) % devices)[foreign]  # devices divides both nodes' first ranks
    [(index, start, stop)] = cut(wanted)
    owner, outer, inner = wanted.key[index], outer[index], inner[index]
    keys, starts, stops = [], [], []

    def hops(base: np.ndarray, last: np.ndarray, stride: int, first: np.ndarray) -> None:
        cell, hop = expand(np.ones_like(last), last + 1)
        keys.append(base[cell] + hop * stride)
        starts.append(start[first][cell])
        stops.append(stop[first][cell])

    number, first = groups(owner, outer, start)
    hops((owner * nodes + outer)[first] * devices, _last(number, inner, len(first)), 1, first)
    number, first = groups(owner, start)
    hops((owner * nodes)[first] * devices, _last(number, outer, len(first)), devices, first)
    runs = union(Intervals(np.concatenate(keys), np.concatenate(starts), np.concatenate(stops)))
    return _Runs(runs.key // (nodes * devices), runs.key // devices % nodes, runs.key % devices, runs.start, runs.stop)


def _last(number: np.ndarray, hop: np.ndarray, count: int) -> np.ndarray:
    last = np.zeros(count, dtype=np.int64)
    np.maximum.at(last, number, hop)
    return last


def _rank(owner: np.ndarray, outer: np.ndarray, inner: np.ndarray, nodes: int, devices: int) -> np.ndarray:
    """The rank that is ``outer`` nodes and ``inner`` devices on from ``owner``."""
    return (owner // devices + outer) % nodes * devices + (owner + inner) % devices


def _tasks(layout: Layout, runs: _Runs, nodes: int, devices: int) -> np.ndarray:
    at = _rank(runs.owner, runs.outer, runs.inner, nodes, devices)
    zero = np.zeros_like(at)
    stage = runs.outer * devices + runs.inner
    return np.stack([stage, at, at, zero, layout.rows_all[at], runs.owner, runs.start, runs.stop], 1)


def _transfers(runs: _Runs, nodes: int, devices: int) -> np.ndarray:
    owner, outer, inner, start, stop = runs
    crosses = inner == 0
    src = _rank(owner, outer - crosses, inner - ~crosses, nodes, devices)
    need = outer * devices + inner
    lane = np.where(crosses, OUTER_LANE, INNER_LANE)
    columns = [src, _rank(owner, outer, inner, nodes, devices), owner, start, stop, np.full_like(need, What.KV), lane]
    table = np.stack([*columns, need - np.where(crosses, devices, 1), need], 1)
    # Outer hops first: the slow links begin first, and the last holder of a row is its inner neighbour where there is one.
    return table[np.lexsort((table[:, START], table[:, OWNER], -table[:, LANE], table[:, POST]))]
