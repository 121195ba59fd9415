"""A plan compiled for one rank and one shape: launch lists, message lists and a map of memory. Made once, run every layer.

Memory is one workspace of bytes. Every foreign buffer and every packed message has a place in it and a life: from its first
use to its last, counted in half steps (``2 b`` is the arrival phase of boundary ``b``, ``2 b + 1`` its posting phase and the
tasks of stage ``b``). Places are given first-fit to what lives at the same time, so a ring reuses two slots for ever.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from distattn.kernels.bands import Bands, shift
from distattn.parallel.comm import Awaited
from distattn.parallel.intervals import Intervals, union
from distattn.parallel.plan import (
    KV_OWNER,
    LANE,
    NEED,
    OWNER,
    POOL,
    POST,
    Q_OWNER,
    SRC,
    START,
    STOP,
    WHAT,
    Plan,
    What,
)
from distattn.parallel.shape import ALIGNMENT, Shape


@dataclass(frozen=True)
class Packing:
    """Which rows of its owners' shards a buffer holds, one maximal run after the other without gaps."""

    start: tuple[tuple[int, int], ...]  # (owner, row)
    stop: tuple[int, ...]
    offset: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, owners: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Packing:
        runs = union(Intervals(owners, starts, stops))
        offset = np.concatenate([[0], np.cumsum(runs.rows)])
        owner, start, stop, begin = (column.tolist() for column in (runs.key, runs.start, runs.stop, offset))
        return cls(tuple(zip(owner, start, strict=True)), tuple(stop), tuple(begin[:-1]), begin[-1])

    def row(self, owner: int, start: int, stop: int) -> int:
        """Where rows [start, stop) of the owner's shard begin in the packed buffer."""
        run = bisect_right(self.start, (owner, start)) - 1
        found = run >= 0 and self.start[run][0] == owner and stop <= self.stop[run]
        assert found, f"rows [{start}, {stop}) of rank {owner} are not held"
        return self.offset[run] + start - self.start[run][1]


@dataclass(frozen=True)
class Part:
    """One tensor inside a stretch of bytes: [rows, *tail] of ``dtype`` at ``offset``."""

    offset: int
    rows: int
    dtype: torch.dtype
    tail: tuple[int, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        size = self.rows * torch.Size(self.tail).numel() * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.rows, *self.tail)


def _parts(kinds: list[tuple[torch.dtype, tuple[int, ...]]], rows: int, offset: int) -> tuple[tuple[Part, ...], int]:
    """The parts of ``rows`` rows from ``offset`` on, each aligned, and where they end."""
    parts = []
    for dtype, tail in kinds:
        parts.append(Part(offset, rows, dtype, tail))
        size = rows * torch.Size(tail).numel() * dtype.itemsize
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return tuple(parts), offset


@dataclass(eq=False)
class Stretch:
    """Bytes with a life: [born, dies] in half steps, both ends included. ``place`` is set by :func:`_allocate`."""

    size: int
    born: int
    dies: int
    place: int = -1

    def live_at(self, *steps: int) -> None:
        self.born, self.dies = min(self.born, *steps), max(self.dies, *steps)


@dataclass(eq=False)
class Buffer:
    """Rows of a foreign owner (or of the ``POOL``): received inputs, or sums to go home. ``kept``: it outlives the pass."""

    what: What
    owner: int
    packing: Packing
    parts: tuple[Part, ...]  # offsets from the beginning of the stretch
    stretch: Stretch
    kept: bool = False
    zero_at: int | None = None  # half step before which its bytes mean nothing, but may be read


@dataclass(eq=False)
class Item:
    """Rows of one buffer (or of the own tensors) inside a message: runs of them, and parts of the message."""

    what: What
    owner: int
    runs: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]
    _index: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> torch.Tensor:
        """The rows of all runs, int64 on ``device``, made once."""
        if device not in self._index:
            self._index[device] = torch.cat([torch.arange(a, b) for a, b in self.runs]).to(device)
        return self._index[device]


@dataclass(eq=False)
class Message:
    """One packed message to or from one peer. ``direct``: a whole buffer travels as it lies, without a copy."""

    peer: int
    items: tuple[Item, ...]
    size: int
    stretch: Stretch | None
    direct: Buffer | None = None


