"""Portable Triton backward: dk and dv by key tile, dq by query tile; two launches, no atomics, a fixed order of sums.

Seven matrix products where a fused kernel with atomics needs five: the price of results that are bitwise the same from run
to run. Both kernels recompute p from the lse of the whole row and touch the accumulators once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.triton_blocks import LOG2_E, column_limits, entry_runs, gather_rows, load_rows, store_rows, tanh


@triton.jit
def _load_stats(LSE, DELTA, rows, n_q, lse_token, delta_token):
    """Base-2 lse and delta of query rows; rows that do not exist or saw nothing get lse +inf, which makes their p 0."""
    keep = rows < n_q
    at = rows.to(tl.int64)
    lse = tl.load(LSE + at * lse_token, mask=keep, other=float("-inf"))
    delta = tl.load(DELTA + at * delta_token, mask=keep, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), delta


@triton.jit
def _probabilities(s, lse, keep, inner, outer, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """(p, slope): the softmax of raw scores and, with a softcap, d(capped score) / d(raw score * scale); lse broadcasts."""
    slope = s
    if SOFTCAP:
        bent = tanh(s * inner)
        slope = 1.0 - bent * bent
        p = tl.math.exp2(bent * outer - lse)
    else:
        p = tl.math.exp2(s * inner - lse)
    if MASKED:
        p = tl.where(keep, p, 0.0)
    return p, slope


@triton.jit
def _score_gradients(p, slope, dp, delta, keep, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Gradients of the scaled raw scores; garbage behind the mask must not survive as 0 * inf."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slope
    if MASKED:
        ds = tl.where(keep, ds, 0.0)
    return ds


@triton.jit
def _key_step(
    dk, dv, k, v, Q, DOUT, LSE, DELTA, q_token, dout_token, lse_token, delta_token, n_q, start, first, last, inner, outer,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One query tile into (dk, dv) of one key tile; scores are transposed: keys down, queries across."""
    rows = start + tl.arange(0, BLOCK_Q)
    keep = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
    q = load_rows(Q, start, q_token, n_q, D, BLOCK_Q, BLOCK_D, MASKED, UPCAST)
    lse, delta = _load_stats(LSE, DELTA, rows, n_q, lse_token, delta_token)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p, slope = _probabilities(s, lse[None, :], keep, inner, outer, MASKED, SOFTCAP)
    dout = load_rows(DOUT, start, dout_token, n_q, D_V, BLOCK_Q, BLOCK_DV, MASKED, UPCAST)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = _score_gradients(p, slope, dp, delta[None, :], keep, MASKED, SOFTCAP)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["n_q", "n_k", "n_tiles"])
