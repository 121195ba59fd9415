"""Measures core attention disaggregation: one long document and many short ones on ranks that hold equal numbers of tokens.

First the schedules in turns, forward and backward: contiguous shards (the rank with the long document is late), every document
cut in zigzag over all ranks (balanced, but short pieces and more messages), and disaggregate, which leaves tokens where they are
and moves pieces of attention. Then the last rank computes everything twice: disaggregate as if all ranks were equal, and told the
speeds. The ranks are processes of one thread on the CPU that this program starts and ends: python launch/bench_disaggregate.py
needs no torchrun. Use an otherwise idle machine with a core for each rank: ranks that share cores hide imbalance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distattn.launch.bench_processes import benchmark, check_asked, connected

if TYPE_CHECKING:
    from torch import Tensor

    from distattn.attention import ContextParallel
    from distattn.kernels.contract import Backend
    from distattn.parallel.comm import Communicator
    from distattn.parallel.mask import Mask
    from distattn.parallel.strategy import Strategy

DISAGGREGATE, SLOW, TOLD = "disaggregate", "one rank slow", "one rank slow, speeds told"
SPEEDS = (2, 1)  # of every other rank and of the last one, which does everything twice


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "bench_disaggregate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the batch, on all ranks (default: 8192)")
    made.add_argument("--long", type=float, default=0.5, metavar="S", help="share of the long document (default: 0.5)")
    made.add_argument("--short", type=int, default=256, metavar="L", help="tokens of a short document (default: 256)")
    made.add_argument("--ranks", type=int, default=2, metavar="P", help="processes (default: 2)")
    made.add_argument("--heads", type=int, default=8, help="query heads (default: 8)")
    made.add_argument("--kv-heads", type=int, default=2, help="key heads (default: 2)")
    made.add_argument("--head-dim", type=int, default=64, metavar="D", help="head size (default: 64)")
    made.add_argument("--repeat", type=int, default=7, metavar="R", help="rounds that count (default: 7)")
    made.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds that a rank waits for another")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    return made


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is measured."""

    tokens: int
    long: float
    short: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    repeat: int
    timeout: float

    def lengths(self) -> list[int]:
        """The long document, then short ones; the last is what is left."""
        first = round(self.tokens * self.long)
        whole, rest = divmod(self.tokens - first, self.short)
        return [n for n in (first, *[self.short] * whole, rest) if n]


def parse(words: list[str] | None) -> tuple[Problem, Path | None]:
    """(problem, file for the figures). Raises ValueError for what cannot be measured."""
    asked = vars(parser().parse_args(words))
    path = asked.pop("json")
    check_asked(asked, ("tokens", "short", "heads", "kv_heads", "head_dim", "repeat"), path)
    if asked["tokens"] < asked["ranks"]:
        raise ValueError(f"--tokens {asked['tokens']} on {asked['ranks']} ranks: pass a token for each.")
    if asked["heads"] % asked["kv_heads"]:
        raise ValueError(
            f"{asked['heads']} query heads cannot share {asked['kv_heads']} key heads. Pass --kv-heads that divides --heads."
        )
    if not 0 <= asked["long"] <= 1:
        raise ValueError(f"--long {asked['long']:g} is a share of the tokens: 0 to 1.")
    return Problem(**asked), path


def main(arguments: list[str] | None = None) -> int:
    """0 when everything was measured, 1 when a rank failed, 2 for a mistake in what was asked, which is printed."""
    return benchmark("bench_disaggregate.py", arguments, parse, rank_main, print_figures)


def rank_main(rank: int, problem: Problem, folder: str) -> None:
    """One rank: connects and measures. Rank 0 writes the figures down."""
    with connected(rank, problem.ranks, Path(folder), problem.timeout) as communicator:
        figures = measure(problem, communicator)
        if rank == 0:
            (Path(folder) / "figures.json").write_text(json.dumps(figures))