@dataclass(eq=False)
class Batch:
    """All that leaves and reaches a rank at one boundary on one lane, and is awaited at one boundary."""

    lane: int
    post: int
    need: int
    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)
    awaited: Awaited | None = None


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch: queries and keys of one owner or the ``POOL`` each; bands in the rows that this rank holds of them."""

    q_owner: int
    kv_owner: int
    bands: Bands


@dataclass(eq=False)
class Program:
    """What one rank does in one pass."""

    plan: Plan
    shape: Shape
    rank: int
    buffers: dict[tuple[What, int], Buffer]
    posts: list[list[Batch]]  # by boundary
    waits: list[list[Batch]]
    launches: list[list[Launch]]  # by stage
    zeros: list[list[Buffer]]  # buffers that must begin as zeros, by half step
    stretches: list[Stretch]  # of the workspace
    workspace_bytes: int
    kept_bytes: int
    restored: list[tuple[Buffer, Buffer]]  # (kept buffer of the forward program, buffer here that takes rows of it)

    @property
    def stages(self) -> int:
        return self.plan.stages

    @cached_property
    def messages(self) -> list[Message]:
        """All messages, in the order of their posts."""
        return [message for boundary in self.posts for batch in boundary for message in batch.sends + batch.receives]

    @cached_property
    def local_launches(self) -> int:
        """Launches on this rank's own queries."""
        return sum(launch.q_owner == self.rank for stage in self.launches for launch in stage)

    @cached_property
    def partials_arrive(self) -> bool:
        """Whether other ranks send partial results of this rank's queries."""
        return any(item.what == What.OUT and item.owner == self.rank for message in self.messages for item in message.items)

    @cached_property
    def deaths(self) -> list[list[Stretch]]:
        """Stretches of the workspace whose contents nobody reads after a half step, by half step."""
        deaths: list[list[Stretch]] = [[] for _ in range(2 * self.stages + 2)]
        for stretch in self.stretches:
            deaths[stretch.dies].append(stretch)
        return deaths


def compile_program(plan: Plan, shape: Shape, keep: Iterable[tuple[What, int]] = (), forward: Program | None = None) -> Program:
    """Compiles a rank's view of a plan.

    Args:
        plan: the view of one rank.
        keep: for a forward pass, the (what, owner) whose buffers the backward pass will want.
        forward: for a backward pass, the program whose kept buffers it finds.
    """
    assert plan.rank is not None, "only a view can be compiled"
    rank = plan.rank
    packings = _packings(plan, rank)
    buffers = _buffers(plan, shape, rank, packings, {(what, plan.store(owner)) for what, owner in keep})
    restored = _restored(plan, buffers, forward) if forward else []
    batches = _batches(plan, shape, rank, packings, buffers)
    posts: list[list[Batch]] = [[] for _ in range(plan.stages + 1)]
    waits: list[list[Batch]] = [[] for _ in range(plan.stages + 1)]
    for batch in batches:
        posts[batch.post].append(batch)
        waits[batch.need].append(batch)
    zeros: list[list[Buffer]] = [[] for _ in range(2 * plan.stages + 2)]
    with_contents = {id(new) for _, new in restored}
    for buffer in buffers.values():
        if buffer.zero_at is not None and id(buffer) not in with_contents:
            zeros[buffer.zero_at].append(buffer)
    kept_bytes = 0
    for buffer in buffers.values() if forward is None else ():
        if buffer.kept:
            buffer.stretch.place, kept_bytes = kept_bytes, kept_bytes + buffer.stretch.size
    stretches = [b.stretch for b in buffers.values() if not b.kept]
    stretches += [m.stretch for batch in batches for m in batch.sends + batch.receives if m.stretch]
    workspace = _allocate(stretches)
    launches = _launches(plan, rank, packings)
    return Program(plan, shape, rank, buffers, posts, waits, launches, zeros, stretches, workspace, kept_bytes, restored)


def _packings(plan: Plan, rank: int) -> dict[tuple[bool, int], Packing]:
    """One packing for the query side and one for the key side of every foreign owner, or of all of them."""
    t, tasks, kept = plan.transfers, plan.tasks, plan.kept
    blocks = [(np.isin(t[:, WHAT], (What.KV, What.DKV)), t[:, OWNER], t[:, START], t[:, STOP])]
    blocks.append((np.isin(kept[:, 4], (What.KV, What.DKV)), kept[:, 1], kept[:, 2], kept[:, 3]))
    for key_side, owner in ((False, Q_OWNER), (True, KV_OWNER)):
        blocks.append((np.full(len(tasks), key_side), tasks[:, owner], tasks[:, owner + 1], tasks[:, owner + 2]))
    side, owner, start, stop = (np.concatenate(c) for c in zip(*blocks, strict=True))
    foreign = np.flatnonzero(owner != rank)
    store = plan.stores(np.full_like(owner, rank), owner)
    order = foreign[np.lexsort((store[foreign], side[foreign]))]
    side, store, owner, start, stop = (column[order] for column in (side, store, owner, start, stop))
    border = np.flatnonzero((side[1:] != side[:-1]) | (store[1:] != store[:-1])) + 1
    packings = {}
    for a, b in zip(np.concatenate([[0], border]), np.concatenate([border, [len(side)]]), strict=True):
        if b > a:
            packings[bool(side[a]), int(store[a])] = Packing.of(owner[a:b], start[a:b], stop[a:b])
    return packings


