"""Rates at two temperatures: cold, after a pause, and sustained, at the card's power limit; contenders take turns.

A card's clocks fall within tens of milliseconds from the boost of a short burst to what its power limit allows, so medians of
short bursts depend on who ran before. Sustained rates are what a training job sees: the same work back to back, after as much
of it to warm up. Every round runs all contenders, and the spread over the rounds stands beside the figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from distattn.launch.bench_kernels_clock import Reading, reader

Work = Callable[[], object]


@dataclass(frozen=True)
class Protocol:
    """``seconds`` of sustained running that count, after as many to warm up; ``pause`` before a cold burst of ``burst`` calls."""

    rounds: int = 3
    seconds: float = 0.2
    pause: float = 0.25
    burst: int = 4


@dataclass
class Rate:
    """Seconds a call, by round."""

    cold: list[float] = field(default_factory=list)
    sustained: list[float] = field(default_factory=list)
    readings: list[list[Reading]] = field(default_factory=list)  # by round, while the sustained calls ran

    @property
    def seconds(self) -> float:
        """Median over the rounds, sustained."""
        return statistics.median(self.sustained)

    @property
    def spread(self) -> float:
        """Slowest over fastest round, less 1."""
        return max(self.sustained) / min(self.sustained) - 1


def burst(device: torch.device, work: Work, calls: int, watch: Callable[[], object] | None = None) -> float:
    """Seconds a call of ``calls`` calls back to back, by the device's own clock where it has one.

    Where calls return before they are done, ``watch`` is called every 10 ms until the last one is.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    while watch and not end.query():
        watch()
        time.sleep(0.01)
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


def watched_burst(
    device: torch.device, work: Work, calls: int, read: Callable[[], Reading | None]
) -> tuple[float, list[Reading]]:
    """:func:`burst` and what ``read`` gave meanwhile."""
    readings: list[Reading] = []

    def watch() -> None:
        reading = read()
        if reading:
            readings.append(reading)

    return burst(device, work, calls, watch), readings


def in_turns(device: torch.device, contenders: dict[str, Work], protocol: Protocol) -> dict[str, Rate]:
    """The rates of all contenders. Each has run once before: compilers and caches are warm."""
    rates = {name: Rate() for name in contenders}
    read = reader(device)
    for _ in range(protocol.rounds):
        for name, work in contenders.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            time.sleep(protocol.pause)
            cold = burst(device, work, protocol.burst)
            calls = max(protocol.burst, int(protocol.seconds / cold))
            burst(device, work, calls)
            rates[name].cold.append(cold)
            seconds, readings = watched_burst(device, work, calls, read)
            rates[name].sustained.append(seconds)
            rates[name].readings.append(readings)
    return rates
