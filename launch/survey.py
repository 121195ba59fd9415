"""Where each schedule wins: prices a grid of cases on described clusters. All times are simulated. Needs no GPU.

python launch/survey.py --out runs/survey             everything: grid, summary, plot, regret, claims
python launch/survey.py --out runs/survey --claims    only published ratios, simulated (also: --grid, --regret)

The grid: lengths, ranks, heads, masks and clusters; for each the choice of schedule="auto" and the best of every other kind of
schedule. The same command goes on where it was interrupted (cases.jsonl), anew after a change of code or clusters.
Regret: what the choice by the shipped description costs where links have half or twice the bandwidth that it says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.parallel.auto import Decision
    from distattn.parallel.cluster import Cluster
    from distattn.parallel.mask import Mask
    from distattn.parallel.price import Price
    from distattn.parallel.shape import Shape
    from distattn.parallel.strategy import Strategy

MASKS = ("causal", "full", "window", "documents")
WINDOW = 4096
DOCUMENT_MEAN, DOCUMENT_SIGMA = 4096, 1.0  # tokens, log-normal; sigma of the logarithm
PER_RANK = 8192  # tokens a rank of the plot
# Documents x ranks above which a case takes minutes: its shards have that many pieces, and every candidate plans them anew.
LARGEST = 1 << 15
# Bands x ranks up to which schedules are priced that auto need not look at, and on more ranks than some only with long shards.
NAMED, SOME = 1 << 12, 64
TILE = 128  # tokens of a rank; with fewer even one tile of a kernel is not full
INTERRUPTED = "interrupted before it; the same command goes on"


@dataclass(frozen=True)
class Case:
    """One problem; heads as query:key heads of size 128, bfloat16."""

    cluster: str
    heads: str
    mask: str
    tokens: int
    world: int

    def make_mask(self) -> Mask:
        """Documents are drawn from a log-normal distribution, seeded by the length; the last one is cut."""
        import numpy as np

        from distattn.parallel import mask as masks

        if self.mask == "documents":
            drawn = np.random.default_rng(self.tokens)
            mu, count = np.log(DOCUMENT_MEAN) - DOCUMENT_SIGMA**2 / 2, 16 + 4 * self.tokens // DOCUMENT_MEAN
            ends = np.cumsum(np.ceil(drawn.lognormal(mu, DOCUMENT_SIGMA, count)).astype(np.int64))
            ends = np.append(ends[ends < self.tokens], self.tokens)
            return masks.documents(np.diff(ends, prepend=0).tolist())
        if self.mask == "window":
            return masks.sliding_window(self.tokens, WINDOW)
        return {"causal": masks.causal, "full": masks.full}[self.mask](self.tokens)

    def shape(self) -> Shape:
        """Of the attention calls."""
        import torch

        from distattn.parallel.shape import Shape

        heads, kv_heads = (int(part) for part in self.heads.split(":"))
        return Shape(heads, kv_heads, 128, 128, torch.bfloat16)

    @property
    def pieces(self) -> int:
        """Bands x ranks, about what pricing costs."""
        bands = self.tokens // DOCUMENT_MEAN if self.mask == "documents" else 1
        return max(1, bands) * self.world

    def __str__(self) -> str:
        return f"{self.mask} {self.tokens >> 10}k on {self.world} ranks of {self.cluster}, {self.heads}"


def grid(quick: bool) -> list[Case]:
    """The plot's cases, then lengths x ranks x masks on all clusters, and a smaller one with other heads; cheap ones first."""
    if quick:
        return [Case(*c) for c in product(("h200",), ("32:8",), MASKS, (16 << 10,), (2, 8))]
    shown = [Case("h200", "32:8", mask, PER_RANK << i, 1 << i) for mask in MASKS for i in range(1, 10)]
    lengths, worlds = (8 << 10, 64 << 10, 512 << 10, 4 << 20), (2, 8, 64, 512)
    made = [Case(*c) for c in product(("a100", "h100", "h200", "l40s"), ("32:8",), MASKS, lengths, worlds)]
    made += [Case(*c) for c in product(("h200",), ("32:32", "64:8", "16:16"), MASKS, lengths[1:3], worlds[1:3])]
    by_cost = (sorted(some, key=lambda c: (c.pieces, -c.tokens)) for some in (shown, made))
    return list(dict.fromkeys(case for some in by_cost for case in some))


