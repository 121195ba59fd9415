"""An entry as steps: runs of instructions turned into Python once, and the instructions that the machine has to take part in.

A step ends where threads may meet, wait, branch or hand something over. Also checked here, over all paths: that no register is
read before it was written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tests.kernels.ptx_instructions import ALU, Lines
from tests.kernels.ptx_parse import (
    Address,
    Entry,
    Immediate,
    Instruction,
    Operand,
    Pair,
    PtxError,
    Register,
    Symbol,
    Vector,
)

SHARED_BASE = 1024  # the first kilobyte of shared memory is the system's on compute capability 9.0
PARAMETER_BASE = 0x5000_0000  # parameters stand 4 KB apart, below 4 GB: triton 3.9 keeps their addresses in 32 bits

# How the machine takes part, by the beginning of the opcode: the name of its method.
SPECIAL = {
    "mbarrier.init.shared::cta.b64": "mbarrier_init",
    "mbarrier.arrive.shared::cta.b64": "mbarrier_arrive",
    "mbarrier.arrive.expect_tx.shared::cta.b64": "mbarrier_expect",
    "mbarrier.try_wait.parity.shared::cta.b64": "mbarrier_wait",
    "bar.sync": "barrier",
    "barrier.sync": "barrier",
    "fence.proxy.async.shared::cta": "fence",
    "setmaxnreg.inc.sync.aligned.u32": "more_registers",
    "setmaxnreg.dec.sync.aligned.u32": "fewer_registers",
    "wgmma.fence.sync.aligned": "wgmma_fence",
    "wgmma.commit_group.sync.aligned": "wgmma_commit",
    "wgmma.wait_group.sync.aligned": "wgmma_wait",
    "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes": "tensor_load",
    "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes": "tensor_load",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group": "tensor_store",
    "cp.async.bulk.commit_group": "store_commit",
    "cp.async.bulk.wait_group.read": "store_wait",
}
# As triton 3.6 writes them: ``shared`` is shared::cta, and a cluster is one block here.
SPECIAL |= {
    "mbarrier.arrive.expect_tx.shared.b64": "mbarrier_expect",
    "mbarrier.try_wait.parity.shared.b64": "mbarrier_wait",
    "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes": "tensor_load",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes": "tensor_load",
}
PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
_LOADS = {
    "ld.shared.b8": ("shared", "H", 1), "ld.shared.b32": ("shared", "U", 4), "ld.shared.s32": ("shared", "S", 4),
    "ld.shared.v2.b32": ("shared", "U", 4), "ld.shared.v4.b32": ("shared", "U", 4), "ld.global.b32": ("global", "U", 4),
    "ld.global.v2.b32": ("global", "U", 4), "ld.global.v4.b32": ("global", "U", 4),
    "ld.acquire.gpu.global.u32": ("counter", "U", 4),
}  # fmt: skip
ATOMIC_ADD, ADD_ALONE = "atom.global.gpu.relaxed.add.v2.f32", "red.global.gpu.relaxed.add.v2.f32"
_STORES = {
    "st.shared.b32": "shared_store", "st.shared.v2.b32": "shared_store", "st.shared.v4.b32": "shared_store",
    "st.global.b32": "global_store", "st.global.v2.b32": "global_store", "st.global.v4.b32": "global_store",
    "red.relaxed.gpu.global.add.v4.f32": "global_add", ADD_ALONE: "global_add_alone",
    "red.relaxed.gpu.global.add.u32": "counter_add",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16": "shared_store_matrix",
}  # fmt: skip


def key(register: Register) -> int:
    return register.index * 4 + "phrd".index(register.file)


@dataclass
class Step:
    """``kind``: straight, branch, table, special, product or ret. ``reads`` and ``writes`` are keys of registers."""

    kind: str
    first: int  # instruction
    instructions: list[Instruction]
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    computed: frozenset[int] = frozenset()  # of ``writes``, what is more than a copy of another register
    targets: tuple[int, ...] = ()
    run: Callable[..., None] | None = None
    method: str = ""
    classes: Counter[str] = field(default_factory=Counter)

    @property
    def instruction(self) -> Instruction:
        return self.instructions[0]


@dataclass
class Translated:
    entry: Entry
    steps: list[Step]


def registers(operand: Operand | None) -> Iterator[Register]:
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector):
        for part in operand.parts:
            yield from registers(part)
    elif isinstance(operand, Pair):
        yield from registers(operand.first)
        yield from registers(operand.second)
    elif isinstance(operand, Address):
        yield from registers(operand.base)
        yield from registers(operand.coordinates)


def uses(instruction: Instruction) -> tuple[set[int], set[int]]:
    """(keys read, keys written). What a guard may keep from being written counts as read too."""
    opcode, operands = instruction.opcode, instruction.operands
    writes: set[int] = set()
    reads = {key(r) for r in registers(instruction.guard)}
    has_result = opcode in ALU or opcode in _LOADS or opcode.split(".")[0] in ("shfl", "elect", "mov", "ld")
    for n, operand in enumerate(operands):
        found = {key(r) for r in registers(operand)}
        if n == 0 and (has_result or "try_wait" in opcode):
            writes |= found
            if instruction.guard is not None:
                reads |= found
        elif n == 0 and PRODUCT.fullmatch(opcode):
            writes |= found
            if operands[3] != Immediate(0):
                reads |= found
        else:
            reads |= found
    return reads, writes


def classify(opcode: str) -> str:
    """The class under which an instruction is counted."""
    head = opcode.split(".")[0]
    for prefix, name in (
        ("wgmma.mma", "wgmma"), ("ld.global", "global load"), ("st.global", "global store"), ("red.", "global add"),
        ("ld.shared", "shared load"), ("st.shared", "shared store"), ("stmatrix", "shared store"),
        ("ex2", "special"), ("div.full", "special"),
        ("shfl", "shuffle"), ("mbarrier", "barrier"), ("bar", "barrier"), ("fence", "barrier"), ("wgmma", "barrier"),
        ("cp.async", "copy"), ("elect", "barrier"), ("setmaxnreg", "barrier"), ("br", "branch"), ("ret", "branch"),
        ("selp", "select"), ("setp", "compare"), ("mov", "move"), ("cvt", "convert"),
    ):  # fmt: skip
        if opcode.startswith(prefix):
            return name
    return "float" if opcode.endswith("f32") else "integer" if head in ("add", "sub", "mul", "mad") else "logic"


def without_results(instructions: list[Instruction]) -> list[Instruction]:
    """Atomic adds whose old value nobody reads as reductions, which is what ptxas makes of them."""
    read = {k for x in instructions for k in uses(x if x.opcode != ATOMIC_ADD else _reduction(x))[0]}
    made = []
    for x in instructions:
        if x.opcode == ATOMIC_ADD:
            if any(key(r) in read for r in registers(x.operands[0])):
                raise PtxError(f"{x}: the old value of an atomic add is read")
            x = _reduction(x)
        made.append(x)
    return made


def _reduction(x: Instruction) -> Instruction:
    return replace(x, opcode=ADD_ALONE, operands=x.operands[1:])


def translate(entry: Entry) -> Translated:
    """The steps of an entry; PtxError for an opcode, form or order that is not known."""
    entry = replace(entry, instructions=without_results(entry.instructions))
    leaders = {entry.labels[label] for label in _branched(entry)}
    steps: list[Step] = []
    begins: dict[int, int] = {}
    for n, instruction in enumerate(entry.instructions):
        if n in leaders or not steps or steps[-1].kind != "straight":
            begins[n] = len(steps)
            steps.append(Step("straight", n, []))
        kind = _kind(instruction)
        if kind != "straight" and steps[-1].instructions:
            begins[n] = len(steps)
            steps.append(Step(kind, n, []))
        steps[-1].kind = kind
        steps[-1].instructions.append(instruction)
    for step in steps:
        _complete(entry, step, begins)
    _generate(entry, steps)
    _check_written(entry, steps)
    return Translated(entry, steps)


def _targets(entry: Entry, instruction: Instruction) -> list[str]:
    """The labels that a branch names."""
    target = instruction.operands[-1]
    if isinstance(target, Symbol):
        names = entry.tables.get(target.name, []) if instruction.opcode == "brx.idx" else [target.name]
        if names and all(name in entry.labels for name in names):
            return names
    raise PtxError(f"{instruction} to {target}")


def _branched(entry: Entry) -> set[str]:
    return {name for x in entry.instructions if _kind(x) in ("branch", "table") for name in _targets(entry, x)}


def _kind(instruction: Instruction) -> str:
    if instruction.opcode in ("bra", "bra.uni"):
        return "branch"
    if instruction.opcode == "brx.idx" and instruction.guard is None:
        return "table"
    if instruction.opcode == "ret":
        return "ret"
    if instruction.opcode in SPECIAL:
        return "special"
    return "product" if PRODUCT.fullmatch(instruction.opcode) else "straight"


def _complete(entry: Entry, step: Step, begins: dict[int, int]) -> None:
    reads: set[int] = set()
    writes: set[int] = set()
    computed: set[int] = set()
    for instruction in step.instructions:
        read, written = uses(instruction)
        reads |= read
        writes |= written
        if instruction.opcode not in ("mov.b32", "mov.u32"):
            computed |= written
        step.classes[classify(instruction.opcode)] += 1
    step.reads, step.writes, step.computed = frozenset(reads), frozenset(writes), frozenset(computed)
    if step.kind in ("branch", "table"):
        step.targets = tuple(begins[entry.labels[name]] for name in _targets(entry, step.instruction))
    elif step.kind == "special":
        step.method = SPECIAL[step.instruction.opcode]
    elif step.kind == "product":
        step.method = "wgmma_product"


def _generate(entry: Entry, steps: list[Step]) -> None:
    code = Code(entry)
    for n, step in enumerate(steps):
        if step.kind == "straight":
            code.function(n, step.instructions)
    space = code.constants
    exec(compile("\n".join(code.text), f"<{entry.name}>", "exec"), space)
    for n, step in enumerate(steps):
        if step.kind == "straight":
            step.run = space[f"step_{n}"]  # type: ignore[assignment]


class Code(Lines):
    """Straight instructions: those between registers by the table, those on memory and across lanes by calls of the machine."""

    def __init__(self, entry: Entry):
        super().__init__()
        self.entry = entry
        self.text: list[str] = []
        self.parameters = {p.name: p for p in entry.parameters}

    def function(self, n: int, instructions: list[Instruction]) -> None:
        self.lines = []
        for instruction in instructions:
            try:
                self.instruction(instruction)
            except PtxError as error:
                raise PtxError(f"{instruction}: {error}") from error
        self.text.append(f"def step_{n}(v, m, M):\n U=v.U; I=v.I; F=v.F; Q=v.Q; S=v.S; H=v.H; P=v.P")
        self.text += [f" {line}" for line in self.lines]

    def instruction(self, x: Instruction) -> None:
        opcode, operands = x.opcode, x.operands
        if opcode in ("mov.b32", "mov.b64", "mov.u32") and not isinstance(operands[1], (Register, Immediate)):
            self._move(x)
        elif opcode == "mov.b32" and isinstance(operands[0], Vector):
            low, high = (self.row(part, "H") for part in operands[0].parts)
            source = self.row(operands[1], "U")
            self.lines += [
                f"np.copyto({low}, {source}, casting='unsafe')",
                f"np.copyto({high}, {source} >> 16, casting='unsafe')",
            ]
        elif opcode in ALU:
            self.alu(x)
        elif opcode in ("ld.param.b32", "ld.param.b64"):
            self._parameter(x)
        elif opcode in _LOADS:
            space, letter, width = _LOADS[opcode]
            if width == 1 and isinstance(operands[0], Register) and operands[0].file == "r":
                letter = "U"
            rows = self._rows(operands[0], letter)
            self.lines.append(f"M.{space}_load(v, {self._active(x)}, {self._address(operands[1])}, [{rows}], {width}, {x.line})")
        elif opcode in _STORES:
            rows = self._rows(operands[1], "F" if opcode.endswith("f32") else "U")
            method = _STORES[opcode]
            self.lines.append(f"M.{method}(v, {self._active(x)}, {self._address(operands[0])}, [{rows}], {x.line})")
        elif opcode in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32") and x.guard is None:
            *rows, lanes, bound, members = operands
            if bound != Immediate(31) or members != Immediate(-1) or not isinstance(lanes, Immediate):
                raise PtxError("a shuffle of a part of the warp")
            to, source = (self.row(row, "U") for row in rows)
            self.lines.append(f"M.shuffle(v, m, {to}, {source}, {opcode.split('.')[2]!r}, {lanes.value})")
        elif opcode == "prefetch.global.L2":
            self.lines.append(f"M.prefetch(v, {self._active(x)}, {self._address(operands[0])}, {x.line})")
        elif opcode == "fence.acq_rel.gpu" and not operands:
            self.lines.append("pass")  # programs see each other's memory in the order in which they run
        elif opcode == "elect.sync" and isinstance(operands[0], Pair) and operands[1] == Immediate(-1) and x.guard is None:
            lane, chosen = self.row(operands[0].first, "U"), self.row(operands[0].second, "P")
            self.lines.append(f"M.elect(v, m, {lane}, {chosen})")
        else:
            raise PtxError("not known in this form")

    def _active(self, x: Instruction) -> str:
        if x.guard is None:
            return "m"
        return f"M.active(m, {'~' if x.negated else ''}{self.row(x.guard, 'P')})"

    def _rows(self, operand: Operand, letter: str) -> str:
        parts = operand.parts if isinstance(operand, Vector) else (operand,)
        return ", ".join(self.row(part, letter) for part in parts)

    def _address(self, operand: Operand) -> str:
        if not isinstance(operand, Address) or operand.coordinates is not None:
            raise PtxError(f"{operand} where an address is expected")
        if operand.base == Symbol("global_smem"):
            return f"M.everywhere(v, {SHARED_BASE + operand.offset})"
        if not isinstance(operand.base, Register):
            raise PtxError(f"{operand} where an address is expected")
        row = self.row(operand.base, "Q" if operand.base.file == "d" else "U")
        return f"{row}.astype(i8) + {operand.offset}"

    def _move(self, x: Instruction) -> None:
        source = x.operands[1]
        if isinstance(source, Vector):
            self.alu(Instruction("pack.b16", (x.operands[0], *source.parts), x.guard, x.negated, x.line))
            return
        if not isinstance(source, Symbol) or x.guard is not None:
            raise PtxError("not known in this form")
        to = self.row(x.operands[0], "Q" if x.opcode == "mov.b64" else "U")
        if source.name == "global_smem" and x.opcode == "mov.b32":
            self.lines.append(f"{to}.fill({SHARED_BASE})")
        elif source.name in self.parameters and x.opcode in ("mov.b64", "mov.b32"):
            place = self.entry.parameters.index(self.parameters[source.name])
            self.lines.append(f"{to}.fill({PARAMETER_BASE + place * 4096})")
        elif source.name.startswith("%") and x.opcode == "mov.u32":
            self.lines.append(f"np.copyto({to}, v.special[{source.name!r}])")
        else:
            raise PtxError(f"moves {source.name}")

    def _parameter(self, x: Instruction) -> None:
        to, source = x.operands
        wide = x.opcode.endswith("64")
        if not isinstance(source, Address) or not isinstance(source.base, Symbol) or source.offset or x.guard is not None:
            raise PtxError("not known in this form")
        kind = self.parameters[source.base.name].type
        if kind not in (("u64",) if wide else ("u32", "f32")):
            raise PtxError(f"reads a parameter of type {kind}")
        self.lines.append(f"{self.row(to, 'Q' if wide else 'U')}.fill(M.parameters[{source.base.name!r}])")


def _check_written(entry: Entry, steps: list[Step]) -> None:
    """On every path each register is written before it is read: what was written on all paths to a step, to a fixed point."""
    everything = (1 << 4 * (max(entry.counts.values()) + 1)) - 1
    before = [everything] * len(steps)
    before[0] = 0
    work = [0]
    written = [sum(1 << k for k in step.writes) for step in steps]
    while work:
        n = work.pop()
        after = before[n] | written[n]
        for follower in successors(steps, n):
            met = before[follower] & after
            if met != before[follower]:
                before[follower] = met
                work.append(follower)
    for n, step in enumerate(steps):
        known = before[n]
        for instruction in step.instructions:
            reads, writes = uses(instruction)
            missing = [k for k in reads if not known >> k & 1]
            if missing and known != everything:
                raise PtxError(
                    f"{instruction} reads {'phrd'[missing[0] % 4]}{missing[0] // 4}, which was not written on every path"
                )
            known |= sum(1 << k for k in writes)


def successors(steps: list[Step], n: int) -> list[int]:
    step = steps[n]
    if step.kind == "ret" and step.instruction.guard is None:
        return []
    if step.kind == "table":
        return list(step.targets)
    if step.kind == "branch":
        return [*step.targets] if step.instruction.guard is None else [*step.targets, n + 1]
    return [n + 1]
