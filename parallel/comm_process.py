"""Ranks as processes: the executor's messages over gloo (CPU tensors) or NCCL (CUDA tensors).

Every lane has a process group of its own, since one NCCL communicator is one stream, and control messages have a gloo group. All
communication is point to point, also in gathers: sizes may differ without padding, and every wait has a peer to name.

gloo: `wait` blocks the host, for at most `timeout`. After a timeout the connection is of no use any more; raise, and start again.
NCCL: `wait` makes the current stream wait. A batch that does not finish is found by the monitor thread, which prints the
error; the rank raises it at its next `post` or `wait`. A rank that is stuck in a CUDA call by then is ended by torch's watchdog,
`NCCL_GRACE_SECONDS` later. NCCL with several GPUs has not been run by us.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.parallel.comm import Awaited, Done, PeerError, Pending, assert_batch
from distattn.parallel.watch import Watch, complain, open_store

SETUP_SECONDS = 300.0  # ranks reach the construction minutes apart: one may still load data or compile
NCCL_GRACE_SECONDS = 30.0
FRAME = 56  # payloads of at most this many bytes are gathered in one exchange, with their sizes

Messages = list[tuple[int, Tensor]]


class ProcessCommunicator:
    """One rank of a process group; see `Communicator` for the methods.

    Creating one is a collective of all ranks of `group` and of no others, so that groups side by side (data x context) need not
    know of each other. The exception: where the default group was initialised with a `device_id`, NCCL groups are split from it,
    and all ranks of the world must create theirs at the same time.

    Args:
        group: None is the whole world.
        lanes: process groups that carry messages independently.
        timeout: seconds that one wait may last.

    Raises:
        ValueError: torch.distributed is not initialised, or this rank is not in the group.
        PeerError: a peer does not take part in the construction.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, lanes: int = 4, timeout: float = 600.0) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "A communicator between processes needs torch.distributed, which is not initialised. "
                "Call torch.distributed.init_process_group() first, or use one rank without a group."
            )
        parent = group or dist.group.WORLD
        assert parent is not None
        self.rank, self.world = dist.get_rank(parent), dist.get_world_size(parent)
        if self.rank < 0:
            raise ValueError(f"Rank {dist.get_rank()} of the world is not in the group given. Create it on its members only.")
        self.lanes, self.timeout = lanes, timeout
        self._gave_up: PeerError | None = None
        self.backend = _backend_of(parent)
        self._members = dist.get_process_group_ranks(parent)
        self._name = _name_for(parent, self._members, self.rank)
        self._control = self._gloo_group("control")
        self._watch = Watch(open_store(self._name), self.rank, self.world)
        self._groups: list[Any] = []  # ProcessGroupGloo or ProcessGroup
        for lane in range(lanes):
            self._groups.append(self._nccl_group() if self.backend == "nccl" else self._gloo_group(f"lane {lane}"))
        self._flights: _Flights | None = None
        if self.backend == "nccl":
            self._flights = _Flights(self._watch, lanes, timeout)
            self._watch.checks.append(self._flights.check)
            for lane in self._groups:
                # Batches between some of the ranks are defined only after a collective of all.
                dist.all_reduce(torch.zeros(1, device="cuda"), group=lane)
        self.all_gather_bytes(b"")

    def post(self, lane: int, sends: Messages, receives: Messages, awaited: Awaited) -> Pending:
        assert_batch(self, lane, sends, receives)
        failure = self._gave_up or self._watch.failure
        if failure is not None:
            raise failure
        if not sends and not receives:
            return Done()
        if self._flights is None:
            return self._post_gloo(self._groups[lane], f"lane {lane}", sends, receives, awaited)
        return self._post_nccl(lane, self._flights, sends, receives, awaited)

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        awaited = Awaited("all_gather_bytes", 0, 0)
        frame = len(payload).to_bytes(8, "little") + payload[:FRAME].ljust(FRAME, b"\0")
        frames = self._share(_tensor(frame), [len(frame)] * self.world, awaited, control=True)
        came = [part.numpy().tobytes() for part in frames]
        sizes = [int.from_bytes(part[:8], "little") for part in came]
        if max(sizes) <= FRAME:
            return [part[8 : 8 + size] for part, size in zip(came, sizes, strict=True)]
        return [part.numpy().tobytes() for part in self._share(_tensor(payload), sizes, awaited, control=True)]

    def all_gather_rows(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        assert len(rows) == self.world and rows[self.rank] == x.shape[0], f"rows {list(rows)}, tensor {list(x.shape)}"
        given = x.detach().contiguous().reshape(-1).view(torch.uint8)
        row_bytes = x.element_size() * math.prod(x.shape[1:])
        parts = self._share(given, [n * row_bytes for n in rows], Awaited("all_gather_rows", 0, 0), control=False)
        return [part.view(x.dtype).reshape(n, *x.shape[1:]) for part, n in zip(parts, rows, strict=True)]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        parts = self.all_gather_rows(x.reshape(1, -1), [1] * self.world)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.reshape(x.shape)

    def report(self, where: Awaited | str) -> None:
        self._watch.report(where)

    def fail(self, error: BaseException) -> None:
        text = f"rank {self.rank}: {type(error).__name__}: {error}"
        self._watch.publish_failure(text)
        # Messages have no tags: another try would be taken by the peers for the rest of the one that failed.
        self._gave_up = self._gave_up or PeerError(
            f"{text}\nThis rank gave up in the middle of a pass, so its messages and its peers' no longer meet. "
            "Close this communicator on all ranks and create a new one.",
            self.rank,
        )

    def scrub(self, released: Tensor) -> None:
        pass

    def close(self) -> None:
        self._watch.close()
        groups, self._groups = self._groups, []
        for group in groups if self.backend == "nccl" else ():  # the others end with their last reference
            with suppress(ValueError):  # gone already, with the whole world or by an earlier call
                if self._watch.failure is None:
                    dist.destroy_process_group(group)
                else:
                    dist.distributed_c10d._abort_process_group(group)  # NCCL would wait for what never comes

    def _gloo_group(self, purpose: str) -> dist.ProcessGroupGloo:
        """A group that torch's registry does not know: its names depend on how many other groups a rank is in."""
        store = dist.PrefixStore(f"distattn/{self._name}/{purpose}", dist.distributed_c10d._get_default_store())
        try:
            return dist.ProcessGroupGloo(store, self.rank, self.world, timedelta(seconds=SETUP_SECONDS))
        except RuntimeError as error:
            raise self._nobody_came("gloo", SETUP_SECONDS, error) from error

    def _nccl_group(self) -> dist.ProcessGroup:
        patience = self.timeout + NCCL_GRACE_SECONDS
        try:
            return dist.new_group(
                self._members, timeout=timedelta(seconds=patience), backend="nccl", use_local_synchronization=True
            )
        except RuntimeError as error:
            raise self._nobody_came("nccl", patience, error) from error

    def _nobody_came(self, backend: str, patience: float, error: RuntimeError) -> PeerError:
        return PeerError(
            f"rank {self.rank}: no {backend} group of the ranks {self._members} came about within {patience:g} s: {error}. "
            "All of them, and no others, have to create the communicator.",
            self.rank,
        )

    def _share(self, given: Tensor, sizes: Sequence[int], awaited: Awaited, control: bool) -> list[Tensor]:
        """Every rank's bytes, in rank order, each straight from its owner."""
        parts = [torch.empty(size, dtype=torch.uint8, device=given.device) for size in sizes]
        parts[self.rank].copy_(given)
        # Everybody starts with the next rank, so that not all send to rank 0 at first.
        peers = [(self.rank + step) % self.world for step in range(1, self.world)]
        sends = [(peer, given) for peer in peers if given.numel()]
        receives = [(peer, parts[peer]) for peer in reversed(peers) if sizes[peer]]
        if control:
            self._post_gloo(self._control, "control", sends, receives, awaited).wait()
        else:
            self.post(0, sends, receives, awaited).wait()
        return parts

    def _post_gloo(self, group: Any, lane: str, sends: Messages, receives: Messages, awaited: Awaited) -> _GlooPending:
        # Straight to the group: batch_isend_irecv is the same calls in a loop here, with checks that cost more than the calls.
        flights = []
        is_send, peer, tensor = False, 0, None
        try:
            for peer, tensor in receives:
                flights.append(_Message(group.recv([tensor], peer, 0), False, peer, tensor))
            is_send = True
            for peer, tensor in sends:
                flights.append(_Message(group.send([tensor], peer, 0), True, peer, tensor))
        except RuntimeError as error:
            assert tensor is not None
            what = f"could not start {_errand(is_send, peer, tensor)} ({lane})"
            raise self._watch.explain(awaited, [peer], what, _cause(error)) from error
        return _GlooPending(self._watch, self.timeout, lane, awaited, flights)

    def _post_nccl(self, lane: int, flights: _Flights, sends: Messages, receives: Messages, awaited: Awaited) -> _NcclPending:
        group = self._groups[lane]
        operations = [dist.P2POp(dist.isend, tensor, self._members[peer], group) for peer, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, self._members[peer], group) for peer, tensor in receives]
        ready = torch.cuda.Event()
        ready.record()
        works = dist.batch_isend_irecv(operations)
        peers = tuple(dict.fromkeys(peer for peer, _ in [*receives, *sends]))
        flights.lanes[lane].append(_Flight(works, ready, awaited, peers))
        return _NcclPending(self._watch, works)


