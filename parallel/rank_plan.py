"""RankPlan: what one rank needs of a forward and a backward plan, and the agreement of all ranks that they hold the same.

Making one asks no other rank (:meth:`Recipe.prepare`), so that another process can do it ahead of time; agreeing on one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distattn.kernels.contract import Scores
from distattn.parallel.comm import Communicator
from distattn.parallel.head_split import HeadSplit, inner_shape
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan
from distattn.parallel.program import Program, compile_program
from distattn.parallel.schedule import Rotation, Schedule, make_schedule
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy


class PlanMismatch(RuntimeError):
    """Ranks that are about to attend together hold different plans, or call with different shapes."""


@dataclass(frozen=True)
class Call:
    """An attention call as all ranks must make it alike."""

    shape: Shape
    scores: Scores
    sinks: bool = False

    def __str__(self) -> str:
        shape, scores = self.shape, self.scores
        said = f"heads {shape.heads}:{shape.kv_heads}, head sizes {shape.d} and {shape.d_v}, {shape.dtype}, home {shape.home}"
        return f"{said}, scale {scores.scale}, softcap {scores.softcap}, {'with' if self.sinks else 'no'} sinks"


@dataclass(frozen=True)
class Recipe:
    """All but the mask that makes a rank's plan. Plain data, so that plans can be made in another process.

    Args:
        version: of the program that asks; ranks with different ones do not agree.
    """

    strategy: Strategy
    world: int
    rank: int
    pad_to_equal: bool = False
    version: str = ""

    def prepare(self, mask: Mask, calls: Iterable[Call] = ()) -> RankPlan:
        """Plans for this rank and compiles for ``calls``; asks no other rank. The result can be pickled.

        Raises:
            ValueError: for an unknown schedule or options that do not fit the world.
        """
        schedule = make_schedule(self.strategy, mask, self.world, self.pad_to_equal, self.rank)
        inputs = hashlib.blake2b(schedule.layout.digest + mask.digest, digest_size=16)
        said = f"{mask!r}, schedule {schedule.strategy}, version {self.version}"
        inputs.update(said.encode())
        assert schedule.rank is not None
        plan = RankPlan(self, schedule.layout, mask, schedule.forward.view(schedule.rank), inputs.digest(), said, schedule)
        for call in calls:
            plan.prepare(call)
        return plan


@dataclass(eq=False)
class RankPlan:
    """One rank's views of a schedule's forward plan and of its backward plans, and their programs by shape.

    With ``ulysses`` the views and programs are those of the group of ranks that share this rank's heads.
    """

    recipe: Recipe
    layout: Layout
    mask: Mask
    forward: Plan
    digest: bytes
    said: str  # what the digest is of, for the error of ranks that do not agree
    _schedule: Schedule | None
    _rotations: dict[Shape, Rotation] = field(default_factory=dict)
    _backward: dict[Rotation, Plan] = field(default_factory=dict)
    _programs: dict[Shape, tuple[Program, Program]] = field(default_factory=dict)
    _prepared: list[Call] = field(default_factory=list)
    _agreed: set[Call] = field(default_factory=set)
    _compared: set[Rotation | None] = field(default_factory=set)  # None: the forward view

    @property
    def rank(self) -> int:
        return self.recipe.rank

    @property
    def ulysses(self) -> int:
        return self.recipe.strategy.ulysses

    @property
    def rows(self) -> int:
        """Rows of this rank's shard."""
        return self.layout.rows(self.rank)

    @property
    def schedule(self) -> Schedule:
        if self._schedule is None:
            recipe = self.recipe
            self._schedule = make_schedule(recipe.strategy, self.mask, recipe.world, recipe.pad_to_equal, recipe.rank)
        return self._schedule

    def __getstate__(self) -> dict[str, Any]:
        """Without the schedule, which lists the transfers of all ranks: it is made again if another shape asks for it."""
        return {**self.__dict__, "_schedule": None}

    def prepare(self, call: Call) -> None:
        """Compiles what ``call`` will run, so that :meth:`agree` and the call itself do not."""
        split = HeadSplit(call.shape.heads, call.shape.kv_heads, self.ulysses)
        for shape in dict.fromkeys(inner_shape(call.shape, piece) for piece in split.slices):
            self._compiled(shape)
        self._prepared.append(call)

    def agree(self, communicator: Communicator) -> None:
        """All ranks compare their plans and what they prepared: one exchange of a few bytes, once per new plan.

        Args:
            communicator: of all ranks of the plan's world.

        Raises:
            PlanMismatch: naming the ranks whose inputs differ.
        """
        said = "; ".join([self.said, *map(str, self._prepared)])
        # With a head exchange the ranks that share heads compare calls and messages, at their first call.
        calls = self._prepared if self.ulysses == 1 else []
        self._compare(communicator, said, "this plan", calls)

    def programs(self, shape: Shape, scores: Scores, sinks: bool, communicator: Communicator) -> tuple[Program, Program]:
        """The compiled forward and backward program for a shape; the first time all ranks compare what they ask for.

        Args:
            communicator: of all ranks that run these programs together.

        Raises:
            PlanMismatch: naming the ranks that ask for another shape or plan.
        """
        call = Call(shape, scores, sinks)
        if call not in self._agreed:
            self._compiled(shape)
            self._compare(communicator, str(call), "this attention call", [call])
        return self._programs[shape]

    def _compiled(self, shape: Shape) -> tuple[Program, Program]:
        if shape not in self._programs:
            rotation = self._rotations[shape] = self.schedule.rotation(shape)
            if rotation not in self._backward:
                self._backward[rotation] = self.schedule.backward(rotation).view(self.rank // self.ulysses)
            backward = self._backward[rotation]
            forward = compile_program(self.forward, shape, backward.kept)
            self._programs[shape] = forward, compile_program(backward, shape, forward=forward)
        return self._programs[shape]

    def _compare(self, communicator: Communicator, said: str, subject: str, calls: Sequence[Call]) -> None:
        """All ranks compare what is said, and the messages of those views of ``calls`` that they have not compared yet."""
        used: list[Rotation | None] = [None, *(self._rotations[call.shape] for call in calls)] if calls else []
        new = [which for which in dict.fromkeys(used) if which not in self._compared]
        views = [self.forward if which is None else self._backward[which] for which in new]
        agree(communicator, self.digest, said, subject, views)
        self._compared.update(new)
        self._agreed.update(calls)


def make_rank_plan(
    communicator: Communicator, mask: Mask, strategy: Strategy | str, pad_to_equal: bool = False, version: str = ""
) -> RankPlan:
    """Plans on this rank and compares with all others, also the ``version`` of the program that asks.

    Raises:
        ValueError: for an unknown schedule or options that do not fit the world.
        PlanMismatch: naming the ranks whose inputs differ.
    """
    strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
    plan = Recipe(strategy, communicator.world, communicator.rank, pad_to_equal, version).prepare(mask)
    plan.agree(communicator)
    return plan


def agree(communicator: Communicator, digest: bytes, said: str, subject: str, views: Sequence[Plan] = ()) -> None:
    """Every rank must come with the same digest and text; on a CPU group, once per new plan or shape.

    One exchange of 16 bytes, and 8 a view; only ranks that do not agree exchange more, to say what differs.

    Args:
        views: this rank's, whose messages its peers must list too.

    Raises:
        PlanMismatch: with what each group of ranks came with, or naming the pairs that list different messages.
    """
    name = hashlib.blake2b(digest + said.encode(), digest_size=16).digest()
    listed = [view.message_digests() for view in views]
    answers = communicator.all_gather_bytes(name + b"".join(_balance(communicator.rank, mine) for mine in listed))
    if len({answer[:16] for answer in answers}) > 1:
        raise PlanMismatch(_who_came_with_what(communicator.all_gather_bytes(digest + said.encode()), subject))
    for i, mine in enumerate(listed):
        parts = (int.from_bytes(answer[16 + 8 * i : 24 + 8 * i], "little") for answer in answers)
        if sum(parts) % 2**64:
            _name_pairs(communicator.all_gather_bytes(b"".join(mine)), len(mine[0]))


def _balance(rank: int, digests: Sequence[bytes]) -> bytes:
    """Digests of the messages with each peer, added for higher peers, subtracted for lower: 0 in the sum over all ranks."""
    numbers = [int.from_bytes(digest, "little") for digest in digests]
    return ((sum(numbers[rank + 1 :]) - sum(numbers[:rank])) % 2**64).to_bytes(8, "little")


def _who_came_with_what(answers: Sequence[bytes], subject: str) -> str:
    lines = []
    for answer in sorted(set(answers), key=answers.index):
        ranks = [r for r, a in enumerate(answers) if a == answer]
        lines.append(
            f"  rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {answer[16:].decode()} [{answer[:4].hex()}]"
        )
    return (
        f"The ranks of this group do not agree on {subject}; going on would hang or mix up data.\n"
        + "\n".join(lines)
        + "\nPass every rank the same mask, schedule, heads, head sizes and dtype, scale, softcap and sinks."
    )


def _name_pairs(everyone: Sequence[bytes], size: int) -> None:
    """Raises :class:`PlanMismatch` with the pairs of ranks that would wait for each other in vain."""
    table = np.array([np.frombuffer(a, dtype=f"V{size}") for a in everyone])
    wrong = [(a, b) for a, b in zip(*np.nonzero(table != table.T), strict=True) if a < b]
    pairs = ", ".join(f"{a} and {b}" for a, b in wrong[:8])
    raise PlanMismatch(
        f"Ranks {pairs} list different messages between them although their plans have the same inputs. "
        "They run different versions of distattn or numpy; install the same on all."
    )
