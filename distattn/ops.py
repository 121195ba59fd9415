"""Sharded attention as PyTorch operators: an integer handle names (plan, this rank's communication).

As custom operators they keep ``torch.compile(fullgraph=True)`` whole, are saved rather than run again by selective
checkpointing, and have the derived backward plan as their own backward operator.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distattn.kernels import Choice, choose
from distattn.kernels.contract import Backend, Scores, accumulate_dtype
from distattn.kernels.timed import Stopwatch, Timed
from distattn.parallel.exchange import HeadExchange
from distattn.parallel.executor import Executor
from distattn.parallel.program import Program
from distattn.parallel.rank_plan import RankPlan
from distattn.parallel.shape import Shape
from distattn.parallel.steps import Steps

if TYPE_CHECKING:
    from distattn.parallel.pool import Pool, Ticket
    from distattn.parallel.pool_call import Direction

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Kernels:
    """Which backend runs which kind of call, chosen once per kind and said once to the log; timed where there is a stopwatch."""

    def __init__(self, prefer: str | None = None, stopwatch: Stopwatch | None = None):
        self.prefer, self.stopwatch = prefer, stopwatch
        self.chosen: dict[str, Choice] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Backend:
        kind = f"{q.dtype} on {q.device.type}, head sizes {q.shape[2]} and {v.shape[2]}"
        chosen = self.chosen.get(kind)
        if chosen is None or chosen.backend.reject(q, k, v, scores) is not None:  # a scale or a stride may be refused later
            choice = choose(q, k, v, scores, self.prefer)
            if self.stopwatch is not None:
                choice = replace(choice, backend=Timed(choice.backend, self.stopwatch))
            self.chosen[kind] = choice
            slow = choice.backend.name == "reference" and self.prefer is None
            reasons = "".join(f"; not {r}" for r in choice.reasons)
            logger.log(
                logging.WARNING if slow else logging.INFO, "attention of %s runs on %s%s", kind, choice.backend.name, reasons
            )
        return self.chosen[kind].backend


@dataclass(frozen=True, eq=False)
class Session:
    """What a handle stands for: a plan and the executor of the rank that it was made for.

    With a head exchange ``executor`` has the communicator of the ranks that run the plan with the same heads, and ``exchanges``
    holds this rank's part in the exchanges by the calls that all ranks have agreed on.
    """

    plan: RankPlan
    executor: Executor
    kernels: Kernels
    home: torch.dtype | None
    exchanges: dict[tuple[Shape, Scores, bool], HeadExchange] = field(default_factory=dict)

    def run(self, direction: Direction, shape: Shape, scores: Scores, sinks: bool, work: Callable[[Executor, Program], T]) -> T:
        """``work`` on this rank's program of a call."""
        both = self.plan.programs(shape, scores, sinks, self.executor.communicator)
        return work(self.executor, both[direction == "backward"])


@dataclass(frozen=True, eq=False)
class PoolSession(Session):
    """A session whose calls servers take part in, which may come and go; of ``plan`` only the layout counts."""

    pool: Pool = field(kw_only=True)
    ticket: Ticket = field(kw_only=True)

    def run(self, direction: Direction, shape: Shape, scores: Scores, sinks: bool, work: Callable[[Executor, Program], T]) -> T:
        return self.pool.attend(self.ticket, direction, shape, scores, sinks, work)


class Handles:
    """Sessions by number. A session stays as long as its plan is held; the last ``capacity`` that were used stay in any case, so
    that what a backward pass needs outlives its caller."""

    def __init__(self, capacity: int = 64):
        self.capacity = capacity
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()
        self._recent: OrderedDict[int, Session] = OrderedDict()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # ranks may be threads

    def add(self, session: Session) -> int:
        number = next(self._numbers)
        self._sessions[number] = session
        self._use(number, session)
        return number

    def __getitem__(self, number: int) -> Session:
        session = self._sessions.get(number)
        if session is None:
            raise RuntimeError(
                f"Attention plan {number} is gone: nobody holds it, and {self.capacity} plans were used after it. "
                "Run the backward pass sooner, or hold the plan until then."
            )
        self._use(number, session)
        return session

    def _use(self, number: int, session: Session) -> None:
        with self._lock:
            self._recent[number] = session
            self._recent.move_to_end(number)
            while len(self._recent) > self.capacity:
                self._recent.popitem(last=False)


HANDLES = Handles()  # operators see numbers only, so this one table is global


