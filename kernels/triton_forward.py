"""Portable Triton forward: one launch over a list of bands, state in and out.

One program owns one query tile of one head (see :mod:`distattn.kernels.tiles`) and streams key tiles past it: full tiles in
a loop without masks, then the masked ones. Running maxima start at a finite sentinel, so that no row, masked or empty, needs a
guard. The incoming state is joined in the epilogue: the loop stays free of it, and rows that saw nothing keep their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.triton_blocks import LN_2, LOG2_E, column_limits, entry_runs, gather_rows, load_rows, store_rows, tanh

NOTHING = tl.constexpr(-1e30)  # maximum of an empty row: finite, so that -inf - NOTHING and NOTHING - NOTHING are no NaN


@triton.jit
def _attend(
    acc, total, top, q, K, V, stride_k, stride_v, n_k, start, first, last, inner, outer,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One key tile into the running softmax (acc, total, top)."""
    k = load_rows(K, start, stride_k, n_k, D, BLOCK_K, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * inner) * outer
    if MASKED:
        columns = start + tl.arange(0, BLOCK_K)
        keep = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        if not SOFTCAP:
            s = s * inner
        s = tl.where(keep, s, float("-inf"))
    if MASKED or SOFTCAP:
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - new_top[:, None])
    else:  # scaling after the maximum fuses into the subtraction; needs inner >= 0
        new_top = tl.maximum(top, tl.max(s, 1) * inner)
        p = tl.math.exp2(s * inner - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    v = load_rows(V, start, stride_v, n_k, D_V, BLOCK_K, BLOCK_DV, MASKED, UPCAST)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit(do_not_specialize=["n_q", "n_k", "n_tiles"])
def forward_kernel(
    Q, K, V, O, LSE, O_IN, LSE_IN, TILES, PTR, ENTRIES,
    q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head, lse_token, lse_head,
    in_token, in_head, lse_in_token, lse_in_head, n_q, n_k, n_tiles, group, inner, outer,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STATE: tl.constexpr, ALL_ROWS: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: n_tiles x query heads, tiles fastest. STATE joins (O_IN, LSE_IN); without ALL_ROWS rows that saw nothing stay."""
    head = (tl.program_id(0) // n_tiles).to(tl.int64)
    place = tl.program_id(0) % n_tiles
    start = tl.load(TILES + place) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    K += head // group * k_head
    V += head // group * v_head
    q = load_rows(Q + head * q_head, start, q_token, n_q, D, BLOCK_Q, BLOCK_D, True, UPCAST)
    keep = rows < n_q
    at = rows.to(tl.int64)
    if STATE:  # maximum lse, sum 1, accumulator o; the o of an empty row is not read: whatever stands there counts as 0
        lse_in = tl.load(LSE_IN + at * lse_in_token + head * lse_in_head, mask=keep, other=float("-inf"))
        full_in = lse_in > float("-inf")
        acc = gather_rows(O_IN + head * in_head, start, in_token, full_in, D_V, BLOCK_Q, BLOCK_DV)
        total = tl.where(full_in, 1.0, 0.0)
        top = tl.where(full_in, lse_in * LOG2_E, NOTHING)
    else:
        acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        top = tl.full([BLOCK_Q], NOTHING, tl.float32)
    seen = rows < 0
    for index in range(tl.load(PTR + place), tl.load(PTR + place + 1)):
        entry = ENTRIES + index * 10
        first, last = column_limits(entry, rows)
        seen = seen | (first < last)
        begin, left, full, right = entry_runs(entry)
        for n in range(0, full):
            acc, total, top = _attend(
                acc, total, top, q, K, V, k_token, v_token, n_k, begin + (left + n) * BLOCK_K, first, last, inner, outer,
                D, D_V, BLOCK_K, BLOCK_D, BLOCK_DV, False, SOFTCAP, UPCAST,
            )  # fmt: skip
        for n in range(0, left + right):
            tile = tl.where(n < left, n, n + full)
            acc, total, top = _attend(
                acc, total, top, q, K, V, k_token, v_token, n_k, begin + tile * BLOCK_K, first, last, inner, outer,
                D, D_V, BLOCK_K, BLOCK_D, BLOCK_DV, True, SOFTCAP, UPCAST,
            )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(total)) * LN_2)
    if STATE:  # rows that saw nothing keep their bits: base 2 and back is not exact
        lse_in = tl.load(LSE_IN + at * lse_in_token + head * lse_in_head, mask=keep, other=float("-inf"))
        lse = tl.where(seen, lse, lse_in)
    if not ALL_ROWS:
        keep = keep & seen
    tl.store(LSE + at * lse_token + head * lse_head, lse, mask=keep)
    store_rows(O + head * o_head, acc / total[:, None], start, o_token, keep, D_V, BLOCK_Q, BLOCK_DV, False)
