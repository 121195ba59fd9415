"""Nothing hangs without a word: every rank publishes where it is, and an error names the rank that is late.

The hot path only assigns attributes of `Watch`. A daemon thread publishes them to the store of the process group, a few times
a second at most, and it alone talks to the store: a store that is gone, or whose host is, costs an error its details, never
the error itself.

Whose fault is it? A rank that waits is not late, but the rank that it waits for may be: who waits for whom is followed from the
awaited rank on, until a rank is found that does not wait. Heartbeats tell late from dead: they go on while a rank computes
or sleeps, and stop with its process.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import Empty, Queue
from typing import Any

import torch.distributed as dist

from distattn.parallel.comm import Awaited, PeerError

STORE_SECONDS = 2.0  # how long an operation on the store may take before the store counts as gone
BEATS = 3  # a rank without a heartbeat for so many intervals is dead
LINES = 32  # the most peers that one error describes

Record = dict[str, Any]


class Watch:
    """Publishes where this rank is, and explains why a wait failed.

    Args:
        store: shared by the ranks of one communicator, and by nobody else.
        interval: seconds between two heartbeats; by default longer in large worlds, to spare the store.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, interval: float | None = None) -> None:
        self.rank, self.world = rank, world
        self.interval = 0.4 + world / 512 if interval is None else interval
        self.place: Awaited | str = "nothing reported"
        self.since = time.monotonic()
        self.waiting_for: tuple[int, ...] = ()
        self.failure: PeerError | None = None  # found by a check, for the rank to raise at its next call
        self.checks: list[Callable[[], None]] = []  # called at every heartbeat
        self._store = store
        self._beat = 0
        self._failed = ""
        self._lost = ""
        self._stop = threading.Event()
        self._requests: Queue[tuple[Callable[[], Any], Queue[Any]]] = Queue()
        self._publish()
        self._thread = threading.Thread(target=self._run, name=f"distattn watch of rank {rank}", daemon=True)
        self._thread.start()
        # A daemon thread that is inside the store while the interpreter goes away aborts the process.
        atexit.register(self.close)

    def report(self, place: Awaited | str) -> None:
        self.place = place
        self.since = time.monotonic()

    def explain(self, awaited: Awaited, peers: Sequence[int], what: str, cause: str) -> PeerError:
        """The error for a wait that failed. Takes some heartbeats, in which the peers may show that they live.

        Args:
            peers: the ranks that were waited for.
            what: "waited 5 s to receive 64 bytes from rank 1".
            cause: what the carrier said.
        """
        self.waiting_for = tuple(peers)
        head = f"rank {self.rank}: {awaited}: {what}. {cause}"
        silence = self.publish_failure(head)
        records, first = {}, None
        if not silence:
            before = self._ask(self._read)
            self._pause(BEATS * self.interval)
            answer = self._ask(lambda: (self._read(), self._first()))
            if isinstance(before, str) or isinstance(answer, str):
                silence = before if isinstance(before, str) else answer
            else:
                records, first = answer
                for peer, record in records.items():
                    alive = peer not in before or before[peer]["beat"] != record["beat"]
                    record["dead"] = not (alive or record["failed"] or record["closed"])
        if silence:
            late = sorted(set(peers))
            text = f"{head}\nWhere the other ranks are is not known: {silence}"
        else:
            late = suspects(records, self.rank, peers, first)
            text = "\n".join([head, *describe(records, self.rank, late, first)])
        blamed = [peer for peer in peers if peer in late] or list(peers)
        return PeerError(text, self.rank, blamed[0] if blamed else None, awaited, late)

    def publish_failure(self, text: str) -> str:
        """Tell the peers that this rank gives up; the first to do so is named in everybody's errors. Returns why it could not."""
        if self._failed:
            return self._lost
        self._failed = text
        return self._ask(self._publish_failure) or ""

    def close(self) -> None:
        """Say goodbye and stop."""
        if not self._stop.is_set():
            self._stop.set()
            self._requests.put((lambda: None, Queue()))
            self._thread.join(STORE_SECONDS)
            atexit.unregister(self.close)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """What the monitor thread answers, or a string that says why there is no answer."""
        if self._lost:
            return self._lost
        if threading.current_thread() is self._thread:
            return self._answer(question)
        answers: Queue[Any] = Queue()
        self._requests.put((question, answers))
        try:
            return answers.get(timeout=STORE_SECONDS)
        except Empty:
            return f"the store did not answer within {STORE_SECONDS:g} s."

    def _answer(self, question: Callable[[], Any]) -> Any:
        try:
            return self._lost or question()
        except Exception as error:
            # Once is enough: another try would not mend it, and torch prints a trace for each.
            self._lost = f"the store is gone ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})."
            return self._lost

    def _pause(self, seconds: float) -> None:
        """Sleep, and go on publishing where this is the monitor thread."""
        if threading.current_thread() is not self._thread:
            time.sleep(seconds)
            return
        for _ in range(BEATS):
            time.sleep(seconds / BEATS)
            self._answer(self._publish)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                question, answers = self._requests.get(timeout=self.interval)
                answers.put(self._answer(question))
            except Empty:
                for check in self.checks:
                    check()
            self._answer(self._publish)

    def _publish(self) -> None:
        self._beat += 1
        record = {
            "beat": self._beat,
            "time": time.time(),
            "place": str(self.place),
            "seconds": time.monotonic() - self.since,
            "waiting_for": self.waiting_for,
            "failed": self._failed,
            "closed": self._stop.is_set(),
            "dead": False,
        }
        self._store.set(f"{self.rank}", json.dumps(record))

    def _publish_failure(self) -> None:
        # A counter decides who is first: not every kind of store compares and sets.
        if self._store.add("failures", 1) == 1:
            self._store.set("first", json.dumps({"rank": self.rank, "time": time.time(), "text": self._failed}))
        self._publish()

    def _read(self) -> dict[int, Record]:
        """What every peer published last."""
        peers = [peer for peer in range(self.world) if peer != self.rank]
        if not self._store.check([f"{peer}" for peer in peers]):
            peers = [peer for peer in peers if self._store.check([f"{peer}"])]
        values = self._store.multi_get([f"{peer}" for peer in peers])
        return {peer: json.loads(value) for peer, value in zip(peers, values, strict=True)}

    def _first(self) -> Record | None:
        return json.loads(self._store.get("first")) if self._store.check(["first"]) else None


