"""Measures a training step with two sequences side by side in each layer against one after the other, and prices it elsewhere.

Measured are ranks of one thread on the CPU, which this program starts: python launch/bench_nano_batches.py needs no torchrun.
Each holds the whole model; a step is forward and backward of two packed sequences, without the optimizer. Both ways take turns in
one run. gloo moves messages on the cores that compute; --wire-gb-s emulates a link beside them: a batch is complete no sooner
than its bytes would have gone through a wire of that speed, one batch after the other; lanes of one kind share it. Use an
otherwise idle machine.

--price CLUSTER simulates a layer of Llama-8B on a described cluster instead (h200, h100, a100, l40s or a file), and what side by
side would take on lanes that both sequences share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from distattn.parallel.comm import Awaited, Communicator, Pending

WAYS = ("one after the other", "side by side")
LLAMA_8B = {"dim": 4096, "heads": 32, "kv_heads": 8, "hidden_dim": 14336}


class Row(NamedTuple):
    """Medians over rounds of the slowest rank's seconds, of its seconds in waits, and the same of every round."""

    schedule: str
    way: str
    step: float
    waiting: float
    steps: list[float]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "bench_nano_batches.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--schedules",
        nargs="+",
        default=["zigzag", "gather", "tree", "disaggregate"],
        help="default: zigzag gather tree disaggregate",
    )
    made.add_argument("--tokens", type=int, metavar="N", help="of each sequence (default: 2048; 524288 with --price)")
    made.add_argument("--ranks", type=int, metavar="P", help="ranks that share a sequence (default: 2; 64 with --price)")
    made.add_argument("--dim", type=int, default=256, help="of the model; heads are 64 wide, two to a key head (default: 256)")
    made.add_argument("--layers", type=int, default=4, help="of the model (default: 4)")
    made.add_argument("--wire-gb-s", type=float, default=0.0, metavar="G", help="emulate a link of this speed; 0 does not")
    made.add_argument("--repeat", type=int, default=5, metavar="R", help="rounds that count (default: 5)")
    made.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds that a wait may last (default: 120)")
    made.add_argument("--price", default="", metavar="CLUSTER", help="simulate on this cluster instead of measuring")
    made.add_argument(
        "--dense-efficiency", type=float, default=0.6, metavar="E", help="of matrix products, priced (default: 0.6)"
    )
    made.add_argument("--seed", type=int, default=0, help="of the documents' lengths and the tokens (default: 0)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return made


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Raises ValueError for what can be neither measured nor priced."""
    from distattn.parallel.schedules import SCHEDULES

    asked = parser().parse_args(words)
    asked.tokens = asked.tokens if asked.tokens is not None else 524288 if asked.price else 2048
    asked.ranks = asked.ranks if asked.ranks is not None else 64 if asked.price else 2
    for name in ("tokens", "ranks", "dim", "layers", "repeat"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name} {getattr(asked, name)} was asked for. Pass 1 or more.")
    if asked.dim % 128:
        raise ValueError(f"--dim {asked.dim} was asked for. Heads are 64 wide, two to a key head: pass a multiple of 128.")
    if asked.wire_gb_s < 0 or not asked.timeout > 0 or not 0 < asked.dense_efficiency <= 1:
        raise ValueError("--wire-gb-s must be 0 or more, --timeout above 0, and --dense-efficiency above 0 and at most 1.")
    unknown = [name for name in asked.schedules if name not in SCHEDULES]
    if unknown:
        raise ValueError(f"There is no schedule {unknown[0]!r}. Use {', '.join(SCHEDULES)}.")
    return asked


def main(arguments: list[str] | None = None) -> int:
    """0 when done, 2 for a mistake in what was asked, which is printed."""
    try:
        asked = parse(arguments)
        rows: list[Any] = price_layers(asked) if asked.price else measure(asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.json:
        asked.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return 0


def lengths(asked: argparse.Namespace) -> list[list[int]]:
    """Documents of two packed sequences: log-normal, the last cut where the sequence ends."""
    import numpy as np

    random = np.random.default_rng(asked.seed)
    found = []
    for _ in range(2):
        ends = np.cumsum(np.maximum(1, random.lognormal(np.log(asked.tokens / 16), 1.5, 4096).astype(np.int64)))
        cuts = np.append(ends[ends < asked.tokens], asked.tokens)
        found.append(np.diff(cuts, prepend=0).tolist())
    return found


def measure(asked: argparse.Namespace) -> list[Row]:
    """Starts the ranks and prints what they found."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory(prefix="bench-nano-") as folder:
        processes.spawn(run_rank, (asked, folder), nprocs=asked.ranks)
        rows = [Row(*row) for row in json.loads((Path(folder) / "rows").read_text())]
    wire = f"a wire of {asked.wire_gb_s:g} GB/s" if asked.wire_gb_s else "gloo as it is"
    print(f"{asked.ranks} ranks, 2 x {asked.tokens} tokens, {asked.layers} layers of {asked.dim}, {wire}, {asked.repeat} rounds")
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        for row in (one, other):
            spread = f"{min(row.steps) * 1e3:.0f} to {max(row.steps) * 1e3:.0f}"
            print(f"  {row.schedule:12} {row.way:20} {row.step * 1e3:8.1f} ms ({spread}), waiting {row.waiting * 1e3:7.1f} ms")
        print(f"  {one.schedule:12} {one.step / other.step:.3f} times as fast")
    return rows


class Wire:
    """A communicator that counts seconds in waits, and may emulate a slower link than it has."""

    def __init__(self, communicator: Communicator, gb_s: float):
        from distattn.parallel.comm import LANES

        self.inner, self.gb_s, self.kinds = communicator, gb_s, LANES
        self.waiting = 0.0
        self.free: dict[int, float] = defaultdict(float)  # when what lanes of a kind carry is through

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Awaited) -> Pending:
        pending = self.inner.post(lane, sends, receives, awaited)
        size = max(sum(tensor.numel() for _, tensor in side) for side in (sends, receives))  # both directions at once
        seconds = size / (self.gb_s * 1e9) if self.gb_s else 0.0
        kind = lane % self.kinds  # each sequence has lanes of its own, but the link is one
        self.free[kind] = max(self.free[kind], time.perf_counter()) + seconds
        return _Arriving(self, pending, self.free[kind])


