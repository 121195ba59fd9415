"""Who computes which piece of core attention: equal time on every rank for few bytes.

Core-attention disaggregation (Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation"):
documents stay where they are, pieces of their attention go where there is time. Three steps, all in integers with stable sorts,
so that every rank makes the same assignment without a word:

    shed    ranks above their share choose what to give away
    match   servers with room are told which document they help with, so that few help with two
    carve   what a document gives away is cut into one piece a server, of the shape that buys most pairs per byte
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from distattn.parallel.assign_cost import Cost
from distattn.parallel.assignment import KV, Assignment, Load
from distattn.parallel.carve import Piece, Uncut, Weights, carve
from distattn.parallel.cells import Cells, Groups
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.match import Full, Matching
from distattn.parallel.shed import shed
from distattn.parallel.strips import RowStrip, Strip

# In this order, until one works: how many parts make a share, one of which is left free to round cuts in, and how much of the
# tolerance is used: other shares have other cuts.
ATTEMPTS = ((512, 1.0), (256, 1.0), (128, 1.0), (512, 0.9), (256, 0.8), (512, 0.7), (256, 0.6), (512, 0.5), (256, 0.3))
ONE = 1 << 20  # speeds and tolerances are fractions of it
LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # tolerances among which the least predicted time is sought


def assign(
    layout: Layout,
    mask: Mask,
    *,
    cost: Cost | None = None,
    servers: Sequence[int] | None = None,
    tolerance: float | None = 0.02,
    receive_rows: int | None = None,
    smallest: int = 128,
    speeds: Sequence[float] | None = None,
    hops: int | None = 1,
) -> Assignment:
    """Pieces for every rank, none of which has more than ``(1 + tolerance)`` times its part of the time.

    Time is visible pairs, and what the short documents of a rank take longer than ``cost`` says of long ones.

    Args:
        layout: where the rows are; ranks may hold none. Segments must be runs of neighbouring positions.
        cost: weights of rows and seconds; None: work is pairs, traffic is rows of 64:8 heads.
        servers: the ranks that compute; None: all. The others give all their work away.
        tolerance: None: the one that has the least predicted time, communication included, with the seconds of ``cost``; where
            that knows no links, the least that can be kept.
        receive_rows: the most rows that a rank may receive, those of keys and those of queries together.
        smallest: fewest rows of a document in a piece, where its owner holds more of that document.
        speeds: of each rank [world], in any unit: its part of the time is in proportion.
        hops: that rows will take (:func:`~distattn.parallel.schedules.disaggregate.disaggregate`), for predicted times; None: as
            many as are faster.

    Raises:
        ValueError: an argument that makes no sense, or a limit that cannot be kept; names it, and what can be kept.
    """
    if hops is not None and hops not in (1, 2, 3):
        raise ValueError(f"hops is {hops!r}. Pass 1, 2 or 3, that rows will take, or None for as many as are faster.")
    parts = _parts(layout.world, servers, speeds)
    _check(layout, mask, smallest, tolerance, receive_rows)
    groups = Groups.of(mask)
    problem = _Problem(layout, mask, cost or Cost(), parts, smallest, groups, Cells.of(layout, groups), hops)
    if tolerance is None:
        return _fastest(problem, receive_rows)
    found = _solve(problem, tolerance)
    if found is None:
        raise ValueError(_refusal(problem, tolerance))
    if receive_rows is not None and _most_received(found, problem) > receive_rows:
        return _within(problem, tolerance, receive_rows)
    return found


class _Problem(NamedTuple):
    layout: Layout
    mask: Mask
    cost: Cost
    parts: np.ndarray  # speeds of the servers, 0 of other ranks, int64 [world]
    smallest: int
    groups: Groups
    cells: Cells
    hops: int | None

    def seconds(self, load: Load) -> float:
        """Predicted, of the slowest rank."""
        ways = {None: (None, self.layout.rows_all), 1: (None,)}.get(self.hops, (self.layout.rows_all,))
        return min(float(self.cost.seconds(load, self.parts / ONE, held).max(initial=0.0)) for held in ways)


def _parts(world: int, servers: Sequence[int] | None, speeds: Sequence[float] | None) -> np.ndarray:
    """Integer speeds: whole numbers of 1 / ONE of the fastest rank's."""
    speed = np.ones(world) if speeds is None else np.asarray(speeds, dtype=np.float64)
    if speed.shape != (world,) or not np.isfinite(speed).all() or (speed < 0).any():
        raise ValueError(f"speeds must be {world} numbers of 0 or more, one a rank; found {speeds!r}.")
    chosen = np.ones(world, dtype=bool)
    if servers is not None:
        wrong = [s for s in servers if not 0 <= s < world]
        if wrong or not len(servers) or len(set(servers)) < len(servers):
            raise ValueError(
                f"servers must be different ranks of 0 to {world - 1}, at least one; found {tuple(servers)}. "
                "Name ranks of the layout; a pool's ranks belong to it too, without rows."
            )
        chosen[:] = False
        chosen[list(servers)] = True
    speed = np.where(chosen, speed, 0.0)
    if not speed.any():
        raise ValueError("No server has a speed above 0. Name one that computes.")
    return np.rint(speed / speed.max() * ONE).astype(np.int64)


