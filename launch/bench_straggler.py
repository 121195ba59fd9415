"""Trains while one rank turns slow, in real time: when does it get less attention to compute, and what is lost then?

Three runs of one training with `schedule: disaggregate`, on the same packed documents, take their steps in turns, so that each
step of one stands beside the same step of the others: with no slow rank; with the last rank's attention kernels doing everything
twice from some step on, and nothing done about it; and the same with `speeds: measure`. The first run measures speeds too: what
it finds there, it finds without cause. The ranks are processes of one thread on the CPU that this program starts and ends: python
launch/bench_straggler.py needs no torchrun. Use a machine with a core for each rank; --beside loads it with other programs.

With --hold the last rank's kernels do nothing twice, but another program runs on its core, and ranks stay on theirs (Linux). That
is followed only where it lasts: pass --after 40.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distattn.launch.bench_disaggregate import Twice
from distattn.launch.bench_processes import benchmark, check_asked, connected

if TYPE_CHECKING:
    from distattn.attention import ContextParallel
    from distattn.config import Config
    from distattn.kernels.contract import Backend
    from distattn.parallel.comm import Communicator
    from distattn.trainer import Trainer

WHOLE, LEFT, MEASURED = "no rank slow", "one rank slow, equal speeds", "one rank slow, speeds measured"
WAYS = (WHOLE, LEFT, MEASURED)
SLOWNESS = 2  # times that the slow rank computes everything
TARGET = 0.90
WARM = 2  # first steps that do not count: memory is allocated, processes start
IDLE = 0.9  # of its core that a kernel has on an idle machine, at least
PROGRESS = 5  # steps between lines that tell how far it is
COUNTS = ("tokens", "dim", "layers", "heads", "kv_heads", "before", "after")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "bench_straggler.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tokens", type=int, default=8192, metavar="N", help="of a packed sequence, on all ranks (default: 8192)")
    made.add_argument("--ranks", type=int, default=2, metavar="P", help="processes (default: 2)")
    made.add_argument("--dim", type=int, default=256, metavar="D", help="of the model (default: 256)")
    made.add_argument("--layers", type=int, default=2, metavar="L", help="of the model (default: 2)")
    made.add_argument("--heads", type=int, default=4, help="query heads (default: 4)")
    made.add_argument("--kv-heads", type=int, default=2, help="key heads (default: 2)")
    made.add_argument("--before", type=int, default=10, metavar="S", help="steps before the rank turns slow (default: 10)")
    made.add_argument("--after", type=int, default=20, metavar="S", help="steps from then on (default: 20)")
    made.add_argument("--hold", action="store_true", help="instead of computing twice, the last rank shares its core")
    made.add_argument("--beside", type=int, default=0, metavar="N", help="programs that compute beside the ranks (default: 0)")
    made.add_argument("--seed", type=int, default=0, help="of the documents (default: 0)")
    made.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds that a rank waits for another")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    return made


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is measured."""

    tokens: int
    ranks: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    before: int
    after: int
    hold: bool
    beside: int
    seed: int
    timeout: float

    @property
    def steps(self) -> int:
        return self.before + self.after

    def config(self, folder: Path, way: str) -> Config:
        """Of the training. Raises ValueError for what cannot be trained."""
        from distattn.config import Config, check

        config = Config(out=str(folder / way.replace(" ", "-")))
        for name in ("dim", "layers", "heads", "kv_heads"):
            setattr(config.model, name, getattr(self, name))
        config.model.hidden_dim = 2 * self.dim
        config.data.path, config.data.sequence_length, config.data.held_out = str(folder / "tokens"), self.tokens, 0.0
        config.train.steps, config.train.warmup_steps, config.train.device = self.steps, 1, "cpu"
        config.parallel.schedule, config.parallel.timeout = "disaggregate", self.timeout
        config.parallel.speeds = "equal" if way == LEFT else "measure"
        check(config, self.ranks)
        return config