class Twice:
    """A backend that does everything twice and keeps the second result: a rank of half the speed."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.name = inner, inner.name

    def reject(self, *call: Any) -> str | None:
        """As the inner one."""
        return self.inner.reject(*call)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bands: Any, scores: Any, state: Any = None, out: Any = None) -> Any:
        """Once on copies of what is written."""
        copy = None if state is None else type(state)(*(x.clone() for x in state))
        self.inner.forward(q, k, v, bands, scores, copy, None if out is None else out.clone())
        return self.inner.forward(q, k, v, bands, scores, state, out)

    def backward(self, *call: Any) -> None:
        """Once on copies of the sums."""
        self.inner.backward(*call[:-3], *(x.clone() for x in call[-3:]))
        self.inner.backward(*call)


def contenders(problem: Problem) -> dict[str, tuple[Strategy, bool]]:
    """(strategy, whether the last rank is slow) by name."""
    from distattn.parallel.strategy import Balance, Strategy

    told = (*[SPEEDS[0]] * (problem.ranks - 1), SPEEDS[1])
    return {
        "contiguous": (Strategy("gather"), False),
        "per-document zigzag": (Strategy("zigzag"), False),
        DISAGGREGATE: (Strategy("disaggregate"), False),
        SLOW: (Strategy("disaggregate"), True),
        TOLD: (Strategy("disaggregate", balance=Balance(speeds=told)), True),
    }


def measure(problem: Problem, communicator: Communicator) -> dict[str, Any]:
    """Seconds of forward and backward of every round, of the slowest rank; work of the busiest rank; how far results differ."""
    import torch

    from distattn.attention import ContextParallel
    from distattn.parallel.mask import documents

    mask = documents(problem.lengths())
    ready: dict[str, Callable[[], list[Tensor]]] = {}
    for name, (strategy, slow) in contenders(problem).items():
        cp = ContextParallel(schedule=strategy, communicator=communicator)
        if slow and communicator.rank == communicator.world - 1:
            kernels = cp._kernels
            cp._kernels = lambda *call, kernels=kernels: Twice(kernels(*call))  # type: ignore[assignment]
        ready[name] = prepare(problem, cp, mask)
    results = {name: work() for name, work in ready.items()}
    difference = max(
        float((a - b).norm() / b.norm()) for found in results.values() for a, b in zip(found, results["contiguous"], strict=True)
    )
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(problem.repeat):
        for name, work in ready.items():
            communicator.all_gather_bytes(b"")
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    everyone = [json.loads(text) for text in communicator.all_gather_bytes(json.dumps(seconds).encode())]
    slowest = {name: [max(part) for part in zip(*(times[name] for times in everyone), strict=True)] for name in ready}
    return {"seconds": slowest, "balance": balances(problem, mask), "difference": difference, "torch": torch.__version__}


def prepare(problem: Problem, cp: ContextParallel, mask: Mask) -> Callable[[], list[Tensor]]:
    """Forward and backward of this rank's rows. The first call returns the whole output and gradients, as all ranks have them."""
    import torch

    plan = cp.plan(mask)
    made = torch.Generator().manual_seed(0)
    heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    whole = [torch.randn(problem.tokens, h, problem.head_dim, generator=made) for h in heads]
    *inputs, dout = (cp.shard(x, plan).detach() for x in whole)
    first = True

    def work() -> list[Tensor]:
        nonlocal first
        leaves = [x.requires_grad_() for x in inputs]
        out = cp.attention(leaves[0], leaves[1], leaves[2], plan)
        assert isinstance(out, torch.Tensor)
        local = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        if not first:
            return []
        first = False
        return [cp.unshard(x, plan) for x in local]

    return work


def balances(problem: Problem, mask: Mask) -> dict[str, list[float]]:
    """Predicted time of the busiest rank over what perfect balance would give, (forward, backward); 1 is perfect."""
    from distattn.parallel.schedule import make_schedule
    from distattn.parallel.statistics import work

    found: dict[str, list[float]] = {}
    for name, (strategy, slow) in contenders(problem).items():
        schedule = make_schedule(strategy, mask, problem.ranks)
        found[name] = []
        for plan in (schedule.forward, schedule.backward()):
            load = _times(work(plan), slow)
            found[name].append(float(load.max() / (mask.bands.area / (problem.ranks - 0.5 * slow))))
    return found


def _times(pairs: Any, slow: bool) -> Any:
    """Pairs as time: the last rank takes twice as long when it is slow."""
    load = pairs.astype(float)
    load[-1] *= 2.0 if slow else 1.0
    return load


def print_figures(problem: Problem, figures: dict[str, Any]) -> None:
    """The table, and the command that made it."""
    from distattn.launch.bench_attention_single import Times

    times = {name: Times(seconds) for name, seconds in figures["seconds"].items()}
    print(
        f"forward and backward of one layer, {problem.tokens} tokens on {problem.ranks} ranks in documents of "
        f"{problem.lengths()[0]} and {problem.short}, heads {problem.heads}:{problem.kv_heads}, head size {problem.head_dim}, "
        f"float32, torch {figures['torch']}"
    )
    print(f"{'':<28}{'milliseconds':>14}{'spread':>9}{'over disaggregate':>19}{'work, busiest over ideal':>26}")
    best = times[DISAGGREGATE].median
    for name, part in times.items():
        forward, backward = figures["balance"][name]
        bound = f"{forward:.3f} / {backward:.3f}"
        print(f"{name:<28}{part.median * 1e3:>14.1f}{part.spread:>9.0%}{part.median / best:>19.2f}{bound:>26}")
    ideal = best * problem.ranks / (problem.ranks - 0.5)
    for name in (SLOW, TOLD):
        print(
            f"{name}: {ideal / times[name].median:.2f} of the throughput that the remaining speed allows (target when told: 0.90)"
        )
    print(f"relative L2 difference of outputs and gradients, at worst: {figures['difference']:.1e}")
    print(f"Made by: {figures['command']}")


if __name__ == "__main__":
    sys.exit(main())
