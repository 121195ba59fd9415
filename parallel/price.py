"""What a strategy costs on a cluster, in seconds and bytes: a whole schedule simulated, or some of its ranks.

Plans of more than 64 ranks are priced by the views of a few: the rank with the most work and those at the borders of its node,
which use the slow links (its whole node, where devices share links). The others are taken to be ready whenever one of these
is, so that what they wait for themselves is left out: a chain that is slow elsewhere looks faster than it is. A disaggregation is
one decision for all ranks, so that its plan is made once and simulated whole at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from distattn.kernels.bands import areas
from distattn.parallel.cluster import Cluster
from distattn.parallel.head_split import HeadSplit, bytes_of, inner_shape, row_parts
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import DST, SRC, STAGE, START, STOP, WHAT, Plan, What
from distattn.parallel.schedule import Rotation, make_schedule
from distattn.parallel.schedules import make_layout
from distattn.parallel.shape import Shape
from distattn.parallel.simulate import PassTimes, peak_buffer_bytes, simulate_pass
from distattn.parallel.statistics import peak_buffer_rows, work
from distattn.parallel.strategy import Strategy
from distattn.parallel.workload import Exchange

WHOLE = 64  # ranks of a plan up to which all of them are simulated
WHOLE_TREE = 128  # of a tree, whose ranks wait for each other's turns: a few of them do not stand for all
MADE_WHOLE = ("disaggregate",)  # schedules that make the plan of all ranks whichever is asked for
LOOKED_AT = 16  # ranks whose work is counted to find the busiest of a larger plan, fewer where they meet many bands
MEETINGS = 1 << 19  # of bands with pairs of ranks that are worth looking at; ranks that have part in all documents are alike


@dataclass(frozen=True)
class Price:
    """One strategy on one mask, shape and cluster.

    Attributes:
        forward, backward: seconds of attention with its head exchanges, until the last rank is done.
        exposed: seconds of both in which the rank that lasts longest waited for what was on its way.
        balance: mask area of the busiest rank over the mean, forward; where ranks are sampled, of the busiest of those.
        bytes_inside, bytes_between: the most that a rank sends to its node, and the most that one sends to others, both passes.
        buffer_bytes: what the executor and the head exchange allocate for rows of others on the rank that holds most rows:
            buffers, messages, and what stays for the backward pass (buffers only, where the programs were not compiled).
        rotation: what the backward pass moves. Slices of the heads are all priced with that of the first, a largest one.
        simulated: ranks of the world that were; all of them, or a sample.
    """

    strategy: Strategy
    forward: PassTimes
    backward: PassTimes
    exposed: float
    balance: float
    bytes_inside: int
    bytes_between: int
    buffer_bytes: int
    simulated: list[int]
    rotation: Rotation

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward.seconds + self.backward.seconds


def slices_of(shape: Shape, ulysses: int) -> list[Shape]:
    """The shape that each rank of a head exchange attends with."""
    return [inner_shape(shape, part) for part in HeadSplit(shape.heads, shape.kv_heads, ulysses).slices]


def exchanges(layout: Layout, ulysses: int, shape: Shape) -> tuple[list[Exchange], list[Exchange]]:
    """(before and after the forward plan, before and after the backward plan); empty without a head exchange."""
    if ulysses == 1:
        return [], []
    parts = [row_parts(shape, part) for part in HeadSplit(shape.heads, shape.kv_heads, ulysses).slices]
    rows = layout.rows_all
    member = np.arange(layout.world) % ulysses
    of_group = rows.reshape(-1, ulysses).repeat(ulysses, axis=0)  # [P, u]: rows of each rank of the group

    def there(weights: list[int]) -> np.ndarray:
        return rows[:, None] * np.array(weights)

    def back(weights: list[int]) -> np.ndarray:
        return of_group * np.array(weights)[member][:, None]

    kinds = (("inputs", there), ("outputs", back), ("upstream", there), ("gradients", back))
    made = [Exchange(name, sizes([bytes_of(getattr(p, name)) for p in parts])) for name, sizes in kinds]
    return made[:2], made[2:]


def looked_at(mask: Mask, layout: Layout) -> np.ndarray:
    """Ranks from the first to the last whose work is counted, int64."""
    of_each = max(len(layout.seg_rank), len(mask.bands))  # about the meetings of one rank's bands with all ranks
    count = min(layout.world, LOOKED_AT, max(2, MEETINGS // max(1, of_each)))
    return np.unique(np.linspace(0, layout.world - 1, count).astype(np.int64))


def sample_of(mask: Mask, layout: Layout, devices: int, shared: bool, by_keys: bool = False) -> tuple[list[int], float]:
    """(inner ranks to simulate, mask area of the busiest looked-at rank over the mean).

    Args:
        shared: whether the devices of a node share links: then all of the busiest rank's node are simulated.
        by_keys: whether the owner of the keys computes.
    """
    world = layout.world
    looked = looked_at(mask, layout)
    here, there = (x.ravel() for x in np.meshgrid(looked, np.arange(world), indexing="ij"))
    table, pair = local_bands(mask, layout, there, here) if by_keys else local_bands(mask, layout, here, there)
    work = np.bincount(pair // world, weights=areas(table), minlength=len(looked))
    mean = mask.bands.area / world
    balance = float(work.max() / mean) if mean else 1.0
    busiest = int(looked[work.argmax()])
    node = busiest // devices * devices
    last = min(node + devices, world) - 1
    return list(range(node, last + 1)) if shared else sorted({node, busiest, last}), balance


def price(
    strategy: Strategy,
    mask: Mask,
    world: int,
    shape: Shape,
    cluster: Cluster,
    timeline: bool = False,
    compile_below: float = math.inf,
) -> Price:
    """Simulates a strategy.

    Args:
        compile_below: seconds; of what lasts longer the memory is counted in rows, without messages and the map of memory.

    Raises:
        ValueError: options that do not fit the world, heads that cannot be shared, a cluster that is too small.
    """
    u = strategy.ulysses
    shapes = slices_of(shape, u)
    most = WHOLE_TREE if strategy.schedule == "tree" else WHOLE
    make_whole = world // u <= most or strategy.schedule in MADE_WHOLE
    whole = make_schedule(strategy, mask, world) if make_whole else None
    layout, inner = (whole.layout, whole.inner) if whole else make_layout(strategy, mask, world)
    devices = max(1, cluster.devices // u)
    shared = cluster.inside.shared_gb_s is not None or bool(cluster.between and cluster.between.nics < cluster.devices)
    sample, balance = sample_of(mask, inner, devices, shared, by_keys=strategy.schedule == "tree")
    if whole:
        sample, done = list(range(inner.world)), work(whole.forward)
        if strategy.schedule in MADE_WHOLE and done.any():  # ranks do not compute their own rows
            balance = float(done.max() / done.mean())
    made = [whole] if whole else [make_schedule(strategy, mask, world, rank=rank * u) for rank in sample]
    rotation = made[0].rotation(shapes[0])
    plans = [s.forward for s in made], [s.backward(rotation) for s in made]
    plans = tuple(p[0] if whole else _joined([one.view(rank) for one, rank in zip(p, sample, strict=True)]) for p in plans)
    around = exchanges(layout, u, shape)
    forward, backward = (
        simulate_pass([*trades[:1], plan, *trades[1:]], shapes, cluster, timeline)
        for plan, trades in zip(plans, around, strict=True)
    )
    if forward.seconds + backward.seconds < compile_below:
        held = peak_buffer_bytes(plans[0], shapes[0], plans[1], 8 if whole else 2)
    else:
        held = max(int(peak_buffer_rows(plan, _row_bytes(shapes[0])).max(initial=0)) for plan in plans)
    held += _exchange_bytes(around, u)
    last = int(np.argmax(forward.finish + backward.finish))
    inside, between = _bytes_sent(plans, around, shapes[0], cluster, np.array(sample), u)
    return Price(
        strategy=strategy,
        forward=forward,
        backward=backward,
        exposed=float(forward.exposed[last] + backward.exposed[last]),
        balance=balance,
        bytes_inside=inside,
        bytes_between=between,
        buffer_bytes=held,
        simulated=[rank * u + i for rank in sample for i in range(u)],
        rotation=rotation,
    )


def _exchange_bytes(around: Sequence[Sequence[Exchange]], ulysses: int) -> int:
    """Bytes of the head exchanges on one rank: inputs that arrived and stay, and the largest exchange on its way, both ends."""
    if ulysses == 1:
        return 0
    arrived = [_arriving(e.sizes, ulysses) for pair in around for e in pair]
    largest = np.max(
        [e.sizes.sum(1) + come for e, come in zip((e for pair in around for e in pair), arrived, strict=True)], axis=0
    )
    return int((arrived[0] + largest).max())


def _arriving(sizes: np.ndarray, ulysses: int) -> np.ndarray:
    """Bytes that reach each rank of an exchange, its own among them; int64 [P]."""
    return sizes.reshape(-1, ulysses, ulysses).sum(1).ravel()


def _row_bytes(shape: Shape) -> np.ndarray:
    return np.array([shape.row_bytes(what) for what in What], dtype=np.int64)


def _joined(views: Sequence[Plan]) -> Plan:
    """A plan of all ranks in which only those of the views do anything; what two of them exchange is in it once."""
    tasks = np.concatenate([v.tasks for v in views])
    counts = np.concatenate([np.diff(v.band_ptr) for v in views])
    order = np.argsort(tasks[:, STAGE], kind="stable")
    place = np.argsort(order, kind="stable")
    task_of_band = np.repeat(np.arange(len(tasks)), counts)
    bands = np.concatenate([v.bands for v in views])[np.argsort(place[task_of_band], kind="stable")]
    seen = np.concatenate([v.transfers for v in views])
    return replace(
        views[0],
        rank=None,
        tasks=tasks[order],
        band_ptr=np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64),
        bands=bands,
        transfers=seen[np.sort(np.unique(seen, axis=0, return_index=True)[1])],
        kept=np.concatenate([v.kept for v in views]),
    )


def _bytes_sent(
    plans: Sequence[Plan],
    around: Sequence[Sequence[Exchange]],
    shape: Shape,
    cluster: Cluster,
    sample: np.ndarray,
    ulysses: int,
) -> tuple[int, int]:
    """Bytes that the busiest of the sampled ranks sends to its own node and to other nodes."""
    sent = np.zeros((2, plans[0].world), dtype=np.int64)
    for plan in plans:
        t = plan.transfers
        far = t[:, SRC] * ulysses // cluster.devices != t[:, DST] * ulysses // cluster.devices
        np.add.at(sent, (far.astype(np.int64), t[:, SRC]), (t[:, STOP] - t[:, START]) * _row_bytes(shape)[t[:, WHAT]])
    for exchange in (e for pair in around for e in pair):
        rank = sample * ulysses
        member = rank[:, None] + np.arange(ulysses)
        far = rank[:, None] // cluster.devices != member // cluster.devices
        for side in (0, 1):
            sent[side, sample] += np.where((far == side) & (member != rank[:, None]), exchange.sizes[rank], 0).sum(1)
    return int(sent[0, sample].max()), int(sent[1, sample].max())
