"""Measures striped causal attention against the package ring-attention-pytorch, forward and backward, in the same processes.

Both systems get the same q, k, v and upstream gradient, are first compared with PyTorch in float64, and then take turns in
one run. Of the ratio of their times, the share of the kernels is measured apart: every rank's block work once more, of both
systems, with all rows at hand and no message. What is left of the ratio is the schedule's. The ranks are processes of one thread
on the CPU that this program starts and ends: python launch/bench_peer.py needs no torchrun. Use an otherwise idle machine.

The peer is not among the requirements of this project. It may want other versions of them, so give it an environment of its own:
pip install ring-attention-pytorch
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from distattn.launch.bench_processes import benchmark, check_asked, connected

if TYPE_CHECKING:
    from torch import Tensor

    from distattn.parallel.comm import Communicator

PEER = "ring-attention-pytorch"
SCHEDULES = ("striped", "zigzag", "ring")
TENSORS = ("out", "dq", "dk", "dv")
FORWARD, BOTH = "forward", "forward and backward"
# Relative L2 against float64. Float32 sums over some thousand keys are off by about 1e-6; a lost hop or a mask that is off by one
# diagonal by 1e-3 and more.
TOLERANCE = 1e-5
BUSY = 1.1  # by the clock over the processor's time: from here on other programs are part of the figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("bench_peer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the sequence (default: 8192)")
    made.add_argument("--ranks", type=int, default=2, metavar="P", help="processes (default: 2)")
    made.add_argument("--heads", type=int, default=8, help="of queries and of keys (default: 8)")
    made.add_argument("--head-dim", type=int, default=64, metavar="D", help="head size (default: 64)")
    made.add_argument(
        "--schedule", choices=SCHEDULES, default="striped", help="of distattn; the peer is striped (default: striped)"
    )
    made.add_argument(
        "--bucket", type=int, default=512, metavar="B", help="rows of the peer's blocks (default: 512, as its model's)"
    )
    made.add_argument("--repeat", type=int, default=5, metavar="R", help="rounds that count (default: 5)")
    made.add_argument(
        "--known-fault",
        action="store_true",
        help="measure the peer's backward pass also where dk and dv are wrong in the one way that costs no work: summed up "
        "right, then handed out wrong. Without this flag such a figure is refused",
    )
    made.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds that a rank waits for another")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    return made


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is measured."""

    tokens: int
    ranks: int
    heads: int
    head_dim: int
    schedule: str
    bucket: int
    repeat: int
    known_fault: bool
    timeout: float


def parse(words: list[str] | None) -> tuple[Problem, Path | None]:
    """(problem, file for the figures). Raises ValueError for what cannot be measured."""
    asked = vars(parser().parse_args(words))
    path = asked.pop("json")
    check_asked(asked, ("tokens", "heads", "head_dim", "bucket", "repeat"), path)
    unit = asked["ranks"] * asked["bucket"]
    if asked["tokens"] % unit:
        raise ValueError(
            f"--tokens {asked['tokens']}: the peer needs as many rows on every rank, in whole buckets, so a multiple of "
            f"{asked['ranks']} x {asked['bucket']} = {unit}. Pass {max(1, round(asked['tokens'] / unit)) * unit}, "
            "or another --bucket."
        )
    if importlib.util.find_spec("ring_attention_pytorch") is None:
        raise ValueError(
            f"The package {PEER} is not installed, and this program measures against it. Run: pip install {PEER} "
            "(in an environment of its own: it may want other versions of what is installed here)."
        )
    return Problem(**asked), path


def main(arguments: list[str] | None = None) -> int:
    """0 when all was measured, 1 when a figure was refused or a rank failed, 2 for a mistake in what was asked; it is printed."""
    return benchmark("bench_peer.py", arguments, parse, rank_main, print_figures, save_truth)


def save_truth(problem: Problem, folder: Path) -> None:
    """For the ranks, which compare with it."""
    import torch

    torch.save(make_truth(problem), folder / "truth.pt")


