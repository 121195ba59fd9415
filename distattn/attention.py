"""ContextParallel: attention over one sequence that is sharded over the ranks of a group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import distattn
from distattn.attention_steps import AttentionInProgress
from distattn.head_exchange import ulysses_attention
from distattn.kernels import RANKING
from distattn.kernels.timed import Stopwatch
from distattn.ops import HANDLES, Kernels, PoolSession, Session
from distattn.ops import attention as attention_op
from distattn.parallel.auto import Auto
from distattn.parallel.comm import LANES, Communicator, SoloCommunicator
from distattn.parallel.comm_group import GroupView
from distattn.parallel.executor import Executor
from distattn.parallel.head_split import too_few_heads
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.pool_call import PlanInputs
from distattn.parallel.rank_plan import RankPlan, Recipe
from distattn.parallel.schedules import POOLED, checked_strategy
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import Keep
from distattn.sharding import Batch, LocalRows, Shard, Unshard, local_batch

if TYPE_CHECKING:
    from distattn.parallel.pool import Pool

Format = Literal["thd", "bshd", "sbhd"]
FORMATS = {"thd": "[T, H, D]", "bshd": "[B, S, H, D]", "sbhd": "[S, B, H, D]"}

UNSUPPORTED = {
    "dropout_p": "attention dropout cannot be reproduced across schedules; apply dropout outside of attention",
    "dropout": "attention dropout cannot be reproduced across schedules; apply dropout outside of attention",
    "attn_mask": "dense masks do not scale; make a mask of bands (distattn.causal, documents, sliding_window, union, ...)",
    "bias": "additive biases are not supported",
    "alibi_slopes": "ALiBi is not supported",
    "is_causal": "the mask is the plan's; make it with cp.plan(distattn.causal(n))",
    "causal": "the mask is the plan's; make it with cp.plan(distattn.causal(n))",
    "window_size": "the window is the plan's; make it with cp.plan(distattn.sliding_window(n, window))",
    "cu_seqlens": "documents are the plan's; make it with cp.plan(distattn.documents(lengths))",
    "enable_gqa": "fewer key heads than query heads need no switch; pass them as they are",
}


@dataclass(eq=False)
class AttentionPlan:
    """What :meth:`ContextParallel.plan` returns: hand it to the other methods. ``handle`` names it to the operators."""

    rank_plan: RankPlan
    local: LocalRows
    session: Session  # held, so that its handle stays valid as long as this plan does
    handle: int
    rows: int  # of this rank
    ulysses: int  # ranks that exchange heads for tokens around the plan

    @property
    def mask(self) -> Mask:
        return self.rank_plan.mask

    @property
    def layout(self) -> Layout:
        return self.rank_plan.layout


class ContextParallel:
    """Exact attention over a sequence sharded over the ranks of a group.

    Args:
        group: a 1-D DeviceMesh (``mesh["cp"]``), a process group, or None for a world of one that needs no process group.
        schedule: a name ("zigzag", "striped", "ring", ...), a :class:`distattn.Strategy` with its options, or a
            :class:`distattn.Auto`, which picks the strategy with the least simulated time for the first mask of each kind.
        backend: "triton", "aten" or "reference" to force a kernel; None takes the best that can take the call.
        keep: what received keys stay on a rank until the backward pass: "last", "all" or "none"; None is the strategy's.
        home: dtype in which gradients and partial results travel; None is float32, torch.bfloat16 halves the bytes.
        pad_to_equal: give every rank the same number of rows; padding rows are hidden by the mask.
        timeout: seconds after which a peer that does not answer is an error.
        cached_plans: plans that stay ready, by mask.
        slots: calls of :meth:`begin_attention` that have connections of their own, so that neither waits for what another sends;
            more calls in progress than that share them.
        communicator: a ready connection instead of ``group`` (ranks as threads, say), with the connections that it has.
        timed: count the seconds and the work of this rank's kernels, in ``stopwatch``.
        servers: attention servers (``distattn-serve-attention``) to wait for; they may join, leave and die at any time later.
            Needs a schedule that takes servers; they keep nothing, so ``keep`` is "none".
        pool_store: ``host:port`` at which rank 0 hosts the store that servers join through, or "auto".
        announce: told the address of that store, on rank 0.

    Raises:
        ValueError: for an unknown schedule, backend or option, or a mesh of more than one dimension.
        ValueError: for servers that do not come within the timeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        schedule: str | Strategy | Auto = "zigzag",
        *,
        backend: str | None = None,
        keep: Keep | None = None,
        home: torch.dtype | None = None,
        pad_to_equal: bool = False,
        timeout: float = 600.0,
        cached_plans: int = 32,
        slots: int = 1,
        communicator: Communicator | None = None,
        timed: bool = False,
        servers: int = 0,
        pool_store: str | None = None,
        announce: Callable[[str], None] | None = None,
    ):
        if backend is not None and backend not in RANKING:
            raise ValueError(
                f"There is no backend {backend!r}. Use one of {', '.join(RANKING)}, or None for the fastest that takes the call."
            )
        if home is not None and not (isinstance(home, torch.dtype) and home.is_floating_point):
            raise ValueError(f"home must be a floating-point dtype, such as torch.bfloat16, or None for float32. Found {home!r}.")
        if cached_plans < 1:
            raise ValueError(f"cached_plans must be 1 or more: the plan in use is one of them. Found {cached_plans}.")
        if slots < 1:
            raise ValueError(f"slots must be 1 or more: a call of attention needs one. Found {slots}.")
        if group is not None and communicator is not None:
            raise ValueError("A group and a communicator were given. Pass one of them: a communicator brings its own ranks.")
        if schedule == "auto":
            raise ValueError(
                "schedule='auto' prices strategies for heads on machines: pass schedule=distattn.Auto(shape, cluster), "
                "with a distattn.Shape and a distattn.load_cluster(name), or name a schedule."
            )
        strategy = Strategy(schedule) if isinstance(schedule, str) else schedule
        if keep is not None:
            strategy = (
                Auto(strategy.shape, strategy.cluster, strategy.memory_gb, keep)
                if isinstance(strategy, Auto)
                else replace(strategy, keep=keep)
            )
        if not isinstance(strategy, Auto):
            checked_strategy(strategy, communicator.world if communicator else _size(group))
        self.communicator = communicator or _communicator(group, timeout, slots * LANES)
        self.pool: Pool | None = None
        if servers or pool_store is not None:
            strategy = _with_pool(strategy, servers)
            self.pool = _open_pool(self.communicator, servers, pool_store or "auto", announce)
        self.strategy, self.home, self.pad_to_equal = strategy, home, pad_to_equal
        self.cached_plans = cached_plans
        self._executors: dict[int, Executor] = {}  # by the degree of the head exchange around their plans
        self._plans: OrderedDict[tuple[bytes, Strategy], AttentionPlan] = OrderedDict()
        self.stopwatch = Stopwatch() if timed else None
        self._kernels = Kernels(backend, self.stopwatch)

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def world(self) -> int:
        return self.communicator.world

    def plan(self, mask: Mask) -> AttentionPlan:
        """The plan for a mask, cached. All ranks must ask for the same masks in the same order.

        Raises:
            PlanMismatch: naming the ranks that came with something else.
        """
        if not isinstance(mask, Mask):
            raise ValueError(f"plan() needs a mask, such as distattn.causal(n) or distattn.documents(lengths). Found {mask!r}.")
        recipe = self.recipe(mask)
        return self._cached(mask, recipe.strategy) or self.adopt(recipe.prepare(mask))

    def recipe(self, mask: Mask) -> Recipe:
        """What makes this rank's plans for such masks without asking other ranks: plain data, for another process or thread.

        ``cp.adopt(recipe.prepare(mask, calls))`` is ``cp.plan(mask)``, with all the planning in ``prepare``.
        """
        strategy = self.strategy.choose(mask, self.world) if isinstance(self.strategy, Auto) else self.strategy
        return Recipe(strategy, self.world, self.rank, self.pad_to_equal, distattn.__version__)

    def adopt(self, prepared: RankPlan) -> AttentionPlan:
        """The plan that a recipe of this object has prepared, cached. All ranks must come with the same plans in the same order.

        Raises:
            ValueError: it was prepared for another rank, world or version.
            PlanMismatch: naming the ranks that came with something else.
        """
        recipe, mine = prepared.recipe, (self.world, self.rank, self.pad_to_equal, distattn.__version__)
        if (recipe.world, recipe.rank, recipe.pad_to_equal, recipe.version) != mine:
            raise ValueError(
                f"Rank {self.rank} of {self.world} (pad_to_equal={self.pad_to_equal}, version {distattn.__version__}) was given "
                f"a plan prepared by {recipe}. Prepare it with this rank's own cp.recipe(mask)."
            )
        found = self._cached(prepared.mask, recipe.strategy)
        if found is None:
            prepared.agree(self.communicator)
            ulysses = prepared.ulysses
            session = Session(prepared, self._executor(ulysses), self._kernels, self.home)
            if self.pool is not None:
                inputs = PlanInputs(prepared.mask, recipe.strategy, self.pad_to_equal, distattn.__version__)
                ticket = self.pool.ticket(inputs)
                session = PoolSession(prepared, session.executor, self._kernels, self.home, pool=self.pool, ticket=ticket)
            local = LocalRows(prepared.layout, prepared.mask, self.rank)
            found = AttentionPlan(prepared, local, session, HANDLES.add(session), prepared.rows, ulysses)
            self._plans[prepared.mask.digest, recipe.strategy] = found
            while len(self._plans) > self.cached_plans:
                self._plans.popitem(last=False)
        return found

    def _cached(self, mask: Mask, strategy: Strategy) -> AttentionPlan | None:
        found = self._plans.get((mask.digest, strategy))
        if found is not None:
            self._plans.move_to_end((mask.digest, strategy))
        return found

    def _executor(self, ulysses: int) -> Executor:
        if ulysses not in self._executors:
            group = self.communicator if ulysses == 1 else GroupView(self.communicator, ulysses)
            self._executors[ulysses] = Executor(group)
        return self._executors[ulysses]

    def close(self) -> None:
        """Releases the groups and the watcher of this rank, and its servers. Plans of this object cannot attend any more."""
        if self.pool is not None:
            self.pool.close()
        self.communicator.close()

    def shard_batch(self, tokens: Tensor, plan: AttentionPlan) -> Batch:
        """Local rows of ``tokens`` [N] or [B, N] (the same on every rank), their labels and positions.

        Labels are shifted before sharding; the last token of a document predicts nothing. Positions restart per document.
        """
        return local_batch(tokens, plan.local)

    def shard(self, full: Tensor, plan: AttentionPlan, dim: int = 0) -> Tensor:
        """This rank's rows of a tensor that every rank holds alike. The backward gathers: its gradient is whole everywhere."""
        return Shard.apply(full, plan.local, self.communicator, dim)

    def unshard(self, local: Tensor, plan: AttentionPlan, dim: int = 0) -> Tensor:
        """The whole tensor from the rows of all ranks. The backward takes this rank's rows of the gradient, without a sum."""
        return Unshard.apply(local, plan.local, self.communicator, dim)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        format: Format | None = None,
        **unsupported: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the local queries over the whole sequence.

        Args:
            q, k, v: local rows: [T, H_q, D], [T, H_kv, D], [T, H_kv, D_v] with H_q a multiple of H_kv; or four dimensions,
                [B, S, H, D] (``format="bshd"``, the default for four) or [S, B, H, D] (``"sbhd"``), one mask for all of B.
            scale: of the scores, default ``D ** -0.5``.
            softcap: ``s = softcap * tanh(s / softcap)``; 0 is none.
            sinks: [H_q] learnable sink logits; their gradient is this rank's part (sum it over the group like any parameter's).
            return_lse: also return the float32 log of the softmax denominators, [T, H_q] (or [B, S, H], [S, B, H]).

        Returns:
            out like q with D_v for D, in q's dtype.
        """
        call = self._checked_call(q, k, v, plan, scale, softcap, sinks, return_lse, format, unsupported)
        operator = ulysses_attention if plan.ulysses > 1 else attention_op
        out, lse, *_ = operator(*call.inputs, plan.handle, call.scale, call.softcap)
        return call.finish(out, lse)

    def begin_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        slot: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        format: Format | None = None,
        **unsupported: object,
    ) -> AttentionInProgress:
        """:meth:`attention` in three steps, for other work to stand between them: this posts what travels first, ``compute``
        of what it returns computes, and ``collect`` returns what :meth:`attention` returns. The backward pass takes the steps in
        reverse. All ranks take the same steps of the same calls in the same order.

        Args:
            slot: calls that are in progress together have different ones. Each has a workspace of its own, so that the memory for
                what arrives is that of :meth:`attention` times the slots used; pass ``slots`` to the constructor for connections.

        Raises:
            RuntimeError: another call is in progress in this slot.
        """
        if slot < 0:
            raise ValueError(f"A slot is a number from 0 on. Found slot={slot}.")
        call = self._checked_call(q, k, v, plan, scale, softcap, sinks, return_lse, format, unsupported)
        return AttentionInProgress(call.inputs, plan.handle, slot, call.scale, call.softcap, call.finish)

    def _checked_call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scale: float | None,
        softcap: float,
        sinks: Tensor | None,
        return_lse: bool,
        format: Format | None,
        unsupported: dict[str, object],
    ) -> _Call:
        """What the operators take, of what the user gave."""
        for name, value in unsupported.items():
            if name not in UNSUPPORTED:
                raise TypeError(f"attention() got an unexpected keyword argument {name!r}")
            if isinstance(value, Tensor) or value not in (None, False, 0.0):
                said = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"attention was asked for {name}={said}, which is not supported: {UNSUPPORTED[name]}.")
        if not isinstance(plan, AttentionPlan) or plan.session.executor is not self._executors.get(plan.ulysses):
            raise ValueError(f"attention() needs a plan that this ContextParallel made with plan(mask). Found {plan!r}.")
        format = format or ("thd" if q.dim() == 3 else "bshd")
        _check(q, k, v, sinks, softcap, format)
        batch = 1 if format == "thd" else q.shape[0] if format == "bshd" else q.shape[1]
        found = _found(q, k, v)
        q, k, v = (_fold(x, format) for x in (q, k, v))
        if q.shape[0] != plan.rows or k.shape[0] != plan.rows:
            raise ValueError(
                f"Rank {self.rank} holds {plan.rows} rows of this plan ({plan.mask!r} on {plan.layout!r}). {found}. "
                "Pass local rows (cp.shard), of q, k and v alike; with four dimensions name the format, 'bshd' or 'sbhd'."
            )
        if sinks is not None:
            sinks = sinks.repeat(batch) if batch > 1 else sinks
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if plan.ulysses > q.shape[1]:
            raise ValueError(f"{too_few_heads(q.shape[1], plan.ulysses)} {found}.")

        def finish(out: Tensor, lse: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            out, lse = _unfold(out, format, batch), _unfold(lse, format, batch)
            return (out, lse) if return_lse else out

        return _Call((q, k, v, sinks), float(scale), float(softcap), finish)


class _Call(NamedTuple):
    """Inputs as the operators take them, and the way back to what the user asked for."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    scale: float
    softcap: float
    finish: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]