def kind_of(strategy: Strategy, world: int) -> str:
    """What a strategy is called in tables: Ulysses alone, a hybrid of it, or the schedule."""
    u = strategy.ulysses
    return strategy.schedule if u == 1 else "ulysses" if u == world else "hybrid"


def described(strategy: Strategy, world: int) -> str:
    """A strategy in the fewest words that name it."""
    from distattn.parallel.schedules import SCHEDULES

    kind = kind_of(strategy, world)
    if kind == "ulysses":
        return "ulysses"
    own = strategy.layout in (None, SCHEDULES[strategy.schedule].layout)
    inner = strategy.schedule + ("" if own else f" {strategy.layout}")
    return inner if kind != "hybrid" else f"ulysses {strategy.ulysses} x {inner}"


def survey_case(case: Case, cluster: Cluster) -> dict[str, Any]:
    """The choice of auto with its figures, and seconds of the best of each kind that was priced.

    Raises:
        ValueError: the case cannot be.
    """
    from distattn.parallel.auto import decide

    mask, shape = case.make_mask(), case.shape()
    decision = decide(mask, case.world, shape, cluster)
    best = decision.best
    return {
        **asdict(case),
        "simulated": True,
        "strategy": asdict(best.strategy),
        "kind": kind_of(best.strategy, case.world),
        "winner": described(best.strategy, case.world),
        "seconds": best.seconds,
        "tflops": throughput(mask, shape, case.world, best.seconds),
        "exposed_share": best.exposed / best.seconds,
        "area": mask.bands.area,
        "kinds": best_of_kinds(decision, case, mask, shape, cluster),
        "candidates": len(decision.candidates),
    }


def throughput(mask: Mask, shape: Shape, world: int, seconds: float) -> float:
    """TFLOP/s of a device, forward and backward, of what the mask shows."""
    from distattn.parallel.cluster import pair_flops

    flops = (pair_flops(shape, "forward") + pair_flops(shape, "backward")) * shape.heads
    return mask.bands.area * flops / seconds / world / 1e12


def best_of_kinds(decision: Decision, case: Case, mask: Mask, shape: Shape, cluster: Cluster) -> dict[str, float]:
    """Seconds of the best strategy of each kind within the memory: of those that auto simulated, and of the most promising other.

    Other strategies of a kind were not simulated, so that these times are at most so long. Large cases keep to auto's.
    """
    from distattn.parallel.auto import MEMORY_SHARE
    from distattn.parallel.price import price

    limit = MEMORY_SHARE * cluster.memory_gb * 1e9
    found: dict[str, list[Price]] = {}
    waiting: dict[str, list[Strategy]] = {}  # by bound, as auto lists them
    for candidate in decision.candidates:
        kind = kind_of(candidate.strategy, case.world)
        if candidate.price is not None:
            found.setdefault(kind, []).append(candidate.price)
        else:
            waiting.setdefault(kind, []).append(candidate.strategy)
    if case.pieces <= NAMED and (case.world <= SOME or case.tokens >= PER_RANK * case.world):
        for kind, strategies in waiting.items():
            first = strategies[0]
            chosen = [s for s in strategies if s.layout == first.layout] if kind == "gather" else [first]
            found.setdefault(kind, []).extend(price(s, mask, case.world, shape, cluster) for s in chosen)
    fitting = {kind: [p.seconds for p in prices if p.buffer_bytes <= limit] for kind, prices in found.items()}
    return {kind: min(seconds) for kind, seconds in fitting.items() if seconds}


def digest(cluster: Cluster) -> str:
    """Names a description and the code that prices it, so that a survey never mixes two."""
    from distattn import parallel

    made = hashlib.blake2b(repr(cluster).encode(), digest_size=6)
    for path in sorted(Path(parallel.__path__[0]).rglob("*.py")):
        made.update(path.read_bytes())
    return made.hexdigest()


