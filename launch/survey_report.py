"""What a survey says: where each schedule wins, as tables and in words, and throughput over ranks as a picture."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distattn.launch.survey import MASKS, PER_RANK

Records = Sequence[dict[str, Any]]
RANGES = ((2, 8), (9, 64), (65, 512))  # ranks: one node, some nodes, many
KINDS = ("ring", "zigzag", "striped", "double_ring", "gather", "tree", "ulysses", "hybrid")
CLEAR = 1.02  # the best of every other kind takes that much longer; below it descriptions of clusters are not good enough
ABOUT = {"causal": "causal", "full": "full", "window": "window of 4k", "documents": "packed documents, mean 4k"}


def family(record: dict[str, Any]) -> str:
    """The winner without its degrees."""
    return record["kind"] if record["kind"] != "hybrid" else f"ulysses x {record['strategy']['schedule']}"


def chosen(records: Records, mask: str, ranks: tuple[int, int], cluster: str | None = None) -> list[dict[str, Any]]:
    """Those of a mask, a range of ranks and a cluster."""
    low, high = ranks
    return [r for r in records if r["mask"] == mask and low <= r["world"] <= high and cluster in (None, r["cluster"])]


def summary(records: Records, skipped: Counter[str]) -> str:
    """Markdown: winners by mask, ranks and cluster; what the others take; sentences; what was left out."""
    lines = [f"{len(records)} cases priced, {sum(skipped.values())} left out, all simulated.", ""]
    lines += [f"- left out, {count}: {why}" for why, count in skipped.most_common()]
    clusters = sorted({r["cluster"] for r in records})
    lines += ["", "Winners, with the number of cases that each wins:", ""]
    lines += [f"| mask | ranks | {' | '.join(clusters)} |", "|---|---|" + "---|" * len(clusters)]
    for mask in MASKS:
        for ranks in RANGES:
            if chosen(records, mask, ranks):
                cells = [_winners(chosen(records, mask, ranks, cluster)) for cluster in clusters]
                lines.append(f"| {ABOUT[mask]} | {ranks[0]} to {ranks[1]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Time of the best of each kind over the winner's, median over cases in which it was priced (and their number):",
        "",
    ]
    lines += [f"| mask | ranks | {' | '.join(KINDS)} |", "|---|---|" + "---|" * len(KINDS)]
    for mask in MASKS:
        for ranks in RANGES:
            mine = chosen(records, mask, ranks)
            if mine:
                lines.append(f"| {ABOUT[mask]} | {ranks[0]} to {ranks[1]} | {' | '.join(_factor(mine, k) for k in KINDS)} |")
    lines += [
        "",
        "In words (clearly: every other kind that was priced takes 2% longer or more):",
        "",
        *(f"- {s}" for s in sentences(records)),
        "",
    ]
    return "\n".join(lines)


def sentences(records: Records) -> list[str]:
    """One for each mask and range of ranks: what wins at which size of shards, and what one name would cost for all of it."""
    made = []
    for mask in MASKS:
        for ranks in RANGES:
            mine = chosen(records, mask, ranks)
            if not mine:
                continue
            parts = []
            for name, count in Counter(map(family, mine)).most_common(3):
                of_family = [r for r in mine if family(r) == name]
                clear = sum(_second(r) > CLEAR * r["seconds"] for r in of_family)
                shards = sorted(r["tokens"] // r["world"] for r in of_family)
                size = _size(shards[0]) if shards[0] == shards[-1] else f"{_size(shards[0])} to {_size(shards[-1])}"
                parts.append(f"{name} {count} ({clear} clearly, {size} tokens a rank)")
            exposed = statistics.median(r["exposed_share"] for r in mine)
            text = f"{ABOUT[mask]}, {ranks[0]} to {ranks[1]} ranks, {len(mine)} cases: {', '.join(parts)}. {_safest(mine)}"
            made.append(f"{text}Exposed communication of the winners: {exposed:.0%} of their time in the median.")
    return made


def _safest(records: Records) -> str:
    """The kind whose worst case is best, of those priced in nearly all cases."""
    factors = {kind: [r["kinds"][kind] / r["seconds"] for r in records if kind in r["kinds"]] for kind in KINDS}
    worst = {kind: max(found) for kind, found in factors.items() if len(found) >= 0.9 * len(records)}
    if not worst:
        return ""
    kind = min(worst, key=lambda k: worst[k])
    return f"{kind} is at worst {worst[kind]:.2f} x the winner in {len(factors[kind])} of them. "


def _winners(records: Records) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(map(family, records)).most_common()) or "-"


def _second(record: dict[str, Any]) -> float:
    """Seconds of the best of the other kinds; the winner's own where none was priced."""
    others = [seconds for kind, seconds in record["kinds"].items() if kind != record["kind"]]
    return min(others, default=record["seconds"])


def _factor(records: Records, kind: str) -> str:
    factors = [r["kinds"][kind] / r["seconds"] for r in records if kind in r["kinds"]]
    return f"{statistics.median(factors):.2f} ({len(factors)})" if factors else "-"


def _size(tokens: int) -> str:
    return f"{tokens >> 10}k" if tokens >= 1024 else str(tokens)


def plot(records: Records, path: Path) -> None:
    """Throughput of a device over ranks at PER_RANK tokens a rank on H200, a panel for each mask, a line for each kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # which matplotlib itself needs

    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
    mine = [r for r in records if (r["cluster"], r["heads"], r["tokens"]) == ("h200", "32:8", PER_RANK * r["world"])]
    panels = figure.subplots(2, 2).ravel()
    for panel, mask in zip(panels, MASKS, strict=True):
        rows = sorted((r for r in mine if r["mask"] == mask), key=lambda r: r["world"])
        for i, kind in enumerate(KINDS):
            some = [(r["world"], r["tflops"] * r["seconds"] / r["kinds"][kind]) for r in rows if kind in r["kinds"]]
            if some:
                x, y = zip(*some, strict=True)
                panel.plot(x, y, marker="o", markersize=3, color=f"C{i}", label=kind.replace("_", " "))
        x, y = [r["world"] for r in rows], [r["tflops"] for r in rows]
        panel.plot(x, y, "k--", linewidth=1, label="auto")
        panel.set_title(ABOUT[mask] + (", one draw of lengths a point" if mask == "documents" else ""))
        panel.set_xscale("log", base=2)
        worlds = sorted({r["world"] for r in mine})
        panel.set_xticks(worlds, [str(w) for w in worlds])
        panel.set_ylim(0)
        panel.grid(color="0.9")
        panel.set_xlabel("ranks (nodes of 8)")
        panel.set_ylabel("TFLOP/s a device, simulated")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(KINDS) + 1)
    figure.suptitle(
        f"Simulated: attention forward and backward, {PER_RANK >> 10}k tokens a rank, 8xH200 nodes, "
        "heads 32:8 of 128, bf16; FLOP of visible pairs only"
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    # A palette takes a third of the bytes; pictures stay in the repository for ever.
    Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(path, "PNG", optimize=True)
