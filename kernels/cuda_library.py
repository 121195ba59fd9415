"""PyTorch's own cuDNN and flash attention as block backends, for bands that are full or causal blocks.

Their aten operators return the lse, so a block's result can be merged; what else they lack is made up for outside:

- The backward wants ``out`` and knows no delta. All that it makes of ``out`` is ``rowsum(dout * out)``, so it gets an ``out``
  that gives delta: four entries a row, each of which takes what the one before left over (:func:`out_for_delta`).
- lse is heads-first, cuDNN's with a last dimension of 1, and natural in both. Rows that saw nothing get +inf: exp(s - inf) = 0.
- o comes in 16 bits. A single block that is the whole call keeps all its bits; states and accumulators stay float32, but what is
  merged into them has been rounded once a block, which :func:`distattn.kernels.choose` therefore does not do unasked.
- dk and dv of grouped heads come summed. The order of cuDNN's and flash's sums in dq is not fixed: no bitwise repeats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.bands import INF, Bands
from distattn.kernels.contract import Scores, State, empty_state
from distattn.kernels.merge import merge_into

DTYPES = (torch.float16, torch.bfloat16)
# The least a carrying entry of dout may be, beside delta and at all: what it adds to dv is lost in rounding, and delta over it
# is still a number of the dtype.
LEAST = {torch.bfloat16: (2.0**-60, 2.0**-120), torch.float16: (2.0**-15, 2.0**-24)}


class Block(NamedTuple):
    """Rows that see all keys, or (causal) as many keys as rows, of which row i sees 0 to i."""

    rows: slice
    keys: slice
    causal: bool


def blocks(bands: Bands) -> tuple[Block, ...] | None:
    """The bands as blocks, or None when one of them is neither full nor causal."""
    found = []
    for band in bands:
        causal = band.hi == band.k0 - band.q0 and band.q1 - band.q0 == band.k1 - band.k0
        if band.lo > -INF or (band.hi < INF and not causal):
            return None
        found.append(Block(slice(band.q0, band.q1), slice(band.k0, band.k1), band.hi < INF))
    return tuple(found)


def operator(name: str) -> Any:
    """An operator of aten; AttributeError where this torch has none of that name."""
    return getattr(torch.ops.aten, name).default


def out_for_delta(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dout, out) [T, H, D_v] in 16 bits with ``rowsum(dout * out)`` equal to ``delta`` [T, H] to float32 precision.

    The largest entry of dout in each quarter of the head carries: the first delta, rounded, the next what that left over, and
    so on; 8 bits (11 in float16) an entry. Entries too small to carry are raised to what is lost in rounding.
    """
    relative, absolute = LEAST[dout.dtype]
    least = (delta.abs() * relative).clamp_min(absolute)
    quarters = dout.unflatten(2, (4, -1))
    place = quarters.abs().argmax(-1, keepdim=True)
    carrying = quarters.gather(-1, place).squeeze(-1).float()
    small = (carrying.abs() < least.unsqueeze(-1)) & (delta != 0).unsqueeze(-1)
    carrying = torch.where(small, least.unsqueeze(-1), carrying).to(dout.dtype)
    raised = quarters.scatter(-1, place, carrying.unsqueeze(-1)).flatten(2)
    shares, rest = [], delta
    for entry in carrying.float().unbind(-1):
        share = torch.where(entry == 0, 0.0, rest / entry).to(dout.dtype)
        rest = rest - share.float() * entry
        shares.append(share)
    out = torch.zeros_like(quarters).scatter(-1, place, torch.stack(shares, -1).unsqueeze(-1)).flatten(2)
    return raised, out


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, ...] as a view [1, H, T, ...]."""
    return x.transpose(0, 1).unsqueeze(0)


class Library:
    """See :class:`distattn.kernels.contract.Backend`. Subclasses say how their operators are called."""

    name: str
    forward_operator: str
    largest_head: int
    oldest: tuple[int, int]

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Why it cannot take such tensors, or None."""
        if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
            return f"{self.name} takes q, k and v all in float16 or all in bfloat16, found {q.dtype}, {k.dtype}, {v.dtype}"
        if q.shape[2] != v.shape[2] or q.shape[2] % 8 or q.shape[2] > self.largest_head:
            found = f"{q.shape[2]}:{v.shape[2]}"
            return f"{self.name} takes D = D_v, a multiple of 8 up to {self.largest_head}, found D:D_v {found}"
        if scores.softcap:
            return f"{self.name} knows no softcap, found {scores.softcap}"
        for operator_name in (self.forward_operator, f"{self.forward_operator}_backward"):
            if not hasattr(torch.ops.aten, operator_name):
                return f"torch {torch.__version__} has no {operator_name}"
        return self._reject_device(q.device)

    def _reject_device(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return f"{self.name} needs an NVIDIA GPU, found tensors on {device}"
        if torch.cuda.get_device_capability(device) < self.oldest:
            needed = ".".join(map(str, self.oldest))
            return f"{self.name} needs compute capability {needed}, found {torch.cuda.get_device_capability(device)}"
        return None

    def reject_bands(self, bands: Bands) -> str | None:
        """Why it cannot take such bands, or None."""
        if blocks(bands) is None:
            return f"{self.name} takes bands that are full or causal blocks, found {bands}"
        return None

    def _blocks(self, bands: Bands) -> tuple[Block, ...]:
        found = blocks(bands)
        if found is None:
            raise ValueError(f"Backend {self.reject_bands(bands)}. Ask for another backend, or leave the choice open.")
        return found

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """(o, lse) of heads-first tensors."""
        raise NotImplementedError

    def _differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of heads-first tensors; lse [1, H, T]."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """One call a block. A single block over all rows is the result itself, others are merged in float32."""
        work = self._blocks(bands)
        whole = len(work) == 1 and state is None and (work[0].rows.start, work[0].rows.stop) == (0, q.shape[0])
        found = state
        if found is None and not whole:
            found = empty_state(q, v.shape[2])
        for rows, keys, causal in work:
            queries, keys_of, values = _heads_first(q[rows]), _heads_first(k[keys]), _heads_first(v[keys])
            o, lse = self._attend(queries, keys_of, values, causal, scores.scale)
            part = State(o[0].transpose(0, 1), lse.reshape(q.shape[1], -1).T)
            if found is None:
                found = State(part.o if out is not None else part.o.float(), part.lse.contiguous())
            else:
                merge_into(found, part, rows)
        assert found is not None
        if out is not None:
            out.copy_(found.o)
        return found

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
        """One call a block, added in float32."""
        for rows, keys, causal in self._blocks(bands):
            given, out = out_for_delta(dout[rows].to(q.dtype), delta[rows])
            upstream, o = _heads_first(given), _heads_first(out)
            queries, keys_of, values = _heads_first(q[rows]), _heads_first(k[keys]), _heads_first(v[keys])
            own = _heads_first(lse[rows].masked_fill(lse[rows] == -torch.inf, torch.inf)).contiguous()
            gradients = self._differentiate(upstream, queries, keys_of, values, o, own, causal, scores.scale)
            for total, gradient, part in zip((dq, dk, dv), gradients, (rows, keys, keys), strict=True):
                total[part] += gradient[0].transpose(0, 1)


class Flash(Library):
    """FlashAttention 2 inside of torch."""

    name = "flash"
    forward_operator = "_scaled_dot_product_flash_attention"
    largest_head = 256
    oldest = (8, 0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        found = operator(self.forward_operator)(q, k, v, 0.0, causal, False, scale=scale)
        return found[0], found[1]

    def _differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is none of
        sizes = q.shape[2], k.shape[2]
        return operator(f"{self.forward_operator}_backward")(
            dout, q, k, v, out, lse, None, None, *sizes, 0.0, causal, unused, unused[:1], scale=scale
        )


class Cudnn(Library):
    """cuDNN's attention inside of torch."""

    name = "cudnn"
    forward_operator = "_scaled_dot_product_cudnn_attention"
    largest_head = 128
    oldest = (8, 0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        found = operator(self.forward_operator)(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return found[0], found[1]

    def _differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        sizes = q.shape[2], k.shape[2]
        return operator(f"{self.forward_operator}_backward")(
            dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, *sizes, 0.0, causal, scale=scale
        )
