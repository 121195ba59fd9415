"""The pieces that the Hopper kernels share: work items, entries, masks, row statistics, products of split heads.

Written in Gluon, which describes one warpgroup at a time and every wait by hand. An entry is a row of
:class:`distattn.kernels.tiles.TileTable`. Tiles of shared memory have sides of powers of two, so a head of another size lies
in two parts (96 = 64 + 32, 192 = 128 + 64): products over a head are two instructions, and nothing is padded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
NOTHING = gl.constexpr(-1.0e30)  # maximum of an empty row: finite, so that -inf - NOTHING and NOTHING - NOTHING are no NaN

# What triton renamed, under its new names: in 3.7, in 3.8 (3.9 dropped the old names), in 3.9.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_shared = gl.shared_memory_descriptor
reinterpret = _shared.reinterpret if hasattr(_shared, "reinterpret") else _shared._reinterpret


@gluon.jit
def load_place(SLOTS, slot):
    """(head, first row) of the work item in a slot of the schedule."""
    item = SLOTS + slot * 5
    return gl.load(item), gl.load(item + 1)


@gluon.jit
def load_extent(SLOTS, slot):
    """(first entry, end of entries) of the work item in a slot of the schedule."""
    item = SLOTS + slot * 5
    return gl.load(item + 2), gl.load(item + 3)


@gluon.jit
def load_item(SLOTS, slot):
    """(head, first row, first entry, end of entries) of the work item in a slot of the schedule."""
    head, start = load_place(SLOTS, slot)
    first, last = load_extent(SLOTS, slot)
    return head, start, first, last


@gluon.jit
def load_piece(SLOTS, slot):
    """Where in the scratch the work item in a slot leaves its sums; -1 for whole items, which leave none."""
    return gl.load(SLOTS + slot * 5 + 4)


@gluon.jit
def load_runs(ENTRIES, index):
    """(start, left, full, right) of an entry: where its streamed tiles begin and how many of each kind there are."""
    entry = ENTRIES + index * 10
    return gl.load(entry + 6), gl.load(entry + 7), gl.load(entry + 8), gl.load(entry + 9)


@gluon.jit
def streamed_tile(n, left, full, right):
    """The n-th tile of an entry in order of work: the masked ones on both sides first, then the run that needs no mask."""
    masked = gl.where(n < left, n, n + full)
    return gl.where(n < left + right, masked, n - right)


@gluon.jit
def streamed_row(ENTRIES, index, n, ROWS: gl.constexpr):
    """Where the n-th tile of ``ROWS`` rows of an entry begins."""
    begin, left, full, right = load_runs(ENTRIES, index)
    return begin + streamed_tile(n, left, full, right) * ROWS


@gluon.jit
def hide(x, instead: gl.constexpr, masked, rows, entry, begin, WIDTH: gl.constexpr, layout: gl.constexpr):
    """x [rows, WIDTH] with ``instead`` where the entry does not look; columns count from ``begin``. Two compares an element.

    One branch for the whole warpgroup: full tiles pay nothing, and the limits are read where they are needed, so that no
    registers are kept for them.
    """
    if masked:
        first = gl.maximum(rows + (gl.load(entry + 4) - begin), gl.load(entry + 2) - begin)
        last = gl.minimum(rows + (gl.load(entry + 5) - begin), gl.load(entry + 3) - 1 - begin)
        last = gl.where((rows >= gl.load(entry)) & (rows < gl.load(entry + 1)), last, -1)
        # what differs between threads joins the limits, and what is left of a column is an immediate of its compares: no
        # registers hold columns through the loop
        columns = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
        own = columns % 8 // 2 * 2
        fixed = columns // 8 * 8 + columns % 2
        x = gl.where((fixed >= gl.expand_dims(first, 1) - own) & (fixed <= gl.expand_dims(last, 1) - own), x, instead)
    return x


@gluon.jit
def tanh(x):
    """From exp2; a polynomial near 0, where 1 - 2/(e+1) cancels (the hardware's own tanh is right to 11 bits only)."""
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    large = 1.0 - 2.0 / (gl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return gl.where(square < 0.04, small, large)


@gluon.jit
def row_sums_of_threads(p, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """[ROWS, WIDTH] -> [ROWS, 4]: only the part of a row's sum that stays inside of a thread; the lanes are added once a tile."""
    t = gl.sum(gl.reshape(p, [ROWS, WIDTH // 32, 4, 4, 2]), 4)
    return gl.sum(gl.sum(t, 2), 1)


@gluon.jit
def row_maxima(s, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """[ROWS, WIDTH] -> [ROWS], inside of threads first."""
    t = gl.max(gl.reshape(s, [ROWS, WIDTH // 32, 4, 4, 2]), 4)
    t = gl.max(gl.max(t, 2), 1)
    return gl.convert_layout(gl.max(t, 1), layout)


@gluon.jit
def product_over_head(a, a2, b, b2, zero, SPLIT: gl.constexpr):
    """a @ b.T over a head in one or two parts, from shared memory, not awaited: one instruction group, or two."""
    s = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    if SPLIT:
        s = warpgroup_mma(a2, b2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def add_products(a, b, b2, accs, SPLIT: gl.constexpr):
    """accs + a @ b for one or two parts of columns, not awaited; ``a`` in registers, ``b`` in shared memory."""
    if SPLIT:
        return (warpgroup_mma(a, b, accs[0], is_async=True), warpgroup_mma(a, b2, accs[1], is_async=True))
    else:
        return (warpgroup_mma(a, b, accs[0], is_async=True),)


@gluon.jit
def await_parts(accs, OUTSTANDING: gl.constexpr, SPLIT: gl.constexpr):
    """Sums of products once all but the last OUTSTANDING groups are done."""
    if SPLIT:
        return warpgroup_mma_wait(OUTSTANDING, deps=[accs[0], accs[1]])
    else:
        return (warpgroup_mma_wait(OUTSTANDING, deps=[accs[0]]),)


@gluon.jit
def spread(rows, layout: gl.constexpr):
    """[ROWS] -> [ROWS, 1] for a tile in ``layout``."""
    return gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, layout)), 1)


@gluon.jit
def tile_pointers(X, token, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Pointers [ROWS, WIDTH] to rows ``token`` elements apart. What all threads share comes last and becomes immediates."""
    rows = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)
    columns = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    return X + rows * token + columns % 8 + columns // 8 * 8


@gluon.jit
def prefetch_tile(X, token, start, stop, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Asks for rows [start, start + ROWS) of float32, those below ``stop``, to come into the second-level cache."""
    offsets = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    for piece in gl.static_range((ROWS + 127) // 128):
        rows = gl.minimum(start + piece * 128 + offsets, stop - 1)
        for column in gl.static_range(0, WIDTH, 32):  # lines of 128 bytes
            line = (X + rows.to(gl.int64) * token + column).to(gl.int64)
            gl.inline_asm_elementwise("prefetch.global.L2 [$1];", "=r,l", [line], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add_tile(X, x, token, keep, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Adds a tile of 64 rows to what stands at X, ``keep`` [64] rows of it: 4 lanes share a sector.

    Atomics whose result nobody reads: the second-level cache adds, and no program waits for what stood there. Where a program
    is the only one that adds to an element in its launch, as everywhere here, the order of sums is fixed all the same.
    """
    pointers = tile_pointers(X, token, 64, WIDTH, layout)
    inside = spread(keep, layout)
    gl.atomic_add(pointers, x, mask=inside, sem="relaxed")


@gluon.jit
def store_tile(X, x, token: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Writes a whole tile of 64 rows to scratch."""
    gl.store(tile_pointers(X, token, 64, WIDTH, layout), x)


@gluon.jit
def finish_rows(sums, top, lse_at, exists, STATE: gl.constexpr):
    """(lse, weight of the accumulators, weight of the incoming o, whether it has any) of the rows of a finished tile."""
    seen = sums > 0.0
    weight_in = sums
    live = exists
    if STATE:  # maximum lse, sum 1, accumulator o
        lse_in = gl.load(lse_at, mask=exists, other=float("-inf"))
        live = lse_in > float("-inf")
        top_in = gl.maximum(lse_in * (1.0 / LN_2), NOTHING)
        joined = gl.maximum(top, top_in)
        weight = gl.exp2(top - joined)
        weight_in = gl.where(live, gl.exp2(top_in - joined), 0.0)
        sums = sums * weight + weight_in
        top = joined
    safe = gl.where(sums == 0.0, 1.0, sums)
    lse = gl.where(sums == 0.0, float("-inf"), (top + gl.log2(safe)) * LN_2)
    if STATE:  # rows that saw nothing keep their bits: base 2 and back is not exact
        lse = gl.where(seen, lse, lse_in)
        weight = gl.where(seen, weight / safe, 0.0)
        weight_in = gl.where(seen, weight_in / safe, gl.where(live, 1.0, 0.0))
    else:
        weight = 1.0 / safe
    return lse, weight, weight_in, live


# 32 sums a thread as 8 adds of 16 bytes, each 512 bytes of a warp in one piece; all 32 elements come with one address
_ADD = gl.constexpr(
    "\n".join(
        f"red.relaxed.gpu.global.add.v4.f32 [$64 + {2048 * j}], {{${32 + 4 * j}, ${33 + 4 * j}, ${34 + 4 * j}, ${35 + 4 * j}}};"
        for j in range(8)
    )
)
_ADD_OPERANDS = gl.constexpr(",".join(["=r"] * 32 + ["f"] * 32 + ["l"] * 32))


@gluon.jit
def add_to_scratch(x, addresses):
    """Adds a tile [64, 64] in accumulator layout to the scratch: 16 KB as [8][128 threads][4 floats]."""
    gl.inline_asm_elementwise(_ADD, _ADD_OPERANDS, [x, addresses], dtype=gl.int32, is_pure=False, pack=32)


@gluon.jit
def scratch_places(layout: gl.constexpr):
    """[64, 64] places of 4 floats, in floats, of a tile of scratch: where :func:`add_to_scratch` of a thread begins."""
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = gl.arange(0, 64, gl.SliceLayout(0, layout))
    return gl.expand_dims((r // 16) * 128 + (r % 8) * 16, 1) + gl.expand_dims((c % 8) // 2 * 4, 0)