@dataclasses.dataclass
class _Arriving:
    wire: Wire
    pending: Pending
    through: float

    def wait(self) -> None:
        """When the message is here, and when the wire would have carried it."""
        begun = time.perf_counter()
        self.pending.wait()
        if self.wire.gb_s:
            time.sleep(max(0.0, self.through - time.perf_counter()))
        self.wire.waiting += time.perf_counter() - begun


def run_rank(rank: int, asked: argparse.Namespace, folder: str) -> None:
    """One rank: both ways of every schedule in turns."""
    import torch

    from distattn.launch.bench_processes import connected

    with connected(rank, asked.ranks, Path(folder), asked.timeout, slots=2) as communicator:
        torch.manual_seed(asked.seed)
        wire = Wire(communicator, asked.wire_gb_s)
        work = {(s, way): step for s in asked.schedules for way, step in zip(WAYS, make_steps(asked, wire, s), strict=True)}
        steps, waits = defaultdict(list), defaultdict(list)
        for turn in range(asked.repeat + 1):
            for key, step in work.items():
                communicator.all_gather_bytes(b"")
                wire.waiting, begun = 0.0, time.perf_counter()
                step()
                mine = json.dumps((time.perf_counter() - begun, wire.waiting)).encode()
                found = max(json.loads(answer) for answer in communicator.all_gather_bytes(mine))
                if turn:
                    steps[key].append(found[0])
                    waits[key].append(found[1])
        rows = [Row(*key, statistics.median(steps[key]), statistics.median(waits[key]), steps[key]) for key in work]
        if rank == 0:
            (Path(folder) / "rows").write_text(json.dumps(rows))


