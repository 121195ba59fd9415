"""The language of the Hopper kernels on a CPU: their very source runs here, over :mod:`tests.kernels.gluon_machine`.

:func:`load` executes a kernel module with these names in place of triton's. Layouts are carried for their shapes only (that
they fit is what the compiler checks), inline assembly is replaced by name, and everything else is strict: 32-bit integers
must stay in range, every access to a tensor must lie inside of it, no two warpgroups may write one element of global memory,
copies must be announced with their bytes, and shared memory is watched by the machine.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import distattn.kernels
from tests.kernels.gluon_grid import Grid
from tests.kernels.gluon_machine import Allocation, Barrier, KernelError
from tests.kernels.gluon_values import (
    BF16,
    F16,
    F32,
    I32,
    I64,
    Address,
    Barriers,
    BlockedLayout,
    Descriptor,
    DotOperandLayout,
    Global,
    Launch,
    NVMMADistributedLayout,
    Pointer,
    Shared,
    SliceLayout,
    Value,
    current,
    machine,
    scalar,
)


def _who() -> int:
    me = machine()
    return 1 + me.program * 8 + (me.partitions.index(me.running) if me.running in me.partitions else 7)


def _plain(x: Any) -> Any:
    return x.x if isinstance(x, Value) else x


def _store(pointer: Pointer, value: Value, mask: Value | None = None) -> None:
    places, x = torch.broadcast_tensors(pointer.offset, value.x)
    if mask is not None:
        keep = mask.x.expand(places.shape)
        places, x = places[keep], x[keep]
    places = places.reshape(-1)
    pointer.memory.check(places, "a store")
    if value.dtype != pointer.memory.flat.dtype:
        raise KernelError(f"{value.dtype} is stored to {pointer.memory.flat.dtype}")
    current[1].write(pointer.memory, places, _who())
    pointer.memory.flat[places] = x.reshape(-1)


def _load(pointer: Pointer, mask: Value | None = None, other: float = 0.0) -> Any:
    offset = pointer.offset
    if isinstance(offset, int):
        places = torch.tensor([int(offset)])
        pointer.memory.check(places, "a load")
        return scalar(int(pointer.memory.flat[int(offset)]))
    keep = torch.ones(offset.shape, dtype=torch.bool) if mask is None else mask.x.expand(offset.shape)
    pointer.memory.check(offset[keep], "a load")
    current[1].read(pointer.memory, offset[keep], _who())
    made = torch.full(offset.shape, other, dtype=pointer.memory.flat.dtype)
    made[keep] = pointer.memory.flat[offset[keep]]
    return Value(made)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Value):
        return a if condition else b
    layout = next((x.layout for x in (a, b, condition) if isinstance(x, Value)), None)
    a, b = _plain(a), _plain(b)
    for x in (condition.x, a, b):
        if isinstance(x, torch.Tensor) and len(x.shape) != len(condition.shape):
            raise KernelError("ranks differ in where")
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        a = torch.tensor(a)
    return Value(torch.where(condition.x, a, b), layout)


def _extremum(pick: Callable[..., Any], tensors: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Any]:
    def extremum(a: Any, b: Any) -> Any:
        if isinstance(a, Value) or isinstance(b, Value):
            first, second = (a, b) if isinstance(a, Value) else (b, a)
            other = _plain(second)
            other = other if isinstance(other, torch.Tensor) else torch.tensor(other, dtype=first.dtype)
            if isinstance(second, Value) and first.shape != second.shape:
                raise KernelError("shapes differ in an extremum")
            return Value(tensors(first.x, other), first.layout)
        return scalar(pick(int(a), int(b)))

    return extremum


def add_to_scratch(x: Value, address: Address) -> None:
    """In place of the inline assembly of that name: instruction j of a thread adds 4 floats at its address + 2048 j."""
    assert list(x.shape) == [64, 64] and x.layout.instr_shape[1] == 64
    r, c = torch.arange(64)[:, None], torch.arange(64)[None]
    places = address.offset + 2048 * (c // 8) + 4 * (r // 8 % 2 * 2 + c % 2)
    assert not bool((places % 4).any()) and not bool((address.offset % 16).any())
    places = (places // 4 + address.pointer.offset).reshape(-1)
    memory = address.pointer.memory
    memory.check(places, "an atomic add")
    assert len(places.unique()) == 4096
    current[0].add_sums(memory.flat, places, x.x.reshape(-1))


def _assembly(text: str, constraints: str, arguments: list[Any], **options: Any) -> Any:
    """The inline assembly of :mod:`distattn.kernels.gluon_turns`: a copy, a count (fenced?), a wait (acquiring?)."""
    if text == "mov.b32 $0, $1;":
        return arguments[0]
    pointer = arguments[0]
    pointer.memory.check(torch.tensor([int(pointer.offset)]), "a counter")
    counter = current[0].counter(pointer.memory.flat, int(pointer.offset))
    if "red.relaxed.gpu.global.add.u32" in text:
        current[0].count(counter, "fence.acq_rel.gpu; red" in text)
    elif ".global.u32 v, [$1]; setp.lt.u32 p, v, $2" in text:
        current[0].await_rank(counter, int(arguments[1]), "ld.acquire.gpu" in text)
    else:
        raise KernelError(f"unknown assembly: {text}")
    return None


def prefetch_tile(X: Pointer, token: int, start: int, stop: int, ROWS: int, WIDTH: int) -> None:
    """In place of the inline assembly of that name: what is asked for must be there."""
    for row in (start, min(start + ROWS, int(stop)) - 1):
        X.memory.check(torch.arange(WIDTH) + int(X.offset) + int(row) * int(token), "a prefetch")


def _atomic_add(pointer: Pointer, value: Value, mask: Value, sem: str) -> None:
    """Whoever adds must be the only one, so that the order of sums is fixed."""
    if value.dtype != pointer.memory.flat.dtype or sem != "relaxed":
        raise KernelError(f"{value.dtype} is added to {pointer.memory.flat.dtype}, {sem}")
    keep = mask.x.expand(pointer.offset.shape)
    places = pointer.offset[keep]
    pointer.memory.check(places, "an atomic add")
    current[1].write(pointer.memory, places, _who())
    pointer.memory.flat[places] += value.x[keep]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    size = math.prod(shape)
    return Shared(machine().allocate("buffer", size, dtype), 0, list(shape), layout)


def _specialize(tasks: list[Any], warps: list[int], registers: list[int]) -> None:
    if not (len(tasks) == len(warps) + 1 == len(registers) + 1):
        raise KernelError(f"{len(tasks)} partitions, {len(warps)} numbers of warps, {len(registers)} of registers")
    machine().specialize([(function.function, arguments) for function, arguments in tasks])


def _operand(x: Any) -> tuple[torch.Tensor, list[tuple[Allocation, int, int]]]:
    if isinstance(x, Value):
        if not isinstance(x.layout, DotOperandLayout):
            raise KernelError("an operand in registers has no operand layout")
        return x.x, []
    return x.contents(), [(x.place, x.start, x.stop)]


def _product(a: Any, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    """Computes at once from what is there: who could still change it is caught by the machine."""
    (left, reads), (right, more) = _operand(a), _operand(b)
    if left.dtype != right.dtype or left.dtype not in (BF16, F16):
        raise KernelError(f"a product of {left.dtype} and {right.dtype}")
    m, n = acc.shape
    if left.shape != (m, right.shape[0]) or right.shape[1] != n or m != 64 or acc.layout.instr_shape[1] != n:
        raise KernelError(f"a product of {list(left.shape)} and {list(right.shape)} into {[m, n]}, {acc.layout}")
    me = machine()
    if acc.pending and not any(acc is other for other in me.running.products):
        raise KernelError("a product goes on from one of another warpgroup")
    x = left.float() @ right.float()
    made = Value(acc._x + x if use_acc else x, acc.layout, pending=True)
    me.issue_product(reads + more, made)
    if not is_async:
        me.await_products(0)
    return made


def _await(outstanding: int, deps: list[Value]) -> Any:
    machine().await_products(outstanding)
    return deps[0] if len(deps) == 1 else tuple(deps)


def _copy_in(source: Descriptor, at: list[int], barrier: Barrier, target: Shared) -> None:
    if target.shape != source.block_shape or target.dtype != source.dtype:
        raise KernelError(f"a box of {source.block_shape} goes to a buffer of {target.shape}")
    if abs(int(at[-1])) * source.dtype.itemsize % 16:
        raise KernelError(f"the box begins at {at}: not a multiple of 16 bytes")
    places, inside = source.box(at)
    source.memory.check(places[inside], "a copy")
    x = torch.zeros(source.block_shape, dtype=source.dtype)
    x[inside] = source.memory.flat[places[inside]]
    machine().issue_copy(target.place, target.start, target.stop, barrier, source.block_bytes, lambda: target.fill(x))


def _copy_out(target: Descriptor, at: list[int], source: Shared) -> None:
    if source.shape != target.block_shape:
        raise KernelError(f"a buffer of {source.shape} goes to a box of {target.block_shape}")
    machine().issue_store(source.place, source.start, source.stop)
    places, inside = target.box(at)
    target.memory.check(places[inside], "a copy")
    current[1].write(target.memory, places[inside], _who())
    target.memory.flat[places[inside]] = source.contents()[inside]


class Kernel:
    """A function of the language: called inside of kernels, launched over a grid from outside."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.seed = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(
            *arguments: Any, num_warps: int, maxnreg: int | None = None, enable_fp_fusion: bool = False, **named: Any
        ) -> None:
            inside = [_argument(x) for x in arguments]
            ordered = bool(named.get("ORDERED"))
            resident = 1 + self.seed % 5 if named.get("FUSED") else 1
            made = Grid(grid[0], resident, self.seed * 1000, ordered, lambda machine: self.function(*inside, **named))
            current[:] = [made, Launch()]
            made.run()
            current[:] = [None, None]

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(Global(x), x.storage_offset())
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return scalar(x) if isinstance(x, int) and not isinstance(x, bool) else x


