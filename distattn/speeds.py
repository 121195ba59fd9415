"""Speeds: how fast each rank attends, from what its kernels took over the last steps.

Integers in, integers out: ranks that are told the same come to the same speeds. Two clocks say what a rank's kernels took. The
processor's own does not see what else runs on a busy machine, and is followed at once: a rank whose processor turns slow is known
after three steps. What share of its processor a rank gets counts only where it stays low for many steps, since other programs
come, go and change places (LOG.md). A rank is compared with the others in the same step, as steps differ by their documents.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

from distattn.attention import ContextParallel
from distattn.kernels.timed import Busy

UNIT = 64  # the speed of the median rank
WINDOW = 5  # steps: a processor that turns slow is known after three
PATIENCE = 21  # steps: small differences are known after eleven, a rank that gets less of its processor after seventeen
COARSE = 3 / 16  # of where a rank stands; the median of 5 steps with 5% of noise is off by 2.7% (standard deviation)
FINE = 1 / 16  # the same of 21 steps: 1.4%
_ONE = 1 << 20  # what the median rank shows in a step


class Speeds:
    """Of the ranks that share a sequence, in units of 1 / ``UNIT`` of the median rank's.

    Attributes:
        current: one a rank. All are ``UNIT`` until ``WINDOW`` steps have been measured.
        last: what every rank's kernels did in the step that was added last.
    """

    def __init__(self, world: int) -> None:
        self.current = (UNIT,) * world
        self.last: list[Busy] = []
        self._ranks = [_Rank() for _ in range(world)]

    def add(self, step: Sequence[Busy]) -> bool:
        """Takes what every rank's kernels did in one step; whether ``current`` has changed.

        A rank that had no work in a step tells nothing about its speed, and nobody does where most had none.
        """
        assert len(step) == len(self.current)
        self.last = list(step)
        worked = [busy.work > 0 and busy.nanoseconds > 0 and busy.elapsed > 0 for busy in step]
        if 2 * sum(worked) <= len(step):
            return False
        rates = _compared([busy.work * _ONE // busy.nanoseconds if w else 0 for busy, w in zip(step, worked, strict=True)])
        shares = _compared([busy.nanoseconds * _ONE // busy.elapsed if w else 0 for busy, w in zip(step, worked, strict=True)])
        for rank, rate, share in zip(self._ranks, rates, shares, strict=True):
            if rate:
                rank.add(rate, share)
        before, self.current = self.current, tuple(rank.speed for rank in self._ranks)
        return self.current != before

    def text(self, first: int) -> str:
        """Which ranks are not of the usual speed, in words; ``first`` is what the run calls the first of them."""
        unusual = [f"rank {first + rank} at {speed / UNIT:.2f}" for rank, speed in enumerate(self.current) if speed != UNIT]
        return f"attention of {', '.join(unusual)} of the usual speed" if unusual else "attention of all ranks at the usual speed"


class _Rank:
    """What one rank has shown, as parts of what the median rank did in the same steps, and where it stands."""

    def __init__(self) -> None:
        self.speed, self.share = UNIT, UNIT
        self._rates: deque[int] = deque(maxlen=PATIENCE)
        self._shares: deque[int] = deque(maxlen=PATIENCE)

    def add(self, rate: int, share: int) -> None:
        """One more step."""
        self._rates.append(rate)
        self._shares.append(share)
        if len(self._shares) == PATIENCE:
            low, *_, high = sorted(self._shares)[PATIENCE // 5 : -(PATIENCE // 5)]
            ends = [_moved(self.share, share, COARSE) for share in (low, high)]
            if max(ends) < self.share or min(ends) > self.share:
                self.share = _moved(self.share, _median(self._shares), COARSE)
        rates = list(self._rates)
        after = rates[-(WINDOW // 2 + 1) :]  # the rest of a window in which the rank has changed is from before
        if len(rates) >= WINDOW and self._moved_to(rates[-WINDOW:], COARSE) != self.speed != self._moved_to(after, COARSE):
            self.speed, self._rates = self._moved_to(after, COARSE), deque(after, maxlen=PATIENCE)
        elif len(rates) == PATIENCE:
            self.speed = self._moved_to(rates, FINE)

    def _moved_to(self, rates: Sequence[int], band: float) -> int:
        return _moved(self.speed, _median(rates) * self.share // UNIT, band)


def _compared(found: list[int]) -> list[int]:
    """As parts of the median of those that are not 0."""
    known = sorted(filter(None, found))
    return [one * _ONE // known[len(known) // 2] for one in found]


def _median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


def _moved(stands: int, measured: int, band: float) -> int:
    """Where a rank stands after a measurement: the same place, the median rank's, or a place of its own."""
    place = max(1, (measured * UNIT + _ONE // 2) // _ONE)
    if abs(place - stands) <= band * stands:
        return stands
    return UNIT if abs(place - UNIT) <= band * UNIT else place


def gather(cp: ContextParallel) -> list[Busy]:
    """What the kernels of every rank of the group have done since this was last asked."""
    assert cp.stopwatch is not None, "ContextParallel(timed=True) has one"
    return [
        Busy(*struct.unpack("<qqq", came)) for came in cp.communicator.all_gather_bytes(struct.pack("<qqq", *cp.stopwatch.take()))
    ]


def given(speeds: Sequence[float]) -> tuple[int, ...]:
    """The same integers from speeds that somebody knows; the fastest is ``UNIT``."""
    return tuple(max(1, round(UNIT * speed / max(speeds))) for speed in speeds)
