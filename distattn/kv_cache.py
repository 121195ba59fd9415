"""A key/value cache of one growing context, spread over ranks: no rank holds more than its share.

A prefill leaves each rank the rows that its layout gives it. Tokens that come later go, block by block, to the rank with the
fewest rows, so the load stays level. Who holds what follows from the order of the calls alone; ranks do not talk about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.attention import ContextParallel
from distattn.parallel.layout import Layout

GROWTH = 1.5  # of a full buffer: appending a token costs a constant number of copies on average


@dataclass
class Chunk:
    """Neighbouring positions that were appended to one rank."""

    owner: int
    start: int
    count: int


class KVShard:
    """One rank's keys and values of one layer: ``cache[layer]``, what :func:`distattn.decode_attention` attends to.

    Rows stand in the order of their positions, in blocks: k [blocks, B, H_kv, rows of a block, D], v the same with D_v. So the
    keys of many blocks are, without a copy, the keys of many heads, which a kernel attends to side by side.
    """

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.layer = cache, layer
        self.filled = 0
        """rows that are written; as many as ``cache.rows_here`` once this layer has all positions"""
        sizes = (cache.batch, cache.kv_heads, cache.block)
        self.k = torch.zeros(0, *sizes, cache.head_size, dtype=cache.dtype, device=cache.device)
        self.v = torch.zeros(0, *sizes, cache.value_size, dtype=cache.dtype, device=cache.device)
        self._reserve(cache.reserved_rows)

    def fill(self, k: Tensor, v: Tensor) -> None:
        """This rank's rows, after ``cache.prefill(layout)``: k [B, T, H_kv, D], v [B, T, H_kv, D_v] (or both without B)."""
        cache = self.cache
        if cache.appended or self.filled:
            raise ValueError(f"fill() is for the rows of a prefill, but layer {self.layer} holds {self._holds()}. Use append().")
        k, v = (self._rows_first(x, name) for x, name in ((k, "k"), (v, "v")))
        if k.shape[0] not in (cache.rows_here, cache.layout_rows) or v.shape[0] != k.shape[0]:
            raise ValueError(
                f"Rank {cache.rank} holds {cache.rows_here} rows of this prefill of {cache.length} tokens. Found "
                f"{k.shape[0]} rows of k and {v.shape[0]} of v. Pass the local rows of the layout that prefill() was given."
            )
        self._write(k[: cache.rows_here], v[: cache.rows_here])

    def append(self, k: Tensor, v: Tensor) -> None:
        """The new tokens, after ``cache.extend(n)``, the same on all ranks: k [B, n, H_kv, D] and v alike (or both without B)."""
        cache = self.cache
        k, v = (self._rows_first(x, name) for x, name in ((k, "k"), (v, "v")))
        if k.shape[0] != cache.new or v.shape[0] != cache.new:
            raise ValueError(
                f"The cache was extended by {cache.new} tokens. Found {k.shape[0]} rows of k and {v.shape[0]} of v. "
                "Call cache.extend(n) with the number of new tokens, then append() once a layer."
            )
        mine = cache.new_rows_here
        if self.filled + sum(stop - start for start, stop in mine) != cache.rows_here:
            raise ValueError(f"Layer {self.layer} holds {self._holds()}: its new tokens were appended already.")
        for start, stop in mine:
            self._write(k[start:stop], v[start:stop])

    def _rows_first(self, x: Tensor, name: str) -> Tensor:
        """[B, T, H, D] as [T, B, H, D], checked."""
        cache = self.cache
        wanted = (cache.batch, cache.kv_heads, cache.head_size if name == "k" else cache.value_size)
        x = x.unsqueeze(0) if x.dim() == 3 else x
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != wanted or x.dtype != cache.dtype or x.device != self.k.device:
            raise ValueError(
                f"The cache takes {name} [{wanted[0]}, T, {wanted[1]}, {wanted[2]}] of {cache.dtype} on {self.k.device}. Found "
                f"{list(x.shape)} of {x.dtype} on {x.device}."
            )
        return x.detach().transpose(0, 1)

    def _write(self, k: Tensor, v: Tensor) -> None:
        """Appends rows [T, B, H, D] behind those that are filled."""
        self._reserve(self.filled + len(k))
        for buffer, x in ((self.k, k), (self.v, v)):
            _write_blocks(buffer, x, self.filled, self.cache.block)
        self.filled += len(k)

    def _reserve(self, rows: int) -> None:
        blocks = -(-rows // self.cache.block)
        if blocks <= len(self.k):
            return
        blocks = max(blocks, int(len(self.k) * GROWTH))
        # Zeros, not empty: a kernel loads whole tiles, and rows behind the last must be finite.
        self.k = torch.cat([self.k, self.k.new_zeros(blocks - len(self.k), *self.k.shape[1:])])
        self.v = torch.cat([self.v, self.v.new_zeros(blocks - len(self.v), *self.v.shape[1:])])

    def _holds(self) -> str:
        return f"{self.filled} of the {self.cache.rows_here} rows that rank {self.cache.rank} has of {self.cache.length} tokens"


def _write_blocks(buffer: Tensor, x: Tensor, row: int, block: int) -> None:
    """x [T, B, H, D] into buffer [blocks, B, H, block, D] from ``row`` on."""
    done = 0
    while done < len(x):
        number, inside = divmod(row + done, block)
        whole = (len(x) - done) // block
        if inside == 0 and whole:
            part = x[done : done + whole * block].unflatten(0, (whole, block))
            buffer[number : number + whole].copy_(part.permute(0, 2, 3, 1, 4))
            done += whole * block
        else:
            count = min(block - inside, len(x) - done)
            buffer[number, :, :, inside : inside + count].copy_(x[done : done + count].permute(1, 2, 0, 3))
            done += count


class KVCache:
    """Keys and values of all layers for one context (of ``batch`` sequences of one length) over the ranks of ``cp``.

    Every rank makes one with the same arguments and calls the same methods in the same order:

        cache.prefill(plan.layout)        # then, layer by layer: cache[layer].fill(k, v) with this rank's rows
        cache.extend(n)                   # then, layer by layer: cache[layer].append(k, v) with the same rows on all ranks,
                                          # and decode_attention(q, cache[layer], cp)

    Args:
        layers, kv_heads, head_size: of the model; ``value_size`` is D_v where it is not ``head_size``.
        capacity: tokens that the context may have; room for this rank's share is made at once. None grows as needed.
        block: tokens that go to one rank before the next is chosen, and rows of a storage block.

    Raises:
        ValueError: a number that must be positive is not.
    """

    def __init__(
        self,
        cp: ContextParallel,
        layers: int,
        kv_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        block: int = 512,
    ):
        value_size = head_size if value_size is None else value_size
        numbers = {"layers": layers, "kv_heads": kv_heads, "head_size": head_size, "value_size": value_size, "batch": batch}
        for name, number in {**numbers, "block": block, "capacity": 1 if capacity is None else capacity}.items():
            if number < 1:
                raise ValueError(f"{name} of a key/value cache must be 1 or more. Found {number}.")
        self.cp, self.rank, self.world = cp, cp.rank, cp.world
        self.kv_heads, self.head_size, self.value_size, self.batch = kv_heads, head_size, value_size, batch
        self.dtype, self.device, self.capacity, self.block = dtype, torch.device(device), capacity, block
        self.length = 0
        """tokens of the context, over all ranks"""
        self.new = 0
        """tokens of the last extend()"""
        self.appended = 0
        """tokens that came after the prefill"""
        self.rows = np.zeros(self.world, dtype=np.int64)
        """rows of every rank"""
        self.layout_rows = 0
        self.agreed: set[str] = set()
        """kinds of calls that the ranks have compared"""
        self.verified = -1
        """length at which the ranks were last seen to hold the same context"""
        self.planned: dict[tuple[int, int | None, int], Any] = {}
        """what calls of decode_attention see of this rank's rows, the same in every layer; forgotten when the length changes"""
        self._prefilled: list[tuple[int, int, int]] = []  # (start, step, count) of this rank's rows
        self._chunks: list[Chunk] = []
        self._shards = [KVShard(self, layer) for layer in range(layers)]

    def __getitem__(self, layer: int) -> KVShard:
        return self._shards[layer]

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def rows_here(self) -> int:
        """Rows of this rank."""
        return int(self.rows[self.rank])

    @property
    def reserved_rows(self) -> int:
        """Rows for which every rank makes room at once: its share of the capacity, and one block that it may be ahead."""
        return 0 if self.capacity is None else min(self.capacity, -(-self.capacity // self.world) + self.block)

    @property
    def runs(self) -> np.ndarray:
        """Where this rank's rows stand: runs of positions ``start + step * i``, int64 [runs, (start, step, count)]."""
        mine = [(chunk.start, 1, chunk.count) for chunk in self._chunks if chunk.owner == self.rank]
        return np.array(self._prefilled + mine, dtype=np.int64).reshape(-1, 3)

    @property
    def positions(self) -> np.ndarray:
        """Position of each of this rank's rows, rising, int64 [rows]."""
        parts = [start + step * np.arange(count) for start, step, count in self.runs]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    @property
    def new_rows_here(self) -> list[tuple[int, int]]:
        """Which of the new tokens this rank keeps: [start, stop) among the ``new``."""
        first = self.length - self.new
        runs = [(max(c.start - first, 0), c.start + c.count - first) for c in self._chunks if c.owner == self.rank]
        return [(start, stop) for start, stop in runs if start < stop]

    def prefill(self, layout: Layout) -> None:
        """The context becomes the tokens of ``layout`` (a plan's), each on the rank that the layout names; padding is left out.

        It is one sequence from then on: tokens that come later see all of it, whatever documents the plan had.

        Raises:
            ValueError: the cache is not empty, the layout is of another world, or it has more tokens than the capacity.
        """
        if self.length:
            raise ValueError(f"prefill() is for an empty cache, this one holds {self.length} tokens. Use extend() and append().")
        if layout.world != self.world:
            raise ValueError(f"{layout!r} is for {layout.world} ranks, the cache for {self.world}. Use a plan of the same cp.")
        self._refuse_beyond_capacity(layout.n_valid)
        counts = np.clip(-((layout.seg_start - layout.n_valid) // layout.step), 0, layout.seg_count)
        np.add.at(self.rows, layout.seg_rank, counts)
        mine = slice(layout.rank_ptr[self.rank], layout.rank_ptr[self.rank + 1])
        held = zip(layout.seg_start[mine].tolist(), counts[mine].tolist(), strict=True)
        self._prefilled = [(start, layout.step, count) for start, count in held if count]
        self.layout_rows = layout.rows(self.rank)
        self.planned.clear()
        self.length = layout.n_valid

    def extend(self, n: int = 1) -> range:
        """Makes the context ``n`` tokens longer and returns their positions; then every layer must :meth:`KVShard.append` them.

        Raises:
            ValueError: a layer has not been given the tokens before, or the capacity is exceeded.
        """
        if n < 1:
            raise ValueError(f"extend() needs 1 or more new tokens. Found {n}.")
        for shard in self._shards:
            if shard.filled != self.rows_here:
                raise ValueError(f"Layer {shard.layer} holds {shard._holds()}. Fill or append every layer before extend().")
        self._refuse_beyond_capacity(n)
        first = self.length
        while n:
            last = self._chunks[-1] if self._chunks else None
            if last is None or last.count == self.block:
                last = Chunk(int(self.rows.argmin()), self.length, 0)
                self._chunks.append(last)
            take = min(n, self.block - last.count)
            last.count += take
            self.rows[last.owner] += take
            self.length, n = self.length + take, n - take
        self.new = self.length - first
        self.planned.clear()
        self.appended += self.new
        return range(first, self.length)

    def truncate(self, length: int) -> None:
        """Drops the last tokens (rejected speculative ones), down to ``length``.

        Raises:
            ValueError: ``length`` is more than the context has, or less than its prefill.
        """
        least = self.length - self.appended
        if not least <= length <= self.length:
            raise ValueError(
                f"truncate({length}) was asked of a context of {self.length} tokens, {least} of them from the prefill. Pass a "
                "length between the two."
            )
        while self.length > length:
            last = self._chunks[-1]
            take = min(self.length - length, last.count)
            last.count -= take
            self.rows[last.owner] -= take
            self.length, self.appended = self.length - take, self.appended - take
            if not last.count:
                self._chunks.pop()
        self.new = 0
        self.verified = -1
        self.planned.clear()
        for shard in self._shards:
            shard.filled = min(shard.filled, self.rows_here)

    def nbytes(self) -> int:
        """Bytes of this rank's buffers."""
        return sum(shard.k.nbytes + shard.v.nbytes for shard in self._shards)

    def _refuse_beyond_capacity(self, n: int) -> None:
        if self.capacity is not None and self.length + n > self.capacity:
            raise ValueError(
                f"The key/value cache holds {self.length} of at most {self.capacity} tokens; {n} more do not fit. Make it with a "
                "larger capacity=, or with None to let it grow."
            )