def reason(case: Case, cluster: Cluster, largest: int) -> str | None:
    """Why a case is not priced, in words that are counted."""
    if case.tokens < case.world:
        return "more ranks than tokens"
    if case.tokens < case.world * TILE:
        return f"fewer than {TILE} tokens a rank"
    if case.world > cluster.nodes * cluster.devices:
        return "more ranks than the cluster has"
    if case.mask == "documents" and case.pieces > largest:
        return f"more than {largest} documents x ranks, which takes minutes (--largest)"
    return None


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines; what an interrupted write left behind the last whole line is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    if end < len(text):
        with path.open("r+b") as file:
            file.truncate(end)
    return [json.loads(line) for line in text[:end].splitlines()]


def run_grid(
    cases: Iterable[Case], path: Path, largest: int, say: Callable[[int, int, str], None]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(a record for each case that can be, reasons of the others with their count); a line of ``path`` each, as soon as known."""
    from distattn.parallel.cluster import load_cluster

    cases = list(cases)
    clusters = {name: load_cluster(name) for name in dict.fromkeys(c.cluster for c in cases)}
    digests = {name: digest(cluster) for name, cluster in clusters.items()}
    there = {}
    for record in whole_lines(path):
        there[Case(**{name: record[name] for name in Case.__dataclass_fields__}), record["description"]] = record
    records, skipped = [], Counter[str]()
    with path.open("a") as file:
        for i, case in enumerate(cases):
            say(i, len(cases), str(case))
            cluster = clusters[case.cluster]
            why = reason(case, cluster, largest)
            record = there.get((case, digests[case.cluster]))
            if why is None and record is None:
                try:
                    record = {**survey_case(case, cluster), "description": digests[case.cluster]}
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                except ValueError as error:
                    why = str(error).partition(" for Mask")[0]
                except KeyboardInterrupt:
                    skipped[INTERRUPTED] = len(cases) - i
                    break
            if why is not None:
                skipped[why] += 1
            elif record is not None:
                records.append(record)
            say(i + 1, len(cases), str(case))
    return records, skipped


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("survey.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files; made if it is not there")
    made.add_argument("--grid", action="store_true", help="only the grid with its summary and plot")
    made.add_argument("--regret", action="store_true", help="only the regret")
    made.add_argument("--claims", action="store_true", help="only the claims")
    made.add_argument("--quick", action="store_true", help="a small grid, and few cases of regret")
    made.add_argument(
        "--largest", type=int, default=LARGEST, metavar="N", help=f"skip above N documents x ranks (default: {LARGEST})"
    )
    return made


def main(words: list[str] | None = None) -> int:
    """0 done, 2 what was asked cannot be, 130 interrupted: what there is was written."""
    asked = parser().parse_args(words)
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        return survey(asked)
    except (ValueError, OSError) as error:
        print(f"survey.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"survey.py: interrupted. {asked.out} keeps what is done; the same command goes on.", file=sys.stderr)
        return 130


def survey(asked: argparse.Namespace) -> int:
    """Runs the parts that were asked for."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from distattn.launch import survey_claims, survey_regret, survey_report

    console = Console(width=None if sys.stdout.isatty() else 150)
    everything = not (asked.grid or asked.regret or asked.claims)
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()

    def with_progress(work: Callable[[Callable[[int, int, str], None]], Any]) -> Any:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=None)
            return work(lambda done, total, text: progress.update(bar, completed=done, total=total, description=text))

    if asked.grid or everything:
        cases = grid(asked.quick)
        records, skipped = with_progress(lambda say: run_grid(cases, asked.out / "cases.jsonl", asked.largest, say))
        text = survey_report.summary(records, skipped)
        (asked.out / "summary.md").write_text(text)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        survey_report.plot(records, asked.out / "survey.png")
        if INTERRUPTED in skipped:
            raise KeyboardInterrupt
    if asked.claims or everything:
        claims = survey_claims.claims()
        (asked.out / "claims.json").write_text(json.dumps([asdict(c) for c in claims], indent=1) + "\n")
        console.print(survey_claims.table(claims), markup=False, highlight=False, soft_wrap=True)
    if asked.regret or everything:
        found = with_progress(lambda say: survey_regret.regrets(asked.quick, say))
        (asked.out / "regret.json").write_text(json.dumps(found, indent=1) + "\n")
        console.print(survey_regret.table(found), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written to {asked.out}. All times are simulated.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
