"""The launches that join the pieces of cut items, and the scratch that pieces leave their sums in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distattn.kernels.gluon_schedule import Schedule

ROWS_A_PROGRAM = 16


def scratch_for(work: Schedule, rows: int, columns: int, device: torch.device) -> Tensor:
    """Room for float32 numbers of ``rows`` rows a piece; one number where nothing is cut, as kernels want an address."""
    return torch.empty(max(1, work.pieces * rows * columns), dtype=torch.float32, device=device)


def merge_states(
    kernel: Any, work: Schedule, rows: int, o: Tensor, lse: Tensor, given: Tensor, parts: Tensor, state: bool, all_rows: bool
) -> None:
    """Writes to ``o`` and ``lse``, of the items that were cut, what the forward kernel writes of whole ones.

    Args:
        rows: of an item.
        given: o of the state to go on from, with ``state``.
        all_rows: rows that saw nothing are written too.
    """
    kernel[(len(work.merges) * (rows // ROWS_A_PROGRAM),)](
        o,
        lse,
        given,
        parts,
        work.on(o.device).merges,
        *(stride for x in (o, lse, given) for stride in x.stride()[:2]),
        o.shape[0],
        ROWS=rows,
        D=o.shape[2],
        PADDED=_padded(o.shape[2]),
        STATE=state,
        ALL_ROWS=all_rows,
        num_warps=4,
    )


def add_gradients(kernel: Any, work: Schedule, rows: int, sums: tuple[Tensor, ...], parts: Tensor) -> None:
    """Adds what pieces left, side by side in ``parts``, to one or two gradients."""
    x, y, d_y = sums[0], sums[-1], sums[1].shape[2] if len(sums) > 1 else 0
    kernel[(len(work.merges) * (rows // ROWS_A_PROGRAM),)](
        x,
        y,
        parts,
        work.on(x.device).merges,
        *(stride for gradient in (x, y) for stride in gradient.stride()[:2]),
        x.shape[0],
        ROWS=rows,
        D=x.shape[2],
        PADDED=_padded(x.shape[2]),
        D_Y=d_y,
        PADDED_Y=_padded(d_y),
        num_warps=4,
    )


def _padded(columns: int) -> int:
    return 1 << max(0, columns - 1).bit_length()
