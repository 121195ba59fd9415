"""The head exchange: u neighbouring ranks trade their tokens for heads around any plan, and back.

Before attention every rank of the group gets all rows of the group with its slice of the heads; afterwards every rank gets its
own rows back with all heads. One packed message a peer and exchange, all in one batch on a lane of their own; the backward pass
trades the other way round. What arrives is used where it lands: a message is a table of bytes, a row of the table a row of the
sequence, and each tensor in it a view.

An exchange is in two steps: its generator yields once, when all is posted; True where that is the last of a call (``steps.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distattn.parallel.comm import Awaited, Communicator, lane_of
from distattn.parallel.head_split import HeadSlice, HeadSplit, Parts, inner_shape, row_parts
from distattn.parallel.shape import ALIGNMENT, Shape
from distattn.parallel.steps import Steps

LANE = 3


@dataclass(frozen=True)
class RowFormat:
    """A row as bytes: every part begins on an aligned border, so that kernels may read the parts where they lie."""

    parts: Parts

    @cached_property
    def offsets(self) -> list[int]:
        """Where the parts of a row begin, and the bytes of a row."""
        sizes = [-(-dtype.itemsize * math.prod(tail) // ALIGNMENT) * ALIGNMENT for dtype, tail in self.parts]
        return [0, *np.cumsum(sizes).tolist()]

    @property
    def size(self) -> int:
        return self.offsets[-1]

    def views(self, memory: Tensor) -> list[Tensor]:
        """The parts of rows that lie one after the other in ``memory`` (uint8, 1-D): [rows, *tail], contiguous in a row."""
        table = memory.view(-1, self.size)
        found = []
        for (dtype, tail), offset in zip(self.parts, self.offsets, strict=False):
            columns = table[:, offset : offset + dtype.itemsize * math.prod(tail)]
            found.append(columns.view(dtype).unflatten(1, tail))
        return found


class HeadExchange:
    """One rank's part in the exchanges of a group, for one shape of its calls.

    Args:
        shape: of the calls, with all heads.
        rows: of the shards of the group's ranks, in their order.
        part: this rank's place in the group, and the slice that it attends with.
    """

    def __init__(self, shape: Shape, rows: Sequence[int], part: int) -> None:
        self.shape, self.part = shape, part
        self.split = HeadSplit(shape.heads, shape.kv_heads, len(rows))
        self.row_ptr = [0, *np.cumsum(rows).tolist()]
        self.rows = int(rows[part])
        kinds = zip(*(row_parts(shape, piece) for piece in self.split.slices), strict=True)
        self._inputs, self._outputs, self._upstream, self._gradients = ([RowFormat(parts) for parts in kind] for kind in kinds)
        # Everybody starts with the next rank, so that not all send to the first one at once.
        self._others = [(part + step) % len(rows) for step in range(1, len(rows))]

    @property
    def mine(self) -> HeadSlice:
        return self.split.slices[self.part]

    @property
    def inner_rows(self) -> int:
        """Rows of the whole group."""
        return self.row_ptr[-1]

    @cached_property
    def inner_shapes(self) -> list[Shape]:
        """Shape of each slice's attention."""
        return [inner_shape(self.shape, piece) for piece in self.split.slices]

    def send_inputs(self, communicator: Communicator, q: Tensor, k: Tensor, v: Tensor, call: int, slot: int = 0) -> Steps[Tensor]:
        """q, k, v [T, H, D] of this rank's rows in, bytes of all rows and this slice's heads out; see :meth:`inputs`."""
        awaited = Awaited("forward", 0, 0, "head exchange: q, k and v", call)
        tensors = lambda piece: [_q(q, piece), _kv(k, piece), _kv(v, piece)]  # noqa: E731
        return (yield from self._to_slices(communicator, self._inputs, tensors, awaited, slot))

    def inputs(self, arrived: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of this slice, [inner rows, heads, D]: views of what arrived, but for key heads that must be repeated."""
        q, k, v = self._inputs[self.part].views(arrived)
        return q, _repeated(k, self.mine.copies), _repeated(v, self.mine.copies)

    def return_outputs(
        self, communicator: Communicator, out: Tensor, lse: Tensor, call: int, slot: int = 0
    ) -> Steps[tuple[Tensor, Tensor]]:
        """This slice's out and lse of all rows in; this rank's rows with all heads out, [T, H, D_v] and [T, H]."""
        awaited = Awaited("forward", 0, 0, "head exchange: out and lse", call)
        whole = out.new_empty(self.rows, self.shape.heads, self.shape.d_v), lse.new_empty(self.rows, self.shape.heads)
        came = yield from self._to_rows(communicator, self._outputs, [out, lse], awaited, slot)
        for piece, parts in zip(self.split.slices, came, strict=True):
            for target, source in zip(whole, parts, strict=True):
                _q(target, piece).copy_(source)
        return whole

    def send_upstream(
        self, communicator: Communicator, dout: Tensor, delta: Tensor, call: int, slot: int = 0
    ) -> Steps[tuple[Tensor, Tensor]]:
        """The gradient of out and delta of this rank's rows in; those of all rows and this slice's heads out."""
        awaited = Awaited("backward", 0, 0, "head exchange: dout and delta", call)
        tensors = lambda piece: [_q(dout, piece), _q(delta, piece)]  # noqa: E731
        arrived = yield from self._to_slices(communicator, self._upstream, tensors, awaited, slot)
        dout, delta = self._upstream[self.part].views(arrived)
        return dout, delta.contiguous()

    def return_gradients(
        self, communicator: Communicator, dq: Tensor, dk: Tensor, dv: Tensor, call: int, slot: int = 0
    ) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        """This slice's gradients of all rows in, in the dtype of sums; those of this rank's rows out, in the inputs' dtype.

        Gradients of key heads that several slices read are added in the order of the slices, in the dtype of sums.
        """
        awaited = Awaited("backward", 0, 0, "head exchange: dq, dk and dv", call)
        given = [dq, _summed(dk, self.mine.copies), _summed(dv, self.mine.copies)]
        came = yield from self._to_rows(communicator, self._gradients, given, awaited, slot)
        shape, dtype = self.shape, self.shape.dtype
        whole_q = dq.new_empty(self.rows, shape.heads, shape.d, dtype=dtype)
        make = dk.new_zeros if self.split.replicated else dk.new_empty
        sums = shape.accumulate if self.split.replicated else dtype
        whole_k, whole_v = (make(self.rows, shape.kv_heads, d, dtype=sums) for d in (shape.d, shape.d_v))
        for piece, (q, k, v) in zip(self.split.slices, came, strict=True):
            _q(whole_q, piece).copy_(q)
            for target, source in ((whole_k, k), (whole_v, v)):
                rows = _kv(target, piece)
                rows.add_(source) if self.split.replicated else rows.copy_(source)
        return whole_q, whole_k.to(dtype), whole_v.to(dtype)

    def _to_slices(
        self,
        communicator: Communicator,
        formats: list[RowFormat],
        tensors: Callable[[HeadSlice], list[Tensor]],
        awaited: Awaited,
        slot: int,
    ) -> Steps[Tensor]:
        """Sends every slice its heads of this rank's rows; returns the bytes of all rows of this rank's slice."""
        device = tensors(self.mine)[0].device
        mine = formats[self.part]
        arrived = torch.empty(self.inner_rows * mine.size, dtype=torch.uint8, device=device)
        places = self._places(arrived, mine)
        given = {i: torch.empty(self.rows * formats[i].size, dtype=torch.uint8, device=device) for i in self._others}
        given[self.part] = places[self.part]
        for i, memory in given.items():
            for target, source in zip(formats[i].views(memory), tensors(self.split.slices[i]), strict=True):
                target.copy_(source)
        yield from self._exchange(communicator, given, dict(enumerate(places)), awaited, slot, home=False)
        return arrived

    def _to_rows(
        self, communicator: Communicator, formats: list[RowFormat], tensors: list[Tensor], awaited: Awaited, slot: int
    ) -> Steps[list[list[Tensor]]]:
        """Sends every rank its rows of this slice; returns this rank's rows of every slice."""
        mine = formats[self.part]
        packed = torch.empty(self.inner_rows * mine.size, dtype=torch.uint8, device=tensors[0].device)
        for target, source in zip(mine.views(packed), tensors, strict=True):
            target.copy_(source)
        given = dict(enumerate(self._places(packed, mine)))
        came = {i: torch.empty(self.rows * formats[i].size, dtype=torch.uint8, device=packed.device) for i in self._others}
        came[self.part] = given[self.part]
        yield from self._exchange(communicator, given, came, awaited, slot, home=True)
        return [row_format.views(came[i]) for i, row_format in enumerate(formats)]

    def _places(self, memory: Tensor, row_format: RowFormat) -> list[Tensor]:
        """The stretch of every rank's rows."""
        borders = [row * row_format.size for row in self.row_ptr]
        return [memory[a:b] for a, b in zip(borders, borders[1:], strict=False)]

    def _exchange(
        self,
        communicator: Communicator,
        given: dict[int, Tensor],
        came: dict[int, Tensor],
        awaited: Awaited,
        slot: int,
        home: bool,
    ) -> Steps[None]:
        """One batch with the other ranks of the group. Ranks without rows neither get nor give."""
        first = communicator.rank - self.part
        sends = [(first + i, given[i]) for i in self._others if given[i].numel()]
        receives = [(first + i, came[i]) for i in reversed(self._others) if came[i].numel()]
        try:
            communicator.report(awaited)
            pending = communicator.post(lane_of(communicator.lanes, LANE, slot), sends, receives, awaited)
            yield home
            communicator.report(awaited)
            pending.wait()
        except GeneratorExit:  # dropped half-way, by whoever failed between the steps
            raise
        except BaseException as error:
            communicator.fail(error)
            raise


def _q(x: Tensor, piece: HeadSlice) -> Tensor:
    return x[:, piece.start : piece.stop]


def _kv(x: Tensor, piece: HeadSlice) -> Tensor:
    return x[:, piece.kv_start : piece.kv_stop]


def _repeated(x: Tensor, copies: tuple[int, ...]) -> Tensor:
    """Key head h as often as ``copies[h]`` says; ``x`` itself where all stand once."""
    if max(copies) == 1:
        return x
    return torch.cat([x[:, h : h + 1].expand(-1, n, -1) for h, n in enumerate(copies)], 1)


def _summed(x: Tensor, copies: tuple[int, ...]) -> Tensor:
    """The transposition of :func:`_repeated`. Not index_add: on a GPU its order is nobody's."""
    if max(copies) == 1:
        return x
    return torch.cat([part.sum(1, keepdim=True) for part in x.split(list(copies), 1)], 1)
