"""The warpgroup of loads of the backward by key tile; for :mod:`distattn.kernels.gluon_turns` it also keeps the turns."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distattn.kernels.gluon_blocks import async_load, barrier, load_extent, load_item, load_place, load_runs, streamed_tile
from distattn.kernels.gluon_turns import anew, count_contribution, keep_turns, tell, walked_tile


@gluon.jit
def _load_keys(
    descriptors, memory, barriers, loads, head, start,
    KEY_TILES: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
):  # fmt: skip
    """The key tile of a program."""
    q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from, lse_from, delta_from = descriptors
    q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s, lse_s, delta_s = memory
    kv_full = barriers[0]
    group, q_head, k_head, v_head, g_head, padded = loads
    mbarrier.expect(kv_full.index(0), KEY_TILES * 64 * (D + D2 + D_V + D_V2) * 2)
    for c in gl.static_range(KEY_TILES):
        async_load(k_from, [start + c * 64, head * k_head], kv_full.index(0), k_s.index(c))
        async_load(v_from, [start + c * 64, head * v_head], kv_full.index(0), v_s.index(c))
        if D2:
            async_load(k2_from, [start + c * 64, head * k_head + D], kv_full.index(0), k2_s.index(c))
        if D_V2:
            async_load(v2_from, [start + c * 64, head * v_head + D_V], kv_full.index(0), v2_s.index(c))


@gluon.jit
def _load_queries(
    descriptors, memory, barriers, loads, it, query_head, row,
    BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
):  # fmt: skip
    """Queries and dout of step ``it`` and their statistics."""
    q_from, q2_from, k_from, k2_from, v_from, v2_from, g_from, g2_from, lse_from, delta_from = descriptors
    q_s, q2_s, k_s, k2_s, v_s, v2_s, g_s, g2_s, lse_s, delta_s = memory
    kv_full, q_full, g_full, empty, ds_full, turn, words = barriers
    group, q_head, k_head, v_head, g_head, padded = loads
    s = it % STAGES
    mbarrier.expect(q_full.index(s), BLOCK_Q * (D + D2) * 2 + BLOCK_Q * 4)
    async_load(q_from, [row, query_head * q_head], q_full.index(s), q_s.index(s))
    if D2:
        async_load(q2_from, [row, query_head * q_head + D], q_full.index(s), q2_s.index(s))
    async_load(lse_from, [query_head * padded + row], q_full.index(s), lse_s.index(s))
    mbarrier.expect(g_full.index(s), BLOCK_Q * (D_V + D_V2) * 2 + BLOCK_Q * 4)
    async_load(g_from, [row, query_head * g_head], g_full.index(s), g_s.index(s))
    if D_V2:
        async_load(g2_from, [row, query_head * g_head + D_V], g_full.index(s), g2_s.index(s))
    async_load(delta_from, [query_head * padded + row], g_full.index(s), delta_s.index(s))


@gluon.jit
def _fetch_queries(
    descriptors, memory, barriers, work, loads,
    KEY_TILES: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
):  # fmt: skip
    """The key tile once, then queries, dout and their statistics for every head of the group and every entry."""
    SLOTS, ENTRIES = work
    group = loads[0]
    head, start, first, last = load_item(SLOTS, gl.program_id(0))
    _load_keys(descriptors, memory, barriers, loads, head, start, KEY_TILES, D, D2, D_V, D_V2)
    it = 0
    n_entries = last - first
    for turn in range(n_entries * group):
        query_head = head * group + turn // n_entries
        begin, left, full, right = load_runs(ENTRIES, first + turn % n_entries)
        for n in range(left + full + right):
            row = begin + streamed_tile(n, left, full, right) * BLOCK_Q
            mbarrier.wait(barriers[3].index(it % STAGES), ((it // STAGES) & 1) ^ 1)
            _load_queries(
                descriptors, memory, barriers, loads, it, query_head, row, BLOCK_Q, STAGES, D, D2, D_V, D_V2
            )  # fmt: skip
            it += 1


@gluon.jit
def _fetch_queries_in_turn(
    descriptors, memory, barriers, work, loads, query_tiles,
    KEY_TILES: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr,
):  # fmt: skip
    """:func:`_fetch_queries` in the order of the walks; keeps the turns at the tiles of dq besides."""
    SLOTS, ENTRIES, WALKS, RANKS, COUNTERS = work
    kv_full, q_full, g_full, empty, ds_full, turn, words = barriers
    head, start = load_place(SLOTS, gl.program_id(0))
    _load_keys(descriptors, memory, barriers, loads, head, start, KEY_TILES, D, D2, D_V, D_V2)
    tell(words, 30, 0)  # what the first step adds belongs to no tile: it goes to the one in front, and its turn comes at once
    mbarrier.arrive(turn.index(0), count=1)
    first, last = load_extent(SLOTS, anew(gl.program_id(0)))
    it = 0
    while first < last:
        begin, left, full, right = load_runs(ENTRIES, first)
        for n in range((left + full + right) * loads[0]):  # the group's heads one after the other at every tile
            entry = anew(first)
            begin, left, full, right = load_runs(ENTRIES, entry)
            tile = walked_tile(anew(n) // loads[0], gl.load(WALKS + entry * 4), left + full + right)
            row = begin + tile * BLOCK_Q
            head, start = load_place(SLOTS, anew(gl.program_id(0)))
            query_head = head * loads[0] + anew(n) % loads[0]
            slot = (it & 7) * 4
            mbarrier.wait(empty.index(it % STAGES), ((it // STAGES) & 1) ^ 1)
            tell(words, slot, gl.where((tile < left) | (tile >= left + full), entry * 10, -1))
            tell(words, slot + 1, row)
            tell(words, slot + 2, 1 + query_head * query_tiles + row // BLOCK_Q)
            at = gl.load(WALKS + entry * 4 + 1)  # of the ranks of the entry, or the one that all its tiles have, as -1 - rank
            tell(words, slot + 3, gl.where(at >= 0, at + tile, at))
            barrier()
            _load_queries(
                descriptors, memory, barriers, loads, it, query_head, row, BLOCK_Q, STAGES, D, D2, D_V, D_V2
            )  # fmt: skip
            keep_turns(it, COUNTERS, RANKS, words, turn, STAGES)
            it = anew(it + 1)
        _, last = load_extent(SLOTS, anew(gl.program_id(0)))
        first += 1
    for _ in range(STAGES):
        mbarrier.wait(empty.index(it % STAGES), ((it // STAGES) & 1) ^ 1)
        keep_turns(it, COUNTERS, RANKS, words, turn, STAGES)
        it += 1
    mbarrier.wait(empty.index(it % STAGES), ((it // STAGES) & 1) ^ 1)
    count_contribution(COUNTERS, words, it - STAGES - 1)


@gluon.jit
def fetch(
    descriptors, memory, barriers, work, loads, query_tiles,
    KEY_TILES: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, D_V: gl.constexpr, D_V2: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The partition."""
    if ORDERED:
        _fetch_queries_in_turn(
            descriptors, memory, barriers, work, loads, query_tiles, KEY_TILES, BLOCK_Q, STAGES, D, D2, D_V, D_V2
        )
    else:
        _fetch_queries(descriptors, memory, barriers, work, loads, KEY_TILES, BLOCK_Q, STAGES, D, D2, D_V, D_V2)
