"""Measures decoding: one new token over a long context that is spread over ranks, as a tree and as a ring.

Tree: the keys stay, partial results travel (distattn.decode_attention). Ring: the query stays, the keys and values of every rank
go round the ring, the next ones on their way while a rank attends to those that it has, as ring attention would do it. Both use
the same cache, kernel and connections, and take turns in one run. The ranks are processes of one thread on the CPU that this
program starts and ends: python launch/bench_decode.py needs no torchrun. Use an otherwise idle machine.
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
    from distattn.kernels.contract import State
    from distattn.kv_cache import KVCache, KVShard
    from distattn.parallel.comm import Communicator

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TREE_CALLS = 5  # in one round: a tree's token takes so little time that one call would measure the clock


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("bench_decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokens", type=int, default=65536, metavar="N", help="of the context (default: 65536)")
    made.add_argument("--ranks", type=int, default=4, metavar="P", help="processes (default: 4)")
    made.add_argument("--heads", type=int, default=32, help="query heads (default: 32)")
    made.add_argument("--kv-heads", type=int, default=8, help="key heads (default: 8)")
    made.add_argument("--head-dim", type=int, default=128, metavar="D", help="head size (default: 128)")
    made.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of queries and cache (default: fp32)")
    made.add_argument("--repeat", type=int, default=7, metavar="R", help="rounds that count (default: 7)")
    made.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds that a rank waits for another")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    return made


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is measured."""

    tokens: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    repeat: int
    timeout: float


def parse(words: list[str] | None) -> tuple[Problem, Path | None]:
    """(problem, file for the figures). Raises ValueError for what cannot be measured."""
    asked = vars(parser().parse_args(words))
    path = asked.pop("json")
    check_asked(asked, ("tokens", "heads", "kv_heads", "head_dim", "repeat"), path)
    if asked["tokens"] <= asked["ranks"]:
        raise ValueError(
            f"--tokens {asked['tokens']} on {asked['ranks']} ranks: every rank needs one of its own. Pass more tokens."
        )
    if asked["heads"] % asked["kv_heads"]:
        raise ValueError(
            f"{asked['heads']} query heads cannot share {asked['kv_heads']} key heads. Pass --kv-heads that divides --heads."
        )
    return Problem(**asked), path


def main(arguments: list[str] | None = None) -> int:
    """0 when everything was measured, 1 when a rank failed, 2 for a mistake in what was asked, which is printed."""
    return benchmark("bench_decode.py", arguments, parse, rank_main, print_figures)


def rank_main(rank: int, problem: Problem, folder: str) -> None:
    """One rank: connects, fills its part of the context, measures. Rank 0 writes the figures down."""
    with connected(rank, problem.ranks, Path(folder), problem.timeout) as communicator:
        figures = measure(problem, communicator)
        if rank == 0:
            (Path(folder) / "figures.json").write_text(json.dumps(figures))


class Counting:
    """A communicator that counts the bytes it is given to send."""

    def __init__(self, inner: Communicator) -> None:
        self.inner, self.bytes = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Any) -> Any:
        self.bytes += sum(tensor.nbytes for _, tensor in sends)
        return self.inner.post(lane, sends, receives, awaited)


def measure(problem: Problem, communicator: Communicator) -> dict[str, Any]:
    """Seconds a token and layer of every round, of the slowest rank; bytes that a rank sends; how far the two results differ."""
    import torch

    from distattn.attention import ContextParallel
    from distattn.decode import attend_shard, decode_attention, plan_work
    from distattn.kernels.contract import Scores

    counting = Counting(communicator)
    cp = ContextParallel(communicator=counting)
    cache, q = fill(problem, cp)
    scores, group = Scores(problem.head_dim**-0.5), problem.heads // problem.kv_heads
    folded = q[0].unflatten(0, (problem.kv_heads, group)).transpose(0, 1).contiguous()
    ring = Ring(cache, cp)
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "tree": (lambda: decode_attention(q, cache[0], cp), TREE_CALLS),
        "ring": (lambda: ring.attend(folded, scores), 1),
        "own rows only": (
            lambda: attend_shard(folded, cache[0], plan_work(cache, 1, None, group), scores, cp._kernels),
            TREE_CALLS,
        ),
    }
    found, sent = {}, {}
    for name, (work, _) in contenders.items():  # the first call of each does not count
        found[name] = work()
        counting.bytes = 0
        work()
        sent[name] = counting.bytes
    tree, other = found["tree"][0].float(), found["ring"].o.transpose(0, 1).flatten(0, 1).float()
    difference = float((tree - other).norm() / other.norm())
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(problem.repeat):
        for name, (work, calls) in contenders.items():
            communicator.all_gather_bytes(b"")
            start = time.perf_counter()
            for _ in range(calls):
                work()
            seconds[name].append((time.perf_counter() - start) / calls)
    everyone = [json.loads(text) for text in communicator.all_gather_bytes(json.dumps([seconds, sent, difference]).encode())]
    slowest = {name: [max(part) for part in zip(*(times[name] for times, _, _ in everyone), strict=True)] for name in contenders}
    most = {name: max(counted[name] for _, counted, _ in everyone) for name in ("tree", "ring")}
    worst = max(difference for _, _, difference in everyone)
    return {"seconds": slowest, "bytes": most, "difference": worst, "torch": torch.__version__}


