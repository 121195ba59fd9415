"""Plan: what every schedule returns. Which rank computes which piece of the score matrix when, and what travels for that.

A plan is plain data: int64 columns, one table of tasks, one of their bands, one of transfers. The dataclasses `Rows`, `Task`
and `Transfer` are views of single rows, for reading. Time is counted in stages; boundary ``b`` lies before the tasks of stage
``b``: first every transfer with ``need == b`` is awaited, then every transfer with ``post == b`` is posted, then the tasks of
stage ``b`` run. The last boundary (``b == stages``) only awaits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Literal

import numpy as np

from distattn.kernels.bands import Bands
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask


class What(IntEnum):
    """What a transfer carries of its rows. Inputs arrive as they are; sums are added up (or merged) by their receiver."""

    Q = 0  # queries
    KV = 1  # keys and values
    DOUT = 2  # upstream gradient with lse and delta
    OUT = 3  # partial (o, lse), merged by the receiver
    DQ = 4  # partial gradient of the queries
    DKV = 5  # partial gradients of keys and values
    DONE = 6  # (o, lse) of rows to which their owner adds nothing: o travels in the output dtype; stored as OUT at both ends

    @property
    def is_sum(self) -> bool:
        return self >= What.OUT

    @property
    def stored(self) -> What:
        """The kind of buffer that holds it."""
        return What.OUT if self == What.DONE else self

    @property
    def is_key_side(self) -> bool:
        return self in (What.KV, What.DKV)


TASK = ("stage", "rank", "q_owner", "q_start", "q_stop", "kv_owner", "kv_start", "kv_stop")
STAGE, RANK, Q_OWNER, Q_START, Q_STOP, KV_OWNER, KV_START, KV_STOP = range(8)
TRANSFER = ("src", "dst", "owner", "start", "stop", "what", "lane", "post", "need")
SRC, DST, OWNER, START, STOP, WHAT, LANE, POST, NEED = range(9)
# What goes home: partial results and gradients. 0 is the inner ring's, or for what servers pass on; 1 the outer ring's, or for
# what owners send; 3 the head exchange's.
HOME_LANE = 2
POOL = -1  # in the place of an owner: the foreign rows of all owners, which a pooled plan stores together
KEPT = ("rank", "owner", "start", "stop", "what")  # runs that a backward plan finds on its ranks from the forward pass


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the shard that ``owner`` holds."""

    owner: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"rows [{self.start}, {self.stop}) of rank {self.owner}"


@dataclass(frozen=True)
class Task:
    """One piece of work of ``rank`` in ``stage``; bands in the coordinates of the two row runs."""

    stage: int
    rank: int
    q: Rows
    kv: Rows
    bands: Bands


