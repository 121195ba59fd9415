"""Who is blamed, what the error says, and what happens when the store is of no help."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distattn.parallel import comm_process, watch
from distattn.parallel.comm import Awaited, PeerError
from distattn.parallel.watch import Watch, describe, suspects

INTERVAL = 0.2  # seconds between heartbeats: on a busy machine a thread must not miss three of them
AWAITED = Awaited("backward", 3, 8, "dkv of rank 1", call=7)


def record(waiting_for: tuple[int, ...] = (), dead: bool = False, failed: str = "", closed: bool = False) -> dict[str, Any]:
    return {
        "beat": 1,
        "time": time.time(),
        "place": "forward",
        "seconds": 2.0,
        "waiting_for": list(waiting_for),
        "failed": failed,
        "closed": closed,
        "dead": dead,
    }


@pytest.mark.parametrize(
    ("records", "blamed"),
    [
        ({1: record()}, [1]),
        ({1: record((2,)), 2: record((3,)), 3: record()}, [3]),
        ({1: record((2,)), 2: record((3,)), 3: record((2,), dead=True)}, [3]),
        ({1: record((2,)), 2: record((0,))}, [0, 1, 2]),  # a circle
        ({1: record((2, 3)), 2: record((3,)), 3: record(), 4: record()}, [3]),
        ({1: record((2,)), 2: record((1,), failed="gave up"), 4: record(dead=True)}, [0, 1, 2, 4]),
        ({}, [1]),  # never heard of
    ],
)
def test_waiting_ranks_are_followed_to_the_one_that_does_not_wait(records: dict[int, Any], blamed: list[int]) -> None:
    assert suspects(records, 0, [1], None) == blamed


def test_first_failure_is_blamed_unless_it_was_a_wait() -> None:
    records = {1: record((2,)), 2: record(), 3: record(failed="ValueError"), 4: record((2,), failed="late")}
    assert suspects(records, 0, [1], {"rank": 3}) == [2, 3]
    assert suspects(records, 0, [1], {"rank": 4}) == [2]
    assert suspects(records, 0, [1], {"rank": 0}) == [2]


def test_description_of_many_ranks_is_short_and_starts_with_the_late() -> None:
    records = {rank: record((99,)) for rank in range(1, 200)} | {150: record(closed=True)}
    lines = describe(records, 0, [150], {"rank": 5, "time": time.time(), "text": "rank 5: ValueError: odd"})
    assert lines[0] == "Dead or late: rank 150." and "rank 5: ValueError: odd" in lines[1]
    assert lines[2].startswith("  rank 150: has left") and lines[-1].startswith("  and 167 more") and len(lines) == 35


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def pair() -> Iterator[list[Watch]]:
    store = dist.HashStore()
    watches = [Watch(store, rank, 2, INTERVAL) for rank in range(2)]
    yield watches
    for one in watches:
        one.close()


def test_watch_sees_where_its_peer_is(pair: list[Watch]) -> None:
    pair[1].report(Awaited("forward", 2, 8, "kv rows [0, 512) of rank 1", call=6))
    until(lambda: "kv rows" in pair[0]._read()[1]["place"])
    error = pair[0].explain(AWAITED, [1], "waited 5.0 s for 64 bytes", "Timed out.")
    text = str(error)
    assert text.startswith(
        "rank 0: backward pass 7, boundary 3 of 8 stages: dkv of rank 1: waited 5.0 s for 64 bytes. Timed out."
    )
    assert "rank 1: alive" in text and "in forward pass 6, boundary 2 of 8 stages: kv rows [0, 512) of rank 1 for" in text
    assert (error.rank, error.peer, error.awaited, error.late) == (0, 1, AWAITED, [1])
    error = pair[1].explain(AWAITED, [0], "waited 5.1 s for 32 bytes", "Timed out.")
    assert "Dead or late: rank 0, rank 1." in str(error) and "rank 1: this rank" in str(error), "they wait for each other"
    assert "First failure" in str(error) and "waited 5.0 s for 64 bytes" in str(error) and "rank 0: has given up in" in str(error)


def test_peer_that_has_closed_is_not_dead(pair: list[Watch]) -> None:
    pair[1].close()
    error = pair[0].explain(AWAITED, [1], "waited", "Connection closed.")
    assert "rank 1: has left" in str(error) and "DEAD" not in str(error) and error.late == [1]


class HungStore:
    """A store whose host has gone without a word: after the first operation nothing returns."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.operations = 0

    def set(self, key: str, value: str) -> None:
        self.operations += 1
        if self.operations > 1:
            self.free.wait()


def test_store_that_hangs_delays_the_error_but_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STORE_SECONDS", 0.3)
    store = HungStore()
    lonely = Watch(store, 0, 2, INTERVAL)  # type: ignore[arg-type]
    until(lambda: store.operations > 1)
    started = time.monotonic()
    error = lonely.explain(AWAITED, [1], "waited 5.0 s for 64 bytes", "Timed out.")
    lonely.close()
    assert time.monotonic() - started < 5
    assert "Timed out.\nWhere the other ranks are is not known: the store did not answer" in str(error) and error.late == [1]
    store.free.set()


class FakeWork:
    done = False

    def is_completed(self) -> bool:
        return self.done


class FakeEvent:
    done = False

    def query(self) -> bool:
        return self.done


def test_monitor_finds_the_batch_that_the_device_waits_for(
    pair: list[Watch], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock of a batch starts when its inputs are ready and it is the oldest of its lane: the host runs ahead for long."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    flights = comm_process._Flights(pair[0], lanes=2, timeout=0.4)
    works, ready = [FakeWork() for _ in range(2)], [FakeEvent() for _ in range(2)]
    for work, event in zip(works, ready, strict=True):
        flights.lanes[1].append(comm_process._Flight([work], event, AWAITED, (1,)))  # type: ignore[list-item, arg-type]
    pair[0].checks.append(flights.check)
    time.sleep(0.6)
    assert pair[0].failure is None, "the inputs of the first batch are not ready: nobody is late"
    ready[0].done = works[0].done = True
    until(lambda: len(flights.lanes[1]) == 1)
    time.sleep(0.6)
    assert pair[0].failure is None, "the inputs of the second batch are not ready either"
    ready[1].done = True
    until(lambda: pair[0].failure is not None)
    assert pair[0].failure is not None and pair[0].failure.late == [1]
    printed = ""

    def complained() -> bool:
        nonlocal printed
        printed += capsys.readouterr().err
        return "waited" in printed

    until(complained)
    assert printed.startswith("distattn: rank 0: backward pass 7, boundary 3 of 8 stages: dkv of rank 1: waited 0.")
    with pytest.raises(PeerError, match="on lane 1 for a batch with ranks"):
        comm_process._NcclPending(pair[0], []).wait()
