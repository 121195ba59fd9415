"""Strategy: how a sequence is to be attended over ranks, as a user names it. Plain data, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from distattn.parallel.transpose import Keep

Rotate = Literal["auto", "kv", "q"]


@dataclass(frozen=True)
class Strategy:
    """A schedule by name and its options; None is the schedule's own choice.

    Args:
        schedule: a name of ``distattn.parallel.schedules.SCHEDULES``.
        layout: "contiguous", "zigzag" or "striped" (the last two inside each document of a mask of documents).
        ulysses: ranks that exchange heads for tokens around the schedule; neighbours, so that they share a node.
        devices: ranks a node, rank = node * devices + device; None: all in one node.
        stages: of a gather, after the local one.
        in_flight: of a tree, owners whose queries are under way at once.
        rotate: what travels in the backward pass of a ring: "kv", "q", or "auto" for what is fewer bytes.
        servers: of a pool, the last ranks of the world, which hold no tokens; 0: none.
        keep: what received inputs stay on a rank until the backward pass: "last" stage's, "all" or "none".
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

    def __str__(self) -> str:
        default = Strategy()
        given = [
            f.name
            for f in fields(self)
            if f.name not in ("schedule", "keep") and getattr(self, f.name) != getattr(default, f.name)
        ]
        return ", ".join([self.schedule, f"keep {self.keep}", *(f"{name} {getattr(self, name)}" for name in given)])
