"""Compiles the portable Triton kernels for a GPU that is not there, and reads what the compiler made of them.

Registers and spills come from ``ptxas -v`` on the PTX (metadata does not tell), matrix instructions and TF32 from the PTX
text, AMD figures from the assembly. Nothing here runs a kernel. Needs triton as a compiler: not in its interpreter.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch.torch_version import TorchVersion
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source
from triton.runtime import JITFunction

from distattn.kernels.machine_code import tools
from distattn.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel
from distattn.kernels.triton_forward import forward_kernel
from distattn.kernels.triton_launch import FORWARD, KEYS, QUERIES, Launch, architecture_class, launch_parameters, padded

KERNELS = {FORWARD: forward_kernel, KEYS: key_gradient_kernel, QUERIES: query_gradient_kernel}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# All tiles large enough for wgmma spill here (40 bytes at best): dk and dv of 64 keys alone take half the registers.
WITHOUT_WGMMA = {(KEYS, 512)}
IN_INPUT_DTYPE = ("Q", "K", "V", "DOUT")
CONTIGUOUS = ("lse_head", "delta_head", "lse_in_head")  # 1 for [T, H] statistics, which the JIT makes a constant


@dataclass(frozen=True)
class Case:
    """One variant of one kernel."""

    kind: str
    target: str
    dtype: str
    d: int
    d_v: int
    softcap: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case. Bytes for ``spills`` and ``shared``; counts of instructions for the others."""

    case: Case
    launch: Launch
    seconds: float
    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    tf32: bool
    serialized: bool

    @property
    def violations(self) -> list[str]:
        """What a release must not ship; empty when all is well."""
        found, target = [], self.case.target
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_LIMIT[target]:
            found.append(f"{self.shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}")
        size = padded(self.case.d) + padded(self.case.d_v)
        if target == "sm_90" and DTYPES[self.case.dtype] == 2 and not self.wgmma and (self.case.kind, size) not in WITHOUT_WGMMA:
            found.append("no wgmma")
        if self.case.dtype == "fp32" and self.tf32:
            found.append("a float32 product runs in TF32")
        return found


def table_launch(case: Case) -> Launch:
    """The row of :mod:`distattn.kernels.triton_launch` that a run on this target would use."""
    target = TARGETS[case.target]
    capability = target.arch if target.backend == "cuda" else 0
    architecture = architecture_class(target.backend, capability)
    return launch_parameters(architecture, case.kind, padded(case.d), padded(case.d_v), DTYPES[case.dtype])


def _source(kernel: JITFunction, case: Case, launch: Launch) -> ASTSource:
    """The kernel with the types, constants and divisibility that the JIT would infer for aligned tensors."""
    constants: dict[str, Any] = dict(
        D=case.d, D_V=case.d_v, BLOCK_Q=launch.block_q, BLOCK_K=launch.block_k, BLOCK_D=padded(case.d), BLOCK_DV=padded(case.d_v),
        SOFTCAP=case.softcap, UPCAST=False, STATE=True, ALL_ROWS=False,
    )  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants |= dict.fromkeys((name for name in CONTIGUOUS if name in kernel.arg_names), 1)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("TILES", "PTR", "ENTRIES"):
            signature[name] = "*i32"
        elif name.isupper():
            signature[name] = f"*{case.dtype if name in IN_INPUT_DTYPE else 'fp32'}"
        else:
            signature[name] = "fp32" if name in ("inner", "outer", "scale") else "i32"
        if name.isupper() or name.endswith(("_token", "_head")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    attributes = {place: value for place, value in attributes.items() if kernel.arg_names[place[0]] not in constants}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor  # triton 3.2 only

    signature = {name: kind for name, kind in signature.items() if name not in constants}
    aligned = AttrsDescriptor.from_hints({place: 16 for (place,) in attributes})
    return ASTSource(fn=kernel, signature=signature, constants=constants, attrs=aligned)


def _figure(pattern: str, text: str) -> int:
    """The number that a tool prints in the first line that matches; ValueError where no line does."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"Expected a line like {pattern!r} from the assembler, found none. This version of triton is not known.")
    return int(found[1])


def assembler(arch: int) -> list[str | Path]:
    """The tool with which triton assembles for ``arch``, and those of its options that change the code."""
    version, newer = TorchVersion(triton.__version__), tools() / "ptxas-blackwell"
    first = 90 if version >= TorchVersion("3.9") else 100
    options = ["--regAllocOptLevel=2"] if version >= TorchVersion("3.7") else []
    tool = newer if arch >= first and newer.exists() else tools() / "ptxas"
    return [tool, *options, f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"]


def assemble(ptx: str, arch: int) -> tuple[int, int, str]:
    """(registers, bytes spilled, all that was said) where PTX is assembled as triton did, which keeps no word of it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [*assembler(arch), "-v", source, "-o", f"{folder}/kernel.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = _figure(r"(\d+) bytes spill stores", done.stderr) + _figure(r"(\d+) bytes spill loads", done.stderr)
    return _figure(r"Used (\d+) registers", done.stderr), spills, done.stderr


def compile_case(case: Case, launch: Launch | None = None, kernel: JITFunction | None = None) -> Compiled:
    """Compiles ``case`` (1 to 10 seconds) with the launch row of the table, or with the one given.

    Raises:
        ValueError: triton runs as an interpreter in this process.
    """
    kernel, launch = kernel or KERNELS[case.kind], launch or table_launch(case)
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            "Compiling needs triton's compiler, found its interpreter. Unset TRITON_INTERPRET before importing triton."
        )
    target, began = TARGETS[case.target], time.perf_counter()
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    made = compile_source(_source(kernel, case, launch), target=target, options=options)
    seconds = time.perf_counter() - began
    if target.backend == "cuda":
        ptx = made.asm["ptx"]
        registers, spills, said = assemble(ptx, target.arch)
        serialized = re.search(r"wgmma.*serializ", said) is not None
        products = [line for line in ptx.splitlines() if "mma" in line]
        wgmma, mma = ptx.count("wgmma.mma_async"), ptx.count("mma.sync.aligned") + ptx.count("tcgen05.mma")
        tf32 = any("tf32" in line for line in products)
    else:
        text = made.asm["amdgcn"]
        registers = _figure(r"\.vgpr_count:\s+(\d+)", text)
        spills = 4 * _figure(r"\.vgpr_spill_count:\s+(\d+)", text)
        serialized, wgmma, mma, tf32 = False, 0, text.count("v_mfma"), "xf32" in text
    return Compiled(case, launch, seconds, registers, spills, made.metadata.shared, wgmma, mma, tf32, serialized)
