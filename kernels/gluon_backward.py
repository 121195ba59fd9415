"""Hopper backward by key tile: dk and dv, and FUSED also dq, which is added up in whatever order it comes.

Products are transposed (keys down, queries across), so that p and ds are operands in registers. FUSED needs five products
where the two deterministic kernels need seven: the consumers hand their ds to each other through shared memory and make dq of
a step while the next one runs, so that neither waits for the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distattn.kernels.gluon_blocks import (
    add_products,
    add_tile,
    add_to_scratch,
    await_parts,
    barrier,
    hide,
    load_item,
    load_piece,
    load_place,
    load_runs,
    product_over_head,
    reinterpret,
    scratch_places,
    store_tile,
    streamed_tile,
    tanh,
)
from distattn.kernels.gluon_loads import fetch
from distattn.kernels.gluon_turns import anew, told


@gluon.jit
def _share(ds, ds_s, ds_full, slot, CID: gl.constexpr):
    """Hands ds [64 keys, BLOCK_Q] of this consumer to both."""
    ds_s.index(2 * slot + CID).store(ds)
    fence_async_shared()
    barrier()
    mbarrier.arrive(ds_full.index(slot), count=1)


@gluon.jit
def _query_product(ds_r, k_r, slot, z, zero, CID: gl.constexpr, D: gl.constexpr):
    """This consumer's [64, 64] of dq from the ds of both: all 64 queries x a half of D 128, or a half of 128 queries x D 64."""
    if D == 128:
        dq = warpgroup_mma(ds_r.index(2 * slot).permute((1, 0)), k_r.index(CID + z), zero, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds_r.index(2 * slot + 1).permute((1, 0)), k_r.index(2 + CID + z), dq, is_async=True)
    else:
        dq = warpgroup_mma(ds_r.index(4 * slot + CID).permute((1, 0)), k_r.index(z), zero, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds_r.index(4 * slot + 2 + CID).permute((1, 0)), k_r.index(1 + z), dq, is_async=True)
    return dq


@gluon.jit
def _told_limits(words, it, ENTRIES):
    """Whether a step is masked, where its limits stand and where its queries begin: read where needed, kept nowhere."""
    place = told(words, (it & 7) * 4)
    return place >= 0, ENTRIES + place, told(words, (it & 7) * 4 + 1)


