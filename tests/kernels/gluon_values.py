"""What the kernels of the emulated language compute with: scalars, tensors, pointers, descriptors, shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tests.kernels.gluon_machine import Allocation, Barrier, KernelError, Machine

INT_32 = 1 << 31
BF16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64


current: list[Any] = [None, None]  # the grid and the launch that run


def machine() -> Machine:
    return current[0].current


class NVMMADistributedLayout(NamedTuple):
    version: list[int]
    warps_per_cta: list[int]
    instr_shape: list[int]


class DotOperandLayout(NamedTuple):
    operand_index: int
    parent: Any
    k_width: int


class BlockedLayout(NamedTuple):
    size_per_thread: list[int]
    threads_per_warp: list[int]
    warps_per_cta: list[int]
    order: list[int]


class SliceLayout(NamedTuple):
    dim: int
    parent: Any


class Scalar(int):
    """An integer of the machine: 32 bits unless widened; division of negative numbers differs from Python's and is refused."""

    wide = False

    def to(self, dtype: torch.dtype) -> Scalar:
        return scalar(int(self), dtype == I64)

    def _with(self, other: Any, operation: Callable[[int, int], int]) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        return scalar(operation(int(self), int(other)), self.wide or getattr(other, "wide", False))

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * b)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Any) -> Any:
        if int(self) < 0 or int(other) <= 0:
            raise KernelError(f"{int(self)} // {int(other)}: rounds towards zero on the machine")
        return self._with(other, lambda a, b: a // b)


def scalar(value: int, wide: bool = False) -> Scalar:
    if not wide and not -INT_32 <= value < INT_32:
        raise KernelError(f"{value} does not fit into 32 bits")
    made = Scalar(value)
    made.wide = wide
    return made


class Value:
    """A tensor in registers."""

    def __init__(self, x: torch.Tensor, layout: Any = None, pending: bool = False):
        self._x, self.layout, self.pending = x, layout, pending
        if x.dtype == I32:
            raise AssertionError("integers are computed in 64 bits and checked for 32")

    @property
    def x(self) -> torch.Tensor:
        if self.pending:
            raise KernelError("a product is used before it was awaited")
        return self._x

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout)

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.x.to(I64 if dtype == I32 else dtype), self.layout)

    def _with(self, other: Any, operation: Callable[..., torch.Tensor]) -> Any:
        if isinstance(other, Address):
            return NotImplemented
        a, b = self.x, other.x if isinstance(other, Value) else other
        if isinstance(other, Value) and len(a.shape) != len(b.shape):
            raise KernelError(f"shapes {list(a.shape)} and {list(b.shape)}: ranks differ")
        if isinstance(b, int):
            b = int(b)
        made = operation(a, b)
        if made.dtype == I64 and made.numel() and int(made.abs().max()) >= INT_32:
            raise KernelError("an integer tensor leaves 32 bits")
        return Value(made, self.layout)

    def __add__(self, other: Any) -> Value:
        return self._with(other, torch.add)

    def __sub__(self, other: Any) -> Value:
        return self._with(other, torch.sub)

    def __rsub__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Value:
        return self._with(other, torch.mul)

    def __truediv__(self, other: Any) -> Value:
        return self._with(other, torch.true_divide)

    def __rtruediv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b / a)

    def __floordiv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: torch.div(a, b, rounding_mode="trunc"))

    def __mod__(self, other: Any) -> Value:
        return self._with(other, torch.fmod)

    def __and__(self, other: Any) -> Value:
        return self._with(other, torch.bitwise_and)

    def __or__(self, other: Any) -> Value:
        return self._with(other, torch.bitwise_or)

    def __lt__(self, other: Any) -> Value:
        return self._with(other, torch.lt)

    def __le__(self, other: Any) -> Value:
        return self._with(other, torch.le)

    def __gt__(self, other: Any) -> Value:
        return self._with(other, torch.gt)

    def __ge__(self, other: Any) -> Value:
        return self._with(other, torch.ge)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self._with(other, torch.eq)

    __radd__, __rmul__, __hash__ = __add__, __mul__, None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise KernelError("a tensor is no condition")


