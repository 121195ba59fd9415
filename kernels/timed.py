"""Timed: a backend with a stopwatch, which counts the seconds and the work of its launches and never waits for a device."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.kernels.bands import Bands
from distattn.kernels.contract import Backend, Scores, State


class Busy(NamedTuple):
    """What launches took, and what they computed."""

    nanoseconds: int
    """of the processor: on the CPU those in which the calling thread ran, whatever else took its core in between"""
    work: int
    """multiplications and additions of the visible pairs"""
    elapsed: int
    """nanoseconds from the beginnings of launches to their ends"""


class Started(NamedTuple):
    """When a launch on the CPU began, by both clocks."""

    thread: int
    clock: int


class Stopwatch:
    """The launches of one rank. On the CPU a launch ends when it returns, in the thread that began it; on a GPU it lies between
    two events of its stream."""

    def __init__(self) -> None:
        self._sum = Busy(0, 0, 0)
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    def start(self, device: torch.device) -> Started | torch.cuda.Event:
        return _recorded() if device.type == "cuda" else Started(time.thread_time_ns(), time.perf_counter_ns())

    def stop(self, started: Started | torch.cuda.Event, work: int) -> None:
        if isinstance(started, Started):
            self._add(time.thread_time_ns() - started.thread, work, time.perf_counter_ns() - started.clock)
        else:
            self._under_way.append((started, _recorded(), work))

    def take(self) -> Busy:
        """The launches that have ended since the last time; those still under way on a GPU count next time."""
        while self._under_way and self._under_way[0][1].query():
            begin, end, work = self._under_way.popleft()
            nanoseconds = round(begin.elapsed_time(end) * 1e6)
            self._add(nanoseconds, work, nanoseconds)
        taken, self._sum = self._sum, Busy(0, 0, 0)
        return taken

    def _add(self, nanoseconds: int, work: int, elapsed: int) -> None:
        done = self._sum
        self._sum = Busy(done.nanoseconds + nanoseconds, done.work + work, done.elapsed + elapsed)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Timed:
    """Another backend, each launch of which is timed."""

    def __init__(self, backend: Backend, stopwatch: Stopwatch) -> None:
        self.name, self.backend, self.stopwatch = backend.name, backend, stopwatch

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        return self.backend.reject(q, k, v, scores)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        started = self.stopwatch.start(q.device)
        state = self.backend.forward(q, k, v, bands, scores, state, out)
        self.stopwatch.stop(started, 2 * (q.shape[2] + v.shape[2]) * q.shape[1] * bands.area)
        return state

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        delta: Tensor,
        lse: Tensor,
        bands: Bands,
        scores: Scores,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        started = self.stopwatch.start(q.device)
        self.backend.backward(dout, q, k, v, delta, lse, bands, scores, dq, dk, dv)
        self.stopwatch.stop(started, 2 * (3 * q.shape[2] + 2 * v.shape[2]) * q.shape[1] * bands.area)
