"""Full tensors to local rows and back, with the gradients of a full tensor that every rank holds alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distattn.parallel.comm import Communicator
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask

IGNORED = -100  # label of a token whose successor is not to be predicted; cross entropy ignores it


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a packed sequence; all int64 [T] (or [B, T]).

    ``labels`` were shifted before sharding: a token's successor in its own document, else ``IGNORED``. ``positions`` restart
    with every document.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor


class LocalRows:
    """Which global rows a rank holds, as tensors on any device, made once."""

    def __init__(self, layout: Layout, mask: Mask, rank: int):
        self.layout, self.mask, self.rank = layout, mask, rank
        self._on: dict[tuple[str, torch.device], Tensor] = {}

    def on(self, name: str, device: torch.device) -> Tensor:
        """One of the arrays below as an int64 tensor."""
        if (name, device) not in self._on:
            self._on[name, device] = torch.from_numpy(np.ascontiguousarray(getattr(self, name))).to(device)
        return self._on[name, device]

    @cached_property
    def positions(self) -> np.ndarray:
        """Global position of each local row; padding rows lie at ``layout.n_valid`` and after."""
        return self.layout.positions(self.rank)

    @cached_property
    def valid(self) -> np.ndarray:
        """Global position of each local row, with the last real token in the place of padding (0 where there is none)."""
        return np.minimum(self.positions, max(self.layout.n_valid - 1, 0))

    @cached_property
    def document_positions(self) -> np.ndarray:
        """Position inside its own document."""
        starts = self.mask.document_starts
        document = np.searchsorted(starts, self.valid, side="right") - 1
        return self.valid - starts[document] if len(starts) else self.valid

    @cached_property
    def label_positions(self) -> np.ndarray:
        """Global position of each row's label, or -1 for the last of a document and for padding."""
        ends = np.append(self.mask.document_starts[1:], self.layout.n_valid)
        following = self.positions + 1
        end = ends[np.searchsorted(ends, self.valid, side="right").clip(max=len(ends) - 1)]
        return np.where((following < end) & (self.positions < self.layout.n_valid), following, -1)


def local_batch(tokens: Tensor, rows: LocalRows) -> Batch:
    """A rank's rows of ``tokens`` [N] or [B, N], every row of the batch packed alike."""
    if tokens.shape[-1] != rows.layout.n_valid:
        raise ValueError(
            f"This plan is for {rows.layout.n_valid} tokens, found {tokens.shape[-1]} in a tensor of shape "
            f"{list(tokens.shape)}. Make a plan for this length, or pass [N] or [B, N] tokens that it fits."
        )
    label_at = rows.on("label_positions", tokens.device)
    labels = tokens.index_select(-1, label_at.clamp(min=0)).masked_fill(label_at < 0, IGNORED)
    positions = rows.on("document_positions", tokens.device)
    padding = rows.on("positions", tokens.device) >= rows.layout.n_valid
    local = tokens.index_select(-1, rows.on("valid", tokens.device)).masked_fill(padding, 0)
    return Batch(local, labels, positions.expand_as(local))


class Shard(torch.autograd.Function):
    """Local rows of a replicated tensor. Its gradient is whole on every rank: the local gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, rows: LocalRows, communicator: Communicator, dim: int) -> Tensor:
        ctx.rows, ctx.communicator, ctx.dim, ctx.length = rows, communicator, dim, full.shape[dim]
        return rows.layout.shard(full, rows.rank, dim)

    @staticmethod
    @once_differentiable  # a gather has no gradient of its own: a second derivative is refused, not silently lost
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        full = gather(gradient, ctx.rows, ctx.communicator, ctx.dim)
        missing = ctx.length - full.shape[ctx.dim]
        if missing:
            shape = list(full.shape)
            shape[ctx.dim] = missing
            full = torch.cat([full, full.new_zeros(shape)], ctx.dim)
        return full, None, None, None


class Unshard(torch.autograd.Function):
    """The whole tensor on every rank. Every rank holds the same gradient of it, so its own rows are sliced, not summed."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, rows: LocalRows, communicator: Communicator, dim: int) -> Tensor:
        ctx.rows, ctx.dim = rows, dim
        return gather(local, rows, communicator, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.rows.layout.shard(gradient, ctx.rows.rank, ctx.dim), None, None, None


def gather(local: Tensor, rows: LocalRows, communicator: Communicator, dim: int) -> Tensor:
    """All ranks' rows along ``dim`` in global order, padding dropped."""
    if local.shape[dim] != rows.layout.rows(rows.rank):
        raise ValueError(
            f"Rank {rows.rank} holds {rows.layout.rows(rows.rank)} rows of {rows.layout!r}, found {local.shape[dim]} along "
            f"dim {dim} of a tensor of shape {list(local.shape)}. Pass local rows, and name their dim."
        )
    moved = local.movedim(dim, 0).contiguous()
    shards = communicator.all_gather_rows(moved, rows.layout.rows_all.tolist())
    return rows.layout.unshard(shards, 0).movedim(0, dim).contiguous()
