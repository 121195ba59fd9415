"""The Hopper backend: from tensors and bands to launches. Importable without triton, which its :meth:`reject` then says."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores, State
from distattn.kernels.gluon_division import Costs
from distattn.kernels.gluon_launch import ADD, FORWARD, FUSED, KEYS, MERGE, ORDERED, PARTS, QUERIES, ROWS, SCRATCH, SOFTCAP_ROWS
from distattn.kernels.gluon_pieces import add_gradients, merge_states, scratch_for
from distattn.kernels.gluon_plans import Plan, Shape, costs_of_cutting, plan
from distattn.kernels.tiles import TileTable

LOG2_E = 1.4426950408889634
DTYPES = (torch.float16, torch.bfloat16)
OLDEST = "3.6"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]  # q, k, v, dout, (lse, delta) as the kernels read them


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why Gluon is not here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if TorchVersion(triton.__version__) < TorchVersion(OLDEST):
        return f"Gluon kernels need triton {OLDEST}, found {triton.__version__}"
    return None


def addressable(x: Tensor) -> str | None:
    """Why the copy engine cannot read ``x`` [T, H, D] as boxes of a [T, H * D] matrix, or None."""
    token, head, column = x.stride()
    if x.shape[0] > 1 and token < (x.shape[1] - 1) * head + x.shape[2]:
        return f"strides {x.stride()} with heads outside of tokens (make it token-major, [T, H, D])"
    if column != 1 or token % 8 or head % 8 or x.data_ptr() % 16:
        return (
            f"strides {x.stride()} at address {x.data_ptr() % 16} modulo 16 (rows and heads must begin at multiples of 16 bytes)"
        )
    return None


def boxes(x: Tensor, rows: int, columns: int, more: int) -> tuple[Any, Any]:
    """Descriptors of ``x`` [T, H, D] as a matrix of H * D columns, in boxes of ``rows`` x ``columns`` and of ``rows`` x ``more``.

    The copy engine fills what lies below row T with zeros. Without ``more`` both are the same.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    shape, strides = [x.shape[0], width], [max(x.stride(0), -(-width // 8) * 8), 1]  # one row may have any stride

    def descriptor(columns: int) -> Any:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, columns * 2), element_bitwidth=16, rank=2)
        return TensorDescriptor(x, shape, strides, [rows, columns], layout)

    first = descriptor(columns)
    return first, descriptor(more) if more and more != columns else first


def rows_of(x: Tensor, length: int) -> Any:
    """A descriptor of float32 ``x`` as one long row, in runs of ``length``."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [length], layout)


@lru_cache(maxsize=8)
def kernel(kind: str) -> Any:
    """The Gluon function of ``kind``; imports triton."""
    if kind == FORWARD:
        from distattn.kernels.gluon_forward import forward_kernel

        return forward_kernel
    if kind in (KEYS, FUSED, ORDERED):
        from distattn.kernels.gluon_backward import key_gradient_kernel

        return key_gradient_kernel
    if kind in (MERGE, ADD):
        from distattn.kernels.gluon_merge import add_pieces_kernel, merge_pieces_kernel

        return merge_pieces_kernel if kind == MERGE else add_pieces_kernel
    from distattn.kernels.gluon_query_backward import add_scratch_kernel, query_gradient_kernel

    return query_gradient_kernel if kind == QUERIES else add_scratch_kernel


class GluonBackend:
    """See :class:`distattn.kernels.contract.Backend`. Runs on compute capability 9.0 (H100, H200) alone.

    Args:
        deterministic: False makes dq in the kernel of dk and dv, five products instead of seven, and adds it up in whatever
            order it comes: the bits of dq then differ from run to run. Head sizes 64:64 and 128:128 only.
        ordered: dq is made as in that kernel, and added up in a fixed order: programs wait for their turn.
        split: False cuts no item, as fields of the launch rows do kernel by kernel.
    """

    def __init__(self, deterministic: bool = True, ordered: bool = False, split: bool = True):
        assert deterministic or not ordered, "a fixed order is deterministic"
        self.deterministic, self.split = deterministic, split
        self.name = "gluon_ordered" if ordered else "gluon" if deterministic else "gluon_fused"
        self._kind = ORDERED if ordered else KEYS if deterministic else FUSED

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Why it cannot take the call, or None."""
        reason = missing()
        if reason is not None:
            return reason
        if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
            return f"Gluon kernels take q, k and v all in float16 or all in bfloat16, found {q.dtype}, {k.dtype}, {v.dtype}"
        fused = self._kind != KEYS
        sizes = ROWS[self._kind if fused else FORWARD]
        if (q.shape[2], v.shape[2]) not in sizes:
            named = ", ".join(f"{d}:{d_v}" for d, d_v in sizes)
            return f"{self.name} kernels take head sizes D:D_v of {named}, found {q.shape[2]}:{v.shape[2]}"
        if scores.softcap and fused:
            return f"{self.name} kernels know no softcap, found {scores.softcap}"
        if not scores.scale > 0:
            return f"Gluon kernels take scales > 0, found {scores.scale}"
        for name, x in (("q", q), ("k", k), ("v", v)):
            reason = addressable(x)
            if reason is not None:
                return f"Gluon kernels fetch boxes by TMA, found {name} with {reason}"
        return self._reject_device(q.device)

    def _reject_device(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return f"Gluon kernels need an NVIDIA GPU of compute capability 9.0, found tensors on {device}"
        if torch.cuda.get_device_capability(device) != (9, 0):
            return f"Gluon kernels need compute capability 9.0, found {torch.cuda.get_device_capability(device)}"
        return None

    def _kernel(self, kind: str) -> Any:
        """The Gluon function of ``kind``; imports triton."""
        return kernel(kind)

    def _row(self, kind: str, d: int, d_v: int, softcap: float = 0.0) -> Any:
        return (SOFTCAP_ROWS if softcap and (d, d_v) in SOFTCAP_ROWS.get(kind, {}) else ROWS)[kind][d, d_v]

    def _processors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def _costs(self, kind: str, row: Any, shape: Shape) -> Costs | None:
        """Of cutting items; None where none is to be cut."""
        return costs_of_cutting(kind, row, shape) if self.split and row.split else None

    def _plan(self, kind: str, row: Any, q: Tensor, k: Tensor, v: Tensor, bands: Bands, align: int = 1) -> Plan:
        shape = Shape.of(q, k, v)
        return plan(kind, row, shape, bands, self._processors(q.device), self._costs(kind, row, shape), align)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """One launch over the query tiles with work, and one that joins pieces of tiles; the others are filled outside of it."""
        fresh = state is None
        if state is None:
            o = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float32, device=q.device) if out is None else out
            state = State(o, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        target = state.o if out is None else out
        row = self._row(FORWARD, q.shape[2], v.shape[2], scores.softcap)
        table, work = self._plan(FORWARD, row, q, k, v, bands)[:2]
        if fresh or out is not None:
            _fill_idle(table, row.consumers * 64, target, state, fresh)
        if work is None:
            return state
        (d, d2), (d_v, d_v2) = PARTS[q.shape[2]], PARTS[v.shape[2]]
        staged = row.stage_out and fresh and target.dtype == q.dtype and addressable(target) is None
        staged = staged and not (work.pieces and scores.softcap)  # these three together spill on triton 3.6
        given = target if fresh else state.o
        descriptors = [boxes(q, 64, d, d2), boxes(k, row.block_k, d, d2), boxes(v, row.block_k, d_v, d_v2)]
        parts = scratch_for(work, row.consumers * 64, v.shape[2] + 1, q.device)
        with _on(q.device):
            self._kernel(FORWARD)[(work.programs,)](
                *(box for pair in descriptors for box in pair),
                boxes(target, 64, d_v, 0)[0] if staged else descriptors[0][0],
                target,
                state.lse,
                given,
                *work.on(q.device)[:3],
                parts,
                *(x.stride(1) for x in (q, k, v)),
                *(stride for x in (target, state.lse, given) for stride in x.stride()[:2]),
                q.shape[1] // k.shape[1],
                q.shape[0],
                *_bend(scores),
                D=d,
                D2=d2,
                D_V=d_v,
                D_V2=d_v2,
                CONSUMERS=row.consumers,
                BLOCK_K=row.block_k,
                STAGES=row.stages,
                STATE=not fresh,
                ALL_ROWS=fresh or out is not None,
                TMA_OUT=staged,
                SOFTCAP=scores.softcap != 0,
                PING_PONG=row.ping_pong,
                MAXIMUM_FIRST=row.maximum_first,
                PIECES=work.pieces > 0,
                **_registers(row),
            )
            if work.pieces:
                rows, all_rows = row.consumers * 64, fresh or out is not None
                merge_states(self._kernel(MERGE), work, rows, target, state.lse, given, parts, not fresh, all_rows)
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
        """Two launches: dk and dv by key tile, dq by query tile; fused, dq comes with the first and is only brought home."""
        if q.shape[0] == 0 or k.shape[0] == 0 or len(bands) == 0:
            return
        dout = dout if dout.dtype == q.dtype and addressable(dout) is None else dout.to(q.dtype).contiguous()
        first = self._kind != KEYS and q.shape[2] == 64
        statistics = _statistics(lse, delta, -1 / scores.scale if first else LOG2_E, -1.0 if first else 1.0)
        inputs = q, k, v, dout, statistics
        if self._kind == KEYS:
            self._key_gradients(KEYS, inputs, bands, scores, dk, dv, dq)
            self._query_gradients(inputs, bands, scores, dq)
        else:
            self._all_gradients(inputs, bands, scores, dq, dk, dv)

    def _all_gradients(self, inputs: Inputs, bands: Bands, scores: Scores, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """dq in tiles of a scratch; ordered, with a tile in front for what belongs to none and counters of turns behind."""
        q, ordered = inputs[0], self._kind == ORDERED
        block_q = self._row(self._kind, q.shape[2], q.shape[2]).block_q
        tiles, size = -(-q.shape[0] // block_q), block_q * q.shape[2]
        n = (q.shape[1] * tiles + ordered) * size
        scratch = torch.zeros(n + (q.shape[1] * tiles + 1) * ordered, dtype=torch.float32, device=q.device)
        counters = scratch[n:].view(torch.int32) if ordered else None
        self._key_gradients(self._kind, inputs, bands, scores, dk, dv, scratch, counters)
        with _on(q.device):
            self._kernel(SCRATCH)[(2 * q.shape[1] * tiles,)](
                dq, scratch[ordered * size :], *dq.stride()[:2], q.shape[0], tiles, scores.scale,
                D=q.shape[2], BLOCK_Q=block_q, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    def _key_gradients(
        self,
        kind: str,
        inputs: Inputs,
        bands: Bands,
        scores: Scores,
        dk: Tensor,
        dv: Tensor,
        scratch: Tensor,
        counters: Tensor | None = None,
    ) -> None:
        q, k, v, dout, (lse, delta) = inputs
        row = self._row(kind, q.shape[2], v.shape[2], scores.softcap)
        fused = kind != KEYS
        assert not fused or row.stages <= 3, f"with {row.stages} stages ds would be overwritten while it is read"
        block_k, block_q = row.key_tiles * 64, row.block_q
        # fused: pieces of dq are whole tiles; else lse and delta are copied from multiples of 16 bytes
        _, work, walked = self._plan(kind, row, q, k, v, bands, block_q if fused else 4)
        if work is None:
            return
        assert not fused or not work.pieces, "the scratch of the fused kernel is that of dq"
        (d, d2), (d_v, d_v2) = PARTS[q.shape[2]], PARTS[v.shape[2]]
        descriptors = [boxes(q, block_q, d, d2), boxes(k, 64, d, d2), boxes(v, 64, d_v, d_v2), boxes(dout, block_q, d_v, d_v2)]
        scratch = scratch_for(work, block_k, q.shape[2] + v.shape[2], q.device) if work.pieces else scratch
        turns = [*walked.on(q.device), counters] if walked else [None, None, None]
        with _on(q.device):
            self._kernel(kind)[(work.programs,)](
                *(box for pair in descriptors for box in pair),
                rows_of(lse, block_q),
                rows_of(delta, block_q),
                dk,
                dv,
                scratch,
                *work.on(q.device)[:3],
                *(x.stride(1) for x in (q, k, v, dout)),
                *(stride for x in (dk, dv) for stride in x.stride()[:2]),
                q.shape[1] // k.shape[1],
                k.shape[0],
                lse.shape[1],
                -(-q.shape[0] // block_q),
                *_bend(scores),
                scores.scale,
                *turns,
                D=d,
                D2=d2,
                D_V=d_v,
                D_V2=d_v2,
                KEY_TILES=row.key_tiles,
                BLOCK_Q=block_q,
                STAGES=row.stages,
                SOFTCAP=scores.softcap != 0,
                FUSED=fused,
                ORDERED=counters is not None,
                STATISTICS_FIRST=fused and q.shape[2] == 64,
                VALUES_FIRST=row.values_first,
                PIECES=work.pieces > 0,
                **_registers(row),
            )
            if work.pieces:
                add_gradients(self._kernel(ADD), work, block_k, (dk, dv), scratch)

    def _query_gradients(self, inputs: Inputs, bands: Bands, scores: Scores, dq: Tensor) -> None:
        q, k, v, dout, (lse, delta) = inputs
        row = self._row(QUERIES, q.shape[2], v.shape[2], scores.softcap)
        work = self._plan(QUERIES, row, q, k, v, bands).work
        if work is None:
            return
        (d, d2), (d_v, d_v2) = PARTS[q.shape[2]], PARTS[v.shape[2]]
        descriptors = [
            boxes(q, 64, d, d2),
            boxes(k, row.block_k, d, d2),
            boxes(v, row.block_k, d_v, d_v2),
            boxes(dout, 64, d_v, d_v2),
        ]
        parts = scratch_for(work, 128, q.shape[2], q.device)
        with _on(q.device):
            self._kernel(QUERIES)[(work.programs,)](
                *(box for pair in descriptors for box in pair),
                dq,
                lse,
                delta,
                parts,
                *work.on(q.device)[:3],
                *(x.stride(1) for x in (q, k, v, dout)),
                *dq.stride()[:2],
                q.shape[1] // k.shape[1],
                q.shape[0],
                lse.shape[1],
                *_bend(scores),
                scores.scale,
                D=d,
                D2=d2,
                D_V=d_v,
                D_V2=d_v2,
                BLOCK_K=row.block_k,
                STAGES=row.stages,
                SOFTCAP=scores.softcap != 0,
                PIECES=work.pieces > 0,
                **_registers(row),
            )
            if work.pieces:
                add_gradients(self._kernel(ADD), work, 128, (dq,), parts)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _bend(scores: Scores) -> tuple[float, float]:
    """(inner, outer) of scores in base 2: product * inner, or tanh(product * inner) * outer."""
    if scores.softcap:
        return scores.scale / scores.softcap, scores.softcap * LOG2_E
    return scores.scale * LOG2_E, 0.0


def _registers(row: Any) -> dict[str, int]:
    return {
        "REGISTERS": row.registers,
        "PRODUCER_REGISTERS": row.producer_registers,
        "num_warps": 4,
        "maxnreg": row.entry_registers,
        "enable_fp_fusion": True,  # no longer the default from triton 3.10 on
    }


def _statistics(lse: Tensor, delta: Tensor, lse_factor: float, delta_factor: float) -> tuple[Tensor, Tensor]:
    """lse and delta times their factors as [H, T padded to 16 bytes]; rows that saw nothing get an lse that makes their p 0."""
    rows, heads = lse.shape
    nothing = torch.inf if lse_factor > 0 else -torch.inf
    both = torch.empty(2, heads, -(-rows // 4) * 4, dtype=torch.float32, device=lse.device)
    torch.mul(lse.masked_fill(lse == -torch.inf, torch.inf).T, lse_factor, out=both[0, :, :rows])
    torch.mul(delta.T, delta_factor, out=both[1, :, :rows])
    both[0, :, rows:], both[1, :, rows:] = nothing, 0.0
    return both[0], both[1]


def _fill_idle(table: TileTable, block: int, target: Tensor, state: State, fresh: bool) -> None:
    """Writes the final o (and with ``fresh`` the lse) of the rows whose tile sees nothing, run by run."""
    idle = table.idle
    runs = np.split(idle, np.flatnonzero(np.diff(idle) != 1) + 1) if len(idle) else []
    for run in runs:
        rows = slice(int(run[0]) * block, (int(run[-1]) + 1) * block)
        if fresh:
            target[rows], state.lse[rows] = 0.0, -torch.inf
        else:  # the o of an empty row counts as 0, whatever stands there
            target[rows] = state.o[rows].masked_fill((state.lse[rows] == -torch.inf).unsqueeze(-1), 0.0)
