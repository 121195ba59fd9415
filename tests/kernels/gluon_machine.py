"""A multiprocessor for tests: partitions, barriers, asynchronous copies and products, and a detector of races between them.

The partitions of all programs are threads of which one runs at a time (:mod:`tests.kernels.gluon_grid`); who goes on is drawn
at every operation that synchronises, and copies complete whenever the draw says so. That explores orders; it is not what
finds missing waits.
Every access to shared memory is checked against vector clocks: an access that no chain of waits orders after an earlier
conflicting one is an error in whatever order the two happened to run. So are deadlocks, copies that nobody announced, accesses
of several threads published by one of them, and products that are read before they were awaited.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.kernels.gluon_grid import Grid

Clock = dict[str, int]


class KernelError(AssertionError):
    """What the hardware would have answered with a wrong number, a fault or silence."""


class Stopped(BaseException):
    """Another partition failed: this one leaves."""


def join(mine: Clock, other: Clock) -> None:
    for agent, time in other.items():
        if mine.get(agent, 0) < time:
            mine[agent] = time


@dataclass
class Access:
    """One access to ``[start, stop)`` elements of an allocation, ordered before who knows ``time`` of ``agent``."""

    start: int
    stop: int
    write: bool
    agent: str
    time: int
    by: str
    generic: bool
    fenced: bool = False


@dataclass(eq=False)
class Allocation:
    """A run of shared memory; NaN where nothing was written."""

    name: str
    data: torch.Tensor
    accesses: list[Access] = field(default_factory=list)


class Barrier:
    """An mbarrier: phases complete when ``count`` arrivals and the announced bytes have come."""

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name
        self.count = 0
        self.phases = 0
        self.arrivals = 0
        self.bytes = 0
        self.gathered: Clock = {}
        self.completed: Clock = {}

    def init(self, count: int) -> None:
        if self.count:
            raise KernelError(f"{self.name} is initialised twice")
        self.count = count

    def _arrive(self, count: int, clock: Clock) -> None:
        if not self.count:
            raise KernelError(f"{self.name} is used before it was initialised")
        self.arrivals += count
        if self.arrivals > self.count:
            raise KernelError(f"{self.name} expects {self.count} arrivals a phase, this is number {self.arrivals}")
        join(self.gathered, clock)
        self._complete()

    def _complete(self) -> None:
        if self.arrivals == self.count and self.bytes == 0:
            self.phases += 1
            self.arrivals = 0
            join(self.completed, self.gathered)
            self.completed[self.name] = self.phases
            self.gathered = {}

    def arrive(self, count: int) -> None:
        me = self.machine.running
        self._arrive(count, me.publish())
        self.machine.switch()

    def expect(self, n_bytes: int) -> None:
        self.bytes += n_bytes
        self._arrive(1, self.machine.running.publish())
        self.machine.switch()

    def land(self, n_bytes: int) -> None:
        self.bytes -= n_bytes
        if self.bytes < 0:
            raise KernelError(f"{n_bytes} bytes land on {self.name}, more than were announced")
        self._complete()

    def passed(self, parity: int) -> bool:
        return self.phases & 1 != parity

    def wait(self, parity: int) -> None:
        if parity not in (0, 1):
            raise KernelError(f"{self.name} is waited for with phase {parity}: phases are 0 and 1")
        me = self.machine.running
        me.waits_for = (self, parity)
        self.machine.switch()
        me.waits_for = None
        join(me.clock, self.completed)


class Partition:
    """A warpgroup: its clock, its products in flight, its stores in flight."""

    def __init__(self, machine: Machine, name: str, clock: Clock):
        self.machine = machine
        self.name = name
        self.clock = dict(clock)
        self.epoch = 1
        self.clock[name] = 1
        self.dirty: int | None = None  # epoch of the first generic access since the last barrier among its threads
        self.baton = threading.Semaphore(0)
        self.waits_for: tuple[Any, int] | None = None  # a barrier and a phase, or a counter and a rank
        self.done = False
        self.products: list[Any] = []  # issued and not awaited
        self.n_products = 0
        self.stores: list[int] = []
        self.n_stores = 0
        self.unfenced: list[Access] = []

    def runnable(self) -> bool:
        return not self.done and (self.waits_for is None or self.waits_for[0].passed(self.waits_for[1]))

    def end(self) -> None:
        if self.products:
            raise KernelError(f"{self.name} ends with products in flight")
        if self.stores:
            raise KernelError(f"{self.name} ends while its stores still read shared memory")
        self.done = True

    def publish(self) -> Clock:
        """What an arrival tells: everything this partition knows, but of what its own threads did only what a barrier closed."""
        clock = dict(self.clock)
        clock[self.name] = self.epoch if self.dirty is None else self.dirty - 1
        self._next_epoch()
        return clock

    def _next_epoch(self) -> None:
        self.epoch += 1
        self.clock[self.name] = self.epoch

    def barrier(self) -> None:
        self.dirty = None
        self._next_epoch()

    def fence(self) -> None:
        for access in self.unfenced:
            access.fenced = True
        self.unfenced = []


class Machine:
    """One program: partitions that take turns, the copies in flight, the shared memory."""

    def __init__(self, program: int, grid: Grid):
        self.program, self.grid = program, grid
        self.partitions: list[Partition] = []
        self.running = Partition(self, "entry", {})
        self.copies: list[Callable[[], None]] = []
        self.n_allocations = 0

    def switch(self) -> None:
        """Lets somebody go on; returns when it is the running partition's turn again."""
        if self.running.name != "entry":
            self.grid.switch(self.running)

    def specialize(self, tasks: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Makes a partition of every task, which runs when its turn comes: the last that a kernel does."""
        self.partitions = [Partition(self, f"partition {self.program}.{n}", self.running.clock) for n in range(len(tasks))]
        for partition, task in zip(self.partitions, tasks, strict=True):
            threading.Thread(target=self.grid.body, args=(partition, *task), daemon=True).start()

    # ---- shared memory

    def allocate(self, name: str, size: int, dtype: torch.dtype) -> Allocation:
        self.n_allocations += 1
        garbage = torch.nan if dtype.is_floating_point else -(1 << 30)
        return Allocation(f"{name} {self.n_allocations}", torch.full((size,), garbage, dtype=dtype))

    def access(self, where: Allocation, start: int, stop: int, write: bool, agent: str, time: int, generic: bool) -> Access:
        """Checks an access of the running partition, or of an engine it starts now, against all earlier ones, and records it."""
        me = self.running
        kept = []
        for old in where.accesses:
            if old.stop <= start or stop <= old.start:
                kept.append(old)
                continue
            ordered = me.clock.get(old.agent, 0) >= old.time
            if (write or old.write) and not ordered:
                what = f"{'write' if write else 'read'} of {where.name}[{start}:{stop}] by {me.name}"
                before = f"{'write' if old.write else 'read'} of [{old.start}:{old.stop}] by {old.by}"
                raise KernelError(f"race: nothing orders the {what} after the {before}")
            if old.write and old.generic and not generic and not old.fenced:
                raise KernelError(
                    f"{where.name}[{start}:{stop}]: written by threads, used by an engine, and no fence_async_shared between"
                )
            inside = start <= old.start and old.stop <= stop
            same_reader = not write and not old.write and old.agent == agent
            if not (ordered and inside and (write or same_reader)):
                kept.append(old)
        record = Access(start, stop, write, agent, time, me.name, generic)
        where.accesses = [*kept, record]
        return record

    def touch(self, where: Allocation, start: int, stop: int, write: bool) -> None:
        """A read or a write by the threads of the running partition."""
        me = self.running
        if me.dirty is None:
            me.dirty = me.epoch
        record = self.access(where, start, stop, write, me.name, me.epoch, True)
        if write:
            me.unfenced.append(record)

    # ---- engines

    def issue_product(self, reads: list[tuple[Allocation, int, int]], value: Any) -> None:
        me = self.running
        me.n_products += 1
        for where, start, stop in reads:
            self.access(where, start, stop, False, f"products of {me.name}", me.n_products, False)
        me.products.append(value)
        self.switch()

    def await_products(self, outstanding: int) -> None:
        me = self.running
        while len(me.products) > outstanding:
            me.products.pop(0).pending = False
        me.clock[f"products of {me.name}"] = me.n_products - len(me.products)

    def issue_copy(
        self, where: Allocation, start: int, stop: int, barrier: Barrier, n_bytes: int, copy: Callable[[], None]
    ) -> None:
        """A load: the buffer is garbage from now on, its contents land later."""
        if barrier.bytes < n_bytes:
            raise KernelError(f"a copy of {n_bytes} bytes to {where.name} is issued before they were announced on {barrier.name}")
        self.access(where, start, stop, True, barrier.name, barrier.phases + 1, False)
        where.data[start:stop] = torch.nan

        def land() -> None:
            copy()
            barrier.land(n_bytes)

        self.copies.append(land)
        self.switch()

    def issue_store(self, where: Allocation, start: int, stop: int) -> None:
        me = self.running
        me.n_stores += 1
        me.stores.append(me.n_stores)
        self.access(where, start, stop, False, f"stores of {me.name}", me.n_stores, False)

    def await_stores(self, outstanding: int) -> None:
        me = self.running
        me.stores = me.stores[len(me.stores) - outstanding :] if outstanding else []
        me.clock[f"stores of {me.name}"] = me.n_stores - len(me.stores)