@gluon.jit
def _key_step(
    dks, dvs, it, masked, rows, limits_at, begin, inner, outer, thread, before, memory, barriers, ds_s, ds_r, k_r, ENTRIES,
    CID: gl.constexpr, C: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V2: gl.constexpr,
    D_SPLIT: gl.constexpr, V_SPLIT: gl.constexpr, SECOND_HALF: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
    SOFTCAP: gl.constexpr, FUSED: gl.constexpr, ORDERED: gl.constexpr,
    STATISTICS_FIRST: gl.constexpr, VALUES_FIRST: gl.constexpr,
):  # fmt: skip
    """One query tile into the sums of dk and dv; FUSED also adds dq of the step before at ``before``."""
    q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s, lse_s, delta_s = memory
    kv_full, q_full, g_full, empty, ds_full, turn, words = barriers
    V_GROUPS: gl.constexpr = 2 if D_V2 else 1
    DV_GROUPS: gl.constexpr = (2 if V_SPLIT else 1) if VALUES_FIRST else 0
    DTYPE: gl.constexpr = q_s.dtype
    zero = gl.full([64, BLOCK_Q], 0.0, gl.float32, s_layout)
    stage = it % STAGES
    lap = (it // STAGES) & 1
    z = it >> 24  # always 0, but opaque: keeps the assembler from hoisting, and then spilling, what addresses k and v
    q = q_s.index(stage)
    g = g_s.index(stage)
    if SECOND_HALF:  # both consumers own the same keys, and this one the other half of the head
        q = q2_s.index(stage)
        g = g2_s.index(stage)
    mbarrier.wait(q_full.index(stage), lap)
    if STATISTICS_FIRST:  # both sums begin at what would be subtracted from them: 64 registers fewer
        k = k_s.index(C + z)
        _, start = gl.broadcast(zero, gl.expand_dims(lse_s.index(stage).load(gl.SliceLayout(0, s_layout)), 0))
        products = warpgroup_mma(k, q_s.index(stage).permute((1, 0)), start, is_async=True)
        mbarrier.wait(g_full.index(stage), lap)
        _, start = gl.broadcast(zero, gl.expand_dims(delta_s.index(stage).load(gl.SliceLayout(0, s_layout)), 0))
        dp = warpgroup_mma(v_s.index(C + z), g_s.index(stage).permute((1, 0)), start, is_async=True)
        s = warpgroup_mma_wait(1, deps=[products])
        if ORDERED:
            masked, limits_at, begin = _told_limits(words, it, ENTRIES)
        s = hide(s, float("-inf"), masked, rows, limits_at, begin, BLOCK_Q, s_layout)
        p = gl.exp2(s * inner)
        if VALUES_FIRST:
            dvs = add_products(gl.convert_layout(p.to(DTYPE), p_layout), g, g2_s.index(stage), dvs, V_SPLIT)
        dp = warpgroup_mma_wait(DV_GROUPS, deps=[dp])
        if ORDERED:
            masked, limits_at, begin = _told_limits(words, it, ENTRIES)
        ds = hide(p * dp, 0.0, masked, rows, limits_at, begin, BLOCK_Q, s_layout).to(DTYPE)
    else:
        products = product_over_head(k_s.index(C + z), k2_s.index(C + z), q_s.index(stage), q2_s.index(stage), zero, D2 > 0)
        mbarrier.wait(g_full.index(stage), lap)
        dp = product_over_head(v_s.index(C + z), v2_s.index(C + z), g_s.index(stage), g2_s.index(stage), zero, D_V2 > 0)
        lse = gl.expand_dims(lse_s.index(stage).load(gl.SliceLayout(0, s_layout)), 0)
        s = warpgroup_mma_wait(V_GROUPS, deps=[products])
        factor = 1.0 if SOFTCAP else inner
        if SOFTCAP:
            bent = tanh(s * inner)
            s = bent * outer
        if ORDERED:
            masked, limits_at, begin = _told_limits(words, it, ENTRIES)
        s = hide(s, float("-inf"), masked, rows, limits_at, begin, BLOCK_Q, s_layout)
        p = gl.exp2(s * factor - lse)
        if VALUES_FIRST:
            dvs = add_products(gl.convert_layout(p.to(DTYPE), p_layout), g, g2_s.index(stage), dvs, V_SPLIT)
        delta = gl.expand_dims(delta_s.index(stage).load(gl.SliceLayout(0, s_layout)), 0)
        dp = warpgroup_mma_wait(DV_GROUPS, deps=[dp])
        ds = p * (dp - delta)
        if SOFTCAP:
            ds = ds * (1.0 - bent * bent)
        if ORDERED:
            masked, limits_at, begin = _told_limits(words, it, ENTRIES)
        # garbage behind the mask must not survive as 0 * inf
        ds = hide(ds, 0.0, masked, rows, limits_at, begin, BLOCK_Q, s_layout).to(DTYPE)
    if not VALUES_FIRST:
        dvs = add_products(gl.convert_layout(p.to(DTYPE), p_layout), g, g2_s.index(stage), dvs, V_SPLIT)
    operand = gl.convert_layout(ds, p_layout)
    if FUSED:
        # The slot written here was last read in step it - 2 or earlier, and that q arrived for this step says that both
        # consumers have left step it - STAGES: no further wait.
        q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        mbarrier.wait(ds_full.index(it & 3), (it >> 2) & 1)
        dq = _query_product(ds_r, k_r, it & 3, z, gl.full([64, 64], 0.0, gl.float32, q_layout), CID, D)
        _share(ds, ds_s, ds_full, (it + 1) & 3, CID)
        dks = add_products(operand, q, q2_s.index(stage), dks, D_SPLIT)
        dq = warpgroup_mma_wait(1, deps=[dq])
        dvs = await_parts(dvs, 1, V_SPLIT)
        if ORDERED:
            mbarrier.wait(turn.index(0), it & 1)
            before = told(words, ((it + 7) & 7) * 4 + 2)
        add_to_scratch(dq, thread + before.to(gl.int64) * (BLOCK_Q * D * 4))
    else:
        dks = add_products(operand, q, q2_s.index(stage), dks, D_SPLIT)
        dvs = await_parts(dvs, 0, V_SPLIT)
    dks = await_parts(dks, 0, D_SPLIT)
    barrier()  # all threads have read lse and delta before one of them arrives
    mbarrier.arrive(empty.index(stage), count=1)
    return dks, dvs


@gluon.jit
def _zeros(D: gl.constexpr, D2: gl.constexpr, SPLIT: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    if SPLIT:
        layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
        return (gl.full([64, D], 0.0, gl.float32, layout), gl.full([64, D2], 0.0, gl.float32, layout2))
    else:
        return (gl.full([64, D], 0.0, gl.float32, layout),)


@gluon.jit
def _add_sums(X, sums, scale, token, keep, D: gl.constexpr, D2: gl.constexpr, SPLIT: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    add_tile(X, sums[0] * scale, token, keep, D, layout)
    if SPLIT:
        layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
        add_tile(X + D, sums[1] * scale, token, keep, D2, layout2)


@gluon.jit
def _store_sums(X, sums, scale, token: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, SPLIT: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    store_tile(X, sums[0] * scale, token, D, layout)
    if SPLIT:
        layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
        store_tile(X + D, sums[1] * scale, token, D2, layout2)


@gluon.jit
def _sum_keys(
    CID: gl.constexpr, outputs, memory, ds_s, barriers, work, addresses,
    KEY_TILES: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
    SOFTCAP: gl.constexpr, FUSED: gl.constexpr, ORDERED: gl.constexpr,
    STATISTICS_FIRST: gl.constexpr, VALUES_FIRST: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """64 rows of keys, or with KEY_TILES 1 all 64 and one half of the head."""
    DK, DV, SCRATCH = outputs
    SLOTS = work[0]
    ENTRIES = work[1]
    group, dk_token, dk_head, dv_token, dv_head, n_k, query_tiles, inner, outer, scale = addresses
    kv_full, q_full, g_full, empty, ds_full, turn, words = barriers
    C: gl.constexpr = CID if KEY_TILES == 2 else 0
    HALF: gl.constexpr = CID if KEY_TILES == 1 else 0
    D_SPLIT: gl.constexpr = D2 > 0 and KEY_TILES == 2
    V_SPLIT: gl.constexpr = D_V2 > 0 and KEY_TILES == 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    head, start, first, last = load_item(SLOTS, gl.program_id(0))
    row0 = start + C * 64
    rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    dks = _zeros(D, D2, D_SPLIT)
    dvs = _zeros(D_V, D_V2, V_SPLIT)
    ds_r = ds_s
    k_r = ds_s
    thread = 0
    before = start * 0  # the step before the first adds its zeros to the first tile
    if FUSED:
        k_s = memory[2]
        k_r = reinterpret(k_s, k_s.dtype, [2 * D // 64, 64, 64], k_s.layout)
        ds_r = reinterpret(ds_s, ds_s.dtype, [8 * BLOCK_Q // 64, 64, 64], ds_s.layout)
        thread = (scratch_places(q_layout) * 4).to(gl.int64) + (SCRATCH.to(gl.int64) + CID * 16384)
        # ds of the step before the first is 0: its product needs no special case
        _share(gl.full([64, BLOCK_Q], 0.0, ds_s.dtype, s_layout), ds_s, ds_full, 0, CID)
    mbarrier.wait(kv_full.index(0), 0)
    it = 0
    n_entries = last - first
    if ORDERED:
        for _ in range(gl.load(work[2] + first * 4 + 2) * group):
            dks, dvs = _key_step(
                dks, dvs, it, True, rows, ENTRIES, 0, inner, outer, thread, before,
                memory, barriers, ds_s, ds_r, k_r, ENTRIES,
                CID, C, BLOCK_Q, STAGES, D, D2, D_V2, D_SPLIT, V_SPLIT, HALF > 0,
                s_layout, p_layout, SOFTCAP, FUSED, ORDERED, STATISTICS_FIRST, VALUES_FIRST,
            )  # fmt: skip
            it += 1
    else:
        for part in range(n_entries * group):
            query_head = head * group + part // n_entries
            limits_at = ENTRIES + (first + part % n_entries) * 10
            begin, left, full, right = load_runs(ENTRIES, first + part % n_entries)
            for n in range(left + full + right):
                if FUSED or SOFTCAP:  # read again for each tile (it >> 24 is 0, but opaque), so that its runs take no registers
                    begin, left, full, right = load_runs(limits_at, it >> 24)
                column = begin + streamed_tile(n, left, full, right) * BLOCK_Q
                dks, dvs = _key_step(
                    dks, dvs, it, n < left + right, rows, limits_at, column, inner, outer, thread, before,
                    memory, barriers, ds_s, ds_r, k_r, ENTRIES,
                    CID, C, BLOCK_Q, STAGES, D, D2, D_V2, D_SPLIT, V_SPLIT, HALF > 0,
                    s_layout, p_layout, SOFTCAP, FUSED, ORDERED, STATISTICS_FIRST, VALUES_FIRST,
                )  # fmt: skip
                if FUSED:
                    before = query_head * query_tiles + column // BLOCK_Q
                it += 1
    if FUSED:
        mbarrier.wait(ds_full.index(it & 3), (it >> 2) & 1)
        dq = _query_product(ds_r, k_r, it & 3, 0, gl.full([64, 64], 0.0, gl.float32, q_layout), CID, D)
        dq = warpgroup_mma_wait(0, deps=[dq])
        if ORDERED:
            mbarrier.wait(turn.index(0), it & 1)
            before = told(words, ((it + 7) & 7) * 4 + 2)
        add_to_scratch(dq, thread + before.to(gl.int64) * (BLOCK_Q * D * 4))
    if ORDERED:
        barrier()
        mbarrier.arrive(empty.index(it % STAGES), count=1)
        # read again rather than kept through the loop
        head, start = load_place(SLOTS, anew(gl.program_id(0)))
        row0 = start + C * 64
    limit = n_k
    if PIECES:
        WIDTH: gl.constexpr = D + D2 + D_V + D_V2
        place = load_piece(SLOTS, gl.program_id(0))
        limit = gl.where(place < 0, n_k, row0)
        if place >= 0:
            at = SCRATCH + (place * (KEY_TILES * 64) + C * 64).to(gl.int64) * WIDTH
            _store_sums(at + HALF * D, dks, scale, WIDTH, D, D2, D_SPLIT)
            _store_sums(at + (D + D2) + HALF * D_V, dvs, 1.0, WIDTH, D_V, D_V2, V_SPLIT)
    keep = rows < limit  # no row of a piece
    dv_at = DV + row0.to(gl.int64) * dv_token + head.to(gl.int64) * dv_head + HALF * D_V
    _add_sums(dv_at, dvs, 1.0, dv_token, keep, D_V, D_V2, V_SPLIT)
    dk_at = DK + row0.to(gl.int64) * dk_token + head.to(gl.int64) * dk_head + HALF * D
    _add_sums(dk_at, dks, scale, dk_token, keep, D, D2, D_SPLIT)


@gluon.jit(do_not_specialize=["n_k", "padded", "query_tiles"])
def key_gradient_kernel(
    q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from, lse_from, delta_from, DK, DV, SCRATCH,
    SLOTS, COUNTS, ENTRIES, q_head: gl.constexpr, k_head: gl.constexpr, v_head: gl.constexpr, g_head: gl.constexpr,
    dk_token: gl.constexpr, dk_head: gl.constexpr, dv_token: gl.constexpr, dv_head: gl.constexpr,
    group: gl.constexpr, n_k, padded, query_tiles, inner, outer, scale, WALKS, RANKS, COUNTERS,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr, KEY_TILES: gl.constexpr,
    BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr, FUSED: gl.constexpr, ORDERED: gl.constexpr,
    STATISTICS_FIRST: gl.constexpr, VALUES_FIRST: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """Grid: one program a (key tile, key head) or piece. The group's query heads are looped inside: dk and dv have one writer.

    VALUES_FIRST issues the products of dv before ds is known. FUSED takes up to 3 stages: that q of a step has come then says
    that what last read the slot of its ds is over. ORDERED adds dq in the order of :mod:`distattn.kernels.gluon_order`:
    then WALKS, RANKS and COUNTERS are its arrays, and the scratch has a tile in front. PIECES (not FUSED) leaves dk and dv,
    side by side, of items with a place in SCRATCH.
    """
    DTYPE: gl.constexpr = q_from.dtype
    k_s = gl.allocate_shared_memory(DTYPE, [KEY_TILES, 64, D], k_from.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [KEY_TILES, 64, D_V], v_from.layout)
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_Q, D], q_from.layout)
    g_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_Q, D_V], g_from.layout)
    k2_s = k_s
    v2_s = v_s
    q2_s = q_s
    g2_s = g_s
    ds_s = k_s
    if D2:
        k2_s = gl.allocate_shared_memory(DTYPE, [KEY_TILES, 64, D2], k2_from.layout)
        q2_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_Q, D2], q2_from.layout)
    if D_V2:
        v2_s = gl.allocate_shared_memory(DTYPE, [KEY_TILES, 64, D_V2], v2_from.layout)
        g2_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_Q, D_V2], g2_from.layout)
    if FUSED:
        ds_s = gl.allocate_shared_memory(DTYPE, [8, 64, BLOCK_Q], q_from.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], lse_from.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], delta_from.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    turn = kv_full
    words = kv_full
    if ORDERED:
        words = gl.allocate_shared_memory(gl.int32, [32, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        turn = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(turn.index(0), count=1)
    mbarrier.init(kv_full.index(0), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(g_full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    for s in gl.static_range(4):
        mbarrier.init(ds_full.index(s), count=2)
    fence_async_shared()
    descriptors = (q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from, lse_from, delta_from)
    memory = (q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s, lse_s, delta_s)
    barriers = (kv_full, q_full, g_full, empty, ds_full, turn, words)
    work = (SLOTS, ENTRIES)
    if ORDERED:
        work = (SLOTS, ENTRIES, WALKS, RANKS, COUNTERS)
    outputs = (DK, DV, SCRATCH)
    addresses = (group, dk_token, dk_head, dv_token, dv_head, n_k, query_tiles, inner, outer, scale)
    loads = (group, q_head, k_head, v_head, g_head, padded)
    ZERO: gl.constexpr = 0
    ONE: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_sum_keys, (ZERO, outputs, memory, ds_s, barriers, work, addresses, KEY_TILES, BLOCK_Q, STAGES,
                         D, D2, D_V, D_V2, SOFTCAP, FUSED, ORDERED, STATISTICS_FIRST, VALUES_FIRST, PIECES)),
            (_sum_keys, (ONE, outputs, memory, ds_s, barriers, work, addresses, KEY_TILES, BLOCK_Q, STAGES,
                         D, D2, D_V, D_V2, SOFTCAP, FUSED, ORDERED, STATISTICS_FIRST, VALUES_FIRST, PIECES)),
            (fetch, (descriptors, memory, barriers, work, loads, query_tiles, KEY_TILES, BLOCK_Q, STAGES,
                      D, D2, D_V, D_V2, ORDERED)),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
