"""A layer of a model in the simulator: dense parts and attention of several sequences, one after the other or side by side.

Side by side is the order of ``distattn/model.py``: the dense parts before attention, each followed by what attention sends first;
then the kernels, the sequences in turns as ``steps.py`` says, while what the others sent travels; then what comes home, each time
followed by the dense part after attention. A layer becomes one workload, whose boundaries are those of all of its calls in that
order, so that ports see all messages. Side by side each call has lanes of its own, as slots have in the executor.

Every step costs the host a stage (``stage_us``), so that a call costs at most three more than alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distattn.parallel.cluster import Cluster
from distattn.parallel.comm import LANES, lane_of
from distattn.parallel.plan import Plan
from distattn.parallel.shape import Shape
from distattn.parallel.simulate import PassTimes, Simulation, simulate_loads
from distattn.parallel.steps import gives_turn
from distattn.parallel.workload import Exchange, Messages, Workload, of_exchange, of_plan


@dataclass(frozen=True)
class Dense:
    """Seconds that a rank spends on one sequence in the dense parts of a layer, before and after attention."""

    before: float
    after: float
    before_backward: float
    after_backward: float

    @classmethod
    def of_flops(cls, before: float, after: float, flops_a_second: float) -> Dense:
        """From forward operations; backward has twice as many."""
        b, a = before / flops_a_second, after / flops_a_second
        return cls(b, a, 2 * b, 2 * a)


Call = Sequence[Plan | Exchange]
"""The phases of one pass of attention: a plan, with head exchanges before and after it where heads are traded."""


def simulate_layer(
    forward: Sequence[Call],
    backward: Sequence[Call],
    shapes: Sequence[Shape],
    cluster: Cluster,
    dense: Dense,
    side_by_side: bool,
    timeline: bool = False,
    slots: int | None = None,
) -> Simulation:
    """Forward and backward through one layer, of sequences that may have plans of their own.

    ``compute`` of the times has the dense parts too, ``exposed`` is what waiting for messages on their way costs.

    Args:
        forward, backward: a call for each sequence, in the same order.
        shapes: see :func:`distattn.parallel.simulate.simulate_pass`.
        slots: with lanes of their own, side by side; None: every call has its own.

    Raises:
        ValueError: as many forward as backward calls are needed; see also :func:`distattn.parallel.simulate.simulate`.
    """
    if len(forward) != len(backward) or not forward:
        raise ValueError(f"Every sequence has a forward and a backward call. Found {len(forward)} and {len(backward)}.")

    def times(calls: Sequence[Call], before: float, after: float) -> PassTimes:
        loads = [call_load([_load(phase, shapes, cluster) for phase in call]) for call in calls]
        groups = [loads] if side_by_side else [[load] for load in loads]
        return simulate_loads([layer_load(group, before, after, slots) for group in groups], cluster, timeline)

    return Simulation(
        times(forward, dense.before, dense.after),
        times(backward[::-1], dense.after_backward, dense.before_backward),
    )


def _load(phase: Plan | Exchange, shapes: Sequence[Shape], cluster: Cluster) -> Workload:
    return of_plan(phase, shapes, cluster) if isinstance(phase, Plan) else of_exchange(phase, cluster)


@dataclass(frozen=True)
class CallLoad:
    """A call as one workload, and the boundaries before which it gives the others a turn."""

    load: Workload
    turns: list[int]


def call_load(loads: Sequence[Workload]) -> CallLoad:
    """The workloads of a call in one: what one awaits last and what the next posts first is at one boundary.

    Args:
        loads: of a plan, or of a head exchange, a plan and a head exchange.
    """
    plan = len(loads) // 2
    borders = [0, *np.cumsum([load.stages for load in loads]).tolist()]
    turns = [borders[plan] + b for b in range(loads[plan].stages) if gives_turn(b, loads[plan].stages)]
    if len(loads) == 1:
        return CallLoad(loads[0], turns)
    made = _Builder(borders[-1], loads[0].world)
    for load, border in zip(loads, borders, strict=False):
        made.put(load, border + np.arange(load.stages + 1), border + np.arange(load.stages), load.messages.lane)
    return CallLoad(made.workload("+".join(load.name for load in loads)), turns)


def layer_load(calls: Sequence[CallLoad], before: float, after: float, slots: int | None = None) -> Workload:
    """The calls of a layer side by side with their dense parts, in the order that the head of this file gives.

    Args:
        before, after: seconds of the dense part before and after each call.
        slots: sets of lanes; None: one for each call.
    """
    n = len(calls)
    # Boundaries: a dense part each, the stages of all calls in turns, a dense part each.
    turn = [np.searchsorted(call.turns, np.arange(max(1, call.load.stages)), side="right") for call in calls]
    order = sorted((t, i, stage) for i, turns in enumerate(turn) for stage, t in enumerate(turns.tolist()))
    home = n + len(order)
    place = {(i, stage): n + at for at, (_, i, stage) in enumerate(order)}
    made = _Builder(home + n, calls[0].load.world)
    for i, load in enumerate(call.load for call in calls):
        made.compute[i] += before
        made.compute[home + i] += after
        stages = np.array([place[i, stage] for stage in range(load.stages)], dtype=np.int64)
        boundaries = np.concatenate([[1 + i], stages[1:], [home + i]])
        made.put(load, boundaries[: load.stages + 1], stages, lane_of((slots or n) * LANES, load.messages.lane, i))
    return made.workload(f"layer, {calls[0].load.name}")


class _Builder:
    """A workload of others, whose boundaries and stages are put where they belong."""

    def __init__(self, stages: int, world: int) -> None:
        self.stages, self.world = stages, world
        self.compute = np.zeros((stages, world))
        self.pack, self.unpack = np.zeros((stages + 1, world)), np.zeros((stages + 1, world))
        self._messages: list[Messages] = []

    def put(self, load: Workload, boundaries: np.ndarray, stages: np.ndarray, lane: np.ndarray) -> None:
        """Adds a load: int64 places of its [stages + 1] boundaries and of its [stages] kernels, and the lane of each message."""
        self.pack[boundaries] += load.pack
        self.pack[boundaries[0]] += load.begin
        self.unpack[boundaries] += load.unpack
        self.compute[stages] += load.compute
        m = load.messages
        self._messages.append(Messages(m.src, m.dst, lane, boundaries[m.post], boundaries[m.need], m.size))

    def workload(self, name: str) -> Workload:
        """All that was put."""
        columns = [np.concatenate(c) for c in zip(*(vars(m).values() for m in self._messages), strict=True)]
        order = np.argsort(columns[3], kind="stable")  # by boundary of posting
        messages = Messages(*(column[order] for column in columns))
        return Workload(name, self.stages, self.world, np.zeros(self.world), self.compute, self.pack, self.unpack, messages)
