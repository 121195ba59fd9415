"""Carving: a region of one document's score matrix cut into one piece for each of several servers.

A server pays for the query rows of its piece (there and back) and for the keys, but is paid by their product: rectangles near
one shape are cheapest, `query_row * rows == kv_row * keys`. So the region is halved again and again across its longer side, in
those weights, with half of the work for half of the servers (a treemap), until every server has its piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from distattn.parallel.strips import RowStrip, Strip

PATIENCE = 32  # cuts tried for each share before a region is given up


class Piece(NamedTuple):
    """Keys [k_first, k_stop) of the group for the rows of ``strip``, computed by ``server``."""

    server: int
    strip: Strip | RowStrip
    k_first: int
    k_stop: int


class Share(NamedTuple):
    """At most ``most`` pairs for ``server``, which has the first ``held`` keys of the document anyway."""

    server: int
    most: int
    held: int = 0


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

    strips: tuple[Strip | RowStrip, ...]
    k_first: int
    k_stop: int

    @property
    def work(self) -> int:
        """Visible pairs."""
        return sum(s.below(self.k_stop) - s.below(self.k_first) for s in self.strips)

    def trimmed(self) -> Region:
        """Without rows and keys that see nothing of each other."""
        strips: list[Strip | RowStrip] = []
        for s in self.strips:
            if s.reach > self.k_first:
                strips.append(s if s.seen > self.k_first else s.part(s.start + self.k_first + 1 - s.seen, s.stop))
        reach = max((s.reach for s in strips), default=self.k_first)
        return Region(tuple(strips), self.k_first, min(self.k_stop, reach))

    @property
    def rows(self) -> int:
        return sum(s.stop - s.start for s in self.strips)

    def cut_rows(self, least: int, wanted: int, most: int, smallest: int) -> _Cut | None:
        """The lower rows with between ``least`` and ``most`` pairs, near ``wanted``; None where no cut leaves whole shards."""
        index, before = 0, 0
        while index < len(self.strips) - 1:
            work = self.strips[index].below(self.k_stop) - self.strips[index].below(self.k_first)
            if before + work >= wanted:
                break
            before += work
            index += 1
        s = self.strips[index]
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

    def _rows_for(self, s: Strip | RowStrip, wanted: int) -> int:
        """The number of first rows of ``s`` that comes nearest to ``wanted`` pairs."""
        low, high = 0, s.stop - s.start
        while low < high:
            middle = (low + high + 1) // 2
            if self._first(s, middle) <= wanted:
                low = middle
            else:
                high = middle - 1
        if low < s.stop - s.start and 2 * wanted > self._first(s, low) + self._first(s, low + 1):
            return low + 1
        return low

    def _first(self, s: Strip | RowStrip, rows: int) -> int:
        """Pairs of the first ``rows`` of ``s``."""
        part = s.part(s.start, s.start + rows)
        return part.below(self.k_stop) - part.below(self.k_first)

    def cut_keys(self, least: int, wanted: int, most: int, smallest: int) -> _Cut | None:
        """The first keys with between ``least`` and ``most`` pairs, near ``wanted``; None where either part is too narrow."""
        base = sum(s.below(self.k_first) for s in self.strips)
        low, high = self.k_first, self.k_stop
        while low < high:
            middle = (low + high + 1) // 2
            if sum(s.below(middle) for s in self.strips) - base <= wanted:
                low = middle
            else:
                high = middle - 1
        if low < self.k_stop and 2 * (wanted + base) > sum(s.below(low) + s.below(low + 1) for s in self.strips):
            low += 1
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


def carve(region: Region, shares: list[Share], weights: Weights) -> list[Piece]:
    """One part of the region for each share, none above its ``most``.

    Args:
        shares: those that hold most keys first.

    Raises:
        Uncut: no cut was found that keeps to all limits.
    """
    return _carve(region, shares, weights, [PATIENCE * len(shares)])


def _carve(region: Region, shares: list[Share], weights: Weights, patience: list[int]) -> list[Piece]:
    if len(shares) == 1:
        server, top = shares[0].server, region.k_stop
        assert region.work <= shares[0].most
        return [Piece(server, s, region.k_first, min(top, s.reach)) for s in region.strips if s.reach > region.k_first]
    tall = weights.query_row * region.rows > weights.kv_row * (region.k_stop - region.k_first)
    work, room = region.work, sum(share.most for share in shares)
    for by_rows in (tall, not tall):
        for lower, upper in _halves(shares, by_rows):
            if not patience[0]:
                raise Uncut
            patience[0] -= 1
            most = sum(share.most for share in lower)
            # What is missing to full shares is needed to round later cuts: both sides keep a good part of theirs.
            above = (room - work) * most // room
            below = room - work - above
            wanted = most - above
            least = wanted - (below if len(upper) == 1 else below * 3 // 4)
            cutter = region.cut_rows if by_rows else region.cut_keys
            cut = cutter(max(least, 0), wanted, wanted + (above if len(lower) == 1 else above * 3 // 4), weights.smallest)
            if cut is None:
                continue
            with suppress(Uncut):
                return _carve(cut.lower, lower, weights, patience) + _carve(cut.upper, upper, weights, patience)
    raise Uncut


def _halves(shares: list[Share], by_rows: bool) -> Iterator[tuple[list[Share], list[Share]]]:
    """Ways to part the shares into about equal halves: by rows alike ones, by keys those that hold the first keys and others."""
    if by_rows and len(shares) > 3:
        yield shares[0::2], shares[1::2]
        yield shares[1::2], shares[0::2]
    sums = [0]
    for share in shares:
        sums.append(sums[-1] + share.most)
    for at in sorted(range(1, len(shares)), key=lambda at: abs(2 * sums[at] - sums[-1]))[:6]:
        yield shares[:at], shares[at:]
        if by_rows:
            yield shares[at:], shares[:at]


class Uncut(Exception):
    """No cut keeps to all limits."""
