"""Launches on the emulated chip: the PTX that triton makes of a launch, run on the launch's own CPU tensors.

What is executed is what would be sent to the assembler. Outside of it stay the assembler, the chip's timing, and what
the machine's documentation calls simplified.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.compiler import compile as compile_source

from distattn.kernels.gluon_ahead_of_time import TARGET, Launched, _source
from distattn.kernels.gluon_backend import GluonBackend
from distattn.kernels.gluon_division import Costs
from distattn.kernels.gluon_plans import Shape
from tests.kernels.ptx_global import GlobalMemory, TensorMap, describe
from tests.kernels.ptx_lanes import Counts, Traffic
from tests.kernels.ptx_machine import Machine
from tests.kernels.ptx_parse import PtxError, parse
from tests.kernels.ptx_translate import PARAMETER_BASE, Translated, translate

Change = Callable[[str], str]
RESIDENT = 3  # programs that run in turns where they wait for each other


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch."""

    ptx: str
    shared: int
    maps: list[dict[str, Any]]
    scratch: int


@dataclass(frozen=True)
class Report:
    """How a launch used the chip: sums over its programs and warps, by line of the PTX text."""

    kind: str
    instructions: Counter[str]  # executed by warps, by class
    warps: int
    counts: Counts

    def __str__(self) -> str:
        parts = [f"{self.kind}: {sum(self.instructions.values()) / self.warps:.0f} instructions a warp"]
        parts.append(f"{self.shared.units - self.shared.ideal} wavefronts of {self.shared.units} in shared memory are conflicts")
        for name in ("loaded", "stored"):
            t = getattr(self, name)
            parts.append(f"{t.units} sectors {name} where {t.ideal} would do")
        return ", ".join(parts)

    @property
    def shared(self) -> Traffic:
        return _total(self.counts.shared)

    @property
    def loaded(self) -> Traffic:
        return _total(self.counts.loaded)

    @property
    def stored(self) -> Traffic:
        return _total(self.counts.stored)


def _total(lines: dict[int, Traffic]) -> Traffic:
    return Traffic(*(sum(getattr(t, name) for t in lines.values()) for name in ("requests", "units", "ideal")))


_BUILT: dict[str, Built] = {}


def build(launched: Launched) -> Built:
    """Compiles for sm_90a (seconds, once a process for each set of types, strides and constants)."""
    source = _source(launched)
    options = {name: launched.named[name] for name in ("num_warps", "maxnreg") if name in launched.named}
    key = f"{source.hash()} {options}"
    if key not in _BUILT:
        made = compile_source(source, target=TARGET, options=options)
        meta = made.metadata
        if meta.num_ctas != 1 or meta.global_scratch_size or meta.launch_cooperative_grid or meta.launch_pdl:
            raise PtxError(f"a launch that the emulator does not know: {meta}")
        _BUILT[key] = Built(made.asm["ptx"], meta.shared, list(meta.tensordesc_meta or []), meta.profile_scratch_size)
    return _BUILT[key]


@lru_cache(maxsize=64)
def translated(text: str) -> Translated:
    return translate(parse(text))


def bound(
    launched: Launched, built: Built, program: Translated, memory: GlobalMemory
) -> tuple[dict[str, int], dict[int, TensorMap]]:
    """The parameters as triton's launcher passes them: (bits by name, tensor maps by address)."""
    source = _source(launched)
    given: list[tuple[str, Any]] = []
    metas = iter(built.maps)
    for (name, kind), x in zip(source.signature.items(), launched.arguments, strict=False):
        if kind == "constexpr":
            continue
        if isinstance(x, torch.Tensor):
            given.append(("u64", memory.add(x, name)))
        elif isinstance(x, float):
            given.append(("f32", int(np.float32(x).view(np.uint32))))
        elif isinstance(x, int):
            given.append(("u32", x))
        else:
            given.append(("map", describe(x, next(metas), memory, name)))
            given += [("u32", n) for n in x.shape] + [("u64", n) for n in x.strides]
    given += [("u64", 0), ("u64", 0)]  # scratch of the launch and of a profiler: none
    parameters = program.entry.parameters
    if [p.type for p in parameters] != [kind for kind, _ in given]:
        raise PtxError(f"{program.entry.name} has parameters {[p.type for p in parameters]}, given {[kind for kind, _ in given]}")
    bits, maps = {}, {}
    for place, (parameter, (kind, x)) in enumerate(zip(parameters, given, strict=True)):
        if kind == "map":
            maps[PARAMETER_BASE + place * 4096] = x
        else:
            bits[parameter.name] = x
    return bits, maps


