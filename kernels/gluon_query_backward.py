"""Hopper backward by query tile: dq, and the kernel that brings what the fused backward added up to its place.

As in the forward a step's own products run beside the last one of the step before: dq of tile n-1 is issued with the scores of
tile n and awaited when their softmax is done.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from distattn.kernels.gluon_blocks import (
    add_products,
    add_tile,
    async_load,
    await_parts,
    hide,
    load_extent,
    load_item,
    load_piece,
    load_place,
    load_runs,
    product_over_head,
    store_tile,
    streamed_row,
    streamed_tile,
    tanh,
)


@gluon.jit
def _fetch_keys(
    descriptors, memory, barriers, work, loads, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
):  # fmt: skip
    """The query tile once, then keys and values."""
    q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from = descriptors
    q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s = memory
    q_full, k_full, k_empty, v_full, v_empty = barriers
    SLOTS, ENTRIES = work
    group, q_head, k_head, v_head, g_head = loads
    head, start = load_place(SLOTS, gl.program_id(0))
    for c in gl.static_range(2):
        mbarrier.expect(q_full.index(c), 64 * (D + D2 + D_V + D_V2) * 2)
        async_load(q_from, [start + c * 64, head * q_head], q_full.index(c), q_s.index(c))
        async_load(g_from, [start + c * 64, head * g_head], q_full.index(c), g_s.index(c))
        if D2:
            async_load(q2_from, [start + c * 64, head * q_head + D], q_full.index(c), q2_s.index(c))
        if D_V2:
            async_load(g2_from, [start + c * 64, head * g_head + D_V], q_full.index(c), g2_s.index(c))
    k_column = head // group * k_head
    v_column = head // group * v_head
    it = 0
    # Here and not before: this warpgroup has 24 registers, and the copies above take all.
    first, last = load_extent(SLOTS, gl.program_id(0))
    for entry in range(first, last):
        _, left, full, right = load_runs(ENTRIES, entry + (it >> 30))
        for n in range(left + full + right):
            # an entry is read again for each of its tiles (it >> 30 is 0, but opaque), so that only their number is kept
            row = streamed_row(ENTRIES, entry + (it >> 30), n, BLOCK_K)
            s = it % STAGES
            lap = (it // STAGES) & 1
            mbarrier.wait(k_empty.index(s), lap ^ 1)
            mbarrier.expect(k_full.index(s), BLOCK_K * (D + D2) * 2)
            async_load(k_from, [row, k_column], k_full.index(s), k_s.index(s))
            if D2:
                async_load(k2_from, [row, k_column + D], k_full.index(s), k2_s.index(s))
            mbarrier.wait(v_empty.index(s), lap ^ 1)
            mbarrier.expect(v_full.index(s), BLOCK_K * (D_V + D_V2) * 2)
            async_load(v_from, [row, v_column], v_full.index(s), v_s.index(s))
            if D_V2:
                async_load(v2_from, [row, v_column + D_V], v_full.index(s), v2_s.index(s))
            it += 1


@gluon.jit
def _probabilities(
    s, lse, masked, rows, limits_at, begin, inner, outer, BLOCK_K: gl.constexpr, layout: gl.constexpr, SOFTCAP: gl.constexpr
):
    """(p, slope): softmax of raw products and, with a softcap, d(bent score) / d(product * scale). lse is in base 2."""
    slope = 1.0
    factor = 1.0 if SOFTCAP else inner
    if SOFTCAP:
        bent = tanh(s * inner)
        slope = 1.0 - bent * bent
        s = bent * outer
    return gl.exp2(hide(s, float("-inf"), masked, rows, limits_at, begin, BLOCK_K, layout) * factor - lse), slope


@gluon.jit
def _score_gradients(
    p, slope, dp, delta, masked, rows, limits_at, begin, BLOCK_K: gl.constexpr, layout: gl.constexpr, SOFTCAP: gl.constexpr
):
    """Gradients of products * scale; garbage behind the mask must not survive as 0 * inf."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slope
    return hide(ds, 0.0, masked, rows, limits_at, begin, BLOCK_K, layout)


