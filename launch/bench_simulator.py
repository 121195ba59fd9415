"""The simulator against reality: predicted over measured time of attention steps on this machine's CPU ranks.

python launch/bench_simulator.py --cluster FILE    with a description that launch/calibrate.py wrote on this machine

Shapes are not those that the calibration measured. A step is forward and backward through the public interface; its time is that
of the slowest rank, the median over rounds in which the schedules take turns. Prints every row, the median and the worst error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distattn.launch.doctor import Parser, print_line
from distattn.launch.other_load import OtherLoad
from distattn.launch.train import Place

if TYPE_CHECKING:
    from distattn.parallel.cluster import Cluster
    from distattn.parallel.comm import Communicator
    from distattn.parallel.mask import Mask
    from distattn.parallel.shape import Shape

SCHEDULES = ("ring", "zigzag", "gather", "tree")
QUIET = 0.03  # of the cores, for other programs; more is no measurement


@dataclass(frozen=True)
class Case:
    """A problem: heads as query:key heads, the mask by a word."""

    tokens: int
    heads: int
    kv_heads: int
    d: int
    mask: str = "causal"

    def make_mask(self) -> Mask:
        from distattn.parallel import mask as masks

        if self.mask == "window":
            return masks.sliding_window(self.tokens, self.tokens // 8)
        if self.mask == "documents":
            lengths = [self.tokens // 2, self.tokens // 8, self.tokens // 16]
            return masks.documents([*lengths, self.tokens - sum(lengths)])
        return {"causal": masks.causal, "full": masks.full}[self.mask](self.tokens)

    def shape(self) -> Shape:
        import torch

        from distattn.parallel.shape import Shape

        return Shape(self.heads, self.kv_heads, self.d, self.d, torch.float32)

    def __str__(self) -> str:
        return f"{self.mask} {self.tokens} tokens, {self.heads}:{self.kv_heads} x {self.d}"


CASES = (
    Case(1024, 4, 4, 64),
    Case(2048, 4, 4, 64),
    Case(4096, 4, 4, 64),
    Case(2048, 8, 2, 64),
    Case(2048, 4, 4, 128),
    Case(4096, 4, 1, 64),
    Case(2048, 6, 6, 48),
    Case(1536, 4, 4, 64, "full"),
    Case(3072, 2, 2, 96, "full"),
    Case(3000, 5, 5, 80),
    Case(4096, 4, 4, 64, "window"),
    Case(4096, 4, 4, 64, "documents"),
    Case(3072, 12, 3, 32),
    Case(1536, 16, 16, 64),
)


@dataclass(frozen=True)
class Row:
    """Seconds of one schedule on one case, forward alone and the whole step."""

    world: int
    case: str
    schedule: str
    forward: float
    step: float
    predicted_forward: float
    predicted_step: float
    spread: float = 0.0  # of the rounds of the step, as a part of their median
    others: float = 0.0  # part of the cores that other programs had in the worst of these rounds

    @property
    def error(self) -> float:
        """Of the step, as a part of what was measured."""
        return self.predicted_step / self.step - 1

    @property
    def forward_error(self) -> float:
        return self.predicted_forward / self.forward - 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("bench_simulator.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cluster", default="gloo2", help="a description that ships, or a file (default: gloo2)")
    made.add_argument(
        "--worlds", default="2,4", metavar="P,P", help="ranks of one thread each, one run after another (default: 2,4)"
    )
    made.add_argument("--rounds", type=int, default=5, metavar="N", help="measured steps of each schedule and case (default: 5)")
    made.add_argument("--cases", type=int, default=len(CASES), metavar="N", help=f"only the first N of {len(CASES)}")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 something failed, 2 a mistake in what was asked, which is printed."""
    words = sys.argv[1:] if arguments is None else arguments
    place = Place.of_this_process()
    if {"-h", "--help"} & set(words):
        parser().print_help()
        return 0
    try:
        asked = parser().parse_args(words)
        from distattn.parallel.cluster import load_cluster

        cluster = load_cluster(asked.cluster)
        worlds = [int(word) for word in asked.worlds.split(",")]
        if min(worlds) < 2 or asked.rounds < 1 or not 1 <= asked.cases <= len(CASES):
            raise ValueError(f"Pass --worlds of 2 or more, --rounds of 1 or more and --cases of 1 to {len(CASES)}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if place.started_by_torchrun:
        return run_rank(asked, cluster)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-simulator-") as folder:
        for world in worlds:
            path = Path(folder) / f"{world}.json"
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
            command = [*start, *words, "--json", str(path)]
            if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
                return 1
            rows += [Row(**row) for row in json.loads(path.read_text())]
    report(rows)
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def run_rank(asked: argparse.Namespace, cluster: Cluster) -> int:
    """One world: all cases."""
    import torch
    import torch.distributed as dist

    from distattn.parallel.comm_process import ProcessCommunicator

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    communicator = ProcessCommunicator(lanes=4)
    say = print_line if communicator.rank == 0 else lambda _: None
    rows = [row for case in CASES[: asked.cases] for row in measure(communicator, case, cluster, asked.rounds, say)]
    if communicator.rank == 0:
        asked.json.write_text(json.dumps([asdict(row) for row in rows]))
    communicator.all_gather_bytes(b"done")
    communicator.close()
    dist.destroy_process_group()
    return 0


def measure(communicator: Communicator, case: Case, cluster: Cluster, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Every schedule on a case, in turns; the same rows on all ranks."""
    import torch

    from distattn.attention import ContextParallel
    from distattn.launch.bench_attention_single import clock, step

    cpu = torch.device("cpu")
    work: dict[str, Callable[[bool], float]] = {}
    for schedule in SCHEDULES:
        cp = ContextParallel(schedule=schedule, communicator=communicator)
        plan = cp.plan(case.make_mask())
        shapes = [(plan.rows, heads, case.d) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
        *inputs, dout = (torch.randn(shape) for shape in shapes)
        attend = partial(cp.attention, plan=plan)
        work[schedule] = lambda both, a=attend, i=inputs, d=dout: clock(cpu, partial(step, a, i, d, both))  # type: ignore[misc]
    turns, others = quiet_turns(communicator, work, rounds)
    rows = []
    for schedule in SCHEDULES:
        forward, both = ([turn[schedule, x] for turn in turns] for x in (False, True))
        predicted = predict(schedule, case, communicator.world, cluster)
        medians = statistics.median(forward), statistics.median(both)
        rows.append(Row(communicator.world, str(case), schedule, *medians, *predicted, spread(both), others))
        row = rows[-1]
        predicted = f"predicted {row.predicted_step * 1e3:.1f} ({row.error:+.0%})"
        busy = f", OTHER PROGRAMS had {others:.0%} of the cores" if others > QUIET else ""
        say(f"{row.world} ranks, {case}, {schedule}: {row.step * 1e3:.1f} ms +- {row.spread:.0%}, {predicted}{busy}")
    return rows


def quiet_turns(
    communicator: Communicator, work: dict[str, Callable[[bool], float]], rounds: int
) -> tuple[list[dict[tuple[str, bool], float]], float]:
    """(seconds of the slowest rank by (schedule, whether backward too), turn by turn; the most that others had of the cores).

    The same on all ranks. A turn in which other programs were busy is taken again, up to three times as many in all; then the
    quietest count.
    """
    turns: list[tuple[float, int, dict[tuple[str, bool], float]]] = []
    load = OtherLoad(communicator)
    for turn in range(3 * rounds + 1):
        seconds = {}
        for schedule, run in work.items():
            for both in (False, True):
                communicator.all_gather_bytes(b"")
                answers = communicator.all_gather_bytes(json.dumps(run(both)).encode())
                seconds[schedule, both] = max(json.loads(answer) for answer in answers)
        others = load.share()
        if turn:  # the first one compiles programs
            turns.append((others, turn, seconds))
        if sum(share <= QUIET for share, _, _ in turns) == rounds:
            break
    quietest = sorted(turns, key=lambda entry: entry[:2])[:rounds]
    return [seconds for _, _, seconds in quietest], quietest[-1][0]


def spread(seconds: list[float]) -> float:
    """Half of the range without the two outermost eighths, as a part of the median: how far another median may lie."""
    low, *_, high = statistics.quantiles(seconds, n=8) if len(seconds) > 1 else seconds * 2
    return (high - low) / 2 / statistics.median(seconds)


def predict(schedule: str, case: Case, world: int, cluster: Cluster) -> tuple[float, float]:
    """(forward, step): seconds as the simulator sees them; a rank begins its backward as soon as its forward is done."""
    from distattn.parallel.schedule import make_schedule
    from distattn.parallel.simulate import simulate_pass

    made, shape = make_schedule(schedule, case.make_mask(), world), case.shape()
    back = made.backward(made.rotation(shape))
    return tuple(simulate_pass(plans, [shape], cluster).seconds for plans in ([made.forward], [made.forward, back]))  # type: ignore[return-value]


def report(rows: list[Row]) -> None:
    """A table by world and case, and errors: median and worst, overall and by schedule."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="predicted over measured time of an attention step, ms measured")
    for column in ("ranks", "case", *SCHEDULES):
        table.add_column(column, justify="left" if column == "case" else "right")
    for world, case in dict.fromkeys((row.world, row.case) for row in rows):
        cells = [f"{r.predicted_step / r.step:.2f} of {r.step * 1e3:.0f}" for r in rows if (r.world, r.case) == (world, case)]
        table.add_row(str(world), case, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for world in dict.fromkeys(row.world for row in rows):
        mine = [row for row in rows if row.world == world]
        print(f"{world} ranks, step: {errors(row.error for row in mine)}; forward alone: {errors(r.forward_error for r in mine)}")
        for schedule in dict.fromkeys(row.schedule for row in mine):
            print(f"  {schedule}: {errors(row.error for row in mine if row.schedule == schedule)}")
    print(f"all: {errors(row.error for row in rows)}; spread of rounds {statistics.median(row.spread for row in rows):.1%}")
    quiet = [row for row in rows if row.others <= QUIET]
    if len(quiet) < len(rows):
        found = errors(row.error for row in quiet) if quiet else "none"
        print(
            f"OTHER PROGRAMS had more than {QUIET:.0%} of the cores in {len(rows) - len(quiet)} of {len(rows)}; without: {found}"
        )
    lost = regrets(rows)
    print(
        f"choosing by prediction costs {statistics.mean(lost):.1%} of the best on average, {max(lost):.1%} at worst", flush=True
    )


def regrets(rows: list[Row]) -> list[float]:
    """For each world and case: how much longer the schedule of the least predicted time takes than the fastest measured one."""
    lost = []
    for key in dict.fromkeys((row.world, row.case) for row in rows):
        mine = [row for row in rows if (row.world, row.case) == key]
        chosen = min(mine, key=lambda row: row.predicted_step)
        lost.append(chosen.step / min(row.step for row in mine) - 1)
    return lost


def errors(found: Any) -> str:
    """Median and worst of what was found, without sign."""
    sizes = sorted(abs(x) for x in found)
    return f"median error {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%} of {len(sizes)}"


if __name__ == "__main__":
    sys.exit(main())
