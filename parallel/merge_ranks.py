"""One softmax from the partial ones of all ranks: what tree decoding sends (Shyam et al., "Tree Attention", 2024).

Every rank brings a state (o, lse) of the same rows over its own keys. Merging states is associative, so they can be reduced as
sums are. The paper all-reduces the maximum, then numerators and denominators. Here the lse travels beside its o, which saves the
first of these, and what comes back is finished rows instead of sums:

- ``gather``: one all-gather of (o, lse), every rank merges all: ``(P - 1) * R * W`` bytes sent by a rank;
- ``scatter``: a reduce-scatter of (o, lse) over the rows, then an all-gather of the finished rows in the output dtype:
  ``(P - 1) / P * R' * (W + O)`` bytes, in two collectives.

P ranks, R rows (tokens x heads), R' = R rounded up to a multiple of P, W = (D_v + 1) * 4 bytes of a row's float32 (o, lse), O
bytes of a finished row; and NOTE bytes with every message of the first collective. With ``devices`` ranks a node, states are
merged inside the nodes first, so that a rank sends only (N - 1) / P of its rows, twice, over the network between N nodes.

Merged in rank order (node by node), each row on one rank: the same bits on every rank and in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distattn.kernels.contract import State
from distattn.parallel.comm import Awaited, Communicator

How = Literal["gather", "scatter"]
NOTE = 24  # bytes: three int64 that every rank adds to what it sends, for the check that all hold the same context
# A second collective costs a latency. Below this many bytes no network is limited by its bandwidth, so that it must save more.
WORTH_A_COLLECTIVE = 4096

GATHER = Awaited("decode", 0, 1, "partial results of all ranks")
SCATTER = Awaited("decode", 0, 2, "partial results of this rank's rows")
FINISHED = Awaited("decode", 1, 2, "finished rows of all ranks")


@dataclass(frozen=True)
class Exchange:
    """What travels for one call. ``sent`` counts every byte that one rank sends; all ranks send the same.

    Args:
        rows: rows of the state, tokens x heads.
        d_v: head size of values.
        world: ranks.
        accumulate: bytes of a number of an unfinished row (4; 8 for float64).
        output: bytes of a number of a finished row.
        lse: finished rows bring their lse.
        devices: ranks of a node; None, or as many as there are ranks, is one node.
        how: "gather" or "scatter".
    """

    rows: int
    d_v: int
    world: int
    accumulate: int
    output: int
    lse: bool
    devices: int | None
    how: How

    @property
    def radices(self) -> tuple[int, ...]:
        """Ranks that exchange at each level, innermost first; their product is the world."""
        inner = self.devices or self.world
        return tuple(r for r in (inner, self.world // inner) if r > 1)

    @property
    def padded(self) -> int:
        """Rows rounded up to a multiple of the world."""
        return -(-self.rows // self.world) * self.world

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        unfinished = (self.d_v + 1) * self.accumulate
        if self.how == "gather":
            return (self.world - 1) * (NOTE + self.rows * unfinished)
        finished = self.d_v * self.output + self.lse * self.accumulate
        notes = sum(radix - 1 for radix in self.radices) * NOTE
        return (self.world - 1) * (self.padded // self.world) * (unfinished + finished) + notes

    @property
    def sent_between_nodes(self) -> int:
        """The part of ``sent`` that leaves the node (of a gather: nothing is saved, all peers get all)."""
        devices = self.devices or self.world
        nodes = self.world // devices
        unfinished = (self.d_v + 1) * self.accumulate
        if self.how == "gather":
            return (self.world - devices) * (NOTE + self.rows * unfinished)
        finished = self.d_v * self.output + self.lse * self.accumulate
        return (nodes - 1) * ((self.padded // self.world) * (unfinished + finished) + NOTE)


def choose_exchange(
    rows: int, d_v: int, world: int, accumulate: torch.dtype, output: torch.dtype, lse: bool, devices: int | None = None
) -> Exchange:
    """The cheaper exchange: gather unless scatter saves more than ``WORTH_A_COLLECTIVE`` bytes a rank.

    Raises:
        ValueError: ``devices`` does not divide the world.
    """
    if devices is not None and (devices < 1 or world % devices):
        raise ValueError(
            f"{world} ranks cannot be nodes of {devices}. Pass devices= that divides the number of ranks, or None for one node."
        )
    sizes = (rows, d_v, world, accumulate.itemsize, output.itemsize, lse, devices)
    gather, scatter = Exchange(*sizes, "gather"), Exchange(*sizes, "scatter")
    return scatter if gather.sent - scatter.sent > WORTH_A_COLLECTIVE else gather


def combine(o: Tensor, lse: Tensor) -> State:
    """The softmax over the keys of all parts: o [P, ..., D_v], lse [P, ...] to [..., D_v], [...]. Empty parts count nothing."""
    top = lse.amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = (lse - top).exp_()
    total = weight.sum(0)
    merged = (o * weight.unsqueeze(-1)).sum(0)
    return State(merged.div_(total.masked_fill(total == 0.0, 1.0).unsqueeze(-1)), total.log_().add_(top))


def merge_ranks(
    state: State, note: Tensor, exchange: Exchange, communicator: Communicator, output: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [R, D_v] in ``output``, lse [R], note [3]) over the keys of all ranks, equal on all of them.

    Args:
        state: o [R, D_v] and lse [R] over this rank's keys.
        note: int64 [3] on the device of the state. Comes back as (sum of the first, least of the second, most of the third).

    Without ``exchange.lse`` a scatter leaves the lse empty ([0]).
    """
    rows, d_v = state.o.shape
    if communicator.world == 1:
        return state.o.to(output), state.lse, note
    if exchange.how == "gather":
        packed = _pack(state, note).expand(communicator.world, -1)
        state, note = _merge_level(packed, d_v, communicator, 1, GATHER)
        return state.o.to(output), state.lse, note
    if exchange.padded > rows:
        more = exchange.padded - rows
        state = State(
            torch.cat([state.o, state.o.new_zeros(more, d_v)]), torch.cat([state.lse, state.lse.new_full((more,), -torch.inf)])
        )
    stride = 1
    for radix in exchange.radices:
        parts = [State(o, lse) for o, lse in zip(state.o.chunk(radix), state.lse.chunk(radix), strict=True)]
        packed = torch.stack([_pack(part, note) for part in parts])
        state, note = _merge_level(packed, d_v, communicator, stride, SCATTER)
        stride *= radix
    out, lse = state.o.to(output), state.lse if exchange.lse else state.lse.new_empty(0)
    for radix in reversed(exchange.radices):
        stride //= radix
        finished = torch.cat([_as_bytes(out), _as_bytes(lse)])
        parts_of = _swap(finished.expand(radix, -1), communicator, stride, FINISHED)
        cut = out.nbytes
        out = parts_of[:, :cut].contiguous().view(output).view(-1, d_v)
        lse = parts_of[:, cut:].contiguous().view(-1).view(lse.dtype)
    return out[:rows], lse[:rows], note