def execute(
    program: Translated, size: int, memory: GlobalMemory, parameters: dict[str, int], maps: dict[int, TensorMap],
    grid: tuple[int, ...], seed: int,
) -> Counts:  # fmt: skip
    """Runs all programs of a grid on ``size`` bytes of shared memory each.

    One after the other in a drawn order; where they wait for each other by counters in turns, and they start as numbered.
    """
    width, height = (*grid, 1)[:2]
    counts, draw = Counts(), random.Random(seed)
    meet = any(x.opcode.startswith("ld.acquire") for x in program.entry.instructions)
    waiting = list(range(width * height)) if meet else draw.sample(range(width * height), width * height)
    running: list[Iterator[None]] = []
    with np.errstate(all="ignore"):
        while waiting or running:
            if waiting and len(running) < (RESIDENT if meet else 1):
                p = waiting.pop(0)
                place, dimensions = (p % width, p // width), (width, height)
                machine = Machine(program, size, memory, parameters, maps, place, dimensions, draw.randrange(1 << 30), counts)
                running.append(machine.turns())
            one = draw.choice(running)
            if next(one, one) is one:
                running.remove(one)
    return counts


def run(launched: Launched, grid: tuple[int, ...], seed: int = 0, change: Change | None = None) -> Report:
    """Executes every program of a launch; tensors are changed in place.

    Args:
        grid: programs, in one or two dimensions.
        change: of the PTX text before it is read.
    Raises:
        KernelError: where the chip would answer with a wrong number, a fault or silence.
        PtxError: the text holds what the emulator does not know.
    """
    built = build(launched)
    program = translated(change(built.ptx) if change else built.ptx)
    memory = GlobalMemory()
    parameters, maps = bound(launched, built, program, memory)
    counts = execute(program, built.shared, memory, parameters, maps, grid, seed)
    classes: Counter[str] = Counter()
    for step, times in counts.steps.items():
        for name, count in program.steps[step].classes.items():
            classes[name] += count * times
    return Report(launched.kind, classes, int(np.prod(grid)) * program.entry.threads // 32, counts)


class Compiled(GluonBackend):
    """The Hopper backend whose launches run on the emulated chip, as they are compiled; ``reports`` grows by one a launch.

    Args:
        seed: draws who runs when.
        processors: of the emulated chip.
        rows: changes fields of the launch rows by kind.
        change: of the PTX text, by kind of kernel.
        costs: of cutting items, instead of the real ones, which small sizes do not repay.
        options: of :class:`GluonBackend`.
    """

    def __init__(
        self, seed: int = 0, processors: int = 3, rows: dict[str, dict[str, Any]] | None = None,
        change: dict[str, Change] | None = None, costs: Costs | None = None, **options: bool,
    ):  # fmt: skip
        super().__init__(**options)
        self.costs = costs
        self.seed, self.processors, self.rows, self.change = seed, processors, rows or {}, change or {}
        self.reports: list[Report] = []

    def _reject_device(self, device: torch.device) -> str | None:
        return None

    def _processors(self, device: torch.device) -> int:
        return self.processors

    def _costs(self, kind: str, row: Any, shape: Shape) -> Costs | None:
        found = super()._costs(kind, row, shape)
        return self.costs if found and self.costs else found

    def _row(self, kind: str, d: int, d_v: int, softcap: float = 0.0) -> Any:
        return super()._row(kind, d, d_v, softcap)._replace(**self.rows.get(kind, {}))

    def _kernel(self, kind: str) -> Any:
        backend = self

        class Place:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*arguments: Any, **named: Any) -> None:
                    launched = Launched(kind, arguments, named)
                    seed = backend.seed * 100 + len(backend.reports)
                    backend.reports.append(run(launched, grid, seed, backend.change.get(kind)))

                return launch

        return Place()
