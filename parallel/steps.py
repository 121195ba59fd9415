"""A call of attention in three steps, so that other work runs between them: begin, compute, collect.

A call is a generator that yields twice: when it has posted what travels first, and when it has computed and posted all that it
can without waiting for what comes home. Several calls are in progress side by side, each in a slot of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def run(steps: Steps[T]) -> T:
    """All steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class InProgress:
    """The calls of one rank that have begun, by slot. All ranks take the same steps in the same order."""

    def __init__(self) -> None:
        self._steps: dict[int, Steps[Any]] = {}

    def begin(self, slot: int, steps: Steps[Any]) -> None:
        """Posts what travels first; neither waits nor computes."""
        if slot in self._steps:
            raise RuntimeError(
                f"Attention began in slot {slot}, where another call has not been collected. "
                "Collect it first, or give calls that overlap slots of their own."
            )
        self._steps[slot] = steps
        self._next(slot)

    def compute(self, slot: int) -> None:
        """Waits for what arrives, computes, and posts what goes home."""
        self._next(slot)

    def collect(self, slot: int) -> Any:
        """Waits for what comes home; returns what the call returns."""
        steps = self._taken(slot)
        del self._steps[slot]
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        raise RuntimeError(f"Attention in slot {slot} was collected before it was computed. Call compute() first.")

    def _next(self, slot: int) -> None:
        steps = self._taken(slot)
        try:
            next(steps)
        except StopIteration:
            del self._steps[slot]
            raise RuntimeError(f"Attention in slot {slot} was computed twice. Collect it after it was computed.") from None
        except BaseException:
            del self._steps[slot]
            raise

    def _taken(self, slot: int) -> Steps[Any]:
        if slot not in self._steps:
            raise RuntimeError(f"No attention is in progress in slot {slot}. Begin it first, with begin_attention().")
        return self._steps[slot]
