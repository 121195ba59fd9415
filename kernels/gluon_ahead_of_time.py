"""Compiles the Hopper kernels for a GPU that is not there: exactly the launches that the backend would make.

The backend runs on small CPU tensors of the usual strides with kernels that only write down how they were launched. Types,
constants and divisibility then follow from the arguments by the rules of triton's JIT.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_source
from triton.experimental.gluon._runtime import GluonASTSource

from distattn.kernels.ahead_of_time import SHARED_LIMIT, assemble
from distattn.kernels.bands import Band, Bands
from distattn.kernels.contract import Scores, empty_state
from distattn.kernels.gluon_backend import GluonBackend, kernel
from distattn.kernels.gluon_division import Costs
from distattn.kernels.gluon_launch import ADD, FORWARD, FUSED, KEYS, MERGE, ORDERED, QUERIES, SCRATCH
from distattn.kernels.gluon_plans import Shape
from distattn.kernels.machine_code import Flow, disassemble
from distattn.kernels.machine_cost import Cost, Tile, cost_of, spills_in_loops

TARGET = GPUTarget("cuda", 90, 32)
KINDS = (FORWARD, KEYS, QUERIES, FUSED, ORDERED, SCRATCH, MERGE, ADD)
WITHOUT_PRODUCTS = (SCRATCH, MERGE, ADD)
ALWAYS = Costs(write=0.0, merge=0.0, least=1, gain=0.0)  # cuts whatever can be cut
CALLS = ("out", "fresh", "state", "last")  # of the forward: what starts and ends in what
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One variant of one kernel. ``call`` (forward and merge only): "out" writes 16 bits at once, "fresh" a float32 state,
    "state" goes on from one, "last" goes on and writes 16 bits. ``pieces``: the variant that may leave pieces of items. Of
    the two kernels that add pieces up, "out" is that of dk and dv, "last" that of dq."""

    kind: str
    d: int
    d_v: int
    call: str = "out"
    softcap: bool = False
    dtype: str = "bf16"
    group: int = 4
    pieces: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case. Bytes (``spills`` a thread) and counts of instructions.

    ``pairs`` of float32 numbers (or fours) move between registers and memory in one instruction: how often. ``cost`` of a tile
    in its loops; None where it has none.
    """

    case: Case
    seconds: float
    warps: int
    registers: int
    spills: int
    spills_in_loops: int
    shared: int
    wgmma: int
    setmaxnreg: int
    serialized: bool
    pairs: int
    cost: Cost | None = None

    @property
    def violations(self) -> list[str]:
        """What a release must not ship; empty when all is well."""
        found = []
        if self.spills_in_loops:
            found.append(f"{self.spills_in_loops} instructions of its loops move spilled registers")
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_LIMIT["sm_90"]:
            found.append(f"{self.shared} bytes of shared memory, sm_90 has {SHARED_LIMIT['sm_90']}")
        if not self.pairs and not (self.case.kind == FORWARD and self.case.call == "out"):
            found.append("the float32 numbers of its tiles move one by one")
        if self.case.kind in WITHOUT_PRODUCTS:
            return found
        if self.serialized:
            found.append("its wgmma run one by one")
        if not self.wgmma:
            found.append("no wgmma")
        if self.warps not in (12, 16):
            found.append(f"{self.warps} warps: the partitions were lost")
        if not self.setmaxnreg:
            found.append("no setmaxnreg")
        return found


@dataclass(frozen=True)
class Launched:
    """The arguments of one launch."""

    kind: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Recorder(GluonBackend):
    """The backend without a device: ``launched`` grows by one a launch. ``rows`` changes fields of the launch rows by kind;
    ``pieces`` cuts whatever can be cut."""

    def __init__(self, kind: str = KEYS, rows: dict[str, dict[str, Any]] | None = None, pieces: bool = False):
        super().__init__(kind not in (FUSED, SCRATCH), kind == ORDERED)
        self.rows, self.pieces = rows or {}, pieces
        self.launched: list[Launched] = []

    def _reject_device(self, device: torch.device) -> str | None:
        return None

    def _processors(self, device: torch.device) -> int:
        return 132

    def _costs(self, kind: str, row: Any, shape: Shape) -> Costs | None:
        return ALWAYS if self.pieces else None

    def _row(self, kind: str, d: int, d_v: int, softcap: float = 0.0) -> Any:
        return super()._row(kind, d, d_v, softcap)._replace(**self.rows.get(kind, {}))

    def _kernel(self, kind: str) -> Any:
        recorder = self

        class Place:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *arguments, **named: recorder.launched.append(Launched(kind, arguments, named))

        return Place()


def record(case: Case, rows: dict[str, Any] | None = None) -> Launched:
    """How the backend launches ``case``, with 32 query heads over 32 // group key heads."""
    recorder = Recorder(case.kind, {case.kind: rows or {}}, case.pieces or case.kind in (MERGE, ADD))
    dtype, heads, length = DTYPES[case.dtype], 32, 256
    q, k, v, dout = (
        torch.zeros(length, n, size, dtype=dtype)
        for n, size in ((heads, case.d), (heads // case.group, case.d), (heads // case.group, case.d_v), (heads, case.d_v))
    )
    bands, scores = Bands([Band(0, length, 0, length)]), Scores(case.d**-0.5, 30.0 * case.softcap)
    if case.kind in (FORWARD, MERGE):
        state = empty_state(q, case.d_v) if case.call in ("state", "last") else None
        recorder.forward(q, k, v, bands, scores, state, torch.empty_like(dout) if case.call in ("out", "last") else None)
    else:
        lse = torch.zeros(length, heads)
        sums = [torch.zeros(x.shape) for x in (q, k, v)]
        recorder.backward(dout, q, k, v, lse, lse, bands, scores, *sums)
    found = [launched for launched in recorder.launched if launched.kind == case.kind]
    return found[-1 if case.call == "last" else 0]


def _source(launched: Launched) -> GluonASTSource:
    """The source with the signature that triton's JIT would give it."""
    function = kernel(launched.kind)
    constants = {name: value for name, value in launched.named.items() if name in function.arg_names}
    signature: dict[str, str] = {name: "constexpr" for name in constants}
    attributes = {}
    unspecialized = set(function.do_not_specialize or ())
    annotated = {parameter.name for parameter in function.params if parameter.is_constexpr}
    for place, (name, x) in enumerate(zip(function.arg_names, launched.arguments, strict=False)):
        aligned = False
        if x is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(x, torch.Tensor):
            signature[name], aligned = f"*{TYPES[x.dtype]}", True  # allocations on a GPU begin at multiples of 256 bytes
        elif isinstance(x, float):
            signature[name] = "fp32"
        elif isinstance(x, int):
            if name in annotated or x == 1 and name not in unspecialized:
                signature[name], constants[name] = "constexpr", x
                continue
            signature[name], aligned = "i32", x % 16 == 0 and name not in unspecialized
        else:
            signature[name] = f"tensordesc<{TYPES[x.base.dtype]}[{', '.join(map(str, x.block_shape))}],{x.layout!r}>"
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in function.arg_names}
    return GluonASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)


