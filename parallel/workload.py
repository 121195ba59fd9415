"""What a pass asks of a cluster: seconds of compute by stage and rank, and packed messages by boundary, as arrays.

Made from a plan of all ranks, or from a head exchange; the simulator knows neither. What is a message, a batch and a launch, and
which messages are copied on the way, is as in ``program.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas
from distattn.parallel.cluster import Cluster, Direction
from distattn.parallel.intervals import groups
from distattn.parallel.plan import (
    DST,
    KV_OWNER,
    LANE,
    NEED,
    OWNER,
    POST,
    Q_OWNER,
    RANK,
    SRC,
    STAGE,
    START,
    STOP,
    WHAT,
    Plan,
    What,
)
from distattn.parallel.shape import Shape

EXCHANGE_LANE = 3
ADDING = 1.5  # memory passes of a sum that is added to another, over those of a copy


@dataclass(frozen=True)
class Messages:
    """Packed messages, sorted by boundary of posting; all int64 [n]."""

    src: np.ndarray
    dst: np.ndarray
    lane: np.ndarray
    post: np.ndarray
    need: np.ndarray  # the boundary at which both ends await it
    size: np.ndarray  # bytes


@dataclass(frozen=True)
class Workload:
    """One pass, or one head exchange, of all ranks. Matrices are float64 [boundaries or stages, P], seconds."""

    name: str
    stages: int
    world: int
    begin: np.ndarray  # [P] before the first boundary
    compute: np.ndarray  # [stages, P] kernels
    pack: np.ndarray  # [stages + 1, P] before posting
    unpack: np.ndarray  # [stages + 1, P] after awaiting
    messages: Messages


@dataclass(frozen=True)
class Exchange:
    """All-to-all in groups of consecutive ranks: ``sizes[r, i]`` bytes from rank r to the i-th rank of its group.

    int64 [P, u]; what a rank would send to itself counts nothing.
    """

    name: str
    sizes: np.ndarray


def of_plan(plan: Plan, shapes: Sequence[Shape], cluster: Cluster) -> Workload:
    """The workload of a whole plan.

    Args:
        shapes: one for each head slice: with u of them rank ``g * u + i`` does what rank g does in the plan, for shape i.
    """
    if plan.rank is not None or getattr(plan, "bands_of", None) is not None:
        raise ValueError(
            f"A simulation needs the plan of all ranks. Found {plan.name!r} as one rank sees it: pass the whole plan."
        )
    slices, world = len(shapes), plan.world * len(shapes)
    messages, pack, unpack = _messages(plan, shapes, cluster)
    own = np.repeat(plan.layout.rows_all, slices) * np.tile([_own_bytes(s, plan.direction) for s in shapes], plan.world)
    begin = cluster.host.pass_us * 1e-6 + own / (cluster.host.copy_gb_s * 1e9)
    compute = _compute(plan, shapes, cluster).reshape(plan.stages, world)
    return Workload(plan.direction, plan.stages, world, begin, compute, pack, unpack, messages)


def of_exchange(exchange: Exchange, cluster: Cluster) -> Workload:
    """The workload of a head exchange: every pair's bytes in one message, all posted at once, then awaited."""
    world, slices = exchange.sizes.shape
    rank, member = (x.ravel() for x in np.meshgrid(np.arange(world), np.arange(slices), indexing="ij"))
    peer, size = rank // slices * slices + member, np.asarray(exchange.sizes, dtype=np.int64).ravel()
    some = (peer != rank) & (size > 0)
    src, dst, size = rank[some], peer[some], size[some]
    pack, unpack = np.zeros((2, world)), np.zeros((2, world))
    copy = cluster.host.copy_gb_s * 1e9
    pack[0], unpack[1] = (np.bincount(end, weights=size, minlength=world) / copy for end in (src, dst))
    zero, one = np.zeros_like(src), np.ones_like(src)
    messages = Messages(src, dst, np.full_like(src, EXCHANGE_LANE), zero, one, size)
    return Workload(exchange.name, 1, world, np.zeros(world), np.zeros((1, world)), pack, unpack, messages)


def _own_bytes(shape: Shape, direction: Direction) -> int:
    """Bytes of an own row that a pass touches outside of kernels: backward zeroes gradients and multiplies dout by out."""
    if direction == "forward":
        return 0
    wide = shape.accumulate.itemsize
    gradients = (shape.heads * shape.d + shape.kv_heads * (shape.d + shape.d_v)) * wide
    return gradients + shape.heads * shape.d_v * shape.dtype.itemsize


