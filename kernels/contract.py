"""The contract between whoever owns ranks and whoever owns tensors: one call, one device, no ranks.

Shapes: T_q, T_k rows of queries and keys; H_q, H_kv heads, ``H_q % H_kv == 0`` (query head h reads key head
``h // (H_q // H_kv)``); D head size of q and k, D_v of v. Everything is token-major: q [T_q, H_q, D], k [T_k, H_kv, D],
v [T_k, H_kv, D_v]. The last dimension is contiguous; strides of tokens and heads are arbitrary, also for every output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distattn.kernels.bands import Bands


@dataclass(frozen=True)
class Scores:
    """How scores come from q and k: ``s = q.k * scale``, and with a softcap ``s = softcap * tanh(s / softcap)``."""

    scale: float
    softcap: float = 0.0


class State(NamedTuple):
    """A softmax over the keys seen so far: normalised ``o`` [T_q, H_q, D_v] and natural-log ``lse`` [T_q, H_q].

    Both float32 (float64 for float64 inputs). A row with ``lse`` -inf is still empty; its ``o`` is 0. A state is itself a
    valid online-softmax state with maximum lse, sum 1 and accumulator o, so a kernel can go on from it.
    """

    o: Tensor
    lse: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and gradient accumulators for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(q: Tensor, d_v: int, sinks: Tensor | None = None) -> State:
    """The state before the first key: o 0, lse -inf, or lse = ``sinks`` [H_q] where a learnable sink is a key without value."""
    rows, heads, _ = q.shape
    dtype = accumulate_dtype(q.dtype)
    o = torch.zeros(rows, heads, d_v, dtype=dtype, device=q.device)
    lse = torch.full((rows, heads), -torch.inf, dtype=dtype, device=q.device)
    if sinks is not None:
        lse.copy_(sinks.detach().expand(rows, heads))
    return State(o, lse)


class Backend(Protocol):
    """Block attention on one device. Results are bitwise the same from run to run.

    Rows of k and v that no band touches may hold any finite garbage. Every backend keeps scores, softmax and sums in
    :func:`accumulate_dtype`.
    """

    name: str

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Why this backend cannot take such a call (dtype, head size, device, a missing package); None when it can."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """Attends and returns the state.

        Args:
            bands: disjoint, in the row indices of q and k.
            state: None starts from empty and returns a fresh state of all T_q rows. A state is gone on from, in place,
                and returned; rows that no band touches keep their bits.
            out: [T_q, H_q, D_v] in the output dtype; the final o of ALL rows is written there, and the ``o`` of the
                returned state is then unspecified (its lse is right).
        """

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
        """ADDS the gradients of these bands into accumulators dq [T_q, H_q, D], dk [T_k, H_kv, D], dv [T_k, H_kv, D_v].

        Args:
            dout: [T_q, H_q, D_v].
            delta: [T_q, H_q] in the accumulate dtype, ``rowsum(dout * out)`` minus the gradient into lse, of the WHOLE row.
            lse: [T_q, H_q] in the accumulate dtype, of the whole row; rows with -inf contribute nothing.
        """
