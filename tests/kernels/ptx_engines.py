"""The engines of the emulated chip: matrix products of warpgroups and copies by tensor maps, which run beside the threads.

A product reads shared memory when its group is committed or only when it is waited for, as is drawn; its registers are its own
until then. A copy lands whenever it is drawn. Either is checked for races when it is issued, so no draw hides one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.gluon_machine import KernelError
from tests.kernels.ptx_global import TensorMap
from tests.kernels.ptx_lanes import Lanes, Mask, View, Warp
from tests.kernels.ptx_parse import Address, Immediate, Instruction, Operand, Register, Vector
from tests.kernels.ptx_shared import PRODUCTS, SHARED_BASE, STORES, swizzled
from tests.kernels.ptx_translate import PRODUCT, Step
from tests.kernels.ptx_wgmma import Descriptor, Group, Product, decode, execute, granules


class Engines(Lanes):
    """``maps`` are tensor maps by the address of their parameter, ``events`` what may complete at any time."""

    def __init__(self, *arguments: Any, maps: dict[int, TensorMap], seed: int, registers: np.ndarray):
        super().__init__(*arguments)
        self.maps, self.random, self.r32 = maps, random.Random(seed), registers
        self.warps: list[Warp] = []
        self.events: list[Callable[[], None]] = []
        self.collective_log: dict[tuple[int, int], object] = {}

    def collective(self, v: View, mask: Mask, what: object) -> None:
        """Four warps of a warpgroup have to execute the same, one after the other in the same order."""
        if mask is not None:
            raise KernelError(f"{what} in divergent code")
        for warp in v.warps:
            place = (warp.index // 4, warp.collectives)
            first = self.collective_log.setdefault(place, what)
            if first != what:
                raise KernelError(f"warp {warp.index} executes {what} where another of its warpgroup executes {first}")
            warp.collectives += 1

    def value(self, v: View, operand: Operand, letter: str) -> Any:
        if isinstance(operand, Immediate):
            return operand.value
        assert isinstance(operand, Register)
        return getattr(v, letter)[operand.index]

    def uniform(self, v: View, operand: Operand, letter: str, what: Instruction) -> int:
        values = self.value(v, operand, letter)
        if isinstance(operand, Register):
            if (values != values[0]).any():
                raise KernelError(f"{what}: {operand} differs between threads")
            values = values[0]
        return int(values)

    # ---- products

    def wgmma_fence(self, v: View, mask: Mask, step: Step) -> None:
        self.collective(v, mask, str(step.instruction))
        for warp in v.warps:
            warp.flight.dirty.clear()
            warp.flight.fenced = True

    def wgmma_product(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        product = self._product(v, x)
        b = product.b
        self.collective(v, mask, (str(x), product.a if isinstance(product.a, Descriptor) else None, b, product.keep))
        keys = {r * 4 + 2 for r in (*product.accumulators, *product.sources)}
        for warp in v.warps:
            self._check_registers(warp, product, keys, x)
            time = warp.flight.committed + 1
            if isinstance(product.a, Descriptor):
                where = granules(product.a, 64, product.a_transposed, warp.index % 4 * 16, 16)
                self.shared.read(where, warp.clocks, PRODUCTS + warp.index, time, True, f"{x}: the read of A")
            where = granules(b, product.n, product.b_transposed, 0, product.n)
            self.shared.read(where, warp.clocks, PRODUCTS + warp.index, time, True, f"{x}: the read of B")
            warp.flight.add(product)

    def _product(self, v: View, x: Instruction) -> Product:
        found = PRODUCT.fullmatch(x.opcode)
        accumulators, a, b, scale, *literals = x.operands
        transposes = 1 if isinstance(a, Vector) else 2
        if not (found and isinstance(accumulators, Vector) and len(literals) == 2 + transposes and x.guard is None):
            raise KernelError(f"{x} is not known in this form")
        values = [n.value for n in literals if isinstance(n, Immediate)]
        if values[:2] != [1, 1] or len(values) != len(literals) or not set(values[2:]) <= {0, 1}:
            raise KernelError(f"{x} with literals {values}")
        registers = tuple(r.index for r in accumulators.parts if isinstance(r, Register) and r.file == "r")
        if len(set(registers)) != int(found[1]) // 2:
            raise KernelError(f"{x} has {len(registers)} accumulators")
        sources: tuple[int, ...] = ()
        if isinstance(a, Vector):
            sources = tuple(r.index for r in a.parts if isinstance(r, Register))
            if len(sources) != 4:
                raise KernelError(f"{x} has {len(sources)} registers of A")
            left: np.ndarray | Descriptor = np.stack([v.U[r] for r in sources])
        else:
            left = decode(self.uniform(v, a, "Q", x))
        keep = self.uniform(v, scale, "P", x) != 0
        right = decode(self.uniform(v, b, "Q", x))
        trans_a = transposes == 2 and values[2] == 1
        return Product(v.low, v.high, registers, left, right, trans_a, values[-1] == 1, keep, found[2], sources)

    def _check_registers(self, warp: Warp, product: Product, keys: set[int], x: Instruction) -> None:
        flight = warp.flight
        for n in flight.dirty:
            # LLVM lets copies of registers slip behind the fence, and the assembler joins them with what they copy
            if not keys.isdisjoint(self.step_computes(n)):
                raise KernelError(f"{x}: its registers were computed since the last wgmma.fence")
        if not flight.fenced:
            raise KernelError(f"{x} before any wgmma.fence")
        if any(flight.accumulators.get(r, product.accumulators) != product.accumulators for r in product.accumulators):
            raise KernelError(f"{x}: accumulators that others in flight write in another shape")
        if any(r in flight.accumulators for r in product.sources):
            raise KernelError(f"{x}: registers of A that products in flight write")

    def step_computes(self, n: int) -> frozenset[int]:
        raise NotImplementedError

    def wgmma_commit(self, v: View, mask: Mask, step: Step) -> None:
        self.collective(v, mask, str(step.instruction))
        first = v.warps[0].flight.open
        shared = len({id(p) for w in v.warps for p in w.flight.open}) == len(first)
        shared = shared and all((p.low, p.high) == (v.low, v.high) for p in first)
        whole = Group(v.low, v.high, list(first))
        early = self.random.random() < 0.5
        for warp in v.warps:
            group = whole if shared else Group(warp.index * 32, warp.index * 32 + 32, self._parts(warp))
            warp.flight.groups.append(group)
            warp.flight.committed += 1
            warp.flight.open = []
        for warp in v.warps if early else []:
            self._run_groups(warp, len(warp.flight.groups))

    def _parts(self, warp: Warp) -> list[Product]:
        """The warp's share of products that were issued by several."""
        low = warp.index * 32
        parts = []
        for p in warp.flight.open:
            a = p.a if isinstance(p.a, Descriptor) else p.a[:, low - p.low : low - p.low + 32]
            parts.append(
                Product(low, low + 32, p.accumulators, a, p.b, p.a_transposed, p.b_transposed, p.keep, p.kind, p.sources)
            )
        return parts

    def _run_groups(self, warp: Warp, count: int) -> None:
        for n in range(count):
            group = warp.flight.groups[n]
            if group.results is None:
                started = {p.accumulators for p in group.products if p.keep}
                execute(group, self.shared, {regs: self._accumulators(group, regs) for regs in started})

    def _accumulators(self, group: Group, registers: tuple[int, ...]) -> np.ndarray:
        """What they hold when the group begins: the results of the group before it that is in flight, or the registers."""
        values = self.r32[list(registers), group.low : group.high].view(np.float32).copy()
        for warp in self.warps[group.low // 32 : group.high // 32]:
            for earlier in warp.flight.groups:
                if earlier is group:
                    break
                if earlier.results is None:
                    self._run_groups(warp, list(warp.flight.groups).index(earlier) + 1)
                if earlier.results and registers in earlier.results:
                    mine = earlier.results[registers][:, warp.index * 32 - earlier.low :][:, :32]
                    values[:, warp.index * 32 - group.low :][:, :32] = mine
        return values

    def wgmma_wait(self, v: View, mask: Mask, step: Step) -> None:
        self.collective(v, mask, str(step.instruction))
        (count,) = step.instruction.operands
        assert isinstance(count, Immediate)
        for warp in v.warps:
            flight = warp.flight
            finished = max(len(flight.groups) - count.value, 0)
            self._run_groups(warp, finished)
            low = warp.index * 32
            for _ in range(finished):
                group = flight.groups.popleft()
                assert group.results is not None
                for registers, values in group.results.items():
                    self.r32[list(registers), low : low + 32] = values[:, low - group.low : low - group.low + 32].view(np.uint32)
            warp.clocks.seen[PRODUCTS + warp.index] = flight.committed - len(flight.groups)
            flight.refresh()

    # ---- copies

    def _copy_lanes(self, v: View, mask: Mask, x: Instruction) -> Any:
        """(warp, lane in the view) of every thread that issues."""
        active = np.ones(v.high - v.low, bool) if mask is None else mask
        if x.guard is not None:
            row = v.P[x.guard.index]
            active = active & (~row if x.negated else row)
        for lane in np.flatnonzero(active):
            yield v.warps[lane // 32], int(lane)

    def _map(self, v: View, operand: Operand, lane: int, x: Instruction) -> tuple[TensorMap, tuple[int, ...]]:
        assert isinstance(operand, Address) and operand.coordinates is not None and not operand.offset
        address = int(self.value(v, operand.base, "Q")[lane])
        found = self.maps.get(address)
        if found is None:
            raise KernelError(f"{x}: no tensor map at {address:#x}")
        corner = tuple(int(self.value(v, part, "I")[lane]) for part in operand.coordinates.parts)
        if len(corner) != int(x.opcode.split(".tensor.")[1][0]):
            raise KernelError(f"{x} by {len(corner)} coordinates")
        return found, corner

    def _address(self, v: View, operand: Operand, lane: int) -> int:
        assert isinstance(operand, Address)
        return int(self.value(v, operand.base, "U")[lane]) + operand.offset

    def _place(self, tensor: TensorMap, start: int, x: Instruction) -> slice:
        """The granules of a box in shared memory."""
        self.shared.offsets(np.array([start]), tensor.bytes if tensor.bytes < 128 else 1, str(x))
        if start % 128 or tensor.swizzle and start % (tensor.swizzle * 8):
            raise KernelError(f"{x}: a box with a swizzle of {tensor.swizzle} bytes at shared memory + {start - SHARED_BASE}")
        if start - SHARED_BASE + tensor.bytes > self.shared.size:
            raise KernelError(f"{x}: a box beyond the end of shared memory")
        return slice((start - SHARED_BASE) // 4, (start - SHARED_BASE + tensor.bytes) // 4)

    def _chunks(self, tensor: TensorMap, start: int) -> np.ndarray:
        """Where the units of 16 bytes of a box lie, in order of the box."""
        return (swizzled(start + np.arange(0, tensor.bytes, 16), tensor.swizzle) - SHARED_BASE) // 16

    def tensor_load(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        for warp, lane in self._copy_lanes(v, mask, x):
            to, source, barrier_at = x.operands
            tensor, corner = self._map(v, source, lane, x)
            start = self._address(v, to, lane)
            barrier = self.shared.barrier(self._address(v, barrier_at, lane), warp.clocks, True, str(x))
            phase = barrier.announce(tensor.bytes)
            where = self._place(tensor, start, x)
            self.shared.write(where, warp.clocks, barrier.agent, phase, True, f"{x}: the copy")
            chunks, data = self._chunks(tensor, start), tensor.load(corner, str(x)).reshape(-1, 16)
            self.shared.data.reshape(-1, 16)[chunks] = 0xFF

            def land(chunks: np.ndarray = chunks, data: np.ndarray = data, barrier: Any = barrier) -> None:
                self.shared.data.reshape(-1, 16)[chunks] = data
                barrier.land(data.size)

            self.events.append(land)

    def tensor_store(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        for warp, lane in self._copy_lanes(v, mask, x):
            to, source = x.operands
            tensor, corner = self._map(v, to, lane, x)
            start = self._address(v, source, lane)
            where = self._place(tensor, start, x)
            time = warp.stores_committed + 1
            self.shared.read(where, warp.clocks, STORES + warp.index, time, True, f"{x}: the store")

            def store(tensor: TensorMap = tensor, corner: Any = corner, start: int = start, writer: int = warp.index) -> None:
                data = self.shared.data.reshape(-1, 16)[self._chunks(tensor, start)]
                rows = data.reshape(-1, tensor.box[0] * tensor.item)
                tensor.store(corner, rows, self.program * 1024 + 1000 + writer, str(x))

            warp.open_stores.append(store)

    def store_commit(self, v: View, mask: Mask, step: Step) -> None:
        for warp in v.warps:
            warp.store_groups.append(warp.open_stores)
            warp.open_stores = []
            warp.stores_committed += 1
            if self.random.random() < 0.5:
                self._finish_stores(warp, 0, wait=False)

    def _finish_stores(self, warp: Warp, left: int, wait: bool) -> None:
        """Runs all but the last groups. Until they are waited for, nobody knows."""
        for group in warp.store_groups[: len(warp.store_groups) - left]:
            while group:
                group.pop(0)()
        if wait:
            warp.store_groups = warp.store_groups[len(warp.store_groups) - left :] if left else []
            warp.clocks.seen[STORES + warp.index] = warp.stores_committed - len(warp.store_groups)

    def store_wait(self, v: View, mask: Mask, step: Step) -> None:
        (count,) = step.instruction.operands
        assert isinstance(count, Immediate)
        for warp in v.warps:
            self._finish_stores(warp, min(count.value, len(warp.store_groups)), wait=True)