def _pack(state: State, note: Tensor) -> Tensor:
    """[NOTE bytes, o, lse] as one vector of the accumulate dtype; the note travels as its bits."""
    return torch.cat([note.view(state.o.dtype), state.o.reshape(-1), state.lse.reshape(-1)])


def _merge_level(packed: Tensor, d_v: int, communicator: Communicator, stride: int, awaited: Awaited) -> tuple[State, Tensor]:
    """Swaps packed states [ranks, n] with the ranks of a level and merges what came."""
    came = _swap(packed.view(torch.uint8) if packed.is_contiguous() else _expanded_bytes(packed), communicator, stride, awaited)
    notes = came[:, :NOTE].contiguous().view(torch.int64)
    numbers = came[:, NOTE:].contiguous().view(packed.dtype)
    rows = numbers.shape[1] // (d_v + 1)
    o, lse = numbers[:, : rows * d_v].unflatten(1, (rows, d_v)), numbers[:, rows * d_v :]
    return combine(o, lse), torch.stack([notes[:, 0].sum(), notes[:, 1].amin(), notes[:, 2].amax()])


def _swap(given: Tensor, communicator: Communicator, stride: int, awaited: Awaited) -> Tensor:
    """Bytes [ranks, n]: part i goes to the i-th rank of this rank's level, ``stride`` ranks apart. Returns what they gave."""
    radix = given.shape[0]
    mine = communicator.rank // stride % radix
    first = communicator.rank - mine * stride
    came = torch.empty(given.shape, dtype=torch.uint8, device=given.device)
    came[mine].copy_(given[mine])
    # Everybody starts with the next rank, so that not all send to the first one at once.
    others = [(mine + step) % radix for step in range(1, radix)]
    sends = [(first + i * stride, given[i]) for i in others]
    receives = [(first + i * stride, came[i]) for i in reversed(others)]
    communicator.report(awaited)
    communicator.post(0, sends, receives, awaited).wait()
    return came


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8, device=x.device)


def _expanded_bytes(packed: Tensor) -> Tensor:
    """The bytes of one vector that all get alike, without a copy for each."""
    return packed[0].contiguous().view(torch.uint8).expand(packed.shape[0], -1)


def note_of(rows: int, length: int, rank: int, world: int, device: torch.device) -> Tensor:
    """int64 [3]: rows held, and the length of the context so packed that the least and the most of it name a rank each."""
    return torch.tensor([rows, length * world + rank, length * world + world - 1 - rank], device=device)


def read_note(note: Tensor, world: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """(rows of all ranks, (shortest length, its rank), (longest length, its rank)). Waits for the device."""
    rows, least, most = note.tolist()
    return rows, divmod(least, world), (most // world, world - 1 - most % world)
