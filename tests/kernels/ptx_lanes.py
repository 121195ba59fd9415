"""What straight code asks of the machine: memory and the exchange between lanes, for a slice of threads side by side.

Also counted here, by line: wavefronts of shared memory beyond what an access needs, and sectors of 32 bytes of global memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.kernels.gluon_machine import KernelError
from tests.kernels.ptx_global import GlobalMemory
from tests.kernels.ptx_shared import Clocks, SharedMemory
from tests.kernels.ptx_wgmma import Flight

LANES = np.arange(32)
PATIENCE = 5_000  # how often a program may read a counter that does not move
Mask = np.ndarray | None


@dataclass
class Traffic:
    """Of one line: warps that accessed memory, the units they took (wavefronts or sectors), the fewest that would do."""

    requests: int = 0
    units: int = 0
    ideal: int = 0


@dataclass
class Counts:
    """Of a launch, summed over programs and warps."""

    shared: dict[int, Traffic] = field(default_factory=dict)
    stored: dict[int, Traffic] = field(default_factory=dict)  # global stores and adds, by line
    loaded: dict[int, Traffic] = field(default_factory=dict)
    steps: Counter[int] = field(default_factory=Counter)


class Warp:
    """Where a warp is, and what it knows and has in flight. ``others`` are lanes that wait elsewhere in divergent code."""

    def __init__(self, index: int, registers: int):
        self.index = index
        self.clocks = Clocks(index)
        self.pc = 0
        self.mask: Mask = None
        self.others: list[tuple[int, np.ndarray]] = []
        self.waiting: tuple[str, Any] | None = None
        self.done = False
        self.registers = registers
        self.flight = Flight()
        self.collectives = 0
        self.open_stores: list[Any] = []
        self.store_groups: list[list[Any]] = []
        self.stores_committed = 0

    @property
    def time(self) -> int:
        return int(self.clocks.seen[self.index])


class View:
    """Threads side by side: their rows of every register file, as every type."""

    def __init__(self, files: dict[str, np.ndarray], warps: list[Warp], special: dict[str, Any]):
        self.warps = warps
        self.low, self.high = warps[0].index * 32, warps[-1].index * 32 + 32
        rows = {file: x[:, self.low : self.high] for file, x in files.items()}
        self.U, self.Q, self.H, self.P = (list(rows[file]) for file in "rdhp")
        self.I = list(rows["r"].view(np.int32))  # noqa: E741
        self.F = list(rows["r"].view(np.float32))
        self.S = list(rows["d"].view(np.int64))
        self.special = {**special, "%tid.x": np.arange(self.low, self.high, dtype=np.uint32)}


class Lanes:
    """Memory and shuffles. ``program`` numbers the block in the launch."""

    def __init__(self, program: int, memory: GlobalMemory, shared: SharedMemory, parameters: dict[str, int], counts: Counts):
        self.program, self.memory, self.shared, self.parameters, self.counts = program, memory, shared, parameters, counts
        self.leaders: list[int] = []  # the lane that elect.sync chooses, by warp
        self._asked: tuple[tuple[int, int], int] = ((0, 0), 0)  # a counter and what it held, how often in a row
        self._patterns: dict[tuple[bytes, int, str], tuple[int, int]] = {}

    # ---- lanes

    def active(self, mask: Mask, guard: np.ndarray) -> np.ndarray:
        return guard if mask is None else guard & mask

    def everywhere(self, v: View, address: int) -> np.ndarray:
        return np.full(v.high - v.low, address, np.int64)

    def shuffle(self, v: View, mask: Mask, to: np.ndarray, source: np.ndarray, mode: str, lanes: int) -> None:
        if mask is not None:
            raise KernelError("shfl.sync of all lanes in divergent code")
        order = LANES ^ lanes if mode == "bfly" else np.full(32, lanes)
        np.copyto(to, source.reshape(-1, 32)[:, order].ravel())

    def elect(self, v: View, mask: Mask, lane: np.ndarray, chosen: np.ndarray) -> None:
        if mask is not None:
            raise KernelError("elect.sync of all lanes in divergent code")
        leaders = np.repeat([self.leaders[w.index] for w in v.warps], 32)
        np.copyto(lane, leaders, casting="unsafe")
        np.equal(leaders, np.tile(LANES, len(v.warps)), chosen)

    def each_warp(self, v: View, mask: Mask, addresses: np.ndarray) -> Any:
        """(warp, addresses of its active lanes) for the warps that have any."""
        for n, warp in enumerate(v.warps):
            mine = addresses[n * 32 : n * 32 + 32]
            if mask is not None:
                mine = mine[mask[n * 32 : n * 32 + 32]]
            if len(mine):
                yield warp, mine

    # ---- shared memory

    def shared_load(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], width: int, line: int) -> None:
        total, what = width * len(rows), f"line {line}: the read"
        for warp, mine in self.each_warp(v, mask, addresses):
            at = self.shared.offsets(mine, total, what)
            self.shared.read(self._granules(at, total), warp.clocks, warp.index, warp.time, False, what)
            self._count(self.counts.shared, line, at, total, "banks")
        active = addresses if mask is None else addresses[mask]
        if len(active):
            raw = self.shared.data[(active - 1024)[:, None] + np.arange(total)]
            self._spread(rows, raw if width == 1 else raw.view(np.uint32), mask)

    def _spread(self, rows: list[np.ndarray], values: np.ndarray, mask: Mask) -> None:
        for n, row in enumerate(rows):
            column = values[:, n].view(np.int32) if row.dtype == np.int64 else values[:, n]
            if mask is None:
                row[:] = column
            else:
                row[mask] = column

    def shared_store(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[Any], line: int) -> None:
        values = np.stack([np.broadcast_to(np.asarray(row, np.uint32), addresses.shape) for row in rows], 1)
        self._write(v, mask, addresses, values, line)

    def shared_store_matrix(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], line: int) -> None:
        """stmatrix x4: lane l gives the address of row l % 8 of matrix l / 8, lanes 4r to 4r + 3 hold row r of each."""
        if mask is not None:
            raise KernelError(f"line {line}: stmatrix in divergent code")
        values = np.stack(rows).reshape(4, -1, 8, 4).transpose(1, 0, 2, 3).reshape(-1, 4)  # warp, matrix, row, 4 words
        self._write(v, None, addresses, values, line)

    def _write(self, v: View, mask: Mask, addresses: np.ndarray, values: np.ndarray, line: int) -> None:
        total, what = values.shape[1] * 4, f"line {line}: the write"
        for warp, mine in self.each_warp(v, mask, addresses):
            at = self.shared.offsets(mine, total, what)
            mine_values = values[warp.index * 32 - v.low :][:32]
            raw = np.ascontiguousarray(mine_values if mask is None else mine_values[mask[warp.index * 32 - v.low :][:32]])
            old = self.shared.data[at[:, None] + np.arange(total)]
            # triton tells the other warpgroups what to do by the same words from every thread: not a race that matters
            again = bool((old == raw.view(np.uint8)).all())
            self.shared.write(self._granules(at, total), warp.clocks, warp.index, warp.time, False, what, again)
            self.shared.data[at[:, None] + np.arange(total)] = raw.view(np.uint8)
            if len(np.unique(at)) != len(at) and len(np.unique(values, axis=0)) != 1:
                raise KernelError(f"line {line}: two lanes of a warp write one place of shared memory")
            self._count(self.counts.shared, line, at, total, "banks")

    def _granules(self, at: np.ndarray, width: int) -> np.ndarray:
        return at >> 2 if width <= 4 else ((at >> 2)[:, None] + np.arange(width // 4)).ravel()

    # ---- global memory

    def global_load(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], width: int, line: int) -> None:
        total = width * len(rows)
        for _, mine in self.each_warp(v, mask, addresses):
            self._count(self.counts.loaded, line, mine, total, "sectors")
        active = addresses if mask is None else addresses[mask]
        if len(active):
            self._spread(rows, self.memory.load(active, total, line), mask)

    def global_store(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], line: int) -> None:
        active = np.ones(len(addresses), bool) if mask is None else mask
        for _, mine in self.each_warp(v, mask, addresses):
            self._count(self.counts.stored, line, mine, 4 * len(rows), "sectors")
        if active.any():
            values = np.stack([np.broadcast_to(row, addresses.shape) for row in rows], 1)[active]
            threads = self.program * 1024 + np.arange(v.low, v.high)[active] + 1
            self.memory.store(addresses[active], values, threads, line)

    def global_add(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], line: int) -> None:
        for _, mine in self.each_warp(v, mask, addresses):
            self._count(self.counts.stored, line, mine, 4 * len(rows), "sectors")
        active = slice(None) if mask is None else mask
        if len(addresses[active]):
            self.memory.add_to(addresses[active], np.stack(rows, 1)[active], line)

    def global_add_alone(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], line: int) -> None:
        """Adds by the only thread that adds there in the launch, so that the order of sums is fixed."""
        active = np.ones(len(addresses), bool) if mask is None else mask
        for _, mine in self.each_warp(v, mask, addresses):
            self._count(self.counts.stored, line, mine, 4 * len(rows), "sectors")
        if active.any():
            threads = self.program * 1024 + np.arange(v.low, v.high)[active] + 1
            self.memory.add_alone(addresses[active], np.stack(rows, 1)[active], threads, line)

    def prefetch(self, v: View, mask: Mask, addresses: np.ndarray, line: int) -> None:
        """Changes nothing; what is asked for must be there."""
        for _, mine in self.each_warp(v, mask, addresses):
            self.memory.ask(mine, line)

    def counter_add(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[Any], line: int) -> None:
        amounts = np.broadcast_to(np.asarray(rows[0]), addresses.shape)
        for lane in np.flatnonzero(np.ones(len(addresses), bool) if mask is None else mask):
            self.memory.count(int(addresses[lane]), int(amounts[lane]), line)

    def counter_load(self, v: View, mask: Mask, addresses: np.ndarray, rows: list[np.ndarray], width: int, line: int) -> None:
        """ld.acquire of a counter; an error if somebody asks for ever."""
        for lane in np.flatnonzero(np.ones(len(addresses), bool) if mask is None else mask):
            rows[0][lane] = found = self.memory.count(int(addresses[lane]), 0, line)
            asked = (int(addresses[lane]), found)
            self._asked = (asked, self._asked[1] + 1 if self._asked[0] == asked else 0)
            if self._asked[1] > PATIENCE:
                raise KernelError(f"line {line}: program {self.program} waits for ever for a counter that stands at {found}")

    # ---- counts

    def _count(self, where: dict[int, Traffic], line: int, addresses: np.ndarray, width: int, kind: str) -> None:
        relative = addresses - (int(addresses.min()) & -128)
        pattern = (relative.tobytes(), width, kind)
        if pattern not in self._patterns:
            self._patterns[pattern] = (wavefronts if kind == "banks" else sectors)(relative, width)
        units, ideal = self._patterns[pattern]
        traffic = where.setdefault(line, Traffic())
        traffic.requests += 1
        traffic.units += units
        traffic.ideal += ideal


def sectors(addresses: np.ndarray, width: int) -> tuple[int, int]:
    """(sectors of 32 bytes touched, the fewest that hold as many different bytes)."""
    touched = np.unique((addresses[:, None] + np.arange(width)) // 32)
    return len(touched), -(-len(np.unique(addresses)) * width // 32)


def wavefronts(addresses: np.ndarray, width: int) -> tuple[int, int]:
    """(passes over the 32 banks, the fewest): lanes go by 32 for accesses of 4 bytes, by 16 for 8, by 8 for 16."""
    step = 32 if width <= 4 else 128 // width
    total = ideal = 0
    for begin in range(0, len(addresses), step):
        words = np.unique((addresses[begin : begin + step, None] + np.arange(0, max(width, 4), 4)) // 4)
        total += int(np.bincount(words % 32).max())
        ideal += 1
    return total, ideal
