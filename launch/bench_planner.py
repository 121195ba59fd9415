"""What core-attention disaggregation plans: balance, traffic against a lower bound, planning time. Needs no GPU, starts no ranks.

python launch/bench_planner.py                          on document lengths of the project's own heavy-tailed generator
python launch/bench_planner.py --lengths FILE.gz        also on lengths from a file, one a line
python launch/bench_planner.py --heads 64:64            other heads; --window 4096 limits what a row sees

Documents are packed one after the other and cut where the ranks' tokens end; rank r holds the r-th run of them. Traffic counts,
a token, 1 for each row of keys and values that a rank receives, once, and H / H_kv for each query row that is computed elsewhere,
its way there and its output's back. Bytes are exact: bfloat16, but float32 for gradients and for results of rows that are split
by keys. With relays, ranks that need the same rows pass them on to each other and merge results on the way home
(parallel/relays.py): no more rows travel, but the owners of long documents send and get each of theirs once.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distattn.launch.doctor import Parser, print_line

if TYPE_CHECKING:
    import numpy as np

    from distattn.parallel.assignment import Load
    from distattn.parallel.plan import Plan
    from distattn.parallel.shape import Shape

SETTINGS = "16x8k,64x8k,16x64k,64x64k,256x64k"
HEAD_DIM = 128
# Mean units a token over seeds 0 to 19 of the lengths that DistCA (Zhuang et al.) publishes, causal, 64:8 heads: planners of
# DistCA (commit 2afd2192, tolerance 0.02, 0.01, 0.02, 0.01) and of MagiAttention (2c641357, static, chunks of 1024, 512, 2048,
# 2048 tokens), each with the coarsest setting tried whose largest load over mean is at most 1.02 as a mean of the seeds. They
# choose themselves which rows a rank holds.
PEERS = {"16x8k": (4.15, 4.80), "64x8k": (7.42, 12.00), "16x64k": (1.76, 2.53), "64x64k": (2.18, 4.11)}
PEERS_SEEDS = 20
PEERS_LENGTHS = "7b26a29823bda0a0c8040d616217372fc4dc5512298f57b3f560b8a83fa0df19"  # SHA-256 of the lines, joined by line feeds


@dataclass(frozen=True)
class Setting:
    """Ranks and tokens of each."""

    world: int
    tokens: int

    @classmethod
    def read(cls, word: str) -> Setting:
        """From 16x8k."""
        ranks, _, tokens = word.partition("x")
        try:
            made = cls(int(ranks), int(tokens[:-1]) << 10 if tokens.endswith("k") else int(tokens))
        except ValueError:
            made = cls(0, 0)
        if made.world < 1 or made.tokens < 1:
            raise ValueError(f"{word!r} is no setting. Pass ranks x tokens of a rank, as 16x8k or 4x512.")
        return made

    def __str__(self) -> str:
        return f"{self.world}x{self.tokens >> 10}k" if self.tokens % 1024 == 0 else f"{self.world}x{self.tokens}"


@dataclass
class Row:
    """One setting on one source of lengths; lists have a value a seed."""

    source: str
    setting: str
    heads: str
    window: int
    peers: tuple[float, float] | None = None  # units a token of DistCA and MagiAttention on these very documents
    before: list[float] = field(default_factory=list)  # largest load over the mean without moving anything
    balance: list[float] = field(default_factory=list)  # with the plan
    traffic: list[float] = field(default_factory=list)  # units a token
    bound: list[float] = field(default_factory=list)
    forward_mb: list[float] = field(default_factory=list)  # million bytes that a rank receives, mean over ranks
    backward_mb: list[float] = field(default_factory=list)
    busiest: list[float] = field(default_factory=list)  # bytes that the busiest rank receives in forward over the mean
    relayed_mb: list[float] = field(default_factory=list)  # forward_mb where ranks that need the same rows pass them on
    relayed: list[float] = field(default_factory=list)  # busiest, likewise
    smallest: list[int] = field(default_factory=list)
    plan_ms: list[float] = field(default_factory=list)

    def line(self) -> str:
        """A row of the table."""
        mean, bound = statistics.mean(self.traffic), statistics.mean(self.bound)
        cut = min((rows for rows in self.smallest if rows), default=0)
        cells = [
            f"{self.source[:10]:10} {self.setting:8} {statistics.mean(self.before):6.2f}",
            f"{statistics.mean(self.balance):7.4f} {max(self.balance):7.4f}",
            f"{mean:7.3f} {max(self.traffic):7.3f} {bound:7.3f} {mean / max(bound, 1e-9):6.2f}",
            f"{self.peers[0]:6.2f} {self.peers[1]:6.2f}" if self.peers else "     -      -",
            f"{statistics.mean(self.forward_mb):7.1f} {statistics.mean(self.backward_mb):7.1f}",
            f"{statistics.mean(self.busiest):6.2f} {max(self.busiest):6.2f}",
            f"{statistics.mean(self.relayed_mb):7.1f} {statistics.mean(self.relayed):6.2f} {max(self.relayed):6.2f}",
            f"{cut:5d} {statistics.median(self.plan_ms):7.2f}",
        ]
        return " ".join(cells)


HEADER = (
    f"{'':18} load: largest over mean      units a token           bound         peers of   MB received  busiest      "
    "   with relays:        least    plan\n"
    "lengths    ranks    before    mean   worst    mean   worst   bound  ratio DistCA   Magi     fwd     bwd   mean  worst"
    " MB fwd   mean  worst  rows      ms"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("bench_planner.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--settings", default=SETTINGS, metavar="PxT,...", help=f"ranks x tokens of a rank (default: {SETTINGS})")
    made.add_argument(
        "--lengths", type=Path, metavar="FILE", help="also draw documents from this file, .gz or not, one length a line"
    )
    made.add_argument(
        "--kind", default="heavy_tail", help="document_lengths of the project's own (default: heavy_tail; none: without)"
    )
    made.add_argument("--heads", default="64:8", help="query:key heads of size 128 (default: 64:8)")
    made.add_argument(
        "--window", type=int, default=0, metavar="N", help="keys that a row sees at most (default: 0, all before it)"
    )
    made.add_argument("--seeds", type=int, default=20, metavar="N", help="seeds 0 to N - 1 (default: 20)")
    made.add_argument("--tolerance", type=float, default=0.02, help="largest load over mean, less 1 (default: 0.02)")
    made.add_argument("--smallest", type=int, default=128, metavar="ROWS", help="of a piece of a document (default: 128)")
    made.add_argument("--repeat", type=int, default=3, metavar="N", help="timed plans of each seed (default: 3)")
    made.add_argument("--out", type=Path, metavar="FILE", help="write every figure there as JSON")
    made.add_argument("--png", type=Path, metavar="FILE", help="draw work per rank before and after, seed 0 of the last setting")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 a plan was refused, 2 a mistake in what was asked, which is printed."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        asked = parser().parse_args(words)
        settings = [Setting.read(word) for word in asked.settings.split(",")]
        lines = _lines(asked.lengths)
        sources = _sources(asked, lines)
        shape, mask_window = _shape(asked.heads), max(asked.window, 0)
        if asked.seeds < 1 or asked.repeat < 1:
            raise ValueError("Pass --seeds and --repeat of 1 or more.")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    known = PEERS if _as_peers(asked, lines) else {}
    rows, refused = [], 0
    print_line(
        f"heads {asked.heads}, window {mask_window or 'none'}, tolerance {asked.tolerance}, seeds 0 to {asked.seeds - 1}\n"
        + HEADER
    )
    for name, draw in sources.items():
        for setting in settings:
            peers = known.get(str(setting)) if name == "file" else None
            row = Row(name, str(setting), asked.heads, mask_window, peers)
            for seed in range(asked.seeds):
                try:
                    _measure(row, draw(setting, seed), setting, shape, asked, picture=asked.png if seed == 0 else None)
                except ValueError as error:
                    print_line(f"{name} {setting} seed {seed}: {error}")
                    refused += 1
            if row.balance:
                print_line(row.line())
                rows.append(row)
    if asked.out is not None:
        made = {"command": ["launch/bench_planner.py", *words], "rows": [asdict(row) for row in rows]}
        asked.out.write_text(json.dumps(made, indent=1) + "\n")
    return 1 if refused else 0


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return file.read().splitlines()


def _as_peers(asked: argparse.Namespace, lines: list[str]) -> bool:
    """Whether documents, seeds, heads and mask are those of PEERS."""
    if (asked.heads, max(asked.window, 0), asked.seeds) != ("64:8", 0, PEERS_SEEDS):
        return False
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() == PEERS_LENGTHS


def _sources(asked: argparse.Namespace, lines: list[str]) -> dict[str, Callable[[Setting, int], list[int]]]:
    """By name: document lengths that fill a setting, from a seed."""
    from distattn.document_lengths import document_lengths

    made: dict[str, Callable[[Setting, int], list[int]]] = {}
    if asked.lengths is not None:
        drawn = [int(line) for line in lines]
        if not drawn or min(drawn) < 0:
            raise ValueError(f"{asked.lengths} must hold lengths of 0 or more, one a line.")
        made["file"] = lambda setting, seed: packed(drawn, setting.world * setting.tokens, seed)
    if asked.kind != "none":
        document_lengths(asked.kind, 1, 0)
        made[asked.kind] = lambda setting, seed: document_lengths(asked.kind, setting.world * setting.tokens, seed).tolist()
    if not made:
        raise ValueError("There is nothing to plan for: --kind is none and there are no --lengths. Pass one of them.")
    return made


def packed(lengths: list[int], tokens: int, seed: int) -> list[int]:
    """Documents drawn from ``lengths``, rounded down to a multiple of 16, until ``tokens`` are filled; the last is cut."""
    rng, made, missing = random.Random(seed), [], tokens
    while missing:
        length = min(max(16, rng.choice(lengths) // 16 * 16), missing)
        made.append(length)
        missing -= length
    return made


def _shape(heads: str) -> Shape:
    import torch

    from distattn.parallel.shape import Shape

    query, _, key = heads.partition(":")
    if not (query.isdigit() and key.isdigit() and int(key) > 0 and int(query) % int(key) == 0 and int(query) > 0):
        raise ValueError(f"--heads {heads!r} must be query:key heads, the first a multiple of the second, as 64:8.")
    return Shape(int(query), int(key), HEAD_DIM, HEAD_DIM, torch.bfloat16)


def _measure(
    row: Row, lengths: list[int], setting: Setting, shape: Shape, asked: argparse.Namespace, picture: Path | None = None
) -> None:
    """Plans one seed and appends its figures.

    Raises:
        ValueError: the planner refused.
    """
    from distattn.parallel.assign import assign
    from distattn.parallel.assign_bound import lower_bound
    from distattn.parallel.assign_cost import Cost
    from distattn.parallel.assignment import Load
    from distattn.parallel.cells import Cells, Groups
    from distattn.parallel.layout import contiguous
    from distattn.parallel.mask import documents
    from distattn.parallel.relays import SHARED
    from distattn.parallel.schedules.disaggregate import disaggregate

    tokens = setting.world * setting.tokens
    layout, mask = contiguous(tokens, setting.world), documents(lengths, window=asked.window or None)
    unit = shape.heads // shape.kv_heads
    cost = Cost(kv_row=2, query_row=2 * unit, partial_row=3 * unit)
    spent = []
    for _ in range(asked.repeat):
        begin = time.perf_counter()
        found = assign(layout, mask, cost=cost, tolerance=asked.tolerance, smallest=asked.smallest)
        spent.append(1e3 * (time.perf_counter() - begin))
    load = Load.of(found, layout, mask)
    cells = Cells.of(layout, Groups.of(mask))
    before = cells.load(layout.world, cells.work)
    row.before.append(float(before.max() / before.mean()))
    row.balance.append(float(load.work.max() / load.work.mean()))
    row.traffic.append(float(load.received(1, unit, unit).sum() / tokens))
    row.bound.append(lower_bound(layout, mask, asked.tolerance, 1, unit) / tokens)
    forward, backward = received_bytes(load, shape)
    row.forward_mb.append(float(forward.mean() / 1e6))
    row.backward_mb.append(float(backward.mean() / 1e6))
    row.busiest.append(float(forward.max() / max(forward.mean(), 1e-9)))
    shared = relayed_bytes(disaggregate(layout, mask, found, hops=SHARED, cost=cost), shape)
    row.relayed_mb.append(float(shared.mean() / 1e6))
    row.relayed.append(float(shared.max() / max(shared.mean(), 1e-9)))
    row.smallest.append(load.smallest)
    row.plan_ms.append(statistics.median(spent))
    if picture is not None:
        _draw(before, load.work, picture, f"{row.source}, {setting}, seed 0")


def received_bytes(load: Load, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that each rank receives in forward and in backward, as a server and as an owner; float64 [world] each."""
    import numpy as np

    from distattn.parallel.assignment import FINISHED, KV
    from distattn.parallel.plan import What

    size = {what: shape.row_bytes(what) for what in What}
    lse = shape.heads * shape.accumulate.itemsize
    finished = shape.heads * shape.d_v * shape.dtype.itemsize + lse
    flow, world = load.flows, len(load.work)
    keys, whole = flow.kind == KV, flow.kind == FINISHED
    there = np.where(keys, size[What.KV], size[What.Q])
    back = np.where(keys, 0, np.where(whole, finished, size[What.OUT]))
    forward = np.bincount(flow.dst, flow.rows * there, world) + np.bincount(flow.src, flow.rows * back, world)
    # q, k and v go again with the gradient's inputs; gradients come home in float32.
    there = np.where(keys, size[What.KV], size[What.Q] + size[What.DOUT])
    back = np.where(keys, size[What.DKV], size[What.DQ])
    backward = np.bincount(flow.dst, flow.rows * there, world) + np.bincount(flow.src, flow.rows * back, world)
    return forward, backward


def relayed_bytes(plan: Plan, shape: Shape) -> np.ndarray:
    """Bytes that each rank receives in a plan; float64 [world]. Rows that others merged come home in the output dtype."""
    import numpy as np

    from distattn.parallel.plan import DST, START, STOP, WHAT, What

    t, size = plan.transfers, np.array([shape.row_bytes(what) for what in What])
    return np.bincount(t[:, DST], weights=(t[:, STOP] - t[:, START]) * size[t[:, WHAT]], minlength=plan.world)


def _draw(before: np.ndarray, after: np.ndarray, path: Path, title: str) -> None:
    """Bars of work per rank, before and after."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, work, word in zip(figure.subplots(2, 1, sharex=True), (before, after), ("before", "after"), strict=True):
        axis.bar(np.arange(len(work)), work / after.mean(), width=1.0, color="#4c72b0", edgecolor="white", linewidth=0.2)
        axis.axhline(1.0, color="#c44e52", linewidth=1)
        axis.set_ylabel(f"{word}: load / mean")
        axis.set_title(f"largest {work.max() / work.mean():.3f} of the mean", fontsize=9, loc="right")
    axis.set_xlabel("rank")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
