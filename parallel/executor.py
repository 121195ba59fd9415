"""The executor: runs any compiled plan, forward and backward, on any communicator and any kernel.

At every boundary it awaits what the next stage needs, posts what may travel while that stage computes, and launches the
stage's kernels. It knows nothing of schedules; tests withhold messages to show that it never waits early.

A pass can be taken in three steps (``steps.py``), with other work between them: several passes are then in flight, each in a
slot with a workspace and, where the communicator has enough, lanes of its own. Ranks take the steps of all passes in one order,
so that what two of them send each other is posted in one order on both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distattn.kernels.contract import Backend, Scores, State, empty_state
from distattn.kernels.merge import merge_into
from distattn.parallel.comm import Awaited, Communicator, Pending, lane_of
from distattn.parallel.plan import What
from distattn.parallel.program import Batch, Buffer, Item, Launch, Message, Place, Program
from distattn.parallel.steps import InProgress, Steps, gives_turn, run


@dataclass(eq=False)
class _Bound:
    """A program's views of one workspace (and of the kept memory of one call)."""

    workspace: Tensor
    tensors: dict[int, tuple[Tensor, ...]]  # by id of a buffer or an item
    bytes_of: dict[int, Tensor]  # by id of a message

    def forget(self, program: Program) -> None:
        """Drops the views of the kept memory, which belongs to one call and its backward."""
        for buffer in program.buffers.values():
            if buffer.kept:
                self.tensors.pop(id(buffer), None)
        for message in program.messages:
            if message.direct is not None and message.direct.kept:
                self.bytes_of.pop(id(message), None)
                for item in message.items:
                    self.tensors.pop(id(item), None)