def parse(words: list[str] | None) -> tuple[Problem, Path | None]:
    """(problem, file for the figures). Raises ValueError for what cannot be measured."""
    asked = vars(parser().parse_args(words))
    path = asked.pop("json")
    check_asked(asked, COUNTS, path)
    if asked["beside"] < 0:
        raise ValueError(f"--beside {asked['beside']} was asked for. Pass 0 or more.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if asked["hold"] and cores < asked["ranks"]:
        raise ValueError(
            f"--hold keeps each of {asked['ranks']} ranks on a core of its own; this system gives {cores} to choose from."
        )
    problem = Problem(**asked)
    problem.config(Path(), WHOLE)
    return problem, path


def main(arguments: list[str] | None = None) -> int:
    """0 when everything was measured, 1 when a rank failed or was not relieved, 2 for a mistake in what was asked."""
    return benchmark("bench_straggler.py", arguments, parse, rank_main, print_figures, prepare)


def prepare(problem: Problem, folder: Path) -> None:
    """Writes the documents: most of 1/32 of a sequence, and one in sixteen of half of one."""
    import numpy as np

    from distattn.data import write_tokens
    from distattn.document_lengths import document_lengths

    lengths = document_lengths("bimodal", problem.tokens * problem.steps, problem.seed, mean=max(2, problem.tokens // 16))
    random = np.random.default_rng(problem.seed)
    texts = [np.resize(random.integers(97, 123, 61), size) for size in lengths.tolist()]  # which repeat themselves
    write_tokens(folder / "tokens", texts, 256, "byte")


def rank_main(rank: int, problem: Problem, folder: str) -> None:
    """One rank: connects and trains. Rank 0 writes the figures down."""
    if problem.hold:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    with connected(rank, problem.ranks, Path(folder), problem.timeout) as communicator:
        with busy(problem.beside if rank == 0 else 0):
            figures = measure(problem, Path(folder), communicator)
        if rank == 0:
            (Path(folder) / "figures.json").write_text(json.dumps(figures))


@contextlib.contextmanager
def busy(programs: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Other programs that take what they can of a core each, of those of this process."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield running
    finally:
        for program in running:
            program.kill()
            program.wait()


class Straggler:
    """What chooses the kernels of a rank, which compute everything twice while ``slow``. Its speed is measured with that."""

    def __init__(self, cp: ContextParallel) -> None:
        self.slow, self.kernels = False, cp._kernels
        cp._kernels = self  # type: ignore[assignment]

    def __call__(self, *call: Any) -> Backend:
        from distattn.kernels.timed import Timed

        backend = self.kernels(*call)
        if not self.slow:
            return backend
        return Timed(Twice(backend.backend), backend.stopwatch) if isinstance(backend, Timed) else Twice(backend)


class Held:
    """Another program on the core of a rank, which runs while ``slow``."""

    def __init__(self, program: subprocess.Popen[bytes]) -> None:
        self.program = program
        self.slow = False

    @property
    def slow(self) -> bool:
        """Whether it runs."""
        return self._runs

    @slow.setter
    def slow(self, runs: bool) -> None:
        self._runs = runs
        self.program.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)


def measure(problem: Problem, folder: Path, communicator: Communicator) -> dict[str, Any]:
    """Of every step of every way: seconds of the slowest rank, and what the ranks' kernels did, where that is measured."""
    import torch

    from distattn.parallelize import make_world
    from distattn.speeds import UNIT
    from distattn.trainer import Trainer

    last = communicator.rank == communicator.world - 1
    runs: dict[str, tuple[Trainer, Straggler | Held]] = {}
    found: dict[str, Any] = {"seconds": {way: [] for way in WAYS}, "kernels": {}, "speeds": {}, "losses": {}}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # trainers tell of speeds; whose would not be known
        program = stack.enter_context(busy(int(problem.hold and last)))
        for way in WAYS:
            config = problem.config(folder, way)
            trainer = Trainer(config, make_world(config, torch.device("cpu")))
            stack.callback(trainer.cp.close)
            stack.enter_context(contextlib.closing(trainer.prefetch))
            trainer.begin()
            runs[way] = trainer, Held(program[0]) if program else Straggler(trainer.cp)
        for step in range(problem.steps):
            for way, (trainer, straggler) in runs.items():
                straggler.slow = last and way != WHOLE and step >= problem.before
                communicator.all_gather_bytes(b"")
                begun = time.perf_counter()
                loss = trainer.take_step()[0]
                took = json.dumps(time.perf_counter() - begun).encode()
                found["seconds"][way].append(max(json.loads(answer) for answer in communicator.all_gather_bytes(took)))
                found["losses"].setdefault(way, []).append(loss.item())
                if trainer.speeds is not None:
                    found["kernels"].setdefault(way, []).append([rank._asdict() for rank in trainer.speeds.last])
                    found["speeds"].setdefault(way, []).append([speed / UNIT for speed in trainer.speeds.current])
            if communicator.rank == 0 and (step + 1) % PROGRESS == 0:
                took_now = ", ".join(f"{found['seconds'][way][-1]:.2f}" for way in WAYS)
                print(f"step {step + 1}/{problem.steps}: {took_now} s", file=sys.stderr, flush=True)
    return {**found, "torch": torch.__version__}


class Phases(NamedTuple):
    """Steps: those before the rank turns slow, those until it is relieved, and those from then on."""

    before: slice
    slow: slice
    relieved: slice


def phases(problem: Problem, figures: dict[str, Any]) -> Phases:
    """Where the work of the slow rank shows that plans have its speed. Raises ValueError where they never do."""
    fair, right = 1 / problem.ranks, 1 / (SLOWNESS * (problem.ranks - 1) + 1)
    work = [[rank["work"] for rank in ranks] for ranks in figures["kernels"][MEASURED]]
    for step in range(problem.before, problem.steps):
        if work[step][-1] / sum(work[step]) < (fair + right) / 2:
            return Phases(slice(WARM, problem.before), slice(problem.before, step), slice(step, problem.steps))
    raise ValueError(f"{problem.after} steps after a rank turned slow it still has its share of the work.")


def throughput(problem: Problem, figures: dict[str, Any], steps: slice, way: str = MEASURED) -> tuple[float, float]:
    """Throughput over what the remaining speed allows, medians over steps: of the whole step, and of its attention.

    Attention is what kernels of the busiest rank take where no rank is slow; the rest of that step is the same with a slow one,
    unless its core is held: then it is slow in all it does.
    """
    whole, slow = (figures["seconds"][name][steps] for name in (WHOLE, way))
    kernels = [max(rank["elapsed"] for rank in ranks) / 1e9 for ranks in figures["kernels"][WHOLE][steps]]
    longer = problem.ranks / (problem.ranks - 1 + 1 / SLOWNESS)
    rest = [(w - k) * (SLOWNESS if problem.hold else 1) for w, k in zip(whole, kernels, strict=True)]
    both = [(r + k * longer) / s for r, k, s in zip(rest, kernels, slow, strict=True)]
    attention = [k * longer / (s - r) for r, k, s in zip(rest, kernels, slow, strict=True)]
    return statistics.median(both), statistics.median(attention)


def print_figures(problem: Problem, figures: dict[str, Any]) -> None:
    """The table, and the command that made it."""
    beside = f", beside {problem.beside} other programs" if problem.beside else ""
    print(
        f"{problem.steps} steps of {problem.tokens} tokens on {problem.ranks} ranks, {problem.layers} layers of {problem.dim}, "
        f"heads {problem.heads}:{problem.kv_heads}, float32, torch {figures['torch']}{beside}; rank {problem.ranks - 1} "
        f"{'shares its core' if problem.hold else f'computes its attention {SLOWNESS} times'} from step {problem.before + 1} on"
    )
    try:
        found = phases(problem, figures)
    except ValueError as error:
        print(f"{error}\nMade by: {figures['command']}")
        figures["refused"] = str(error)
        return
    print(f"{'ms a step, medians':<34}{'before':>10}{'until relieved':>16}{'relieved':>10}")
    for way in WAYS:
        times = [statistics.median(figures["seconds"][way][steps]) * 1e3 for steps in found]
        print(f"{way:<34}{times[0]:>10.0f}{times[1]:>16.0f}{times[2]:>10.0f}")
    known = next(step for step in range(problem.before, problem.steps) if figures["speeds"][MEASURED][step][-1] < 1)
    print(
        f"known after {known + 1 - problem.before} slow steps, relieved after {found.relieved.start - problem.before}; "
        f"speeds found {figures['speeds'][MEASURED][-1]}"
    )
    for way, steps, name in (
        (MEASURED, found.relieved, "relieved"),
        (MEASURED, found.slow, "until relieved"),
        (LEFT, found.relieved, "never relieved"),
    ):
        step, attention = throughput(problem, figures, steps, way)
        print(
            f"{name}: {attention:.2f} of the attention that the remaining speed allows (target when relieved {TARGET:.2f}), "
            f"{step:.2f} of the step"
        )
    false = changes(figures["speeds"][WHOLE]) + changes(figures["speeds"][MEASURED][: problem.before])
    print(f"changes of speed without cause: {false}; with cause: {changes(figures['speeds'][MEASURED][problem.before - 1 :])}")
    measured = [ranks for way in figures["kernels"].values() for ranks in way]
    shares = [sum(rank["nanoseconds"] for rank in ranks) / sum(rank["elapsed"] for rank in ranks) for ranks in measured]
    low = sum(share < IDLE for share in shares)
    print(
        f"kernels had {statistics.median(shares):.0%} of their cores (median step), less than {IDLE:.0%} in {low} of "
        f"{len(shares)} steps"
    )
    losses = [figures["losses"][way] for way in WAYS]
    apart = max(abs(a - b) / abs(a) for other in losses[1:] for a, b in zip(losses[0], other, strict=True))
    print(f"relative difference of losses, at worst: {apart:.1e}")
    print(f"Made by: {figures['command']}")


def changes(speeds: list[list[float]]) -> int:
    """How often speeds changed from one step to the next."""
    return sum(one != other for one, other in itertools.pairwise(speeds))


if __name__ == "__main__":
    sys.exit(main())