@gluon.jit
def _sum_queries(
    CID: gl.constexpr, outputs, LSE, DELTA, memory, barriers, work, addresses, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V2: gl.constexpr, SOFTCAP: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """64 rows of queries."""
    q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s = memory
    q_full, k_full, k_empty, v_full, v_empty = barriers
    SLOTS, ENTRIES = work
    dq_token, dq_head, n_q, padded, inner, outer, scale = addresses
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    r_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    SPLIT: gl.constexpr = D2 > 0
    V_GROUPS: gl.constexpr = 2 if D_V2 else 1
    D_GROUPS: gl.constexpr = 2 if D2 else 1
    DTYPE: gl.constexpr = q_s.dtype
    zero = gl.full([64, BLOCK_K], 0.0, gl.float32, s_layout)
    head, start, first, last = load_item(SLOTS, gl.program_id(0))
    row0 = start + CID * 64
    rows = row0 + gl.arange(0, 64, r_layout)
    keep = rows < n_q
    lse = gl.load(LSE + head.to(gl.int64) * padded + rows, mask=keep, other=float("inf"))
    delta = gl.load(DELTA + head.to(gl.int64) * padded + rows, mask=keep, other=0.0)
    lse = gl.expand_dims(lse, 1)
    delta = gl.expand_dims(delta, 1)
    dqs = (gl.full([64, D], 0.0, gl.float32, d_layout),)
    if SPLIT:
        d2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
        dqs = (dqs[0], gl.full([64, D2], 0.0, gl.float32, d2_layout))
    q = q_s.index(CID)
    q2 = q2_s.index(CID)
    g = g_s.index(CID)
    g2 = g2_s.index(CID)
    # the first tile has no dq of an earlier one to go with
    limits_at = ENTRIES + first * 10
    begin, left, full, right = load_runs(ENTRIES, first)
    mbarrier.wait(q_full.index(CID), 0)
    mbarrier.wait(k_full.index(0), 0)
    products = product_over_head(q, q2, k_s.index(0), k2_s.index(0), zero, SPLIT)
    mbarrier.wait(v_full.index(0), 0)
    dp = product_over_head(g, g2, v_s.index(0), v2_s.index(0), zero, D_V2 > 0)
    s = warpgroup_mma_wait(V_GROUPS, deps=[products])
    column = begin + streamed_tile(0, left, full, right) * BLOCK_K
    p, slope = _probabilities(s, lse, True, rows, limits_at, column, inner, outer, BLOCK_K, s_layout, SOFTCAP)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(0), count=1)
    ds = _score_gradients(p, slope, dp, delta, True, rows, limits_at, column, BLOCK_K, s_layout, SOFTCAP).to(DTYPE)
    ds = gl.convert_layout(ds, p_layout)
    it = 1
    for entry in range(first, last):
        done = gl.maximum(first + 1 - entry, 0)
        limits_at = ENTRIES + entry * 10
        begin, left, full, right = load_runs(ENTRIES, entry)
        for n in range(done, left + full + right):
            stage = it % STAGES
            before = (it - 1) % STAGES
            lap = (it // STAGES) & 1
            masked = n < left + right
            # CID, but opaque where registers are scarce: keeps what addresses q and g from being hoisted, and then spilled
            mine = CID if D + D2 <= 128 else CID + (it >> 24)
            mbarrier.wait(k_full.index(stage), lap)
            products = product_over_head(q_s.index(mine), q2_s.index(mine), k_s.index(stage), k2_s.index(stage), zero, SPLIT)
            mbarrier.wait(v_full.index(stage), lap)
            dp = product_over_head(g_s.index(mine), g2_s.index(mine), v_s.index(stage), v2_s.index(stage), zero, D_V2 > 0)
            dqs = add_products(ds, k_s.index(before), k2_s.index(before), dqs, SPLIT)
            s = warpgroup_mma_wait(V_GROUPS + D_GROUPS, deps=[products])
            column = begin + streamed_tile(n, left, full, right) * BLOCK_K
            p, slope = _probabilities(s, lse, masked, rows, limits_at, column, inner, outer, BLOCK_K, s_layout, SOFTCAP)
            dp = warpgroup_mma_wait(D_GROUPS, deps=[dp])
            mbarrier.arrive(v_empty.index(stage), count=1)
            ds_next = _score_gradients(p, slope, dp, delta, masked, rows, limits_at, column, BLOCK_K, s_layout, SOFTCAP).to(DTYPE)
            dqs = await_parts(dqs, 0, SPLIT)
            mbarrier.arrive(k_empty.index(before), count=1)
            ds = gl.convert_layout(ds_next, p_layout)
            it += 1
    before = (it - 1) % STAGES
    dqs = await_parts(add_products(ds, k_s.index(before), k2_s.index(before), dqs, SPLIT), 0, SPLIT)
    if PIECES:
        place = load_piece(SLOTS, gl.program_id(0))
        keep = rows < gl.where(place < 0, n_q, row0)  # no row of a piece
        if place >= 0:
            piece_at = outputs[1] + (place * 128 + CID * 64).to(gl.int64) * (D + D2)
            store_tile(piece_at, dqs[0] * scale, D + D2, D, d_layout)
            if SPLIT:
                store_tile(piece_at + D, dqs[1] * scale, D + D2, D2, d2_layout)
    at = outputs[0] + row0.to(gl.int64) * dq_token + head.to(gl.int64) * dq_head
    add_tile(at, dqs[0] * scale, dq_token, keep, D, d_layout)
    if SPLIT:
        add_tile(at + D, dqs[1] * scale, dq_token, keep, D2, d2_layout)


@gluon.jit(do_not_specialize=["n_q", "padded"])
def query_gradient_kernel(
    q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from, DQ, LSE, DELTA, SCRATCH, SLOTS, COUNTS,
    ENTRIES, q_head: gl.constexpr, k_head: gl.constexpr, v_head: gl.constexpr, g_head: gl.constexpr,
    dq_token: gl.constexpr, dq_head: gl.constexpr, group: gl.constexpr, n_q, padded, inner, outer, scale,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """Grid: one program a (tile of 128 queries, query head), or piece of it: PIECES leaves those with a place in SCRATCH."""
    DTYPE: gl.constexpr = q_from.dtype
    q_s = gl.allocate_shared_memory(DTYPE, [2, 64, D], q_from.layout)
    g_s = gl.allocate_shared_memory(DTYPE, [2, 64, D_V], g_from.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D], k_from.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D_V], v_from.layout)
    q2_s = q_s
    g2_s = g_s
    k2_s = k_s
    v2_s = v_s
    if D2:
        q2_s = gl.allocate_shared_memory(DTYPE, [2, 64, D2], q2_from.layout)
        k2_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D2], k2_from.layout)
    if D_V2:
        g2_s = gl.allocate_shared_memory(DTYPE, [2, 64, D_V2], g2_from.layout)
        v2_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D_V2], v2_from.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_empty.index(s), count=2)
    fence_async_shared()
    descriptors = (q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from)
    memory = (q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    work = (SLOTS, ENTRIES)
    outputs = (DQ,)
    if PIECES:
        outputs = (DQ, SCRATCH)
    addresses = (dq_token, dq_head, n_q, padded, inner, outer, scale)
    loads = (group, q_head, k_head, v_head, g_head)
    ZERO: gl.constexpr = 0
    ONE: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_sum_queries, (ZERO, outputs, LSE, DELTA, memory, barriers, work, addresses, BLOCK_K, STAGES,
                            D, D2, D_V2, SOFTCAP, PIECES)),
            (_sum_queries, (ONE, outputs, LSE, DELTA, memory, barriers, work, addresses, BLOCK_K, STAGES,
                            D, D2, D_V2, SOFTCAP, PIECES)),
            (_fetch_keys, (descriptors, memory, barriers, work, loads, BLOCK_K, STAGES, D, D2, D_V, D_V2)),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["n_q", "tiles"])
def add_scratch_kernel(DQ, SCRATCH, dq_token, dq_head, n_q, tiles, scale, D: gl.constexpr, BLOCK_Q: gl.constexpr):
    """dq += scratch * scale. Grid: 2 programs a (head, tile of BLOCK_Q queries): the [64, 64] that one consumer made."""
    tile = gl.program_id(0) // 2
    half = gl.program_id(0) - tile * 2
    head = tile // tiles
    n = gl.arange(0, 4096, gl.BlockedLayout([4], [32], [4], [0]))  # [8][128 threads][4 floats], as add_to_scratch left them
    x = gl.load(SCRATCH + (tile * 2 + half).to(gl.int64) * 4096 + n)
    rows = n // 128 % 4 * 16 + n // 2 % 2 * 8 + n // 16 % 8
    columns = n // 512 * 8 + n // 4 % 4 * 2 + n % 2
    row0 = (tile - head * tiles) * BLOCK_Q
    at = DQ + head.to(gl.int64) * dq_head
    if D == 128:
        at = at + half * 64
    else:
        row0 = row0 + half * 64
    places = at + row0.to(gl.int64) * dq_token + (rows * dq_token + columns)
    gl.atomic_add(places, x * scale, mask=row0 + rows < n_q, sem="relaxed")
