"""wgmma.mma_async on the emulated chip: matrix descriptors, register fragments, products in flight.

Read from the PTX ISA, "asynchronous warpgroup level matrix instructions". A descriptor's fields count 16 bytes: bits 0-13
start address, 16-29 leading byte offset, 32-45 stride byte offset, 49-51 base offset, 62-63 swizzle
(1: 128 bytes, 2: 64, 3: 32).
A swizzled operand lies in atoms of 8 rows of swizzle width; K-major rows run along K and the stride leads to the next 8 of
M or N; MN-major rows run along M or N, the stride leads to the next 8 of K and the leading offset to the next
swizzle width of M or N. The swizzle exchanges units of 16 bytes by bits of absolute addresses. Forms without a swizzle
are refused: no kernel of ours uses them.

Warps issue on their own, as on the chip, where all four of a warpgroup have to issue the same: the emulator compares them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tests.kernels.gluon_machine import KernelError
from tests.kernels.ptx_shared import SharedMemory, swizzled
from tests.kernels.ptx_translate import SHARED_BASE

ITEM = 2  # bytes of an operand's element
DEPTH = 16  # K of an instruction


@dataclass(frozen=True)
class Descriptor:
    start: int
    leading: int
    stride: int
    swizzle: int


def decode(bits: int) -> Descriptor:
    """Bytes; KernelError for what no kernel of ours means."""
    unused = bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62)
    width = {0: 0, 1: 128, 2: 64, 3: 32}[bits >> 62]
    if unused or bits >> 49 & 7 or width == 0:
        raise KernelError(f"matrix descriptor {bits:#x}: bits {unused:#x}, base offset {bits >> 49 & 7}, swizzle {width}")
    return Descriptor((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, width)


@lru_cache(maxsize=4096)
def places(descriptor: Descriptor, rows: int, transposed: bool) -> np.ndarray:
    """Addresses [rows, 16] of an operand of ``rows`` along M or N; ``transposed`` is MN-major."""
    mn, k = np.arange(rows)[:, None], np.arange(DEPTH)[None]
    along, across = (mn, k) if transposed else (k, mn)
    atom = descriptor.swizzle // ITEM
    first = descriptor.start if transposed else descriptor.start - descriptor.start % descriptor.swizzle
    if any(n % (8 * descriptor.swizzle) for n in (first, descriptor.stride, descriptor.leading)):
        raise KernelError(f"{descriptor}: atoms of 8 rows do not begin at multiples of their size, and the base offset is 0")
    offset = across % 8 * descriptor.swizzle + across // 8 * descriptor.stride + along % atom * ITEM
    if transposed:
        offset = offset + along // atom * descriptor.leading
        if rows > atom and descriptor.leading == 0:
            raise KernelError(f"{descriptor} for {rows} rows: no leading byte offset")
    elif descriptor.start % descriptor.swizzle + DEPTH * ITEM > descriptor.swizzle:
        raise KernelError(f"{descriptor}: 16 of K leave the swizzle width")
    if rows > 8 and not transposed and descriptor.stride == 0:
        raise KernelError(f"{descriptor} for {rows} rows: no stride byte offset")
    return swizzled(descriptor.start + offset, descriptor.swizzle)


@lru_cache(maxsize=8192)
def granules(descriptor: Descriptor, rows: int, transposed: bool, first: int, count: int) -> np.ndarray:
    """The granules of 4 bytes, from the beginning of shared memory, of ``count`` rows from ``first`` on."""
    return np.unique((places(descriptor, rows, transposed)[first : first + count] - SHARED_BASE) >> 2)


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 to float32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def load(memory: SharedMemory, descriptor: Descriptor, rows: int, transposed: bool, kind: str) -> np.ndarray:
    """float32 [rows, 16]."""
    at = places(descriptor, rows, transposed) - SHARED_BASE
    if at.min() < 0 or at.max() + ITEM > memory.size:
        raise KernelError(f"{descriptor} reads shared memory + {at.min()} to {at.max()}, of {memory.size} bytes")
    return numbers(memory.data.view(np.uint16)[at >> 1], kind)


def rows_of_registers(registers: np.ndarray, kind: str) -> np.ndarray:
    """A of m64k16 from uint32 [4 registers, threads]: float32 [rows, 16], 16 rows a warp.

    Lane l holds of row l / 4 (registers 0 and 2) and row l / 4 + 8 (1 and 3) the columns l % 4 * 2 and the one after it,
    of the first 8 columns (0 and 1) or the last 8 (2 and 3).
    """
    pairs = numbers(np.ascontiguousarray(registers).view(np.uint16), kind)  # [registers, threads * 2], low half first
    x = pairs.reshape(2, 2, -1, 8, 4, 2)  # column half, row half, warp, row, lane, element
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(-1, DEPTH)


def fragments(product: np.ndarray) -> np.ndarray:
    """float32 [rows, N] to accumulators [N / 2, threads]: lane l holds of rows l / 4 and l / 4 + 8 columns l % 4 * 2 and + 1."""
    rows, n = product.shape
    x = product.reshape(rows // 16, 2, 8, n // 8, 4, 2)  # warp, row half, row, column block, lane, element
    return np.ascontiguousarray(x.transpose(3, 1, 5, 0, 2, 4)).reshape(n // 2, rows * 2)


@dataclass(eq=False)
class Product:
    """One instruction as issued by warps side by side (threads ``low`` to ``high`` of the block).

    ``a`` is uint32 [4, threads] or a descriptor. ``keep`` says whether the accumulators count.
    """

    low: int
    high: int
    accumulators: tuple[int, ...]
    a: np.ndarray | Descriptor
    b: Descriptor
    a_transposed: bool
    b_transposed: bool
    keep: bool
    kind: str
    sources: tuple[int, ...]  # registers of A

    @property
    def n(self) -> int:
        return len(self.accumulators) * 2

    def operands(self, memory: SharedMemory) -> tuple[np.ndarray, np.ndarray]:
        """(A [rows of these warps, 16], B [N, 16]) as shared memory is now."""
        if isinstance(self.a, Descriptor):
            first = self.low // 32 % 4 * 16
            a = load(memory, self.a, 64, self.a_transposed, self.kind)[first : first + (self.high - self.low) // 2]
        else:
            a = rows_of_registers(self.a, self.kind)
        return a, load(memory, self.b, self.n, self.b_transposed, self.kind)


@dataclass(eq=False)
class Group:
    """What a commit closed. ``results`` once it ran: accumulators [N / 2, threads] by their registers."""

    low: int
    high: int
    products: list[Product]
    results: dict[tuple[int, ...], np.ndarray] | None = None


@dataclass
class Flight:
    """The products of one warp that are not awaited: registers they will write or still read."""

    open: list[Product] = field(default_factory=list)
    groups: deque[Group] = field(default_factory=deque)
    committed: int = 0
    accumulators: dict[int, tuple[int, ...]] = field(default_factory=dict)  # register: the accumulators it is one of
    unreadable: set[int] = field(default_factory=set)  # keys of accumulators, as steps have them
    unwritable: set[int] = field(default_factory=set)  # and of sources
    dirty: set[int] = field(default_factory=set)  # steps that wrote registers of products since the last wgmma.fence
    fenced: bool = False

    def add(self, product: Product) -> None:
        self.open.append(product)
        self._note(product)

    def _note(self, product: Product) -> None:
        keys = {r * 4 + 2 for r in product.accumulators}
        self.accumulators.update(dict.fromkeys(product.accumulators, product.accumulators))
        self.unreadable |= keys
        self.unwritable |= keys | {r * 4 + 2 for r in product.sources}

    def refresh(self) -> None:
        """After a wait: what is still in flight."""
        self.accumulators, self.unreadable, self.unwritable = {}, set(), set()
        for product in [p for group in self.groups for p in group.products] + self.open:
            self._note(product)


def execute(group: Group, memory: SharedMemory, start: dict[tuple[int, ...], np.ndarray]) -> None:
    """Runs the products of a group on shared memory as it is now; ``start`` are the accumulators they begin with."""
    results: dict[tuple[int, ...], np.ndarray] = {}
    queue = list(group.products)
    while queue:
        first = queue.pop(0)
        chain = [first]
        while queue and queue[0].accumulators == first.accumulators and queue[0].keep:
            chain.append(queue.pop(0))
        a, b = (np.concatenate(parts, 1) for parts in zip(*(p.operands(memory) for p in chain), strict=True))
        # warp by warp, so that the bits do not depend on how many of them are side by side
        total = fragments(np.matmul(a.reshape(-1, 16, a.shape[1]), b.T).reshape(len(a), -1))
        if first.keep:
            before = results.get(first.accumulators)
            total += start[first.accumulators] if before is None else before
        results[first.accumulators] = total
    group.results = results
