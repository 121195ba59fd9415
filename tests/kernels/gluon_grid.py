"""The programs of a launch for tests: several on their multiprocessors at once, taking turns, and counters between them.

Programs start in the order of their numbers, as many at a time as ``resident``; who goes on is drawn at every operation that
synchronises, among the partitions of all of them. A counter in global memory carries a vector clock: adding to it behind
a fence releases what the adding partition knows, reading it with acquire takes that over. Sums that are added to one place by
two programs must be ordered by such a chain where the launch promises an order.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from typing import Any

import torch

from tests.kernels.gluon_machine import Clock, KernelError, Machine, Partition, Stopped, join


class Counter:
    """A number in global memory that programs add to and wait for."""

    def __init__(self, name: str, flat: torch.Tensor, place: int):
        self.name, self.flat, self.place = name, flat, place
        self.clock: Clock = {}

    @property
    def value(self) -> int:
        return int(self.flat[self.place])

    def passed(self, rank: int) -> bool:
        return self.value >= rank


class Grid:
    """One launch. ``enter`` runs a program up to where its partitions part; ``ordered`` says that sums must not race."""

    def __init__(self, programs: int, resident: int, seed: int, ordered: bool, enter: Callable[[Machine], None]):
        self.size, self.resident, self.ordered, self.enter = programs, resident, ordered, enter
        self.random = random.Random(seed)
        self.started = 0
        self.machines: list[Machine] = []
        self.current: Any = None  # the machine whose partition runs
        self.error: BaseException | None = None
        self.finished = threading.Semaphore(0)
        self.counters: dict[tuple[int, int], Counter] = {}
        self.sums: dict[tuple[int, int], tuple[str, int]] = {}

    def run(self) -> None:
        """All programs to their ends; raises what the first of their partitions raised."""
        self.switch(None)
        self.finished.acquire()
        if self.error is not None:
            raise self.error

    # ---- turns

    def switch(self, me: Partition | None) -> None:
        """Lets somebody go on: a partition of any program, a copy that completes, a new program. Returns at one's own turn."""
        while True:
            self.machines = [m for m in self.machines if not all(p.done for p in m.partitions)]
            able = [p for m in self.machines for p in m.partitions if p.runnable()]
            copies = [m.copies for m in self.machines if m.copies]
            more = self.started < self.size and len(self.machines) < self.resident
            n = len(able) + len(copies) + more
            if n == 0:
                self._end(me)
                return
            if me in able and self.random.random() < 0.5:
                return
            pick = self.random.randrange(n)
            if pick < len(able):
                if self._hand_over(me, able[pick]):
                    return
            elif pick < len(able) + len(copies):
                landing = copies[pick - len(able)]
                landing.pop(self.random.randrange(len(landing)))()
            else:
                self._start()

    def _hand_over(self, me: Partition | None, other: Partition) -> bool:
        """Whether ``me`` has nothing more to do in its turn."""
        if other is me:
            return True
        self.current = other.machine
        other.machine.running = other
        other.baton.release()
        if me is not None and not me.done:
            me.baton.acquire()
            if self.error is not None:
                raise Stopped
        return True

    def _start(self) -> None:
        before = self.current
        self.current = Machine(self.started, self)
        self.started += 1
        self.enter(self.current)
        if self.current.partitions:
            self.machines.append(self.current)
        self.current = before

    def _end(self, me: Partition | None) -> None:
        if not self.machines:
            self.finished.release()
            return
        waiting = [
            f"{p.name} waits for {p.waits_for[0].name} at {p.waits_for[1]}"
            for m in self.machines
            for p in m.partitions
            if p.waits_for
        ]
        self.error = KernelError("deadlock: " + "; ".join(waiting))
        self.stop(me is None)

    def stop(self, outside: bool = False) -> None:
        """Everybody leaves."""
        for machine in self.machines:
            for partition in machine.partitions:
                partition.baton.release()
        self.finished.release()
        if not outside:
            raise Stopped

    def body(self, me: Partition, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """A partition, as a thread."""
        me.baton.acquire()
        try:
            if self.error is not None:
                return
            function(*arguments)
            me.end()
            self.switch(me)
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that launched
            if self.error is None:
                self.error = error
            with contextlib.suppress(Stopped):
                self.stop()

    # ---- global memory

    def counter(self, flat: torch.Tensor, place: int) -> Counter:
        key = flat.untyped_storage().data_ptr(), place
        if key not in self.counters:
            self.counters[key] = Counter(f"counter {place}", flat, place)
        return self.counters[key]

    def count(self, counter: Counter, fenced: bool) -> None:
        """Adds one; behind a fence this tells all that the running partition knows."""
        published = self.current.running.publish()
        if fenced:
            join(counter.clock, published)
        counter.flat[counter.place] += 1
        self.current.switch()

    def await_rank(self, counter: Counter, rank: int, acquire: bool) -> None:
        """Waits for a counter; what stood at the rank before anybody counted tells nothing."""
        me = self.current.running
        me.waits_for = (counter, rank)
        self.current.switch()
        me.waits_for = None
        if rank and counter.value > rank:
            raise KernelError(f"the turn of rank {rank} has gone by: {counter.name} stands at {counter.value}")
        if acquire and rank:
            join(me.clock, counter.clock)

    def add_sums(self, flat: torch.Tensor, places: torch.Tensor, x: torch.Tensor) -> None:
        """An atomic add of a tile. Adding zeros changes nothing, whenever it happens."""
        me = self.current.running
        if self.ordered and bool(x.any()):
            key = flat.untyped_storage().data_ptr(), int(places.min())
            agent, time = self.sums.get(key, (me.name, 0))
            if me.clock.get(agent, 0) < time:
                raise KernelError(f"race: nothing orders what {me.name} adds to {key[1]} after what {agent} added")
            if me.dirty is None:
                me.dirty = me.epoch
            self.sums[key] = me.name, me.epoch
        flat[places] += x
        self.current.switch()
