"""schedule="auto": the strategy with the least simulated time among all that fit, and why not the others.

Candidates are layouts x schedules x Ulysses degrees x parts of a gather. A bound that no simulation can be below comes first:
kernels at their rate on the busiest rank, and needed rows at the rate of its slowest link. Strategies are then simulated from
the lowest bound on, at most 16 of them and none that cannot be noticeably faster than the best found so far. The same on every
rank: nothing is measured here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas
from distattn.parallel.cluster import Cluster
from distattn.parallel.intervals import Intervals, union
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import What
from distattn.parallel.price import WHOLE_TREE, Price, exchanges, looked_at, price, slices_of
from distattn.parallel.schedules import LAYOUTS, SCHEDULES, checked_strategy, make_layout
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import Keep

logger = logging.getLogger(__name__)

GATHER_STAGES = (1, 2, 4, 8)
MOST = 16  # strategies that are simulated unless all are asked for
NOTICEABLE = 0.02  # of the time; descriptions of clusters are not better than that
MEMORY_SHARE = 0.25  # of a device for rows of others, where nobody says how much


@dataclass(frozen=True)
class Auto:
    """Heads and machines to choose a strategy for: what ``ContextParallel(schedule=...)`` takes instead of a name.

    The first packed documents of a length decide for all of that length and options: they differ from step to step, and are not
    priced anew. Other masks are priced one by one. Every rank comes to the same choice without asking the others.

    Args:
        shape: of the attention calls, all heads.
        memory_gb: what rows of other ranks may take on a device, 1e9 bytes; None: a quarter of its memory.
    """

    shape: Shape
    cluster: Cluster
    memory_gb: float | None = None
    keep: Keep = "last"
    _chosen: dict[tuple[str, int, int], Strategy] = field(default_factory=dict, compare=False)

    def choose(self, mask: Mask, world: int) -> Strategy:
        """The strategy for a mask; said once to the log.

        Raises:
            ValueError: see :func:`decide`.
        """
        if mask.n_tokens < world:
            return Strategy(keep=self.keep)  # a prompt of a few tokens: nothing to gain
        options = mask.name.partition(",")[2]  # of documents(COUNT, options)
        kind = (f"documents,{options}" if mask.lengths is not None else mask.digest.hex()), mask.n_tokens, world
        if kind not in self._chosen:
            best = decide(mask, world, self.shape, self.cluster, self.memory_gb, self.keep).best
            self._chosen[kind] = best.strategy
            text = "%r on %d ranks of %s: %s, simulated %.3g ms forward and backward"
            logger.info(text, mask, world, self.cluster.name, best.strategy, best.seconds * 1e3)
        return self._chosen[kind]


@dataclass(frozen=True)
class Candidate:
    """One strategy: what it cannot be faster than, its price if it was simulated, and why it is not the choice ("" if it is)."""

    strategy: Strategy
    bound: float
    price: Price | None
    refused: str


@dataclass(frozen=True)
class Decision:
    """The choice, and every candidate: simulated ones by time, then the others by bound."""

    best: Price
    candidates: list[Candidate]


def decide(
    mask: Mask,
    world: int,
    shape: Shape,
    cluster: Cluster,
    memory_gb: float | None = None,
    keep: Keep = "last",
    noticeable: float | None = NOTICEABLE,
    say: Callable[[str], None] | None = None,
) -> Decision:
    """The strategy for a mask and shape on ``world`` ranks of a cluster.

    Args:
        memory_gb: what rows of other ranks may take on a device, 1e9 bytes; None: a quarter of its memory.
        noticeable: part of the time by which another strategy must be able to win to be simulated; None: all are simulated.
        say: told about each strategy that is simulated.

    Raises:
        ValueError: the cluster does not hold the ranks or knows no such dtype; nothing fits the memory.
    """
    cluster.check_world(world)
    if mask.n_tokens < world:
        raise ValueError(
            f"{world} ranks are more than the {mask.n_tokens} tokens of {mask!r}. Use {max(1, mask.n_tokens)} or fewer."
        )
    limit = (MEMORY_SHARE * cluster.memory_gb if memory_gb is None else memory_gb) * 1e9
    bounded = sorted(((bound, i, s) for i, (s, bound) in enumerate(_bounds(mask, world, shape, cluster, keep))))
    best: Price | None = None
    priced: list[tuple[Strategy, float, Price]] = []
    rest: list[tuple[Strategy, float]] = []
    for bound, _, strategy in bounded:
        if best is not None and noticeable is not None and (bound >= (1 - noticeable) * best.seconds or len(priced) >= MOST):
            rest.append((strategy, bound))
            continue
        found = price(strategy, mask, world, shape, cluster, compile_below=best.seconds if best else np.inf)
        priced.append((strategy, bound, found))
        if say is not None:
            say(f"{strategy}: {found.seconds * 1e3:.3g} ms")
        if found.buffer_bytes <= limit and (best is None or found.seconds < best.seconds):
            best = found
    if best is None:
        least = min(priced, key=lambda p: p[2].buffer_bytes)
        raise ValueError(
            f"No schedule fits {limit / 1e9:.3g} GB of buffers for {mask!r} on {world} ranks. The least is {least[0]} with "
            f"{least[2].buffer_bytes / 1e9:.3g} GB: give that much memory, or use more ranks."
        )
    candidates = [_judged(*entry, best, limit) for entry in sorted(priced, key=lambda p: p[2].seconds)]
    candidates += [Candidate(s, bound, None, f"not simulated: {bound / best.seconds:.3f} x or more") for s, bound in rest]
    return Decision(best, candidates)


def _judged(strategy: Strategy, bound: float, found: Price, best: Price, limit: float) -> Candidate:
    if found is best:
        return Candidate(strategy, bound, found, "")
    if found.buffer_bytes > limit:
        text = f"{found.buffer_bytes / 1e9:.3g} GB of buffers, {limit / 1e9:.3g} given"
        return Candidate(strategy, bound, found, text)
    return Candidate(strategy, bound, found, f"{found.seconds / best.seconds:.3f} x the best")


def candidates(world: int, shape: Shape, cluster: Cluster, keep: Keep = "last") -> Iterator[Strategy]:
    """All strategies that fit the ranks, the nodes and the heads."""
    devices = min(world, cluster.devices)
    for u in range(1, min(world, shape.heads) + 1):
        if world % u or (devices % u and u % devices):
            continue
        base = Strategy(ulysses=u, devices=devices, keep=keep)
        if u == world:
            yield base
            continue
        nodes, inside = (world // devices, devices // u) if u <= devices else (world // u, 1)
        for name in ("zigzag", "striped", "ring"):
            yield replace(base, schedule=name)
        for layout in LAYOUTS:
            if nodes > 1 and inside > 1:
                yield replace(base, schedule="double_ring", layout=layout)
            for stages in GATHER_STAGES:
                if stages < max(2, world // u):
                    yield replace(base, schedule="gather", layout=layout, stages=stages)
            if world // u <= WHOLE_TREE:
                yield replace(base, schedule="tree", layout=layout)


def _bounds(mask: Mask, world: int, shape: Shape, cluster: Cluster, keep: Keep) -> Iterator[tuple[Strategy, float]]:
    """Each candidate with its bound in seconds; what they share is looked at once."""
    seen: dict[tuple[str, int], _Sample] = {}
    for strategy in candidates(world, shape, cluster, keep):
        checked_strategy(strategy, world)
        key = strategy.layout or SCHEDULES[strategy.schedule].layout, strategy.ulysses
        if key not in seen:
            seen[key] = _look(strategy, mask, world, shape, cluster)
        yield strategy, seen[key].bound(strategy.schedule)


@dataclass(frozen=True)
class _Sample:
    """Seconds that some ranks of a layout cannot do without, forward and backward; float64 [sampled]."""

    compute: tuple[np.ndarray, np.ndarray]
    compute_by_keys: tuple[np.ndarray, np.ndarray]  # where the owner of the keys computes
    keys: tuple[np.ndarray, np.ndarray]  # needed key rows on links between nodes
    queries: tuple[np.ndarray, np.ndarray]  # foreign query rows that see own keys, and what they bring home, at the port
    turns: bool  # a ring's backward pass may move queries instead
    devices: int  # that may share these rows, of a double ring
    exchange: float

    def bound(self, schedule: str) -> float:
        """Of one strategy on this layout."""
        work, links = (self.compute_by_keys, self.queries) if schedule == "tree" else (self.compute, self.keys)
        shared = 1 / self.devices if schedule == "double_ring" else 1.0
        if self.turns and SCHEDULES[schedule].turned is not None:
            links = links[0], np.zeros_like(links[1])
        passes = [np.maximum(busy, shared * rows).max(initial=0.0) for busy, rows in zip(work, links, strict=True)]
        return float(sum(passes)) + self.exchange


def _look(strategy: Strategy, mask: Mask, world: int, shape: Shape, cluster: Cluster) -> _Sample:
    u = strategy.ulysses
    layout, inner = make_layout(strategy, mask, world)
    part = slices_of(shape, u)[0]
    ranks = looked_at(mask, inner)
    here, there = (x.ravel() for x in np.meshgrid(np.arange(len(ranks)), np.arange(inner.world), indexing="ij"))
    table, pair = local_bands(mask, inner, ranks[here], there)
    seconds = _kernel_seconds(table, pair, here, part, cluster)
    nothing = np.zeros(len(ranks)), np.zeros(len(ranks))
    grows = inner.world <= WHOLE_TREE
    by_keys, queries = _as_a_tree(mask, inner, ranks, part, cluster) if grows else (nothing, nothing)
    far = ranks[here] * u // cluster.devices != there * u // cluster.devices
    runs = union(Intervals(pair[far[pair]], table[far[pair], K0], table[far[pair], K1]))
    rows = np.bincount(here[runs.key], weights=runs.rows, minlength=len(ranks))
    rate = cluster.between.nic_gb_s * 1e9 if cluster.between else np.inf
    links = rows * part.row_bytes(What.KV) / rate, rows * part.row_bytes(What.DKV) / rate
    q = sum(part.row_bytes(what) for what in (What.Q, What.DOUT, What.DQ))
    turns = q < part.row_bytes(What.KV) + part.row_bytes(What.DKV)
    return _Sample(seconds, by_keys, links, queries, turns, max(1, cluster.devices // u), _exchange(layout, u, shape, cluster))


def _kernel_seconds(
    table: np.ndarray, pair: np.ndarray, here: np.ndarray, part: Shape, cluster: Cluster
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of kernels of each sampled rank, forward and backward; bands of a pair of shards are one launch."""
    sides = areas(table), table[:, Q1] - table[:, Q0], table[:, K1] - table[:, K0]
    forward, backward = (
        np.bincount(here[pair], weights=cluster.task_seconds(*sides, part, direction, pair), minlength=int(here.max()) + 1)
        for direction in ("forward", "backward")
    )
    return forward, backward


