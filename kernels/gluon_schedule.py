"""Who works on which tile when: the order of the Hopper kernels' work, and its division among programs that stay.

An item is a stationary tile of one head. Heads are walked in sections whose keys and values stay in the second-level cache;
inside of a section long tiles go first. Programs that stay on their multiprocessor take, in that order, whichever is free
first by count of tiles: heap, not hardware, so that one launch has one wave.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from distattn.kernels.tiles import LEFT, TileTable, upload

CACHE_BYTES = 24 << 20  # half of the 50 MB of an H100 or H200: a launch reads one half's data from the other half
OVERHEAD = 1.5  # of an item beyond its tiles, in tiles: prologue and epilogue


@dataclass(frozen=True, eq=False)
class Schedule:
    """``slots[p + n * programs]`` is the n-th of ``counts[p]`` items of program p.

    An item is (head, first row, first entry, end of entries), written out so that a program finds its work in
    one read, not in a chain of three.
    """

    slots: np.ndarray
    counts: np.ndarray
    _devices: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def programs(self) -> int:
        return len(self.counts)

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """(slots, counts) on ``device``; uploaded once."""
        return upload(self._devices, [self.slots.reshape(-1), self.counts], device)


def heads_per_section(heads: int, key_heads: int, bytes_per_key_head: int) -> int:
    """Query heads that are walked together: as many whole groups as keep what they stream in the cache, a divisor of all."""
    fitting = [n for n in range(1, key_heads + 1) if key_heads % n == 0 and n * bytes_per_key_head <= CACHE_BYTES]
    return max(fitting, default=1) * (heads // key_heads)


def ordered_items(n_work: int, heads: int, section: int) -> tuple[np.ndarray, np.ndarray]:
    """(places in the tile table, heads) of all items, section by section, longest tile first."""
    sections = np.arange(heads).reshape(-1, 1, section)
    place, head = np.broadcast_arrays(np.arange(n_work)[None, :, None], sections)
    return place.reshape(-1), head.reshape(-1)


@lru_cache(maxsize=1024)
def schedule(table: TileTable, rows: int, heads: int, section: int, programs: int | None) -> Schedule:
    """The division of the table's work; one program an item where ``programs`` is None or not fewer than the items.

    Args:
        rows: of a stationary tile.
        section: heads that are walked together, a divisor of ``heads``.
    """
    place, head = ordered_items(table.n_work, heads, section)
    items = np.stack([head, table.tiles[place] * rows, table.ptr[place], table.ptr[place + 1]], 1).astype(np.int32)
    if programs is None or programs >= len(items):
        return Schedule(items, np.ones(len(items), np.int32))
    cost = np.add.reduceat(table.entries[:, LEFT:].sum(1), table.ptr[: table.n_work]) + OVERHEAD
    free = [(0.0, p) for p in range(programs)]
    mine: list[list[int]] = [[] for _ in range(programs)]
    for item, price in enumerate(cost[place].tolist()):
        load, p = free[0]
        mine[p].append(item)
        heapq.heapreplace(free, (load + price, p))
    counts = np.array([len(work) for work in mine], np.int32)
    slots = np.zeros((counts.max(), programs, 4), np.int32)
    for p, work in enumerate(mine):
        slots[: len(work), p] = items[work]
    return Schedule(slots.reshape(-1, 4), counts)
