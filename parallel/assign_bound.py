"""A lower bound on what any assignment of a given balance must move, for packed documents on contiguous shards.

Pairs whose query and key both lie on rank r are free there. Of all others rank r can win, for k received keys and x received
query rows, at most

    rows * k            its own rows of the document that reaches into it from the left, k <= the keys before them
    keys * x            its own keys of the document that reaches out to the right, x <= the rows after them
    x * k               received rows against received keys, of one document at a time

and all that a rank does not hold must be won somewhere: at least the whole work less what the ranks hold for free. Each rank's
cost as a function of what it wins is replaced by its convex hull, and the cheapest pairs of all ranks are bought first (the
fractional knapsack). Every step only lowers the figure; neither piece sizes nor whether pieces fit together are looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import HI, K1, LO, Q0
from distattn.parallel.cells import Cells, Groups
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask

LEVELS = 256


class _Edges(NamedTuple):
    """What a rank has on either side, int64 [world]."""

    rows: np.ndarray  # own rows of the document that begins before the shard
    before: np.ndarray  # its keys before the shard
    keys: np.ndarray  # own keys of the document that goes on after the shard
    after: np.ndarray  # its rows after the shard
    one: np.ndarray  # bool, both are the same document


def lower_bound(layout: Layout, mask: Mask, tolerance: float, kv_row: int = 1, query_row: int = 8) -> float:
    """Least traffic, in the units of ``kv_row`` and ``query_row``, of any assignment to all ranks with equal speeds.

    Raises:
        ValueError: shards are not contiguous, or the mask is not one band a document that rows see keys before them in.
    """
    groups = Groups.of(mask)
    lower = np.append(layout.seg_start, layout.n_tokens)
    whole = len(layout.seg_start) == layout.world and (lower[1:] == lower[:-1] + layout.seg_count).all()
    if not whole or (np.diff(groups.ptr) > 1).any() or (_last_key(groups) > 0).any():
        raise ValueError("The bound is for causal documents, with or without a window, on contiguous shards without empty ranks.")
    cells = Cells.of(layout, groups)
    edges, width = _edges(groups, lower), int((_last_key(groups) - groups.table[:, LO] + 1).clip(max=groups.keys).max(initial=1))
    free = cells.load(layout.world, cells.work) - _straddling(groups, lower)
    total = int(cells.work.sum())
    most = (1 + tolerance) * total / layout.world
    room = np.maximum(most - free, 0.0)
    need = total - float(np.minimum(free, most).sum())
    won = room[:, None] * np.arange(LEVELS + 1) / LEVELS
    cost = _costs(won, edges, width, kv_row, query_row)
    return _knapsack(won, cost, need)


def _edges(g: Groups, lower: np.ndarray) -> _Edges:
    border = lower[1:-1]
    at = np.clip(np.searchsorted(g.first, border, side="right") - 1, 0, None)
    across = (g.first[at] < border) & (border < g.stop[at])
    left_keys = np.where(across, border - g.first[at], 0)
    right_rows = np.where(across, g.stop[at] - border, 0)
    size = np.diff(lower)
    zero = np.zeros(1, dtype=np.int64)
    rows = np.minimum(np.concatenate([zero, right_rows]), size)
    keys = np.minimum(np.concatenate([left_keys, zero]), size)
    group = np.where(across, at, -1)
    one = (np.concatenate([zero - 1, group]) == np.concatenate([group, zero - 2])) & (rows == size)
    return _Edges(rows, np.concatenate([zero, left_keys]), keys, np.concatenate([right_rows, zero]), one)


def _straddling(g: Groups, lower: np.ndarray) -> np.ndarray:
    """Visible pairs of the rows of each rank with keys before its shard, int64 [world]."""
    edges = _edges(g, lower)
    border = lower[:-1]
    at = np.clip(np.searchsorted(g.first, border, side="right") - 1, 0, None)
    width = np.where(g.plain[at], g.keys[at], _last_key(g)[at] - g.table[at, LO] + 1)
    # Row i of the shard sees min(before, width - 1 - i) of the keys before it.
    rows, before = edges.rows, edges.before
    whole = np.where(g.plain[at], rows, np.clip(width - 1 - before, 0, rows))
    falling = np.clip(width - 1 - whole, 0, rows - whole)
    return whole * before + falling * (width - 1 - whole) - falling * (falling - 1) // 2


def _last_key(g: Groups) -> np.ndarray:
    """How far past itself a row of each band sees, int64 [bands]."""
    return np.minimum(g.table[:, HI], g.table[:, K1] - 1 - g.table[:, Q0])


def _costs(won: np.ndarray, edges: _Edges, width: int, kv_row: int, query_row: int) -> np.ndarray:
    """The least it costs each rank to win so many pairs, by the bounds above, float64, shaped as ``won``.

    With k received keys of the document on the left and x received rows of the one on the right, the rest is won with more rows
    against those k, with more keys against those x, or by received rows against received keys of another document. Each of the
    three is concave or convex in k and in x alone, so that its least value lies at an end, or where a derivative is 0.
    """
    n, p, m, s = (np.minimum(column, width)[:, None].astype(np.float64) for column in edges[:4])
    one = edges.one[:, None]
    tiny = 1e-9

    def priced(k: np.ndarray, x: np.ndarray) -> np.ndarray:
        k, x = np.clip(k, 0.0, p), np.clip(x, 0.0, s)
        rest = np.maximum(won - n * k - m * x - np.where(one, k * x, 0.0), 0.0)
        more = _rectangle(rest, width, kv_row, query_row)
        apart = np.minimum(query_row * rest / np.maximum(k, tiny), kv_row * rest / np.maximum(x, tiny))
        return kv_row * k + query_row * x + np.where(one, more, np.minimum(more, apart))

    def ends(most: np.ndarray, rate: np.ndarray, other: np.ndarray | float) -> list[np.ndarray]:
        zero = np.zeros_like(won)
        return [zero, zero + most, np.maximum(won - other, 0.0) / np.maximum(rate, tiny)]

    best = np.full_like(won, np.inf)
    for x in [*ends(s, m, 0.0), np.maximum(won - n * p, 0.0) / np.maximum(m + np.where(one, p, 0.0), tiny)]:
        x = np.clip(x, 0.0, s)
        left = np.maximum(won - m * x, 0.0)
        for k in [*ends(p, n + np.where(one, x, 0.0), m * x), np.sqrt(query_row * left / kv_row)]:
            best = np.minimum(best, priced(k, x))
    for k in [*ends(p, n, 0.0), np.maximum(won - m * s, 0.0) / np.maximum(n + np.where(one, s, 0.0), tiny)]:
        k = np.clip(k, 0.0, p)
        left = np.maximum(won - n * k, 0.0)
        for x in [*ends(s, m + np.where(one, k, 0.0), n * k), np.sqrt(kv_row * left / query_row)]:
            best = np.minimum(best, priced(k, x))
    k = np.clip(np.sqrt(query_row * (won + n * m) / kv_row) - m, 0.0, p)
    return np.minimum(best, priced(k, np.maximum(won - n * k, 0.0) / np.maximum(m + np.where(one, k, 0.0), tiny)))


def _rectangle(pairs: np.ndarray, width: int, kv_row: int, query_row: int) -> np.ndarray:
    """The cheapest x rows against k <= width keys with x * k >= pairs."""
    k = np.clip(np.sqrt(query_row * pairs / kv_row), 1e-9, width)
    return query_row * pairs / k + kv_row * np.where(pairs > 0, k, 0.0)


def _knapsack(won: np.ndarray, cost: np.ndarray, need: float) -> float:
    """Least sum of costs that wins ``need`` pairs, each rank's cost replaced by its lower convex hull."""
    slopes, sizes = [], []
    for x, y in zip(won, cost, strict=True):
        if x[-1] <= 0:
            continue
        # From a grid point on, the cost is at least that of the point: move the points to the right ends of their cells.
        hull: list[tuple[float, float]] = [(0.0, 0.0)]
        for point in zip(x[1:].tolist(), np.append(y[0], y[1:-1]).tolist(), strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        slopes += [_slope(a, b) for a, b in zip(hull, hull[1:], strict=False)]
        sizes += [b[0] - a[0] for a, b in zip(hull, hull[1:], strict=False)]
    order = np.argsort(slopes, kind="stable")
    slope, size = np.array(slopes)[order], np.array(sizes)[order]
    taken = np.clip(need - (np.cumsum(size) - size), 0, size)
    return float((taken * slope).sum())


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
