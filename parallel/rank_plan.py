"""RankPlan: what one rank needs of a forward and a backward plan, after all ranks have agreed that they hold the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from distattn.kernels.contract import Scores
from distattn.parallel.comm import Communicator
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan, What
from distattn.parallel.program import Program, compile_program
from distattn.parallel.schedules import make_plan
from distattn.parallel.shape import Shape
from distattn.parallel.transpose import Keep, transpose


class PlanMismatch(RuntimeError):
    """Ranks that are about to attend together hold different plans, or call with different shapes."""


@dataclass(eq=False)
class RankPlan:
    """One rank's views of a forward plan and its backward plan, and their programs by shape."""

    rank: int
    schedule: str
    forward: Plan
    backward: Plan
    digest: bytes
    _programs: dict[Shape, tuple[Program, Program]] = field(default_factory=dict)
    _agreed: set[tuple[Shape, Scores, bool]] = field(default_factory=set)

    @property
    def layout(self) -> Layout:
        return self.forward.layout

    @property
    def mask(self) -> Mask:
        return self.forward.mask

    @property
    def rows(self) -> int:
        """Rows of this rank's shard."""
        return self.layout.rows(self.rank)

    def programs(self, shape: Shape, scores: Scores, sinks: bool, communicator: Communicator) -> tuple[Program, Program]:
        """The compiled forward and backward program for a shape; the first time all ranks compare what they ask for.

        Raises:
            PlanMismatch: naming the ranks that ask for another shape or plan.
        """
        if (shape, scores, sinks) not in self._agreed:
            said = f"heads {shape.heads}:{shape.kv_heads}, head sizes {shape.d} and {shape.d_v}, {shape.dtype}, home {shape.home}"
            said += f", scale {scores.scale}, softcap {scores.softcap}, {'with' if sinks else 'no'} sinks"
            agree(communicator, self.digest, said, "this attention call")
            self._agreed.add((shape, scores, sinks))
        if shape not in self._programs:
            keep = {(What(what), owner) for _, owner, _, _, what in self.backward.kept.tolist()}
            forward = compile_program(self.forward, shape, keep)
            self._programs[shape] = forward, compile_program(self.backward, shape, forward=forward)
        return self._programs[shape]


def make_rank_plan(
    communicator: Communicator, mask: Mask, schedule: str, keep: Keep = "last", pad_to_equal: bool = False, version: str = ""
) -> RankPlan:
    """Plans on this rank and compares with all others, also the ``version`` of the program that asks.

    Raises:
        ValueError: for an unknown schedule.
        PlanMismatch: naming the ranks whose inputs or messages differ.
    """
    plan = make_plan(schedule, mask, communicator.world, pad_to_equal)
    back = transpose(plan, keep)
    forward, backward = plan.view(communicator.rank), back.view(communicator.rank)
    inputs = hashlib.blake2b(plan.layout.digest + mask.digest, digest_size=16)
    options = f"{mask!r}, schedule {schedule}, keep {keep}, version {version}"
    inputs.update(options.encode())
    agree(communicator, inputs.digest(), options, "this plan")
    _agree_on_messages(communicator, forward, backward)
    return RankPlan(communicator.rank, schedule, forward, backward, inputs.digest())


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


def _agree_on_messages(communicator: Communicator, forward: Plan, backward: Plan) -> None:
    """One hash per peer of the ordered messages, compared pairwise."""
    mine = [a + b for a, b in zip(forward.message_digests(), backward.message_digests(), strict=True)]
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
