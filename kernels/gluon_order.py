"""In which order programs of the ordered backward add to the tiles of dq, and how long they wait for each other.

Contributions to a tile are added in the order of the programs' numbers, those of one program as they come: only so may a wait
be for lower numbers alone, which is what keeps programs that are not all there at once from waiting for ever
(:mod:`distattn.kernels.gluon_turns`). What is left to choose is in which order a program visits its tiles, and how many of
the programs that run at the same time share a head. The order of arrival when all visit their tiles at once on different
rotations would have program 0 wait for program 1 somewhere, so it is not among the choices.

A program that follows another in the same head should therefore begin where that one has been: with the last tile under
causal masks and windows, whose later key tiles see later queries. Then programs follow each other through the tiles one turn
apart, and wait only once, when they set out together.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from distattn.kernels.gluon_division import OVERHEAD
from distattn.kernels.gluon_schedule import Schedule
from distattn.kernels.tiles import LEFT, START, TileTable, upload

STANDSTILL = 0.005  # of a launch's steps that programs may stand still while they set out


@dataclass(frozen=True, eq=False)
class Order:
    """How programs walk and what they wait for; the same in every head.

    ``table``: its entries stand in the order in which a program works on them.
    ``walks`` int32 [n_entries, 4]: where the walk over the tiles of an entry begins (up from it, or as ``-1 - first`` down, and
    round the end); its ranks: ``-1 - rank`` where all its tiles have the same, else where they begin in ``ranks``; in the
    first entry of a stationary tile the tiles of all its entries.
    ``ranks`` int32: contributions to a tile of dq before this one, by entry and tile.
    """

    table: TileTable
    walks: np.ndarray
    ranks: np.ndarray
    _devices: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """(walks, ranks) on ``device``; uploaded once."""
        return upload(self._devices, [self.walks.reshape(-1), self.ranks], device)

    def visits(self, place: int, block_q: int) -> np.ndarray:
        """Tiles of dq that the program of a place of the table visits, in its order."""
        found = []
        for entry in range(self.table.ptr[place], self.table.ptr[place + 1]):
            count, walk = int(self.table.entries[entry, LEFT:].sum()), int(self.walks[entry, 0])
            steps = walk + np.arange(count) if walk >= 0 else -1 - walk - np.arange(count)
            found.append(self.table.entries[entry, START] // block_q + steps % count)
        return np.concatenate(found)


def goes_down(table: TileTable, block_q: int) -> bool:
    """Whether walks from the last tile to the first have programs wait less for the one before than walks upwards.

    A program that begins with a tile that the one before reaches after n steps stands still so long.
    """
    tiles = table.entries[: table.ptr[table.n_work]]
    first, count = tiles[:, START] // block_q, tiles[:, LEFT:].sum(1)
    low = np.minimum.reduceat(first, table.ptr[: table.n_work])
    high = np.maximum.reduceat(first + count, table.ptr[: table.n_work])
    before, after = slice(None, -1), slice(1, None)
    meet = (low[after] < high[before]) & (low[before] < high[after])
    up = np.maximum(0, low[after] - low[before])[meet].sum()
    down = np.maximum(0, high[before] - high[after])[meet].sum()
    return bool(down <= up)


@lru_cache(maxsize=256)
def order(table: TileTable, block_q: int, down: bool | None = None) -> Order:
    """Walks and ranks of a table whose stationary tiles are keys and whose streamed ones begin at multiples of ``block_q``.

    Args:
        down: the direction of all walks; None takes the better one.
    """
    down = goes_down(table, block_q) if down is None else down
    place = np.repeat(np.arange(len(table.tiles)), np.diff(table.ptr))
    start = table.entries[:, START].astype(np.int64)
    table = replace(table, entries=table.entries[np.lexsort((-start if down else start, place))], _devices={})
    counts = table.entries[:, LEFT:].sum(1)
    first = table.entries[:, START] // block_q
    walks = np.zeros((len(counts), 4), np.int32)
    walks[:, 0] = np.where(down, -counts, 0)
    begins = table.ptr[: table.n_work]
    walks[begins, 2] = np.add.reduceat(counts, begins)
    seen = np.zeros((first + counts).max(initial=0), np.int32)
    varied, at = [], 0
    for entry, (begin, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        ranks = seen[begin : begin + count]
        if count == 0 or ranks.min() == ranks.max():
            walks[entry, 1] = -1 - (ranks[0] if count else 0)
        else:
            walks[entry, 1] = at
            varied.append(ranks.copy())
            at += count
        ranks += 1
    return Order(table, walks, np.concatenate(varied) if varied else np.zeros(4, np.int32))


def heads_at_once(table: TileTable, heads: int, section: int, group: int, processors: int) -> int:
    """Key heads that are walked together, at least ``section``: few programs that run at the same time then share a head.

    Programs of a head that start together set out one turn after the other, in every section anew: so many heads that
    this is at most :data:`STANDSTILL` of a launch, or all. They follow each other through the same tiles, so
    that these come from the cache even where a whole head does not fit it.
    """
    steps = int(table.entries[:, LEFT:].sum()) * group * heads / processors
    for together in (n for n in range(section, heads + 1) if heads % n == 0):
        sharing = min(table.n_work, -(-processors // together))
        if heads // together * sharing <= STANDSTILL * steps:
            return together
    return heads


def waits(
    made: Order,
    plan: Schedule,
    block_q: int,
    group: int,
    processors: int,
    step: float,
    latency: float,
    overhead: float = OVERHEAD,
) -> float:
    """When the last program of an ordered launch ends, simulated: programs start in order, each where one is free first.

    A program adds what a step made ``step`` after the one before at the earliest, and not before its turn, which comes
    ``latency`` after the contribution before it was added (-inf: nobody waits). Waits are for lower numbers: one pass will do.

    Args:
        group: query heads that a program of a key head works on, one after the other at every tile.
        overhead: of a program beyond its steps, in steps.
    """
    visits = {int(made.table.ptr[place]): made.visits(place, block_q) for place in range(made.table.n_work)}
    tiles = 1 + max(int(mine.max()) for mine in visits.values())
    turns = np.full((int(plan.slots[:, 0].max()) + 1) * group * tiles, -np.inf)
    free = [0.0] * processors
    for head, _, first, _, _ in plan.slots.tolist():
        members = np.arange(head * group, (head + 1) * group) * tiles
        places = (visits[first].reshape(-1, 1) + members).reshape(-1)
        pace = np.arange(1, len(places) + 1) * step
        added = pace + np.maximum.accumulate(np.maximum(free[0], turns[places] - pace))
        turns[places] = added + latency
        heapq.heapreplace(free, float(added[-1]) + overhead * step)
    return max(free)
