"""Tile sizes, warps and pipeline stages of the portable Triton kernels: a table, never a search at import or at run time.

Chosen so that nothing spills and everything fits the shared memory of its class: ``launch/kernel_report.py`` checks each row.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """One row of the table."""

    block_q: int
    block_k: int
    warps: int
    stages: int


FORWARD, KEYS, QUERIES = "forward", "key_gradient", "query_gradient"


def padded(size: int) -> int:
    """The block that holds a head of ``size``: a power of two, at least 16 (the smallest side of a matrix product)."""
    return max(16, 1 << (size - 1).bit_length())


def architecture_class(backend: str, capability: int) -> str:
    """The row set for a target: by shared memory and matrix instruction, not by product name."""
    if backend != "cuda":
        return "gfx9"
    if capability in (86, 89) or capability >= 120:
        return "sm_86"  # 99 KB of shared memory a block
    if capability >= 100:
        return "sm_100"  # 227 KB, sums of products in a memory of their own
    return "sm_80" if capability < 90 else "sm_90"  # 163 KB; 227 KB


INTERPRETED = Launch(64, 64, 4, 1)

# Rows by the sum of the padded head sizes D and D_v: registers hold accumulators of both. float32 products run on the plain
# units; 2 stages keep their operands in shared memory, 1 stage makes them spill by kilobytes. The key gradient at 512 is the
# one place where no row is free of spills on both generations.
WHOLE = {
    FORWARD: {128: Launch(32, 32, 4, 2), 256: Launch(16, 32, 8, 2), 512: Launch(16, 16, 8, 2)},
    KEYS: {128: Launch(32, 32, 8, 2), 256: Launch(16, 32, 8, 2), 512: Launch(32, 16, 8, 2)},
    QUERIES: {128: Launch(32, 32, 8, 2), 256: Launch(32, 16, 8, 2), 512: Launch(16, 16, 8, 2)},
}
WHOLE_OF = {
    "sm_90": WHOLE | {KEYS: WHOLE[KEYS] | {512: Launch(16, 32, 16, 2)}},
    "sm_100": WHOLE
    | {
        FORWARD: WHOLE[FORWARD] | {256: Launch(32, 16, 8, 2), 384: Launch(16, 32, 8, 2)},
        KEYS: WHOLE[KEYS] | {128: Launch(32, 32, 16, 2), 512: Launch(16, 32, 16, 2)},
    },
    "gfx9": WHOLE
    | {
        KEYS: WHOLE[KEYS] | {128: Launch(16, 32, 8, 1), 384: Launch(16, 16, 4, 1), 512: Launch(16, 16, 4, 1)},
        QUERIES: WHOLE[QUERIES] | {384: Launch(16, 16, 8, 2), 512: Launch(16, 16, 4, 2)},
    },
}
HALF = {
    "sm_80": {
        FORWARD: {128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 2), 512: Launch(64, 32, 8, 2)},
        KEYS: {128: Launch(32, 64, 4, 2), 256: Launch(64, 64, 8, 2), 512: Launch(32, 32, 8, 1)},
        QUERIES: {128: Launch(128, 64, 8, 2), 256: Launch(64, 64, 8, 2), 512: Launch(64, 32, 8, 1)},
    },
    "sm_86": {
        FORWARD: {128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 2), 512: Launch(64, 32, 8, 2)},
        KEYS: {128: Launch(32, 64, 4, 2), 256: Launch(64, 64, 8, 2), 512: Launch(32, 32, 8, 1)},
        QUERIES: {128: Launch(128, 64, 8, 2), 256: Launch(64, 64, 8, 2), 512: Launch(64, 32, 8, 1)},
    },
    "sm_90": {
        FORWARD: {128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 3), 512: Launch(128, 32, 8, 2)},
        KEYS: {128: Launch(64, 128, 8, 2), 256: Launch(64, 64, 8, 2), 384: Launch(16, 64, 8, 2), 512: Launch(32, 32, 8, 1)},
        QUERIES: {128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 2), 512: Launch(64, 32, 8, 2)},
    },
    "sm_100": {
        FORWARD: {128: Launch(128, 128, 8, 2), 256: Launch(128, 64, 8, 3), 384: Launch(128, 32, 8, 2), 512: Launch(64, 64, 8, 1)},
        KEYS: {128: Launch(64, 128, 8, 2), 256: Launch(64, 64, 8, 1), 384: Launch(16, 64, 8, 1), 512: Launch(32, 32, 8, 1)},
        QUERIES: {128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2), 384: Launch(64, 32, 8, 1), 512: Launch(64, 32, 8, 1)},
    },
    "gfx9": {
        FORWARD: {128: Launch(128, 64, 4, 1), 256: Launch(128, 64, 4, 1), 512: Launch(64, 32, 4, 1)},
        KEYS: {128: Launch(64, 64, 4, 1), 256: Launch(32, 64, 4, 1), 512: Launch(16, 32, 4, 1)},
        QUERIES: {128: Launch(64, 64, 4, 1), 256: Launch(64, 64, 4, 1), 512: Launch(32, 32, 4, 1)},
    },
}


def launch_parameters(architecture: str, kind: str, block_d: int, block_dv: int, element_size: int) -> Launch:
    """The row for a kernel (FORWARD, KEYS or QUERIES) at padded head sizes: the smallest that holds them."""
    if architecture == "interpreter":
        return INTERPRETED
    rows = (WHOLE_OF.get(architecture, WHOLE) if element_size == 4 else HALF[architecture])[kind]
    return rows[min(size for size in rows if block_d + block_dv <= size)]
