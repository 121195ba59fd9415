"""The contenders of the kernel benchmark, and the check that each passes before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from distattn.kernels import load
from distattn.kernels.bands import INF, Bands, clip, shift
from distattn.kernels.contract import State
from distattn.kernels.gluon_backend import GluonBackend
from distattn.kernels.reference import Reference
from distattn.launch.bench_kernels_cases import Case, Inputs
from distattn.launch.bench_kernels_measure import Work

WHOLE = "gluon, nothing cut"
OURS = {"cuda": ("gluon", "gluon_ordered", "gluon_fused", "triton", "cudnn", "flash"), "cpu": ("aten",)}
# bf16 outputs and gradients against float32: rounding of p and ds on the way, and of the result (2e-3 to 3e-3 measured).
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}
ROWS = 64  # of each of the three stretches that are checked


class Wrong(RuntimeError):
    """A contender computes something else."""


@dataclass(frozen=True)
class Finished:
    """What a pass over the whole sequence needs from the forward before it, and what the check compares with."""

    out: Tensor
    lse: Tensor
    delta: Tensor


def finish(case: Case, x: Inputs, backend: Any) -> Finished:
    """The forward of ``case``, checked."""
    out = torch.full((case.queries, case.heads, case.d_v), torch.nan, dtype=x.q.dtype, device=x.q.device)
    state = backend.forward(x.q, x.k, x.v, case.bands, case.scores, out=out)
    check_forward(case, x, backend.name, out, state.lse)
    return Finished(out, state.lse, (x.dout.float() * out.float()).sum(-1))


# ---- ours


def ours(case: Case, x: Inputs, name: str, finished: Finished | None) -> tuple[Work, Callable[[], None]]:
    """(one call, its check) of the backend called ``name``; ValueError with the reason when it cannot take the case."""
    backend = GluonBackend(split=False) if name == WHOLE else load(name)
    reason = backend.reject(x.q, x.k, x.v, case.scores)
    if reason is None and hasattr(backend, "reject_bands"):
        reason = backend.reject_bands(case.bands)
    if reason is not None:
        raise ValueError(reason)
    arguments = x.q, x.k, x.v
    if case.direction == "backward":
        assert finished is not None
        sums = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in arguments]
        delta, lse = finished.delta, finished.lse

        def check() -> None:
            fresh = [torch.zeros_like(t) for t in sums]
            backend.backward(x.dout, x.q, x.k, x.v, delta, lse, case.bands, case.scores, fresh[0], fresh[1], fresh[2])
            check_backward(case, x, name, finished, *fresh)

        return partial(
            backend.backward, x.dout, x.q, x.k, x.v, delta, lse, case.bands, case.scores, sums[0], sums[1], sums[2]
        ), check
    if case.state:
        o = torch.randn(case.queries, case.heads, case.d_v, device=x.q.device)
        state = State(o, torch.randn(case.queries, case.heads, device=x.q.device) + math.log(case.tokens))

        def check_state() -> None:
            mine = State(*(t.clone() for t in state))
            backend.forward(*arguments, case.bands, case.scores, mine)
            check_forward(case, x, name, mine.o, mine.lse, state)

        return partial(backend.forward, *arguments, case.bands, case.scores, state), check_state
    out = torch.full((case.queries, case.heads, case.d_v), torch.nan, dtype=x.q.dtype, device=x.q.device)

    def check_out() -> None:
        out.fill_(torch.nan)
        check_forward(case, x, name, out, backend.forward(*arguments, case.bands, case.scores, out=out).lse)

    return partial(backend.forward, *arguments, case.bands, case.scores, out=out), check_out


# ---- libraries, as their own users call them: heads first, contiguous, their own out


def libraries(
    case: Case, x: Inputs, finished: Finished | None, flex: bool
) -> Iterator[tuple[str, Callable[[], tuple[Work, Callable[[], None]]]]]:
    """Names, and what makes (one call, its check); making fails where the library cannot."""
    if case.state:
        return
    if case.mask in ("full", "causal"):
        if x.q.is_cuda:
            for name, kernel in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                yield f"{name} (library)", partial(_library, case, x, finished, partial(_sdpa, case, kernel))
        else:
            yield "SDPA (library)", partial(_library, case, x, finished, partial(_sdpa, case, None))
    if flex and x.q.is_cuda:
        yield "flex_attention (library)", lambda: _library(case, x, finished, _flex(case, x.q.device))


def _sdpa(case: Case, kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options: dict[str, Any] = {"is_causal": case.mask == "causal", "enable_gqa": case.heads != case.kv_heads}
    if kernel is None:
        return scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v, **options)


def _flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """Compiled flex_attention with the case's mask as a function of the band of each query: bands of a case do not overlap in
    queries."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    table = torch.from_numpy(case.bands.table.copy()).clamp(-(1 << 30), 1 << 30).to(device)
    band_of = torch.zeros(case.queries, dtype=torch.int64, device=device)
    for place, band in enumerate(case.bands):
        band_of[band.q0 : band.q1] = place

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = table[band_of[i]]
        distance = j - i
        return (j >= own[..., 2]) & (j < own[..., 3]) & (distance >= own[..., 4]) & (distance <= own[..., 5])

    # dynamo keeps eight compilations of one function; beyond them, without fullgraph, it would run uncompiled without a word
    torch._dynamo.reset()
    mask = create_block_mask(visible, None, None, case.queries, case.tokens, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return partial(compiled, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def _library(case: Case, x: Inputs, finished: Finished | None, attend: Callable[..., Tensor]) -> tuple[Work, Callable[[], None]]:
    q, k, v, dout = (t.transpose(0, 1).unsqueeze(0).contiguous() for t in (x.q, x.k, x.v, x.dout))
    if case.direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(q, k, v)

        return forward, lambda: check_forward(case, x, "library", forward()[0].transpose(0, 1), None)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def check() -> None:
        assert finished is not None
        check_backward(case, x, "library", finished, *(g[0].transpose(0, 1) for g in backward()))

    return backward, check


# ---- the check: stretches of rows at the beginning, in the middle and at the end, one group of heads, against float32


def stretches(n: int, rows: int = ROWS) -> list[slice]:
    """Three stretches of ``rows`` rows, or all rows where there are not more."""
    if n <= 3 * rows:
        return [slice(a, min(a + 256, n)) for a in range(0, n, 256)]
    return [slice(0, rows), slice(n // 2 - rows // 2, n // 2 + rows // 2), slice(n - rows, n)]


def between(bands: Bands, rows: slice | None, keys: slice | None) -> Bands:
    """The bands inside of some rows or keys, in coordinates that begin there."""
    q0, q1 = (rows.start, rows.stop) if rows else (-INF, INF)
    k0, k1 = (keys.start, keys.stop) if keys else (-INF, INF)
    return Bands(shift(clip(bands.table, q0, q1, k0, k1), -q0 if rows else 0, -k0 if keys else 0))


def _assert_close(case: Case, who: str, what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-20))
    if not error <= ALLOWED[dtype]:
        raise Wrong(f"{who} on {case.name}: {what} is off by {error:.2g} relative L2, allowed {ALLOWED[dtype]:g}")


def check_forward(case: Case, x: Inputs, who: str, out: Tensor, lse: Tensor | None, state: State | None = None) -> None:
    """Raises :class:`Wrong` unless out and lse are those of float32, row stretch by row stretch, for one group of heads."""
    group = case.heads // case.kv_heads
    for rows in stretches(case.queries):
        start = State(*(t[rows, :group].clone() for t in state)) if state is not None else None
        want = Reference().forward(x.q[rows, :group], x.k[:, :1], x.v[:, :1], between(case.bands, rows, None), case.scores, start)
        _assert_close(case, who, "out", out[rows, :group], want.o, x.q.dtype)
        if lse is not None:
            _assert_close(case, who, "lse", lse[rows, :group], want.lse, torch.float32)


def check_backward(case: Case, x: Inputs, who: str, finished: Finished, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The same for the gradients: dq of stretches of rows, dk and dv of stretches of keys."""
    group = case.heads // case.kv_heads
    q, dout, k, v = x.q[:, :group], x.dout[:, :group], x.k[:, :1], x.v[:, :1]
    delta, lse = finished.delta[:, :group], finished.lse[:, :group]

    def run(rows: slice, keys: slice, bands: Bands) -> list[Tensor]:
        sums = [torch.zeros(t.shape, device=t.device) for t in (q[rows], k[keys], v[keys])]
        Reference().backward(dout[rows], q[rows], k[keys], v[keys], delta[rows], lse[rows], bands, case.scores, *sums)
        return sums

    for part in stretches(case.queries):
        wanted = run(part, slice(0, case.tokens), between(case.bands, part, None))[0]
        _assert_close(case, who, "dq", dq[part, :group], wanted, x.q.dtype)
    for part in stretches(case.tokens):
        wanted_k, wanted_v = run(slice(0, case.queries), part, between(case.bands, None, part))[1:]
        _assert_close(case, who, "dk", dk[part, :1], wanted_k, x.q.dtype)
        _assert_close(case, who, "dv", dv[part, :1], wanted_v, x.q.dtype)
