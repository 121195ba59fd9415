"""Attention as three PyTorch operators, begin, compute and collect, so that dense work of other rows runs between them.

Backward, autograd takes the operators in reverse: the gradient of collect posts what travels first, that of compute computes,
that of begin collects. So the dense part that stood between two steps stands between two steps again. A ticket, a tensor without
elements, is what autograd sees of a call in progress; the call itself waits in a slot of the executor.

A step depends on the ones before it in ways that a compiler does not see: compile what stands between, not across them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distattn import head_exchange, ops
from distattn.kernels.contract import Scores
from distattn.ops import HANDLES
from distattn.parallel.comm_group import GroupView
from distattn.parallel.executor import Executor


def _trades_heads(handle: int) -> bool:
    return isinstance(HANDLES[handle].executor.communicator, GroupView)


@torch.library.custom_op("distattn::attention_begin", mutates_args=())
def attention_begin(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, handle: int, slot: int, scale: float, softcap: float
) -> Tensor:
    """Posts what travels first of ``distattn::attention`` or ``distattn::ulysses_attention``; returns a ticket."""
    session = HANDLES[handle]
    steps = head_exchange.forward_steps if _trades_heads(handle) else ops.forward_steps
    session.executor.in_progress.begin(slot, steps(session, q, k, v, sinks, Scores(scale, softcap), slot))
    return q.new_empty(0)


@torch.library.custom_op("distattn::attention_compute", mutates_args=())
def attention_compute(tickets: list[Tensor], handles: list[int], slots: list[int]) -> list[Tensor]:
    """The middle of calls that have begun, forward or backward, in turns; returns their next tickets."""
    by_executor: dict[Executor, list[int]] = {}
    for handle, slot in zip(handles, slots, strict=True):
        by_executor.setdefault(HANDLES[handle].executor, []).append(slot)
    for executor, some in by_executor.items():
        executor.in_progress.compute(some)
    return [ticket.new_empty(0) for ticket in tickets]


@torch.library.custom_op("distattn::attention_collect", mutates_args=())
def attention_collect(
    ticket: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    handle: int,
    slot: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, kept bytes, arrived bytes, the slice's lse); the last two are empty where no heads are traded.

    Takes the inputs of the call once more, because its gradient is where the backward pass begins.
    """
    found = HANDLES[handle].executor.in_progress.collect(slot)
    return found if _trades_heads(handle) else (*found, q.new_empty(0, dtype=torch.uint8), found[1].new_empty(0))


@torch.library.custom_op("distattn::attention_backward_begin", mutates_args=())
def attention_backward_begin(
    dout: Tensor | None,
    dlse: Tensor | None,
    inputs: list[Tensor],
    sinks: Tensor | None,
    outputs: list[Tensor],
    kv_heads: int,
    d: int,
    handle: int,
    slot: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Posts what travels first in the backward pass.

    Args:
        inputs: q, k, v; none where heads are traded, whose backward pass needs what arrived instead.
        outputs: what :func:`attention_collect` returned.
    """
    session, scores = HANDLES[handle], Scores(scale, softcap)
    out, lse, kept, arrived, slice_lse = outputs
    if _trades_heads(handle):
        saved = sinks, out, kept, arrived, slice_lse
        steps = head_exchange.backward_steps(session, dout, dlse, *saved, kv_heads, d, scores, slot)
    else:
        q, k, v = inputs
        steps = ops.backward_steps(session, dout, dlse, q, k, v, sinks, out, lse, kept, scores, slot)
    session.executor.in_progress.begin(slot, steps)
    return out.new_empty(0)


@torch.library.custom_op("distattn::attention_backward_collect", mutates_args=())
def attention_backward_collect(ticket: Tensor, handle: int, slot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks (empty without sinks)."""
    return HANDLES[handle].executor.in_progress.collect(slot)


def _begin_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, sinks, ctx.handle, ctx.slot, *_ = inputs
    ctx.with_sinks = sinks is not None


def _begin_backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dsinks = attention_backward_collect(ticket, ctx.handle, ctx.slot)
    return dq, dk, dv, dsinks if ctx.with_sinks else None, None, None, None, None


def _compute_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.handles, ctx.slots = inputs


def _compute_backward(ctx: Any, tickets: list[Tensor]) -> tuple[list[Tensor] | None, ...]:
    # Calls have begun in reverse.
    return attention_compute(tickets[::-1], ctx.handles[::-1], ctx.slots[::-1])[::-1], None, None


def _collect_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, q, k, v, sinks, ctx.handle, ctx.slot, ctx.scale, ctx.softcap = inputs
    ctx.kv_heads, ctx.d = k.shape[1], q.shape[2]
    ctx.save_for_backward(sinks, *output, *(() if _trades_heads(ctx.handle) else (q, k, v)))
    ctx.set_materialize_grads(False)


def _collect_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    sinks, *saved = ctx.saved_tensors
    outputs, inputs = saved[:5], saved[5:]
    options = ctx.kv_heads, ctx.d, ctx.handle, ctx.slot, ctx.scale, ctx.softcap
    return attention_backward_begin(dout, dlse, inputs, sinks, outputs, *options), *(None,) * 8


attention_begin.register_autograd(_begin_backward, setup_context=_begin_context)
attention_compute.register_autograd(_compute_backward, setup_context=_compute_context)
attention_collect.register_autograd(_collect_backward, setup_context=_collect_context)


@dataclass
class AttentionInProgress:
    """What :meth:`distattn.ContextParallel.begin_attention` returns. Call ``compute`` and then ``collect``, each once."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    handle: int
    slot: int
    scale: float
    softcap: float
    finish: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
    """(out, lse) of the operators to what the caller asked for"""

    def __post_init__(self) -> None:
        self._ticket = attention_begin(*self.inputs, self.handle, self.slot, self.scale, self.softcap)

    def compute(self, *others: AttentionInProgress) -> None:
        """Waits for what arrives, computes, and posts what goes home; of this and other calls in turns, so that what one stage
        needs travels while another call computes. The first to have begun comes first."""
        calls = (self, *others)
        tickets = attention_compute([c._ticket for c in calls], [c.handle for c in calls], [c.slot for c in calls])
        for call, ticket in zip(calls, tickets, strict=True):
            call._ticket = ticket

    def collect(self) -> Tensor | tuple[Tensor, Tensor]:
        """Waits for what comes home; what :meth:`distattn.ContextParallel.attention` returns."""
        options = self.handle, self.slot, self.scale, self.softcap
        out, lse, *_ = attention_collect(self._ticket, *self.inputs, *options)
        return self.finish(out, lse)
