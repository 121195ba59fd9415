"""Schedules: functions ``(layout, mask, ...) -> Plan``, one idea a file; and the names that users call them by."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from distattn.parallel import layout as layouts
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan
from distattn.parallel.schedules.ring import ring

Placement = Callable[[Mask, int, bool], Layout]


def _contiguous(mask: Mask, world: int, pad: bool) -> Layout:
    return layouts.contiguous(mask.n_tokens, world, pad)


def _zigzag(mask: Mask, world: int, pad: bool) -> Layout:
    if mask.lengths is not None:
        return layouts.document_zigzag(mask.lengths, world, pad)
    return layouts.zigzag(mask.n_tokens, world, pad)


def _striped(mask: Mask, world: int, pad: bool) -> Layout:
    if mask.lengths is not None:
        return layouts.document_striped(mask.lengths, world, pad)
    return layouts.striped(mask.n_tokens, world, pad)


SCHEDULES: dict[str, tuple[Placement, Callable[[Layout, Mask], Plan]]] = {
    "ring": (_contiguous, ring),
    "zigzag": (_zigzag, ring),
    "striped": (_striped, ring),
}


def make_plan(schedule: str, mask: Mask, world: int, pad_to_equal: bool = False) -> Plan:
    """The forward plan of a schedule by name, for all ranks, on the layout that goes with it.

    Raises:
        ValueError: for a name that no schedule has, with the nearest one.
    """
    if schedule not in SCHEDULES:
        near = difflib.get_close_matches(str(schedule), SCHEDULES, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no schedule {schedule!r}. Schedules are {', '.join(SCHEDULES)}.{hint}")
    place, plan = SCHEDULES[schedule]
    return plan(place(mask, world, pad_to_equal), mask)
