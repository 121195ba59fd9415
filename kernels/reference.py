"""Naive attention over bands: the meaning of every kernel, forward and backward by the formulas, and a differentiable twin.

Computes in the accumulate dtype (float64 for float64 inputs). Time and memory are O(T_q * T_k * H_q): for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores, State, accumulate_dtype, empty_state
from distattn.kernels.merge import merge


def _heads_first(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[T, H_kv, D] -> [heads, T, D] in ``dtype``, each key head repeated for the query heads that read it."""
    return x.to(dtype).transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _masked_scores(q: Tensor, k: Tensor, bands: Bands, scores: Scores) -> Tensor:
    """s [H, T_q, T_k] with -inf where no band looks; q and k heads first. A pair that n bands see counts n times."""
    s = q @ k.transpose(1, 2) * scores.scale
    if scores.softcap:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    count = bands.dense(s.shape[1], s.shape[2], s.device)
    return s.masked_fill(count == 0, -torch.inf) + count.clamp(min=1).to(s.dtype).log()


def attention(
    q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out [T_q, H_q, D_v], lse [T_q, H_q]) in the accumulate dtype; autograd differentiates it in q, k, v and sinks [H_q]."""
    dtype, heads = accumulate_dtype(q.dtype), q.shape[1]
    s = _masked_scores(_heads_first(q, heads, dtype), _heads_first(k, heads, dtype), bands, scores)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype)[:, None, None].expand(-1, s.shape[1], 1)], -1)
    empty = (s == -torch.inf).all(-1)
    lse = torch.logsumexp(s.masked_fill(empty[..., None], 0.0), -1) if s.shape[2] else s.new_zeros(s.shape[:2])
    p = torch.exp(s - lse[..., None])
    values = _heads_first(v, heads, dtype)
    out = p[..., : values.shape[1]] @ values
    return out.transpose(0, 1), lse.masked_fill(empty, -torch.inf).transpose(0, 1)


class Reference:
    """The backend of last resort: takes everything, on every device."""

    name = "reference"

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Nothing is refused."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """See :class:`distattn.kernels.contract.Backend`."""
        if state is None:
            state = empty_state(q, v.shape[2])
        merge(state, State(*attention(q.detach(), k.detach(), v.detach(), bands, scores)))
        if out is not None:
            out.copy_(state.o)
        return state

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        delta: Tensor,
        lse: Tensor,
        bands: Bands,
        scores: Scores,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """See :class:`distattn.kernels.contract.Backend`."""
        dtype, heads, group = accumulate_dtype(q.dtype), q.shape[1], q.shape[1] // k.shape[1]
        qh, kh, vh, gh = (_heads_first(x, heads, dtype) for x in (q, k, v, dout))
        s = _masked_scores(qh, kh, bands, scores)
        # exp(s - inf) = 0: rows without keys contribute nothing
        p = torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).T[..., None])
        ds = p * (gh @ vh.transpose(1, 2) - delta.T[..., None])
        if scores.softcap:
            raw = qh @ kh.transpose(1, 2) * scores.scale
            ds = ds * (1 - torch.tanh(raw / scores.softcap) ** 2)
        ds = ds * scores.scale
        dq += (ds @ kh).transpose(0, 1)
        dk += (ds.transpose(1, 2) @ qh).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
        dv += (p.transpose(1, 2) @ gh).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
