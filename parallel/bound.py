"""What no simulation of a strategy can be below, so that most strategies need no plan.

A cheap bound first: the mean work at the best rate, and the rows that must reach some ranks over their links, counted from the
ranges of positions that they see. Its cost is that of meetings of bands with segments of these ranks. Then a close one: the same
rows, and kernels of every piece of work of these ranks. Schedules on one layout and Ulysses degree share what is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from distattn.kernels.bands import K0, K1, Q0, Q1, areas
from distattn.parallel.cluster import Cluster, Direction, pair_flops
from distattn.parallel.intervals import expand
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands, seen_positions
from distattn.parallel.mask import Mask
from distattn.parallel.plan import What
from distattn.parallel.price import WHOLE_TREE, exchanges, looked_at, slices_of
from distattn.parallel.schedules import SCHEDULES, make_layout
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy

Passes = tuple[np.ndarray, np.ndarray]  # seconds forward and backward, float64 [ranks that are looked at]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


@dataclass(frozen=True)
class _Look:
    """What some ranks of a layout cannot do without.

    Attributes:
        ranks: of the plan, int64.
        compute: in kernels.
        keys: in which the key rows that they need come over links between nodes, and gradients go.
        queries: of owners of keys, in which foreign queries come, and what they bring home goes.
        turns: whether a ring's backward pass may move queries instead.
        devices: that may share the keys, of a double ring.
        exchange: seconds of the head exchanges.
    """

    inner: Layout
    ranks: np.ndarray
    part: Shape
    compute: Passes
    keys: Passes
    queries: Passes
    turns: bool
    devices: int
    exchange: float

    def bound(self, schedule: str) -> float:
        """Of one schedule on this layout; of a disaggregation without what travels, which is its own choice."""
        if schedule == "disaggregate":
            return float(sum(busy.max(initial=0.0) for busy in self.compute)) + self.exchange
        links = self.queries if schedule == "tree" else self.keys
        shared = 1 / self.devices if schedule == "double_ring" else 1.0
        if self.turns and SCHEDULES[schedule].turned is not None:
            links = links[0], np.zeros_like(links[1])
        passes = [np.maximum(busy, shared * rows).max(initial=0.0) for busy, rows in zip(self.compute, links, strict=True)]
        return float(sum(passes)) + self.exchange


class Bounds:
    """Bounds of strategies for one mask, world, shape and cluster."""

    def __init__(self, mask: Mask, world: int, shape: Shape, cluster: Cluster):
        self.mask, self.world, self.shape, self.cluster = mask, world, shape, cluster
        self._looks: dict[tuple[str, int], _Look] = {}
        self._kernels: dict[tuple[str, int, bool], Passes] = {}

    def cheap(self, strategy: Strategy) -> float:
        """Seconds, from what ranks see."""
        return self._look(strategy).bound(strategy.schedule)

    def close(self, strategy: Strategy) -> float:
        """Seconds, from the pieces of work too; never below :meth:`cheap`."""
        if strategy.schedule == "disaggregate":  # nobody need work on the pieces of its own rows
            return self.cheap(strategy)
        look, by_keys = self._look(strategy), strategy.schedule == "tree"
        key = (*_place(strategy), by_keys)
        if key not in self._kernels:
            self._kernels[key] = self._seconds_of_pieces(look, by_keys)
        forward, backward = (np.maximum(*both) for both in zip(look.compute, self._kernels[key], strict=True))
        return replace(look, compute=(forward, backward)).bound(strategy.schedule)

    def _look(self, strategy: Strategy) -> _Look:
        if _place(strategy) not in self._looks:
            layout, inner = make_layout(strategy, self.mask, self.world)
            self._looks[_place(strategy)] = self._looked(layout, inner, strategy.ulysses)
        return self._looks[_place(strategy)]

    def _looked(self, layout: Layout, inner: Layout, u: int) -> _Look:
        cluster, part, ranks = self.cluster, slices_of(self.shape, u)[0], looked_at(self.mask, inner)
        pairs = self.mask.bands.area / inner.world * part.heads
        forward, backward = (
            np.full(len(ranks), pairs * pair_flops(part, way) / (cluster.peak(part) * cluster.curve(way).best(part.d)))
            for way in DIRECTIONS
        )
        q = sum(part.row_bytes(what) for what in (What.Q, What.DOUT, What.DQ))
        return _Look(
            inner=inner,
            ranks=ranks,
            part=part,
            compute=(forward, backward),
            keys=self._keys(inner, ranks, part, u),
            queries=self._queries(inner, ranks, part, u),
            turns=q < part.row_bytes(What.KV) + part.row_bytes(What.DKV),
            devices=max(1, cluster.devices // u),
            exchange=_exchange(layout, u, self.shape, cluster),
        )

    def _keys(self, inner: Layout, ranks: np.ndarray, part: Shape, u: int) -> Passes:
        """Seconds of needed keys on links between nodes."""
        if self.cluster.between is None:
            return np.zeros(len(ranks)), np.zeros(len(ranks))
        node = np.arange(inner.world) * u // self.cluster.devices
        rate = self.cluster.between.nic_gb_s * 1e9
        rows = _rows_seen(self.mask, inner, ranks, node[ranks][:, None] != node)
        return rows * part.row_bytes(What.KV) / rate, rows * part.row_bytes(What.DKV) / rate

    def _queries(self, inner: Layout, ranks: np.ndarray, part: Shape, u: int) -> Passes:
        """Seconds of a tree's queries: all at the fastest link, and on the network those that enter the node at this device.

        A tree brings the queries of device d of one node to device d of another.
        """
        none = np.zeros(len(ranks))
        if inner.world > WHOLE_TREE:
            return none, none
        mask = Mask(self.mask.bands.transpose(), self.mask.n_tokens, self.mask.name)
        cluster, every = self.cluster, np.arange(inner.world)
        network = cluster.between.nic_gb_s if cluster.between else 0.0
        seconds = _rows_seen(mask, inner, ranks, ranks[:, None] != every) / max(cluster.inside.port_gb_s, network)
        if network and self.world > cluster.devices:
            devices = max(1, cluster.devices // u)
            rail = (ranks[:, None] % devices == every % devices) & (ranks[:, None] // devices != every // devices)
            seconds = np.maximum(seconds, _rows_seen(mask, inner, ranks, rail) / network)
        there, back = ((What.Q, What.OUT), (What.DQ, What.DOUT))
        forward, backward = (seconds * 1e-9 * max(part.row_bytes(what) for what in kinds) for kinds in (there, back))
        return forward, backward

    def _seconds_of_pieces(self, look: _Look, by_keys: bool) -> Passes:
        """Seconds of kernels of each rank that is looked at; bands of a pair of shards are one launch."""
        here, there = (x.ravel() for x in np.meshgrid(np.arange(len(look.ranks)), np.arange(look.inner.world), indexing="ij"))
        sides = (there, look.ranks[here]) if by_keys else (look.ranks[here], there)
        table, pair = local_bands(self.mask, look.inner, *sides)
        pieces = areas(table), table[:, Q1] - table[:, Q0], table[:, K1] - table[:, K0]
        forward, backward = (
            np.bincount(here[pair], self.cluster.task_seconds(*pieces, look.part, way, pair), minlength=len(look.ranks))
            for way in DIRECTIONS
        )
        return forward, backward


def _place(strategy: Strategy) -> tuple[str, int]:
    """What strategies share that hold the same rows on the same ranks."""
    return strategy.layout or SCHEDULES[strategy.schedule].layout, strategy.ulysses


def _rows_seen(mask: Mask, layout: Layout, ranks: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Rows of ``owners`` (bool [ranks, P]) whose keys each of the ranks sees, at least; float64 [ranks]."""
    runs = seen_positions(mask, layout, ranks)
    few = owners.sum(1).max(initial=0) * 2 <= layout.world
    counted = owners if few else ~owners  # whatever are fewer
    index, owner = np.nonzero(counted)
    first, stop = np.searchsorted(index, runs.key, "left"), np.searchsorted(index, runs.key, "right")
    run, at = expand(first, stop)
    rows = layout.rows_before(owner[at], runs.stop[run]) - layout.rows_before(owner[at], runs.start[run])
    held = np.bincount(runs.key[run], rows, minlength=len(ranks))
    return held if few else np.bincount(runs.key, runs.rows, minlength=len(ranks)) - held


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
