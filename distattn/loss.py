"""Cross entropy of many rows without holding all their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int = 0, fused: bool = False) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[label]; labels of -100 add nothing.

    hidden [T, C], weight [V, C], labels int64 [T]. At most ``rows`` rows have their logits in memory (0: all); backward
    computes them again, group by group. Returns a scalar in float32 (float64 for float64). ``fused`` takes liger-kernel's.
    """
    if fused:
        return _fused(hidden, weight, labels)
    rows = rows or max(1, hidden.shape[0])
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # The first term keeps the graph whole on a rank without rows: its parameters still take part in the collectives of backward.
    total = (hidden[:0].sum() + weight[:0].sum()).to(wide)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        total = total + checkpoint(_rows_sum, hidden[part], weight, labels[part], use_reentrant=False)
    return total


def _rows_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return functional.cross_entropy(logits.to(wide), labels, ignore_index=IGNORED, reduction="sum")


def _fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        raise ValueError(
            "train.fused_loss needs liger-kernel: pip install 'distattn[gpu]', or set train.fused_loss=false."
        ) from None
    return liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="sum")
