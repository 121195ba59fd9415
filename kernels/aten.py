"""CPU attention on PyTorch's own flash op, ``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward.

The op knows neither bands nor states: bands are cut into pieces that it knows (``aten_pieces``), and the results of pieces
are merged outside. bf16 and fp16 run in float32. A softcap, which the op lacks, runs the reference tile by tile. Where torch
is so old that the op wants as many key heads as query heads, the keys of each piece are repeated for it.

Inside, tensors are [1, H, T, D] as the op wants them, views of the token-major ones but for keys; a piece costs one narrow each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.torch_version import TorchVersion

from distattn.kernels.aten_pieces import CAUSAL, FLIPPED, MASKED, Piece, pieces, tiles
from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores, State, accumulate_dtype, empty_state
from distattn.kernels.merge import merge_into
from distattn.kernels.reference import Reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# pytorch#157893. Before it the op reads and writes past the end of fewer key heads, and says nothing.
OP_KNOWS_GROUPS = TorchVersion(torch.__version__) >= TorchVersion("2.9")


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, ...] as a view [1, H, T, ...]."""
    return x.transpose(0, 1).unsqueeze(0)


def _as_op_input(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """[T, H, D] as [1, H, T, width] in ``dtype``, zeros behind D; a view where nothing changes."""
    x = x.to(dtype)
    return _heads_first(pad(x, (0, width - x.shape[2])) if width > x.shape[2] else x)


def _keys_as_op_input(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """The same in [1, H, T, width] order of memory: the op reads keys once per tile of rows, 8% faster overall than strided."""
    return _as_op_input(x, dtype, width).contiguous()


def _cut(x: Tensor, start: int, stop: int, piece: Piece) -> Tensor:
    """Rows [start, stop) of [1, H, T, ...] in the piece's direction."""
    x = x.narrow(2, start, stop - start)
    return x.flip(2) if piece.kind == FLIPPED else x


def _cut_keys(x: Tensor, piece: Piece, heads: int) -> Tensor:
    """The piece's keys of [1, H_kv, T, ...]; with H_kv repeated to ``heads`` where the op needs that."""
    x = _cut(x, piece.k0, piece.k1, piece)
    return x if OP_KNOWS_GROUPS or x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@lru_cache(maxsize=1)
def _float_mask(rows: int, keys: int, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """0 where lo <= j - i <= hi, -inf elsewhere, [rows, keys]. The tiles of a window share one; only the last is kept."""
    distance = torch.arange(keys) - torch.arange(rows)[:, None]
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_((distance < lo) | (distance > hi), -torch.inf)


def _options(piece: Piece, dtype: torch.dtype, scores: Scores) -> dict[str, Any]:
    """Keywords that the op and its backward share."""
    options: dict[str, Any] = {"dropout_p": 0.0, "is_causal": piece.kind in (CAUSAL, FLIPPED), "scale": scores.scale}
    if piece.kind == MASKED:
        options["attn_mask"] = _float_mask(piece.q1 - piece.q0, piece.k1 - piece.k0, piece.lo, piece.hi, dtype)
    return options


def _attend(piece: Piece, q: Tensor, k: Tensor, v: Tensor, scores: Scores, d_v: int) -> State:
    """The state of one piece alone, heads first. Its rows all see a key: the op's lse 0 of empty rows never shows."""
    inputs = _cut(q, piece.q0, piece.q1, piece), *(_cut_keys(x, piece, q.shape[1]) for x in (k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*inputs, **_options(piece, q.dtype, scores))
    o = o[..., :d_v] if o.shape[3] > d_v else o
    return State(o.flip(2), lse.flip(2)) if piece.kind == FLIPPED else State(o, lse)


def _out_for_delta(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dout, out) [T, H, D_v] with ``rowsum(dout * out) == delta``, all that the op's backward wants of ``out``.

    ``out`` is dout * delta / |dout|^2 (the terms of the sum have one sign, so it rounds well), scaled by the largest |dout|
    on the way: only a delta that is nothing beside dout underflows. A row of dout that vanishes beside its delta (only lse
    has a gradient) becomes delta * 2**-60 (2**-200 in float64) in one entry: what that adds to dv is lost in rounding.
    """
    delta = delta.unsqueeze(-1)
    largest = dout.abs().amax(-1, keepdim=True)
    least = delta.abs() * (2.0**-200 if dout.dtype == torch.float64 else 2.0**-60)
    vanishing = largest < least
    if vanishing.any():
        dout = dout.masked_fill(vanishing, 0.0)
        dout[..., :1] += torch.where(vanishing, least, 0.0)
        largest = torch.maximum(largest, least)
    largest = largest.masked_fill(largest == 0.0, 1.0)
    direction = dout / largest
    length = torch.linalg.vecdot(direction, direction).unsqueeze(-1).clamp_min_(0.5)  # 1 to D_v; 0 where dout and delta are 0
    return dout, direction.mul_(delta / largest / length)


class Aten:
    """Any CPU, any head size, float64, float32, bf16 and fp16."""

    name = "aten"

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """See :class:`distattn.kernels.contract.Backend`."""
        if q.device.type != "cpu":
            return f"runs on CPU tensors only, found {q.device.type}"
        if q.dtype not in DTYPES:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, found {q.dtype}"
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} has no flash attention for CPU"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """See :class:`distattn.kernels.contract.Backend`."""
        run = _forward_by_tiles if scores.softcap else _forward_by_pieces
        state = run(q, k, v, bands, scores, state)
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
        run = _backward_by_tiles if scores.softcap else _backward_by_pieces
        run(dout, q, k, v, delta, lse, bands, scores, dq, dk, dv)


def _forward_by_pieces(q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None) -> State:
    dtype, width, d_v = accumulate_dtype(q.dtype), max(q.shape[2], v.shape[2]), v.shape[2]
    work = pieces(bands)
    qh = _as_op_input(q[work.rows], dtype, width)
    kh, vh = (_keys_as_op_input(x[work.keys], dtype, width) for x in (k, v))
    resumed = state is not None
    if not resumed and len(work.calls) == 1 and qh.shape[2] == len(q):
        o, lse = _attend(work.calls[0], qh, kh, vh, scores, d_v)
        return State(o[0].transpose(0, 1), lse[0].T)
    if state is None:
        state = empty_state(q, d_v)
    o, lse = (_heads_first(x[work.rows]) for x in state)
    for piece in work.calls:
        part = _attend(piece, qh, kh, vh, scores, d_v)
        own = State(*(x.narrow(2, piece.q0, piece.q1 - piece.q0) for x in (o, lse)))
        if piece.fresh and not resumed:
            own.o.copy_(part.o)
            own.lse.copy_(part.lse)
        else:
            merge_into(own, part)
    return state


def _backward_by_pieces(
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
    dtype, width = accumulate_dtype(q.dtype), max(q.shape[2], v.shape[2])
    work = pieces(bands)
    given = _out_for_delta(dout[work.rows].to(dtype), delta[work.rows])
    gh, qh, oh = (_as_op_input(x, dtype, width) for x in (given[0], q[work.rows], given[1]))
    kh, vh = (_keys_as_op_input(x[work.keys], dtype, width) for x in (k, v))
    # exp(s - inf) = 0: rows without keys contribute nothing
    lh = _heads_first(lse[work.rows].masked_fill(lse[work.rows] == -torch.inf, torch.inf))
    dqh, dkh, dvh = _heads_first(dq[work.rows]), _heads_first(dk[work.keys]), _heads_first(dv[work.keys])
    for piece in work.calls:
        rows, keys = (piece.q0, piece.q1), (piece.k0, piece.k1)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            *(_cut(x, *rows, piece) for x in (gh, qh)),
            *(_cut_keys(x, piece, qh.shape[1]) for x in (kh, vh)),
            *(_cut(x, *rows, piece) for x in (oh, lh)),
            **_options(piece, dtype, scores),
        )
        for total, grad, (start, stop) in zip((dqh, dkh, dvh), grads, (rows, keys, keys), strict=True):
            grad = grad.flip(2) if piece.kind == FLIPPED else grad
            grad = grad[..., : total.shape[3]] if width > total.shape[3] else grad
            if grad.shape[1] > total.shape[1]:  # one gradient for each repetition of a key head
                grad = grad.unflatten(1, (total.shape[1], -1)).sum(2)
            total.narrow(2, start, stop - start).add_(grad)


def _forward_by_tiles(q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None) -> State:
    """One tile of scores at a time."""
    if state is None:
        state = empty_state(q, v.shape[2])
    for rows, keys, own in tiles(bands):
        Reference().forward(q[rows], k[keys], v[keys], own, scores, State(state.o[rows], state.lse[rows]))
    return state


def _backward_by_tiles(
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
    for rows, keys, own in tiles(bands):
        inputs = dout[rows], q[rows], k[keys], v[keys], delta[rows], lse[rows]
        Reference().backward(*inputs, own, scores, dq[rows], dk[keys], dv[keys])
