"""The pieces that the portable Triton kernels share: tiles of rows, limits of an entry, scores.

An entry is a row of :class:`distattn.kernels.tiles.TileTable`. Kernels address rows by a 64-bit tile base and 32-bit offsets
inside the tile. ``UPCAST`` widens 16-bit tiles when they are loaded: the interpreter multiplies the bit patterns of bfloat16.
Exponentials are base 2 inside the kernels (one instruction), and lse is natural outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    X,
    start,
    stride,
    n_rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile [BLOCK, BLOCK_D] of X from row ``start``; 0 from column D on, and with CHECK from row ``n_rows`` on."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = X + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECK and D != BLOCK_D:
        x = tl.load(pointers, mask=(start + rows < n_rows)[:, None] & (columns < D)[None, :], other=0.0)
    elif CHECK:
        x = tl.load(pointers, mask=(start + rows < n_rows)[:, None], other=0.0)
    elif D != BLOCK_D:
        x = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def gather_rows(X, start, stride, keep, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile [BLOCK, BLOCK_D] of X from row ``start``; rows outside ``keep`` [BLOCK] are not read and are 0."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = X + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=keep[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(X, x, start, stride, keep, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr):
    """Writes the tile ``x`` to rows ``start``... of X where ``keep`` [BLOCK] says so; ADD adds to what is there."""
    if ADD:
        x += gather_rows(X, start, stride, keep, D, BLOCK, BLOCK_D)
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = X + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, x.to(X.dtype.element_ty), mask=keep[:, None] & (columns < D)[None, :])


@triton.jit
def column_limits(entry, rows):
    """[first, last) of the columns that each stationary row of the entry sees; empty for rows outside the entry."""
    inside = (rows >= tl.load(entry)) & (rows < tl.load(entry + 1))
    first = tl.maximum(tl.load(entry + 2), rows + tl.load(entry + 4))
    last = tl.minimum(tl.load(entry + 3), rows + tl.load(entry + 5) + 1)
    return first, tl.where(inside, last, first)


@triton.jit
def entry_runs(entry):
    """(start, left, full, right) of an entry: where its streamed tiles begin and how many of each kind there are."""
    return tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)


@triton.jit
def tanh(x):
    """From exp2, which every target and the interpreter have; a polynomial near 0, where 1 - 2/(e+1) cancels."""
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    large = 1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(square < 0.04, small, large)
