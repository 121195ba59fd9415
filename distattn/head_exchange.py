"""Sharded attention between two head exchanges, as one PyTorch operator.

One operator and not three, so that nothing is rounded on the way: gradients of key heads that several ranks attend with are
summed before they get the dtype of the inputs. It saves what arrived in the exchange (this rank's slice of q, k and v over all
rows of its group), not the local q, k and v; under ``save_attention`` both exchanges and the plan's messages run once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distattn.kernels.contract import Scores, accumulate_dtype
from distattn.ops import HANDLES, Session, call_shape, sinks_gradient, upstream
from distattn.parallel.comm_group import GroupView
from distattn.parallel.exchange import HeadExchange
from distattn.parallel.program import Program
from distattn.parallel.rank_plan import agree
from distattn.parallel.shape import Shape
from distattn.parallel.steps import Steps, inside, run


def _group(session: Session) -> GroupView:
    group = session.executor.communicator
    assert isinstance(group, GroupView), "a head exchange without a group"
    return group


def _exchange(session: Session, shape: Shape, scores: Scores, sinks: bool) -> HeadExchange:
    """This rank's part for a shape with all heads; the first time all ranks compare what they ask for.

    Slices may have different shapes, and every agreement is a collective of all ranks: so every rank compiles the programs of
    every shape, a handful at most, in the same order.
    """
    key = shape, scores, sinks
    found = session.exchanges.get(key)
    if found is None:
        plan, group = session.plan, _group(session)
        said = f"heads {shape.heads}:{shape.kv_heads}, head sizes {shape.d} and {shape.d_v}, {shape.dtype}, home {shape.home}"
        said += f", scale {scores.scale}, softcap {scores.softcap}, {'with' if sinks else 'no'} sinks, ulysses {group.parts}"
        agree(group.parent, plan.digest, said, "this attention call")
        first = plan.rank - group.part
        found = HeadExchange(shape, plan.layout.rows_all[first : first + group.parts].tolist(), group.part)
        for inner in dict.fromkeys(found.inner_shapes):
            plan.programs(inner, scores, sinks, group)
        session.exchanges[key] = found
    return found


def _programs(session: Session, exchange: HeadExchange, scores: Scores, sinks: bool) -> tuple[Program, Program]:
    return session.plan.programs(exchange.inner_shapes[exchange.part], scores, sinks, _group(session))


def forward_steps(
    session: Session, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, slot: int = 0
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(out, lse, kept bytes, arrived bytes, the slice's lse) in the three steps of ``steps.py``: one exchange, all of the
    attention of the slice, the other exchange."""
    shape = call_shape(session, (q.shape[1], k.shape[1]), (q.shape[2], v.shape[2]), q.dtype, sinks)
    exchange = _exchange(session, shape, scores, sinks is not None)
    executor, everyone = session.executor, _group(session).parent
    call = executor.next_call()
    arrived = yield from exchange.send_inputs(everyone, q, k, v, call, slot)
    inner = exchange.inputs(arrived)
    program, _ = _programs(session, exchange, scores, sinks is not None)
    part = None if sinks is None else sinks[exchange.mine.start : exchange.mine.stop]
    backend = session.kernels(*inner, scores)
    out, lse, kept = yield from inside(executor.forward_steps(program, backend, *inner, scores, part, slot))
    rows = yield from exchange.return_outputs(everyone, out, lse, call, slot)
    return *rows, kept, arrived, lse.reshape(-1)


def backward_steps(
    session: Session,
    dout: Tensor | None,
    dlse: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    kept: Tensor,
    arrived: Tensor,
    lse: Tensor,
    kv_heads: int,
    d: int,
    scores: Scores,
    slot: int = 0,
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of the local q, k, v and of the sinks in the three steps; ``lse`` is the slice's."""
    shape = call_shape(session, (out.shape[1], kv_heads), (d, out.shape[2]), out.dtype, sinks)
    exchange = _exchange(session, shape, scores, sinks is not None)
    executor, everyone = session.executor, _group(session).parent
    call = executor.next_call()
    # delta needs a row's out, which its owner has; the slice needs neither out nor the gradient of lse.
    dout, delta = yield from exchange.send_upstream(everyone, *upstream(dout, dlse, out), call, slot)
    inner = exchange.inputs(arrived)
    lse = lse.view(exchange.inner_rows, exchange.mine.heads)
    _, program = _programs(session, exchange, scores, sinks is not None)
    backend = session.kernels(*inner, scores)
    sums = yield from inside(executor.backward_steps(program, backend, dout, *inner, delta, lse, kept, scores, slot))
    gradients = yield from exchange.return_gradients(everyone, *sums, call, slot)
    if sinks is None:
        return *gradients, out.new_empty(0)
    dsinks, mine = torch.zeros_like(sinks), slice(exchange.mine.start, exchange.mine.stop)
    dsinks[mine] = sinks_gradient(sinks[mine], lse, delta)
    return *gradients, dsinks


@torch.library.custom_op("distattn::ulysses_attention", mutates_args=())
def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, handle: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Local rows in; out: (out, lse) of local rows, and for the backward pass kept bytes, arrived bytes and the slice's lse."""
    return run(forward_steps(HANDLES[handle], q, k, v, sinks, Scores(scale, softcap)))


@ulysses_attention.register_fake
def _(q, k, v, sinks, handle, scale, softcap):
    context = torch.library.get_ctx()
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    sums = accumulate_dtype(q.dtype)
    kept, arrived = (q.new_empty(context.new_dynamic_size(), dtype=torch.uint8) for _ in range(2))
    lse = q.new_empty(context.new_dynamic_size(), dtype=sums)
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=sums), kept, arrived, lse


@torch.library.custom_op("distattn::ulysses_attention_backward", mutates_args=())
def ulysses_attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    kept: Tensor,
    arrived: Tensor,
    lse: Tensor,
    kv_heads: int,
    d: int,
    handle: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the local q, k and v, and of the sinks (of the slice's heads and its group's rows; empty without sinks)."""
    saved = sinks, out, kept, arrived, lse
    return run(backward_steps(HANDLES[handle], dout, dlse, *saved, kv_heads, d, Scores(scale, softcap)))


@ulysses_attention_backward.register_fake
def _(dout, dlse, sinks, out, kept, arrived, lse, kv_heads, d, handle, scale, softcap):
    rows, heads, d_v = out.shape
    gradients = (out.new_empty(rows, *tail) for tail in ((heads, d), (kv_heads, d), (kv_heads, d_v)))
    return *gradients, out.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, sinks, ctx.handle, ctx.scale, ctx.softcap = inputs
    ctx.kv_heads, ctx.d = k.shape[1], q.shape[2]
    out, _, kept, arrived, lse = output
    ctx.save_for_backward(sinks, out, kept, arrived, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, *_):
    sinks, *saved = ctx.saved_tensors
    options = ctx.kv_heads, ctx.d, ctx.handle, ctx.scale, ctx.softcap
    dq, dk, dv, dsinks = ulysses_attention_backward(dout, dlse, sinks, *saved, *options)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None


ulysses_attention.register_autograd(_backward, setup_context=_setup_context)
