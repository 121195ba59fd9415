"""Hopper forward: a warpgroup of loads and two or three of products; one launch over a list of bands, state in and out.

A program stays on its multiprocessor and works through items (a tile of queries of one head). Its producer fetches tiles of
q, k and v by TMA; each consumer owns 64 rows of queries. QK of tile n is issued before PV of tile n-1, and both run while
the softmax waits only for the first, so the matrix units do not idle; consumers take turns at issuing (PING_PONG). Scores
start at a finite maximum, so no row needs a guard. The incoming state joins in the epilogue: a loop that begins with a
non-zero accumulator makes the assembler run its products one by one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from distattn.kernels.gluon_blocks import (
    NOTHING,
    add_products,
    async_load,
    async_store,
    await_parts,
    finish_rows,
    hide,
    load_extent,
    load_item,
    load_piece,
    load_runs,
    prefetch_tile,
    product_over_head,
    row_maxima,
    row_sums_of_threads,
    spread,
    store_tile,
    streamed_tile,
    tanh,
    tile_pointers,
)


@gluon.jit
def _produce(
    descriptors, memory, barriers, work, loads, state,
    CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr, STATE: gl.constexpr,
):  # fmt: skip
    """Fetches what the consumers will read, as far ahead as there are stages, and the incoming state as far as the cache."""
    q_from, q2_from, k_from, k2_from, v_from, v2_from = descriptors
    q_s, q2_s, k_s, k2_s, v_s, v2_s = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    SLOTS, ENTRIES = work
    n_items, group, q_head, k_head, v_head = loads
    it = 0  # key tiles fetched so far, over all items: stage it % STAGES, lap it // STAGES
    for turn in range(n_items):
        slot = gl.program_id(0) + turn * gl.num_programs(0)
        head, start, first, last = load_item(SLOTS, slot)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(c), 64 * (D + D2) * 2)
            async_load(q_from, [start + c * 64, head * q_head], q_full.index(c), q_s.index(c))
            if D2:
                async_load(q2_from, [start + c * 64, head * q_head + D], q_full.index(c), q2_s.index(c))
        if STATE:  # read at the item's end, by all programs at once where items are equal: memory has the whole item for it
            O_IN, in_token, in_head, n_q = state
            prefetch_tile(O_IN + head.to(gl.int64) * in_head, in_token, start, n_q, CONSUMERS * 64, D_V + D_V2)
        k_column = head // group * k_head
        v_column = head // group * v_head
        for entry in range(first, last):
            begin, left, full, right = load_runs(ENTRIES, entry)
            for n in range(left + full + right):
                row = begin + streamed_tile(n, left, full, right) * BLOCK_K
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
def _scores(s, masked, rows, limits_at, begin, inner, outer, BLOCK_K: gl.constexpr, layout: gl.constexpr, SOFTCAP: gl.constexpr):
    """Products to scores: bent by the softcap (then already in base 2), -inf where the entry does not look."""
    if SOFTCAP:
        s = tanh(s * inner) * outer
    # a branch, not a loop of masked tiles and one of full ones: two loops keep two copies of P and cost 16 moves a tile
    return hide(s, float("-inf"), masked, rows, limits_at, begin, BLOCK_K, layout)


@gluon.jit
def _decay(accs, factor, D_V2: gl.constexpr, o_layout: gl.constexpr, o2_layout: gl.constexpr):
    if D_V2:
        return (accs[0] * spread(factor, o_layout), accs[1] * spread(factor, o2_layout))
    else:
        return (accs[0] * spread(factor, o_layout),)


@gluon.jit
def _begin(s, rows, limits_at, begin, inner, outer, BLOCK_K: gl.constexpr, SOFTCAP: gl.constexpr, s_layout: gl.constexpr):
    """The softmax of a row's first key tile, always masked, which a full tile bears: (p, total, top)."""
    r_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    factor = 1.0 if SOFTCAP else inner
    s = _scores(s, True, rows, limits_at, begin, inner, outer, BLOCK_K, s_layout, SOFTCAP)
    top = gl.maximum(gl.full([64], NOTHING, gl.float32, r_layout), row_maxima(s, 64, BLOCK_K, r_layout) * factor)
    p = gl.exp2(s * factor - gl.expand_dims(top, 1))
    return p, row_sums_of_threads(p, 64, BLOCK_K), top


