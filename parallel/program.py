"""A plan compiled for one rank and one shape: launch lists, message lists and a map of memory. Made once, run every layer.

Memory is one workspace of bytes. Every foreign buffer and every packed message has a place in it and a life: from its first
use to its last, counted in half steps (``2 b`` is the arrival phase of boundary ``b``, ``2 b + 1`` its posting phase and the
tasks of stage ``b``). What does not live at the same time may have the same place, so a ring reuses two slots for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from distattn.kernels.bands import Bands, shift
from distattn.parallel.comm import Awaited
from distattn.parallel.packing import Packing, Visits, packings, pool_kept, pool_rows
from distattn.parallel.plan import (
    LANE,
    NEED,
    OWNER,
    POOL,
    POST,
    SRC,
    START,
    STOP,
    WHAT,
    Plan,
    What,
    no_kept,
)
from distattn.parallel.shape import ALIGNMENT, Shape


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


class Place(NamedTuple):
    """Whose rows (``POOL``: those of all other ranks together), and of which visit; a rank's own rows have but one."""

    owner: int
    visit: int = 0


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
    """Rows of a foreign owner: received inputs, or sums on their way home. ``kept``: it outlives the pass."""

    what: What
    place: Place
    packing: Packing
    parts: tuple[Part, ...]  # offsets from the beginning of the stretch
    stretch: Stretch
    kept: bool = False
    zero_at: int | None = None  # half step before which its bytes mean nothing, but may be read


@dataclass(eq=False)
class Item:
    """Rows of one buffer (or the own tensors) inside a message: runs of the buffer and parts of the message."""

    what: What
    place: Place
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
    """One kernel launch: queries of one owner, keys of one owner, bands in the rows of what this rank holds of them."""

    q: Place
    kv: Place
    bands: Bands


@dataclass(eq=False)
class Program:
    """What one rank does in one pass."""

    plan: Plan
    shape: Shape
    rank: int
    buffers: dict[tuple[What, Place], Buffer]
    posts: list[list[Batch]]  # by boundary
    waits: list[list[Batch]]
    launches: list[list[Launch]]  # by stage
    zeros: list[list[Buffer]]  # buffers that must begin as zeros, by half step
    stretches: list[Stretch]  # of the workspace
    workspace_bytes: int
    kept_bytes: int
    restored: list[tuple[Buffer, Buffer]]  # (kept buffer of the forward program, buffer here that takes rows of it or is it)

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
        return sum(launch.q.owner == self.rank for stage in self.launches for launch in stage)

    @cached_property
    def partials_arrive(self) -> bool:
        """Whether other ranks send partial results of this rank's queries."""
        return any(item.what == What.OUT and item.place.owner == self.rank for message in self.messages for item in message.items)

    @cached_property
    def deaths(self) -> list[list[Stretch]]:
        """Stretches of the workspace whose contents nobody reads after a half step, by half step."""
        deaths: list[list[Stretch]] = [[] for _ in range(2 * self.stages + 2)]
        for stretch in self.stretches:
            deaths[stretch.dies].append(stretch)
        return deaths


def compile_program(plan: Plan, shape: Shape, keep: np.ndarray | None = None, forward: Program | None = None) -> Program:
    """Compiles a rank's view of a plan.

    Args:
        plan: the view of one rank.
        keep: for a forward pass, the runs that the backward pass will want: the ``kept`` of its plan.
        forward: for a backward pass, the program whose kept buffers it finds.
    """
    assert plan.rank is not None, "only a view can be compiled"
    rank = plan.rank
    plan, keep = pool_rows(plan), pool_kept(plan, no_kept() if keep is None else keep)
    held = packings(plan, rank)
    buffers = _buffers(plan, shape, rank, held, keep)
    restored = _restored(plan, buffers, forward) if forward else []
    batches = _batches(plan, shape, rank, held, buffers)
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
    launches = _launches(plan, rank, held)
    return Program(plan, shape, rank, buffers, posts, waits, launches, zeros, stretches, workspace, kept_bytes, restored)


def _stored_parts(shape: Shape, what: What) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Sums are stored in the accumulate dtype, whatever they travel in."""
    return [(shape.accumulate if what.is_sum else dtype, tail) for dtype, tail in shape.parts(what)]


def _place(held: dict[tuple[bool, int], Visits], rank: int, key_side: bool, owner: int, row: int) -> Place:
    """The place that has a row of an owner's shard."""
    return Place(owner) if owner == rank else Place(owner, held[key_side, owner].holding(row))