def tile(case: Case, named: dict[str, Any]) -> Tile:
    """What all consumers together do in one pass through their loops, in the constants of the launch."""
    d, d_v = case.d, case.d_v
    if case.kind in (KEYS, FUSED, ORDERED):
        streamed, row_bytes, stationary = named["BLOCK_Q"], 2 * (d + d_v) + 8, 64 * named["KEY_TILES"]
    else:
        streamed, row_bytes, stationary = named["BLOCK_K"], 2 * (d + d_v), 64 * named.get("CONSUMERS", 2)
    kind = FUSED if case.kind == ORDERED else case.kind
    products = {FORWARD: d + d_v, KEYS: 2 * d + 2 * d_v, QUERIES: 2 * d + d_v, FUSED: 3 * d + 2 * d_v}
    return Tile(stationary * streamed, 2 * products[kind], streamed * row_bytes)


def compile_case(case: Case, rows: dict[str, Any] | None = None) -> Compiled:
    """Compiles ``case`` for sm_90 (5 to 20 seconds), with ``rows`` in place of fields of its launch row."""
    launched = record(case, rows)
    options = {name: launched.named[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion") if name in launched.named}
    began = time.perf_counter()
    made = compile_source(_source(launched), target=TARGET, options=options)
    seconds = time.perf_counter() - began
    ptx = made.asm["ptx"]
    registers, spills, said = assemble(ptx, TARGET.arch)
    serialized = re.search(r"wgmma.*serializ", said) is not None
    flow = Flow(disassemble(made.asm["cubin"]))
    cost = None if case.kind in WITHOUT_PRODUCTS else cost_of(flow, tile(case, launched.named))
    return Compiled(
        case, seconds, made.metadata.num_warps, registers, spills, spills_in_loops(flow), made.metadata.shared,
        ptx.count("wgmma.mma_async"), ptx.count("setmaxnreg"), serialized, len(re.findall(r"global\S*\.v[24]\.", ptx)), cost,
    )  # fmt: skip


def version() -> str:
    """Of the compiler."""
    return triton.__version__


def all_cases() -> list[Case]:
    """Every kernel at every head size it takes, every kind of call, with and without a softcap."""
    from distattn.kernels.gluon_launch import ROWS

    fused = (FUSED, ORDERED, SCRATCH)
    sizes = {kind: list(ROWS[FUSED if kind in fused else FORWARD]) for kind in KINDS}
    found: list[Case] = []
    for pieces, softcap in product((False, True), repeat=2):
        found += (Case(FORWARD, *size, call, softcap, pieces=pieces) for size in sizes[FORWARD] for call in CALLS)
        found += (Case(kind, *size, softcap=softcap, pieces=pieces) for kind in (KEYS, QUERIES) for size in sizes[kind])
    found += (Case(kind, *size) for kind in fused for size in sizes[kind])
    found += (Case(MERGE, *size, call) for size in sizes[MERGE] for call in CALLS)
    return found + [Case(ADD, *size, call) for size in sizes[ADD] for call in ("out", "last")]