def make_truth(problem: Problem) -> dict[str, Tensor]:
    """q, k, v, dout [N, H, D] in float32, and out, dq, dk, dv as PyTorch on one device has them in float64."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    made = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(problem.tokens, problem.heads, problem.head_dim, generator=made) for _ in range(4))
    *wide, upstream = (x.double().transpose(0, 1)[None] for x in (q, k, v, dout))
    results = one_call(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), wide, upstream, True)
    right = {name: x[0].transpose(0, 1).contiguous() for name, x in zip(TENSORS, results, strict=True)}
    return {"q": q, "k": k, "v": v, "dout": dout, **right}


def rank_main(rank: int, problem: Problem, folder: str) -> None:
    """One rank: connects, computes, measures. Rank 0 writes the figures down."""
    import torch

    with connected(rank, problem.ranks, Path(folder), problem.timeout) as communicator:
        figures = measure(problem, communicator, torch.load(Path(folder) / "truth.pt", mmap=True))
        if rank == 0:
            (Path(folder) / "figures.json").write_text(json.dumps(figures))


class System(Protocol):
    """One of the two that are compared, on one rank. ``positions``: which tokens its rows are, by rank."""

    positions: list[Tensor]

    def attend(self, backward: bool) -> list[Tensor]:
        """out, and with ``backward`` dq, dk, dv, of this rank's rows [T, H, D]: one call, messages and all."""

    def work(self, backward: bool) -> object:
        """This rank's block work of such a call, without a message."""


class Ours:
    """distattn through its public interface; its kernel calls once more without messages."""

    def __init__(self, problem: Problem, communicator: Communicator, full: dict[str, Tensor]):
        import torch

        from distattn.attention import ContextParallel
        from distattn.launch.bench_peer_work import LocalWork
        from distattn.parallel.mask import causal

        self.cp = ContextParallel(schedule=problem.schedule, communicator=communicator)
        self.plan = self.cp.plan(causal(problem.tokens))
        self.positions = [torch.from_numpy(self.plan.layout.positions(rank)) for rank in range(problem.ranks)]
        *self.inputs, self.dout = (full[name][self.positions[self.cp.rank]] for name in ("q", "k", "v", "dout"))
        q, k, v = self.inputs
        out, lse = (self.cp.unshard(x, self.plan) for x in self.cp.attention(q, k, v, self.plan, return_lse=True))
        self.local = LocalWork(self.cp, self.plan, {**full, "out": out, "lse": lse})

    def attend(self, backward: bool) -> list[Tensor]:
        return one_call(lambda q, k, v: self.cp.attention(q, k, v, self.plan), self.inputs, self.dout, backward)

    def work(self, backward: bool) -> object:
        return self.local.run(backward)


class Peer:
    """ring_flash_attn of the installed package. Its blocks are buckets: bucket c of C holds tokens c, C + c, 2 C + c, ..., and
    rank r the buckets from r C / P on."""

    def __init__(self, problem: Problem, rank: int, full: dict[str, Tensor]):
        import torch
        from ring_attention_pytorch import ring_flash_attn

        buckets = torch.arange(problem.tokens).view(problem.bucket, -1).t()
        self.positions = list(buckets.reshape(problem.ranks, -1))
        self.shards = [[full[name][rows][None] for name in ("q", "k", "v")] for rows in self.positions]
        self.rank, self.dout = rank, full["dout"][self.positions[rank]][None]
        self.call = lambda q, k, v, ring: ring_flash_attn(
            q, k, v, causal=True, bucket_size=problem.bucket, striped_ring_attn=True, ring_reduce_col=ring
        )

    def attend(self, backward: bool) -> list[Tensor]:
        found = one_call(lambda q, k, v: self.call(q, k, v, True), self.shards[self.rank], self.dout, backward)
        return [x[0] for x in found]

    def work(self, backward: bool) -> object:
        """Its function without the ring, once for the keys of every rank: the blocks of a pass, and P small sets of buffers."""
        q = self.shards[self.rank][0]
        return [one_call(lambda q, k, v: self.call(q, k, v, False), [q, k, v], self.dout, backward) for _, k, v in self.shards]