def fill(problem: Problem, cp: ContextParallel) -> tuple[KVCache, Tensor]:
    """A cache of one layer with random keys and values, and the query [1, H, D] of its last token."""
    import torch

    from distattn.kv_cache import KVCache
    from distattn.parallel.layout import zigzag

    dtype = getattr(torch, DTYPES[problem.dtype])
    cache = KVCache(cp, 1, problem.kv_heads, problem.head_dim, dtype=dtype, capacity=problem.tokens)
    layout = zigzag(problem.tokens - 1, cp.world)
    cache.prefill(layout)
    made = torch.Generator().manual_seed(1000 + cp.rank)
    k, v = (torch.randn(1, layout.rows(cp.rank), problem.kv_heads, problem.head_dim, generator=made).to(dtype) for _ in "kv")
    cache[0].fill(k, v)
    made.manual_seed(1)
    new = torch.randn(2, 1, 1, problem.kv_heads, problem.head_dim, generator=made).to(dtype)
    cache.extend(1)
    cache[0].append(new[0], new[1])
    return cache, torch.randn(1, problem.heads, problem.head_dim, generator=made).to(dtype)


class Ring:
    """Ring decode: P - 1 times every rank sends the keys and values that it holds to the next, while it attends to them."""

    def __init__(self, cache: KVCache, cp: ContextParallel) -> None:
        from distattn.kv_cache import KVShard

        self.cache, self.cp = cache, cp
        self.own = cache[0]
        blocks = -(-cache.rows // cache.block)
        self.blocks = blocks.tolist()
        self.buffers: list[KVShard] = []
        for _ in range(2):  # one that is attended to, one that is on its way
            buffer = KVShard(cache, 0)
            buffer.k, buffer.v = (x.new_zeros(max(self.blocks), *x.shape[1:]) for x in (self.own.k, self.own.v))
            self.buffers.append(buffer)

    def attend(self, q: Tensor, scores: Any) -> State:
        """The state of q [M, B * H_kv, D] over the whole context, on every rank."""
        import torch

        from distattn.decode import attend_shard
        from distattn.kernels.contract import State
        from distattn.parallel.comm import Awaited
        from distattn.parallel.merge_ranks import combine

        rank, world = self.cp.rank, self.cp.world
        here, states = self.own, []
        for stage in range(world):
            owner, coming = (rank - stage) % world, (rank - stage - 1) % world
            pending = None
            if stage + 1 < world:
                following = self.buffers[stage % 2]
                sends = [((rank + 1) % world, x) for x in self._bytes(here, owner)]
                receives = [((rank - 1) % world, x) for x in self._bytes(following, coming)]
                pending = self.cp.communicator.post(0, sends, receives, Awaited("ring decode", stage, world))
            states.append(attend_shard(q, here, self._everything(owner, len(q)), scores, self.cp._kernels))
            if pending is not None:
                pending.wait()
                here = following
        return (
            combine(torch.stack([s.o for s in states]), torch.stack([s.lse for s in states])) if world > 1 else State(*states[0])
        )

    def _bytes(self, shard: KVShard, owner: int) -> list[Tensor]:
        import torch

        return [x[: self.blocks[owner]].view(-1).view(torch.uint8) for x in (shard.k, shard.v)]

    def _everything(self, owner: int, rows: int) -> Any:
        """The one query is the last token, so it sees every row of every rank."""
        from distattn.decode import Work
        from distattn.kernels.bands import Band, Bands

        whole, rest = divmod(int(self.cache.rows[owner]), self.cache.block)
        part = ((whole, Bands([Band(0, rows, 0, rest)])),) if rest else ()
        return Work(((0, whole),) if whole else (), Bands([Band(0, rows, 0, self.cache.block)]), part)


def print_figures(problem: Problem, figures: dict[str, Any]) -> None:
    """The table, and the command that made it."""
    from distattn.launch.bench_attention_single import Times

    times = {name: Times(seconds) for name, seconds in figures["seconds"].items()}
    print(
        f"one token and layer, {problem.tokens} tokens on {problem.ranks} ranks, heads {problem.heads}:{problem.kv_heads}, "
        f"head size {problem.head_dim}, {problem.dtype}, torch {figures['torch']}"
    )
    print(f"{'':<16}{'milliseconds':>14}{'spread':>17}{'bytes a rank':>16}")
    for name, part in times.items():
        sent = f"{figures['bytes'][name]:,}" if name in figures["bytes"] else "-"
        print(f"{name:<16}{part.median * 1e3:>14.2f}{part.spread:>17.0%}{sent:>16}")
    ratios = ratios_of(figures)
    middle = sorted(ratios)[len(ratios) // 2]
    print(f"tree is {middle:.1f} times faster than ring (rounds: {min(ratios):.1f} to {max(ratios):.1f}; target: at least 8)")
    print(
        f"own rows only is the tree's bound: it is {times['own rows only'].median / times['tree'].median:.2f} of the tree's time"
    )
    print(f"relative L2 difference of the two results: {figures['difference']:.1e}")
    print(f"Made by: {figures['command']}")


def ratios_of(figures: dict[str, Any]) -> list[float]:
    """Ring over tree, round by round."""
    seconds = figures["seconds"]
    return [ring / tree for ring, tree in zip(seconds["ring"], seconds["tree"], strict=True)]


if __name__ == "__main__":
    sys.exit(main())
