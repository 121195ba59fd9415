"""Strategy: how a sequence is to be attended over ranks, as a user names it. Plain data, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from distattn.parallel.assign import Cost
from distattn.parallel.cluster import Cluster
from distattn.parallel.plan import What
from distattn.parallel.shape import Shape
from distattn.parallel.transpose import Keep

Rotate = Literal["auto", "kv", "q"]


@dataclass(frozen=True)
class Balance:
    """How a disaggregation shares the work out.

    Args:
        forward, backward: what rows weigh in each pass; the backward plan is made for its own.
        tolerance: the most that a rank may have above its share, as a part of it; what cannot be reached is refused. None: 0.02
            where that can be reached, else a little more; where costs have seconds of links, what is predicted to be fastest.
        receive_rows: rows of queries and keys that a rank may receive; None: as many as it takes.
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
    def of(cls, shape: Shape, **options: Any) -> Balance:
        """With rows weighed in bytes that travel for these heads and dtypes, in the backward pass with q, k and v sent again."""
        weigh = lambda *whats: sum(shape.row_bytes(what) for what in whats)  # noqa: E731
        forward = Cost(weigh(What.KV), weigh(What.Q, What.DONE), weigh(What.Q, What.OUT))
        query = weigh(What.Q, What.DOUT, What.DQ)
        return cls(forward, Cost(weigh(What.KV, What.DKV), query, query), **options)

    @classmethod
    def timed(cls, cluster: Cluster, shape: Shape, devices: int, **options: Any) -> Balance:
        """With bytes and seconds of a cluster whose nodes have ``devices`` of the plan's ranks: the fastest is sought."""
        forward, backward = Cost.of(cluster, shape, "forward"), Cost.of(cluster, shape, "backward")
        return cls(replace(forward, devices=devices), replace(backward, devices=devices), **options)


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