class _Message(NamedTuple):
    work: dist.Work
    is_send: bool
    peer: int
    tensor: Tensor


class _GlooPending:
    def __init__(self, watch: Watch, timeout: float, lane: str, awaited: Awaited, messages: list[_Message]) -> None:
        self._watch, self._timeout, self._lane, self._awaited = watch, timeout, lane, awaited
        self._messages = messages

    def wait(self) -> None:
        watch = self._watch
        started = time.monotonic()
        for work, is_send, peer, tensor in self._messages:
            watch.waiting_for = (peer,)
            left = max(0.001, started + self._timeout - time.monotonic())
            try:
                arrived = work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                self._raise(is_send, peer, tensor, started, error)
            if not arrived:
                self._raise(is_send, peer, tensor, started, RuntimeError("The connection was shut down"))
        watch.waiting_for = ()
        self._messages = []

    def _raise(self, is_send: bool, peer: int, tensor: Tensor, started: float, error: RuntimeError) -> NoReturn:
        self._messages = []
        what = f"waited {time.monotonic() - started:.1f} s for {_errand(is_send, peer, tensor)} ({self._lane})"
        raise self._watch.explain(self._awaited, [peer], what, _cause(error)) from error


class _NcclPending:
    def __init__(self, watch: Watch, works: list[dist.Work]) -> None:
        self._watch, self._works = watch, works

    def wait(self) -> None:
        if self._watch.failure is not None:
            raise self._watch.failure
        for work in self._works:
            work.wait()
        self._works = []


