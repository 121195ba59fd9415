"""Ranks as threads of one process: 8 to 64 ranks in a unit test, and several ranks on one GPU.

Stricter than any process group, so that what hangs, races or aliases on NCCL fails here, and says where:

- A send completes only when the receiver has posted its receive (rendezvous), and a batch moves only when it is the oldest
  unfinished one of its lane on both ends, as on an NCCL communicator.
- Sizes that differ are an error that names both ends.
- A receive buffer holds large finite garbage until its own `wait`: reading it early gives wrong results every time.
- A send buffer that changes, or a receive buffer that is written, before `wait` is an error (CPU; on CUDA it goes unseen).
- `scrub` fills released buffers with garbage.
- Ranks that wait in a circle fail at once; a rank that waits for one that does something else fails at the timeout.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, RLock, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.parallel.comm import LANES, Awaited, PeerError, Pending, assert_batch

# As bytes: 235 in float16 and 6.2e16 in bfloat16 and float32. Large enough to be seen in any result, small enough that a dot
# product of garbage stays finite, which is all that kernels promise to bear in rows that they mask.
GARBAGE_BYTE = 0x5B
GARBAGE = {torch.uint8: GARBAGE_BYTE, torch.float16: 235.0}

# How often a waiting rank asks the gate again. Only with a gate.
GATE_SECONDS = 0.002

Gate = Callable[[int, int, int, int], bool]


class _Message(NamedTuple):
    tensor: Tensor
    staged: list[Tensor]  # the bytes in flight: of a send at once, of a receive when its sender is matched
    ready: list[torch.cuda.Event]


@dataclass(eq=False)
class _Batch:
    """One post of one rank. `open` holds the unmatched messages by (is a send, peer), oldest first."""

    rank: int
    lane: int
    awaited: Awaited
    sends: list[tuple[int, _Message]] = field(default_factory=list)
    receives: list[tuple[int, _Message]] = field(default_factory=list)
    open: dict[tuple[bool, int], deque[_Message]] = field(default_factory=dict)

    def complete(self) -> bool:
        return not self.open

    def describe(self) -> str:
        parts = []
        for (is_send, peer), messages in self.open.items():
            size = ", ".join(str(message.tensor.numel()) for message in messages)
            parts.append(f"to send {size} bytes to rank {peer}" if is_send else f"to receive {size} bytes from rank {peer}")
        return f"{' and '.join(parts)} (lane {self.lane}; {self.awaited})"

    def first_peer(self) -> int | None:
        return next((peer for _, peer in self.open), None)


@dataclass(eq=False)
class _Gathering:
    """One collective: what every rank brought so far."""

    name: str
    world: int
    brought: dict[int, Any] = field(default_factory=dict)
    left: int = 0  # ranks that have gone on

    def complete(self) -> bool:
        return len(self.brought) == self.world

    def describe(self) -> str:
        return f"in {self.name} for ranks {[rank for rank in range(self.world) if rank not in self.brought]}"

    def first_peer(self) -> int | None:
        return next((rank for rank in range(self.world) if rank not in self.brought), None)


class _Exchange:
    """What the ranks of one `run_ranks` share. Everything happens under one lock."""

    def __init__(self, world: int, lanes: int, timeout: float, gate: Gate | None) -> None:
        self.world, self.timeout, self.gate = world, timeout, gate
        self.lock = RLock()
        self.wake = [Condition(self.lock) for _ in range(world)]  # one a rank: 64 threads woken for each message cost seconds
        self.queues: list[list[deque[_Batch]]] = [[deque() for _ in range(world)] for _ in range(lanes)]
        self.numbers: dict[tuple[int, int, int], int] = {}
        self.held: set[tuple[int, int]] = set()
        self.gatherings: dict[int, _Gathering] = {}
        self.blocked: dict[int, _Batch | _Gathering] = {}
        self.places: list[Awaited | str] = ["nothing reported"] * world
        self.finished: set[int] = set()
        self.first_failure: tuple[int, BaseException] | None = None

    def add(self, batch: _Batch) -> None:
        with self.lock:
            self.raise_if_failed(batch.rank)
            self.queues[batch.lane][batch.rank].append(batch)
            self.match(batch.lane, batch.rank)

    def match(self, lane: int, rank: int) -> None:
        """Carry all that can move now that the queue of `rank` has changed."""
        queues = self.queues[lane]
        ranks = [rank]
        while ranks:
            rank = ranks.pop()
            if not queues[rank]:
                continue
            batch = queues[rank][0]
            for is_send, peer in list(batch.open):
                other = queues[peer][0] if queues[peer] else None
                if other is not None and (not is_send, rank) in other.open:
                    self.carry(lane, *((batch, other) if is_send else (other, batch)))
                    if other.complete():
                        queues[peer].popleft()
                        ranks.append(peer)
                        self.wake[peer].notify()
            if batch.complete():
                queues[rank].popleft()
                ranks.append(rank)
                self.wake[rank].notify()

    def carry(self, lane: int, source: _Batch, target: _Batch) -> None:
        """Match the open sends of one batch with the open receives of another, oldest first."""
        src, dst = source.rank, target.rank
        sends, receives = source.open[True, dst], target.open[False, src]
        while sends and receives:
            sent, received = sends[0], receives[0]
            if sent.tensor.numel() != received.tensor.numel():
                error = PeerError(
                    f"rank {src} sends {sent.tensor.numel()} bytes to rank {dst} on lane {lane} ({source.awaited}), but "
                    f"rank {dst} expects {received.tensor.numel()} bytes ({target.awaited}). "
                    "Both ends must follow the same order of messages.",
                    rank=src,
                    peer=dst,
                    awaited=source.awaited,
                )
                self.fail(src, error)
                raise error
            number = self.numbers.get((lane, src, dst), 0)
            if self.gate is not None and not self.gate(src, dst, lane, number):
                self.held.add((lane, src))
                return
            self.numbers[lane, src, dst] = number + 1
            received.staged.extend(sent.staged)
            received.ready.extend(sent.ready)
            sends.popleft()
            receives.popleft()
        if not sends:
            del source.open[True, dst]
        if not receives:
            del target.open[False, src]

    def gather(self, rank: int, turn: int, name: str, value: Any) -> list[Any]:
        """Every rank's value of the `turn`-th collective, in rank order."""
        with self.lock:
            self.raise_if_failed(rank)
            gathering = self.gatherings.setdefault(turn, _Gathering(name, self.world))
            if gathering.name != name:
                error = PeerError(
                    f"rank {rank} calls {name} where rank {min(gathering.brought)} calls {gathering.name}", rank=rank
                )
                self.fail(rank, error)
                raise error
            gathering.brought[rank] = value
            if gathering.complete():
                self.wake_all()
        self.block(rank, gathering, Awaited(name, 0, 0))
        with self.lock:
            gathering.left += 1
            if gathering.left == self.world:
                del self.gatherings[turn]
        return [gathering.brought[peer] for peer in range(self.world)]

    def block(self, rank: int, what: _Batch | _Gathering, awaited: Awaited) -> None:
        """Wait until `what` is complete."""
        deadline = time.monotonic() + self.timeout
        with self.lock:
            self.blocked[rank] = what
            self.raise_if_circle(rank)
            while not what.complete():
                self.raise_if_failed(rank)
                left = deadline - time.monotonic()
                if left <= 0:
                    self.raise_late(rank, what, awaited, f"waited {self.timeout:g} s")
                self.wake[rank].wait(min(left, GATE_SECONDS) if self.gate is not None else left)
                self.ask_gate_again()
            del self.blocked[rank]

    def ask_gate_again(self) -> None:
        held, self.held = self.held, set()
        for lane, rank in held:
            self.match(lane, rank)

    def raise_if_circle(self, rank: int) -> None:
        """No rank can go on: all that are not finished wait, and nothing is held by the gate."""
        if self.held or self.first_failure is not None:
            return
        working = set(range(self.world)) - self.finished
        if all(peer in self.blocked and not self.blocked[peer].complete() for peer in working):
            what = self.blocked[rank]
            awaited = what.awaited if isinstance(what, _Batch) else Awaited(what.name, 0, 0)
            self.raise_late(rank, what, awaited, "will wait for ever: no rank can go on")

    def raise_late(self, rank: int, what: _Batch | _Gathering, awaited: Awaited, why: str) -> None:
        late = [peer for peer in range(self.world) if peer not in self.blocked]
        lines = [f"rank {rank} {why} {what.describe()}."]
        for peer in range(self.world):
            if peer in self.blocked:
                lines.append(f"  rank {peer} waits {self.describe(peer)}")
            elif peer in self.finished:
                lines.append(f"  rank {peer} has finished")
            else:
                lines.append(f"  rank {peer} is working, last reported: {self.places[peer]}")
        error = PeerError("\n".join(lines), rank=rank, peer=what.first_peer(), awaited=awaited, late=late)
        self.fail(rank, error)
        raise error

    def describe(self, rank: int) -> str:
        what = self.blocked[rank]
        text = what.describe()
        if isinstance(what, _Batch):
            oldest = self.queues[what.lane][rank][0] if self.queues[what.lane][rank] else what
            if oldest is not what:
                text += f", behind its earlier batch {oldest.describe()}"
        return text

    def raise_if_failed(self, rank: int) -> None:
        if self.first_failure is not None:
            first, error = self.first_failure
            awaited = getattr(self.blocked.get(rank), "awaited", None)
            raise PeerError(
                f"rank {rank} stops, because rank {first} failed: {type(error).__name__}: {error}",
                rank=rank,
                peer=first,
                awaited=awaited,
                late=[first],
            ) from error

    def fail(self, rank: int, error: BaseException) -> None:
        with self.lock:
            if self.first_failure is None:
                self.first_failure = (rank, error)
            self.wake_all()

    def wake_all(self) -> None:
        for condition in self.wake:
            condition.notify()

    def finish(self, rank: int) -> None:
        """The function of `rank` has returned: it must have waited for all that it posted."""
        with self.lock:
            self.finished.add(rank)
            waiting = next((peer for peer in self.blocked if not self.blocked[peer].complete()), None)
            if waiting is not None:
                with suppress(PeerError):  # the ranks that wait raise it; this one has done its work
                    self.raise_if_circle(waiting)


