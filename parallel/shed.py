"""Shedding: which work an over-loaded rank gives away, and what it keeps."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

from distattn.parallel.carve import Strip, Weights
from distattn.parallel.cells import Groups

WHOLE = 1 << 60


class RowStrip(NamedTuple):
    """Rows [start, stop) of a cell whose rows are never cut by keys: its keys count as one."""

    cell: int
    start: int
    stop: int
    group: int
    groups: Groups

    cap = 1
    seen = 1
    reach = 1

    def below(self, keys: int) -> int:
        return self.groups.rows_work(self.group, self.start, self.stop) if keys > 0 else 0

    def part(self, start: int, stop: int) -> RowStrip:
        return self._replace(start=start, stop=stop)


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
        return [RowStrip(source.cell, at, source.stop, source.group, groups)]
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


def amounts(sources: list[Source], excess: int, wanted_keys: int, groups: Groups) -> list[int]:
    """How much each source gives, longest documents first, so that together they give ``excess``.

    Rows that see fewer than about ``wanted_keys`` keys are worth less than they cost to move, so a document gives those only when
    the others have none better.
    """
    given = [0] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: (-sources[i].top, sources[i].cell))
    floors = [wanted_keys // 2, wanted_keys // 4, wanted_keys // 8, 0]
    for floor in floors:
        for i in order:
            source = sources[i]
            if source.top <= floor:
                break
            available = source.work
            if floor and source.plain and source.seen <= floor:
                available = source.strip(source.start + floor + 1 - source.seen).below(WHOLE)
            more = min(max(available - given[i], 0), excess)
            given[i] += more
            excess -= more
            if not excess:
                return given
    return given
