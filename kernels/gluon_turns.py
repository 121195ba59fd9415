"""Turns at a tile of dq: programs add to it one after the other, in the order of their numbers, and no product waits for it.

Each tile of dq has a counter of the contributions that it got. The warpgroup of loads keeps the turns, so that the consumers
pay one wait on shared memory a step. When both consumers have released the tile of a step, what they added in that step is
behind them: the warpgroup of loads counts that contribution, waits until the counter of the next one stands at its rank, and
says so in shared memory. A contribution is awaited while its products run, and counted while the next one's do.

Why the next program adds to a sum that holds what was counted (PTX ISA, memory consistency model). (1) 128 threads of a
consumer add (``red.relaxed.gpu``), meet at a barrier, and one arrives on ``empty``: a barrier synchronises its threads, an
arrival is a release of the block, and a wait an acquire. (2) A thread that waited executes ``fence.acq_rel.gpu`` and adds one to
the counter. That is a release pattern, and causality order is transitive: it covers what (1) ordered before the fence, other
threads' adds among it. (3) Another program's ``ld.acquire.gpu`` that reads this number, or one that later atomic adds made of it,
synchronises with (2). (4) The thread that read it arrives on ``turn``, the consumers wait for that, and add. So (1) precedes (4)
in causality order; coherence order agrees with that for overlapping writes, and an atomic add takes the number that stands
before it there. Inside of a program the same thread makes all sums of an address, in program order.

Nobody waits for ever: a rank counts contributions of programs with lower numbers, and earlier ones of the same program. Of
the programs that are not finished the one with the lowest number therefore waits for nobody else, and it runs if programs start
in the order of their numbers and one fits, as they do on the hardware. No two programs have to be there at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

WORD = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one number, which every thread holds

# By the thread of the warpgroup that arrives on barriers. Counting in another warp, beside the wait, costs one register too many.
_THREAD = gl.constexpr("{ .reg .pred p; .reg .b32 v; mov.u32 v, %tid.x; and.b32 v, v, 127; ")
_COUNT = gl.constexpr(
    "setp.ne.u32 p, v, 0; @p bra done; fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [$1], 1; done: mov.u32 $0, 0; }"
)
_AWAIT = gl.constexpr(
    "setp.ne.u32 p, v, 0; @p bra done; again: ld.acquire.gpu.global.u32 v, [$1]; setp.lt.u32 p, v, $2; @p bra again; "
    "done: mov.u32 $0, 0; }"
)


@gluon.jit
def count_contribution(COUNTERS, words, it):
    """Counts what the product of step ``it`` gave, once consumers released the tile that they worked on when they added it."""
    counter = COUNTERS + told(words, (it & 7) * 4 + 2)
    gl.inline_asm_elementwise(_THREAD + _COUNT, "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_rank(COUNTERS, RANKS, words, it):
    """Returns once all contributions before that of step ``it`` are counted."""
    at = told(words, (it & 7) * 4 + 3)
    rank = -1 - at
    if at >= 0:
        rank = gl.load(RANKS + at)
    counter = COUNTERS + told(words, (it & 7) * 4 + 2)
    gl.inline_asm_elementwise(_THREAD + _AWAIT, "=r,l,r", [counter, rank], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def walked_tile(n, walk, count):
    """The n-th tile that a walk over ``count`` tiles visits: up from ``walk``, or down from ``-1 - walk``, and round the end."""
    tile = gl.where(walk >= 0, walk + n, -1 - walk - n)
    tile = gl.where(tile < 0, tile + count, tile)
    return gl.where(tile >= count, tile - count, tile)


@gluon.jit
def anew(x):
    """``x``, which the compiler does not recognise: what follows from it is computed where it is needed and kept nowhere.

    The warpgroup of loads has 24 registers. They are not enough for a counter in every form that a loop uses it in.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tell(words, place, word):
    """Leaves a number in shared memory for whoever waits for what is announced next."""
    words.index(place).store(gl.full([1], word, gl.int32, WORD))


@gluon.jit
def told(words, place):
    """The number that was left."""
    return gl.sum(words.index(place).load(WORD), 0)


@gluon.jit
def keep_turns(it, COUNTERS, RANKS, words, turn, STAGES: gl.constexpr):
    """Once the tile of step ``it - STAGES`` is released: counts what was added in it, then gets the turn of its own product."""
    if it > STAGES:
        count_contribution(COUNTERS, words, it - STAGES - 1)
    if it >= STAGES:
        await_rank(COUNTERS, RANKS, words, it - STAGES)
        mbarrier.arrive(turn.index(0), count=1)