@dataclass
class _Flight:
    """A batch that NCCL carries. `since`: when nothing on this rank was left to do before it, by the monitor's clock."""

    works: list[dist.Work]
    ready: torch.cuda.Event
    awaited: Awaited
    peers: tuple[int, ...]
    since: float | None = None


class _Flights:
    """What is in flight by lane, for the monitor thread: the host may be far ahead of the device."""

    def __init__(self, watch: Watch, lanes: int, timeout: float) -> None:
        self.lanes: list[deque[_Flight]] = [deque() for _ in range(lanes)]
        self._watch, self._timeout = watch, timeout
        self._device = torch.cuda.current_device()

    def check(self) -> None:
        """Forget what has arrived; the oldest of each lane that could start long ago and has not arrived is an error."""
        torch.cuda.set_device(self._device)  # of the monitor thread
        now = time.monotonic()
        waiting: list[int] = []
        for lane, flights in enumerate(self.lanes):
            while flights and all(work.is_completed() for work in flights[0].works):
                flights.popleft()
            if not flights or not flights[0].ready.query():
                continue
            flight = flights[0]
            flight.since = flight.since or now
            waiting.extend(flight.peers)
            if now - flight.since > self._timeout and self._watch.failure is None:
                what = f"waited {now - flight.since:.1f} s on lane {lane} for a batch with ranks {list(flight.peers)}"
                self._watch.failure = self._watch.explain(flight.awaited, flight.peers, what, "It has not finished")
                complain(self._watch.failure)
        self._watch.waiting_for = tuple(waiting)


def _name_for(parent: dist.ProcessGroup, members: Sequence[int], rank: int) -> str:
    """The same on all members: of their group, and of which communicator over it this is."""
    digest = hashlib.blake2b(repr(list(members)).encode(), digest_size=8).hexdigest()
    name = f"{parent.group_name}/{digest}"
    store = dist.distributed_c10d._get_default_store()
    return f"{name}/{store.add(f'distattn/{name}/made by {rank}', 1)}"


def _backend_of(group: dist.ProcessGroup) -> str:
    name = dist.get_backend(group)
    if name in ("gloo", "nccl"):
        return name
    return "nccl" if torch.cuda.is_available() else "gloo"  # one backend a device type


def _tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)


def _errand(is_send: bool, peer: int, tensor: Tensor) -> str:
    return f"{tensor.numel()} bytes to be {f'taken by rank {peer}' if is_send else f'received from rank {peer}'}"


def _cause(error: BaseException) -> str:
    """The first sentence of what the carrier said, without the place in its source. The others are the same for every error."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", (str(error).splitlines() or [""])[0])
    return text.split(". ")[0].rstrip(".") + "."
