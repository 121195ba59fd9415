"""Which rank computes which piece of attention, so that all are done at the same time and little travels for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask


@dataclass(frozen=True)
class Cost:
    """What work and rows weigh."""

    key_row: int = 1
    query_row: int = 8


@dataclass(frozen=True)
class Assignment:
    """Pieces of attention and who computes them, int64 columns; together they cover every visible pair exactly once.

    Attributes:
        server: the rank that computes.
        owner: the rank that holds the queries.
        q_start, q_stop: rows of the owner's shard.
        k_first, k_stop: positions of the keys that the piece covers.
    """

    server: np.ndarray
    owner: np.ndarray
    q_start: np.ndarray
    q_stop: np.ndarray
    k_first: np.ndarray
    k_stop: np.ndarray


def assign(
    layout: Layout,
    mask: Mask,
    *,
    cost: Cost,
    servers: tuple[int, ...] | None = None,
    tolerance: float = 0.02,
    receive_rows: int | None = None,
    smallest: int = 128,
    speeds: tuple[int, ...] | None = None,
) -> Assignment:
    """Rows in equal runs over all ranks."""
    rows, world = layout.rows_all, layout.world
    total = int(rows.sum())
    cuts = np.unique(np.concatenate([layout.row_ptr, total * np.arange(world + 1) // world]))
    owner = np.searchsorted(layout.row_ptr, cuts[:-1], side="right") - 1
    server = np.minimum(cuts[:-1] * world // max(total, 1), world - 1)
    base = layout.row_ptr[owner]
    zero = np.zeros_like(owner)
    return Assignment(server, owner, cuts[:-1] - base, cuts[1:] - base, zero, zero + layout.n_tokens)