def make_steps(asked: argparse.Namespace, communicator: Any, schedule: str) -> list[Callable[[], None]]:
    """A training step in each way, of one model; asserts that their losses are equal."""
    import torch

    import distattn
    from distattn.config import ModelConfig
    from distattn.model import NanoBatch, build
    from distattn.parallelize import attend_with, begin_with

    heads = asked.dim // 64
    model = build(ModelConfig(dim=asked.dim, layers=asked.layers, heads=heads, kv_heads=heads // 2, hidden_dim=3 * asked.dim), 0)
    cp = distattn.ContextParallel(schedule=schedule, communicator=communicator)
    plans = [cp.plan(distattn.documents(some)) for some in lengths(asked)]
    tokens = torch.randint(256, (2, asked.tokens), generator=torch.Generator().manual_seed(asked.seed))
    batches = [cp.shard_batch(row, plan) for row, plan in zip(tokens, plans, strict=True)]

    def one_after_the_other() -> float:
        total = 0.0
        for batch, plan in zip(batches, plans, strict=True):
            loss = model(batch.tokens, batch.positions, attend_with(cp, plan), batch.labels)
            loss.backward()
            total += loss.item()
        return total

    def side_by_side() -> float:
        loss = model.together(
            [
                NanoBatch(batch.tokens, batch.positions, batch.labels, begin_with(cp, plan, slot))
                for slot, (batch, plan) in enumerate(zip(batches, plans, strict=True))
            ]
        )
        loss.backward()
        return loss.item()

    def timed(step: Callable[[], float]) -> None:
        step()
        model.zero_grad()

    a, b = one_after_the_other(), side_by_side()
    if abs(a - b) > 1e-5 * abs(a):
        raise AssertionError(f"{schedule}: losses {a} and {b} differ")
    model.zero_grad()
    return [lambda: timed(one_after_the_other), lambda: timed(side_by_side)]


class Priced(NamedTuple):
    """A layer, forward and backward, of two sequences; seconds, one after the other and side by side."""

    schedule: str
    alone: float
    beside: float
    beside_shared: float
    """side by side on the same lanes: neither's messages overtake the other's"""
    exposed_alone: float
    exposed_beside: float
    dense: float
    """of the layer, in either"""


def price_layers(asked: argparse.Namespace) -> list[Priced]:
    """Simulates a layer of Llama-8B for each schedule and prints it."""
    import torch

    from distattn.parallel.cluster import load_cluster
    from distattn.parallel.mask import documents
    from distattn.parallel.schedule import make_schedule
    from distattn.parallel.shape import Shape
    from distattn.parallel.simulate_layer import Dense, simulate_layer

    cluster = load_cluster(asked.price)
    dim, heads, kv_heads, hidden = LLAMA_8B.values()
    width = dim // heads
    shape = Shape(heads, kv_heads, width, width, torch.bfloat16)
    rows = -(-asked.tokens // asked.ranks)
    before, after = 2 * rows * dim * (heads + 2 * kv_heads) * width, 2 * rows * (heads * width * dim + 3 * dim * hidden)
    dense = Dense.of_flops(before, after, cluster.kernel.peak_tflops["bfloat16"] * 1e12 * asked.dense_efficiency)
    print(f"{cluster.name}, {asked.ranks} ranks, 2 x {asked.tokens} tokens, a layer of Llama-8B, ms forward and backward:")
    found = []
    for name in asked.schedules:
        made = [make_schedule(name, documents(some), asked.ranks) for some in lengths(asked)]
        calls = [[s.forward] for s in made], [[s.backward(s.rotation(shape))] for s in made]
        alone, beside = (simulate_layer(*calls, [shape], cluster, dense, way) for way in (False, True))
        shared = simulate_layer(*calls, [shape], cluster, dense, side_by_side=True, slots=1)
        exposed = [sum(float(p.exposed.max()) for p in times.passes) for times in (alone, beside)]
        both = 2 * (dense.before + dense.after + dense.before_backward + dense.after_backward)
        row = Priced(name, alone.seconds, beside.seconds, shared.seconds, exposed[0], exposed[1], both)
        print(
            f"  {name:12} {row.alone * 1e3:8.2f} one after the other, {row.beside * 1e3:8.2f} side by side "
            f"({row.alone / row.beside:.3f} times as fast), {row.beside_shared * 1e3:.2f} on shared lanes; "
            f"exposed at most {row.exposed_alone * 1e3:.2f} and {row.exposed_beside * 1e3:.2f}; dense {both * 1e3:.2f}",
            flush=True,
        )
        found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