def _row(held: dict[tuple[bool, int], Visits], rank: int, key_side: bool, place: Place, start: int, stop: int) -> int:
    """Where rows [start, stop) of an owner's shard begin in the tensors of their place."""
    return start if place.owner == rank else held[key_side, place.owner].packings[place.visit].row(start, stop)


def _buffers(
    plan: Plan, shape: Shape, rank: int, held: dict[tuple[bool, int], Visits], keep: np.ndarray
) -> dict[tuple[What, Place], Buffer]:
    """A buffer for everything foreign that this rank receives or makes of a visit, alive while tasks use it."""
    buffers: dict[tuple[What, Place], Buffer] = {}

    def buffer(what: What, owner: int, row: int) -> Buffer:
        place = _place(held, rank, what.is_key_side, owner, row)
        if (what, place) not in buffers:
            packing = held[what.is_key_side, owner].packings[place.visit]
            parts, size = _parts(_stored_parts(shape, what), packing.rows, 0)
            buffers[what, place] = Buffer(what, place, packing, parts, Stretch(size, 2 * plan.stages + 1, 0))
        return buffers[what, place]

    arrivals: dict[tuple[What, Place], set[int]] = defaultdict(set)
    for src, _, owner, start, _, what, _, post, need in plan.transfers.tolist():
        if owner != rank:
            what = What(what).stored
            one = buffer(what, owner, start)
            one.stretch.live_at(2 * post + 1 if src == rank else 2 * need)
            if src != rank:
                arrivals[what, one.place].add(need)
                _begin(one, 2 * need)
    for _, owner, start, _, what in plan.kept.tolist():
        buffer(What(what), owner, start).stretch.live_at(0)
    q_kinds = (What.Q, What.OUT) if plan.direction == "forward" else (What.Q, What.DOUT, What.DQ)
    kv_kinds = (What.KV,) if plan.direction == "forward" else (What.KV, What.DKV)
    for stage, _, q_owner, q_start, _, kv_owner, kv_start, _ in plan.tasks.tolist():
        for owner, row, kinds in ((q_owner, q_start, q_kinds), (kv_owner, kv_start, kv_kinds)):
            for what in kinds if owner != rank else ():
                one = buffer(what, owner, row)
                one.stretch.live_at(2 * stage + 1)
                _begin(one, 2 * stage + 1)
    for key, boundaries in arrivals.items():  # a tile may be loaded whole while some of its rows are still to come
        if not key[0].is_sum and len(boundaries) > 1:
            buffers[key].zero_at = 2 * min(boundaries)
    for _, owner, start, _, what in keep.tolist():
        buffer(What(what), owner, start).kept = True
    return buffers


def _begin(buffer: Buffer, step: int) -> None:
    if buffer.what.is_sum:
        buffer.zero_at = step if buffer.zero_at is None else min(buffer.zero_at, step)


def _restored(plan: Plan, buffers: dict[tuple[What, Place], Buffer], forward: Program) -> list[tuple[Buffer, Buffer]]:
    """Kept rows are used where the forward pass left them if the packing is the same, else copied into a buffer of this pass."""
    owners = {(What(row[4]), row[1]) for row in plan.kept.tolist()}
    kept = [b for (what, place), b in sorted(forward.buffers.items()) if b.kept and (what, place.owner) in owners]
    pairs = []
    for key, new in sorted(buffers.items()):
        for old in kept:
            if (old.what, old.place.owner) == (new.what, new.place.owner) and old.packing.common(new.packing):
                same = old.packing == new.packing
                buffers[key] = old if same else new
                pairs.append((old, old if same else new))
    return pairs


