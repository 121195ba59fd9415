"""Training steps of whole models on described clusters: disaggregated attention against layouts that move no tasks. Simulated.

python launch/survey_training.py --out runs/training              8B and 34B, 64 to 512 H200, documents up to 128k to 512k
python launch/survey_training.py --out runs/training --published  only the published ratio, simulated

Every row is one model, number of devices, mix of documents and longest document: the mean over the seeds of step time over that
of perfect balance (all attention spread evenly, nothing sent), for the best degree and packing of each way. What a step is made
of is in launch/training_step.py, which ways there are in launch/training_ways.py. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.launch.training_ways import Survey

EACH = 16384  # tokens of a device: 8 documents of 128k on 64 devices
MOVED = ("disaggregate", "Ulysses, disaggregate")
STAY = ("ring", "gather", "zigzag", "document zigzag", "Ulysses, document zigzag")
Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str
    world: int
    mix: str
    longest: int

    def __str__(self) -> str:
        return f"{self.model}, {self.world} devices, {self.mix} to {self.longest >> 10}k"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "survey_training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files; made if it is not there")
    made.add_argument("--cluster", default="h200", help="a100, h100, h200, l40s, or the path of a description (default: h200)")
    made.add_argument("--models", nargs="+", default=["8b", "34b"], help="of 8b, 34b (default: both)")
    made.add_argument("--worlds", nargs="+", type=int, default=[64, 128, 256, 512], metavar="P", help="devices")
    made.add_argument(
        "--longest", nargs="+", type=int, default=[128, 256, 512], metavar="K", help="1024 tokens (default: 128 256 512)"
    )
    made.add_argument("--mixes", nargs="+", default=["pretrain", "prolong"], help="of pretrain, prolong (default: both)")
    made.add_argument("--each", type=int, default=EACH, metavar="T", help=f"tokens of a device and step (default: {EACH})")
    made.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds 0 to N - 1 (default: 2)")
    made.add_argument("--published", action="store_true", help="only the published ratio")
    made.add_argument("--grid", action="store_true", help="only the grid")
    return made


def cases(asked: argparse.Namespace) -> list[Case]:
    """The grid, small ones first.

    Raises:
        ValueError: a model that is not described, or numbers below 1.
    """
    from distattn.launch.training_step import MODELS

    for name in asked.models:
        if name not in MODELS:
            raise ValueError(f"There is no model {name!r}. Use {' or '.join(MODELS)}.")
    if min(*asked.worlds, *asked.longest, asked.each, asked.seeds) < 1:
        raise ValueError("Devices, tokens and seeds must be 1 or more.")
    rows = product(sorted(asked.worlds), asked.mixes, asked.longest, asked.models)
    return [Case(model, world, kind, longest << 10) for world, kind, longest, model in rows]


def survey_case(case: Case, seed: int, each: int, cluster: Any, kinds: Iterable[str], tensor: int = 1) -> dict[str, Any]:
    """The best way of each kind for one seed, with its step in seconds and over that of perfect balance."""
    from distattn.launch.training_mix import mix
    from distattn.launch.training_step import MODELS
    from distattn.launch.training_ways import Batch, Machines, Survey, moving, published_rivals, rivals

    lengths = mix(case.mix, case.world * each, case.longest, seed)
    survey = Survey(Batch(lengths, case.world, each), MODELS[case.model], Machines(cluster, tensor))
    ways = [*rivals(survey), *published_rivals(survey), *moving(survey)]
    found = {}
    for kind in kinds:
        best = survey.best([way for way in ways if way.kind == kind])
        if best is not None:
            found[kind] = {
                "way": str(best.way),
                "seconds": best.step.seconds,
                "over_perfect": best.step.seconds / survey.perfect.seconds,
                "attention_ms": [1e3 * best.forward, 1e3 * best.backward],
                "exposed_ms": 1e3 * best.exposed,
                "buffer_gb": best.buffer_bytes / 1e9,
            }
    return {"seed": seed, "documents": len(lengths), "perfect": _parts(survey), "ways": found}


def _parts(survey: Survey) -> dict[str, float]:
    step = survey.perfect
    return {"seconds": step.seconds, "dense": step.dense, "attention": step.attention}


def run_grid(asked: argparse.Namespace, cluster: Any, say: Say) -> list[dict[str, Any]]:
    """A record for each case, every seed in it."""
    chosen, records = cases(asked), []
    for i, case in enumerate(chosen):
        say(i, len(chosen), str(case))
        seeds = [survey_case(case, seed, asked.each, cluster, (*STAY, *MOVED)) for seed in range(asked.seeds)]
        records.append({**vars(case), "each": asked.each, "seeds": seeds})
        (asked.out / "grid.json").write_text(json.dumps(records, indent=1) + "\n")  # what there is, should it be interrupted
        say(i + 1, len(chosen), str(case))
    return records


def main(words: list[str] | None = None) -> int:
    """0 done, 2 what was asked cannot be."""
    asked = parser().parse_args(words)
    try:
        return survey(asked)
    except (ValueError, OSError) as error:
        print(f"survey_training.py: {error}", file=sys.stderr)
        return 2


def survey(asked: argparse.Namespace) -> int:
    """Runs what was asked for and writes its files."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from distattn.launch import survey_training_report as report
    from distattn.launch.training_step import MODELS
    from distattn.parallel.cluster import load_cluster

    console = Console(width=None if sys.stdout.isatty() else 160)
    cluster = load_cluster(asked.cluster)
    cases(asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.models:
        console.print(str(MODELS[name]), highlight=False)
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()

    def with_progress(work: Callable[[Say], Any]) -> Any:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=None)
            return work(lambda done, total, text: progress.update(bar, completed=done, total=total, description=text))

    if not asked.grid:
        rows = with_progress(lambda say: report.published(asked, cluster, say))
        (asked.out / "published.json").write_text(json.dumps(rows, indent=1) + "\n")
        console.print(report.published_table(rows), markup=False, highlight=False, soft_wrap=True)
    if not asked.published:
        records = with_progress(lambda say: run_grid(asked, cluster, say))
        text = report.table(records)
        (asked.out / "grid.md").write_text(text)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        report.plot(records, asked.out / "grid.png")
    console.print(f"Written to {asked.out}. All times are simulated; seeds 0 to {asked.seeds - 1}.", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
