"""Ways to attend to a step's documents over all ranks, each priced by the simulator: those that move no tasks, and those that do.

A way that moves no tasks shares the ranks among groups of ``cp`` neighbours. Each group takes whole documents, dealt out so that
the predicted time of the groups is even within what memory bears (document packing as in Wang et al., "WLB-LLM"), and attends to
them by one schedule on one layout. The step waits for the slowest group: the one with the most predicted work is simulated, so
that luck among the others favours these ways. With ``cp`` the whole world the batch is one sequence, as the loader packed it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from distattn.launch.training_step import Model, Step, dense_seconds, step_of
from distattn.parallel import layout as layouts
from distattn.parallel.cells import Cells, Groups
from distattn.parallel.cluster import Cluster
from distattn.parallel.layout import Layout
from distattn.parallel.mask import documents
from distattn.parallel.plan import STAGE, Plan, What
from distattn.parallel.price import exchanges, slices_of
from distattn.parallel.relays import IN_NODES, SHARED, STRAIGHT
from distattn.parallel.schedule import Schedule
from distattn.parallel.schedules import build_plan
from distattn.parallel.simulate_layer import Call, Dense, simulate_layer
from distattn.parallel.statistics import peak_buffer_rows
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallel.workload import Exchange

SLACK = 0.25  # of a group's share of tokens, that it may have above it
EVEN = 0.02  # the same of two sequences side by side
MEMORY_SHARE = 0.25  # of a device, for rows of other ranks
PARTS_OF_GATHER = 4
PARTS, PARTS_SIDE_BY_SIDE = {True: (2, 4, 6), False: (1, 3, 5, 7)}, (1, 4)  # with relays and without; of two sequences
# Of documents with pairs of ranks: zigzag inside of documents takes minutes to plan with more, and is left out.
MEETINGS = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Documents of a step in the order of the loader: rank r holds tokens [r * each, (r + 1) * each) of them.

    ``each`` counts a device's tokens.
    """

    lengths: tuple[int, ...]
    world: int
    each: int


@dataclass(frozen=True)
class Way:
    """One way; ``kind`` is what it is called in tables."""

    kind: str
    strategy: Strategy
    layout: str  # contiguous, zigzag (of tokens), documents (zigzag inside of each)
    cp: int
    slack: float | None  # None: the batch is one sequence over all ranks
    waits: bool = False  # for all keys before it computes, and to the end of that with gradients: no overlap
    halves: bool = False  # as two sequences side by side in each layer: one computes while the other's attention travels

    def __str__(self) -> str:
        s = self.strategy
        head = f"ulysses {s.ulysses} x " if s.ulysses > 1 else ""
        head += "even " if s.balance is not None and not s.balance.forward.far_seconds else ""
        parts = f" in {s.stages}" if s.stages else ""
        parts += ", relays" if s.hops and s.hops > STRAIGHT else ""
        packed = "" if self.slack is None else f", packed to {self.slack:.0%}"
        packed += ", nothing overlapped" if self.waits else ""
        halves = ", two side by side" if self.halves else ""
        return f"{head}{s.schedule} {self.layout}{parts}, cp {self.cp}{packed}{halves}"


@dataclass(frozen=True)
class Found:
    """A way with the step that it makes; ``refused`` says why it was not simulated or cannot be."""

    way: Way
    step: Step
    forward: float
    backward: float
    exposed: float
    buffer_bytes: int


@dataclass(frozen=True)
class Machines:
    """A cluster, and how many devices of a node share every token by tensor parallelism: a rank is that many devices."""

    cluster: Cluster
    tensor: int = 1


def pairs(lengths: np.ndarray) -> np.ndarray:
    """Visible pairs of causal documents."""
    return lengths * (lengths + 1) // 2


