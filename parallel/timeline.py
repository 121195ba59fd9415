"""A simulation as a Chrome trace, which Perfetto opens: a process per rank, in it a thread for kernels and one per lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distattn.parallel.simulate import COMPUTE, Simulation, Timeline

LANES = ("lane 0, inner ring or passed on", "lane 1, outer ring or from owners", "lane 2, homecoming", "lane 3, head exchange")


def chrome_trace(simulation: Simulation, ranks: Sequence[int] | None = None) -> dict[str, Any]:
    """The trace as an object for ``json.dump``: complete events in microseconds, backward after forward.

    Args:
        ranks: only these; a trace of 512 ranks over 512 stages is larger than viewers like.

    Raises:
        ValueError: the simulation was made without timeline, or a rank is not in it.
    """
    events: list[dict[str, Any]] = []
    offset = 0.0
    for name, times in zip(("forward", "backward"), simulation.passes, strict=False):
        if times.timeline is None:
            raise ValueError("This simulation has no timeline. Simulate with timeline=True.")
        world = len(times.finish)
        shown = np.arange(world) if ranks is None else np.asarray(ranks, dtype=np.int64)
        if len(shown) and (shown.min() < 0 or shown.max() >= world):
            raise ValueError(f"Ranks {sorted(set(shown.tolist()))} are not all in 0..{world - 1}. Pass ranks of this simulation.")
        if not events:
            events += _names(times.timeline, shown)
        events += _events(times.timeline, shown, name, offset)
        offset += times.seconds
    return {"displayTimeUnit": "ms", "traceEvents": events}


def lane_name(lane: int) -> str:
    """What a lane is for."""
    if lane == COMPUTE:
        return "kernels"
    slot, kind = divmod(lane, len(LANES))
    return f"{LANES[kind]}, slot {slot}" if slot else LANES[kind]


def _names(timeline: Timeline, ranks: np.ndarray) -> Iterator[dict[str, Any]]:
    lanes = range(COMPUTE, max(len(LANES), int(timeline.lane.max(initial=0)) + 1))
    for rank in ranks.tolist():
        yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank}}
        for lane in lanes:
            yield {"ph": "M", "pid": rank, "tid": lane - COMPUTE, "name": "thread_name", "args": {"name": lane_name(lane)}}


def _events(timeline: Timeline, ranks: np.ndarray, of: str, offset: float) -> Iterator[dict[str, Any]]:
    """One complete event for each entry of the ranks."""
    shown = np.isin(timeline.rank, ranks)
    columns = (timeline.rank, timeline.lane, timeline.phase, timeline.boundary, timeline.start, timeline.stop, timeline.size)
    for rank, lane, phase, boundary, start, stop, size in zip(*(c[shown].tolist() for c in columns), strict=True):
        what = timeline.phases[phase]
        name = f"{what}, stage {boundary}" if lane == COMPUTE else f"{what}, posted at {boundary}"
        event = {"ph": "X", "pid": rank, "tid": lane - COMPUTE, "name": name, "cat": of}
        event |= {"ts": (offset + start) * 1e6, "dur": (stop - start) * 1e6}
        yield event if lane == COMPUTE else event | {"args": {"bytes": size}}
