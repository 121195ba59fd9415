"""Tree attention: the owner of the keys computes, queries go down a tree, partial (o, lse) are merged on the way up.

Shyam et al., "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters", as a schedule for
training and prefill. The tree is binomial over nodes and, below each node's first device, binomial over its devices: a node
gets an owner's queries in one message and answers in one. Owners take turns, so that few of them are in flight.
"""

from __future__ import annotations

import numpy as np

from distattn.kernels.bands import Q0, Q1
from distattn.parallel.intervals import Intervals, union
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import HOME_LANE, OWNER, POST, Q_OWNER, Q_START, RANK, SRC, STAGE, START, WHAT, Plan, What
from distattn.parallel.schedules.build import PlacedBands, check_rank, forward_plan, local_tasks, nodes_of

INNER_LANE, OUTER_LANE = 0, 1


class Tree:
    """The trees of all owners over (nodes, devices). A rank's place in the tree of an owner is (node, device) offset from it.

    Arguments and results are int64 arrays of (owner, rank) pairs.
    """

    def __init__(self, nodes: int, devices: int):
        self.nodes, self.devices = nodes, devices
        self.node_depth = (nodes - 1).bit_length()
        self.depth = self.node_depth + (devices - 1).bit_length()

    def _place(self, owner: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (rank // self.devices - owner // self.devices) % self.nodes, (rank - owner) % self.devices

    def level(self, owner: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Hops after which the queries are there, counted so that all nodes begin their inner trees at once; 0 for the owner."""
        node, device = self._place(owner, rank)
        return np.where(device > 0, self.node_depth + _bits(device), _bits(node))

    def parent(self, owner: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The rank that a rank other than the owner has the queries from."""
        node, device = self._place(owner, rank)
        node, device = np.where(device > 0, node, _without_top(node)), _without_top(device)
        return (owner // self.devices + node) % self.nodes * self.devices + (owner + device) % self.devices

    def below(self, owner: np.ndarray, rank: np.ndarray, top: np.ndarray) -> np.ndarray:
        """Whether ``rank`` is ``top`` or has the queries from it, directly or not."""
        node, device = self._place(owner, rank)
        top_node, top_device = self._place(owner, top)
        inside = (node == top_node) & (device % (1 << _bits(top_device)) == top_device)
        return np.where(top_device > 0, inside, node % (1 << _bits(top_node)) == top_node)


class Turns:
    """When each owner's queries leave: ``together`` owners every ``every`` stages, as many as keep at most ``in_flight``."""

    def __init__(self, world: int, depth: int, in_flight: int):
        flight = 2 * depth + 1
        self.together = max(1, in_flight // flight)
        self.every = -(-flight // in_flight) if in_flight < flight else 1
        self.stages = (world - 1) // self.together * self.every + flight

    def __getitem__(self, owner: np.ndarray) -> np.ndarray:
        return owner // self.together * self.every


def tree(layout: Layout, mask: Mask, devices: int | None = None, in_flight: int | None = None, rank: int | None = None) -> Plan:
    """The tree schedule of any layout: an owner's queries go down, are worked on by all ranks in one stage, and answers go up.

    With ``depth`` = ceil(log2 nodes) + ceil(log2 devices), queries that leave at boundary b reach level l at boundary b + l,
    are worked on in stage b + depth, and come back merged at boundary b + 2 depth + 1. Own keys are worked on in stage 0. Rows
    that nobody below needs are not sent down; a rank that computes nothing and passes nothing on gets no message.

    Volume: each edge of an owner's tree carries its queries once down and one partial result up; between nodes there are
    nodes - 1 edges an owner. Memory: shards of queries or results of at most ``in_flight`` owners, and of both of the owners
    that are worked on.

    Args:
        devices: ranks a node; None: all are in one.
        in_flight: owners whose queries or results are on the way at once; None: 2 depth + 1, one in each stage of the way.
        rank: make the bands of this rank only, and of the tables what its views need: its own tree and those parts of the
            others' that lie below its parent there.

    Raises:
        ValueError: where ``devices`` does not divide the world, or for less than one owner in flight.
    """
    world = layout.world
    shape = Tree(nodes_of(world, world if devices is None else devices), world if devices is None else devices)
    check_rank(rank, world)
    if in_flight is not None and (not isinstance(in_flight, (int, np.integer)) or in_flight < 1):
        raise ValueError(f"tree was asked for with in_flight = {in_flight!r} owners. Pass a whole number of 1 or more, or None.")
    most = 2 * shape.depth + 1 if in_flight is None else int(in_flight)
    turns = Turns(world, shape.depth, most)
    owner, at = _pairs(shape, world, rank)
    table, pair = local_bands(mask, layout, owner, at)
    owner, at = owner[pair], at[pair]
    foreign = owner != at
    own_use = union(Intervals((owner * world + at)[foreign], table[foreign, Q0], table[foreign, Q1]))
    tasks = np.concatenate([local_tasks(layout), _tasks(layout, own_use, turns, shape.depth)])
    tasks = tasks[np.lexsort((tasks[:, Q_START], tasks[:, Q_OWNER], tasks[:, RANK], tasks[:, STAGE]))]
    mine = slice(None) if rank is None else at == rank
    bands = PlacedBands(table[mine], owner[mine], at[mine])
    transfers = _transfers(shape, turns, _edges(shape, own_use, world, rank), world)
    bound = (min(most, world - 1) + min(turns.together, world - 1)) * int(layout.rows_all.max(initial=0))
    return forward_plan("tree", layout, mask, turns.stages, tasks, bands, transfers, "q", bound, rank, shape.depth)


def _pairs(shape: Tree, world: int, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(owner of the queries, owner of the keys) of the pairs of shards to look at."""
    owner, at = (x.ravel() for x in np.meshgrid(np.arange(world), np.arange(world), indexing="ij"))
    if rank is None:
        return owner, at
    seen = _known(shape, owner, at, rank)
    return owner[seen], at[seen]


def _known(shape: Tree, owner: np.ndarray, at: np.ndarray, rank: int) -> np.ndarray:
    """Places of trees about which ``rank`` must know: all of its own tree, of the others' what lies below its parent there."""
    here = np.full_like(owner, rank)
    parent = np.where(owner == rank, rank, shape.parent(owner, here))
    return (owner == rank) | shape.below(owner, at, np.where(parent == owner, rank, parent))


def _tasks(layout: Layout, use: Intervals, turns: Turns, depth: int) -> np.ndarray:
    owner, at = use.key // layout.world, use.key % layout.world
    return np.stack([turns[owner] + depth, at, owner, use.start, use.stop, at, np.zeros_like(at), layout.rows_all[at]], 1)


def _edges(shape: Tree, use: Intervals, world: int, rank: int | None) -> Intervals:
    """Rows that go down to (owner, child): what the child or any rank below it works on. Key: owner * world + child."""
    edges = [Intervals(*(np.zeros(0, dtype=np.int64),) * 3)]
    for level in range(shape.depth, 0, -1):
        owner, at = use.key // world, use.key % world
        here = shape.level(owner, at) == level
        passed = union(Intervals(*(column[here] for column in use)))
        edges.append(passed)
        owner, child = passed.key // world, passed.key % world
        above = Intervals(owner * world + shape.parent(owner, child), passed.start, passed.stop)
        use = Intervals(*(np.concatenate([a[~here], b]) for a, b in zip(use, above, strict=True)))
    whole = Intervals(*(np.concatenate(column) for column in zip(*edges, strict=True)))
    if rank is None:
        return whole
    owner, child = whole.key // world, whole.key % world
    known = _known(shape, owner, child, rank)  # further up not all that lies below was looked at
    return Intervals(*(column[known] for column in whole))


def _transfers(shape: Tree, turns: Turns, edges: Intervals, world: int) -> np.ndarray:
    """Queries down every edge, one partial result up."""
    owner, child = edges.key // world, edges.key % world
    parent, level, leave = shape.parent(owner, child), shape.level(owner, child), turns[owner]
    lane = np.where(parent // shape.devices == child // shape.devices, INNER_LANE, OUTER_LANE)
    rows = [owner, edges.start, edges.stop]
    down = [parent, child, *rows, np.full_like(owner, What.Q), lane, leave + level - 1, leave + level]
    back = leave + 2 * shape.depth + 1 - level
    up = [child, parent, *rows, np.full_like(owner, What.OUT), np.full_like(owner, HOME_LANE), back, back + 1]
    table = np.concatenate([np.stack(down, 1), np.stack(up, 1)])
    return table[np.lexsort(tuple(table[:, c] for c in (START, SRC, OWNER, WHAT, POST)))]


def _bits(x: np.ndarray) -> np.ndarray:
    """Binary digits of each number; 0 has none."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


def _without_top(x: np.ndarray) -> np.ndarray:
    """Each number without its highest binary digit."""
    return np.where(x > 0, x - (1 << np.maximum(_bits(x) - 1, 0)), 0)
