"""Layout: which rank holds which tokens.

A shard is a list of segments, each an arithmetic progression ``start, start + step, ...`` of global positions. All
segments of a layout share one step (a single row fits any), and those of a rank have disjoint spans in rising order, so the
rows of a shard stand in the order of their positions. Every constructor takes any length: shards differ by at most
one row, or have all the same number of rows, a multiple of ``pad_to_equal`` (0: no padding).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch


class Segments(NamedTuple):
    """The segments of one rank: positions ``start + step * i`` for ``i < count`` are rows ``row + i`` of its shard."""

    starts: np.ndarray
    counts: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rank holds which of ``n_tokens`` global positions, each exactly once.

    Args:
        name: how the layout was made, for messages.
        n_tokens: global positions, padding included.
        n_valid: positions from here on are padding, which no mask touches; they are the last rows of their shards.
        world: number of ranks.
        step: distance of the positions of one segment.
        seg_rank, seg_start, seg_count: int64 columns [segments], sorted by (rank, start).
    """

    name: str
    n_tokens: int
    n_valid: int
    world: int
    step: int
    seg_rank: np.ndarray
    seg_start: np.ndarray
    seg_count: np.ndarray
    seg_row: np.ndarray = field(init=False)  # row of the shard where the segment begins
    rank_ptr: np.ndarray = field(init=False)  # int64 [world + 1], segments of rank r are rank_ptr[r]:rank_ptr[r + 1]
    row_ptr: np.ndarray = field(init=False)  # int64 [world + 1], the same for rows of the shards, one after the other

    def __post_init__(self) -> None:
        rank, start, count = self.seg_rank, self.seg_start, self.seg_count
        rows_before = np.concatenate([[0], np.cumsum(count)])
        rank_ptr = np.searchsorted(rank, np.arange(self.world + 1))
        row_ptr = rows_before[rank_ptr]
        for name, column in (("seg_row", rows_before[:-1] - row_ptr[rank]), ("rank_ptr", rank_ptr), ("row_ptr", row_ptr)):
            object.__setattr__(self, name, column)
        for column in (rank, start, count, self.seg_row, rank_ptr, row_ptr):
            column.flags.writeable = False
        assert self.world >= 1 and self.step >= 1 and 0 <= self.n_valid <= self.n_tokens
        assert row_ptr[-1] == self.n_tokens and (count > 0).all(), "segments must hold every position once"
        after = (start + self.step * (count - 1))[:-1] < start[1:]
        assert (after | (rank[:-1] < rank[1:])).all(), "segments of a rank must rise with disjoint spans"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        padding = f", padding={self.n_tokens - self.n_valid}" if self.n_tokens > self.n_valid else ""
        return f"Layout({self.name}, n_tokens={self.n_tokens}{padding}, world={self.world}, segments={len(self.seg_rank)})"

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this placement; equal on every machine."""
        head = np.array([self.n_tokens, self.n_valid, self.world, self.step])
        columns = np.concatenate([head, self.seg_rank, self.seg_start, self.seg_count])
        return hashlib.blake2b(columns.astype("<i8").tobytes(), digest_size=16).digest()

    @property
    def rows_all(self) -> np.ndarray:
        """Rows of every shard, int64 [world]."""
        return np.diff(self.row_ptr)

    def rows(self, rank: int) -> int:
        """Rows of the shard of ``rank``."""
        self._check_rank(rank)
        return int(self.row_ptr[rank + 1] - self.row_ptr[rank])

    def segments(self, rank: int) -> Segments:
        """The segments of ``rank``, in the order of its rows."""
        self._check_rank(rank)
        own = slice(self.rank_ptr[rank], self.rank_ptr[rank + 1])
        return Segments(self.seg_start[own], self.seg_count[own], self.seg_row[own])

    def positions(self, rank: int) -> np.ndarray:
        """Global position of every row of the shard of ``rank``, rising, int64 [rows]."""
        starts, counts, rows = self.segments(rank)
        return np.repeat(starts - self.step * rows, counts) + self.step * np.arange(self.rows(rank))

    def segments_meeting(self, rank: np.ndarray, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segments of ``rank`` whose span meets the positions [first, stop), as ranges of the columns; arguments broadcast."""
        starts, lasts = self._search_keys
        base = np.asarray(rank, dtype=np.int64) * (self.n_tokens + 1)
        begin = np.searchsorted(lasts, base + np.clip(first, 0, self.n_tokens))
        end = np.searchsorted(starts, base + np.clip(stop, 0, self.n_tokens))
        return begin, np.where(np.asarray(first) < stop, np.maximum(begin, end), begin)

    def rows_before(self, rank: np.ndarray, position: np.ndarray) -> np.ndarray:
        """How many rows of ``rank`` are at positions below ``position``, int64; arguments broadcast."""
        if not len(self.seg_rank):
            return np.zeros(np.broadcast_shapes(np.shape(rank), np.shape(position)), dtype=np.int64)
        starts, _ = self._search_keys
        rank, position = np.broadcast_arrays(rank, np.clip(position, 0, self.n_tokens))
        segment = np.searchsorted(starts, rank * (self.n_tokens + 1) + position) - 1  # the last that begins below it
        begun = segment >= self.rank_ptr[rank]
        at = np.where(begun, segment, 0)
        steps = -((self.seg_start[at] - position) // self.step)
        return np.where(begun, self.seg_row[at] + np.minimum(self.seg_count[at], steps), 0)

    def first_and_last(self, rank: np.ndarray, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and last position that ``rank`` holds among [first, stop), int64 [n]; first > last where it holds none."""
        begin, end = self.segments_meeting(rank, first, stop)
        none = begin >= end
        a, b = np.where(none, 0, begin), np.where(none, 0, end - 1)

        def ceil(segment: np.ndarray, position: np.ndarray) -> np.ndarray:  # steps to the first element at or after it
            return np.maximum(0, -((self.seg_start[segment] - position) // self.step))

        low = self.seg_start[a] + self.step * ceil(a, first)
        high = self.seg_start[b] + self.step * np.minimum(self.seg_count[b] - 1, ceil(b, stop) - 1)
        return low, np.where(none, low - 1, high)

    @cached_property
    def _search_keys(self) -> tuple[np.ndarray, np.ndarray]:
        starts = self.seg_rank * (self.n_tokens + 1) + self.seg_start
        return starts, starts + self.step * (self.seg_count - 1)

    @cached_property
    def unshard_index(self) -> np.ndarray:
        """For each global position its row in the shards of rank 0, 1, ... one after the other, int64 [n_tokens]."""
        position = np.concatenate([self.positions(rank) for rank in range(self.world)])
        index = np.full(self.n_tokens, -1, dtype=np.int64)
        index[position] = np.arange(self.n_tokens)
        assert (index >= 0).all(), "some position is held twice, another never"
        return index

    def owner_of(self, positions: np.ndarray | Sequence[int] | int) -> tuple[np.ndarray, np.ndarray]:
        """(rank, row of its shard) of global positions, int64, shaped as ``positions``."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and not (asked.min() >= 0 and asked.max() < self.n_tokens):
            raise ValueError(
                f"owner_of was asked for positions {asked.min()} to {asked.max()}, but {self!r} holds 0 to "
                f"{self.n_tokens - 1}. Pass positions inside the sequence."
            )
        index = self.unshard_index[asked]
        rank = np.searchsorted(self.row_ptr, index, side="right") - 1
        return rank, index - self.row_ptr[rank]

    def shard(self, full: torch.Tensor, rank: int, dim: int = 0) -> torch.Tensor:
        """The rows of ``full`` that ``rank`` holds, a differentiable copy.

        ``full`` has ``n_tokens`` rows along ``dim``, or ``n_valid``: padding rows are then zeros.
        """
        found = full.shape[dim]
        if found not in (self.n_valid, self.n_tokens):
            expected = f"{self.n_valid}" if self.n_valid == self.n_tokens else f"{self.n_valid} (or {self.n_tokens}, padded)"
            raise ValueError(
                f"shard needs {expected} rows along dim {dim}, found {found} in a tensor of shape {tuple(full.shape)}. "
                "Pass the whole sequence, or name the dim of the tokens."
            )
        positions = self.positions(rank)
        held = positions[positions < found]
        local = full.index_select(dim, torch.from_numpy(held).to(full.device))
        if len(held) == len(positions):
            return local
        shape = list(full.shape)
        shape[dim] = len(positions) - len(held)
        return torch.cat([local, full.new_zeros(shape)], dim)

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """The ``n_valid`` rows of the sequence from the shards of all ranks, in rank order; padding rows are dropped."""
        found = [shard.shape[dim] for shard in shards]
        if found != self.rows_all.tolist():
            raise ValueError(
                f"unshard needs {self.world} shards of {_short(self.rows_all.tolist())} rows along dim {dim}, found "
                f"{len(found)} of {_short(found)}. Pass the shards of all ranks of this layout, in rank order."
            )
        together = torch.cat(list(shards), dim)
        return together.index_select(dim, torch.from_numpy(self.unshard_index[: self.n_valid]).to(together.device))

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not in {self!r}. Ranks go from 0 to {self.world - 1}.")


def contiguous(n: int, world: int, pad_to_equal: int = 0) -> Layout:
    """One run of neighbouring positions a rank. With a causal mask the last rank does nearly twice the mean work."""
    _check_size(n, world)
    rank = np.arange(world)
    count = n // world + (rank < n % world)
    return _layout("contiguous", n, world, 1, rank, np.cumsum(count) - count, count, pad_to_equal)


def zigzag(n: int, world: int, pad_to_equal: int = 0) -> Layout:
    """Chunks r and 2 * world - 1 - r of 2 * world for rank r: causal work is balanced."""
    _check_size(n, world)
    return _zigzag("zigzag", np.array([n]), world, pad_to_equal)


def striped(n: int, world: int, pad_to_equal: int = 0) -> Layout:
    """Position p for rank p modulo world: work is balanced for causal masks, and for windows too."""
    _check_size(n, world)
    return _striped("striped", np.array([n]), world, pad_to_equal)


def document_zigzag(lengths: Sequence[int], world: int, pad_to_equal: int = 0) -> Layout:
    """Zigzag inside each of the packed documents, for any ``lengths``; shards differ by at most one row.

    The rank that begins a document goes round, so that neither left-over rows nor work gather on some ranks.
    """
    sizes = checked_lengths(lengths)
    _check_size(0, world)
    return _zigzag("document_zigzag", sizes, world, pad_to_equal)


def document_striped(lengths: Sequence[int], world: int, pad_to_equal: int = 0) -> Layout:
    """Striped inside each of the packed documents, for any ``lengths``; shards differ by at most one row.

    A document goes on at the rank after the one that ended the document before it; where all ranks have the same number
    of rows the first rank is chosen anew. Documents in between share their segments.
    """
    sizes = checked_lengths(lengths)
    _check_size(0, world)
    starts = np.cumsum(sizes) - sizes
    level = starts[starts % world == 0]
    return _striped("document_striped", np.diff(np.append(level, sizes.sum())), world, pad_to_equal)


def subdivided(layout: Layout, parts: int) -> Layout:
    """Every shard cut into ``parts`` runs of rows, as equal as they can be, for ranks ``parts * rank`` and those after it."""
    if parts == 1:
        return layout
    rows = np.repeat(layout.rows_all, parts)
    part = np.tile(np.arange(parts), layout.world)
    begin = rows * part // parts
    stop = rows * (part + 1) // parts
    base = np.repeat(layout.row_ptr[:-1], parts)
    seg_begin = layout.row_ptr[layout.seg_rank] + layout.seg_row  # rows of all shards, one after the other
    first = np.searchsorted(seg_begin, base + begin, side="right") - 1
    last = np.searchsorted(seg_begin, base + stop, side="left")
    count = np.where(begin < stop, last - first, 0)
    rank = np.repeat(np.arange(len(rows)), count)
    segment = np.arange(len(rank)) - np.repeat(np.cumsum(count) - count, count) + first[rank]
    low = np.maximum(seg_begin[segment], (base + begin)[rank])
    high = np.minimum(seg_begin[segment] + layout.seg_count[segment], (base + stop)[rank])
    start = layout.seg_start[segment] + layout.step * (low - seg_begin[segment])
    name = f"{layout.name}/{parts}"
    return Layout(name, layout.n_tokens, layout.n_valid, layout.world * parts, layout.step, rank, start, high - low)


def with_idle_ranks(layout: Layout, ranks: int) -> Layout:
    """The same shards, and ``ranks`` more ranks that hold no rows."""
    if ranks == 0:
        return layout
    columns = layout.seg_rank, layout.seg_start, layout.seg_count
    return Layout(layout.name, layout.n_tokens, layout.n_valid, layout.world + ranks, layout.step, *columns)


def _phases(lengths: np.ndarray, world: int) -> np.ndarray:
    """The rank that begins each document, int64 [documents].

    A document of L rows gives L // world to every rank and one more to the L % world ranks from its first on. Beginning
    where the last document's left-overs ended keeps all totals within one row of each other. Whenever they are level, any
    rank may begin: without a turn there, documents of world tokens, say, would all give their last row, which has the
    most keys, to the same rank. Multiples of the golden ratio spread few turns as evenly as many.
    """
    starts = np.cumsum(lengths) - lengths
    turn = np.cumsum(starts % world == 0) - 1
    golden = turn * 2654435769 % (1 << 32)  # fraction of a circle, times 2**32
    return (starts + (golden * world >> 32)) % world


def _striped(name: str, lengths: np.ndarray, world: int, pad_to_equal: int) -> Layout:
    lengths = lengths[lengths > 0]
    rank = np.arange(world)[:, None]
    order = (rank - _phases(lengths, world)) % world  # [world, documents]: this rank's place in the document's order
    start = np.cumsum(lengths) - lengths + order
    count = lengths // world + (order < lengths % world)
    rank = np.broadcast_to(rank, count.shape)
    return _layout(name, int(lengths.sum()), world, world, rank, start, count, pad_to_equal)


def _zigzag(name: str, lengths: np.ndarray, world: int, pad_to_equal: int) -> Layout:
    lengths = lengths[lengths > 0]
    rank = np.arange(world)[:, None]
    order = (rank - _phases(lengths, world)) % world  # [world, documents], as in _striped
    fewer, longer = lengths // world, lengths % world  # the first `longer` ranks in order hold one row more than `fewer`
    n_long, n_short = np.minimum(order, longer), np.maximum(order - longer, 0)  # ranks before this one
    rows = fewer + (order < longer)
    front, back = (rows + 1) // 2, rows // 2
    front_before = n_long * (fewer // 2 + 1) + n_short * ((fewer + 1) // 2)
    back_after = n_long * ((fewer + 1) // 2) + n_short * (fewer // 2)
    begin = np.cumsum(lengths) - lengths
    start = np.stack([begin + front_before, begin + lengths - back_after - back], -1)
    count = np.stack([front, back], -1)
    rank = np.broadcast_to(rank[..., None], count.shape)
    return _layout(name, int(lengths.sum()), world, 1, rank, start, count, pad_to_equal)


def _layout(
    name: str, n: int, world: int, step: int, rank: np.ndarray, start: np.ndarray, count: np.ndarray, pad_to_equal: int
) -> Layout:
    """A layout from columns of any shape in (rank, start) order: drops empty segments, pads, joins what continues."""
    some = count > 0
    rank, start, count = rank[some], start[some], count[some]
    n_tokens = n
    if pad_to_equal:
        rows = np.bincount(rank, count, minlength=world).astype(np.int64)
        each = -(-n // (world * pad_to_equal)) * pad_to_equal
        short = np.repeat(np.arange(world), each - rows)
        n_tokens = n + len(short)
        rank, count = np.append(rank, short), np.append(count, np.ones_like(short))
        start = np.append(start, n + np.arange(len(short)))
        order = np.argsort(rank, kind="stable")
        rank, start, count = rank[order], start[order], count[order]
    if len(rank):
        new = np.ones(len(rank), dtype=bool)
        new[1:] = (rank[1:] != rank[:-1]) | (start[1:] != start[:-1] + step * count[:-1])
        first = np.flatnonzero(new)
        rank, start, count = rank[first], start[first], np.add.reduceat(count, first)
    return Layout(name, n_tokens, n, world, step, rank, start, count)


def _check_size(n: int, world: int) -> None:
    if world < 1:
        raise ValueError(f"A layout needs at least 1 rank, found world = {world}. Pass the size of the process group.")
    if n < 0:
        raise ValueError(f"A layout cannot hold {n} tokens. Pass a length of 0 or more.")


def checked_lengths(lengths: Sequence[int]) -> np.ndarray:
    """Document lengths as int64 [documents]; ValueError unless they are whole numbers of 0 or more."""
    found = np.asarray(lengths)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(
            f"Document lengths must be a list of whole numbers, found shape {found.shape} of {found.dtype}. "
            "Pass for example [5000, 120, 3072]."
        )
    negative = np.flatnonzero(found < 0)
    if len(negative):
        raise ValueError(f"Document {negative[0]} has length {found[negative[0]]}. Lengths must be 0 or more.")
    return found.astype(np.int64)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"