def _batches(
    plan: Plan, shape: Shape, rank: int, held: dict[tuple[bool, int], Visits], buffers: dict[tuple[What, Place], Buffer]
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
            message = _message(shape, rank, held, buffers, peer, mine, outgoing, post, batch.need)
            (batch.sends if outgoing else batch.receives).append(message)
        detail = "; ".join(_describe(m) for m in batch.receives) or "its sends to " + _ranks(m.peer for m in batch.sends)
        batch.awaited = Awaited(plan.direction, batch.need, plan.stages, detail)
        batches.append(batch)
    return batches


def _message(
    shape: Shape,
    rank: int,
    held: dict[tuple[bool, int], Visits],
    buffers: dict[tuple[What, Place], Buffer],
    peer: int,
    rows: list[list[int]],
    outgoing: bool,
    post: int,
    need: int,
) -> Message:
    merged: list[tuple[What, Place, list[tuple[int, int]]]] = []
    for row in rows:
        what, owner, start, stop = What(row[WHAT]), row[OWNER], row[START], row[STOP]
        place = _place(held, rank, what.is_key_side, owner, start)
        begin = _row(held, rank, what.is_key_side, place, start, stop)
        run = (begin, begin + stop - start)
        if not merged or merged[-1][:2] != (what, place):
            merged.append((what, place, [run]))
        elif merged[-1][2][-1][1] == run[0]:
            merged[-1][2][-1] = (merged[-1][2][-1][0], run[1])
        else:
            merged[-1][2].append(run)
    items, size = [], 0
    for what, place, runs in merged:
        parts, size = _parts(shape.parts(what), sum(b - a for a, b in runs), size)
        items.append(Item(what.stored, place, tuple(runs), parts))
    step_out, step_in = 2 * post + 1, 2 * need
    whole = _whole_buffer(shape, items, buffers)
    if whole is not None and (outgoing or not whole.what.is_sum):
        whole.stretch.live_at(step_out, step_in)
        return Message(peer, tuple(items), size, None, whole)
    return Message(peer, tuple(items), size, Stretch(size, step_out, step_in))


def _whole_buffer(shape: Shape, items: list[Item], buffers: dict[tuple[What, Place], Buffer]) -> Buffer | None:
    """The buffer that this message is byte for byte, if there is one."""
    if len(items) != 1 or (items[0].what, items[0].place) not in buffers:
        return None
    item, buffer = items[0], buffers[items[0].what, items[0].place]
    same = item.runs == ((0, buffer.packing.rows),) and item.parts == buffer.parts
    return buffer if same else None


def _ranks(peers: Iterable[int]) -> str:
    return "rank " + ", ".join(str(p) for p in sorted(set(peers)))


def _describe(message: Message) -> str:
    rows = []
    for item in message.items:
        whose = "" if item.place.owner == POOL else f" of rank {item.place.owner}"
        rows.append(f"{item.what.name.lower()}{whose} ({sum(b - a for a, b in item.runs)} rows)")
    return f"{', '.join(rows)} from rank {message.peer}"


def _launches(plan: Plan, rank: int, held: dict[tuple[bool, int], Visits]) -> list[list[Launch]]:
    """The tasks of a stage that read the same two buffers, in one launch."""
    offsets = np.zeros((len(plan.tasks), 2), dtype=np.int64)
    places = []
    for i, (stage, at, q_owner, q_start, q_stop, kv_owner, kv_start, kv_stop) in enumerate(plan.tasks.tolist()):
        assert at == rank
        q, kv = _place(held, rank, False, q_owner, q_start), _place(held, rank, True, kv_owner, kv_start)
        offsets[i] = _row(held, rank, False, q, q_start, q_stop), _row(held, rank, True, kv, kv_start, kv_stop)
        places.append((stage, q, kv))
    bands = shift(plan.bands, *np.repeat(offsets, np.diff(plan.band_ptr), axis=0).T)
    tables: list[dict[tuple[Place, Place], list[np.ndarray]]] = [defaultdict(list) for _ in range(plan.stages)]
    for (stage, q, kv), begin, end in zip(places, plan.band_ptr[:-1], plan.band_ptr[1:], strict=True):
        if begin < end:
            tables[stage][q, kv].append(bands[begin:end])
    return [[Launch(*key, Bands(np.concatenate(t))) for key, t in stage.items()] for stage in tables]


def _allocate(stretches: list[Stretch]) -> int:
    """Gives every stretch a place that nothing alive at the same time has; returns the bytes needed.

    The largest first, and of these those that live longest, each in the first gap that is left: rings come down to the most
    bytes that are alive at once. In the order of their births the small ones would leave holes that no large one fits.
    """
    total = 0
    alive: dict[int, list[Stretch]] = defaultdict(list)
    for stretch in sorted(stretches, key=lambda s: (-s.size, s.born - s.dies, s.born)):
        life = range(stretch.born, stretch.dies + 1)
        place = 0
        for other in sorted({id(o): o for step in life for o in alive[step]}.values(), key=lambda o: o.place):
            if other.place - place >= stretch.size:
                break
            place = max(place, other.place + other.size)
        stretch.place = place
        for step in life:
            alive[step].append(stretch)
        total = max(total, place + stretch.size)
    return total