class Executor:
    """Runs the programs of one rank. Owns a workspace for every slot that is used, which grows to what its largest program needs
    and is never smaller: passes one at a time need one, n passes in flight together n."""

    def __init__(self, communicator: Communicator):
        self.communicator = communicator
        self.calls = 0
        self.in_progress = InProgress()
        self._workspace: dict[tuple[int, torch.device], Tensor] = {}
        self._bound: defaultdict[int, WeakKeyDictionary[Program, _Bound]] = defaultdict(WeakKeyDictionary)

    def next_call(self) -> int:
        """The number of what begins now, for error messages; the same on every rank."""
        self.calls += 1
        return self.calls

    def forward(
        self, program: Program, backend: Backend, q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All of :meth:`forward_steps` at once."""
        return run(self.forward_steps(program, backend, q, k, v, scores, sinks))

    def forward_steps(
        self,
        program: Program,
        backend: Backend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        sinks: Tensor | None = None,
        slot: int = 0,
    ) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        """Attention of this rank's queries over the whole sequence.

        Args:
            q, k, v: this rank's rows, [T, H_q, D], [T, H_kv, D], [T, H_kv, D_v].
            sinks: [H_q], entered once as the initial state.
            slot: whose workspace and lanes; passes that are in flight together have different ones.

        Returns:
            out [T, H_q, D_v] in q's dtype, lse [T, H_q] in the accumulate dtype, and the kept bytes for :meth:`backward`.
        """
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        kept = torch.empty(program.kept_bytes, dtype=torch.uint8, device=q.device)
        state = None if sinks is None else empty_state(q, v.shape[-1], sinks)
        left = program.local_launches
        written = False

        def compute(launch: Launch, tensors: Callable[[What, Place], Sequence[Tensor]]) -> None:
            nonlocal state, left, written
            (queries,), (keys, values) = tensors(What.Q, launch.q), tensors(What.KV, launch.kv)
            if launch.q.owner != program.rank:
                backend.forward(queries, keys, values, launch.bands, scores, State(*tensors(What.OUT, launch.q)))
                return
            left -= 1
            written = left == 0 and not program.partials_arrive
            state = backend.forward(queries, keys, values, launch.bands, scores, state, out if written else None)

        def own(what: What) -> Sequence[Tensor]:
            nonlocal state
            if what != What.OUT:
                return {What.Q: (q,), What.KV: (k, v)}[what]
            if state is None:
                state = empty_state(q, v.shape[-1])
            return state

        yield from self._run(program, q.device, kept, own, compute, slot)
        o, lse = own(What.OUT)
        if not written:
            out.copy_(o)
        return out, lse, kept

    def backward(
        self,
        program: Program,
        backend: Backend,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        delta: Tensor,
        lse: Tensor,
        kept: Tensor,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All of :meth:`backward_steps` at once."""
        return run(self.backward_steps(program, backend, dout, q, k, v, delta, lse, kept, scores))

    def backward_steps(
        self,
        program: Program,
        backend: Backend,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        delta: Tensor,
        lse: Tensor,
        kept: Tensor,
        scores: Scores,
        slot: int = 0,
    ) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        """Gradients of this rank's q, k and v, in the accumulate dtype.

        Args:
            delta: [T, H_q] in the accumulate dtype, ``rowsum(dout * out)`` minus the gradient into lse.
            kept: what :meth:`forward` returned.
        """
        dtype = program.shape.accumulate
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        mine = {What.Q: (q,), What.KV: (k, v), What.DOUT: (dout, lse, delta), What.DQ: (dq,), What.DKV: (dk, dv)}

        def compute(launch: Launch, tensors: Callable[[What, Place], Sequence[Tensor]]) -> None:
            (queries,), (keys, values) = tensors(What.Q, launch.q), tensors(What.KV, launch.kv)
            upstream, lse_, delta_ = tensors(What.DOUT, launch.q)
            sums = (*tensors(What.DQ, launch.q), *tensors(What.DKV, launch.kv))
            backend.backward(upstream, queries, keys, values, delta_, lse_, launch.bands, scores, *sums)

        yield from self._run(program, q.device, kept, mine.__getitem__, compute, slot)
        return dq, dk, dv

    def _run(
        self,
        program: Program,
        device: torch.device,
        kept: Tensor,
        own: Callable[[What], Sequence[Tensor]],
        compute: Callable[[Launch, Callable[[What, Place], Sequence[Tensor]]], None],
        slot: int,
    ) -> Steps[None]:
        """One pass. An error is published, so that the peers that wait for this rank name its cause."""
        call = self.next_call()
        try:
            bound = self._bind(program, device, kept, slot)
            yield from self._pass(program, bound, own, compute, call, slot)
            bound.forget(program)
        except GeneratorExit:  # dropped half-way, by whoever failed between the steps
            raise
        except BaseException as error:
            self.communicator.fail(error)
            raise

    def _pass(
        self,
        program: Program,
        bound: _Bound,
        own: Callable[[What], Sequence[Tensor]],
        compute: Callable[[Launch, Callable[[What, Place], Sequence[Tensor]]], None],
        call: int,
        slot: int,
    ) -> Steps[None]:
        """Boundary by boundary: await, unpack, pack, post, launch. Yields as ``steps.py`` says."""
        pending: dict[int, Pending] = {}

        def tensors(what: What, place: Place) -> Sequence[Tensor]:
            return own(what) if place.owner == program.rank else bound.tensors[id(program.buffers[what, place])]

        for boundary in range(program.stages + 1):
            if boundary == program.stages > 0 or gives_turn(boundary, program.stages):
                yield boundary == program.stages
            self.communicator.report(Awaited(program.plan.direction, boundary, program.stages, call=call))
            self._zero(program.zeros[2 * boundary], bound)
            for batch in program.waits[boundary]:
                pending.pop(id(batch)).wait()
                for message in batch.receives:
                    self._unpack(message, bound, tensors)
            self._scrub(program, 2 * boundary, bound)
            self._zero(program.zeros[2 * boundary + 1], bound)
            for batch in program.posts[boundary]:
                pending[id(batch)] = self._post(batch, bound, tensors, call, slot)
            if boundary == 0:
                yield False
            for launch in program.launches[boundary] if boundary < program.stages else ():
                compute(launch, tensors)
            self._scrub(program, 2 * boundary + 1, bound)
        if program.stages == 0:
            yield True

    def _post(
        self, batch: Batch, bound: _Bound, tensors: Callable[[What, Place], Sequence[Tensor]], call: int, slot: int
    ) -> Pending:
        for message in batch.sends:
            if message.direct is None:
                for item in message.items:
                    for source, target in zip(tensors(item.what, item.place), bound.tensors[id(item)], strict=True):
                        _take_rows(item, source, target)
        sends, receives = ([(m.peer, bound.bytes_of[id(m)]) for m in side] for side in (batch.sends, batch.receives))
        assert batch.awaited is not None
        lane = lane_of(self.communicator.lanes, batch.lane, slot)
        return self.communicator.post(lane, sends, receives, batch.awaited._replace(call=call))

    def _unpack(self, message: Message, bound: _Bound, tensors: Callable[[What, Place], Sequence[Tensor]]) -> None:
        """Inputs are put where they belong, sums are added, partial results merged; in plan order."""
        if message.direct is not None:
            return
        for item in message.items:
            mine, arrived = tensors(item.what, item.place), bound.tensors[id(item)]
            if item.what == What.OUT:
                _merge_rows(item, State(*mine), State(arrived[0].to(mine[0].dtype), arrived[1]))
                continue
            for target, source in zip(mine, arrived, strict=True):
                _put_rows(item, target, source, add=item.what.is_sum)

    def _zero(self, buffers: list[Buffer], bound: _Bound) -> None:
        for buffer in buffers:
            tensors = bound.tensors[id(buffer)]
            for tensor in tensors:
                tensor.zero_()
            if buffer.what == What.OUT:
                tensors[1].fill_(-torch.inf)

    def _scrub(self, program: Program, step: int, bound: _Bound) -> None:
        for stretch in program.deaths[step]:
            self.communicator.scrub(bound.workspace[stretch.place : stretch.place + stretch.size])

    def _bind(self, program: Program, device: torch.device, kept: Tensor, slot: int) -> _Bound:
        """Views of the slot's workspace, made once per program and workspace; views of the kept memory, made anew."""
        workspace = self._workspace.get((slot, device))
        if workspace is None or workspace.numel() < program.workspace_bytes:
            workspace = torch.zeros(program.workspace_bytes, dtype=torch.uint8, device=device)
            self._workspace[slot, device] = workspace
            self._bound[slot].clear()
        bound = self._bound[slot].get(program)
        if bound is None or bound.workspace is not workspace:
            bound = self._bound[slot][program] = _Bound(workspace, {}, {})
            self._bind_buffers(bound, (b for b in program.buffers.values() if not b.kept), workspace)
            self._bind_messages(bound, program, workspace, kept_ones=False)
        self._bind_buffers(bound, (b for b in program.buffers.values() if b.kept), kept)
        self._bind_messages(bound, program, kept, kept_ones=True)
        self._restore(program, bound, kept)
        return bound

    @staticmethod
    def _bind_buffers(bound: _Bound, buffers: Iterable[Buffer], memory: Tensor) -> None:
        for buffer in buffers:
            stretch = memory[buffer.stretch.place : buffer.stretch.place + buffer.stretch.size]
            bound.tensors[id(buffer)] = tuple(part.view(stretch) for part in buffer.parts)

    @staticmethod
    def _bind_messages(bound: _Bound, program: Program, memory: Tensor, kept_ones: bool) -> None:
        for message in program.messages:
            if kept_ones != (message.direct is not None and message.direct.kept):
                continue
            stretch = message.direct.stretch if message.direct is not None else message.stretch
            assert stretch is not None
            stretch_bytes = memory[stretch.place : stretch.place + message.size]
            bound.bytes_of[id(message)] = stretch_bytes
            for item in message.items:
                bound.tensors[id(item)] = tuple(part.view(stretch_bytes) for part in item.parts)

    @staticmethod
    def _restore(program: Program, bound: _Bound, kept: Tensor) -> None:
        """Kept rows whose place differs in this pass are copied there."""
        copies = [(old, new) for old, new in program.restored if old is not new]
        for buffer in {id(new): new for _, new in copies}.values():
            for target in bound.tensors[id(buffer)]:
                target.zero_()  # rows that are still to come may be loaded with their tile
        for old, new in copies:
            memory = kept[old.stretch.place : old.stretch.place + old.stretch.size]
            for source, target in zip((part.view(memory) for part in old.parts), bound.tensors[id(new)], strict=True):
                for start, stop in old.packing.common(new.packing):
                    a, b = old.packing.row(start, stop), new.packing.row(start, stop)
                    target[b : b + stop - start].copy_(source[a : a + stop - start])


def _take_rows(item: Item, source: Tensor, target: Tensor) -> None:
    if len(item.runs) == 1:
        target.copy_(source[slice(*item.runs[0])])
    elif source.dtype == target.dtype:
        torch.index_select(source, 0, item.index(source.device), out=target)
    else:
        target.copy_(source.index_select(0, item.index(source.device)))


def _put_rows(item: Item, target: Tensor, source: Tensor, add: bool) -> None:
    if len(item.runs) == 1:
        rows = target[slice(*item.runs[0])]
        rows.add_(source) if add else rows.copy_(source)
    elif add:
        target.index_add_(0, item.index(target.device), source.to(target.dtype))
    else:
        target.index_copy_(0, item.index(target.device), source)


def _merge_rows(item: Item, state: State, arrived: State) -> None:
    done = 0
    for start, stop in item.runs:
        rows = slice(done, done + stop - start)
        merge_into(state, State(arrived.o[rows], arrived.lse[rows]), slice(start, stop))
        done += stop - start
