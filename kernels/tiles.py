"""Tile tables: which tiles of the score matrix a kernel visits, from :class:`~distattn.kernels.bands.Bands`.

A kernel keeps one tile of rows in registers (the *stationary* side: queries in the forward and for dq, keys for dk and dv)
and streams tiles of the other side past it. One program owns one stationary tile and works through all entries of that
tile, whatever bands they come from, so no two programs write one row and the order of accumulation is fixed.

Streamed tiles need no alignment: those of an entry start where its visible range starts, which saves a tile a document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from distattn.kernels.bands import HI, K0, K1, LO, Q0, Q1, Bands, clip, drop_empty

LIMIT = 1 << 30  # row numbers and clipped diagonals stay below this, so that their sums fit into int32
COLUMNS = 10
ROW0, ROW1, COL0, COL1, LOW, HIGH, START, LEFT, FULL, RIGHT = range(COLUMNS)


class DeviceTable(NamedTuple):
    """The columns of a :class:`TileTable` as int32 tensors on a device."""

    tiles: torch.Tensor
    ptr: torch.Tensor
    entries: torch.Tensor


def upload(kept: dict[torch.device, list[torch.Tensor]], parts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Flat int32 arrays on ``device``, from ``kept`` where they were uploaded before. The upload blocks: any stream may read."""
    views = kept.get(device)
    if views is None:
        starts = np.cumsum([0] + [-(-len(part) // 4) * 4 for part in parts])  # 16 bytes: what Triton specialises on
        packed = np.zeros(starts[-1], np.int32)
        for start, part in zip(starts, parts, strict=False):
            packed[start : start + len(part)] = part
        on_device = torch.from_numpy(packed).to(device)
        views = kept[device] = [on_device[start : start + len(part)] for start, part in zip(starts, parts, strict=False)]
    if device.type == "cuda":  # a table dropped from the cache must outlive the kernels that still read it
        views[0].record_stream(torch.cuda.current_stream(device))
    return views


@dataclass(frozen=True, eq=False)
class TileTable:
    """Entries of every stationary tile, in compressed rows.

    ``tiles`` int32 [n_tiles]: every stationary tile once, first the ``n_work`` tiles with entries, longest first, then the
    idle ones in order. A launch over ``n_work`` programs does all the work; one over all tiles also reaches the rows
    that see nothing.
    ``ptr`` int32 [n_tiles + 1]: ``entries[ptr[n]:ptr[n + 1]]`` belong to ``tiles[n]``.
    ``entries`` int32 [n_entries, 10]: a streamed row ``y`` is visible to a stationary row ``x`` iff ``ROW0 <= x < ROW1``,
    ``COL0 <= y < COL1`` and ``LOW <= y - x <= HIGH``. The streamed tiles of the entry begin at ``START``: first ``LEFT``
    tiles to be masked, then ``FULL`` tiles in which all rows see all columns, then ``RIGHT`` tiles to be masked.
    """

    tiles: np.ndarray
    ptr: np.ndarray
    entries: np.ndarray
    n_work: int
    _devices: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def idle(self) -> np.ndarray:
        """Stationary tiles without work, ascending."""
        return self.tiles[self.n_work :]

    def on(self, device: torch.device) -> DeviceTable:
        """The columns on ``device``; uploaded once (the upload blocks, so that any stream may read them afterwards)."""
        return DeviceTable(*upload(self._devices, [self.tiles, self.ptr, self.entries.reshape(-1)], device))


def _split(bands: np.ndarray, row0: np.ndarray, row1: np.ndarray, whole: np.ndarray, block: int, align: int) -> np.ndarray:
    """Start, masked, full and masked tiles of the columns that rows [row0, row1) of each band see, int64 [n, 4].

    ``whole`` says where the band covers every row of the stationary tile: only there can a streamed tile be full.
    """
    start = np.maximum(bands[:, K0], row0 + bands[:, LO])
    start = start // align * align
    stop = np.minimum(bands[:, K1], row1 + bands[:, HI])
    common_start = np.maximum(bands[:, K0], row1 - 1 + bands[:, LO])  # columns that all rows see
    common_stop = np.minimum(bands[:, K1], row0 + bands[:, HI] + 1)
    left = -((start - common_start) // block)
    full = np.where(whole, np.maximum(0, (common_stop - start - left * block) // block), 0)
    left = np.where(full > 0, left, 0)
    right = -((start + (left + full) * block - stop) // block)
    return np.stack([start, left, full, right], 1)


def build(table: np.ndarray, n_rows: int, n_cols: int, block_rows: int, block_cols: int, align: int = 1) -> TileTable:
    """Tile table of a bands table whose first side (columns Q0, Q1) is stationary. Costs O(entries log entries)."""
    table = drop_empty(clip(table, 0, n_rows, 0, n_cols))
    first = table[:, Q0] // block_rows
    count = (table[:, Q1] - 1) // block_rows - first + 1
    band = np.repeat(np.arange(len(table)), count)
    tile = np.arange(len(band)) - np.repeat(np.cumsum(count) - count, count) + first[band]
    order = np.argsort(tile, kind="stable")
    band, tile = band[order], tile[order]
    bands = table[band]
    row0, row1 = np.maximum(bands[:, Q0], tile * block_rows), np.minimum(bands[:, Q1], (tile + 1) * block_rows)
    whole = (row0 == tile * block_rows) & (row1 == np.minimum((tile + 1) * block_rows, n_rows))
    runs = _split(bands, row0, row1, whole, block_cols, align)

    n_tiles = -(-n_rows // block_rows)
    entries_of = np.bincount(tile, minlength=n_tiles)
    work = np.bincount(tile, runs[:, 1:].sum(1), minlength=n_tiles)
    tiles = np.argsort(-work, kind="stable")
    ptr = np.concatenate([[0], np.cumsum(entries_of[tiles])])
    begin = np.cumsum(entries_of) - entries_of
    source = np.arange(len(tile)) + np.repeat(begin[tiles] - ptr[:-1], entries_of[tiles])
    limits = np.stack([row0, row1, bands[:, K0], bands[:, K1], *np.clip(bands[:, [LO, HI]], -LIMIT, LIMIT).T], 1)
    entries = np.concatenate([limits, runs], 1)[source].astype(np.int32)
    return TileTable(tiles.astype(np.int32), ptr.astype(np.int32), entries, int(np.count_nonzero(work)))


@lru_cache(maxsize=1024)
def tile_table(bands: Bands, n_q: int, n_k: int, block_q: int, block_k: int, stationary: str, align: int = 1) -> TileTable:
    """The tile table of ``bands`` over ``n_q`` queries and ``n_k`` keys; equal arguments give the same object.

    Args:
        bands: pairs outside [0, n_q) x [0, n_k) are left out.
        block_q, block_k: rows of a query tile and of a key tile.
        stationary: ``"q"`` for tables by query tile, ``"k"`` for tables by key tile (rows are then keys, columns queries).
        align: streamed tiles begin at multiples of it, for kernels that need that of an address.
    """
    if stationary not in ("q", "k"):
        raise ValueError(f"A tile table has stationary 'q' or 'k', found {stationary!r}. Use one of the two.")
    if max(n_q, n_k) + max(block_q, block_k) >= LIMIT:
        raise ValueError(f"Tile tables hold fewer than {LIMIT} rows, found {n_q} queries and {n_k} keys. Use more ranks.")
    if stationary == "q":
        return build(bands.table, n_q, n_k, block_q, block_k, align)
    return build(bands.transpose().table, n_k, n_q, block_k, block_q, align)
