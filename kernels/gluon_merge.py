"""Joins the pieces of items that were cut, in a fixed order: o and lse of the forward, sums of the backward.

One launch after the kernel that left the pieces. A program has 16 rows of an item and takes its pieces four at a time, so that
their loads are under way together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distattn.kernels.gluon_blocks import LN_2, NOTHING, finish_rows, load_item


@gluon.jit
def _load_rows(PARTS, row, keep, columns, COLUMN: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr):
    """Rows [16, padded D] of a piece that has WIDTH columns, from COLUMN on; 0 where not ``keep`` and past D."""
    inside = gl.expand_dims(keep, 1) & (gl.expand_dims(columns, 0) < D)
    rows = gl.expand_dims(gl.arange(0, 16, keep.type.layout), 1)
    return gl.load(PARTS + row * WIDTH + COLUMN + rows * WIDTH + gl.expand_dims(columns, 0), mask=inside, other=0.0)


@gluon.jit
def _load_state(PARTS, piece, last, first_row, rows, columns, ROWS: gl.constexpr, D: gl.constexpr):
    """(o, lse in base 2) of 16 rows of a piece; empty from ``last`` on."""
    at = PARTS + piece.to(gl.int64) * (ROWS * (D + 1))
    exists = rows < (last - piece) * 16
    lse = gl.load(at + ROWS * D + first_row + rows, mask=exists, other=float("-inf"))
    return _load_rows(at, first_row, exists, columns, 0, D, D), lse * (1.0 / LN_2)


@gluon.jit(do_not_specialize=["n_q"])
def merge_pieces_kernel(
    O, LSE, O_IN, PARTS, MERGES, o_token: gl.constexpr, o_head: gl.constexpr,
    lse_token: gl.constexpr, lse_head: gl.constexpr, in_token: gl.constexpr, in_head: gl.constexpr, n_q,
    ROWS: gl.constexpr, D: gl.constexpr, PADDED: gl.constexpr, STATE: gl.constexpr, ALL_ROWS: gl.constexpr,
):  # fmt: skip
    """Grid: ROWS // 16 programs an item of MERGES. STATE and ALL_ROWS as for the forward kernel, whose epilogue this is."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    item = gl.program_id(0) // (ROWS // 16)
    first_row = (gl.program_id(0) - item * (ROWS // 16)) * 16
    head, start, first, last = load_item(MERGES, item)
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, PADDED, gl.SliceLayout(0, layout))
    acc = gl.full([16, PADDED], 0.0, gl.float32, layout)
    sums = gl.full([16], 0.0, gl.float32, gl.SliceLayout(1, layout))
    top = gl.full([16], NOTHING, gl.float32, gl.SliceLayout(1, layout))
    for n in range((last - first + 3) // 4):
        piece = first + n * 4
        o0, lse0 = _load_state(PARTS, piece, last, first_row, rows, columns, ROWS, D)
        o1, lse1 = _load_state(PARTS, piece + 1, last, first_row, rows, columns, ROWS, D)
        o2, lse2 = _load_state(PARTS, piece + 2, last, first_row, rows, columns, ROWS, D)
        o3, lse3 = _load_state(PARTS, piece + 3, last, first_row, rows, columns, ROWS, D)
        new_top = gl.maximum(gl.maximum(gl.maximum(lse0, lse1), gl.maximum(lse2, lse3)), top)
        decay = gl.exp2(top - new_top)
        p0 = gl.exp2(lse0 - new_top)
        p1 = gl.exp2(lse1 - new_top)
        p2 = gl.exp2(lse2 - new_top)
        p3 = gl.exp2(lse3 - new_top)
        sums = (((sums * decay + p0) + p1) + p2) + p3
        acc = acc * gl.expand_dims(decay, 1) + o0 * gl.expand_dims(p0, 1)
        acc = acc + o1 * gl.expand_dims(p1, 1)
        acc = acc + o2 * gl.expand_dims(p2, 1)
        acc = acc + o3 * gl.expand_dims(p3, 1)
        top = new_top
    row0 = start + first_row
    exists = rows < n_q - row0
    keep = exists
    if not ALL_ROWS:
        keep = exists & (sums > 0.0)
    base = row0.to(gl.int64)
    lse_at = LSE + base * lse_token + head.to(gl.int64) * lse_head + rows * lse_token
    lse, weight, weight_in, live = finish_rows(sums, top, lse_at, exists, STATE)
    gl.store(lse_at, lse, mask=keep)
    o = acc * gl.expand_dims(weight, 1)
    across = gl.expand_dims(columns, 0)
    down = gl.expand_dims(rows, 1)
    if STATE:  # the o of an empty row is not used: whatever stands there counts as 0
        inside = gl.expand_dims(live, 1) & (across < D)
        o_in = gl.load(O_IN + base * in_token + head.to(gl.int64) * in_head + down * in_token + across, mask=inside, other=0.0)
        o = o + o_in * gl.expand_dims(weight_in, 1)
    o_at = O + base * o_token + head.to(gl.int64) * o_head + down * o_token + across
    gl.store(o_at, o.to(O.dtype.element_ty), mask=gl.expand_dims(keep, 1) & (across < D))


@gluon.jit
def _add_pieces(
    X, PARTS, item, first_row, n_rows, token, head_stride,
    ROWS: gl.constexpr, COLUMN: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """X += the pieces of 16 rows of an item."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    head, start, first, last = item
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, PADDED, gl.SliceLayout(0, layout))
    acc = gl.full([16, PADDED], 0.0, gl.float32, layout)
    for n in range((last - first + 3) // 4):
        piece = first + n * 4
        row = piece.to(gl.int64) * ROWS + first_row
        left = (last - piece) * 16  # rows < 16 * pieces that are left: all rows, or none
        x0 = _load_rows(PARTS, row, rows < left, columns, COLUMN, WIDTH, D)
        x1 = _load_rows(PARTS, row + ROWS, rows < left - 16, columns, COLUMN, WIDTH, D)
        x2 = _load_rows(PARTS, row + 2 * ROWS, rows < left - 32, columns, COLUMN, WIDTH, D)
        x3 = _load_rows(PARTS, row + 3 * ROWS, rows < left - 48, columns, COLUMN, WIDTH, D)
        acc = (((acc + x0) + x1) + x2) + x3
    row0 = start + first_row
    across = gl.expand_dims(columns, 0)
    at = X + row0.to(gl.int64) * token + head.to(gl.int64) * head_stride + gl.expand_dims(rows, 1) * token + across
    inside = gl.expand_dims(rows < n_rows - row0, 1) & (across < D)
    gl.store(at, gl.load(at, mask=inside, other=0.0) + acc, mask=inside)


@gluon.jit(do_not_specialize=["n_rows"])
def add_pieces_kernel(
    X, Y, PARTS, MERGES, x_token: gl.constexpr, x_head: gl.constexpr, y_token: gl.constexpr, y_head: gl.constexpr, n_rows,
    ROWS: gl.constexpr, D: gl.constexpr, PADDED: gl.constexpr, D_Y: gl.constexpr, PADDED_Y: gl.constexpr,
):  # fmt: skip
    """Grid: ROWS // 16 programs an item of MERGES. Adds D columns of its pieces to X, and the D_Y behind them (or none) to Y."""
    place = gl.program_id(0) // (ROWS // 16)
    first_row = (gl.program_id(0) - place * (ROWS // 16)) * 16
    item = load_item(MERGES, place)
    _add_pieces(X, PARTS, item, first_row, n_rows, x_token, x_head, ROWS, 0, D + D_Y, D, PADDED)
    if D_Y:
        _add_pieces(Y, PARTS, item, first_row, n_rows, y_token, y_head, ROWS, D, D + D_Y, D_Y, PADDED_Y)
