"""Ranks as processes: the executor's messages over gloo (CPU tensors) or NCCL (CUDA tensors) among the ranks of a process group.

Every lane has a process group of its own, since one NCCL communicator is one stream, and control messages have a gloo group.

NCCL: `wait` makes the current stream wait. A batch that does not finish is found by the monitor thread, which prints the
error; the rank raises it at its next `post` or `wait`. A rank that is stuck in a CUDA call by then is ended by torch's watchdog,
`NCCL_GRACE_SECONDS` later. NCCL with several GPUs has not been run by us.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distattn.parallel.comm import LANES, Awaited, Done, Pending
from distattn.parallel.comm_gloo import GlooCommunicator, Messages, Witness
from distattn.parallel.watch import Watch, complain, open_store

NCCL_GRACE_SECONDS = 30.0


class ProcessCommunicator(GlooCommunicator):
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

    def __init__(self, group: dist.ProcessGroup | None = None, lanes: int = LANES, timeout: float = 600.0) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "A communicator between processes needs torch.distributed, which is not initialised. "
                "Call torch.distributed.init_process_group() first, or use one rank without a group."
            )
        parent = group or dist.group.WORLD
        assert parent is not None
        rank, world = dist.get_rank(parent), dist.get_world_size(parent)
        if rank < 0:
            raise ValueError(f"Rank {dist.get_rank()} of the world is not in the group given. Create it on its members only.")
        backend, members = _backend_of(parent), dist.get_process_group_ranks(parent)
        name = _name_for(parent, members, rank)
        store = dist.PrefixStore(f"distattn/{name}", dist.distributed_c10d._get_default_store())
        self._flights: _Flights | None = None
        watch = Watch(open_store(name), rank, world)
        super().__init__(store, rank, world, watch, 0 if backend == "nccl" else lanes, timeout, members=members)
        if backend == "nccl":
            self.backend, self.lanes = backend, lanes
            self._groups = [self._nccl_group() for _ in range(lanes)]
            self._flights = _Flights(watch, lanes, timeout)
            watch.checks.append(self._flights.check)
            for lane in self._groups:
                # Batches between some of the ranks are defined only after a collective of all.
                dist.all_reduce(torch.zeros(1, device="cuda"), group=lane)
        self.all_gather_bytes(b"")

    def post(self, lane: int, sends: Messages, receives: Messages, awaited: Awaited) -> Pending:
        if self._flights is None:
            return super().post(lane, sends, receives, awaited)
        self._check_post(lane, sends, receives)
        if not sends and not receives:
            return Done()
        return self._post_nccl(lane, self._flights, sends, receives, awaited)

    def close(self) -> None:
        groups = self._groups
        super().close()
        for group in groups if self.backend == "nccl" else ():
            with suppress(ValueError):  # gone already, with the whole world or by an earlier call
                if self._watch.failure is None:
                    dist.destroy_process_group(group)
                else:
                    dist.distributed_c10d._abort_process_group(group)  # NCCL would wait for what never comes

    def _nccl_group(self) -> dist.ProcessGroup:
        patience = self.timeout + NCCL_GRACE_SECONDS
        try:
            return dist.new_group(
                self._members, timeout=timedelta(seconds=patience), backend="nccl", use_local_synchronization=True
            )
        except RuntimeError as error:
            raise self._nobody_came("nccl", patience, error) from error

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


class _NcclPending:
    def __init__(self, watch: Witness, works: list[dist.Work]) -> None:
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
