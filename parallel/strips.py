"""Strips: rows of one document on one rank that are cut and handed out."""

from __future__ import annotations

from typing import NamedTuple

from distattn.parallel.cells import Groups

WHOLE = 1 << 60  # more keys than any row sees


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

    def last_rows(self, most: int) -> int:
        """From where on its rows have at most ``most`` pairs."""
        low, high = self.start, self.stop
        while low < high:
            middle = (low + high) // 2
            if self.part(middle, self.stop).below(self.cap) <= most:
                high = middle
            else:
                low = middle + 1
        return low

    @property
    def reach(self) -> int:
        """Keys that its last row sees."""
        return min(self.cap, self.seen + self.stop - self.start - 1)

    def seen_by_last(self, keys: int) -> int:
        """Keys that its last row sees of a group of ``keys``, whatever the cap."""
        return min(keys, self.seen + self.stop - self.start - 1)


class RowStrip(NamedTuple):
    """Rows [start, stop) of a cell that are never cut by keys: as a :class:`~distattn.parallel.carve.Strip` of one key."""

    cell: int
    start: int
    stop: int
    work: int  # visible pairs
    group: int
    groups: Groups

    @property
    def cap(self) -> int:
        return 1

    @property
    def seen(self) -> int:
        return 1

    @property
    def reach(self) -> int:
        return 1

    def below(self, keys: int) -> int:
        """All pairs, or none."""
        return self.work if keys > 0 else 0

    def part(self, start: int, stop: int) -> RowStrip:
        """Its rows [start, stop)."""
        return RowStrip(self.cell, start, stop, self.groups.rows_work(self.group, start, stop), self.group, self.groups)