class _ThreadPending:
    def __init__(self, communicator: ThreadCommunicator, batch: _Batch) -> None:
        self._communicator, self._batch = communicator, batch

    def wait(self) -> None:
        batch = self._batch
        if batch not in self._communicator.unwaited:
            return
        self._communicator.exchange.block(batch.rank, batch, batch.awaited)
        self._communicator.unwaited.remove(batch)
        for peer, message in batch.sends:
            if message.tensor.device.type == "cpu" and not torch.equal(message.tensor, message.staged[0]):
                raise AssertionError(
                    f"rank {batch.rank} changed a buffer before its send to rank {peer} was complete ({batch.awaited})"
                )
        for peer, message in batch.receives:
            tensor, staged = message.tensor, message.staged[0]
            if tensor.device.type == "cpu" and not bool((tensor == GARBAGE_BYTE).all()):
                raise AssertionError(
                    f"rank {batch.rank} wrote a buffer before its receive from rank {peer} was complete ({batch.awaited})"
                )
            if message.ready:
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(message.ready[0])
                staged.record_stream(stream)
            tensor.copy_(staged)
            message.staged.clear()


class ThreadCommunicator:
    """One rank of `run_ranks`; see `Communicator` for the methods."""

    def __init__(self, exchange: _Exchange, rank: int, lanes: int) -> None:
        self.exchange = exchange
        self.rank, self.world, self.lanes, self.timeout = rank, exchange.world, lanes, exchange.timeout
        self.unwaited: set[_Batch] = set()
        self._turn = 0

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Awaited) -> Pending:
        assert_batch(self, lane, sends, receives)
        batch = _Batch(self.rank, lane, awaited)
        for peer, tensor in sends:
            staged = tensor.detach().clone()
            message = _Message(tensor, [staged], _events(staged))
            batch.sends.append((peer, message))
            batch.open.setdefault((True, peer), deque()).append(message)
        for peer, tensor in receives:
            tensor.fill_(GARBAGE_BYTE)
            message = _Message(tensor, [], [])
            batch.receives.append((peer, message))
            batch.open.setdefault((False, peer), deque()).append(message)
        self.unwaited.add(batch)
        self.exchange.add(batch)
        return _ThreadPending(self, batch)

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        return self._gather("all_gather_bytes", bytes(payload))

    def all_gather_rows(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        assert len(rows) == self.world and rows[self.rank] == x.shape[0], f"rows {list(rows)}, tensor {list(x.shape)}"
        return self._gather_tensors(f"all_gather_rows {list(rows)} x {list(x.shape[1:])} {x.dtype}", x)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        parts = self._gather_tensors(f"all_reduce_sum {list(x.shape)} {x.dtype}", x)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def report(self, where: Awaited | str) -> None:
        self.exchange.places[self.rank] = where

    def fail(self, error: BaseException) -> None:
        self.exchange.fail(self.rank, error)

    def scrub(self, released: Tensor) -> None:
        with torch.no_grad():
            released.fill_(GARBAGE.get(released.dtype, 6.2e16))

    def close(self) -> None:
        pass

    def _gather(self, name: str, value: Any) -> list[Any]:
        self._turn += 1
        return self.exchange.gather(self.rank, self._turn - 1, name, value)

    def _gather_tensors(self, name: str, x: Tensor) -> list[Tensor]:
        # Copied by the giver and by every taker: nobody shares memory, and the giver may go on at once.
        given = x.detach().contiguous().clone()
        parts = self._gather(name, (given, _events(given)))
        for part, ready in parts:
            if ready:
                stream = torch.cuda.current_stream(part.device)
                stream.wait_event(ready[0])
                part.record_stream(stream)
        return [part.clone() for part, _ in parts]


def _events(tensor: Tensor) -> list[torch.cuda.Event]:
    """On CUDA an event after the work queued so far: the tensor is ready there. Nothing on CPU."""
    if tensor.device.type != "cuda":
        return []
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return [event]


def run_ranks(
    world: int,
    fn: Callable[[ThreadCommunicator], Any],
    timeout: float = 60.0,
    lanes: int = LANES,
    gate: Gate | None = None,
    device: torch.device | str = "cpu",
) -> list[Any]:
    """Run `fn(communicator)` on `world` threads, one a rank, and return the results in rank order.

    Backward passes run in the thread that calls them. On CUDA every rank works on a stream of its own.

    Args:
        timeout: seconds that one wait may last.
        gate: called with (src, dst, lane, number of the message from src to dst on that lane) before a message is handed over;
            False holds the message, and the gate is asked again while anybody waits. It is called under the lock of the carrier:
            it must return at once and not communicate. Messages that it holds for ever end in the timeout.

    Raises:
        PeerError: a rank waited in vain; says for every rank what it waits for.
        Exception: the first that a rank raised, its message prefixed with the rank. The other ranks are stopped at their next
            communication.
    """
    exchange = _Exchange(world, lanes, timeout, gate)
    results: list[Any] = [None] * world
    device = torch.device(device)
    streams = [torch.cuda.Stream(device) for _ in range(world)] if device.type == "cuda" else [None] * world
    for stream in streams:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))

    def work(rank: int) -> None:
        communicator = ThreadCommunicator(exchange, rank, lanes)
        try:
            with torch.autograd.set_multithreading_enabled(False), torch.cuda.stream(streams[rank]):
                results[rank] = fn(communicator)
            left = [batch.describe() for batch in communicator.unwaited]
            assert not left, f"returned without waiting for its batch {left[0]}"
            exchange.finish(rank)
        except BaseException as error:
            exchange.fail(rank, error)

    threads = [Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and exchange.first_failure is None:
            thread.join(0.05)
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if exchange.first_failure is not None:
        raise _named(*exchange.first_failure, world)
    for stream in streams:
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
    return results


def _named(rank: int, error: BaseException, world: int) -> BaseException:
    """The same error, saying which rank it comes from."""
    if not isinstance(error, PeerError) and error.args and isinstance(error.args[0], str):
        error.args = (f"rank {rank} of {world}: {error.args[0]}", *error.args[1:])
    return error