def _jit(function: Any = None, **options: Any) -> Any:
    return Kernel(function) if function is not None else Kernel


language = SimpleNamespace(
    constexpr=lambda x: x,
    float32=F32, bfloat16=BF16, float16=F16, int32=I32, int64=I64,
    NVMMADistributedLayout=NVMMADistributedLayout,
    DotOperandLayout=DotOperandLayout, SliceLayout=SliceLayout,
    BlockedLayout=BlockedLayout,
    arange=lambda start, stop, layout: Value(torch.arange(start, stop), layout),
    full=lambda shape, value, dtype, layout: Value(torch.full(shape, value, dtype=I64 if dtype == I32 else dtype), layout),
    expand_dims=lambda x, dim: Value(x.x.unsqueeze(dim), x.layout),
    broadcast=lambda a, b: tuple(Value(x, a.layout) for x in torch.broadcast_tensors(a.x, b.x)),
    reshape=lambda x, shape: Value(x.x.reshape(shape)),
    convert_layout=lambda x, layout: Value(x.x, layout),
    sum=lambda x, dim: Value(x.x.sum(dim)) if len(x.shape) > 1 else scalar(int(x.x.sum())),
    max=lambda x, dim: Value(x.x.amax(dim)),
    exp2=lambda x: Value(torch.exp2(x.x), x.layout),
    log2=lambda x: Value(torch.log2(x.x), x.layout),
    maximum=_extremum(max, torch.maximum), minimum=_extremum(min, torch.minimum),
    where=_where, load=_load, store=_store, atomic_add=_atomic_add,
    static_range=range,
    program_id=lambda axis: scalar(machine().program),
    num_programs=lambda axis: scalar(current[0].size),
    allocate_shared_memory=_allocate, shared_memory_descriptor=Shared, warp_specialize=_specialize,
    barrier=lambda: machine().running.barrier(),
    inline_asm_elementwise=_assembly,
    SwizzledSharedLayout=lambda *arguments: "swizzled",
)  # fmt: skip
mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=lambda barrier, count: barrier.init(count),
    wait=lambda barrier, phase: barrier.wait(int(phase)),
    arrive=lambda barrier, count=1: barrier.arrive(count),
    expect=lambda barrier, n_bytes: barrier.expect(n_bytes),
)
tma = SimpleNamespace(
    async_load=_copy_in,
    async_store=_copy_out,
    store_wait=lambda outstanding: machine().await_stores(outstanding),
)
hopper = SimpleNamespace(
    fence_async_shared=lambda: machine().running.fence(),
    mbarrier=mbarrier, tma=tma, warpgroup_mma=_product, warpgroup_mma_wait=_await,
)  # fmt: skip

