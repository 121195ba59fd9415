"""Shedding: what an over-loaded rank gives away, and what it keeps.

It gives tails of its longest documents, whose rows buy most pairs, or what its rows do with keys that it would have to receive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple

import numpy as np

from distattn.parallel.carve import Piece, Region, Weights
from distattn.parallel.cells import Cells, Groups
from distattn.parallel.strips import WHOLE, RowStrip, Strip


@dataclass
class Pool:
    """Work of one document that is given away."""

    group: int
    by_keys: bool
    strips: list[Strip | RowStrip] = field(default_factory=list)

    @property
    def work(self) -> int:
        """Visible pairs."""
        return sum(s.below(WHOLE) for s in self.strips)

    def region(self) -> Region:
        """All of it, for :func:`~distattn.parallel.carve.carve`."""
        return Region(tuple(self.strips), 0, WHOLE).trimmed()


class Source(NamedTuple):
    """A cell that can give work away."""

    cell: int
    group: int
    start: int
    stop: int
    work: int
    plain: bool
    seen: int  # keys that the first row sees (plain)
    keys: int  # keys of the group (plain)
    before: int  # keys of the group in front of the cell's own rows: the rank would have to receive them (plain)
    top: int  # pairs of the last row

    def strip(self, start: int, cap: int = WHOLE) -> Strip:
        return Strip(self.cell, start, self.stop, self.seen + start - self.start, min(cap, self.keys))

    def tail(self, least: int, keys_kept: int, groups: Groups) -> int:
        """The last row from which on the rows have ``least`` pairs beyond the first ``keys_kept`` keys."""
        low, high = self.start, self.stop
        while low < high:
            middle = (low + high + 1) // 2
            if self.plain:
                s = self.strip(middle)
                work = s.below(WHOLE) - s.below(keys_kept)
            else:
                work = groups.rows_work(self.group, middle, self.stop)
            if work >= least:
                low = middle
            else:
                high = middle - 1
        return low


def tiles(rows: int, keys: int, parts: int, query_row: int, kv_row: int) -> int:
    """About what ``parts`` equal tiles of a rectangle cost together."""
    strips = min(max(isqrt(query_row * rows * parts // max(1, kv_row * keys)), 1), parts)
    return query_row * rows * -(-parts // strips) + kv_row * keys * strips


def give(source: Source, amount: int, typical: int, weights: Weights, groups: Groups) -> list[Strip | RowStrip]:
    """Strips of ``source`` with at least ``amount`` pairs, in the shape that costs least; all of it where little would stay."""
    n, smallest = source.stop - source.start, weights.smallest
    if not source.plain:
        at = _snap(source.tail(amount, 0, groups), source, smallest)
        work = groups.rows_work(source.group, at, source.stop)
        return [RowStrip(source.cell, at, source.stop, work, source.group, groups)]
    parts = max(1, -(-amount // max(typical, 1)))
    rows = _snap(source.tail(amount, 0, groups), source, smallest)
    whole: list[Strip | RowStrip] = [source.strip(rows)]
    if not source.before or rows == source.start:
        return whole
    by_rows = tiles(source.stop - rows, source.top, parts, weights.query_row, weights.kv_row) + weights.kv_row * source.before
    front = n * source.before
    if amount <= front:
        cap = -(-amount // n)
        if cap < smallest or n < smallest:
            return whole
        by_keys = tiles(n, cap, parts, weights.query_row, weights.kv_row) + weights.kv_row * (source.before - cap)
        return [source.strip(source.start, cap)] if by_keys < by_rows else whole
    at = _snap(source.tail(amount - front, source.before, groups), source, smallest)
    by_keys = tiles(n, amount // n, parts, weights.query_row, weights.kv_row)
    if by_keys >= by_rows or at == source.start:
        return whole
    first = source.strip(source.start, source.before)
    return [first._replace(stop=at), source.strip(at)]


def _snap(at: int, source: Source, smallest: int) -> int:
    """A place to cut the cell at or before ``at`` that leaves neither side smaller than allowed."""
    if at - source.start < smallest or source.stop - source.start < 2 * smallest:
        return source.start
    return min(at, source.stop - smallest)


def amounts(groups: Groups, cells: Cells, giving: np.ndarray, excess: np.ndarray, wanted_keys: int) -> np.ndarray:
    """How many pairs each of the cells ``giving`` gives, longest documents of a rank first, so that together they give the rank's
    ``excess`` [world]; int64 [n].

    Rows that see fewer than about ``wanted_keys`` keys are worth less than they cost to move, so a document gives those only when
    the others have none better.
    """
    top = _last_row(groups, cells, giving)
    order = np.lexsort((giving, -top, cells.rank[giving]))
    chosen, top = giving[order], top[order]
    rank, group, first, work = cells.rank[chosen], cells.group[chosen], cells.first[chosen], cells.work[chosen]
    begin, seen = np.searchsorted(rank, rank, side="left"), _seen(groups, cells, chosen)
    excess, given = excess.copy(), np.zeros(len(chosen), dtype=np.int64)
    for floor in (wanted_keys // 2, wanted_keys // 4, wanted_keys // 8, 0):
        available = work
        if floor:  # with no floor, rows whose last one sees nothing have work too
            available = np.where(top > floor, work, 0)
            some = np.flatnonzero(groups.plain[group] & (seen <= floor) & (top > floor))
            from_row = first[some] + floor + 1 - seen[some]
            available[some] -= groups.work_before(group[some], from_row) - groups.work_before(group[some], first[some])
        more = np.maximum(available - given, 0)
        before = np.cumsum(more) - more
        more = np.clip(excess[rank] - (before - before[begin]), 0, more)
        given += more
        np.subtract.at(excess, rank, more)
        if not excess.any():
            break
    result = np.zeros(len(chosen), dtype=np.int64)
    result[order] = given
    return result


class Shed(NamedTuple):
    """What is given away, and what is left."""

    pools: list[Pool]
    short: list[RowStrip]  # documents of ranks that keep nothing, which no server wants alone
    kept: np.ndarray  # pairs that each rank keeps, int64 [world]
    visits: list[Piece]  # rows that go to the rank with the keys before them
    held: dict[int, dict[int, int]]  # by group and rank with room: the first keys of the group, which the rank has anyway


def shed(groups: Groups, cells: Cells, load: np.ndarray, shares: np.ndarray, weights: Weights) -> Shed:
    """What every rank above its share gives away; and ranks below it, of documents that are cut, where their keys cost too much.

    Args:
        load: pairs of the rows of each rank, int64 [world].
        shares: the most that each may compute, int64 [world].
    """
    room = np.sort(shares - load)
    room = room[room > 0]
    typical = int(room[(len(room) - 1) // 2]) if len(room) else 1
    wanted = isqrt(typical * weights.query_row // weights.kv_row)
    giving = np.flatnonzero((load > shares)[cells.rank])
    amount = amounts(groups, cells, giving, np.maximum(load - shares, 0), wanted)
    kept = load.copy()
    pools: dict[int, Pool] = {}
    for source, pairs in zip(_sources(groups, cells, giving[amount > 0]), amount[amount > 0].tolist(), strict=True):
        strips = give(source, pairs, typical, weights, groups)
        pools.setdefault(source.group, Pool(source.group, source.plain)).strips += strips
        kept[cells.rank[source.cell]] -= sum(s.below(WHOLE) for s in strips)
    held: dict[int, dict[int, int]] = {}
    touched = _of_groups(list(pools), groups, cells) & groups.plain[cells.group]
    for source in _sources(groups, cells, np.flatnonzero(touched & (load <= shares)[cells.rank])):
        rank = int(cells.rank[source.cell])
        if _too_dear(source, int(shares[rank] - kept[rank]), weights):
            pools[source.group].strips.append(source.strip(source.start, source.before))
            kept[rank] -= (source.stop - source.start) * source.before
        else:
            mine_held = held.setdefault(source.group, {})
            mine_held[rank] = max(mine_held.get(rank, 0), source.before + source.stop - source.start)
    light = groups.plain[cells.group] & ~touched & (load <= shares)[cells.rank]
    dear = light & (_saved(groups, cells, weights) > 0)
    light &= _of_groups(cells.group[dear], groups, cells)
    visits = _visits(_sources(groups, cells, np.flatnonzero(light)), cells, shares, kept, weights)
    return Shed(*_gathered(pools, shares, typical, cells, groups), kept, visits, held)


def _visits(sources: list[Source], cells: Cells, shares: np.ndarray, kept: np.ndarray, weights: Weights) -> list[Piece]:
    """Rows that go to the rank that holds the rows before them, and has the keys, where that is cheaper than all those keys.

    Args:
        sources: cells of ranks that give nothing away, of documents that are not cut and have rows for which it might be.
        kept: is changed by what goes.
    """
    saved = {s.cell: weights.kv_row * s.before - weights.query_row * (s.stop - s.start) for s in sources if s.before}
    neighbour = {(s.group, s.stop): s for s in sources}
    gone: set[int] = set()
    visits = []
    for source in sorted((s for s in sources if saved.get(s.cell, 0) > 0), key=lambda s: (-saved[s.cell], s.cell)):
        host = neighbour.get((source.group, source.start))
        strip = source.strip(source.start, source.before)
        if host is None or host.cell in gone or source.cell in gone:
            continue
        rank, work = int(cells.rank[host.cell]), strip.below(WHOLE)
        if kept[rank] + work > shares[rank]:
            continue
        kept[rank] += work
        kept[int(cells.rank[source.cell])] -= work
        # The host goes on receiving the keys before its own rows.
        gone |= {source.cell, host.cell}
        visits.append(Piece(rank, strip, 0, source.before))
    return visits


def _too_dear(source: Source, room: int, weights: Weights) -> bool:
    """Whether a rank with room for more pays more for the keys before its rows than for other work instead."""
    if not source.before:
        return False
    q, kv, rows = weights.query_row, weights.kv_row, source.stop - source.start
    keep = kv * source.before + min(2 * isqrt(q * kv * room), q * room // (source.before + rows))
    return 2 * isqrt(q * kv * (room + rows * source.before)) * 11 // 10 < keep


def _gathered(
    pools: dict[int, Pool], shares: np.ndarray, typical: int, cells: Cells, groups: Groups
) -> tuple[list[Pool], list[RowStrip]]:
    """The pools in the order of their documents, and the rows of short documents that leave a rank altogether."""
    big: list[Pool] = []
    short: list[RowStrip] = []
    for group in sorted(pools):
        pool = pools[group]
        pool.strips.sort(key=lambda s: s.start)
        if 4 * pool.work < typical and all(shares[cells.rank[s.cell]] == 0 for s in pool.strips):
            short += [RowStrip(s.cell, s.start, s.stop, s.below(WHOLE), group, groups) for s in pool.strips]
        else:
            big.append(pool)
    return big, short


def _of_groups(some: Sequence[int] | np.ndarray, g: Groups, c: Cells) -> np.ndarray:
    """Whether each cell is of one of these groups, bool [cells]."""
    chosen = np.zeros(len(g), dtype=bool)
    chosen[some] = True
    return chosen[c.group]


def _seen(g: Groups, c: Cells, chosen: np.ndarray | slice) -> np.ndarray:
    """Keys that the first row of each cell sees, in plain groups; int64 [n]."""
    group = c.group[chosen]
    return c.first[chosen] - g.first[group] + g.lead[group]


def _before(g: Groups, c: Cells, chosen: np.ndarray | slice) -> np.ndarray:
    """Keys of the group in front of the cells' own rows, in plain groups; int64 [n]."""
    group = c.group[chosen]
    return np.clip(c.first[chosen] - g.k0[group], 0, np.minimum(g.keys[group], _seen(g, c, chosen)))


def _saved(g: Groups, c: Cells, weights: Weights) -> np.ndarray:
    """Weight of the keys in front of each cell above that of its rows: more than 0 where the rows might rather travel."""
    before = _before(g, c, slice(None))
    return np.where(before > 0, weights.kv_row * before - weights.query_row * (c.stop - c.first), 0)


def _last_row(g: Groups, c: Cells, chosen: np.ndarray) -> np.ndarray:
    """Pairs of the last row of each cell, int64 [n]."""
    group, stop = c.group[chosen], c.stop[chosen]
    return g.work_before(group, stop) - g.work_before(group, stop - 1)


def _sources(g: Groups, c: Cells, chosen: np.ndarray) -> list[Source]:
    """The cells numbered ``chosen``."""
    group, seen, before, last = c.group[chosen], _seen(g, c, chosen), _before(g, c, chosen), _last_row(g, c, chosen)
    columns = (chosen, group, c.first[chosen], c.stop[chosen], c.work[chosen], g.plain[group], seen, g.keys[group], before, last)
    return [Source(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
