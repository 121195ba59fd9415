"""Tables and the plot of survey_training.py, and the published ratio that its model is held against."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distattn.launch.survey_training import MOVED, STAY, Case, survey_case

TENSOR = 8
PACKED = "packed to 2%", "packed to 25%"


@dataclass(frozen=True)
class Claim:
    """Published step time of packed documents over that of DistCA (Zhuang et al.) on H200: the range over settings."""

    model: str
    mix: str
    low: float
    high: float


CLAIMS = (Claim("8b", "pretrain", 1.07, 1.20), Claim("8b", "prolong", 0.97, 1.63), Claim("34b", "prolong", 1.14, 1.62))


def published(asked: argparse.Namespace, cluster: Any, say: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Packed documents over disaggregation, both with tensor parallelism in nodes of 8, as published; and over perfect balance.

    The latter is what a system would reach that hides all its messages, as the published one says of itself.
    """
    worlds, longest = (64, 128, 256), (128, 256, 512)
    rows: list[dict[str, Any]] = []
    todo = [(claim, world, k) for claim in CLAIMS if claim.model in asked.models for world in worlds for k in longest]
    for i, (claim, world, k) in enumerate(todo):
        case = Case(claim.model, world, claim.mix, k << 10)
        say(i, len(todo), str(case))
        seeds = [survey_case(case, s, asked.each, cluster, (*PACKED, MOVED[0]), TENSOR) for s in range(asked.seeds)]
        over = {kind: mean([s["ways"][kind]["over_perfect"] for s in seeds]) for kind in PACKED}
        ratio = {kind: mean([s["ways"][kind]["seconds"] / s["ways"][MOVED[0]]["seconds"] for s in seeds]) for kind in PACKED}
        rows.append({**vars(case), "published": [claim.low, claim.high], "ratio": ratio, "hidden": over, "seeds": seeds})
        say(i + 1, len(todo), str(case))
    return rows


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def published_table(rows: list[dict[str, Any]]) -> str:
    """A line a model and mix."""
    head = ["model, mix", *(f"{kind} over {other}" for kind in PACKED for other in ("disaggregate", "perfect")), "published"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys((row["model"], row["mix"]) for row in rows):
        some = [row for row in rows if (row["model"], row["mix"]) == name]
        low, high = some[0]["published"]
        spreads = [spread([row[key][kind] for row in some]) for kind in PACKED for key in ("ratio", "hidden")]
        cells = [" ".join(name), *spreads, f"{low:.2f} to {high:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Least, most and mean."""
    return f"{min(values):.2f} to {max(values):.2f} ({mean(values):.2f})"


def over_perfect(record: dict[str, Any], kind: str) -> float | None:
    """Mean over the seeds; None where a seed has no such way."""
    values = [seed["ways"][kind]["over_perfect"] for seed in record["seeds"] if kind in seed["ways"]]
    return mean(values) if len(values) == len(record["seeds"]) else None


def best_of(record: dict[str, Any], kinds: Sequence[str]) -> float:
    """Of the best way of some kinds in each seed, over perfect balance; the mean."""
    return mean([min(seed["ways"][k]["over_perfect"] for k in kinds if k in seed["ways"]) for seed in record["seeds"]])


def table(records: list[dict[str, Any]]) -> str:
    """Step time over that of perfect balance; last columns: best that moves no tasks over the best disaggregation."""
    head = ["model", "devices", "mix", "longest", "perfect s", *STAY, *MOVED, "gain", "gain, no Ulysses"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in records:
        kinds = [over_perfect(r, kind) for kind in (*STAY, *MOVED)]
        gains = best_of(r, STAY) / best_of(r, MOVED), best_of(r, STAY[:-1]) / best_of(r, MOVED)
        cells = [r["model"], str(r["world"]), r["mix"], f"{r['longest'] >> 10}k"]
        cells.append(f"{mean([seed['perfect']['seconds'] for seed in r['seeds']]):.2f}")
        cells += ["" if value is None else f"{value:.2f}" for value in kinds] + [f"{gain:.2f}" for gain in gains]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Step time over perfect balance by devices: a panel for each mix and longest document, lines by way, of the first model."""
    from matplotlib.figure import Figure

    mixes, longest = (list(dict.fromkeys(r[key] for r in records)) for key in ("mix", "longest"))
    models = list(dict.fromkeys(r["model"] for r in records))
    figure = Figure(figsize=(4.2 * len(longest), 3.4 * len(mixes) * len(models)), layout="constrained")
    panels = figure.subplots(len(mixes) * len(models), len(longest), squeeze=False, sharex=True)
    for i, (model, kind) in enumerate((m, k) for m in models for k in mixes):
        for j, length in enumerate(longest):
            axes = panels[i, j]
            rows = sorted(
                (r for r in records if (r["model"], r["mix"], r["longest"]) == (model, kind, length)), key=lambda r: r["world"]
            )
            for way in (*STAY, *MOVED):
                points = [(r["world"], value) for r in rows if (value := over_perfect(r, way)) is not None]
                style = "-o" if way in MOVED else "--."
                axes.plot([p[0] for p in points], [p[1] for p in points], style, label=way)
            axes.axhline(1.05, color="grey", linewidth=0.5)
            axes.set(title=f"{model}, {kind} to {length >> 10}k", xscale="log", ylim=(1.0, 2.5))
            axes.set_xticks([r["world"] for r in rows], [str(r["world"]) for r in rows])
            axes.minorticks_off()
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("devices")
    figure.supylabel("step time over perfect balance, simulated")
    figure.savefig(path, dpi=110)
