"""What attention means, once more and on its own: one softmax over a dense mask in float64, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.parallel.mask import Mask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, softcap: float = 0.0, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out [N, H_q, D_v], lse [N, H_q]) in float64 from q [N, H_q, D], k [N, H_kv, D], v [N, H_kv, D_v]; sinks [H_q]."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    k, v = (torch.stack([x[:, h // group] for h in range(heads)], 1).double() for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q.double(), k) * (d**-0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    visible = mask.bands.dense(n, n).bool()
    if sinks is not None:  # one more key, which everybody sees and whose value is 0
        s = torch.cat([s, sinks.double()[:, None, None].expand(heads, n, 1)], -1)
        visible = torch.cat([visible, visible.new_ones(n, 1)], -1)
        v = torch.cat([v, v.new_zeros(1, heads, v.shape[-1])])
    blind = ~visible.any(-1)  # rows without keys: o is 0, lse is -inf, and no gradient comes from them
    weights = torch.softmax(s.masked_fill(~visible & ~blind[:, None], -torch.inf), -1) * ~blind[None, :, None]
    lse = torch.logsumexp(s.masked_fill(~visible & ~blind[:, None], -torch.inf), -1).masked_fill(blind, -torch.inf)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T


def dense_batch(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options: object) -> tuple[Tensor, Tensor]:
    """The same for [B, N, H, D]: every row of the batch has the same mask."""
    rows = [dense_attention(*x, mask, **options) for x in zip(q, k, v, strict=True)]  # type: ignore[arg-type]
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


def error(found: Tensor, want: Tensor) -> float:
    """Relative L2 error in float64; -inf must stand in the same places, and what is all zero must be exactly that."""
    found, want = found.detach().double(), want.detach().double()
    if found.shape != want.shape or not torch.equal(found == -torch.inf, want == -torch.inf):
        return float("inf")
    found, want = (x.masked_fill(x == -torch.inf, 0.0) for x in (found, want))
    scale = float(want.norm())
    difference = float((found - want).norm())
    value = difference / scale if scale else difference
    return value if value == value else float("inf")
