"""One program of a launch on the emulated chip: its warps take turns as is drawn, until all have returned.

Warps of a warpgroup that are at one place run side by side, mostly; who goes on is drawn wherever threads or engines
synchronise. In divergent code the lanes with the smallest program counter go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.kernels.gluon_machine import KernelError
from tests.kernels.ptx_engines import Engines
from tests.kernels.ptx_global import GlobalMemory, TensorMap
from tests.kernels.ptx_lanes import Counts, Mask, View, Warp
from tests.kernels.ptx_parse import Address, Immediate, Instruction, Register
from tests.kernels.ptx_shared import N_AGENTS, SharedMemory
from tests.kernels.ptx_translate import Step, Translated, key, registers

POISON = 0x7FBADBAD  # a NaN as float32, far from all addresses as an integer
STEPS_WITHOUT_END = 2_000_000


class NamedBarrier:
    """bar.sync: warps that came in this turn."""

    def __init__(self, count: int):
        self.count = count
        self.arrived: list[Warp] = []
        self.gathered = np.zeros((2, N_AGENTS), np.int64)


class Machine(Engines):
    """``program`` is its place in ``grid``, x and y."""

    def __init__(
        self, translated: Translated, size: int, memory: GlobalMemory, parameters: dict[str, int], maps: dict[int, TensorMap],
        program: tuple[int, int], grid: tuple[int, int], seed: int, counts: Counts,
    ):  # fmt: skip
        entry = translated.entry
        self.files = {
            "p": np.zeros((entry.counts["p"], entry.threads), bool),
            "h": np.full((entry.counts["h"], entry.threads), POISON & 0xFFFF, np.uint16),
            "r": np.full((entry.counts["r"], entry.threads), POISON, np.uint32),
            "d": np.full((entry.counts["d"], entry.threads), POISON << 32 | POISON, np.uint64),
        }
        shared = SharedMemory(size)
        number = program[0] + program[1] * grid[0]
        super().__init__(number, memory, shared, parameters, counts, maps=maps, seed=seed, registers=self.files["r"])
        self.translated, self.entry, self.steps = translated, entry, translated.steps
        self.warps = [Warp(n, entry.registers_a_thread) for n in range(entry.threads // 32)]
        self.leaders = [self.random.randrange(32) for _ in self.warps]
        self.special = {f"%ctaid.{axis}": np.uint32(n) for axis, n in zip("xy", program, strict=True)}
        self.special |= {f"%nctaid.{axis}": np.uint32(n) for axis, n in zip("xy", grid, strict=True)}
        self.views: dict[tuple[int, int], View] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.together = self.random.choice([1.0, 0.9, 0.5])
        products = [s for s in self.steps if s.kind == "product"]
        self.product_keys = frozenset(k for s in products for o in s.instruction.operands[:2] for k in map(key, registers(o)))

    def step_computes(self, n: int) -> frozenset[int]:
        return self.steps[n].computed

    def view(self, warps: list[Warp]) -> View:
        place = (warps[0].index, len(warps))
        if place not in self.views:
            self.views[place] = View(self.files, warps, self.special)
        return self.views[place]

    # ---- turns

    def turns(self) -> Iterator[None]:
        """Runs until all warps returned, a turn at a time; KernelError where the chip would fail, hang or race."""
        for _ in range(STEPS_WITHOUT_END):
            able = [w for w in self.warps if not w.done and self._ready(w)]
            if not able and not self.events:
                if all(w.done for w in self.warps):
                    self._check_end()
                    return
                said = "; ".join(f"warp {w.index}: {w.waiting[0]}" for w in self.warps if w.waiting and not w.done)
                raise KernelError(f"deadlock: {said}")
            pick = self.random.randrange(len(able) + len(self.events))
            if pick >= len(able):
                self.events.pop(pick - len(able))()
            else:
                self._turn(able[pick], able)
            yield
        raise KernelError("the program does not end")

    def _ready(self, warp: Warp) -> bool:
        return warp.waiting is None or bool(warp.waiting[1]())

    def _turn(self, warp: Warp, able: list[Warp]) -> None:
        warp.waiting = None
        if warp.mask is not None or warp.others:
            self._divergent(warp)
            return
        fellows = [warp]
        if self.together == 1.0 or self.random.random() < self.together:
            begin = warp.index // 4 * 4
            group = self.warps[begin : begin + 4]
            if all(w in able and w.pc == warp.pc and w.mask is None and not w.others for w in group):
                fellows = group
                for w in group:
                    w.waiting = None
        self._go_on(fellows)

    def _go_on(self, warps: list[Warp]) -> None:
        """Until they wait, part or somebody else is drawn."""
        v = self.view(warps)
        while True:
            n = warps[0].pc
            step = self.steps[n]
            self.counts.steps[n] += len(warps)
            self._check_flight(warps, n, step)
            for w in warps:
                w.pc = n + 1
            if step.kind == "straight":
                assert step.run is not None
                step.run(v, None, self)
            elif step.kind == "branch":
                self._branch(v, None, step)
                if any(w.pc != warps[0].pc or w.mask is not None for w in warps):
                    return
            elif step.kind == "table":
                place = self.uniform(v, step.instruction.operands[0], "U", step.instruction)
                if place >= len(step.targets):
                    raise KernelError(f"{step.instruction} to target {place} of {len(step.targets)}")
                for w in warps:
                    w.pc = step.targets[place]
            elif step.kind == "ret":
                for w in warps:
                    w.done = True
                return
            else:
                getattr(self, step.method)(v, None, step)
                if any(w.waiting for w in warps) or self.random.random() < 0.2:
                    return

    def _check_flight(self, warps: list[Warp], n: int, step: Step) -> None:
        for w in warps:
            flight = w.flight
            if flight.unreadable and step.kind != "product":
                if not flight.unreadable.isdisjoint(step.reads):
                    raise KernelError(f"{step.instruction} ff.: reads accumulators of products in flight")
                if not flight.unwritable.isdisjoint(step.writes):
                    raise KernelError(f"{step.instruction} ff.: writes registers that products in flight use")
            if step.kind == "straight" and not step.computed.isdisjoint(self.product_keys):
                flight.dirty.add(n)

    # ---- divergence

    def _branch(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        if x.guard is None:
            for w in v.warps:
                w.pc = step.targets[0]
            return
        row = v.P[x.guard.index]
        taken = ~row if x.negated else row
        for n, w in enumerate(v.warps):
            mine = taken[n * 32 : n * 32 + 32]
            active = np.ones(32, bool) if mask is None else mask
            jump, stay = mine & active, ~mine & active
            if not stay.any():
                w.pc = step.targets[0]
            elif jump.any():
                if x.opcode == "bra.uni":
                    raise KernelError(f"{x}: lanes disagree")
                w.others.append((step.targets[0], jump.copy()))
                w.mask = stay

    def _divergent(self, warp: Warp) -> None:
        """One step of the lanes that are furthest behind."""
        assert warp.mask is not None
        parts: dict[int, np.ndarray] = {}
        for pc, mask in [(warp.pc, warp.mask), *warp.others]:
            parts[pc] = parts[pc] | mask if pc in parts else mask
        warp.pc = min(parts)
        warp.mask = parts.pop(warp.pc)
        warp.others = list(parts.items())
        if warp.mask.all():
            warp.mask, warp.others = None, []
            return
        step = self.steps[warp.pc]
        self.counts.steps[warp.pc] += 1
        self._check_flight([warp], warp.pc, step)
        v = self.view([warp])
        warp.pc += 1
        if step.kind == "straight":
            self._masked(v, warp.mask, step)
        elif step.kind == "branch":
            self._branch(v, warp.mask, step)
        else:
            raise KernelError(f"{step.instruction} in divergent code")

    def _masked(self, v: View, mask: np.ndarray, step: Step) -> None:
        files = {"p": v.P, "h": v.H, "r": v.U, "d": v.Q}
        rows = [files["phrd"[k % 4]][k // 4] for k in step.writes]
        kept = [row.copy() for row in rows]
        assert step.run is not None
        step.run(v, mask, self)
        for row, old in zip(rows, kept, strict=True):
            np.copyto(row, old, where=~mask)

    # ---- barriers

    def barrier(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        if x.guard is not None or mask is not None or not all(isinstance(n, Immediate) for n in x.operands):
            raise KernelError(f"{x} is not known in this form")
        number, count = (*(n.value for n in x.operands if isinstance(n, Immediate)), self.entry.threads)[:2]
        if count % 32 or not 0 <= number < 16:
            raise KernelError(f"{x}: {count} threads")
        named = self.named.setdefault(number, NamedBarrier(count))
        for w in v.warps:
            if named.arrived and named.count != count:
                raise KernelError(f"{x}: {count} threads, where others wait for {named.count}")
            named.count = count
            named.arrived.append(w)
            w.clocks.publish(*named.gathered)
            w.waiting = (f"{x} number {number} for {count} threads", lambda: False)
            if len(named.arrived) * 32 == count:
                for other in named.arrived:
                    other.clocks.learn(*named.gathered)
                    other.waiting = None
                self.named[number] = named = NamedBarrier(count)

    def fence(self, v: View, mask: Mask, step: Step) -> None:
        for w in v.warps:
            w.clocks.fence()

    def _lanes_at(self, v: View, mask: Mask, x: Instruction, place: int) -> Any:
        """(warp, address, how many lanes) of an operation on mbarriers."""
        operand = x.operands[place]
        assert isinstance(operand, Address) and isinstance(operand.base, Register)
        for warp, lane in self._copy_lanes(v, mask, x):
            yield warp, int(v.U[operand.base.index][lane]) + operand.offset

    def mbarrier_init(self, v: View, mask: Mask, step: Step) -> None:
        (_, count), x = step.instruction.operands, step.instruction
        assert isinstance(count, Immediate)
        for warp, address in self._lanes_at(v, mask, x, 0):
            self.shared.init_barrier(address, count.value, warp.clocks)

    def mbarrier_arrive(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        for warp, address in self._lanes_at(v, mask, x, 1):
            self.shared.barrier(address, warp.clocks, False, str(x)).arrive(warp.clocks)

    def mbarrier_expect(self, v: View, mask: Mask, step: Step) -> None:
        x = step.instruction
        n_bytes = x.operands[2]
        assert isinstance(n_bytes, Immediate)
        for warp, address in self._lanes_at(v, mask, x, 1):
            self.shared.barrier(address, warp.clocks, False, str(x)).expect(warp.clocks, n_bytes.value)

    def mbarrier_wait(self, v: View, mask: Mask, step: Step) -> None:
        """try_wait: the warp sleeps until the phase is complete; now and then it is told to try again."""
        x = step.instruction
        done, at, parity_of = x.operands
        assert isinstance(done, Register) and isinstance(at, Address)
        address = self.uniform(v, at.base, "U", x) + at.offset
        parity = self.uniform(v, parity_of, "U", x)
        if parity not in (0, 1):
            raise KernelError(f"{x} with phase {parity}: phases are 0 and 1")
        for w in v.warps:
            barrier = self.shared.barrier(address, w.clocks, False, str(x))
            if not barrier.passed(parity):
                w.pc -= 1
                w.waiting = (f"{x} for {barrier}, phase {parity}", lambda barrier=barrier: barrier.passed(parity))
                continue
            w.clocks.learn(*barrier.completed)
        if any(w.waiting for w in v.warps):
            return
        v.P[done.index].fill(self.random.random() > 0.05)

    # ---- registers

    def fewer_registers(self, v: View, mask: Mask, step: Step) -> None:
        self._set_registers(v, mask, step, lambda asked, has: asked <= has)

    def more_registers(self, v: View, mask: Mask, step: Step) -> None:
        self._set_registers(v, mask, step, lambda asked, has: asked >= has)

    def _set_registers(self, v: View, mask: Mask, step: Step, allowed: Callable[[int, int], bool]) -> None:
        x = step.instruction
        (asked,) = x.operands
        assert isinstance(asked, Immediate)
        pool = self.entry.registers_a_thread * len(self.warps)
        for w in v.warps:
            if asked.value % 8 or not 24 <= asked.value <= 256 or not allowed(asked.value, w.registers):
                raise KernelError(f"{x} {asked.value} with {w.registers} registers")
            others = sum(o.registers for o in self.warps if o is not w)
            if others + asked.value > pool:
                w.pc -= 1
                said = f"{x} {asked.value}: {others * 32} of {pool * 32} registers are taken"
                w.waiting = (said, lambda w=w: sum(o.registers for o in self.warps if o is not w) + asked.value <= pool)
                continue
            w.registers = asked.value
            self.collective(self.view([w]), mask, str(x))

    # ---- the end

    def _check_end(self) -> None:
        for w in self.warps:
            if w.flight.groups or w.flight.open:
                raise KernelError(f"warp {w.index} ends with products in flight")
            if w.open_stores or w.store_groups:
                raise KernelError(f"warp {w.index} ends while its stores still read shared memory")
        for barrier in self.shared.barriers.values():
            if barrier.bytes:
                raise KernelError(f"the program ends while {barrier.bytes} bytes are expected on {barrier}")
        if left := [n for n, named in self.named.items() if named.arrived]:
            raise KernelError(f"the program ends with warps at barriers {left}")
