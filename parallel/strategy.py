"""Strategy: how a sequence is to be attended over ranks, as a user names it. Plain data, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from distattn.parallel.assign_cost import Cost
from distattn.parallel.cluster import Cluster, Direction
from distattn.parallel.shape import Shape
from distattn.parallel.transpose import Keep

DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")
Rotate = Literal["auto", "kv", "q"]


@dataclass(frozen=True)
class Balance:
    """How a disaggregation shares the work out.

    Args:
        forward, backward: what rows weigh in each pass; the backward plan is made for its own.
        tolerance: the most that a rank may have above its share, as a part of it; what cannot be reached is refused. None: the
            least from 0.01 on that can be, or where the costs know links the one with the least predicted time.
        receive_rows: rows of queries and keys that a rank may receive (buffers hold the results of foreign queries besides);
            None: as many as it takes.
        smallest: query rows of a piece that leaves its rank, unless its document is shorter.
        speeds: of every rank, relative to each other; None: all alike.
    """

    forward: Cost = field(default_factory=Cost)
    backward: Cost = field(default_factory=Cost)
    tolerance: float | None = None
    receive_rows: int | None = None
    smallest: int = 128
    speeds: tuple[float, ...] | None = None

    @classmethod
    def of(cls, shape: Shape, cluster: Cluster | None = None, devices: int | None = None, **options: Any) -> Balance:
        """With rows weighed in bytes that travel for these heads and dtypes.

        Args:
            cluster: what pairs and bytes take there counts too, links inside of nodes and between them apart.
            devices: ranks of the plan in one of its nodes; None: all of its devices.
        """
        if cluster is not None:
            forward, backward = (replace(Cost.of(cluster, shape, d), devices=devices or cluster.devices) for d in DIRECTIONS)
            return cls(forward, backward, **options)
        return cls(Cost.of_rows(shape, "forward"), Cost.of_rows(shape, "backward"), **options)


@dataclass(frozen=True)
class Strategy:
    """A schedule by name and its options; None is the schedule's own choice.

    Args:
        schedule: a name of ``distattn.parallel.schedules.SCHEDULES``.
        layout: "contiguous", "zigzag" or "striped" (the last two inside each document of a mask of documents).
        ulysses: ranks that exchange heads for tokens around the schedule; neighbours, so that they share a node.
        devices: ranks a node, rank = node * devices + device; None: all in one node.
        stages: of a gather, after the local one; of a disaggregation, parts of the work that is not local.
        in_flight: of a tree, owners whose queries are under way at once.
        rotate: what travels in the backward pass of a ring: "kv", "q", or "auto" for what is fewer bytes.
        keep: what received inputs stay on a rank until the backward pass: "last" stage's, "all" or "none". The backward pass of a
            disaggregation has pieces of its own unless all inputs stay; "last" means none there.
        laps: of a ring, rounds of which each carries its part of every shard; two (None: one) halve the memory for rows of other
            ranks and double the stages. Simulated for H200s: 20% slower at 2k tokens a rank, 1.5% at 32k.
        hops: of a disaggregation, 1: rows travel straight; 2: ranks that need the same rows pass them on, so that the owners of
            long documents send and get less; 3: so that each node gets them once.
        servers: of a disaggregation, the last ranks of the group that hold no tokens and compute for the others.
        balance: of a disaggregation; None is its own choice.
    """

    schedule: str = "zigzag"
    layout: str | None = None
    ulysses: int = 1
    devices: int | None = None
    stages: int | None = None
    in_flight: int | None = None
    rotate: Rotate = "auto"
    keep: Keep = "last"
    laps: int | None = None
    hops: int | None = None
    servers: int = 0
    balance: Balance | None = None

    def __str__(self) -> str:
        default = Strategy()
        given = [
            f.name
            for f in fields(self)
            if f.name not in ("schedule", "keep", "balance") and getattr(self, f.name) != getattr(default, f.name)
        ]
        return ", ".join([self.schedule, f"keep {self.keep}", *(f"{name} {getattr(self, name)}" for name in given)])
