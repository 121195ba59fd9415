"""Messages between processes over gloo, among ranks that meet in any store: a process group of torch is not needed.

Every lane is a gloo group of its own and control messages have another; torch's registry knows none of them. All communication is
point to point, also in gathers: sizes may differ without padding, and every wait has a peer to name. `wait` blocks the host,
for at most `timeout`. After a timeout, or a connection that broke, the groups are of no use any more: make new ones.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.parallel.comm import LANES, Awaited, Done, PeerError, Pending, assert_batch

SETUP_SECONDS = 300.0  # ranks reach the construction minutes apart: one may still load data or compile
FRAME = 56  # payloads of at most this many bytes are gathered in one exchange, with their sizes
CUT_TAG = 1  # messages of plans have tag 0

Messages = list[tuple[int, Tensor]]


class Witness(Protocol):
    """Who knows where the ranks are, and says so when a wait fails: `watch.Watch`, or an epoch of a pool."""

    failure: PeerError | None
    waiting_for: tuple[int, ...]

    def report(self, place: Awaited | str) -> None: ...

    def explain(self, awaited: Awaited, peers: Sequence[int], what: str, cause: str) -> PeerError: ...

    def publish_failure(self, text: str) -> str: ...

    def close(self) -> None: ...


class GlooCommunicator:
    """One rank of `world` that meet in a store; see `Communicator` for the methods. Creating one is a collective of all.

    Args:
        store: where the ranks meet; a prefix that no other groups have used.
        lanes: groups that carry messages independently.
        timeout: seconds that one wait may last.
        setup_seconds: how long the others may take to come.
        members: how errors name the ranks, where they are ranks of something larger.

    Raises:
        PeerError: a peer does not take part in the construction.
    """

    backend = "gloo"

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        watch: Witness,
        lanes: int = LANES,
        timeout: float = 600.0,
        setup_seconds: float = SETUP_SECONDS,
        members: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.world, self.lanes, self.timeout = rank, world, lanes, timeout
        self._watch, self._members, self._setup_seconds = watch, list(members or range(world)), setup_seconds
        self._gave_up: PeerError | None = None
        self._control: Any = self._gloo_group(store, "control")
        self._groups: list[Any] = [self._gloo_group(store, f"lane {lane}") for lane in range(lanes)]

    def post(self, lane: int, sends: Messages, receives: Messages, awaited: Awaited) -> Pending:
        self._check_post(lane, sends, receives)
        if not sends and not receives:
            return Done()
        return self._post_gloo(self._groups[lane], f"lane {lane}", sends, receives, awaited)

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
        self._groups = []  # they end with their last reference

    def cut(self) -> None:
        """Ends the connections, so that every wait of this rank and of its peers fails now. Any thread may call it.

        gloo offers no other way: `abort` and `shutdown` leave waits alone, but a wait that times out closes its whole group.
        """
        for group in filter(None, (self._control, *self._groups) if self.world > 1 else ()):
            with suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8)
                group.recv([nothing], (self.rank + 1) % self.world, CUT_TAG).wait(timedelta(milliseconds=1))

    def _check_post(self, lane: int, sends: Messages, receives: Messages) -> None:
        assert_batch(self, lane, sends, receives)
        failure = self._gave_up or self._watch.failure
        if failure is not None:
            raise failure

    def _gloo_group(self, store: dist.Store, purpose: str) -> dist.ProcessGroupGloo:
        """A group that torch's registry does not know: its names depend on how many other groups a rank is in."""
        patience = timedelta(seconds=self._setup_seconds)
        try:
            return dist.ProcessGroupGloo(dist.PrefixStore(purpose, store), self.rank, self.world, patience)
        except RuntimeError as error:
            raise self._nobody_came("gloo", self._setup_seconds, error) from error

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


class _Message(NamedTuple):
    work: dist.Work
    is_send: bool
    peer: int
    tensor: Tensor


class _GlooPending:
    def __init__(self, watch: Witness, timeout: float, lane: str, awaited: Awaited, messages: list[_Message]) -> None:
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


def _tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)


def _errand(is_send: bool, peer: int, tensor: Tensor) -> str:
    return f"{tensor.numel()} bytes to be {f'taken by rank {peer}' if is_send else f'received from rank {peer}'}"


def _cause(error: BaseException) -> str:
    """The first sentence of what the carrier said, without the place in its source. The others are the same for every error."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", (str(error).splitlines() or [""])[0])
    return text.split(". ")[0].rstrip(".") + "."
