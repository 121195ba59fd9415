"""Plans for tests: layouts and masks by name, and two hand-written schedules that move queries and partial results.

The product's schedules do not yet send q and out; these do, so that the plan, its transposition, verify and the executor are
tested for all that a plan can say: relays down a tree, partials merged on the way up, tasks on parts of received runs and
on several runs at once, random servers.
"""

from __future__ import annotations

import random

import numpy as np

from distattn.kernels.bands import K0, K1, Band, Bands, clip, shift
from distattn.parallel import layout as layouts
from distattn.parallel import mask as masks
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan, What, no_kept

LAYOUTS = ("contiguous", "zigzag", "striped", "document_zigzag", "document_striped")
MASKS = (
    "full",
    "causal",
    "window",
    "symmetric",
    "sinks",
    "documents",
    "document_windows",
    "full_documents",
    "prefix",
    "chunked",
    "union",
)


def lengths(n: int, rng: random.Random) -> list[int]:
    """Document lengths that add up to n, with short ones among them."""
    cuts = sorted({0, n, *(rng.randrange(n + 1) for _ in range(min(n, 3)))}) if n else [0, 0]
    return [b - a for a, b in zip(cuts, cuts[1:], strict=False)] or [0]


def make_mask(kind: str, n: int, seed: int = 0) -> Mask:
    rng = random.Random(seed)
    w = max(1, n // 5)
    return {
        "full": lambda: masks.full(n),
        "causal": lambda: masks.causal(n),
        "window": lambda: masks.sliding_window(n, w),
        "symmetric": lambda: masks.sliding_window(n, w, symmetric=True),
        "sinks": lambda: masks.sliding_window(n, w, sinks=2),
        "documents": lambda: masks.documents(lengths(n, rng)),
        "document_windows": lambda: masks.documents(lengths(n, rng), window=w),
        "full_documents": lambda: masks.documents(lengths(n, rng), causal=False),
        "prefix": lambda: masks.prefix_lm(n, n // 3),
        "chunked": lambda: masks.chunked(n, max(1, n // 3)),
        "union": lambda: masks.union(
            masks.from_bands(n, [Band(0, n // 2, 0, n // 4)]), masks.from_bands(n, [Band(n // 3, n, n // 4, n, hi=0)])
        ),
    }[kind]()


def make_layout(kind: str, mask: Mask, world: int, pad: bool = False) -> Layout:
    sizes = mask.lengths if mask.lengths is not None else lengths(mask.n_tokens, random.Random(1))
    if kind.startswith("document"):
        return getattr(layouts, kind)(sizes, world, pad)
    return getattr(layouts, kind)(mask.n_tokens, world, pad)


class _Builder:
    """Collects tasks and transfers one by one; slow and plain."""

    def __init__(self, layout: Layout, mask: Mask):
        self.layout, self.mask = layout, mask
        world = layout.world
        q, kv = (x.ravel() for x in np.meshgrid(np.arange(world), np.arange(world), indexing="ij"))
        table, pair = local_bands(mask, layout, q, kv)
        self.bands = {(int(a), int(b)): table[pair == a * world + b] for a in range(world) for b in range(world)}
        self.tasks: list[tuple[list[int], np.ndarray]] = []
        self.transfers: list[list[int]] = []

    def pieces(self, q: tuple[int, int, int], kv: tuple[int, int, int]) -> np.ndarray:
        """Bands of a run of queries and a run of keys, in their coordinates."""
        cut = Bands(clip(self.bands[q[0], kv[0]], q[1], q[2], kv[1], kv[2])).table
        return shift(cut, -q[1], -kv[1])

    def task(self, stage: int, rank: int, q: tuple[int, int, int], kv: tuple[int, int, int]) -> bool:
        bands = self.pieces(q, kv)
        if len(bands):
            self.tasks.append(([stage, rank, *q, *kv], bands))
        return len(bands) > 0

    def send(self, src: int, dst: int, rows: tuple[int, int, int], what: What, post: int, need: int, lane: int = 0) -> None:
        self.transfers.append([src, dst, *rows, what, lane, post, need])

    def plan(self, name: str, stages: int) -> Plan:
        self.tasks.sort(key=lambda t: t[0][0])
        self.transfers.sort(key=lambda t: t[7])
        counts = [len(b) for _, b in self.tasks]
        return Plan(
            name=name,
            direction="forward",
            layout=self.layout,
            mask=self.mask,
            stages=stages,
            tasks=np.array([t for t, _ in self.tasks], dtype=np.int64).reshape(-1, 8),
            band_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            bands=np.concatenate([b for _, b in self.tasks]) if self.tasks else np.zeros((0, 6), np.int64),
            transfers=np.array(self.transfers, dtype=np.int64).reshape(-1, 9),
            kept=no_kept(),
        )


def tree_plan(layout: Layout, mask: Mask) -> Plan:
    """Queries go down a binomial tree rooted at their owner, the owners of the keys compute, partials are merged upwards."""
    world = layout.world
    build = _Builder(layout, mask)
    depth = max(1, (world - 1).bit_length())
    for owner in range(world):
        rows = (owner, 0, layout.rows(owner))
        if rows[2] == 0:
            continue
        needed = {
            v for v in range(1, world) if len(build.pieces(rows, ((owner + v) % world, 0, layout.rows((owner + v) % world))))
        }
        for v in range(world - 1, 0, -1):  # an inner node passes on even what it does not use
            if v in needed:
                needed |= {v - (1 << (v.bit_length() - 1))} - {0}
        for v in sorted(needed):
            level, parent = v.bit_length(), v - (1 << (v.bit_length() - 1))
            src, dst = (owner + parent) % world, (owner + v) % world
            build.send(src, dst, rows, What.Q, level - 1, level)
            build.send(dst, src, rows, What.OUT, 2 * depth + 1 - level, 2 * depth + 2 - level, lane=2)
        for v in {0} | needed:
            rank = (owner + v) % world
            build.task(depth, rank, rows, (rank, 0, layout.rows(rank)))
    return build.plan("tree", 2 * depth + 1)


def random_servers_plan(layout: Layout, mask: Mask, seed: int, grain: int = 5) -> Plan:
    """Runs of queries served by random ranks in one of two stages; keys travel straight from their owners, whole or in parts."""
    rng = random.Random(seed)
    build = _Builder(layout, mask)
    runs = [(o, a, min(a + grain, layout.rows(o))) for o in range(layout.world) for a in range(0, layout.rows(o), grain)]
    jobs = sorted((rng.randrange(1, 3), rng.randrange(layout.world), q) for q in runs)
    arrived: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for stage, server, q in jobs:
        served = False
        for other in range(layout.world):
            table = build.pieces(q, (other, 0, layout.rows(other)))
            if not len(table):
                continue
            kv = (other, int(table[:, K0].min()), int(table[:, K1].max()))
            served = build.task(stage, server, q, kv) or served
            if other != server:
                _fetch(build, arrived.setdefault((server, other), []), server, kv, stage)
        if served and server != q[0]:
            build.send(q[0], server, q, What.Q, stage - 1, stage)
            build.send(server, q[0], q, What.OUT, stage + 1, stage + 2, lane=2)
    return build.plan("random_servers", 4)


def _fetch(build: _Builder, have: list[tuple[int, int]], server: int, kv: tuple[int, int, int], stage: int) -> None:
    """Sends the rows of ``kv`` that the server has not received: several runs, some of them shared by tasks."""
    missing = set(range(kv[1], kv[2])).difference(*(range(start, stop) for start, stop in have))
    while missing:
        start = stop = min(missing)
        while stop in missing:
            missing.discard(stop)
            stop += 1
        have.append((start, stop))
        build.send(kv[0], server, (kv[0], start, stop), What.KV, stage - 1, stage)
