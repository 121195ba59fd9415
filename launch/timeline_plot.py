"""Files of a simulated timeline: a Chrome trace for Perfetto, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distattn.parallel.simulate import COMPUTE, Simulation, Timeline
from distattn.parallel.timeline import chrome_trace, lane_name

MOST_RANKS = 16  # bars of more ranks are too thin to read
COLOURS = {COMPUTE: "#4c72b0", 0: "#dd8452", 1: "#c44e52", 2: "#55a868", 3: "#8172b3"}


def write_trace(simulation: Simulation, path: Path, ranks: Sequence[int] | None = None) -> None:
    """Writes the Chrome trace; open it at ui.perfetto.dev."""
    with path.open("w") as file:
        json.dump(chrome_trace(simulation, ranks), file)


def some_ranks(world: int) -> list[int]:
    """All ranks, or 16 of them from the first to the last."""
    return sorted({int(rank) for rank in np.linspace(0, world - 1, min(world, MOST_RANKS)).round()})


def write_png(simulation: Simulation, path: Path, title: str, ranks: Sequence[int] | None = None) -> None:
    """Draws kernels and transfers of each rank over time, one panel a pass.

    Raises:
        ValueError: the simulation was made without timeline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    passes = simulation.passes
    shown = some_ranks(len(passes[0].finish)) if ranks is None else list(ranks)
    figure = Figure(figsize=(12, 1.5 + len(passes) * (0.8 + 0.32 * len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(passes), 1, squeeze=False)[:, 0]
    lanes: set[int] = set()
    for panel, name, times in zip(panels, ("forward", "backward"), passes, strict=False):
        if times.timeline is None:
            raise ValueError("This simulation has no timeline. Simulate with timeline=True.")
        lanes |= _draw(panel, times.timeline, shown)
        panel.set_title(f"{name}: {times.seconds * 1e3:.3g} ms, exposed communication at most {times.exposed.max() * 1e3:.3g} ms")
        panel.set_yticks(range(len(shown)), [f"rank {rank}" for rank in shown], fontsize=8)
        panel.set_ylim(len(shown) - 0.4, -0.6)
        panel.set_xlim(0, max(times.seconds * 1e3, 1e-6))
        panel.set_xlabel("ms (simulated)")
    patches = [Patch(color=COLOURS.get(lane, "#777777"), label=lane_name(lane)) for lane in sorted(lanes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(len(patches), 1))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _draw(panel: object, timeline: Timeline, ranks: Sequence[int]) -> set[int]:
    """Bars of one pass: kernels in the upper half of a rank's line, lanes below. Returns the lanes that there are."""
    found: set[int] = set()
    for lane in np.unique(timeline.lane).tolist():
        for line, rank in enumerate(ranks):
            mine = (timeline.lane == lane) & (timeline.rank == rank)
            if not mine.any():
                continue
            found.add(lane)
            bars = np.stack([timeline.start[mine], timeline.stop[mine] - timeline.start[mine]], 1) * 1e3
            place = (line - 0.4, 0.4) if lane == COMPUTE else (line + 0.02 + 0.1 * lane, 0.09)
            panel.broken_barh(bars, place, color=COLOURS.get(lane, "#777777"), linewidth=0)  # type: ignore[attr-defined]
    return found
