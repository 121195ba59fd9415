"""Shape: the heads, head sizes and dtypes of one attention call; what a row of each kind weighs on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distattn.kernels.contract import accumulate_dtype
from distattn.parallel.plan import What

ALIGNMENT = 16  # bytes; every tensor inside of a message or a buffer begins on such a border


@dataclass(frozen=True)
class Shape:
    """Attention of ``heads`` query heads over ``kv_heads`` key heads, head sizes ``d`` and ``d_v``, tensors of ``dtype``.

    ``home`` is the dtype in which gradients and partial results travel: float32 (float64 for float64 inputs) unless asked;
    ``finished`` that of output rows which one rank computed alone: ``dtype`` unless asked.
    """

    heads: int
    kv_heads: int
    d: int
    d_v: int
    dtype: torch.dtype
    home: torch.dtype | None = None
    finished: torch.dtype | None = None

    @property
    def accumulate(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def parts(self, what: What) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that a transfer of ``what`` carries, as (dtype, trailing shape of a row)."""
        sums, home = self.accumulate, self.home or self.accumulate
        q, k, v, out = (self.heads, self.d), (self.kv_heads, self.d), (self.kv_heads, self.d_v), (self.heads, self.d_v)
        parts: dict[What, list[tuple[torch.dtype, tuple[int, ...]]]] = {
            What.Q: [(self.dtype, q)],
            What.KV: [(self.dtype, k), (self.dtype, v)],
            What.DOUT: [(self.dtype, out), (sums, (self.heads,)), (sums, (self.heads,))],
            What.OUT: [(home, out), (sums, (self.heads,))],
            What.DQ: [(home, q)],
            What.DKV: [(home, k), (home, v)],
            What.DONE: [(self.finished or self.dtype, out), (sums, (self.heads,))],
        }
        return parts[what]

    def row_bytes(self, what: What) -> int:
        """Bytes of one row, without alignment."""
        return sum(dtype.itemsize * torch.Size(tail).numel() for dtype, tail in self.parts(what))
