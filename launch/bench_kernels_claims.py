"""What the kernels are asked to reach on an H100 or H200, held against what was found: met, missed or not measured.

The targets are ratios of sustained rates inside of one run: on a card at its power limit nothing else repeats. Several runs may
be joined; a ratio whose two sides come from different runs says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

DETERMINISTIC, FASTEST = ("gluon", "gluon_ordered"), ("gluon_fused", "gluon")
CUDNN, FLEX = "cuDNN (library)", "flex_attention (library)"
LENGTHS, LONG = (16384, 32768), 65536


class Found(NamedTuple):
    """A ratio, and whether both sides are of one run."""

    ratio: float
    together: bool = True


@dataclass(frozen=True)
class Claim:
    """``asked`` of a ratio, at least or ``at_most``; ``found`` is None where something was not measured."""

    what: str
    asked: float
    found: Found | None
    goal: float | None = None
    at_most: bool = False

    def reaches(self, bound: float) -> bool:
        assert self.found is not None
        return self.found.ratio <= bound if self.at_most else self.found.ratio >= bound

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        met = "missed" if not self.reaches(self.asked) else "met, goal too" if self.goal and self.reaches(self.goal) else "met"
        return met if self.found.together else f"{met} (of two runs)"


class Runs:
    """Rows of one or more :func:`~distattn.launch.bench_kernels_report.as_json`, by what was measured."""

    def __init__(self, contents: Iterable[dict[str, Any]]):
        self.contents = list(contents)
        cards = {run["hardware"]["name"] for run in self.contents}
        if len(cards) > 1:
            raise ValueError(f"Runs of one card can be held against each other, found {', '.join(sorted(cards))}. Join others.")

    def row(self, run: int, case: dict[str, Any], who: str) -> dict[str, Any] | None:
        """What ``who`` reached on the case with these fields in a run; of repeats the last."""
        fitting = [r for r in self.contents[run]["rates"] if r["who"] == who and all(r[name] == v for name, v in case.items())]
        return fitting[-1] if fitting else None

    def ratio(self, case: dict[str, Any], who: str, other: dict[str, Any], beside: str) -> Found | None:
        """Rate of ``who`` on ``case`` over that of ``beside`` on ``other``, of one run where there is one with both."""
        mine = [(n, row) for n in range(len(self.contents)) if (row := self.row(n, case, who))]
        theirs = {n: row for n in range(len(self.contents)) if (row := self.row(n, other, beside))}
        if not mine or not theirs:
            return None
        for n, row in reversed(mine):
            if n in theirs:
                return Found(row["tflops_sustained"] / theirs[n]["tflops_sustained"])
        return Found(mine[-1][1]["tflops_sustained"] / theirs[max(theirs)]["tflops_sustained"], False)

    def slowest_round(self, case: dict[str, Any], who: str, beside: str) -> Found | None:
        """The worst of all rounds: seconds of ``beside`` over those of ``who``."""
        for n in reversed(range(len(self.contents))):
            mine, theirs = self.row(n, case, who), self.row(n, case, beside)
            if mine and theirs:
                rounds = zip(mine["seconds_sustained"], theirs["seconds_sustained"], strict=True)
                return Found(min(b / a for a, b in rounds))
        return None

    def ranks(self, schedule: str) -> list[dict[str, Any]]:
        """Both directions of 8 ranks with 128k tokens, of the last run that has them."""
        for run in reversed(self.contents):
            found = [row for row in run["ranks"] if (row["schedule"], row["world"], row["tokens"]) == (schedule, 8, 131072)]
            if found:
                return found
        return []


def dense(mask: str, tokens: int, d: int, direction: str) -> dict[str, Any]:
    """Fields of a dense case."""
    return {"group": "dense", "mask": mask, "tokens": tokens, "d": d, "direction": direction}


def worst(found: Iterable[Found | None]) -> Found | None:
    """The least of what was measured; None when something was not."""
    all_of = list(found)
    return None if None in all_of or not all_of else min(f for f in all_of if f)


def best(runs: Runs, case: dict[str, Any], names: tuple[str, ...], other: dict[str, Any], beside: str) -> Found | None:
    """The ratio of whoever of ``names`` is fastest."""
    found = [f for name in names if (f := runs.ratio(case, name, other, beside))]
    return max(found, default=None)


def claims(runs: Runs) -> list[Claim]:
    """Every target, with what the runs say of it."""
    return [*_forward(runs), *_backward(runs), *_masks(runs), *_shards(runs)]


def _over_cudnn(runs: Runs, mask: str, d: int, direction: str, names: tuple[str, ...]) -> Found | None:
    cases = (dense(mask, n, d, direction) for n in LENGTHS)
    return worst(best(runs, case, names, case, CUDNN) for case in cases)


def _forward(runs: Runs) -> Iterator[Claim]:
    for mask, d, asked, goal in (
        ("causal", 128, 1.08, 1.10),
        ("full", 128, 1.03, 1.05),
        ("causal", 64, 1.08, None),
        ("full", 64, 1.08, None),
    ):
        yield Claim(f"forward {mask}, D {d} / cuDNN", asked, _over_cudnn(runs, mask, d, "forward", ("gluon",)), goal)
    for mask in ("causal", "full"):
        grouped = {"group": "gqa", "mask": mask, "tokens": LENGTHS[0], "direction": "forward"}
        found = runs.ratio(grouped, "gluon", dense(mask, LENGTHS[0], 128, "forward"), "gluon")
        yield Claim(f"forward {mask}, heads 32:8 / 16:16", 1.0, found)
    with_state, without = ({"group": "state", "tokens": LENGTHS[0], "state": state} for state in (True, False))
    yield Claim("forward, float32 state in and out / none, 16k x 16k", 0.97, runs.ratio(with_state, "gluon", without, "gluon"))


def _backward(runs: Runs) -> Iterator[Claim]:
    for mask, d, asked, goal in (
        ("causal", 128, 1.08, 1.12),
        ("full", 128, 1.08, 1.12),
        ("causal", 64, 1.15, None),
        ("full", 64, 1.15, None),
    ):
        yield Claim(f"backward {mask}, D {d} / cuDNN", asked, _over_cudnn(runs, mask, d, "backward", FASTEST), goal)
    cases = [dense(mask, n, d, "backward") for mask in ("causal", "full") for d in (128, 64) for n in LENGTHS]
    slowest = worst(runs.slowest_round(case, FASTEST[0], CUDNN) for case in cases)
    yield Claim("backward, the slowest round of any shape / cuDNN", 1.0, slowest)
    for mask in ("causal", "full"):
        found = _over_cudnn(runs, mask, 128, "backward", DETERMINISTIC)
        yield Claim(f"deterministic backward {mask}, D 128 / cuDNN", 0.95, found, 1.0)


def _masks(runs: Runs) -> Iterator[Claim]:
    for group in ("documents", "window"):
        for direction in ("forward", "backward"):
            case = {"group": group, "tokens": LONG, "direction": direction}
            other = dense("causal", LENGTHS[1], 128, direction)
            names = ("gluon",) if direction == "forward" else FASTEST
            yield Claim(f"{direction}, {group} at 64k / dense causal, a pair", 0.85, runs.ratio(case, names[0], other, names[0]))
            yield Claim(f"{direction}, {group} at 64k / flex_attention", 1.4, best(runs, case, names, case, FLEX))


def _shards(runs: Runs) -> Iterator[Claim]:
    for direction in ("forward", "backward"):
        short, long = ({"group": "short", "mask": mask, "direction": direction} for mask in ("short", "long"))
        name = "gluon" if direction == "forward" else FASTEST[0]
        yield Claim(f"{direction}, shards of 128 rows / of 2,048, a pair", 0.9, runs.ratio(short, name, long, name))
    for schedule, most in (("zigzag", 1.03), ("striped", 1.06)):
        rows = runs.ranks(schedule)
        shares = _most(row["sum_over_one"] for row in rows)
        yield Claim(f"8 ranks, 128k, {schedule}: sum of kernels / one device", most, shares, at_most=True)
        uneven = _most(max(row["seconds"]) / min(row["seconds"]) for row in rows)
        yield Claim(f"8 ranks, 128k, {schedule}: slowest / fastest rank", 1.02, uneven, at_most=True)


def _most(figures: Iterable[float]) -> Found | None:
    most = max(figures, default=None)
    return None if most is None else Found(most)


def print_claims(console: Console, found: list[Claim]) -> None:
    """A row a target that something is known of, and of how many nothing is."""
    table = Table("target", "asked", "goal", "found", "", title="Targets, as ratios of sustained rates in one run", box=None)
    for claim in found:
        if claim.found is not None:
            sign = "<=" if claim.at_most else ">="
            color = "red" if "missed" in claim.verdict else "green"
            goal = "" if claim.goal is None else f"{claim.goal:.2f}"
            table.add_row(claim.what, f"{sign} {claim.asked:.2f}", goal, f"{claim.found.ratio:.3f}", f"[{color}]{claim.verdict}")
    if table.row_count:
        console.print(table)
    console.print(f"{len(found) - table.row_count} of {len(found)} targets not measured", highlight=False)
