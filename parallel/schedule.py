"""Schedule: a head exchange (none, or Ulysses) around a plan, forward and backward, for one mask and layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan, What
from distattn.parallel.schedules import SCHEDULES, build_plan, checked_strategy, make_layout
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import transpose

Rotation = Literal["kv", "q"]


@dataclass(eq=False)
class Schedule:
    """What a strategy comes to on one mask.

    Attributes:
        layout: which of the P ranks holds which tokens; every ``ulysses`` neighbouring ranks share a shard of ``inner``.
        inner: the layout of ``forward``, over P / ulysses ranks.
        forward: the plan that runs in each of ``ulysses`` groups of ranks (those of equal rank modulo ``ulysses``), each with
            its own part of the heads. With ``rank``, only that inner rank's tasks have bands.
    """

    strategy: Strategy
    mask: Mask
    layout: Layout
    inner: Layout
    forward: Plan
    rank: int | None
    _turned: Plan | None = None
    _backward: dict[Rotation, Plan] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def ulysses(self) -> int:
        return self.strategy.ulysses

    def backward(self, rotation: Rotation = "kv") -> Plan:
        """The backward plan that moves the key side (k, v, dk, dv) or the query side (q, dout, lse, delta, dq)."""
        if rotation not in self._backward:
            self._backward[rotation] = self._make_backward(rotation)
        return self._backward[rotation]

    def _make_backward(self, rotation: Rotation) -> Plan:
        if rotation == "q":
            return transpose(self.turned, "none")
        build = SCHEDULES[self.strategy.schedule].for_backward
        if build is None or self.strategy.keep == "all":
            return transpose(self.forward, self.strategy.keep)
        return transpose(build(self.inner, self.mask, self.strategy, self.rank), "none")

    @property
    def turned(self) -> Plan:
        """A forward plan of the same mask and layout that moves the query side: the one whose transposition does."""
        if self._turned is None:
            self._turned = build_plan(self.strategy, self.inner, self.mask, self.rank, turned=True)
        return self._turned

    def rotation(self, shape: Shape) -> Rotation:
        """What the backward plan moves for these heads, head sizes and dtypes: as asked, or what is fewer bytes a row and hop."""
        if self.strategy.rotate != "auto":
            return self.strategy.rotate
        hops = self.forward.stages - 1  # the same on all ranks, as the table of one rank's transfers is not
        if SCHEDULES[self.strategy.schedule].turned is None or hops == 0:
            return "kv"
        again = {"all": 0.0, "last": 1 - 1 / hops, "none": 1.0}[self.strategy.keep]
        kv = shape.row_bytes(What.DKV) + again * shape.row_bytes(What.KV)
        q = sum(shape.row_bytes(what) for what in (What.Q, What.DOUT, What.DQ))
        return "q" if q < kv else "kv"


def make_schedule(
    strategy: Strategy | str, mask: Mask, world: int, pad_to_equal: bool = False, rank: int | None = None
) -> Schedule:
    """The schedule of a strategy for a mask on ``world`` ranks; ``rank`` (of the world): only what its view needs.

    Raises:
        ValueError: see :func:`distattn.parallel.schedules.checked_strategy`.
    """
    strategy = checked_strategy(strategy, world)
    layout, inner = make_layout(strategy, mask, world, pad_to_equal)
    inner_rank = None if rank is None else rank // strategy.ulysses
    return Schedule(strategy, mask, layout, inner, build_plan(strategy, inner, mask, inner_rank), inner_rank)
