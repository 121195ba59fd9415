"""A call of attention in three steps, so that other work runs between them: begin, compute, collect.

A call is a generator. It yields when it has posted what travels first, then wherever another call may take its turn (False), and
once (True) when all that is left is to wait for what comes home. Several calls are in progress side by side, each in a slot of
its own; where they take turns depends on their plans alone, so that all ranks post in the same order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[bool, None, T]


def run(steps: Steps[T]) -> T:
    """All steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def inside(steps: Steps[T]) -> Steps[T]:
    """A call within the computing of another: begun and collected without giving others a turn."""
    next(steps)
    while True:
        try:
            home = next(steps)
        except StopIteration as end:
            return end.value
        if not home:
            yield False


def gives_turn(boundary: int, stages: int) -> bool:
    """Whether a pass lets others go on before a boundary: what a stage awaits travels behind the kernels of the others.

    Simulated, turns before every stage are faster than none, and than turns before all but the last (LOG.md).
    """
    return 0 < boundary < stages


@dataclass
class _Call:
    steps: Steps[Any]
    home: bool = False  # nothing is left but what comes home


class InProgress:
    """The calls of one rank that have begun, by slot. All ranks take the same steps in the same order."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}

    def begin(self, slot: int, steps: Steps[Any]) -> None:
        """Posts what travels first; neither waits nor computes."""
        if slot in self._calls:
            raise RuntimeError(
                f"Attention began in slot {slot}, where another call has not been collected. "
                "Collect it first, or give calls that overlap slots of their own."
            )
        self._calls[slot] = _Call(steps)
        self._next(slot)

    def compute(self, slots: Sequence[int]) -> None:
        """Waits for what arrives, computes, and posts what goes home; the calls in turns, in this order."""
        for slot in slots:
            if self._begun(slot).home:
                raise RuntimeError(f"Attention in slot {slot} was computed twice. Collect it after it was computed.")
        left = list(slots)
        while left:
            left = [slot for slot in left if not self._next(slot)]

    def collect(self, slot: int) -> Any:
        """Waits for what comes home; returns what the call returns."""
        if not self._begun(slot).home:
            raise RuntimeError(f"Attention in slot {slot} was collected before it was computed. Call compute() first.")
        return run(self._calls.pop(slot).steps)

    def _next(self, slot: int) -> bool:
        call = self._calls[slot]
        try:
            call.home = next(call.steps)
        except BaseException:
            del self._calls[slot]
            raise
        return call.home

    def _begun(self, slot: int) -> _Call:
        if slot not in self._calls:
            raise RuntimeError(f"No attention is in progress in slot {slot}. Begin it first, with begin_attention().")
        return self._calls[slot]