def rates(model: Model, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a device and layer in both passes: of a visible pair in long documents, and of a token in the dense part."""
    side = np.array([1 << 16])
    area = pairs(side)
    attention = sum(cluster.task_seconds(area, side, side, model.shape, d).item() for d in ("forward", "backward"))
    return attention / float(area[0]), sum(dense_seconds(model, 1 << 16, cluster)) / (1 << 16)


def dealt(lengths: Sequence[int], groups: int, slack: float, per_pair: float, per_token: float) -> list[list[int]]:
    """Whole documents for each group, evened by predicted time, in the order in which they came.

    Longest first to the group with the least time among those with room; where none has room to the one with the most.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    room = [int(sizes.sum() * (1 + slack)) // groups] * groups
    load = [(0.0, g) for g in range(groups)]
    members: list[list[int]] = [[] for _ in range(groups)]
    cost = pairs(sizes) * per_pair + sizes * per_token
    for i in np.argsort(-sizes, kind="stable").tolist():
        full, chosen = [], None
        while load and chosen is None:
            seconds, g = heapq.heappop(load)
            if room[g] >= sizes[i]:
                chosen = (seconds, g)
            else:
                full.append((seconds, g))
        if chosen is None:
            chosen = max(full, key=lambda entry: (room[entry[1]], -entry[1]))
            full.remove(chosen)
        members[chosen[1]].append(i)
        room[chosen[1]] -= int(sizes[i])
        for entry in (*full, (chosen[0] + float(cost[i]), chosen[1])):
            heapq.heappush(load, entry)
    return [[int(sizes[i]) for i in sorted(group)] for group in members]


LAYOUTS: dict[str, Callable[[Sequence[int], int], Layout]] = {
    "contiguous": lambda lengths, ranks: layouts.contiguous(int(sum(lengths)), ranks),
    "zigzag": lambda lengths, ranks: layouts.zigzag(int(sum(lengths)), ranks),
    "documents": layouts.document_zigzag,
}


class Survey:
    """Prices ways for one batch, model and cluster."""

    def __init__(self, batch: Batch, model: Model, machines: Machines):
        self.batch, self.model, self.machines = batch, model, machines
        self.ranks = batch.world // machines.tensor
        self.shape = slices_of(model.shape, machines.tensor)[0]
        self.per_pair, self.per_token = rates(model, machines.cluster)
        self._dealt: dict[tuple[int, float | None], list[int]] = {}

    @cached_property
    def perfect(self) -> Step:
        """All attention spread evenly in whole documents, nothing sent."""
        lengths, cluster = np.array(self.batch.lengths), self.machines.cluster
        shape, one = self.model.shape, np.zeros(len(lengths), dtype=np.int64)
        forward, backward = (
            float(cluster.task_seconds(pairs(lengths), lengths, lengths, shape, d, one).sum()) / self.batch.world
            for d in ("forward", "backward")
        )
        return self._step((forward, backward), self.batch.each * self.machines.tensor)

    def _step(self, attention: tuple[float, float], tokens: int) -> Step:
        return step_of(self.model, self.machines.cluster, self.batch.world, tokens, attention, self.machines.tensor)

    def documents_of(self, way: Way) -> list[int]:
        """Those of the group with the most predicted time."""
        key = way.cp, way.slack
        if key not in self._dealt:
            if way.slack is None:
                self._dealt[key] = list(self.batch.lengths)
            else:
                groups = dealt(self.batch.lengths, self.ranks // way.cp, way.slack, self.per_pair, self.per_token)
                self._dealt[key] = max(groups, key=self._predicted)
        return self._dealt[key]

    def _predicted(self, lengths: Sequence[int]) -> float:
        return self.per_pair * float(pairs(np.array(lengths)).sum()) + self.per_token * sum(lengths)

    def bound(self, way: Way) -> float:
        """Seconds that the step cannot be below: the busiest rank's pairs at the rate of long documents, and its dense part."""
        lengths = self.documents_of(way)
        ranks = way.cp // way.strategy.ulysses
        mask = documents(lengths)
        if way.layout == "documents" or way.strategy.schedule == "disaggregate":
            busiest = mask.bands.area / ranks
        else:
            layout = LAYOUTS[way.layout](lengths, ranks)
            cells = Cells.of(layout, Groups.of(mask))
            busiest = float(cells.load(ranks, cells.work).max())
        shared = way.strategy.ulysses * self.machines.tensor
        compute = self.per_pair * busiest / shared
        return self._step((compute, 0.0), self._tokens(lengths, way)).seconds

    def _tokens(self, lengths: Sequence[int], way: Way) -> int:
        """Of the largest rank."""
        return -(-sum(lengths) // way.cp)

    def price(self, way: Way) -> Found:
        """Simulates a way: a layer with its dense parts, of one sequence, or of two side by side."""
        lengths, cluster = self.documents_of(way), self.machines.cluster
        parts = dealt(lengths, 2, EVEN, self.per_pair, self.per_token) if way.halves else [lengths]
        made = [self._calls(part, way) for part in parts]
        u, tensor = way.strategy.ulysses, self.machines.tensor
        shapes = slices_of(self.shape, u) if u > 1 else [self.shape] * tensor
        tokens = self._tokens(lengths, way)
        forward, backward = dense_seconds(self.model, tokens, cluster, tensor)
        before = self.model.before_share / len(parts)
        after = (1 - self.model.before_share) / len(parts)
        dense = Dense(forward * before, forward * after, backward * before, backward * after)
        calls = [call for call, _ in made], [call for _, call in made]
        layer = simulate_layer(*calls, shapes, cluster, dense, side_by_side=way.halves)
        weights = np.array([shapes[0].row_bytes(what) for what in What], dtype=np.int64)
        plans = [[phase for phase in call if isinstance(phase, Plan)][0] for pair in made for call in pair]
        held = sum(int(peak_buffer_rows(plan, weights).max(initial=0)) for plan in plans) // 2
        times = layer.passes
        attention = times[0].seconds - forward, times[1].seconds - backward
        exposed = sum(float(t.exposed.max()) for t in times)
        return Found(way, self._step(attention, tokens), attention[0], attention[1], exposed, held)

    def _calls(self, lengths: Sequence[int], way: Way) -> tuple[Call, Call]:
        """Forward and backward of one sequence."""
        u, mask = way.strategy.ulysses, documents(lengths)
        inner = LAYOUTS[way.layout](lengths, way.cp // u)
        layout = layouts.subdivided(inner, u)
        plan = build_plan(way.strategy, inner, mask)
        if way.waits:
            assert way.strategy.schedule == "gather", "what others compute goes home only after they have computed it"
            tasks = plan.tasks.copy()
            tasks[:, STAGE] = plan.stages - 1
            plan = replace(plan, tasks=tasks)
        schedule = Schedule(way.strategy, mask, layout, inner, plan, None)
        part = slices_of(self.shape, u)[0]
        plans = schedule.forward, schedule.backward(schedule.rotation(part))
        around = exchanges(layout, u, self.shape)
        calls: list[list[Plan | Exchange]] = [[*t[:1], plan, *t[1:]] for plan, t in zip(plans, around, strict=True)]
        return calls[0], calls[1]

    def best(self, ways: Sequence[Way], say: Callable[[str], None] = lambda _: None) -> Found | None:
        """The fastest of some ways within the memory; those whose bound is above it are not simulated."""
        limit = MEMORY_SHARE * self.machines.cluster.memory_gb * 1e9
        best: Found | None = None
        for bound, _, way in sorted((self.bound(way), i, way) for i, way in enumerate(ways)):
            if best is not None and bound >= best.step.seconds:
                break
            say(str(way))
            found = self.price(way)
            if found.buffer_bytes <= limit and (best is None or found.step.seconds < best.step.seconds):
                best = found
        return best


def rivals(survey: Survey) -> Iterator[Way]:
    """Ways that move no tasks, at every degree at which the longest document fits its group."""
    longest, ranks, each = max(survey.batch.lengths), survey.ranks, survey.batch.each * survey.machines.tensor
    devices = max(1, survey.machines.cluster.devices // survey.machines.tensor)
    cp = devices
    while cp <= ranks:
        slack = SLACK if cp < ranks else None
        if slack is None or cp * each * (1 + slack) >= longest:
            yield from _ways(cp, slack, survey)
        cp *= 2


def _ways(cp: int, slack: float | None, survey: Survey) -> Iterator[Way]:
    ring, gather = Strategy("ring"), Strategy("gather", stages=PARTS_OF_GATHER)
    yield Way("ring", ring, "contiguous", cp, slack)
    yield Way("gather", gather, "contiguous", cp, slack)
    yield Way("zigzag", ring, "zigzag", cp, slack)
    for u in (1,) if survey.machines.tensor > 1 else (1, survey.machines.cluster.devices):
        kind = "document zigzag" if u == 1 else "Ulysses, document zigzag"
        for strategy in (replace(ring, ulysses=u), replace(gather, ulysses=u)):
            way = Way(kind, strategy, "documents", cp, slack)
            if (cp // u) ** 2 * len(survey.documents_of(way)) <= MEETINGS:
                yield way


def published_rivals(survey: Survey) -> Iterator[Way]:
    """Packed documents as in Wang et al., "WLB-LLM": zigzag inside of each, keys gathered before and gradients reduced after."""
    strategy = Strategy("gather", stages=1, keep="none")
    for way in rivals(survey):
        if way.kind == "document zigzag" and way.strategy.schedule == "gather":
            for slack in (EVEN, SLACK):
                chosen = None if way.slack is None else slack
                yield replace(way, kind=f"packed to {slack:.0%}", strategy=strategy, waits=True, slack=chosen)


def moving(survey: Survey) -> Iterator[Way]:
    """Disaggregation over all ranks, alone and inside of Ulysses: as even as can be, or as predicted to be fastest.

    Rows travel straight or are passed on by those that need them; each in several parts, or with two sequences side by side.
    """
    cluster, tensor = survey.machines.cluster, survey.machines.tensor
    for u in (1,) if tensor > 1 else (1, cluster.devices):
        shape, node = slices_of(survey.shape, u)[0], max(1, cluster.devices // tensor // u)
        kind = "disaggregate" if u == 1 else "Ulysses, disaggregate"
        for balance, relayed in product((Balance.of(shape), Balance.of(shape, cluster, node)), (False, True)):
            nodes = 1 < balance.forward.devices < survey.ranks // u
            hops = (IN_NODES if nodes else SHARED) if relayed else STRAIGHT
            ways = [(parts, True) for parts in PARTS_SIDE_BY_SIDE] + [(parts, False) for parts in PARTS[relayed]]
            for stages, halves in ways:
                strategy = Strategy("disaggregate", ulysses=u, stages=stages, hops=hops, balance=balance)
                yield Way(kind, strategy, "contiguous", survey.ranks, None, halves=halves)