def _stored_parts(shape: Shape, what: What) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Sums are stored in the accumulate dtype, whatever they travel in."""
    return [(shape.accumulate if what.is_sum else dtype, tail) for dtype, tail in shape.parts(what)]


def _buffers(
    plan: Plan, shape: Shape, rank: int, packings: dict[tuple[bool, int], Packing], keep: set[tuple[What, int]]
) -> dict[tuple[What, int], Buffer]:
    """A buffer for every (what, store) of foreign rows that this rank receives or makes, alive while tasks use it."""
    buffers: dict[tuple[What, int], Buffer] = {}

    def buffer(what: What, owner: int) -> Buffer:
        owner = plan.store(owner)
        if (what, owner) not in buffers:
            packing = packings[what.is_key_side, owner]
            parts, size = _parts(_stored_parts(shape, what), packing.rows, 0)
            stretch = Stretch(size, 2 * plan.stages + 1, 0)
            buffers[what, owner] = Buffer(what, owner, packing, parts, stretch, (what, owner) in keep)
        return buffers[what, owner]

    arrivals: dict[tuple[What, int], set[int]] = defaultdict(set)
    for src, _, owner, _, _, what, _, post, need in plan.transfers.tolist():
        if owner != rank:
            what = What(what).stored
            buffer(what, owner).stretch.live_at(2 * post + 1 if src == rank else 2 * need)
            if src != rank:
                arrivals[what, plan.store(owner)].add(need)
                _begin(buffer(what, owner), 2 * need)
    for _, owner, _, _, what in plan.kept.tolist():
        buffer(What(what), owner).stretch.live_at(0)
    q_kinds = (What.Q, What.OUT) if plan.direction == "forward" else (What.Q, What.DOUT, What.DQ)
    kv_kinds = (What.KV,) if plan.direction == "forward" else (What.KV, What.DKV)
    for stage, _, q_owner, _, _, kv_owner, _, _ in plan.tasks.tolist():
        for owner, kinds in ((q_owner, q_kinds), (kv_owner, kv_kinds)):
            for what in kinds if owner != rank else ():
                buffer(what, owner).stretch.live_at(2 * stage + 1)
                _begin(buffer(what, owner), 2 * stage + 1)
    for (what, owner), boundaries in arrivals.items():  # a tile may be loaded whole while some of its rows are still to come
        if not what.is_sum and len(boundaries) > 1:
            buffers[what, owner].zero_at = 2 * min(boundaries)
    return buffers


def _begin(buffer: Buffer, step: int) -> None:
    if buffer.what.is_sum:
        buffer.zero_at = step if buffer.zero_at is None else min(buffer.zero_at, step)


def _restored(plan: Plan, buffers: dict[tuple[What, int], Buffer], forward: Program) -> list[tuple[Buffer, Buffer]]:
    """Kept rows are used where the forward pass left them if the packing is the same, else copied into a buffer of this pass."""
    pairs = []
    for key in sorted({(What(row[4]), plan.store(row[1])) for row in plan.kept.tolist()}):
        old, new = forward.buffers[key], buffers[key]
        assert old.kept, "the forward program was compiled without knowing what to keep"
        if old.packing == new.packing:
            buffers[key] = old
            pairs.append((old, old))
        else:
            pairs.append((old, new))
    return pairs


def _batches(
    plan: Plan, shape: Shape, rank: int, packings: dict[tuple[bool, int], Packing], buffers: dict[tuple[What, int], Buffer]
) -> list[Batch]:
    by_batch: dict[tuple[int, int, int], list[list[int]]] = defaultdict(list)
    for row in plan.transfers.tolist():
        by_batch[row[POST], row[LANE], row[NEED]].append(row)
    batches = []
    for (post, lane, need), rows in sorted(by_batch.items()):  # what is needed first goes first, on both ends
        batch = Batch(lane, post, need)
        by_peer: dict[tuple[bool, int], list[list[int]]] = defaultdict(list)
        for row in rows:
            outgoing = row[SRC] == rank
            by_peer[outgoing, row[1] if outgoing else row[0]].append(row)
        for (outgoing, peer), mine in by_peer.items():
            message = _message(plan, shape, packings, buffers, peer, mine, outgoing, post, batch.need)
            (batch.sends if outgoing else batch.receives).append(message)
        detail = "; ".join(_describe(m) for m in batch.receives) or "its sends to " + _ranks(m.peer for m in batch.sends)
        batch.awaited = Awaited(plan.direction, batch.need, plan.stages, detail)
        batches.append(batch)
    return batches


def _message(
    plan: Plan,
    shape: Shape,
    packings: dict[tuple[bool, int], Packing],
    buffers: dict[tuple[What, int], Buffer],
    peer: int,
    rows: list[list[int]],
    outgoing: bool,
    post: int,
    need: int,
) -> Message:
    merged: list[tuple[What, int, list[tuple[int, int]]]] = []
    for row in rows:
        what, owner, start, stop = What(row[WHAT]), row[OWNER], row[START], row[STOP]
        store = plan.store(owner)
        begin = start if owner == plan.rank else packings[what.is_key_side, store].row(owner, start, stop)
        run = (begin, begin + stop - start)
        if not merged or merged[-1][:2] != (what, store):
            merged.append((what, store, [run]))
        elif merged[-1][2][-1][1] == run[0]:
            merged[-1][2][-1] = (merged[-1][2][-1][0], run[1])
        else:
            merged[-1][2].append(run)
    items, size = [], 0
    for what, store, runs in merged:
        parts, size = _parts(shape.parts(what), sum(b - a for a, b in runs), size)
        items.append(Item(what.stored, store, tuple(runs), parts))
    step_out, step_in = 2 * post + 1, 2 * need
    whole = _whole_buffer(shape, items, buffers)
    if whole is not None and (outgoing or not whole.what.is_sum):
        whole.stretch.live_at(step_out, step_in)
        return Message(peer, tuple(items), size, None, whole)
    return Message(peer, tuple(items), size, Stretch(size, step_out, step_in))


def _whole_buffer(shape: Shape, items: list[Item], buffers: dict[tuple[What, int], Buffer]) -> Buffer | None:
    """The buffer that this message is byte for byte, if there is one."""
    if len(items) != 1 or (items[0].what, items[0].owner) not in buffers:
        return None
    item, buffer = items[0], buffers[items[0].what, items[0].owner]
    same = item.runs == ((0, buffer.packing.rows),) and item.parts == buffer.parts
    return buffer if same else None


def _ranks(peers: Iterable[int]) -> str:
    return "rank " + ", ".join(str(p) for p in sorted(set(peers)))


def _describe(message: Message) -> str:
    rows = []
    for item in message.items:
        whose = "" if item.owner == POOL else f" of rank {item.owner}"
        rows.append(f"{item.what.name.lower()}{whose} ({sum(b - a for a, b in item.runs)} rows)")
    return f"{', '.join(rows)} from rank {message.peer}"


def _launches(plan: Plan, rank: int, packings: dict[tuple[bool, int], Packing]) -> list[list[Launch]]:
    """The tasks of a stage that read the same two buffers, in one launch."""
    offsets = np.zeros((len(plan.tasks), 2), dtype=np.int64)
    stores = []
    for i, (stage, at, q_owner, q_start, q_stop, kv_owner, kv_start, kv_stop) in enumerate(plan.tasks.tolist()):
        assert at == rank
        q_store, kv_store = plan.store(q_owner), plan.store(kv_owner)
        dq = q_start if q_owner == rank else packings[False, q_store].row(q_owner, q_start, q_stop)
        dk = kv_start if kv_owner == rank else packings[True, kv_store].row(kv_owner, kv_start, kv_stop)
        offsets[i] = dq, dk
        stores.append((stage, q_store, kv_store))
    bands = shift(plan.bands, *np.repeat(offsets, np.diff(plan.band_ptr), axis=0).T)
    tables: list[dict[tuple[int, int], list[np.ndarray]]] = [defaultdict(list) for _ in range(plan.stages)]
    for (stage, q_store, kv_store), begin, end in zip(stores, plan.band_ptr[:-1], plan.band_ptr[1:], strict=True):
        if begin < end:
            tables[stage][q_store, kv_store].append(bands[begin:end])
    return [[Launch(*key, Bands(np.concatenate(t))) for key, t in stage.items()] for stage in tables]


def _allocate(stretches: list[Stretch]) -> int:
    """First fit: gives every stretch a place that nothing alive at the same time has; returns the bytes needed."""
    total = 0
    active: list[Stretch] = []
    for stretch in sorted(stretches, key=lambda s: (s.born, -s.size)):
        active = sorted((a for a in active if a.dies >= stretch.born), key=lambda a: a.place)
        place = 0
        for other in active:
            if other.place - place >= stretch.size:
                break
            place = max(place, other.place + other.size)
        stretch.place = place
        active.append(stretch)
        total = max(total, place + stretch.size)
    return total
