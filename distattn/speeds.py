"""Speeds: how fast each rank attends, from what its kernels took over the last steps.

Integers in, integers out: ranks that are told the same come to the same speeds. Speeds change seldom, so that plans do not follow
noise: a rank is moved when the median over its last steps lies far from where it stands.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

from distattn.attention import ContextParallel
from distattn.kernels.timed import Busy

UNIT = 64  # the speed of the median rank
GRAIN = 2  # speeds are multiples of this
WINDOW = 5  # steps: a rank that turns slow is known after three
TOLERANCE = 3 / 16  # of where a rank stands; the median of 5 steps with 5% of noise is off by 2.7% (standard deviation)


class Speeds:
    """Of the ranks that share a sequence, in units of 1 / ``UNIT`` of the median rank's.

    Attributes:
        current: one a rank. All are ``UNIT`` until ``WINDOW`` steps have been measured.
    """

    def __init__(self, world: int) -> None:
        self.current = (UNIT,) * world
        self._rates: deque[list[int]] = deque(maxlen=WINDOW)

    def add(self, step: Sequence[Busy]) -> bool:
        """Takes what every rank's kernels did in one step; whether ``current`` has changed.

        A rank that had no work in a step tells nothing about its speed: what it showed before counts again.
        """
        assert len(step) == len(self.current)
        before = self._rates[-1] if self._rates else [0] * len(step)
        self._rates.append(
            [
                (busy.work << 20) // busy.nanoseconds if busy.work and busy.nanoseconds else b
                for busy, b in zip(step, before, strict=True)
            ]
        )
        if len(self._rates) < WINDOW:
            return False
        medians = [sorted(rates)[WINDOW // 2] for rates in zip(*self._rates, strict=True)]
        known = sorted(rate for rate in medians if rate)
        if not known:
            return False
        usual = known[len(known) // 2]
        found = tuple(
            _moved(stands, rate * UNIT // usual) if rate else stands for stands, rate in zip(self.current, medians, strict=True)
        )
        changed, self.current = found != self.current, found
        return changed

    def text(self, first: int) -> str:
        """Which ranks are not of the usual speed, in words; ``first`` is what the run calls the first of them."""
        unusual = [f"rank {first + rank} at {speed / UNIT:.2f}" for rank, speed in enumerate(self.current) if speed != UNIT]
        return f"attention of {', '.join(unusual)} of the usual speed" if unusual else "attention of all ranks at the usual speed"


def _moved(stands: int, measured: int) -> int:
    """Where a rank stands after a measurement: the same place, the median rank's, or a place of its own."""
    if abs(measured - stands) <= TOLERANCE * stands:
        return stands
    if abs(measured - UNIT) <= TOLERANCE * UNIT:
        return UNIT
    return max(GRAIN, (measured + GRAIN // 2) // GRAIN * GRAIN)


def gather(cp: ContextParallel) -> list[Busy]:
    """What the kernels of every rank of the group have done since this was last asked."""
    assert cp.stopwatch is not None, "ContextParallel(timed=True) has one"
    return [
        Busy(*struct.unpack("<qq", came)) for came in cp.communicator.all_gather_bytes(struct.pack("<qq", *cp.stopwatch.take()))
    ]


def given(speeds: Sequence[float]) -> tuple[int, ...]:
    """The same integers from speeds that somebody knows; the fastest is ``UNIT``."""
    return tuple(max(1, round(UNIT * speed / max(speeds))) for speed in speeds)