def _check(layout: Layout, mask: Mask, smallest: int, tolerance: float | None, receive_rows: int | None) -> None:
    if layout.step != 1 and (layout.seg_count > 1).any():
        raise ValueError(
            f"disaggregate cuts runs of neighbouring positions, but the shards of {layout!r} hold each {layout.step}th position. "
            "Use a contiguous or zigzag layout; striped shards of causal masks are balanced as they are."
        )
    if mask.n_tokens != layout.n_valid:
        raise ValueError(
            f"{mask!r} was asked for on {layout!r}, which holds {layout.n_valid} tokens. Make both for one length; "
            "padding belongs to the layout only."
        )
    if smallest < 1:
        raise ValueError(f"smallest is {smallest}, but a piece has at least 1 row. Pass 128, below which kernels slow down.")
    if tolerance is not None and not 0 <= tolerance < layout.world:
        raise ValueError(f"tolerance is {tolerance}, the largest load over its part less 1. Pass 0.02, or None for the fastest.")
    if receive_rows is not None and receive_rows < 0:
        raise ValueError(f"receive_rows is {receive_rows}. Pass the most that a rank may receive, or None for no limit.")


def _solve(problem: _Problem, tolerance: float, weights: Weights | None = None) -> Assignment | None:
    """An assignment that keeps to the tolerance and the smallest piece, or None."""
    layout, cost, groups, cells = problem.layout, problem.cost, problem.groups, problem.cells
    load = cells.load(layout.world, cost.stretched(cells.work, cells.stop - cells.first))
    total, whole = int(load.sum()), int(problem.parts.sum())
    # Whether rows will be split by keys is not known before they are cut: about half of them are.
    weights = weights or Weights(cost.query_row + cost.partial_row, 2 * cost.kv_row, problem.smallest)
    for grain, used in ATTEMPTS:
        grown = ONE + int(tolerance * used * ONE)
        shares = np.array([total * part * grown // (whole * ONE) for part in problem.parts.tolist()], dtype=np.int64)
        work = shed(groups, cells, load, shares, weights)
        given = [strip for pool in work.pools for strip in pool.strips] + list(work.short) + [p.strip for p in work.visits]
        room = np.maximum(shares - work.kept, 0)
        with suppress(Full, Uncut):
            matching = Matching(
                work, room.tolist(), weights, max(1, int(shares.max()) // grain), cells.rank.tolist(), cost.devices
            )
            pieces = matching.pieces
            for pool, chosen in matching.shares:
                pieces = pieces + carve(pool.region(), chosen, weights)
            return _Columns(layout, groups, cells).table(pieces, given, problem.parts > 0)
    return None


def _most_received(assignment: Assignment, problem: _Problem) -> int:
    return int(Load.of(assignment, problem.layout, problem.mask).received(1, 1, 1).max(initial=0))


def _within(problem: _Problem, tolerance: float, receive_rows: int) -> Assignment:
    """An assignment whose ranks receive at most so many rows: pieces as high as wide have the fewest rows."""
    found = _solve(problem, tolerance, Weights(1, 1, problem.smallest))
    least = None if found is None else _most_received(found, problem)
    if found is not None and least is not None and least <= receive_rows:
        return found
    raise ValueError(
        f"receive_rows={receive_rows} cannot be kept with tolerance={tolerance}: a rank must receive {least} rows of keys and "
        f"queries. Pass receive_rows={least}, a larger tolerance, or cut long documents."
    )


def _refusal(problem: _Problem, tolerance: float) -> str:
    """Which limit binds, and what can be reached."""
    ladder = [t for t in LADDER if t > tolerance] + [float(problem.layout.world)]
    kept = next((t for t in ladder if _solve(problem, t) is not None), None)
    said = (
        f"tolerance={tolerance} cannot be kept with smallest={problem.smallest}: no cut of {problem.mask!r} on "
        f"{problem.layout!r} was found that leaves every rank at most {1 + tolerance:g} times its part of the work. "
        + (f"tolerance={kept:g} can be kept" if kept is not None else "No larger tolerance helps")
    )
    for smaller in (problem.smallest // 4, problem.smallest // 16, 1):
        if 0 < smaller < problem.smallest and _solve(problem._replace(smallest=smaller), tolerance) is not None:
            return f"{said}, or smallest={smaller}."
    return f"{said}; the size of pieces is not what binds."


def _fastest(problem: _Problem, receive_rows: int | None) -> Assignment:
    best: tuple[float, Assignment] | None = None
    for tolerance in (*LADDER, float(problem.layout.world)):
        found = _solve(problem, tolerance)
        if found is None:
            continue
        load = Load.of(found, problem.layout, problem.mask)
        if receive_rows is not None and int(load.received(1, 1, 1).max(initial=0)) > receive_rows:
            continue
        seconds = problem.seconds(load)
        if best is None or seconds < best[0] * (1 - 1e-9):
            best = (seconds, found)
        if not problem.cost.has_links or not load.flows.rows[load.flows.kind != KV].any():
            break  # the evenest is the fastest; or nothing moves any more
    if best is None and receive_rows is None:
        if (problem.parts > 0).all():
            return _at_home(problem.layout)  # too few pairs for shares of them
        raise ValueError(
            f"{problem.mask!r} on {problem.layout!r} has too few visible pairs to be shared out to servers of these speeds. "
            "Use longer sequences, fewer ranks or equal speeds."
        )
    if best is None:
        raise ValueError(
            f"receive_rows={receive_rows} cannot be kept with any tolerance: documents reach over more ranks than a rank can "
            "receive keys of. Pass more rows, or cut long documents."
        )
    return best[1]


def _at_home(layout: Layout) -> Assignment:
    """Every query is computed by its owner."""
    ranks = np.flatnonzero(layout.rows_all)
    zero = np.zeros_like(ranks)
    return Assignment(ranks, ranks, zero, layout.rows_all[ranks], zero, zero + layout.n_tokens)


class _Columns:
    """From pieces of cells to columns of rows of shards."""

    def __init__(self, layout: Layout, groups: Groups, cells: Cells):
        self.layout, self.n = layout, layout.n_tokens
        self.rank, self.group = cells.rank.tolist(), cells.group.tolist()
        self.offset = (cells.row - cells.first).tolist()
        self.k0, self.keys = groups.k0.tolist(), groups.keys.tolist()

    def table(self, pieces: list[Piece], given: list[Strip | RowStrip], serves: np.ndarray) -> Assignment:
        """The pieces, and what stays at home."""
        moved = [self._row(p.server, p.strip, p.k_first, p.k_stop) for p in pieces]
        # Of a strip that is given away its owner keeps the keys from the cap on, where its rows see any.
        taken = np.array([self._row(0, s, 0, min(s.cap, s.reach)) for s in given], dtype=np.int64).reshape(-1, 6)
        table = np.concatenate([np.array(moved, dtype=np.int64).reshape(-1, 6), self._home(taken, serves)])
        table = table[np.lexsort((table[:, 4], table[:, 2], table[:, 1], table[:, 0]))]
        return Assignment(*(np.ascontiguousarray(column) for column in table.T))

    def _row(self, server: int, strip: Strip | RowStrip, k_first: int, k_stop: int) -> tuple[int, int, int, int, int, int]:
        group, start = self.group[strip.cell], self.offset[strip.cell] + strip.start
        whole = isinstance(strip, RowStrip) or k_stop >= strip.seen_by_last(self.keys[group])
        first, last = self.k0[group] + k_first if k_first else 0, self.n if whole else self.k0[group] + k_stop
        return server, self.rank[strip.cell], start, start + strip.stop - strip.start, first, last

    def _home(self, taken: np.ndarray, serves: np.ndarray) -> np.ndarray:
        """What the owners keep: rows between those that are given away, and the last keys of rows that are cut by keys."""
        ranks = np.flatnonzero((self.layout.rows_all > 0) & serves)
        taken = taken[serves[taken[:, 1]]]
        owner, start, stop, last = taken[np.lexsort((taken[:, 2], taken[:, 1]))][:, [1, 2, 3, 5]].T
        # A gap begins with the shard and after each strip, and ends before each strip and with the shard.
        begins = np.stack([np.concatenate([ranks, owner]), np.concatenate([np.zeros_like(ranks), stop])])
        ends = np.stack([np.concatenate([owner, ranks]), np.concatenate([start, self.layout.rows_all[ranks]])])
        begins, ends = begins[:, np.lexsort(begins[::-1])], ends[:, np.lexsort(ends[::-1])]
        zero = np.zeros_like(begins[0])
        gaps = np.stack([begins[0], begins[0], begins[1], ends[1], zero, zero + self.n], 1)
        rest = np.stack([owner, owner, start, stop, last, np.full_like(owner, self.n)], 1)
        return np.concatenate([gaps[gaps[:, 2] < gaps[:, 3]], rest[last < self.n]])
