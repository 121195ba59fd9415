"""schedule="auto": the strategy with the least simulated time among all that fit, and why not the others.

Candidates are layouts x schedules x Ulysses degrees x parts of a gather. Bounds that no simulation can be below come first
(``bound.py``), the close one of a strategy only when its cheap one is the lowest left. Strategies are simulated from the lowest
bound on, at most 16 of them and none that cannot be noticeably faster than the best found so far. The same on every rank:
nothing is measured here.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from distattn.parallel.bound import Bounds
from distattn.parallel.cluster import Cluster
from distattn.parallel.mask import Mask
from distattn.parallel.price import WHOLE_TREE, Price, price, slices_of
from distattn.parallel.schedules import LAYOUTS
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallel.transpose import Keep

logger = logging.getLogger(__name__)

GATHER_STAGES = (1, 2, 4, 8)
WHOLE_BALANCED = 128  # ranks up to which a disaggregation is planned to be compared, in tenths of a second
MOST = 16  # strategies that are simulated unless all are asked for
NOTICEABLE = 0.02  # of the time; descriptions of clusters are not better than that
MEMORY_SHARE = 0.25  # of a device for rows of others, where nobody says how much


@dataclass(frozen=True)
class Auto:
    """Heads and machines to choose a strategy for: what ``ContextParallel(schedule=...)`` takes instead of a name.

    The first packed documents of a length decide for all of that length and options: they differ from step to step, and are not
    priced anew. Other masks are priced one by one. Every rank comes to the same choice without asking the others.

    Args:
        shape: of the attention calls, all heads.
        memory_gb: what rows of other ranks may take on a device, 1e9 bytes; None: a quarter of its memory.
    """

    shape: Shape
    cluster: Cluster
    memory_gb: float | None = None
    keep: Keep = "last"
    _chosen: dict[tuple[str, int, int], Strategy] = field(default_factory=dict, compare=False)

    def choose(self, mask: Mask, world: int) -> Strategy:
        """The strategy for a mask; said once to the log.

        Raises:
            ValueError: see :func:`decide`.
        """
        if mask.n_tokens < world:
            return Strategy(keep=self.keep)  # a prompt of a few tokens: nothing to gain
        options = mask.name.partition(",")[2]  # of documents(COUNT, options)
        kind = (f"documents,{options}" if mask.lengths is not None else mask.digest.hex()), mask.n_tokens, world
        if kind not in self._chosen:
            best = decide(mask, world, self.shape, self.cluster, self.memory_gb, self.keep).best
            self._chosen[kind] = best.strategy
            text = "%r on %d ranks of %s: %s, simulated %.3g ms forward and backward"
            logger.info(text, mask, world, self.cluster.name, best.strategy, best.seconds * 1e3)
        return self._chosen[kind]


@dataclass(frozen=True)
class Candidate:
    """One strategy: what it cannot be faster than, its price if it was simulated, and why it is not the choice ("" if it is)."""

    strategy: Strategy
    bound: float
    price: Price | None
    refused: str


@dataclass(frozen=True)
class Decision:
    """The choice, and every candidate: simulated ones by time, then the others by bound."""

    best: Price
    candidates: list[Candidate]


def decide(
    mask: Mask,
    world: int,
    shape: Shape,
    cluster: Cluster,
    memory_gb: float | None = None,
    keep: Keep = "last",
    noticeable: float | None = NOTICEABLE,
    say: Callable[[str], None] | None = None,
) -> Decision:
    """The strategy for a mask and shape on ``world`` ranks of a cluster.

    Args:
        memory_gb: what rows of other ranks may take on a device, 1e9 bytes; None: a quarter of its memory.
        noticeable: part of the time by which another strategy must be able to win to be simulated; None: all are simulated.
        say: told about each strategy that is simulated.

    Raises:
        ValueError: the cluster does not hold the ranks or knows no such dtype; nothing fits the memory.
    """
    cluster.check_world(world)
    if mask.n_tokens < world:
        raise ValueError(
            f"{world} ranks are more than the {mask.n_tokens} tokens of {mask!r}. Use {max(1, mask.n_tokens)} or fewer."
        )
    limit = (MEMORY_SHARE * cluster.memory_gb if memory_gb is None else memory_gb) * 1e9
    bounds = Bounds(mask, world, shape, cluster)
    waiting = [
        (bounds.cheap(s), i, False, s) for i, s in enumerate(candidates(world, shape, cluster, keep, mask.lengths is not None))
    ]
    heapq.heapify(waiting)
    best: Price | None = None
    priced: list[tuple[Strategy, float, Price]] = []
    rest: list[tuple[Strategy, float]] = []
    while waiting:
        bound, i, is_close, strategy = heapq.heappop(waiting)
        if best is not None and noticeable is not None and (bound >= (1 - noticeable) * best.seconds or len(priced) >= MOST):
            rest.append((strategy, bound))
        elif not is_close:
            heapq.heappush(waiting, (bounds.close(strategy), i, True, strategy))
        else:
            found = price(strategy, mask, world, shape, cluster, compile_below=best.seconds if best else np.inf)
            priced.append((strategy, bound, found))
            if say is not None:
                say(f"{strategy}: {found.seconds * 1e3:.3g} ms")
            if found.buffer_bytes <= limit and (best is None or found.seconds < best.seconds):
                best = found
    if best is None:
        least = min(priced, key=lambda p: p[2].buffer_bytes)
        raise ValueError(
            f"No schedule fits {limit / 1e9:.3g} GB of buffers for {mask!r} on {world} ranks. The least is {least[0]} with "
            f"{least[2].buffer_bytes / 1e9:.3g} GB: give that much memory, or use more ranks."
        )
    judged = [_judged(*entry, best, limit) for entry in sorted(priced, key=lambda p: p[2].seconds)]
    judged += [Candidate(s, bound, None, f"not simulated: {bound / best.seconds:.3f} x or more") for s, bound in rest]
    return Decision(best, judged)


def _judged(strategy: Strategy, bound: float, found: Price, best: Price, limit: float) -> Candidate:
    if found is best:
        return Candidate(strategy, bound, found, "")
    if found.buffer_bytes > limit:
        text = f"{found.buffer_bytes / 1e9:.3g} GB of buffers, {limit / 1e9:.3g} given"
        return Candidate(strategy, bound, found, text)
    return Candidate(strategy, bound, found, f"{found.seconds / best.seconds:.3f} x the best")


def candidates(world: int, shape: Shape, cluster: Cluster, keep: Keep = "last", documents: bool = False) -> Iterator[Strategy]:
    """All strategies that fit the ranks, the nodes and the heads; disaggregation for packed ``documents``."""
    devices = min(world, cluster.devices)
    for u in range(1, min(world, shape.heads) + 1):
        if world % u or (devices % u and u % devices):
            continue
        base = Strategy(ulysses=u, devices=devices, keep=keep)
        if u == world:
            yield base
            continue
        nodes, inside = (world // devices, devices // u) if u <= devices else (world // u, 1)
        for name in ("zigzag", "striped", "ring"):
            yield replace(base, schedule=name)
        for layout in LAYOUTS:
            if nodes > 1 and inside > 1:
                yield replace(base, schedule="double_ring", layout=layout)
            for stages in GATHER_STAGES:
                if stages < max(2, world // u):
                    yield replace(base, schedule="gather", layout=layout, stages=stages)
            if world // u <= WHOLE_TREE:
                yield replace(base, schedule="tree", layout=layout)
        if documents and world // u <= WHOLE_BALANCED:
            yield replace(base, schedule="disaggregate", balance=Balance.of(slices_of(shape, u)[0]))