def _size(group: dist.ProcessGroup | DeviceMesh | None) -> int:
    if group is None:
        return 1
    if not isinstance(group, (DeviceMesh, dist.ProcessGroup)):
        raise ValueError(
            f"A group is a 1-D DeviceMesh or a process group of torch.distributed that this rank is in. Found {group!r}. "
            "Pass mesh['cp'], say, or None for a world of one."
        )
    return group.size()


def _communicator(group: dist.ProcessGroup | DeviceMesh | None, timeout: float, lanes: int) -> Communicator:
    if group is None:
        return SoloCommunicator(lanes, timeout)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"Need a mesh of one dimension, such as mesh['cp']. Found {group}.")
        group = group.get_group()
    from distattn.parallel.comm_process import ProcessCommunicator

    return ProcessCommunicator(group, lanes, timeout)


def _with_pool(strategy: Strategy | Auto, servers: int) -> Strategy:
    """The strategy of a pool's trainers, before it is known how many servers there are."""
    if isinstance(strategy, Auto) or strategy.schedule not in POOLED or strategy.ulysses > 1:
        raise ValueError(
            f"A pool of {servers} servers was asked for with schedule {strategy}, in which only ranks with tokens compute. "
            f"Use schedule {' or '.join(map(repr, POOLED))}, without ulysses, or no servers."
        )
    if strategy.servers:
        raise ValueError(
            f"Strategy(servers={strategy.servers}) means ranks of the group itself, and servers={servers} processes that join "
            "it. Use one of them."
        )
    return replace(strategy, keep="none")