def one_call(attend: Callable[..., Any], inputs: list[Tensor], dout: Tensor, backward: bool) -> list[Tensor]:
    """out, and with ``backward`` the gradients of the inputs."""
    import torch

    if not backward:
        with torch.no_grad():
            return [attend(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def relative(found: Tensor, right: Tensor) -> float:
    """Relative L2 difference; infinite for what is not finite."""
    difference = float((found.double() - right).norm() / right.norm())
    return difference if math.isfinite(difference) else math.inf


def measure(problem: Problem, communicator: Communicator, truth: dict[str, Tensor]) -> dict[str, Any]:
    """Errors of both, what is refused for that, and the seconds of every round, of the slowest rank, by the clock and of its
    processor. The same on every rank."""
    import torch

    def slowest(mine: Any) -> list[Any]:
        return [json.loads(text) for text in communicator.all_gather_bytes(json.dumps(mine).encode())]

    peer = Peer(problem, communicator.rank, truth)
    systems: dict[str, System] = {"distattn": Ours(problem, communicator, truth), PEER: peer}
    errors: dict[str, dict[str, float]] = {}
    for name, system in systems.items():
        found = dict(zip(TENSORS, system.attend(True), strict=True))
        mine = {x: relative(found[x], truth[x][system.positions[communicator.rank]]) for x in TENSORS}
        if name == PEER:
            mine["fault"] = handed_out_wrong(found, truth, peer.positions, communicator.rank)
        errors[name] = {x: max(one[x] for one in slowest(mine)) for x in mine}
    fault = errors[PEER].pop("fault") <= TOLERANCE
    kinds, refused = judge(errors, fault, problem.known_fault)
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in contenders(systems)} for kind in kinds}
    processor: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in contenders(systems)} for kind in kinds}
    for turn in range(problem.repeat + 1):  # the first round does not count
        for kind in kinds:
            for name, work in contenders(systems).items():
                communicator.all_gather_bytes(b"")
                begun = time.perf_counter(), time.process_time()
                work(kind == BOTH)
                spent = slowest([time.perf_counter() - begun[0], time.process_time() - begun[1]])
                if turn:
                    for figures, values in zip((seconds, processor), zip(*spent, strict=True), strict=True):
                        figures[kind][name].append(max(values))
        if communicator.rank == 0 and kinds:
            print(f"round {turn} of {problem.repeat}", file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, PEER: importlib.metadata.version(PEER)}
    return {
        "versions": versions,
        "errors": errors,
        "fault": fault,
        "refused": refused,
        "seconds": seconds,
        "processor_seconds": processor,
    }


def contenders(systems: dict[str, System]) -> dict[str, Callable[[bool], object]]:
    """What takes turns: the calls of both, and their kernels alone."""
    return {
        **{name: system.attend for name, system in systems.items()},
        **{kernels(name): system.work for name, system in systems.items()},
    }


def kernels(name: str) -> str:
    """The name of a system's work without messages."""
    return f"{name}, kernels alone"


def handed_out_wrong(found: dict[str, Tensor], truth: dict[str, Tensor], positions: list[Tensor], rank: int) -> float:
    """How far the peer's dk and dv are from what they are with its known fault, which costs no work and saves none.

    A rank unpacks the pair (dk, dv) that comes home and the pair of the next rank's rows, which it has just sent on, as if they
    were dk and dv. Autograd sums over the axis too many: dk is dk + dv, dv is dk + dv of the next rank's rows.
    """
    sums = truth["dk"] + truth["dv"]
    own, following = positions[rank], positions[(rank + 1) % len(positions)]
    return max(relative(found["dk"], sums[own]), relative(found["dv"], sums[following]))


