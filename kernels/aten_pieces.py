"""Bands cut into the few shapes that PyTorch's CPU flash op knows: rectangles, aligned triangles, small masked tiles.

    FULL     every row sees every key
    CAUSAL   row i sees keys 0..i of the piece (top-left aligned; rows past the last key see all)
    FLIPPED  CAUSAL after reversing rows and keys: the `lo` diagonal of a wide window
    MASKED   at most 256 * (256 + NARROW) pairs under a float mask: narrow windows, small oddments

A wide window is cut into row tiles as tall as it is wide: the keys left of a tile's first diagonal end form a FLIPPED
triangle, those right of it a CAUSAL one, so nothing is computed and thrown away. Every row of every piece sees a key.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import HI, INF, K0, K1, LO, Q0, Q1, Bands, clip, drop_empty, shift

FULL, CAUSAL, FLIPPED, MASKED = range(4)
SMALL_PAIRS = 256 * 256  # below this, one masked call beats two calls and a merge, or the copies of a flip
NARROW = 512  # windows narrower than this are computed in masked row tiles


class Piece(NamedTuple):
    """One call of the op on rows [q0, q1) and keys [k0, k1) of the hull; ``lo``, ``hi`` bound j - i counted inside the piece."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int
    kind: int
    fresh: bool  # no earlier piece touches any of these rows


class Pieces(NamedTuple):
    """All calls for some bands, in the coordinates of their hull, the smallest rectangle around all that they see."""

    rows: slice
    keys: slice
    calls: tuple[Piece, ...]


def row_tiles(table: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bands cut into tiles of ``rows[n]`` query rows, first row of each tile); tight, none empty."""
    count = -((table[:, Q0] - table[:, Q1]) // rows)
    index = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(table[:, Q0], count) + index * np.repeat(rows, count)
    tiles = clip(np.repeat(table, count, 0), start, start + np.repeat(rows, count), -INF, INF)
    keep = tiles[:, Q0] < tiles[:, Q1]
    return tiles[keep], start[keep]


def key_cut(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Every band cut in two at key ``at[n]``; tight, none empty."""
    return drop_empty(np.concatenate([clip(table, -INF, INF, -INF, at), clip(table, -INF, INF, at, INF)]))


def _without_windows(table: np.ndarray) -> np.ndarray:
    """Bands whose limits are not both finite, but for masked tiles of narrow windows."""
    window = (table[:, LO] > -INF) & (table[:, HI] < INF)
    width = table[:, HI] - table[:, LO] + 1
    wide, narrow = window & (width >= NARROW), window & (width < NARROW)
    wide_tiles, start = row_tiles(table[wide], width[wide])
    both = (wide_tiles[:, LO] > -INF) & (wide_tiles[:, HI] < INF)
    cut = key_cut(wide_tiles[both], start[both] + wide_tiles[both, HI] + 1)
    narrow_tiles, _ = row_tiles(table[narrow], np.clip(width[narrow], 128, 256))
    return np.concatenate([table[~window], wide_tiles[~both], cut, narrow_tiles])


def _align_triangles(table: np.ndarray) -> np.ndarray:
    """Cuts rectangles off bands with one diagonal, so that the diagonal starts (or ends) in a corner of what is left."""
    small = (table[:, Q1] - table[:, Q0]) * (table[:, K1] - table[:, K0]) <= SMALL_PAIRS
    has_lo, has_hi = table[:, LO] > -INF, table[:, HI] < INF
    below, above = has_hi & ~has_lo & ~small, has_lo & ~has_hi & ~small
    return np.concatenate(
        [
            table[~below & ~above],
            key_cut(table[below], table[below, Q0] + table[below, HI]),
            key_cut(table[above], table[above, Q1] + table[above, LO]),
        ]
    )


def _kinds(local: np.ndarray) -> np.ndarray:
    """The kind of each band of a table in the piece's own coordinates."""
    rows, keys = local[:, Q1], local[:, K1]
    has_lo, has_hi = local[:, LO] > -INF, local[:, HI] < INF
    kind = np.full(len(local), MASKED)
    kind[~has_lo & ~has_hi] = FULL
    kind[~has_lo & has_hi & (local[:, HI] == 0)] = CAUSAL
    kind[has_lo & ~has_hi & (local[:, LO] == keys - rows) & (rows * keys > SMALL_PAIRS)] = FLIPPED
    return kind


@lru_cache(maxsize=64)
def pieces(bands: Bands) -> Pieces:
    """The calls that compute ``bands``, each pair in exactly one, in the order they run; kept for the last 64 unions."""
    table = _align_triangles(_without_windows(bands.table))
    if not len(table):
        return Pieces(slice(0, 0), slice(0, 0), ())
    table = table[np.lexsort((table[:, K0], table[:, Q0]))]
    first, last = table.min(0).tolist(), table.max(0).tolist()
    table = shift(table, -first[Q0], -first[K0])
    local = shift(table, -table[:, Q0], -table[:, K0])
    touched = np.zeros(last[Q1] - first[Q0], dtype=bool)
    calls = []
    for row in np.column_stack([table[:, :4], local[:, 4:], _kinds(local)]).tolist():
        own = touched[row[0] : row[1]]
        calls.append(Piece._make([*row, not own.any()]))
        own[:] = True
    return Pieces(slice(first[Q0], last[Q1]), slice(first[K0], last[K1]), tuple(calls))


@lru_cache(maxsize=64)
def tiles(bands: Bands, size: int = 256) -> tuple[tuple[slice, slice, Bands], ...]:
    """(rows, keys, bands inside) of ``bands`` in tiles of at most ``size`` rows and keys."""
    by_rows, _ = row_tiles(bands.table, np.full(len(bands), size))
    swapped = by_rows[:, [K0, K1, Q0, Q1, HI, LO]] * np.array([1, 1, 1, 1, -1, -1])
    by_both, _ = row_tiles(swapped, np.full(len(swapped), size))
    table = by_both[:, [K0, K1, Q0, Q1, HI, LO]] * np.array([1, 1, 1, 1, -1, -1])
    local = shift(table, -table[:, Q0], -table[:, K0])
    corners = table[:, :4].tolist()
    return tuple((slice(*c[:2]), slice(*c[2:]), Bands(own[None])) for c, own in zip(corners, local, strict=True))
