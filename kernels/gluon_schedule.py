"""Who works on which tile when: the order of the Hopper kernels' work, and its division among programs.

An item is a stationary tile of one head. Heads are walked in sections whose keys and values stay in the second-level cache;
inside of a section long tiles go first. Programs that stay on their multiprocessor take, in that order, whichever is free
first by count of tiles: heap, not hardware, so that one launch has one wave. :mod:`distattn.kernels.gluon_division` says
where items are cut so that all programs end together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from distattn.kernels.gluon_division import (
    FROM,
    ITEM,
    OVERHEAD,
    PROGRAM,
    TO,
    Costs,
    busiest_of,
    divide,
    entries_of_piece,
    is_piece,
)
from distattn.kernels.tiles import COLUMNS, LEFT, TileTable, upload

ITEM_SIZE = 5
CACHE_BYTES = 24 << 20  # half of the 50 MB of an H100 or H200: a launch reads one half's data from the other half


class DeviceWork(NamedTuple):
    """A :class:`Schedule` as int32 tensors on a device."""

    slots: torch.Tensor
    counts: torch.Tensor
    entries: torch.Tensor
    merges: torch.Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """``slots[p + n * programs]`` is the n-th of ``counts[p]`` items of program p.

    An item is (head, first row, first entry, end of entries, place), written out so that a program finds its work in
    one read, not in a chain of three. The place is where in the scratch a piece leaves its sums, -1 for whole items, which
    leave none; the pieces of an item lie together. ``merges``: (head, first row, first place, end of places, -1) of the
    items that were cut. ``entries`` are those of the table, and behind them those of pieces.
    """

    slots: np.ndarray
    counts: np.ndarray
    merges: np.ndarray
    table: TileTable
    entries: np.ndarray
    _devices: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def programs(self) -> int:
        return len(self.counts)

    @property
    def pieces(self) -> int:
        """How many there are; 0 where nothing is cut."""
        return int(self.merges[-1, 3]) if len(self.merges) else 0

    def on(self, device: torch.device) -> DeviceWork:
        """Everything on ``device``; uploaded once. The entries of the table are shared where nothing is cut."""
        arrays = [self.slots.reshape(-1), self.counts]
        if not self.pieces:
            slots, counts = upload(self._devices, arrays, device)
            return DeviceWork(slots, counts, self.table.on(device).entries, counts)
        return DeviceWork(*upload(self._devices, [*arrays, self.entries.reshape(-1), self.merges.reshape(-1)], device))


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
def schedule(
    table: TileTable,
    rows: int,
    block: int,
    heads: int,
    section: int,
    programs: int,
    stay: bool = True,
    unit: int = 1,
    costs: Costs | None = None,
) -> Schedule:
    """The division of the table's work.

    Args:
        rows, block: of a stationary and of a streamed tile.
        section: heads that are walked together, a divisor of ``heads``.
        programs, stay, unit, costs: as for :func:`distattn.kernels.gluon_division.divide`. Programs without work are left out.
    """
    place, head = ordered_items(table.n_work, heads, section)
    whole = np.full_like(place, -1)
    items = np.stack([head, table.tiles[place] * rows, table.ptr[place], table.ptr[place + 1], whole], 1).astype(np.int32)
    tiles = tiles_of_items(table, place)
    division = divide(tiles, unit, programs, stay, costs)
    work, entries, merges = _cut(items[division[:, ITEM]], division, tiles, table.entries, block)
    busy, owner, counts = np.unique(division[:, PROGRAM], return_inverse=True, return_counts=True)
    order = np.argsort(owner, kind="stable")
    turn = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    slots = np.zeros((counts.max(), len(busy), ITEM_SIZE), np.int32)
    slots[turn, owner[order]] = work[order]
    return Schedule(slots.reshape(-1, ITEM_SIZE), counts.astype(np.int32), merges, table, entries)


def tiles_of_items(table: TileTable, place: np.ndarray) -> np.ndarray:
    """Streamed tiles of the stationary tiles at these places of the table."""
    return np.add.reduceat(table.entries[:, LEFT:].sum(1), table.ptr[: table.n_work])[place].astype(np.int64)


def _cut(
    work: np.ndarray, division: np.ndarray, tiles: np.ndarray, entries: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(items with entries and places of their own where they are pieces, all entries, merges)."""
    pieces = np.flatnonzero(is_piece(division, tiles))
    if not len(pieces):
        return work, entries, np.zeros((0, ITEM_SIZE), np.int32)
    pieces = pieces[np.lexsort((division[pieces, FROM], division[pieces, ITEM]))]
    work[pieces, 4] = np.arange(len(pieces))
    _, first, counts = np.unique(division[pieces, ITEM], return_index=True, return_counts=True)
    merges = np.stack([*work[pieces[first], :2].T, first, first + counts, np.full_like(first, -1)], 1).astype(np.int32)
    made, end = [entries], len(entries)
    for n in pieces.tolist():
        made.append(entries_of_piece(entries[work[n, 2] : work[n, 3]], division[n, FROM], division[n, TO], block))
        work[n, 2:4] = end, end + len(made[-1])
        end = work[n, 3]
    return work, np.concatenate(made).astype(np.int32).reshape(-1, COLUMNS), merges


def occupancy(table: TileTable, heads: int, section: int, programs: int, stay: bool, unit: int, costs: Costs | None) -> float:
    """Mean over busiest, in streamed tiles: the work of all items over what the longest program takes and the merge after it.

    Counted, not measured; what cutting costs lowers it. Arguments as for :func:`schedule`.
    """
    tiles = tiles_of_items(table, ordered_items(table.n_work, heads, section)[0])
    division = divide(tiles, unit, programs, stay, costs)
    pieces, mean = int(is_piece(division, tiles).sum()), (tiles * unit + OVERHEAD).sum() / programs
    write, merge = (costs.write, costs.merge) if costs and pieces else (0.0, 0.0)
    return float(mean / (busiest_of(division, tiles, unit, programs, stay, write) + merge + write * pieces / programs))