def _compute(plan: Plan, shapes: Sequence[Shape], cluster: Cluster) -> np.ndarray:
    """Seconds of kernels, float64 [stages, P inner, slices]; tasks of one stage, rank and pair of stores are one launch."""
    tasks, bands = plan.tasks, plan.bands
    task = plan.task_of_band  # a task without bands launches nothing
    stores = (plan.stores(tasks[:, RANK], tasks[:, owner]) for owner in (Q_OWNER, KV_OWNER))
    number, first = groups(tasks[:, STAGE], tasks[:, RANK], *stores)
    launch = number[task]
    place = tasks[first, STAGE] * plan.world + tasks[first, RANK]
    launched = np.bincount(launch, minlength=len(first)) > 0
    area, rows, keys = areas(bands), bands[:, Q1] - bands[:, Q0], bands[:, K1] - bands[:, K0]
    made: dict[Shape, np.ndarray] = {}
    for shape in dict.fromkeys(shapes):
        seconds = cluster.task_seconds(area, rows, keys, shape, plan.direction, launch)
        by_launch = launched * cluster.launch_seconds(plan.direction)
        by_launch += np.bincount(launch, weights=seconds, minlength=len(first))
        made[shape] = np.bincount(place, weights=by_launch, minlength=plan.stages * plan.world)
    return np.stack([made[shape].reshape(plan.stages, plan.world) for shape in shapes], axis=2)


def _messages(plan: Plan, shapes: Sequence[Shape], cluster: Cluster) -> tuple[Messages, np.ndarray, np.ndarray]:
    """(messages of all slices, seconds of packing, seconds of unpacking)."""
    t, slices, world = plan.transfers, len(shapes), plan.world * len(shapes)
    number, first = groups(t[:, POST], t[:, LANE], t[:, NEED], t[:, SRC], t[:, DST])
    post, lane, need, src, dst = (t[first, c] for c in (POST, LANE, NEED, SRC, DST))
    rows = t[:, STOP] - t[:, START]
    per_row = np.array([[shape.row_bytes(what) for what in What] for shape in shapes], dtype=np.int64)
    packed, unpacked = _copies(plan, number)
    copy = cluster.host.copy_gb_s * 1e9
    sizes, pack, unpack = (
        np.zeros((n, slices)) for n in (len(first), (plan.stages + 1) * plan.world, (plan.stages + 1) * plan.world)
    )
    for i in range(slices):
        size = rows * per_row[i, t[:, WHAT]]
        sizes[:, i] = np.bincount(number, weights=size, minlength=len(first))
        at = t[:, POST] * plan.world + t[:, SRC]
        pack[:, i] = np.bincount(at, weights=size * packed / copy, minlength=len(pack))
        at = t[:, NEED] * plan.world + t[:, DST]
        unpack[:, i] = np.bincount(at, weights=size * unpacked / copy, minlength=len(pack))
    every = np.arange(slices)
    src, dst = ((x[:, None] * slices + every).ravel() for x in (src, dst))
    lane, post, need = (np.repeat(x, slices) for x in (lane, post, need))
    messages = Messages(src, dst, lane, post, need, sizes.astype(np.int64).ravel())
    return messages, pack.reshape(plan.stages + 1, world), unpack.reshape(plan.stages + 1, world)


def _copies(plan: Plan, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(copies that each transfer costs its sender, its receiver): none where a whole buffer travels as it lies."""
    t = plan.transfers
    if not len(t):
        return np.zeros(0), np.zeros(0)
    item, of_item = groups(number, t[:, OWNER], t[:, WHAT])
    items = np.bincount(number[of_item], minlength=int(number.max()) + 1)

    def messages_of_buffer(end: int) -> np.ndarray:
        buffer, _ = groups(t[of_item, end], plan.stores(t[of_item, end], t[of_item, OWNER]), t[of_item, WHAT])
        return np.bincount(buffer)[buffer][item]

    alone, is_sum = items[number] == 1, t[:, WHAT] >= What.OUT
    relayed = t[:, SRC] != t[:, OWNER]
    packed = np.where(relayed & alone & (messages_of_buffer(SRC) == 1), 0.0, 1.0)
    unpacked = np.where(alone & (messages_of_buffer(DST) == 1), 0.0, 1.0)
    return packed, np.where(is_sum, ADDING, unpacked)