class Global:
    """A tensor in global memory: which elements of its storage it owns, and which warpgroup of which program wrote them."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.owned = torch.zeros(self.flat.shape, dtype=torch.bool)
        self.owned.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[...] = True

    def check(self, places: torch.Tensor, what: str) -> None:
        inside = (places >= 0) & (places < len(self.flat))
        if not bool(inside.all()) or not bool(self.owned[places].all()):
            raise KernelError(f"{what} outside of a tensor of shape {list(self.tensor.shape)}")


class Launch:
    """What the programs of one launch share: who wrote what."""

    def __init__(self) -> None:
        self.writers: dict[int, torch.Tensor] = {}
        self.added: dict[int, torch.Tensor] = {}

    def marks(self, table: dict[int, torch.Tensor], memory: Global) -> torch.Tensor:
        key = memory.flat.untyped_storage().data_ptr()
        if key not in table:
            table[key] = torch.zeros(memory.flat.untyped_storage().nbytes() // memory.flat.element_size(), dtype=I64)
        return table[key]

    def read(self, memory: Global, places: torch.Tensor, who: int) -> None:
        marks = self.marks(self.writers, memory)[places]
        if bool(((marks != 0) & (marks != who)).any()):
            raise KernelError("global memory is read after another warpgroup wrote it in the same launch")

    def write(self, memory: Global, places: torch.Tensor, who: int) -> None:
        marks = self.marks(self.writers, memory)
        if bool(((marks[places] != 0) & (marks[places] != who)).any()):
            raise KernelError("two warpgroups write one element of global memory")
        if len(places.unique()) != len(places):
            raise KernelError("one store writes an element twice")
        marks[places] = who


class Pointer:
    """A place, or a tensor of places, in a tensor of global memory."""

    def __init__(self, memory: Global, offset: Any):
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.flat.dtype)

    def to(self, dtype: torch.dtype) -> Address:
        return Address(self)

    def __add__(self, other: Any) -> Pointer:
        add = other.x if isinstance(other, Value) else int(other)
        return Pointer(self.memory, self.offset + add)


class Address:
    """A pointer as a number of bytes: a place and tensors of bytes to be added."""

    def __init__(self, pointer: Pointer, offset: Any = 0):
        self.pointer, self.offset = pointer, offset

    def __add__(self, other: Any) -> Address:
        return Address(self.pointer, self.offset + (other.x if isinstance(other, Value) else int(other)))

    __radd__ = __add__


class Descriptor:
    """A TMA descriptor: boxes of a strided tensor, zeros outside of it."""

    def __init__(self, host: Any):
        self.dtype, self.layout, self.block_shape = host.base.dtype, host.layout, list(host.block_shape)
        self.memory = Global(host.base)
        self.shape, self.strides = [int(n) for n in host.shape], [int(n) for n in host.strides]
        self.base = host.base.storage_offset()

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block_shape) * self.dtype.itemsize

    def box(self, at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(places in the storage, whether inside) of a box, both in the shape of the box."""
        places, inside = torch.zeros(self.block_shape, dtype=I64) + self.base, torch.ones(self.block_shape, dtype=torch.bool)
        for dim, (start, size, stride) in enumerate(zip(at, self.shape, self.strides, strict=True)):
            shape = [-1 if d == dim else 1 for d in range(len(at))]
            index = (torch.arange(self.block_shape[dim]) + int(start)).view(shape)
            places, inside = places + index * stride, inside & (index >= 0) & (index < size)
        return places, inside


class Shared:
    """A view of shared memory. Rows of more than 128 bytes lie in slabs of 128 bytes a row, one slab after the other."""

    def __init__(self, place: Allocation, start: int, shape: list[int], layout: Any, turned: bool = False):
        self.place, self.start, self.shape, self.layout, self.turned = place, start, shape, layout, turned

    @property
    def dtype(self) -> torch.dtype:
        return self.place.data.dtype

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def index(self, n: int) -> Shared:
        if not 0 <= n < self.shape[0]:
            raise KernelError(f"slot {n} of {self.place.name}, which has {self.shape[0]}")
        size = math.prod(self.shape[1:])
        return Shared(self.place, self.start + int(n) * size, self.shape[1:], self.layout)

    def permute(self, order: tuple[int, ...]) -> Shared:
        assert order == (1, 0)
        return Shared(self.place, self.start, self.shape, self.layout, not self.turned)

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.dtype and layout is self.layout and math.prod(shape) == math.prod(self.shape)
        return Shared(self.place, self.start, list(shape), layout)

    def contents(self) -> torch.Tensor:
        flat = self.place.data[self.start : self.stop]
        if len(self.shape) == 1:
            return flat
        rows, columns = self.shape
        slab = min(columns, self.layout.swizzle_byte_width // self.dtype.itemsize)
        x = flat.view(columns // slab, rows, slab).permute(1, 0, 2).reshape(rows, columns)
        return x.T if self.turned else x

    def fill(self, x: torch.Tensor) -> None:
        if len(self.shape) == 2:
            slab = min(self.shape[1], self.layout.swizzle_byte_width // self.dtype.itemsize)
            x = x.reshape(self.shape[0], -1, slab).permute(1, 0, 2)
        self.place.data[self.start : self.stop] = x.reshape(-1)

    def load(self, layout: Any) -> Value:
        machine().touch(self.place, self.start, self.stop, write=False)
        x = self.contents().clone()
        return Value(x.to(I64) if x.dtype == I32 else x, layout)

    def store(self, value: Value) -> None:
        if list(value.shape) != self.shape or value.dtype != (I64 if self.dtype == I32 else self.dtype):
            raise KernelError(f"{list(value.shape)} {value.dtype} is stored to {self.shape} {self.dtype}")
        machine().touch(self.place, self.start, self.stop, write=True)
        self.fill(value.x)


class Barriers:
    """An allocation of mbarriers."""

    def __init__(self, n: int):
        me = machine()
        me.n_allocations += 1
        self.all = [Barrier(me, f"barrier {me.program}.{me.n_allocations}.{i}") for i in range(n)]

    def index(self, n: int) -> Barrier:
        if not 0 <= n < len(self.all):
            raise KernelError(f"barrier {n} of {len(self.all)}")
        return self.all[n]