def key_gradient_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, TILES, PTR, ENTRIES,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, lse_token, lse_head, delta_token, delta_head,
    dk_token, dk_head, dv_token, dv_head, n_q, n_k, n_tiles, group, inner, outer, scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: n_tiles x key heads, tiles fastest. Loops over the group's query heads inside, so dk and dv have one writer."""
    head = (tl.program_id(0) // n_tiles).to(tl.int64)
    place = tl.program_id(0) % n_tiles
    start = tl.load(TILES + place) * BLOCK_K
    columns = start + tl.arange(0, BLOCK_K)
    k = load_rows(K + head * k_head, start, k_token, n_k, D, BLOCK_K, BLOCK_D, True, UPCAST)
    v = load_rows(V + head * v_head, start, v_token, n_k, D_V, BLOCK_K, BLOCK_DV, True, UPCAST)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = gather_rows(DV + head * dv_head, start, dv_token, columns < n_k, D_V, BLOCK_K, BLOCK_DV)
    first_entry = tl.load(PTR + place)
    n_entries = tl.load(PTR + place + 1) - first_entry
    for turn in range(0, n_entries * group):
        query_head = head * group + turn // n_entries
        entry = ENTRIES + (first_entry + turn % n_entries) * 10
        first, last = column_limits(entry, columns)
        begin, left, full, right = entry_runs(entry)
        Qh = Q + query_head * q_head
        Gh = DOUT + query_head * dout_head
        Lh = LSE + query_head * lse_head
        Dh = DELTA + query_head * delta_head
        for n in range(0, full):
            dk, dv = _key_step(
                dk, dv, k, v, Qh, Gh, Lh, Dh, q_token, dout_token, lse_token, delta_token, n_q,
                begin + (left + n) * BLOCK_Q, first, last, inner, outer,
                D, D_V, BLOCK_Q, BLOCK_D, BLOCK_DV, False, SOFTCAP, UPCAST,
            )  # fmt: skip
        for n in range(0, left + right):
            dk, dv = _key_step(
                dk, dv, k, v, Qh, Gh, Lh, Dh, q_token, dout_token, lse_token, delta_token, n_q,
                begin + tl.where(n < left, n, n + full) * BLOCK_Q, first, last, inner, outer,
                D, D_V, BLOCK_Q, BLOCK_D, BLOCK_DV, True, SOFTCAP, UPCAST,
            )  # fmt: skip
    # dv began from its accumulator and leaves first: two tiles to be added at the end would not fit into the registers.
    keep = columns < n_k
    store_rows(DV + head * dv_head, dv, start, dv_token, keep, D_V, BLOCK_K, BLOCK_DV, False)
    store_rows(DK + head * dk_head, dk * scale, start, dk_token, keep, D, BLOCK_K, BLOCK_D, True)


@triton.jit
def _query_step(
    dq, q, dout, lse, delta, K, V, k_token, v_token, n_k, start, first, last, inner, outer,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One key tile into dq of one query tile."""
    columns = start + tl.arange(0, BLOCK_K)
    keep = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    k = load_rows(K, start, k_token, n_k, D, BLOCK_K, BLOCK_D, MASKED, UPCAST)
    v = load_rows(V, start, v_token, n_k, D_V, BLOCK_K, BLOCK_DV, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, slope = _probabilities(s, lse[:, None], keep, inner, outer, MASKED, SOFTCAP)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = _score_gradients(p, slope, dp, delta[:, None], keep, MASKED, SOFTCAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["n_q", "n_k", "n_tiles"])
def query_gradient_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, TILES, PTR, ENTRIES,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, lse_token, lse_head, delta_token, delta_head,
    dq_token, dq_head, n_q, n_k, n_tiles, group, inner, outer, scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: n_tiles x query heads, tiles fastest."""
    head = (tl.program_id(0) // n_tiles).to(tl.int64)
    place = tl.program_id(0) % n_tiles
    start = tl.load(TILES + place) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    K += head // group * k_head
    V += head // group * v_head
    q = load_rows(Q + head * q_head, start, q_token, n_q, D, BLOCK_Q, BLOCK_D, True, UPCAST)
    dout = load_rows(DOUT + head * dout_head, start, dout_token, n_q, D_V, BLOCK_Q, BLOCK_DV, True, UPCAST)
    lse, delta = _load_stats(LSE + head * lse_head, DELTA + head * delta_head, rows, n_q, lse_token, delta_token)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for index in range(tl.load(PTR + place), tl.load(PTR + place + 1)):
        entry = ENTRIES + index * 10
        first, last = column_limits(entry, rows)
        begin, left, full, right = entry_runs(entry)
        for n in range(0, full):
            dq = _query_step(
                dq, q, dout, lse, delta, K, V, k_token, v_token, n_k, begin + (left + n) * BLOCK_K, first, last, inner, outer,
                D, D_V, BLOCK_K, BLOCK_D, BLOCK_DV, False, SOFTCAP, UPCAST,
            )  # fmt: skip
        for n in range(0, left + right):
            tile = tl.where(n < left, n, n + full)
            dq = _query_step(
                dq, q, dout, lse, delta, K, V, k_token, v_token, n_k, begin + tile * BLOCK_K, first, last, inner, outer,
                D, D_V, BLOCK_K, BLOCK_D, BLOCK_DV, True, SOFTCAP, UPCAST,
            )  # fmt: skip
    store_rows(DQ + head * dq_head, dq * scale, start, dq_token, rows < n_q, D, BLOCK_Q, BLOCK_D, True)