def _open_pool(communicator: Communicator, servers: int, store: str, announce: Callable[[str], None] | None) -> Pool:
    from distattn.parallel.pool import Pool

    return Pool(communicator, servers, store, distattn.__version__, announce=announce)


def _fold(x: Tensor, format: str) -> Tensor:
    """[T, H, D] as it is; a batch becomes heads: [S, B * H, D], query head b * H_q + h still maps to its own key head."""
    if format == "bshd":
        x = x.transpose(0, 1)
    x = x if format == "thd" else x.flatten(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _unfold(x: Tensor, format: str, batch: int) -> Tensor:
    if format == "thd":
        return x
    x = x.unflatten(1, (batch, x.shape[1] // batch))
    return x.transpose(0, 1) if format == "bshd" else x


def _found(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"Found q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, softcap: float, format: str) -> None:
    """All that one rank can say of a call without its plan."""
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. Formats are {_formats()}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != len(format):
            raise ValueError(
                f"format {format!r} needs {name} with {len(format)} dimensions, found {list(x.shape)}. Formats are {_formats()}."
            )
    h_q, h_kv = q.shape[-2], k.shape[-2]
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"k and v must have the same rows and heads, q and k the same head size. {_found(q, k, v)}. "
            "Only the head size of v, which is that of the output, is free."
        )
    if "b" in format and q.shape[format.index("b")] != k.shape[format.index("b")]:
        raise ValueError(
            f"q, k and v must have one batch size. {_found(q, k, v)}, format {format!r}. "
            "Repeat what belongs to several rows of the batch, or name the other format."
        )
    if h_kv == 0 or h_q % h_kv:
        fits = sorted({n for n in range(1, h_q + 1) if h_q % n == 0}, key=lambda n: abs(n - h_kv))[:2]
        raise ValueError(
            f"{h_q} query heads cannot share {h_kv} key heads: query heads must be a multiple of key heads. "
            f"{_found(q, k, v)}. Use {' or '.join(map(str, sorted(fits)))} key heads, or repeat them yourself."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must have one floating-point dtype. Found {q.dtype}, {k.dtype}, {v.dtype}. Convert them with .to(dtype)."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device. Found {q.device}, {k.device}, {v.device}. Move them with .to(device)."
        )
    if q.device.type == "meta":
        raise ValueError("q, k and v are on the meta device, which has no data to attend with. Move them to a real device first.")
    if sinks is not None and (sinks.dim() != 1 or sinks.shape[0] != h_q or sinks.device != q.device):
        raise ValueError(f"sinks must be [{h_q}] on {q.device}, one per query head. Found {list(sinks.shape)} on {sinks.device}.")
    if h_q == 0 or q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q, k and v need at least one head and one channel. {_found(q, k, v)}.")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be 0 (none) or positive. Found {softcap}.")


def _formats() -> str:
    return ", ".join(f"{name!r} {text}" for name, text in FORMATS.items())