SHIMS: dict[str, Any] = {
    "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=_jit)),
    "triton.experimental.gluon": SimpleNamespace(language=language),
    "triton.experimental.gluon.language.nvidia.hopper": hopper,
}


def load(name: str, replace: dict[str, Callable[[str], str]] | None = None) -> ModuleType:
    """The kernel module ``distattn.kernels.<name>``, executed over the emulated language.

    Args:
        replace: by module name, what to do to its source first: for mutants.
    """
    folder = Path(distattn.kernels.__file__).parent
    loaded: dict[str, ModuleType] = {}

    def find(module: str, *arguments: Any) -> Any:
        if module in SHIMS:
            return SHIMS[module]
        short = module.removeprefix("distattn.kernels.")
        if short.startswith("gluon_"):
            return execute(short)
        return builtins.__import__(module, *arguments)

    def execute(short: str) -> ModuleType:
        if short not in loaded:
            made = loaded[short] = ModuleType(f"emulated_{short}")
            source = (folder / f"{short}.py").read_text()
            if replace and short in replace:
                changed = replace[short](source)
                assert changed != source, "the mutant is the original"
                source = changed
            made.__dict__["__builtins__"] = {**vars(builtins), "__import__": find}
            exec(compile(source, str(folder / f"{short}.py"), "exec"), made.__dict__)
            for function in (add_to_scratch, prefetch_tile):  # what the source says in assembly
                if function.__name__ in made.__dict__:
                    made.__dict__[function.__name__] = function
        return loaded[short]

    return execute(name)