@dataclass(frozen=True)
class Transfer:
    """Posted before the tasks of stage ``post``, awaited before those of stage ``need``; the data is at ``src`` by then."""

    src: int
    dst: int
    rows: Rows
    what: What
    lane: int
    post: int
    need: int

    def __str__(self) -> str:
        return (
            f"{self.what.name.lower()} {self.rows} from rank {self.src} to rank {self.dst} (boundary {self.post} to {self.need})"
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule's decisions for one layout and mask, forward or backward, for all ranks or (``rank`` given) as one rank sees it.

    Attributes:
        tasks: int64 [n, 8], columns ``TASK``; sorted by stage, and within a stage in the order of execution.
        band_ptr: int64 [n + 1]; the bands of task i are rows band_ptr[i]:band_ptr[i + 1] of ``bands``.
        bands: int64 [m, 6], in the coordinates of the task's row runs.
        transfers: int64 [t, 9], columns ``TRANSFER``; both ends of a lane take theirs in this order.
        kept: int64 [k, 5], columns ``KEPT``. Empty in forward plans.
        buffer_bound: rows of foreign data that a rank holds at most at any time, as the schedule states it; verified.
        quiet: last stages of a forward plan in which nobody works on rows of others: partial results are on their way home.
        pooled: a rank stores the foreign rows of a kind in one buffer, whoever owns them, so that all tasks of a stage run in at
            most four launches: own or foreign queries on own or foreign keys. Else a buffer and launches for each owner.
        node_devices: ranks of a node that the schedule was told of; 0: of none.
        bands_of: the one rank whose tasks have their bands, where a schedule was asked for no more; None: all have.
    """

    name: str
    direction: Literal["forward", "backward"]
    layout: Layout
    mask: Mask
    stages: int
    tasks: np.ndarray
    band_ptr: np.ndarray
    bands: np.ndarray
    transfers: np.ndarray
    kept: np.ndarray
    buffer_bound: int | None = None
    rank: int | None = None
    quiet: int = 0
    pooled: bool = False
    node_devices: int = 0
    bands_of: int | None = None

    @property
    def world(self) -> int:
        return self.layout.world

    def task(self, i: int) -> Task:
        row = [int(x) for x in self.tasks[i]]
        bands = Bands(self.bands[self.band_ptr[i] : self.band_ptr[i + 1]])
        return Task(row[STAGE], row[RANK], Rows(*row[Q_OWNER : Q_STOP + 1]), Rows(*row[KV_OWNER : KV_STOP + 1]), bands)

    def transfer(self, i: int) -> Transfer:
        src, dst, owner, start, stop, what, lane, post, need = (int(x) for x in self.transfers[i])
        return Transfer(src, dst, Rows(owner, start, stop), What(what), lane, post, need)

    def iter_tasks(self) -> Iterator[Task]:
        return (self.task(i) for i in range(len(self.tasks)))

    def iter_transfers(self) -> Iterator[Transfer]:
        return (self.transfer(i) for i in range(len(self.transfers)))

    def stores(self, rank: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """Whose buffers on ``rank`` the rows of ``owner`` are in: its own tensors, the owner's, or those of the ``POOL``."""
        return np.where(rank == owner, owner, POOL) if self.pooled else owner

    def store(self, owner: int) -> int:
        """The same in the view of one rank."""
        return POOL if self.pooled and owner != self.rank else owner

    @cached_property
    def task_of_band(self) -> np.ndarray:
        """int64 [m]: the task that each band belongs to."""
        return np.repeat(np.arange(len(self.tasks)), np.diff(self.band_ptr))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name all of the plan's content; equal on every machine."""
        h = hashlib.blake2b(digest_size=16)
        h.update(f"{self.direction}:{self.stages}:{self.rank}:{self.pooled}".encode())
        for part in (self.tasks, self.band_ptr, self.bands, self.transfers, self.kept):
            h.update(np.int64(len(part)).tobytes())
            h.update(np.ascontiguousarray(part).astype("<i8").tobytes())
        return h.digest()

    def view(self, rank: int) -> Plan:
        """The part that ``rank`` does, sends and receives, in the same order."""
        if self.rank is not None:
            raise ValueError(f"This plan is already the view of rank {self.rank}; take rank {rank}'s from the whole plan.")
        if self.bands_of not in (None, rank):
            raise ValueError(f"This plan was made with the bands of rank {self.bands_of} only; make it for rank {rank}.")
        mine = self.tasks[:, RANK] == rank
        counts = np.diff(self.band_ptr)
        return replace(
            self,
            rank=rank,
            bands_of=None,
            tasks=self.tasks[mine],
            band_ptr=np.concatenate([[0], np.cumsum(counts[mine])]).astype(np.int64),
            bands=self.bands[np.repeat(mine, counts)],
            transfers=self.transfers[(self.transfers[:, SRC] == rank) | (self.transfers[:, DST] == rank)],
            kept=self.kept[self.kept[:, 0] == rank],
        )

    def message_digests(self) -> list[bytes]:
        """For a rank's view: one hash per peer of the ordered transfers between the two, equal on both when their plans agree."""
        assert self.rank is not None
        t = self.transfers
        peers = np.where(t[:, SRC] == self.rank, t[:, DST], t[:, SRC])
        order = np.argsort(peers, kind="stable")
        bounds = np.searchsorted(peers[order], np.arange(self.world + 1))
        rows = np.ascontiguousarray(t[order]).astype("<i8")
        return [hashlib.blake2b(rows[a:b].tobytes(), digest_size=8).digest() for a, b in zip(bounds, bounds[1:], strict=False)]


def no_kept() -> np.ndarray:
    """The empty table of kept runs."""
    return np.zeros((0, len(KEPT)), dtype=np.int64)


def assemble(views: list[Plan]) -> Plan:
    """One plan from the views of all ranks; transfers as their senders list them."""
    first = views[0]
    tasks = np.concatenate([v.tasks for v in views])
    order = np.argsort(tasks[:, STAGE], kind="stable")
    counts = np.concatenate([np.diff(v.band_ptr) for v in views])
    starts = np.concatenate([[0], np.cumsum(counts)])
    bands = np.concatenate([v.bands for v in views])
    picked = [bands[starts[i] : starts[i + 1]] for i in order]
    transfers = np.concatenate([v.transfers[v.transfers[:, SRC] == v.rank] for v in views])
    return replace(
        first,
        rank=None,
        tasks=tasks[order],
        band_ptr=np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64),
        bands=np.concatenate(picked) if picked else bands,
        transfers=transfers[np.argsort(transfers[:, POST], kind="stable")],
        kept=np.concatenate([v.kept for v in views]),
    )