def open_store(name: str) -> dist.Store:
    """A connection of one's own to the store of the default group, so that nobody else's long wait blocks it."""
    store = dist.distributed_c10d._get_default_store()
    if hasattr(store, "clone"):  # not in older torch
        store = store.clone()
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
    return dist.PrefixStore(f"distattn/{name}", store)


def suspects(records: dict[int, Record], rank: int, peers: Sequence[int], first: Record | None) -> list[int]:
    """The ranks to blame, in order: the dead, the first to fail if not for waiting, and whoever keeps `peers` from answering."""
    late = {other for other, record in records.items() if record["dead"]}
    if first is not None and first["rank"] in records and not records[first["rank"]]["waiting_for"]:
        late.add(first["rank"])
    return sorted(late | _roots(records, rank, peers))


def _roots(records: dict[int, Record], rank: int, peers: Sequence[int]) -> set[int]:
    """Who waits for whom, followed to the ranks that do not wait. A circle is to blame as a whole, `rank` too."""
    seen: set[int] = {rank}
    roots: set[int] = set()
    ahead = list(peers)
    while ahead:
        peer = ahead.pop()
        if peer in seen:
            continue
        seen.add(peer)
        record = records.get(peer)
        if record is None or record["dead"] or not record["waiting_for"]:
            roots.add(peer)
        else:
            ahead.extend(record["waiting_for"])
    return roots or seen


def describe(records: dict[int, Record], rank: int, late: Sequence[int], first: Record | None) -> list[str]:
    """Lines that say who is late, what failed first, and where every peer is."""
    lines = [f"Dead or late: {_ranks(late)}."] if late else []
    if first is not None and first["rank"] != rank:
        lines.append(f"First failure ({_age(first)}): {first['text']}")
    peers = [*late, *(peer for peer in sorted(records) if peer not in late)]
    for peer in peers[:LINES]:
        where = _where(records[peer]) if peer in records else "this rank" if peer == rank else "never heard of"
        lines.append(f"  rank {peer}: {where}")
    if len(peers) > LINES:
        lines.append(f"  and {len(peers) - LINES} more ranks")
    return lines


def _where(record: Record) -> str:
    text = f"in {record['place']} for {record['seconds']:.1f} s"
    if record["waiting_for"]:
        text += f", waiting for {_ranks(record['waiting_for'])}"
    if record["dead"]:
        return f"DEAD or cut off: its last heartbeat came {_age(record)}, {text}"
    if record["failed"]:
        return f"has given up {text}"
    if record["closed"]:
        return f"has left ({_age(record)})"
    return f"alive ({_age(record)}), {text}"


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def _age(record: Record) -> str:
    # By the clocks of two hosts, which may differ; nothing is decided by it.
    return f"{max(0.0, time.time() - record['time']):.1f} s ago"


def complain(error: PeerError) -> None:
    """Print an error that the monitor thread found: the rank may be stuck where no exception reaches it."""
    print(f"distattn: {error}", file=sys.stderr, flush=True)
