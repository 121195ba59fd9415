"""Shared memory for the emulated chip, its mbarriers, and the detector of races between warps and engines.

Every granule of 4 bytes knows who wrote it last and when each agent read it last; every warp has a vector clock of what it
knows to have happened, handed on by barriers alone. An access that the clock does not order after an earlier conflicting one
is an error in whatever order the two happened to run. Agents: the warps, the products each warp has in flight, its
stores in flight, and every mbarrier for the copies that land on it (their time is the phase). The lanes of a warp count as one
agent: what only __syncwarp would order is not seen.

A second clock holds what proxy fences have made visible to the engines (wgmma and copies read shared memory through another
proxy than threads): a write of a thread that an engine uses must be in it.
"""

from __future__ import annotations

import numpy as np

from tests.kernels.gluon_machine import KernelError
from tests.kernels.ptx_translate import SHARED_BASE

N_WARPS = 16
PRODUCTS, STORES, BARRIERS = N_WARPS, 2 * N_WARPS, 3 * N_WARPS  # first agents of these kinds
N_AGENTS = 128
Where = slice | np.ndarray


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Where bytes at ``addresses`` lie with a swizzle of ``width`` bytes: units of 16 bytes change places by the row they are in.

    PTX ISA, "swizzling modes": bits 4-6 are xored with bits 7-9 (128 bytes), 4-5 with 7-8 (64), bit 4 with bit 7 (32).
    """
    mask = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[width]
    return addresses ^ (addresses >> 3 & mask)


def agent_name(agent: int) -> str:
    if agent >= BARRIERS:
        return f"a copy (mbarrier {agent - BARRIERS})"
    kinds = ("warp", "products of warp", "stores of warp")
    return f"{kinds[agent // N_WARPS]} {agent % N_WARPS}"


class Clocks:
    """What a warp knows (``seen``), and what of it fences have made visible to the engines (``fenced``)."""

    def __init__(self, warp: int):
        self.warp = warp
        self.seen = np.zeros(N_AGENTS, np.int64)
        self.fenced = np.zeros(N_AGENTS, np.int64)
        self.seen[warp] = 1

    def publish(self, seen: np.ndarray, fenced: np.ndarray) -> None:
        """Adds what this warp knows to what others will learn; its accesses from now on are later."""
        np.maximum(seen, self.seen, out=seen)
        np.maximum(fenced, self.fenced, out=fenced)
        self.seen[self.warp] += 1

    def learn(self, seen: np.ndarray, fenced: np.ndarray) -> None:
        mine = self.seen[self.warp]
        np.maximum(self.seen, seen, out=self.seen)
        np.maximum(self.fenced, fenced, out=self.fenced)
        self.seen[self.warp] = mine

    def fence(self) -> None:
        """Accesses from now on are later than the fence."""
        np.maximum(self.fenced, self.seen, out=self.fenced)
        self.seen[self.warp] += 1


class MBarrier:
    """Phases complete when ``count`` arrivals and the announced bytes have come."""

    def __init__(self, address: int, agent: int, count: int, owner: Clocks):
        if not 1 <= count < 1 << 20:
            raise KernelError(f"an mbarrier for {count} arrivals")
        self.address, self.agent, self.count = address, agent, count
        self.phases = self.arrivals = self.bytes = 0
        self.landing = 0
        self.owner, self.born = owner.warp, int(owner.seen[owner.warp])
        self.gathered = np.zeros((2, N_AGENTS), np.int64)
        self.completed = np.zeros((2, N_AGENTS), np.int64)

    def __str__(self) -> str:
        return f"the mbarrier at shared memory + {self.address - SHARED_BASE}"

    def arrive(self, clocks: Clocks, count: int = 1) -> None:
        self.arrivals += count
        if self.arrivals > self.count:
            raise KernelError(f"{self} expects {self.count} arrivals a phase, this is number {self.arrivals}")
        clocks.publish(*self.gathered)
        self._complete()

    def expect(self, clocks: Clocks, n_bytes: int) -> None:
        self.bytes += n_bytes
        if self.bytes >= 1 << 20:
            raise KernelError(f"{self} expects {self.bytes} bytes, more than it can count")
        self.arrive(clocks)

    def announce(self, n_bytes: int) -> int:
        """A copy is issued: the phase that it is part of."""
        self.landing += n_bytes
        if self.landing > self.bytes:
            raise KernelError(f"a copy of {n_bytes} bytes is issued before they were announced on {self}")
        return self.phases + 1

    def land(self, n_bytes: int) -> None:
        self.bytes -= n_bytes
        self.landing -= n_bytes
        self._complete()

    def _complete(self) -> None:
        if self.arrivals == self.count and self.bytes == 0:
            self.phases += 1
            self.arrivals = 0
            np.maximum(self.completed, self.gathered, out=self.completed)
            self.completed[0, self.agent] = self.phases

    def passed(self, parity: int) -> bool:
        return self.phases & 1 != parity


class SharedMemory:
    """``data`` begins at address SHARED_BASE; every byte is 0xFF, a NaN, until it is written."""

    def __init__(self, size: int):
        self.size = size
        rounded = -(-size // 16) * 16
        self.data = np.full(rounded, 0xFF, np.uint8)
        n = rounded // 4
        self.writer = np.full(n, -1, np.int16)
        self.written = np.zeros(n, np.int64)
        self.readers = np.zeros((BARRIERS, n), np.int64)
        self.reading: list[int] = []  # agents that ever read
        self.is_barrier = np.zeros(n, bool)
        self.barriers: dict[int, MBarrier] = {}
        self.n_barriers = 0  # ever initialised

    # ---- mbarriers

    def init_barrier(self, address: int, count: int, owner: Clocks) -> None:
        at = self.offsets(np.array([address]), 8, "an mbarrier")[0]
        if address in self.barriers:
            raise KernelError(f"{self.barriers[address]} is initialised twice")
        self.write(slice(at // 4, at // 4 + 2), owner, owner.warp, int(owner.seen[owner.warp]), False, "an mbarrier")
        self.barriers[address] = MBarrier(address, BARRIERS + self.n_barriers, count, owner)
        self.n_barriers += 1
        self.is_barrier[at // 4 : at // 4 + 2] = True
        if BARRIERS + self.n_barriers > N_AGENTS:
            raise KernelError("more mbarriers than the emulator has agents for")

    def barrier(self, address: int, user: Clocks, engine: bool, what: str) -> MBarrier:
        found = self.barriers.get(address)
        if found is None:
            raise KernelError(f"{what}: no mbarrier at shared memory + {address - SHARED_BASE}")
        if user.seen[found.owner] < found.born:
            raise KernelError(f"{what}: nothing orders this after the initialisation of {found}")
        if engine and user.fenced[found.owner] < found.born:
            raise KernelError(f"{what}: {found} was initialised without a fence.proxy.async before a copy lands on it")
        return found

    # ---- data

    def offsets(self, addresses: np.ndarray, width: int, what: str) -> np.ndarray:
        at = addresses - SHARED_BASE
        if at.min() < 0 or at.max() + width > self.size:
            raise KernelError(f"{what}: shared memory + {at.min()} to {at.max() + width}, the kernel has {self.size} bytes")
        if (addresses % width).any():
            raise KernelError(f"{what}: shared memory at addresses that are no multiples of {width}")
        return at

    def _ordered(self, where: Where, clocks: Clocks, engine: bool, what: str) -> np.ndarray:
        """Checks the writes of ``where`` that came before; their agents, -1 where nobody wrote."""
        writers, times = self.writer[where], self.written[where]
        late = (writers >= 0) & (clocks.seen[writers] < times)
        if late.any():
            n = int(np.argmax(late))
            raise KernelError(f"race: nothing orders {what} after the write by {agent_name(int(writers[n]))}")
        if engine:
            unseen = (writers >= 0) & (writers < N_WARPS) & (clocks.fenced[writers] < times)
            if unseen.any():
                n = int(np.argmax(unseen))
                raise KernelError(f"no fence.proxy.async between the write by {agent_name(int(writers[n]))} and {what}")
        return writers

    def read(self, where: Where, clocks: Clocks, agent: int, time: int, engine: bool, what: str) -> None:
        """``where`` are granules of 4 bytes. ``time`` is the agent's own."""
        if self._ordered(where, clocks, engine, what).min() < 0:
            raise KernelError(f"{what}: shared memory that nobody wrote")
        if self.is_barrier[where].any():
            raise KernelError(f"{what}: the words of an mbarrier")
        if agent not in self.reading:
            self.reading.append(agent)
        self.readers[agent, where] = time

    def _retire(self, where: Where, engine: bool, what: str) -> None:
        """Triton gives the words of mbarriers that were never used to others, without mbarrier.inval: later uses are errors."""
        touched = np.arange(len(self.is_barrier))[where]
        for address in list(self.barriers):
            barrier, first = self.barriers[address], (address - SHARED_BASE) // 4
            if not np.isin([first, first + 1], touched).any():
                continue
            if engine or barrier.phases or barrier.arrivals or barrier.bytes:
                raise KernelError(f"{what}: the words of {barrier}")
            del self.barriers[address]
            self.is_barrier[first : first + 2] = False

    def write(self, where: Where, clocks: Clocks, agent: int, time: int, engine: bool, what: str, again: bool = False) -> None:
        """``again``: the same bytes as before, by a thread; may race with the thread that wrote them."""
        if self.is_barrier[where].any():
            self._retire(where, engine, what)
        if not (again and self.writer[where].max() < N_WARPS):
            self._ordered(where, clocks, engine, what)
        for reader in self.reading:
            if (self.readers[reader][where] > clocks.seen[reader]).any():
                raise KernelError(f"race: nothing orders {what} after the read by {agent_name(reader)}")
        self.writer[where] = agent
        self.written[where] = time
