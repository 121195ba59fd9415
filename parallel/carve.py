"""Carving: a region of one document's score matrix cut into one piece for each of several servers.

A server pays for the query rows of its piece (there and back) and for the keys, but is paid by their product: rectangles near
one shape are cheapest, `query_row * rows == kv_row * keys`. So the region is halved again and again across its longer side, in
those weights, with half of the work for half of the servers (a treemap), until every server has its piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Strip(NamedTuple):
    """Rows [start, stop) (positions) of ``cell``; row i sees the first min(cap, seen + i - start) keys of its group."""

    cell: int
    start: int
    stop: int
    seen: int
    cap: int

    def below(self, keys: int) -> int:
        """Visible pairs among the first ``keys`` keys."""
        top, rows = min(keys, self.cap), self.stop - self.start
        rising = min(max(top - self.seen, 0), rows)
        return rising * self.seen + rising * (rising - 1) // 2 + (rows - rising) * top

    def part(self, start: int, stop: int) -> Strip:
        """Its rows [start, stop)."""
        return Strip(self.cell, start, stop, self.seen + start - self.start, self.cap)

    @property
    def reach(self) -> int:
        """Keys that its last row sees."""
        return min(self.cap, self.seen + self.stop - self.start - 1)

    def seen_by_last(self, keys: int) -> int:
        """Keys that its last row sees of a group of ``keys``, whatever the cap."""
        return min(keys, self.seen + self.stop - self.start - 1)


class Piece(NamedTuple):
    """Keys [k_first, k_stop) of the group for the rows of ``strip``, computed by ``server``."""

    server: int
    strip: Strip
    k_first: int
    k_stop: int


class Share(NamedTuple):
    """At most ``most`` pairs for ``server``."""

    server: int
    most: int


@dataclass(frozen=True)
class Weights:
    """What a moved row costs, and how small a piece may be."""

    query_row: int
    kv_row: int
    smallest: int


class _Cut(NamedTuple):
    lower: Region
    upper: Region


class Region(NamedTuple):
    """Keys [k_first, k_stop) of ``strips``."""

    strips: tuple[Strip, ...]
    k_first: int
    k_stop: int

    @property
    def work(self) -> int:
        """Visible pairs."""
        return sum(s.below(self.k_stop) - s.below(self.k_first) for s in self.strips)

    def trimmed(self) -> Region:
        """Without rows and keys that see nothing of each other."""
        strips = []
        for s in self.strips:
            if s.reach > self.k_first:
                strips.append(s if s.seen > self.k_first else s.part(s.start + self.k_first + 1 - s.seen, s.stop))
        reach = max((s.reach for s in strips), default=self.k_first)
        return Region(tuple(strips), self.k_first, min(self.k_stop, reach))

    @property
    def rows(self) -> int:
        return sum(s.stop - s.start for s in self.strips)

    def cut_rows(self, least: int, most: int, smallest: int) -> _Cut | None:
        """The lower part with between ``least`` and ``most`` pairs, near the middle; None where no cut leaves whole shards."""
        before, wanted = 0, (least + most) // 2
        for index, s in enumerate(self.strips):
            work = s.below(self.k_stop) - s.below(self.k_first)
            if before + work >= wanted:
                break
            before += work
        rows = self._rows_for(s, wanted - before)
        count = s.stop - s.start
        for at in _allowed(rows, count, smallest):
            part = s.part(s.start, s.start + at)
            if least <= before + part.below(self.k_stop) - part.below(self.k_first) <= most:
                lower = self.strips[:index] + ((part,) if at else ())
                upper = ((s.part(s.start + at, s.stop),) if at < count else ()) + self.strips[index + 1 :]
                if lower and upper:
                    return _Cut(self._replace(strips=lower).trimmed(), self._replace(strips=upper).trimmed())
        return None

    def _rows_for(self, s: Strip, wanted: int) -> int:
        """The number of first rows of ``s`` that comes nearest to ``wanted`` pairs from below."""
        low, high = 0, s.stop - s.start
        while low < high:
            middle = (low + high + 1) // 2
            part = s.part(s.start, s.start + middle)
            if part.below(self.k_stop) - part.below(self.k_first) <= wanted:
                low = middle
            else:
                high = middle - 1
        return low

    def cut_keys(self, least: int, most: int, smallest: int) -> _Cut | None:
        """The part of the first keys with between ``least`` and ``most`` pairs; None where either part is too narrow."""
        wanted = (least + most) // 2
        base = sum(s.below(self.k_first) for s in self.strips)
        low, high = self.k_first, self.k_stop
        while low < high:
            middle = (low + high + 1) // 2
            if sum(s.below(middle) for s in self.strips) - base <= wanted:
                low = middle
            else:
                high = middle - 1
        lower, upper = self._replace(k_stop=low), self._replace(k_first=low).trimmed()
        if low - self.k_first < smallest or self.k_stop - low < smallest or not least <= lower.work <= most:
            return None
        if any(s.stop - s.start < smallest and s not in self.strips for s in upper.strips):
            return None
        return _Cut(lower, upper)


def _allowed(rows: int, count: int, smallest: int) -> list[int]:
    """Places to cut ``count`` rows near ``rows``, so that no part is smaller than asked; the nearest first."""
    places = {0, count}
    if count >= 2 * smallest:
        places |= {min(max(at, smallest), count - smallest) for at in (rows, rows + 1)}
    return sorted(places, key=lambda at: (abs(at - rows), at))


def carve(region: Region, shares: list[Share], weights: Weights) -> Iterator[Piece]:
    """One part of the region for each share, none above its ``most``.

    Raises:
        ValueError: no cut was found that keeps to all limits.
    """
    if len(shares) == 1:
        assert region.work <= shares[0].most, (region.work, shares)
        for s in region.strips:
            if s.reach > region.k_first:
                yield Piece(shares[0].server, s, region.k_first, min(region.k_stop, s.reach))
        return
    cut, at = _best_cut(region, shares, weights)
    yield from carve(cut.lower, shares[:at], weights)
    yield from carve(cut.upper, shares[at:], weights)


def _best_cut(region: Region, shares: list[Share], weights: Weights) -> tuple[_Cut, int]:
    work = region.work
    sums = [0]
    for share in shares:
        sums.append(sums[-1] + share.most)
    tall = weights.query_row * region.rows > weights.kv_row * (region.k_stop - region.k_first)
    places = sorted(range(1, len(shares)), key=lambda at: abs(2 * sums[at] - sums[-1]))
    for least_rows in (weights.smallest, 1):
        for at in places[:6]:
            least, most = work - (sums[-1] - sums[at]), sums[at]
            for by_rows in (tall, not tall):
                cutter = region.cut_rows if by_rows else region.cut_keys
                cut = cutter(max(least, 0), most, least_rows)
                if cut is not None:
                    STAT[least_rows] = STAT.get(least_rows, 0) + 1
                    return cut, at
    raise ValueError("no cut")


STAT = {}
