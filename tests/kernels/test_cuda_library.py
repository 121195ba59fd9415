"""The library backends on a CPU: their operators replaced by dense attention in float64 of the same signature.

The stand-ins are called only after torch's own parser has accepted the same arguments on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distattn.kernels import cuda_library
from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores
from distattn.kernels.cuda_library import Block, Cudnn, Flash, Library, blocks, out_for_delta
from tests.kernels.cases import BASIC, Case, check_backend, make

BF16, F16 = torch.bfloat16, torch.float16
LIBRARIES = [Cudnn(), Flash()]


def scores_of(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    s = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * scale
    assert not causal or q.shape[2] == k.shape[2], "libraries disagree about the corner of a causal mask of unequal lengths"
    hidden = torch.ones(s.shape[2:], dtype=torch.bool).triu(1)
    return s.masked_fill(hidden, -math.inf) if causal else s


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    s = scores_of(q, k, causal, scale)
    o = s.softmax(-1) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return o.to(q.dtype), s.logsumexp(-1).float()


def differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the formulas that the libraries use: delta is rowsum(dout * out), summed in float32."""
    group = q.shape[1] // k.shape[1]
    p = torch.exp(scores_of(q, k, causal, scale) - lse.double().unsqueeze(-1))
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    delta = (dout.float() * out.float()).sum(-1, keepdim=True).double()
    ds = p * (dout.double() @ values.transpose(2, 3) - delta) * scale
    dk, dv = ds.transpose(2, 3) @ q.double(), p.transpose(2, 3) @ dout.double()
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return (ds @ keys).to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def on_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash(q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):  # type: ignore[no-untyped-def]
        assert dropout_p == 0.0 and not return_debug_mask
        return (*attend(q, k, v, is_causal, scale), None, None, q.shape[2], k.shape[2], None, None, None)

    def flash_backward(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale):  # type: ignore[no-untyped-def]
        assert cum_q is None and cum_k is None and (max_q, max_k) == (q.shape[2], k.shape[2]) and dropout_p == 0.0
        assert lse.shape == q.shape[:3] and lse.is_contiguous() and lse.dtype == torch.float32
        return differentiate(dout, q, k, v, out, lse, is_causal, scale)

    def cudnn(q, k, v, bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale):  # type: ignore[no-untyped-def]
        assert bias is None and compute_log_sumexp and dropout_p == 0.0
        o, lse = attend(q, k, v, is_causal, scale)
        return o, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None

    def cudnn_backward(dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *, scale):  # type: ignore[no-untyped-def]
        assert bias is None and cum_q is None and cum_k is None and (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous() and dropout_p == 0.0
        return differentiate(dout, q, k, v, out, lse.squeeze(-1), is_causal, scale)

    stands = {
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_flash_attention_backward": flash_backward,
        "_scaled_dot_product_cudnn_attention": cudnn,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    }
    real = cuda_library.operator

    def operator(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            shapes = real(name)(*map(on_meta, arguments), **named)
            found = stands[name](*arguments, **named)
            for shape, x in zip(shapes[: 3 if name.endswith("backward") else 1], found, strict=False):
                assert shape.shape == x.shape and shape.dtype == x.dtype
            return found

        return call

    monkeypatch.setattr(cuda_library, "operator", operator)
    monkeypatch.setattr(Library, "_reject_device", lambda self, device: None)


FULL = Bands([Band(0, 133, 0, 133)])
PARTS = Bands([Band(0, 60, 0, 60, -INF, 0), Band(60, 133, 0, 60), Band(60, 133, 60, 133, -INF, 0)])
BLOCKS = [
    replace(BASIC, d=32, d_v=32, dtype=BF16),
    replace(BASIC, d=32, d_v=32, dtype=BF16, heads=(4, 2), out_dtype=BF16),
    replace(BASIC, name="full", d=64, d_v=64, dtype=BF16, heads=(4, 2), bands=FULL, calls=2, sinks=True),
    replace(BASIC, name="fp16", d=32, d_v=32, dtype=F16, bands=PARTS, heads=(4, 2), out_dtype=F16),
    replace(BASIC, name="strided", d=32, d_v=32, dtype=BF16, bands=PARTS, strided=True),
    replace(BASIC, name="rows without keys", d=32, d_v=32, dtype=BF16, bands=Bands([Band(10, 50, 30, 70, -INF, 20)])),
]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("case", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_merged_and_gradients_from_delta(library: Library, case: Case) -> None:
    check_backend(library, case)


def test_which_bands_are_blocks() -> None:
    assert blocks(Bands([Band(4, 9, 10, 15, -INF, 6)])) == (Block(slice(4, 9), slice(10, 15), True),)
    assert blocks(Bands([Band(4, 9, 10, 30)])) == (Block(slice(4, 9), slice(10, 30), False),)
    assert blocks(Bands([Band(0, 9, 0, 9, -3, 0)])) is None
    assert blocks(Bands([Band(0, 9, 0, 9, -INF, 1)])) is None
    assert blocks(Bands([Band(0, 9, 0, 12, -INF, 0)])) is not None, "no row sees the keys behind the square"
    assert blocks(Bands([Band(0, 9, 0, 5, -INF, 0)])) is None


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_out_for_delta_is_exact_to_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dout = torch.randn(500, 3, 64).to(dtype)
    delta = torch.randn(500, 3) * 3
    dout[::5, :, 17:] = 0  # whole quarters without anything to carry with
    dout[::7] = 0
    delta[::3] = 0
    delta[1::9] *= 1e-3
    raised, out = out_for_delta(dout, delta)
    assert out.isfinite().all()
    got = (raised.double() * out.double()).sum(-1)
    limit = 1e-6 if dtype == BF16 else 2e-5  # float16 ends at 6e-8: what is left over may not be a number any more
    assert float((got - delta.double()).abs().max()) < limit
    assert float((raised.double() - dout.double()).abs().max()) <= float(delta.abs().max()) * 2.0 ** (
        -60 if dtype == BF16 else -15
    )


def test_refusals_and_errors() -> None:
    p = make(replace(BASIC, d=32, d_v=32, dtype=BF16))
    flash = Flash()
    assert flash.reject(p.q, p.k, p.v, p.scores) is None
    assert "found 1.5" in (flash.reject(p.q, p.k, p.v, Scores(1.0, 1.5)) or "")
    assert "found torch.float32" in (flash.reject(p.q.float(), p.k, p.v, p.scores) or "")
    wide = torch.zeros(4, 2, 136, dtype=BF16)
    assert "up to 128, found D:D_v 136:136" in (Cudnn().reject(wide, wide, wide, p.scores) or "")
    window = Bands([Band(0, 133, 0, 133, -20, 0)])
    assert "full or causal" in (flash.reject_bands(window) or "")
    with pytest.raises(ValueError, match="flash takes bands that are full or causal"):
        flash.forward(p.q, p.k, p.v, window, p.scores)