def call_shape(
    session: Session, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, sinks: Tensor | None
) -> Shape:
    """The shape of a call with these (query, key) heads and head sizes (of keys, of values)."""
    # An owner with sinks has more to add to what others have finished: it must come unrounded.
    finished = None if sinks is None else accumulate_dtype(dtype)
    return Shape(*heads, *sizes, dtype, session.home, finished)


def _shape(session: Session, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Shape:
    return call_shape(session, (q.shape[1], k.shape[1]), (q.shape[2], v.shape[2]), q.dtype, sinks)


def _programs(session: Session, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> tuple[Program, Program]:
    return session.plan.programs(_shape(session, q, k, v, sinks), scores, sinks is not None, session.executor.communicator)


def _in_dtypes(
    sums: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes, and that of the sinks (empty without)."""
    dsinks = q.new_empty(0) if sinks is None else sinks_gradient(sinks, lse, delta)
    dq, dk, dv = (x.to(of.dtype) for x, of in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv, dsinks


def forward_steps(
    session: Session, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, slot: int = 0
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """(out, lse, kept bytes), in the three steps of ``steps.py``."""
    program, _ = _programs(session, q, k, v, sinks, scores)
    return session.executor.forward_steps(program, session.kernels(q, k, v, scores), q, k, v, scores, sinks, slot)


def backward_steps(
    session: Session,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    scores: Scores,
    slot: int = 0,
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of q, k, v and of the sinks, in the three steps."""
    _, program = _programs(session, q, k, v, sinks, scores)
    dout, delta = upstream(dout, dlse, out)
    backend = session.kernels(q, k, v, scores)
    sums = yield from session.executor.backward_steps(program, backend, dout, q, k, v, delta, lse, kept, scores, slot)
    return _in_dtypes(sums, q, k, v, sinks, lse, delta)


@torch.library.custom_op("distattn::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, handle: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Local rows in, (out, lse, kept bytes) of local rows out. See :class:`distattn.ContextParallel`."""
    session = HANDLES[handle]
    scores = Scores(scale, softcap)
    kernel = session.kernels(q, k, v, scores)

    def forward(executor: Executor, program: Program) -> tuple[Tensor, Tensor, Tensor]:
        return executor.forward(program, kernel, q, k, v, scores, sinks)

    return session.run("forward", _shape(session, q, k, v, sinks), scores, sinks is not None, forward)


@attention.register_fake
def _(q, k, v, sinks, handle, scale, softcap):
    kept = torch.library.get_ctx().new_dynamic_size()
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=accumulate_dtype(q.dtype)), q.new_empty(kept, dtype=torch.uint8)


def upstream(dout: Tensor | None, dlse: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of out as kernels take it, and delta: all that a backward pass needs to know of out and of its gradients."""
    dtype = accumulate_dtype(out.dtype)
    dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = torch.linalg.vecdot(dout.to(dtype), out.to(dtype))
    return dout, delta if dlse is None else delta - dlse


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]. A sink is a key of score ``sink`` whose value is 0: ds = p * (0 - delta)."""
    p = torch.exp(sinks.to(lse.dtype) - lse.masked_fill(lse == -torch.inf, torch.inf))
    return (-p * delta).sum(0).to(sinks.dtype)


@torch.library.custom_op("distattn::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    handle: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks (of this rank's rows; empty without sinks)."""
    session = HANDLES[handle]
    scores = Scores(scale, softcap)
    kernel = session.kernels(q, k, v, scores)
    dout, delta = upstream(dout, dlse, out)

    def backward(executor: Executor, program: Program) -> tuple[Tensor, Tensor, Tensor]:
        return executor.backward(program, kernel, dout, q, k, v, delta, lse, kept, scores)

    sums = session.run("backward", _shape(session, q, k, v, sinks), scores, sinks is not None, backward)
    return _in_dtypes(sums, q, k, v, sinks, lse, delta)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, sinks, out, lse, kept, handle, scale, softcap):
    gradients = (x.new_empty(x.shape) for x in (q, k, v))
    return *gradients, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sinks, ctx.handle, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _):
    q, k, v, sinks, out, lse, kept = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_backward(dout, dlse, q, k, v, sinks, out, lse, kept, ctx.handle, ctx.scale, ctx.softcap)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


SAVED = {
    f"distattn.{name}.default"
    for name in ("attention", "ulysses_attention", "attention_begin", "attention_compute", "attention_collect")
}


def save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> torch.utils.checkpoint.CheckpointPolicy:
    """A selective checkpointing policy under which attention and its communication run once; all else is recomputed.

    Use: ``checkpoint(f, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_attention))``.
    """
    policy = torch.utils.checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if str(op) in SAVED else policy.PREFER_RECOMPUTE