def _as_a_tree(
    mask: Mask, inner: Layout, ranks: np.ndarray, part: Shape, cluster: Cluster
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Seconds of the owners of keys: of kernels, and in which queries come and gradients go were all at the fastest link."""
    there, here = (x.ravel() for x in np.meshgrid(np.arange(inner.world), np.arange(len(ranks)), indexing="ij"))
    table, pair = local_bands(mask, inner, there, ranks[here])
    seconds = _kernel_seconds(table, pair, here, part, cluster)
    foreign = (there != ranks[here])[pair]
    runs = union(Intervals(pair[foreign], table[foreign, Q0], table[foreign, Q1]))
    rows = np.bincount(here[runs.key], weights=runs.rows, minlength=len(ranks))
    rate = max(cluster.inside.port_gb_s, cluster.between.nic_gb_s if cluster.between else 0.0) * 1e9
    back = max(part.row_bytes(What.DQ), part.row_bytes(What.DOUT))
    return seconds, (rows * max(part.row_bytes(What.Q), part.row_bytes(What.OUT)) / rate, rows * back / rate)


def _exchange(layout: Layout, ulysses: int, shape: Shape, cluster: Cluster) -> float:
    """Seconds of the head exchanges of the rank that sends most, at the rate of its links."""
    total = 0.0
    for exchange in (e for pair in exchanges(layout, ulysses, shape) for e in pair):
        rank = np.arange(layout.world)[:, None]
        member = rank // ulysses * ulysses + np.arange(ulysses)
        far = rank // cluster.devices != member // cluster.devices
        inside = np.where(far | (rank == member), 0, exchange.sizes).sum(1) / (cluster.inside.port_gb_s * 1e9)
        between = np.where(far, exchange.sizes, 0).sum(1) / (cluster.between.nic_gb_s * 1e9 if cluster.between else np.inf)
        total += float(np.maximum(inside, between).max(initial=0.0))
    return total
