"""RankPlan: what one rank needs of a forward and a backward plan, after all ranks have agreed that they hold the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from distattn.kernels.contract import Scores
from distattn.parallel.comm import Communicator
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan
from distattn.parallel.program import Program, compile_program
from distattn.parallel.schedule import Rotation, Schedule, make_schedule
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy


class PlanMismatch(RuntimeError):
    """Ranks that are about to attend together hold different plans, or call with different shapes."""


@dataclass(eq=False)
class RankPlan:
    """One rank's views of a schedule's forward plan and of its backward plans, and their programs by shape.

    With ``ulysses`` the views and programs are those of the group of ranks that share this rank's heads.
    """

    rank: int
    schedule: Schedule
    forward: Plan
    digest: bytes
    _programs: dict[Shape, tuple[Program, Program]] = field(default_factory=dict)
    _agreed: set[tuple[Shape, Scores, bool]] = field(default_factory=set)
    _backward: dict[Rotation, Plan] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.schedule.layout

    @property
    def mask(self) -> Mask:
        return self.schedule.mask

    @property
    def rows(self) -> int:
        """Rows of this rank's shard."""
        return self.layout.rows(self.rank)

    def programs(self, shape: Shape, scores: Scores, sinks: bool, communicator: Communicator) -> tuple[Program, Program]:
        """The compiled forward and backward program for a shape; the first time all ranks compare what they ask for.

        Args:
            communicator: of all ranks that run these programs together.

        Raises:
            PlanMismatch: naming the ranks that ask for another shape or plan.
        """
        if (shape, scores, sinks) not in self._agreed:
            said = f"heads {shape.heads}:{shape.kv_heads}, head sizes {shape.d} and {shape.d_v}, {shape.dtype}, home {shape.home}"
            said += f", scale {scores.scale}, softcap {scores.softcap}, {'with' if sinks else 'no'} sinks"
            agree(communicator, self.digest, said, "this attention call")
            self._agreed.add((shape, scores, sinks))
        if shape not in self._programs:
            if not self._programs:
                agree_on_messages(communicator, self.forward)
            backward = self.backward(self.schedule.rotation(shape), communicator)
            forward = compile_program(self.forward, shape, backward.kept)
            self._programs[shape] = forward, compile_program(backward, shape, forward=forward)
        return self._programs[shape]

    def backward(self, rotation: Rotation, communicator: Communicator) -> Plan:
        """This rank's view of the backward plan; the first time all ranks compare its messages."""
        if rotation not in self._backward:
            self._backward[rotation] = view = self.schedule.backward(rotation).view(communicator.rank)
            agree_on_messages(communicator, view)
        return self._backward[rotation]


def make_rank_plan(
    communicator: Communicator, mask: Mask, strategy: Strategy | str, pad_to_equal: bool = False, version: str = ""
) -> RankPlan:
    """Plans on this rank and compares with all others, also the ``version`` of the program that asks.

    Raises:
        ValueError: for an unknown schedule or options that do not fit the world.
        PlanMismatch: naming the ranks whose inputs differ.
    """
    schedule = make_schedule(strategy, mask, communicator.world, pad_to_equal, communicator.rank)
    inputs = hashlib.blake2b(schedule.layout.digest + mask.digest, digest_size=16)
    options = f"{mask!r}, schedule {schedule.strategy}, version {version}"
    inputs.update(options.encode())
    agree(communicator, inputs.digest(), options, "this plan")
    assert schedule.rank is not None
    return RankPlan(communicator.rank, schedule, schedule.forward.view(schedule.rank), inputs.digest())


def agree(communicator: Communicator, digest: bytes, said: str, subject: str) -> None:
    """Every rank must come with the same digest and text; on a CPU group, once per new plan or shape.

    Raises:
        PlanMismatch: with what each group of ranks came with.
    """
    answers = communicator.all_gather_bytes(digest + said.encode())
    if len(set(answers)) == 1:
        return
    lines = []
    for answer in sorted(set(answers), key=answers.index):
        ranks = [r for r, a in enumerate(answers) if a == answer]
        lines.append(
            f"  rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {answer[16:].decode()} [{answer[:4].hex()}]"
        )
    raise PlanMismatch(
        f"The ranks of this group do not agree on {subject}; going on would hang or mix up data.\n"
        + "\n".join(lines)
        + "\nPass every rank the same mask, schedule, heads, head sizes and dtype, scale, softcap and sinks."
    )


def agree_on_messages(communicator: Communicator, view: Plan) -> None:
    """One hash per peer of the ordered messages, compared pairwise.

    Raises:
        PlanMismatch: naming the pairs of ranks that would wait for each other in vain.
    """
    mine = view.message_digests()
    everyone = communicator.all_gather_bytes(b"".join(mine))
    size = len(mine[0])
    table = np.array([np.frombuffer(a, dtype=f"V{size}") for a in everyone])
    wrong = [(a, b) for a, b in zip(*np.nonzero(table != table.T), strict=True) if a < b]
    if wrong:
        pairs = ", ".join(f"{a} and {b}" for a, b in wrong[:8])
        raise PlanMismatch(
            f"Ranks {pairs} list different messages between them although their plans have the same inputs. "
            "They run different versions of distattn or numpy; install the same on all."
        )