def judge(errors: dict[str, dict[str, float]], fault: bool, known_fault: bool) -> tuple[list[str], list[str]]:
    """(what may be measured, why the rest is refused). A time of a wrong result is no figure."""
    refused = []
    kinds = [FORWARD, BOTH]
    for name, found in errors.items():
        wrong = [x for x in TENSORS if not found[x] <= TOLERANCE]
        if not wrong or (name == PEER and wrong == ["dk", "dv"] and fault and known_fault):
            continue
        kinds = [] if "out" in wrong else [kind for kind in kinds if kind == FORWARD]
        said = ", ".join(f"{x} by {found[x]:.1e}" for x in wrong)
        note = (
            " (summed up right, then handed out wrong: --known-fault measures it all the same)" if name == PEER and fault else ""
        )
        subject = "all figures are" if "out" in wrong else f"the figure of {BOTH} is"
        refused.append(f"{subject} refused: {name} is wrong, {said} (tolerance {TOLERANCE:.0e}){note}")
    return kinds, refused


class Shares(NamedTuple):
    """The peer's time over ours, as the product of what its kernels take over ours and what remains: the schedule's."""

    total: float
    kernel: float

    @property
    def schedule(self) -> float:
        return self.total / self.kernel


def shares(seconds: dict[str, float]) -> Shares:
    """From the seconds of each contender."""
    return Shares(seconds[PEER] / seconds["distattn"], seconds[kernels(PEER)] / seconds[kernels("distattn")])


def print_figures(problem: Problem, figures: dict[str, Any]) -> None:
    """The tables, and the command that made them."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    print(
        f"causal attention of {problem.tokens} tokens, {problem.heads} heads of {problem.head_dim}, float32, on {problem.ranks} "
        f"ranks of one thread; distattn {problem.schedule}, the peer striped with buckets of {problem.bucket}; {versions}"
    )
    print(
        "relative L2 error against float64, worst rank: "
        + "; ".join(f"{name} " + ", ".join(f"{x} {found[x]:.1e}" for x in TENSORS) for name, found in figures["errors"].items())
    )
    for kind, seconds in figures["seconds"].items():
        print_kind(kind, seconds, figures["processor_seconds"][kind])
    if figures["fault"] and BOTH in figures["seconds"]:
        print(
            "\nThe peer's dk and dv are NOT the gradients. They were summed up right and handed out wrong (dk + dv, and dk + dv "
            "of the next rank), which was checked: its time is that of the whole work, its result is of no use."
        )
    for sentence in figures["refused"]:
        print(f"\n{sentence}")
    print(f"Made by: {figures['command']}")


def print_kind(kind: str, seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> None:
    """The table of one kind of pass, the shares, and whether the machine was busy with something else."""
    from distattn.launch.bench_attention_single import Times

    print(f"\n{kind:<45}{'seconds':>9}{'spread':>9}{'processor':>11}{'over its kernels':>18}")
    times = {name: Times(values) for name, values in seconds.items()}
    for name, part in times.items():
        over = f"{part.median / times[kernels(name)].median:.3f}" if kernels(name) in times else "-"
        print(f"{name:<45}{part.median:>9.3f}{part.spread:>9.0%}{Times(processor[name]).median:>11.3f}{over:>18}")
    middle = shares({name: part.median for name, part in times.items()})
    rounds = [shares(dict(zip(seconds, one, strict=True))) for one in zip(*seconds.values(), strict=True)]
    for name, value in (
        ("peer's time over ours", "total"),
        ("of that the kernels'", "kernel"),
        ("and the schedule's", "schedule"),
    ):
        values = [getattr(one, value) for one in rounds]
        print(f"{name:<45}{getattr(middle, value):>9.3f}   (rounds: {min(values):.3f} to {max(values):.3f})")
    alone = [kernels(name) for name in ("distattn", PEER)]
    ours, peers = (Times(processor[name]).median for name in alone)
    print(f"{'the kernels by processor seconds':<45}{peers / ours:>9.3f}")
    waited = max(times[name].median / Times(processor[name]).median for name in alone)
    if waited > BUSY:
        print(f"THE MACHINE WAS BUSY: kernels that wait for nobody took {waited:.1f} times their processor's seconds.")


if __name__ == "__main__":
    sys.exit(main())