@gluon.jit
def _attend(
    s, masked, rows, limits_at, begin, inner, outer, accs, total, top, v_empty, v_full, phase,
    BLOCK_K: gl.constexpr, D_V2: gl.constexpr, SOFTCAP: gl.constexpr, MAXIMUM_FIRST: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr, o2_layout: gl.constexpr, p_layout: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The softmax of one key tile over the products in flight of the tile before: (weights, accs, total, top)."""
    r_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    factor = 1.0 if SOFTCAP else inner  # scaling after the maximum fuses into the subtraction
    s = _scores(s, masked, rows, limits_at, begin, inner, outer, BLOCK_K, s_layout, SOFTCAP)
    new_top = gl.maximum(top, row_maxima(s, 64, BLOCK_K, r_layout) * factor)
    decay = gl.exp2(top - new_top)
    if MAXIMUM_FIRST:  # the maxima run under PV, the exponentials share their issue slots with the decay
        mbarrier.wait(v_full, phase)  # long complete: an edge that keeps the assembler from waiting for PV any earlier
        accs = await_parts(accs, 0, D_V2 > 0)
        mbarrier.arrive(v_empty, count=1)
        accs = _decay(accs, decay, D_V2, o_layout, o2_layout)
    p = gl.exp2(s * factor - gl.expand_dims(new_top, 1))
    sums = row_sums_of_threads(p, 64, BLOCK_K)
    t_layout: gl.constexpr = sums.type.layout
    total = total * spread(decay, t_layout) + sums
    if not MAXIMUM_FIRST:
        accs = await_parts(accs, 0, D_V2 > 0)
        mbarrier.arrive(v_empty, count=1)
        accs = _decay(accs, decay, D_V2, o_layout, o2_layout)
    return gl.convert_layout(p.to(DTYPE), p_layout), accs, total, new_top


@gluon.jit
def _load_tile(O_IN, in_token, exists, WIDTH: gl.constexpr, STATE: gl.constexpr, layout: gl.constexpr):
    """Part of a tile of the incoming o: not awaited before it is used."""
    if STATE:
        return gl.load(tile_pointers(O_IN, in_token, 64, WIDTH, layout), mask=spread(exists, layout), other=0.0)
    else:
        return 0


@gluon.jit
def _store_tile(
    acc, o_in, weight, weight_in, live, keep, O, o_token, WIDTH: gl.constexpr, STATE: gl.constexpr, layout: gl.constexpr
):
    """Part of a tile of o straight from the accumulators, joined with the incoming state: 4 lanes write one sector."""
    o = acc * spread(weight, layout)
    if STATE:  # the o of an empty row is not used: whatever stands there counts as 0
        o = o + gl.where(spread(live, layout), o_in, 0.0) * spread(weight_in, layout)
    gl.store(tile_pointers(O, o_token, 64, WIDTH, layout), o.to(O.dtype.element_ty), mask=spread(keep, layout))


@gluon.jit
def _store_piece(
    PARTS, place, accs, lse, weight, CID: gl.constexpr, ROWS: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
    o_layout: gl.constexpr, o2_layout: gl.constexpr,
):  # fmt: skip
    """64 rows of a piece, a state of its own, to its place in the scratch: first o of all ROWS, then their lse."""
    at = PARTS + place.to(gl.int64) * (ROWS * (D_V + D_V2 + 1))
    gl.store(at + ROWS * (D_V + D_V2) + CID * 64 + gl.arange(0, 64, lse.type.layout), lse)
    o_at = at + CID * 64 * (D_V + D_V2)
    store_tile(o_at, accs[0] * spread(weight, o_layout), D_V + D_V2, D_V, o_layout)
    if D_V2:
        store_tile(o_at + D_V, accs[1] * spread(weight, o2_layout), D_V + D_V2, D_V2, o2_layout)


@gluon.jit
def _stage_tile(o_to, o_s, acc, weight, row0, column, DTYPE: gl.constexpr, layout: gl.constexpr):
    """A tile of o through shared memory; rows past the end are cut off by the descriptor."""
    tma.store_wait(0)  # the last item's store has read the buffer
    o_s.store((acc * spread(weight, layout)).to(DTYPE))
    fence_async_shared()
    async_store(o_to, [row0, column], o_s)


@gluon.jit
def _consume(
    CID: gl.constexpr, o_to, outputs, memory, o_s, barriers, work, addresses,
    CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
    STATE: gl.constexpr, ALL_ROWS: gl.constexpr, TMA_OUT: gl.constexpr, SOFTCAP: gl.constexpr,
    PING_PONG: gl.constexpr, MAXIMUM_FIRST: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """64 rows of queries of every item."""
    O = outputs[0]
    LSE = outputs[1]
    O_IN = outputs[2]
    q_s, q2_s, k_s, k2_s, v_s, v2_s = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    SLOTS, ENTRIES = work
    n_items, strides, n_q, inner, outer = addresses
    o_token, o_head, lse_token, lse_head, in_token, in_head = strides
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16])
    o2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V2 if D_V2 else D_V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    r_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    PV_GROUPS: gl.constexpr = 2 if D_V2 else 1
    DTYPE: gl.constexpr = q_s.dtype
    zero = gl.full([64, BLOCK_K], 0.0, gl.float32, s_layout)
    it = 0  # key tiles consumed so far, over all items
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    head, start, first, _ = load_item(SLOTS, pid)
    for turn in range(n_items):
        row0 = start + CID * 64
        rows = row0 + gl.arange(0, 64, r_layout)
        accs = (gl.full([64, D_V], 0.0, gl.float32, o_layout),)
        if D_V2:
            accs = (accs[0], gl.full([64, D_V2], 0.0, gl.float32, o2_layout))
        # the first tile has no products of an earlier one to overlap with
        limits_at = ENTRIES + first * 10
        begin, left, full, right = load_runs(ENTRIES, first)
        # read here, not carried from the item before: triton before 3.8 drops what a loop carries if only the limits of inner
        # loops use it (gluon-inline puts the first value in its place): every item would end where the program's first one does
        _, last = load_extent(SLOTS, pid + turn * programs)
        mbarrier.wait(q_full.index(CID), turn & 1)
        stage = it % STAGES
        mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
        q = q_s.index(CID)
        q2 = q2_s.index(CID)
        s = warpgroup_mma_wait(0, deps=[product_over_head(q, q2, k_s.index(stage), k2_s.index(stage), zero, D2 > 0)])
        mbarrier.arrive(k_empty.index(stage), count=1)
        column = begin + streamed_tile(0, left, full, right) * BLOCK_K
        p, total, top = _begin(s, rows, limits_at, column, inner, outer, BLOCK_K, SOFTCAP, s_layout)
        weights = gl.convert_layout(p.to(DTYPE), p_layout)
        it += 1
        for entry in range(first, last):
            # not a variable set to 1 before the loop and to 0 in it: the compiler takes both for constants and carries neither
            done = gl.maximum(first + 1 - entry, 0)
            limits_at = ENTRIES + entry * 10
            begin, left, full, right = load_runs(ENTRIES, entry)
            for n in range(done, left + full + right):
                stage = it % STAGES
                before = (it - 1) % STAGES
                lap_before = ((it - 1) // STAGES) & 1
                mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
                if PING_PONG:
                    mbarrier.wait(turns.index(CID), (it - turn - 1) & 1)  # first tiles of items take no turn
                products = product_over_head(q, q2, k_s.index(stage), k2_s.index(stage), zero, D2 > 0)
                mbarrier.wait(v_full.index(before), lap_before)
                accs = add_products(weights, v_s.index(before), v2_s.index(before), accs, D_V2 > 0)
                if PING_PONG:
                    mbarrier.arrive(turns.index((CID + 1) % CONSUMERS), count=1)
                s = warpgroup_mma_wait(PV_GROUPS, deps=[products])
                mbarrier.arrive(k_empty.index(stage), count=1)
                column = begin + streamed_tile(n, left, full, right) * BLOCK_K
                weights, accs, total, top = _attend(
                    s, n < left + right, rows, limits_at, column, inner, outer, accs, total, top,
                    v_empty.index(before), v_full.index(before), lap_before,
                    BLOCK_K, D_V2, SOFTCAP, MAXIMUM_FIRST, s_layout, o_layout, o2_layout, p_layout, DTYPE,
                )  # fmt: skip
                it += 1
        mbarrier.arrive(q_empty.index(CID), count=1)
        before = (it - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((it - 1) // STAGES) & 1)
        accs = add_products(weights, v_s.index(before), v2_s.index(before), accs, D_V2 > 0)
        # the next item: its latency hides under the last product and the stores
        slot = pid + gl.minimum(turn + 1, n_items - 1) * programs
        next_head, next_start, next_first, _ = load_item(SLOTS, slot)
        limit = n_q
        if PIECES:
            place = load_piece(SLOTS, pid + turn * programs)
            limit = gl.where(place < 0, n_q, row0)
        exists = rows < limit  # no row of a piece: joined with nothing, it goes to the scratch
        base = row0.to(gl.int64)
        lse_at = LSE + base * lse_token + head.to(gl.int64) * lse_head + (rows - row0) * lse_token
        sums = gl.convert_layout(gl.sum(total, 1), r_layout)
        keep = exists
        if not ALL_ROWS:
            keep = exists & (sums > 0.0)
        in_at = O_IN + base * in_token + head.to(gl.int64) * in_head
        # in flight beside the last product; two parts would not fit beside their sums
        o_in = _load_tile(in_at, in_token, exists, D_V, STATE and D_V2 == 0, o_layout)
        lse, weight, weight_in, live = finish_rows(sums, top, lse_at, exists, STATE)
        gl.store(lse_at, lse, mask=keep)
        accs = await_parts(accs, 0, D_V2 > 0)
        mbarrier.arrive(v_empty.index(before), count=1)
        if PIECES:
            if place >= 0:
                _store_piece(outputs[3], place, accs, lse, weight, CID, CONSUMERS * 64, D_V, D_V2, o_layout, o2_layout)
            elif TMA_OUT:
                _stage_tile(o_to, o_s.index(CID), accs[0], weight, row0, head * o_head, DTYPE, o_layout)
        elif TMA_OUT:
            _stage_tile(o_to, o_s.index(CID), accs[0], weight, row0, head * o_head, DTYPE, o_layout)
        if not TMA_OUT:
            o_at = O + base * o_token + head.to(gl.int64) * o_head
            if D_V2:
                o_in = _load_tile(in_at, in_token, exists, D_V, STATE, o_layout)
            _store_tile(accs[0], o_in, weight, weight_in, live, keep, o_at, o_token, D_V, STATE, o_layout)
            if D_V2:
                o_in = _load_tile(in_at + D_V, in_token, exists, D_V2, STATE, o2_layout)
                _store_tile(accs[1], o_in, weight, weight_in, live, keep, o_at + D_V, o_token, D_V2, STATE, o2_layout)
        head = next_head
        start = next_start
        first = next_first
    if TMA_OUT:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_q"])
def forward_kernel(
    q_from, q2_from, k_from, k2_from, v_from, v2_from, o_to, O, LSE, O_IN, SLOTS, COUNTS, ENTRIES, PARTS,
    q_head: gl.constexpr, k_head: gl.constexpr, v_head: gl.constexpr, o_token: gl.constexpr, o_head: gl.constexpr,
    lse_token: gl.constexpr, lse_head: gl.constexpr, in_token: gl.constexpr, in_head: gl.constexpr,
    group: gl.constexpr, n_q, inner, outer,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    STATE: gl.constexpr, ALL_ROWS: gl.constexpr, TMA_OUT: gl.constexpr, SOFTCAP: gl.constexpr,
    PING_PONG: gl.constexpr, MAXIMUM_FIRST: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """Grid: the programs of the schedule. Program p works through slots p, p + programs, ... of which it has COUNTS[p] >= 1.

    STATE joins the state (O_IN, LSE), LSE in place; without ALL_ROWS rows that saw nothing stay. TMA_OUT
    (without STATE) stages o in shared memory. PIECES leaves o and lse of items with a place in PARTS instead.
    """
    DTYPE: gl.constexpr = q_from.dtype
    q_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, D], q_from.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D], k_from.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D_V], v_from.layout)
    q2_s = q_s
    k2_s = k_s
    v2_s = v_s
    o_s = q_s
    if D2:
        q2_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, D2], q2_from.layout)
        k2_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D2], k2_from.layout)
    if D_V2:
        v2_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, D_V2], v2_from.layout)
    if TMA_OUT:
        o_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, D_V], o_to.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
        mbarrier.init(turns.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=CONSUMERS)
        mbarrier.init(v_empty.index(s), count=CONSUMERS)
    fence_async_shared()
    if PING_PONG:
        mbarrier.arrive(turns.index(0), count=1)
    n_items = gl.load(COUNTS + gl.program_id(0))
    descriptors = (q_from, q2_from, k_from, k2_from, v_from, v2_from)
    memory = (q_s, q2_s, k_s, k2_s, v_s, v2_s)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    work = (SLOTS, ENTRIES)
    outputs = (O, LSE, O_IN)
    if PIECES:
        outputs = (O, LSE, O_IN, PARTS)
    strides = (o_token, o_head, lse_token, lse_head, in_token, in_head)
    addresses = (n_items, strides, n_q, inner, outer)
    loads = (n_items, group, q_head, k_head, v_head)
    state = (O_IN, in_token, in_head, n_q)
    ZERO: gl.constexpr = 0
    ONE: gl.constexpr = 1
    TWO: gl.constexpr = 2
    if CONSUMERS == 2:  # written out twice: a tuple of constants is not constant any more once it has a name
        gl.warp_specialize(
            [
                (_consume, (ZERO, o_to, outputs, memory, o_s, barriers, work, addresses, CONSUMERS, BLOCK_K, STAGES,
                            D2, D_V, D_V2, STATE, ALL_ROWS, TMA_OUT, SOFTCAP, PING_PONG, MAXIMUM_FIRST, PIECES)),
                (_consume, (ONE, o_to, outputs, memory, o_s, barriers, work, addresses, CONSUMERS, BLOCK_K, STAGES,
                            D2, D_V, D_V2, STATE, ALL_ROWS, TMA_OUT, SOFTCAP, PING_PONG, MAXIMUM_FIRST, PIECES)),
                (_produce, (descriptors, memory, barriers, work, loads, state,
                            CONSUMERS, BLOCK_K, STAGES, D, D2, D_V, D_V2, STATE)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (ZERO, o_to, outputs, memory, o_s, barriers, work, addresses, CONSUMERS, BLOCK_K, STAGES,
                            D2, D_V, D_V2, STATE, ALL_ROWS, TMA_OUT, SOFTCAP, PING_PONG, MAXIMUM_FIRST, PIECES)),
                (_consume, (ONE, o_to, outputs, memory, o_s, barriers, work, addresses, CONSUMERS, BLOCK_K, STAGES,
                            D2, D_V, D_V2, STATE, ALL_ROWS, TMA_OUT, SOFTCAP, PING_PONG, MAXIMUM_FIRST, PIECES)),
                (_consume, (TWO, o_to, outputs, memory, o_s, barriers, work, addresses, CONSUMERS, BLOCK_K, STAGES,
                            D2, D_V, D_V2, STATE, ALL_ROWS, TMA_OUT, SOFTCAP, PING_PONG, MAXIMUM_FIRST, PIECES)),
                (_produce, (descriptors, memory, barriers, work, loads, state,
                            CONSUMERS, BLOCK_K, STAGES, D, D2, D_V, D_V2, STATE)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
