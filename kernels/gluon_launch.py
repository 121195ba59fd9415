"""Tiles, stages and registers of the Hopper kernels: a table, never a search at import or at run time.

A multiprocessor has 64 K registers and 227 KB of shared memory. Partitions are warpgroups; ``registers`` is what a consumer
asks for after the start (setmaxnreg), ``producer_registers`` what the loads are left with, ``entry_registers`` what the
launch is compiled for: their sum over the warpgroups has to fit.
"""

from __future__ import annotations

from typing import NamedTuple

FORWARD, KEYS, QUERIES, FUSED, SCRATCH = "forward", "key_gradient", "query_gradient", "fused_gradient", "add_scratch"
MERGE, ADD, ORDERED = "merge_pieces", "add_pieces", "ordered_gradient"

# Widths of shared memory are powers of two: a head of another size lies in two parts, and one of 256 so that its sums need not
# all be at hand when they are joined with what was there.
PARTS = {64: (64, 0), 96: (64, 32), 128: (128, 0), 192: (128, 64), 256: (128, 128)}


class Forward(NamedTuple):
    """One row of the table: 64 query rows a consumer."""

    consumers: int = 2
    block_k: int = 128
    stages: int = 2
    registers: int = 240
    producer_registers: int = 24
    entry_registers: int = 168
    ping_pong: bool = True
    maximum_first: bool = False
    stage_out: bool = True  # o of the output dtype goes through shared memory of its own, where there is room
    split: bool = True  # cuts items where that pays; see gluon_division.py


# By (D, D_v). Three consumers at D 64 were 2 to 7% faster in the prototypes, and spill. 192 and 256 leave no room to stage o.
FORWARD_ROWS = {
    (64, 64): Forward(stages=4),
    (96, 96): Forward(stage_out=False),
    (128, 128): Forward(),
    (192, 128): Forward(stage_out=False),
    (256, 256): Forward(block_k=64, stage_out=False),
}


class Keys(NamedTuple):
    """Key gradient: ``key_tiles`` times 64 keys a program; with 1 the two consumers share them and halve the head."""

    key_tiles: int = 2
    block_q: int = 64
    stages: int = 2
    registers: int = 240
    producer_registers: int = 24
    entry_registers: int = 168
    values_first: bool = False
    split: bool = True


class Queries(NamedTuple):
    """Query gradient: 128 queries a program."""

    block_k: int = 64
    stages: int = 3
    registers: int = 240
    producer_registers: int = 24
    entry_registers: int = 168
    split: bool = True


KEYS_ROWS = {(64, 64): Keys(), (96, 96): Keys(), (128, 128): Keys(), (192, 128): Keys(block_q=32), (256, 256): Keys(1, 32)}
QUERIES_ROWS = {
    (64, 64): Queries(stages=4),
    (96, 96): Queries(stages=4),
    (128, 128): Queries(stages=4),
    (192, 128): Queries(32, 5),
    (256, 256): Queries(32),
}
# dq leaves a fused step in pieces of 64 x 64, one a consumer: halves of the head at D 128, halves of 128 queries at D 64.
FUSED_ROWS = {(64, 64): Keys(block_q=128, split=False), (128, 128): Keys(split=False)}
ROWS: dict[str, dict[tuple[int, int], NamedTuple]] = {
    FORWARD: {**FORWARD_ROWS}, KEYS: {**KEYS_ROWS}, QUERIES: {**QUERIES_ROWS}, FUSED: {**FUSED_ROWS}, ORDERED: {**FUSED_ROWS},
}  # fmt: skip
# A softcap keeps tanh of the scores until their gradients are known: half as many queries at a time leave the registers for it.
SOFTCAP_ROWS: dict[str, dict[tuple[int, int], NamedTuple]] = {KEYS: {(96, 96): Keys(block_q=32), (128, 128): Keys(block_q=32)}}
