"""What the executor may ask of the other ranks, whoever carries it: threads, gloo or NCCL.

Three carriers speak this protocol: `SoloCommunicator` (here, a world of one), `comm_threads` (ranks as threads of one
process, strict, for tests) and `comm_process` (process groups). Nothing else in distattn sends; `comm_group` is a view of one
of them, with a part of its ranks.

Rules that all carriers share, and that the strict one enforces:

- One `post` is one batch: the carrier may start all of its messages at once. Batches of one lane start in the order of their
  posts, and a batch may have to wait for the one before it on either end (NCCL: one communicator is one stream).
- Messages have no tags: the n-th send of rank a to rank b on a lane meets the n-th receive of b from a on that lane, and both
  ends know the size. Messages of no bytes are not sent: leave them out at both ends.
- Between `post` and the end of `wait` nobody writes a send buffer, and nobody reads or writes a receive buffer.
- One thread of a rank posts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

L = TypeVar("L", int, np.ndarray)
LANES = 4  # that a call of attention uses; plan.py says what for


def lane_of(lanes: int, lane: L, slot: int) -> L:
    """Where a carrier of so many lanes carries what a call in a slot sends on one of its ``LANES``.

    Calls that are in progress side by side have lanes of their own, so that neither's messages wait for those of the other. Where
    the carrier has too few, slots share them and their messages travel in the order of the posts. A lane, or int64 of many.
    """
    return lane + slot % max(1, lanes // LANES) * LANES


class Awaited(NamedTuple):
    """What a batch is for; read only when it fails, so make it once per plan and keep `detail` a ready string.

    `call` counts the passes that the executor has run (forward and backward alike), the same on every rank: with it the ranks'
    positions can be compared, and the late one named.
    """

    pass_name: str  # "forward" or "backward", or the name of a collective
    boundary: int  # 0-based
    stages: int
    detail: str = ""  # "kv rows [0, 512) of rank 1"
    call: int = 0

    def __str__(self) -> str:
        text = self.pass_name
        if self.call:
            text += f" pass {self.call}"
        if self.stages:
            text += f", boundary {self.boundary} of {self.stages} stages"
        return f"{text}: {self.detail}" if self.detail else text


class PeerError(RuntimeError):
    """A peer is gone, late, or does not follow the plan.

    `rank` is the rank that raises; `peer` the rank it waited for (None when it is not known); `awaited` what it waited for;
    `late` the ranks that look dead, failed or behind.
    """

    def __init__(
        self,
        message: str,
        rank: int,
        peer: int | None = None,
        awaited: Awaited | None = None,
        late: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.awaited = awaited
        self.late = list(late)


class Pending(Protocol):
    """A posted batch."""

    def wait(self) -> None:
        """Until every send and receive of the batch is complete.

        CPU: the host blocks, for at most the communicator's timeout. NCCL: the current stream waits, the host does not.
        A second call does nothing.

        Raises:
            PeerError: a peer is gone or late.
        """


@runtime_checkable
class Communicator(Protocol):
    """One rank's connection to the ranks of its group. Peers are ranks within the group, `0 <= peer < world`."""

    rank: int
    world: int
    lanes: int
    timeout: float  # seconds that a wait may last

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Awaited) -> Pending:
        """Start a batch on a lane. Tensors are uint8, 1-D, contiguous and not empty; list order is the plan's, on both ends."""

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order, over the CPU. Slow: once per new plan, never per layer."""

    def all_gather_rows(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """Every rank's `x [rows[rank], ...]`, in rank order; first sizes may differ and may be 0, all else is equal."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, added in rank order: the same bits on every rank and in every run."""

    def report(self, where: Awaited | str) -> None:
        """Say where this rank is, for the errors of its peers. Costs an assignment; a watcher publishes it."""

    def fail(self, error: BaseException) -> None:
        """Say that this rank gives up because of `error`, so that the errors of its peers name the first cause."""

    def scrub(self, released: Tensor) -> None:
        """Told that the contents of a buffer are not needed any more. Strict carriers fill it with large finite garbage."""

    def close(self) -> None:
        """Release groups and watchers. Needs no answer from any peer."""


def assert_batch(
    communicator: Communicator, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
) -> None:
    """The duties of whoever calls `post`."""
    assert 0 <= lane < communicator.lanes, f"lane {lane} of {communicator.lanes}"
    for peer, tensor in sends + receives:
        assert 0 <= peer < communicator.world and peer != communicator.rank, (
            f"rank {communicator.rank} of {communicator.world} has no peer {peer}"
        )
        assert tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous() and tensor.numel(), (
            f"a message is a contiguous uint8 vector with at least one byte, found {tensor.dtype} {list(tensor.shape)}"
        )


class Done:
    """A batch with nothing to wait for."""

    def wait(self) -> None:
        """At once."""


class SoloCommunicator:
    """A world of one rank: no process group, no peers, nothing to send."""

    rank = 0
    world = 1

    def __init__(self, lanes: int = LANES, timeout: float = 600.0) -> None:
        self.lanes = lanes
        self.timeout = timeout

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Awaited) -> Pending:
        assert_batch(self, lane, sends, receives)
        return Done()

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        return [bytes(payload)]

    def all_gather_rows(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        assert list(rows) == [x.shape[0]], f"rows {list(rows)} for a tensor {list(x.shape)}"
        return [x.clone()]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x.clone()

    def report(self, where: Awaited | str) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass

    def scrub(self, released: Tensor) -> None:
        pass

    def close(self) -> None:
        pass
