"""From the shape of a call to the work of its launches: which tiles, in which order, by whom, and what a cut would cost."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from distattn.kernels.bands import Bands
from distattn.kernels.gluon_division import Costs, costs_of
from distattn.kernels.gluon_launch import FORWARD, ORDERED, QUERIES
from distattn.kernels.gluon_order import Order, heads_at_once, order
from distattn.kernels.gluon_schedule import Schedule, heads_per_section, occupancy, schedule
from distattn.kernels.tiles import TileTable, tile_table


class Shape(NamedTuple):
    """Of a call: rows, heads and head sizes of queries and of keys."""

    n_q: int
    n_k: int
    heads: int
    key_heads: int
    d: int
    d_v: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        return cls(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2])

    @property
    def group(self) -> int:
        return self.heads // self.key_heads


class Tiling(NamedTuple):
    """How a kernel cuts a call: rows of its stationary and of its streamed tiles, what it does with a pair of them.

    ``products`` of d and of d_v a pair of rows; ``kept`` columns of float32 sums a stationary row; ``unit`` times every
    streamed tile is used; ``stay``: its programs work through many items.
    """

    rows: int
    block: int
    products: int
    kept: int
    unit: int
    stay: bool


def tiling(kind: str, row: Any, shape: Shape) -> Tiling:
    """Of a launch row."""
    d, d_v = shape.d, shape.d_v
    if kind == FORWARD:
        return Tiling(row.consumers * 64, row.block_k, d + d_v, d_v, 1, True)
    if kind == QUERIES:
        return Tiling(128, row.block_k, 2 * d + d_v, d, 1, False)
    return Tiling(row.key_tiles * 64, row.block_q, 2 * d + 2 * d_v, d + d_v, shape.group, False)


def costs_of_cutting(kind: str, row: Any, shape: Shape) -> Costs:
    """What a cut costs a kernel."""
    found = tiling(kind, row, shape)
    return costs_of(2 * found.rows * found.block * found.products, found.rows * found.kept * 4)


class Plan(NamedTuple):
    """The tiles of a launch and who works on them; ``work`` is None where there is none, ``order`` where any will do."""

    table: TileTable
    work: Schedule | None
    order: Order | None = None


def plan(kind: str, row: Any, shape: Shape, bands: Bands, programs: int, costs: Costs | None, align: int = 1) -> Plan:
    """The work of one launch of ``kind``. Equal arguments give the same objects: everything is cached once a mask.

    Args:
        programs: multiprocessors.
        costs: of cutting; None cuts nothing.
        align: as for :func:`distattn.kernels.tiles.tile_table`.
    """
    found = tiling(kind, row, shape)
    by_query = kind in (FORWARD, QUERIES)
    blocks = (found.rows, found.block) if by_query else (found.block, found.rows)
    table = tile_table(bands, shape.n_q, shape.n_k, *blocks, "q" if by_query else "k", align)
    if table.n_work == 0 or shape.heads == 0:
        return Plan(table, None)
    heads, section = _heads(kind, shape)
    made = None
    if kind == ORDERED:
        assert costs is None, "ranks count whole items"
        section = heads_at_once(table, heads, section, shape.group, programs)
        made = order(table, found.block)
        table = made.table
    work = schedule(table, found.rows, found.block, heads, section, programs, found.stay, found.unit, costs)
    return Plan(table, work, made)


def _heads(kind: str, shape: Shape) -> tuple[int, int]:
    """(heads of items, how many of them are walked together)."""
    heads, streamed = (shape.heads, shape.n_k) if kind in (FORWARD, QUERIES) else (shape.key_heads, shape.group * shape.n_q)
    return heads, heads_per_section(heads, shape.key_heads, streamed * (shape.d + shape.d_v) * 2)


def counted_occupancy(kind: str, row: Any, shape: Shape, bands: Bands, programs: int, costs: Costs | None) -> float:
    """Mean over busiest multiprocessor of one launch, in streamed tiles; 1.0 where there is no work."""
    found, table = tiling(kind, row, shape), plan(kind, row, shape, bands, programs, None).table
    if table.n_work == 0:
        return 1.0
    return occupancy(table, *_heads(kind, shape), programs, found.stay, found.unit, costs)
