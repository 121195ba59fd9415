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
    """``slots[p + n * programs]`` is the n-th of ``counts[p]`` items of program p: place in the tile table * heads + head."""

    slots: np.ndarray
    counts: np.ndarray
    _devices: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def programs(self) -> int:
        return len(self.counts)

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """(slots, counts) on ``device``; uploaded once."""
        return upload(self._devices, [self.slots, self.counts], device)


def heads_per_section(heads: int, key_heads: int, bytes_per_key_head: int) -> int:
    """Query heads that are walked together: as many whole groups as keep what they stream in the cache, a divisor of all."""
    fitting = [n for n in range(1, key_heads + 1) if key_heads % n == 0 and n * bytes_per_key_head <= CACHE_BYTES]
    return max(fitting, default=1) * (heads // key_heads)


def ordered_items(table: TileTable, heads: int, section: int) -> np.ndarray:
    """All items, section by section, longest tile first, int32 [n_work * heads]."""
    sections = np.arange(heads).reshape(-1, 1, section)
    return (np.arange(table.n_work)[None, :, None] * heads + sections).reshape(-1).astype(np.int32)


@lru_cache(maxsize=1024)
def schedule(table: TileTable, heads: int, section: int, programs: int | None) -> Schedule:
    """The division of the table's work; one program an item where ``programs`` is None or not fewer than the items."""
    items = ordered_items(table, heads, section)
    if programs is None or programs >= len(items):
        return Schedule(items, np.ones(len(items), np.int32))
    tiles = table.entries[:, LEFT:].sum(1)
    cost = np.add.reduceat(tiles, table.ptr[: table.n_work]) + OVERHEAD if len(tiles) else np.zeros(0)
    free = [(0.0, p) for p in range(programs)]
    mine: list[list[int]] = [[] for _ in range(programs)]
    for item, price in zip(items.tolist(), cost[items // heads].tolist(), strict=True):
        load, p = free[0]
        mine[p].append(item)
        heapq.heapreplace(free, (load + price, p))
    counts = np.array([len(work) for work in mine], np.int32)
    slots = np.zeros((counts.max(), programs), np.int32)
    for p, work in enumerate(mine):
        slots[: len(work), p] = work
    return Schedule(slots.reshape(-1), counts)
