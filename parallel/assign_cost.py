"""Cost: what assignments are priced by: weights of moved rows, and seconds of pairs and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distattn.parallel.assignment import Load
from distattn.parallel.cluster import Cluster, Direction, pair_flops
from distattn.parallel.plan import What
from distattn.parallel.shape import Shape

ONE = 1 << 10  # a slowdown of 1
SIDES = tuple(1 << i for i in range(4, 18))


@dataclass(frozen=True)
class Cost:
    """Weights of rows, and seconds.

    The plain default counts in rows of keys and values of 64 query heads to 8 key heads: time is visible pairs, links are free.

    Args:
        kv_row: weight (bytes) of a row of keys and values that a rank receives, in a backward pass with what comes home of it.
        query_row: of a query row there and its finished result back.
        partial_row: the same where the result is a float32 state that the owner merges.
        pair_seconds: of a visible pair in long documents.
        slowdown: (tokens of a document on a rank, pair seconds there over ``pair_seconds``, times 1024), rising tokens.
        near_seconds, far_seconds: of one unit of weight between two ranks of a node, of two nodes.
        devices: ranks of a node; 0: all are of one.
    """

    kv_row: int = 1
    query_row: int = 8
    partial_row: int = 12
    pair_seconds: float = 1.0
    slowdown: tuple[tuple[int, int], ...] = ((1, ONE),)
    near_seconds: float = 0.0
    far_seconds: float = 0.0
    devices: int = 0

    def __post_init__(self) -> None:
        seconds = (self.pair_seconds, self.near_seconds, self.far_seconds)
        if not all(map(math.isfinite, seconds)) or self.pair_seconds <= 0 or min(seconds) < 0 or self.devices < 0:
            raise ValueError(
                f"A cost has pair_seconds above 0, and near_seconds, far_seconds and devices of 0 or more. Found pair_seconds="
                f"{self.pair_seconds}, near_seconds={self.near_seconds}, far_seconds={self.far_seconds}, devices={self.devices}."
            )

    @property
    def has_links(self) -> bool:
        """Whether what travels takes time."""
        return self.near_seconds > 0 or self.far_seconds > 0

    @classmethod
    def of_rows(cls, shape: Shape, direction: Direction) -> Cost:
        """Bytes of a shape; time is visible pairs, links are free. A backward pass gets q, k and v once more."""

        def weigh(*whats: What) -> int:
            return sum(shape.row_bytes(what) for what in whats)

        if direction == "forward":
            return cls(weigh(What.KV), weigh(What.Q, What.DONE), weigh(What.Q, What.OUT))
        query = weigh(What.Q, What.DOUT, What.DQ)
        return cls(weigh(What.KV, What.DKV), query, query)

    @classmethod
    def of(cls, cluster: Cluster, shape: Shape, direction: Direction) -> Cost:
        """Bytes of a shape, seconds of a cluster.

        Raises:
            ValueError: the cluster's description has no speed for the shape's dtype.
        """
        sides = np.array(SIDES)
        pairs = sides * (sides + 1) // 2
        # Documents share launches, so the programs of one say nothing of how full the device is.
        curve = cluster.curve(direction)
        share = curve.share(np.minimum(sides, pairs // sides * 2), shape.d)
        each = shape.heads * pair_flops(shape, direction) / (cluster.peak(shape) * share)
        each *= 1 + np.minimum(0.5 * cluster.kernel.diagonal(sides) * sides, pairs) / pairs
        slow = np.rint(each / each[-1] * ONE).astype(np.int64)
        near = 1 / (cluster.inside.port_gb_s * 1e9)
        far = near if cluster.between is None else max(near, 1 / (cluster.between.nic_gb_s * 1e9))
        table = tuple(zip(SIDES, slow.tolist(), strict=True))
        rows = cls.of_rows(shape, direction)
        return cls(rows.kv_row, rows.query_row, rows.partial_row, float(each[-1]), table, near, far, cluster.devices)

    def stretched(self, pairs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """``pairs`` of runs of ``tokens`` rows of a document as pairs of a long one, which take as long; int64 [n].

        Integer arithmetic, straight lines between the points of ``slowdown``.
        """
        side = np.array([point[0] for point in self.slowdown], dtype=np.int64)
        slow = np.array([point[1] for point in self.slowdown], dtype=np.int64)
        right = np.clip(np.searchsorted(side, tokens, side="right"), 1, max(1, len(side) - 1))
        left = right - 1
        right = np.minimum(right, len(side) - 1)
        span = np.maximum(side[right] - side[left], 1)
        at = np.clip(tokens - side[left], 0, span)
        factor = slow[left] + (slow[right] - slow[left]) * at // span
        return pairs // ONE * factor + pairs % ONE * factor // ONE

    def seconds(self, load: Load, speeds: np.ndarray | None = None, held: np.ndarray | None = None) -> np.ndarray:
        """Predicted time of each rank: its work, or what it receives or sends if that takes longer; float64 [world].

        Args:
            held: rows of each rank's shard, where servers pass rows on to each other and merge results (relays.py); None: all
                travels straight.
        """
        world = len(load.work)
        compute = load.work * self.pair_seconds / (np.ones(world) if speeds is None else np.maximum(speeds, 1e-12))
        flow = load.flows
        near = (flow.src // self.devices == flow.dst // self.devices) if self.devices else np.ones(len(flow.src), dtype=bool)
        each = flow.rows * np.where(near, self.near_seconds, self.far_seconds)
        # A query row and a finished one weigh alike; links carry both directions at the same time.
        half = self.query_row / 2
        there = np.array([self.kv_row, half, half])[flow.kind] * each
        back = np.array([0.0, half, self.partial_row - half])[flow.kind] * each
        (sent, taken), (home, given) = (
            [np.bincount(end, weights=way, minlength=world) for end in (flow.src, flow.dst)] for way in (there, back)
        )
        if held is None:
            return np.maximum(compute, np.maximum(sent + given, taken + home))
        # Owners send and get every row once; what servers get besides comes from others of them, results likewise.
        far = self.far_seconds if self.devices else self.near_seconds
        once, finished = np.minimum(sent, held * (self.kv_row + half) * far), np.minimum(home, held * half * far)
        passed, merged = (1 - few.sum() / max(many.sum(), 1e-300) for few, many in ((once, sent), (finished, home)))
        return np.maximum(compute, np.maximum(once + passed * taken + given, taken + finished + merged * given))
