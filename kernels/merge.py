"""Combining partial attention results: exact, in place, in the accumulate dtype."""

from __future__ import annotations

import torch

from distattn.kernels.contract import State


def merge_into(state: State, other: State, rows: slice = slice(None)) -> None:
    """Makes ``state[rows]`` the softmax over the keys of both. ``other`` is [rows, H, D_v] and [rows, H] and is not changed.

    Rows that are empty (lse -inf) on either side take the other side's values; empty on both they stay o 0, lse -inf.
    """
    o, lse = state.o[rows], state.lse[rows]
    total = torch.logaddexp(lse, other.lse)
    safe = total.masked_fill(total == -torch.inf, 0.0)
    o.mul_((lse - safe).exp_().unsqueeze(-1)).addcmul_(other.o, (other.lse - safe).exp_().unsqueeze(-1))
    lse.copy_(total)


def merge(a: State, b: State) -> State:
    """``a`` with ``b`` merged in; the tensors of ``a`` are reused."""
    merge_into(a, b)
    return a
