"""The portable Triton backend: from tensors and bands to launches. Importable without triton, which :meth:`reject` then says."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores, State
from distattn.kernels.tiles import tile_table
from distattn.kernels.triton_launch import (
    FORWARD,
    KEYS,
    QUERIES,
    architecture_class,
    launch_parameters,
    padded,
)

LOG2_E = 1.4426950408889634
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
LARGEST_STRIDE = (1 << 31) // 256  # inside a tile of up to 256 rows offsets are 32 bits


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def _version() -> TorchVersion:
    import triton

    return TorchVersion(triton.__version__)


@lru_cache(maxsize=3)
def _kernel(kind: str) -> Any:
    """The Triton function of ``kind``; imports triton."""
    if kind == FORWARD:
        from distattn.kernels.triton_forward import forward_kernel

        return forward_kernel
    from distattn.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel

    return key_gradient_kernel if kind == KEYS else query_gradient_kernel


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether triton runs the kernels in its interpreter: as it decided when it read them, not as a variable says now."""
    from triton.runtime import JITFunction

    return not isinstance(_kernel(FORWARD), JITFunction)


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> str:
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return architecture_class("hip", 0)
    major, minor = torch.cuda.get_device_capability(device)
    return architecture_class("cuda", 10 * major + minor)


class TritonBackend:
    """See :class:`distattn.kernels.contract.Backend`. On CPU tensors it runs only in triton's interpreter."""

    name = "triton"

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Why it cannot take the call, or None."""
        if not _installed():
            return "triton is not installed"
        if q.dtype not in DTYPES:
            return f"triton kernels take float32, float16 and bfloat16, found {q.dtype}"
        if not q.dtype == k.dtype == v.dtype:
            return f"triton kernels take q, k and v of one dtype, found {q.dtype}, {k.dtype}, {v.dtype}"
        if max(q.shape[2], v.shape[2]) > LARGEST_HEAD:
            return f"triton kernels take head sizes up to {LARGEST_HEAD}, found D {q.shape[2]}, D_v {v.shape[2]}"
        if scores.scale < 0:
            return f"triton kernels take scales >= 0, found {scores.scale}"
        if any(stride > LARGEST_STRIDE for x in (q, k, v) for stride in x.stride()[:1]):
            return f"triton kernels take token strides up to {LARGEST_STRIDE}, found {[x.stride(0) for x in (q, k, v)]}"
        return self._reject_device(q.device) or self._reject_compiler(q.dtype)

    def _reject_device(self, device: torch.device) -> str | None:
        if interpreted():
            return None
        if device.type != "cuda":
            return (
                f"triton needs a GPU, found tensors on {device} (its interpreter is chosen by TRITON_INTERPRET=1 before import)"
            )
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return f"triton kernels need compute capability 8.0, found {torch.cuda.get_device_capability(device)}"
        return None

    def _reject_compiler(self, dtype: torch.dtype) -> str | None:
        if dtype == torch.float32 and not interpreted() and _version() < TorchVersion("3.3"):
            return f"triton {_version()} cannot compile the float32 backward. Install triton 3.3 or newer, which torch 2.7 brings"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """One launch; without state or with ``out`` over all query tiles, else over those with work."""
        fresh = state is None
        if state is None:
            o = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float32, device=q.device) if out is None else out
            state = State(o, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        # The interpreter truncates when it stores bfloat16: let it store float32 and round outside.
        rounded = out if out is not None and out.dtype == torch.bfloat16 and interpreted() else None
        target = state.o if out is None else out if rounded is None else torch.empty_like(out, dtype=torch.float32)
        tensors = [q, k, v, target, state.lse, target if fresh else state.o, state.lse]
        all_rows = fresh or out is not None
        _launch(FORWARD, tensors, bands, scores, all_rows, STATE=not fresh, ALL_ROWS=all_rows)
        if rounded is not None:
            rounded.copy_(target)
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
        """Two launches: dk and dv by key tile, dq by query tile."""
        inputs = [q, k, v, dout, lse, delta]
        _launch(KEYS, [*inputs, dk, dv], bands, scores, False, scores.scale)
        _launch(QUERIES, [*inputs, dq], bands, scores, False, scores.scale)


def _launch(kind: str, tensors: list[Tensor], bands: Bands, scores: Scores, all_rows: bool, *extra: float, **flags: bool) -> None:
    """Launches the kernel of ``kind`` over its tile table; ``tensors`` begin with q, k, v and stand in the kernel's order."""
    q, k, v = tensors[:3]
    d, d_v = q.shape[2], v.shape[2]
    block_d, block_dv = padded(d), padded(d_v)
    chosen = launch_parameters(_architecture(q.device), kind, block_d, block_dv, q.element_size())
    table = tile_table(bands, q.shape[0], k.shape[0], chosen.block_q, chosen.block_k, "k" if kind == KEYS else "q")
    n_tiles = len(table.tiles) if all_rows else table.n_work
    heads = k.shape[1] if kind == KEYS else q.shape[1]
    if n_tiles * heads == 0:
        return
    inner, outer = scores.scale * LOG2_E, 0.0
    if scores.softcap:
        inner, outer = scores.scale / scores.softcap, scores.softcap * LOG2_E
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    sizes = [q.shape[0], k.shape[0], n_tiles, q.shape[1] // k.shape[1]]
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _kernel(kind)[(n_tiles * heads,)](
            *tensors,
            *table.on(q.device),
            *strides,
            *sizes,
            inner,
            outer,
            *extra,
            D=d,
            D_V=d_v,
            BLOCK_Q=chosen.block_q,
            BLOCK_K=chosen.block_k,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            SOFTCAP=scores.softcap != 0,
            UPCAST=interpreted() and q.dtype == torch.bfloat16,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,  # no longer the default from triton 3.10 on
            **flags,
        )
