"""HeadSplit: which rank of a head exchange attends with which heads, and what a row of each message weighs.

In a group of u ranks that trade tokens for heads (Jacobs et al., "DeepSpeed Ulysses"; hybrids with a ring: Fang and Zhao,
"USP", and Gu et al., "LoongTrain") rank i gets all rows of the group, and slice i of the heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from distattn.parallel.shape import Shape


@dataclass(frozen=True)
class HeadSlice:
    """Query heads [start, stop) and the key heads [kv_start, kv_stop) that they read.

    Attributes:
        copies: how often each of the key heads stands in the slice's keys, so that all copies serve equally many query heads.
            Made by the receiver: a key head travels to a slice once.
        shared: some of the key heads are read by other slices too.
    """

    start: int
    stop: int
    kv_start: int
    kv_stop: int
    copies: tuple[int, ...]
    shared: bool

    @property
    def heads(self) -> int:
        return self.stop - self.start

    @property
    def kv_heads(self) -> int:
        """Key heads that travel."""
        return self.kv_stop - self.kv_start

    @property
    def kv_held(self) -> int:
        """Key heads that the slice attends with, copies included."""
        return sum(self.copies)


@dataclass(frozen=True)
class HeadSplit:
    """``heads`` query heads and the ``kv_heads`` key heads below them in ``parts`` slices of neighbouring heads.

    The largest slice sets the time of all, so sizes differ by at most one. Which slices are the larger ones is chosen so that
    all slices together hold the fewest key heads, copies included, then send the fewest; of equal choices the one with larger
    slices first. A slice that begins or ends inside of a group of query heads of one key head may have groups of different
    sizes. Kernels want one size: its key heads are then repeated until each serves as many query heads as the greatest common
    divisor of the sizes.

    Raises:
        ValueError: more slices than query heads.
    """

    heads: int
    kv_heads: int
    parts: int

    def __post_init__(self) -> None:
        assert self.kv_heads and self.heads % self.kv_heads == 0
        if self.parts > self.heads:
            raise ValueError(too_few_heads(self.heads, self.parts))

    @cached_property
    def slices(self) -> tuple[HeadSlice, ...]:
        borders = _borders(self.heads, self.kv_heads, self.parts)
        group = self.heads // self.kv_heads
        slices = []
        for start, stop in zip(borders, borders[1:], strict=False):
            sizes = _group_sizes(start, stop, group)
            common = math.gcd(*sizes)
            first, last = start // group, -(-stop // group)
            shared = start > first * group or stop < last * group
            slices.append(HeadSlice(start, stop, first, last, tuple(size // common for size in sizes), shared))
        return tuple(slices)

    @property
    def replicated(self) -> bool:
        """Some key head travels to several slices, so that its gradient is a sum."""
        return any(part.shared for part in self.slices)


def too_few_heads(heads: int, parts: int) -> str:
    """Why query heads cannot be shared, and what to do."""
    return (
        f"ulysses={parts} ranks cannot share {heads} query heads: each needs one at least. Use an ulysses of {heads} or less "
        "that divides the group, or attend to several rows of a batch at once: their heads count together."
    )


@lru_cache(maxsize=256)
def _borders(heads: int, kv_heads: int, parts: int) -> tuple[int, ...]:
    """Where slices begin, and the end of the last: the cheapest way to place the larger slices."""
    fewer, longer = divmod(heads, parts)
    # By the number of larger slices so far: (key heads held, key heads sent, borders with the sign turned).
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for i in range(parts):
        ahead: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for number, (held, sent, turned) in best.items():
            for size, count in ((fewer + 1, number + 1), (fewer, number)):
                if count > longer or longer - count > parts - i - 1:
                    continue
                start = -turned[-1]
                sizes = _group_sizes(start, start + size, heads // kv_heads)
                found = held + size // math.gcd(*sizes), sent + len(sizes), (*turned, -start - size)
                ahead[count] = min(ahead.get(count, found), found)
        best = ahead
    return tuple(-border for border in best[longer][2])


def _group_sizes(start: int, stop: int, group: int) -> list[int]:
    """Query heads among [start, stop) of each key head."""
    return [min(stop, (h + 1) * group) - max(start, h * group) for h in range(start // group, -(-stop // group))]


def inner_shape(shape: Shape, part: HeadSlice) -> Shape:
    """The attention that a slice runs."""
    return replace(shape, heads=part.heads, kv_heads=part.kv_held)


Parts = list[tuple[torch.dtype, tuple[int, ...]]]


class RowParts(NamedTuple):
    """The tensors in the four messages between a rank that holds rows and the rank of one slice, as (dtype, shape of a row)."""

    inputs: Parts  # q, k, v to the slice
    outputs: Parts  # out, lse from the slice
    upstream: Parts  # gradient of out, delta to the slice
    gradients: Parts  # dq, dk, dv from the slice


def row_parts(shape: Shape, part: HeadSlice) -> RowParts:
    """What travels for a slice. Gradients of key heads that several slices read are sums: they travel in the dtype of sums."""
    sums, dtype = shape.accumulate, shape.dtype
    q, k, v = (part.heads, shape.d), (part.kv_heads, shape.d), (part.kv_heads, shape.d_v)
    out: Parts = [(dtype, (part.heads, shape.d_v)), (sums, (part.heads,))]
    partial = (shape.home or sums) if part.shared else dtype
    return RowParts([(dtype, q), (dtype, k), (dtype, v)], out, out, [(dtype, q), (partial, k), (partial, v)])


def bytes_of(parts: Parts) -> int:
    """Bytes of one row, without alignment."""
    return sum(dtype.itemsize * math.prod(tail) for dtype, tail in parts)
