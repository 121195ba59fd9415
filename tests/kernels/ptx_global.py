"""Global memory of the emulated chip: the tensors of a launch in an address space of their own, and boxes by tensor maps.

Every storage is a region, far from the next; bytes of it that belong to no tensor of the launch must not be touched. Reading a
NaN is an error: tests fill what nobody wrote with NaN. So are two threads that write one place, a plain access to what
is added up by several, and a box or a stride that the copy engine would not take.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.kernels.gluon_machine import KernelError

FIRST_ADDRESS = 0x7F00_0000_0000
NAN = {torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80), torch.float16: (np.uint16, 0x7FFF, 0x7C00)}
NAN[torch.float32] = (np.uint32, 0x7FFFFFFF, 0x7F800000)


@dataclass(eq=False)
class Region:
    """A storage. ``writers`` (0 where nobody wrote) and ``added`` have an element a granule of 2 bytes."""

    base: int
    data: np.ndarray
    inside: np.ndarray
    name: str
    dtype: torch.dtype
    writers: np.ndarray = field(init=False)
    added: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writers = np.zeros(len(self.data) // 2 + 1, np.int64)
        self.added = np.zeros(len(self.data) // 2 + 1, bool)

    def check(self, places: np.ndarray, what: str) -> None:
        """``places`` are bytes."""
        if not self.inside[places].all():
            raise KernelError(f"{what} outside of a tensor, in the storage of {self.name}")

    def check_numbers(self, raw: np.ndarray, what: str) -> None:
        if self.dtype in NAN:
            kind, bits, infinity = NAN[self.dtype]
            if ((raw.reshape(-1).view(kind) & bits) > infinity).any():
                raise KernelError(f"{what} a NaN of {self.name}, which nobody wrote")

    def claim(self, granules: np.ndarray, writer: np.ndarray | int, what: str) -> None:
        """Notes who writes; an error where another one did."""
        before = self.writers[granules]
        if ((before != 0) & (before != writer)).any() or self.added[granules].any():
            raise KernelError(f"{what} {self.name} where another thread or program wrote in this launch")
        self.writers[granules] = writer


class GlobalMemory:
    """``add`` the tensors of a launch first."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._by_storage: dict[int, Region] = {}

    def add(self, x: torch.Tensor, name: str) -> int:
        """The address of ``x``; tensors that share a storage share a region."""
        storage = x.untyped_storage()
        region = self._by_storage.get(storage.data_ptr())
        if region is None or storage.nbytes() == 0:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            base = FIRST_ADDRESS + sum((len(r.data) // 4096 + 256) * 4096 for r in self.regions)
            region = Region(base, data, np.zeros(len(data), bool), name, x.dtype)
            self.regions.append(region)
            self._by_storage[storage.data_ptr()] = region
        size, offset = x.element_size(), x.storage_offset() * x.element_size()
        if x.numel():
            strides = tuple(stride * size for stride in x.stride())
            view = np.lib.stride_tricks.as_strided(region.inside[offset:], (*x.shape, size), (*strides, 1))
            view[...] = True
        return region.base + offset

    def region(self, address: int, what: str) -> Region:
        for region in self.regions:
            if region.base - 4096 <= address < region.base + len(region.data) + 4096:
                return region
        raise KernelError(f"{what} at address {address:#x}, where there is no tensor")

    def _places(self, addresses: np.ndarray, width: int, what: str) -> tuple[Region, np.ndarray]:
        """(region, offsets of the accesses), which must lie in one region, inside of its tensors, and be aligned."""
        region = self.region(int(addresses[0]), what)
        at = addresses - region.base
        if at.min() < 0 or at.max() + width > len(region.data):
            raise KernelError(f"{what} outside of a tensor, beyond {region.name}")
        if (addresses % width).any():
            raise KernelError(f"{what} {region.name} at addresses that are no multiples of {width}")
        region.check(at[:, None] + np.arange(width), what)
        return region, at

    def load(self, addresses: np.ndarray, width: int, line: int) -> np.ndarray:
        """uint32 [accesses, width / 4]."""
        region, at = self._places(addresses, width, f"line {line} reads")
        raw = region.data[at[:, None] + np.arange(width)]
        region.check_numbers(raw, f"line {line} reads")
        if region.added[at // 2].any():
            raise KernelError(f"line {line} reads {region.name} where others add in this launch")
        writers = region.writers[at // 2]
        if writers.any():
            raise KernelError(f"line {line} reads {region.name} where this launch wrote")
        return raw.view(np.uint32)

    def store(self, addresses: np.ndarray, values: np.ndarray, writers: np.ndarray, line: int) -> None:
        """``values`` uint32 [accesses, words], ``writers`` the threads."""
        width = values.shape[1] * 4
        region, at = self._places(addresses, width, f"line {line} writes")
        if len(np.unique(at)) != len(at):
            raise KernelError(f"line {line}: two lanes write one place of {region.name}")
        granules = (at // 2)[:, None] + np.arange(width // 2)
        region.claim(granules, writers[:, None], f"line {line} writes")
        region.data[at[:, None] + np.arange(width)] = np.ascontiguousarray(values).view(np.uint8)

    def add_to(self, addresses: np.ndarray, values: np.ndarray, line: int) -> None:
        """Atomic adds of float32 [accesses, words]."""
        width = values.shape[1] * 4
        region, at = self._places(addresses, width, f"line {line} adds to")
        granules = (at // 2)[:, None] + np.arange(width // 2)
        if region.writers[granules].any():
            raise KernelError(f"line {line} adds to {region.name} where a plain store wrote")
        region.added[granules] = True
        places = (at // 4)[:, None] + np.arange(width // 4)
        if len(region.data) % 4:
            raise KernelError(f"line {line} adds float32 numbers to {region.name}")
        np.add.at(region.data.view(np.float32), places, values)

    def add_alone(self, addresses: np.ndarray, values: np.ndarray, writers: np.ndarray, line: int) -> None:
        """Atomic adds of float32 [accesses, words] where no other of the ``writers`` adds."""
        width = values.shape[1] * 4
        region, at = self._places(addresses, width, f"line {line} adds to")
        held = region.data[at[:, None] + np.arange(width)].view(np.float32)
        self.store(addresses, (held + values).view(np.uint32), writers, line)

    def ask(self, addresses: np.ndarray, line: int) -> None:
        """Places that are no tensor's are an error."""
        self._places(addresses, 4, f"line {line} asks for")

    def count(self, address: int, amount: int, line: int) -> int:
        """Adds to a counter in global memory and returns what it holds now."""
        region, at = self._places(np.array([address]), 4, f"line {line} counts in")
        region.added[at[0] // 2 : at[0] // 2 + 2] = True
        counter = region.data[at[0] : at[0] + 4].view(np.uint32)
        counter += np.uint32(amount)
        return int(counter[0])


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled is given: dimensions innermost first, ``strides`` in bytes of all but the innermost."""

    memory: GlobalMemory
    address: int
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int  # bytes: 0, 32, 64 or 128

    def __post_init__(self) -> None:
        inner = self.box[0] * self.item
        wrong = {
            "an address that is no multiple of 16": self.address % 16,
            "a stride that is no multiple of 16 bytes": any(s % 16 or not 0 < s < 1 << 40 for s in self.strides),
            "a side that is empty or too long": any(not 0 < n <= 1 << 32 for n in self.shape),
            "a box with a side above 256": any(not 0 < n <= 256 for n in self.box),
            f"boxes of {inner} bytes a row": inner % 16 or self.swizzle and inner > self.swizzle,
            "another number of dimensions": len(self.box) != len(self.shape) or len(self.strides) != len(self.shape) - 1,
        }
        if found := [name for name, bad in wrong.items() if bad]:
            raise KernelError(f"a tensor map with {', '.join(found)}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.item

    def _rows(self, corner: tuple[int, ...], what: str) -> tuple[Region, np.ndarray, np.ndarray, slice]:
        """(region, byte offsets of the columns inside, offsets of the rows inside, which rows of the box they are)."""
        if len(corner) != len(self.shape) or len(corner) > 2:
            raise KernelError(f"{what} a box by {len(corner)} coordinates of {len(self.shape)} dimensions")
        if corner[0] * self.item % 16:
            raise KernelError(f"{what} a box whose first column is at {corner[0] * self.item} bytes, no multiple of 16")
        region = self.memory.region(self.address, what)
        columns = np.arange(corner[0] * self.item, (corner[0] + self.box[0]) * self.item)
        columns = np.where((columns >= 0) & (columns < self.shape[0] * self.item), columns, -1)
        first, rows, stride = (corner[1], self.box[1], self.strides[0]) if len(corner) == 2 else (0, 1, 0)
        limit = self.shape[1] if len(corner) == 2 else 1
        begin, end = min(max(-first, 0), rows), max(min(limit - first, rows), 0)
        inside = (first + np.arange(begin, max(end, begin))) * stride
        return region, columns, inside + self.address - region.base, slice(begin, max(end, begin))

    def load(self, corner: tuple[int, ...], what: str) -> np.ndarray:
        """uint8 [rows, bytes of a row] of the box at ``corner``, zeros outside of the tensor."""
        region, columns, rows, which = self._rows(corner, what)
        data = np.zeros((self.box[1] if len(self.box) > 1 else 1, len(columns)), np.uint8)
        held = columns >= 0
        if len(rows) and held.any():
            places = rows[:, None] + columns[held]
            region.check(places, f"{what} reads")
            data[which, held] = region.data[places]
            region.check_numbers(np.ascontiguousarray(data), f"{what} reads")
            if region.writers[places // 2].any() or region.added[places // 2].any():
                raise KernelError(f"{what} reads {region.name} where this launch wrote")
        return data

    def store(self, corner: tuple[int, ...], data: np.ndarray, writer: int, what: str) -> None:
        """Writes what lies inside of the tensor."""
        region, columns, rows, which = self._rows(corner, what)
        held = columns >= 0
        if len(rows) and held.any():
            places = rows[:, None] + columns[held]
            region.check(places, f"{what} writes")
            region.claim(places // 2, writer, f"{what} writes")
            region.data[places] = data[which][:, held]


def describe(x: Any, meta: dict[str, Any], memory: GlobalMemory, name: str) -> TensorMap:
    """The map of a triton TensorDescriptor as triton's launcher encodes it (fill_tma_descriptor_tiled)."""
    item = meta["elem_size"]
    if meta["fp4_padded"] or getattr(x, "round_f32_to_tf32", False) or x.padding != "zero" or item != x.base.element_size():
        raise KernelError(f"a descriptor that the emulator does not know: {meta}")
    if x.strides[-1] != 1:
        raise KernelError("a descriptor whose innermost stride is not 1")
    strides = tuple(stride * item for stride in reversed(x.strides[:-1]))
    swizzle = (0, 32, 64, 128)[meta["swizzle"]]
    return TensorMap(
        memory, memory.add(x.base, name), item, tuple(reversed(x.shape)), strides, tuple(reversed(meta["block_size"])), swizzle
    )
