"""Ranks as threads: right when the rules are kept, and loud when they are not."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distattn.parallel.comm import Awaited, Communicator, PeerError, SoloCommunicator
from distattn.parallel.comm_threads import GARBAGE_BYTE, run_ranks


def message(value: int, size: int) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def at(boundary: int, detail: str = "") -> Awaited:
    return Awaited("forward", boundary, 8, detail, call=1)


def ring(comm: Communicator, hops: int, size: int) -> list[int]:
    """Pass a message round the ring; the first byte of what came in at each hop."""
    seen = []
    held = message(comm.rank, size)
    for hop in range(hops):
        taken = torch.empty(size, dtype=torch.uint8)
        comm.report(at(hop))
        comm.post(0, [((comm.rank + 1) % comm.world, held)], [((comm.rank - 1) % comm.world, taken)], at(hop)).wait()
        held = taken
        seen.append(int(taken[0]))
    return seen


@pytest.mark.parametrize("world", [2, 8, 64])
def test_ring_brings_every_rank_every_message(world: int) -> None:
    results = run_ranks(world, lambda comm: ring(comm, world - 1, 16), timeout=20)
    for rank, seen in enumerate(results):
        assert seen == [(rank - hop) % world for hop in range(1, world)]


def test_both_carriers_speak_the_protocol() -> None:
    assert isinstance(SoloCommunicator(), Communicator)
    assert run_ranks(1, lambda comm: isinstance(comm, Communicator)) == [True]


def test_lanes_are_independent() -> None:
    """Posted on lanes in opposite orders, waited in opposite orders: no rank blocks another."""

    def work(comm: Communicator) -> list[int]:
        peer = 1 - comm.rank
        lanes = [0, 1, 2] if comm.rank == 0 else [2, 1, 0]
        buffers = {lane: torch.empty(4 + lane, dtype=torch.uint8) for lane in lanes}
        pending = [
            comm.post(lane, [(peer, message(10 * comm.rank + lane, 4 + lane))], [(peer, buffers[lane])], at(0)) for lane in lanes
        ]
        for batch in pending:
            batch.wait()
        return [int(buffers[lane][0]) for lane in range(3)]

    assert run_ranks(2, work, timeout=5) == [[10, 11, 12], [0, 1, 2]]


def test_several_messages_to_one_peer_keep_their_order() -> None:
    def work(comm: Communicator) -> list[int]:
        peer = 1 - comm.rank
        taken = [torch.empty(size, dtype=torch.uint8) for size in (3, 5, 3)]
        given = [(peer, message(index, tensor.numel())) for index, tensor in enumerate(taken)]
        comm.post(0, given, [(peer, tensor) for tensor in taken], at(0)).wait()
        return [int(tensor[0]) for tensor in taken]

    assert run_ranks(2, work) == [[0, 1, 2]] * 2


def test_orders_that_differ_are_found_by_size() -> None:
    def work(comm: Communicator) -> None:
        sizes = [8, 16] if comm.rank == 0 else [16, 8]
        if comm.rank == 0:
            batches = [comm.post(0, [(1, message(0, size))], [], at(0, "kv")) for size in sizes]
        else:
            batches = [comm.post(0, [], [(0, torch.empty(size, dtype=torch.uint8))], at(1, "q")) for size in sizes]
        for batch in batches:
            batch.wait()

    with pytest.raises(PeerError, match=r"rank 0 sends 8 bytes to rank 1 on lane 0 .*boundary 0.*rank 1 expects 16 .*boundary 1"):
        run_ranks(2, work, timeout=5)


def test_send_without_receive_names_both_ends_at_once() -> None:
    def work(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.post(1, [(2, message(0, 8))], [], at(3, "partial of rank 0")).wait()

    started = time.monotonic()
    with pytest.raises(PeerError) as caught:
        run_ranks(3, work, timeout=30)
    assert time.monotonic() - started < 5, "no rank can go on: need not wait for the timeout"
    text = str(caught.value)
    assert "rank 0 will wait for ever: no rank can go on to send 8 bytes to rank 2 (lane 1; forward pass 1, boundary 3" in text
    assert "partial of rank 0" in text and "rank 2 has finished" in text
    assert (caught.value.rank, caught.value.peer, caught.value.late) == (0, 2, [1, 2])


def test_circle_of_batches_is_a_deadlock_although_every_pair_is_in_order() -> None:
    """Receive before send on all ranks: batches of one lane are served one after the other, as NCCL does."""

    def work(comm: Communicator) -> None:
        left, right = (comm.rank - 1) % comm.world, (comm.rank + 1) % comm.world
        first = comm.post(0, [], [(left, torch.empty(4, dtype=torch.uint8))], at(0))
        second = comm.post(0, [(right, message(0, 4))], [], at(1))
        second.wait()
        first.wait()

    with pytest.raises(PeerError) as caught:
        run_ranks(3, work, timeout=30)
    for rank in range(3):
        assert f"rank {rank} waits to send 4 bytes to rank {(rank + 1) % 3}" in str(caught.value)
    assert "behind its earlier batch to receive 4 bytes from rank 2" in str(caught.value)


def test_late_rank_is_named_at_the_timeout() -> None:
    errors: dict[int, PeerError] = {}

    def work(comm: Communicator) -> None:
        comm.report(at(comm.rank))
        if comm.rank == 2:
            time.sleep(0.9)
        try:
            ring(comm, 3, 8)
        except PeerError as error:
            errors[comm.rank] = error
            raise

    with pytest.raises(PeerError) as caught:
        run_ranks(4, work, timeout=0.5)
    assert caught.value.late == [2] and "rank 2 is working, last reported: forward pass 1, boundary 2" in str(caught.value)
    assert sorted(errors) == [0, 1, 2, 3]


def test_exception_of_one_rank_stops_the_others_and_is_raised() -> None:
    stopped = []

    def work(comm: Communicator) -> None:
        if comm.rank == 1:
            raise ValueError("no such mask")
        try:
            ring(comm, 2, 8)
        except PeerError as error:
            stopped.append(str(error))
            raise

    started = time.monotonic()
    with pytest.raises(ValueError, match="rank 1 of 3: no such mask"):
        run_ranks(3, work, timeout=30)
    assert time.monotonic() - started < 5
    assert len(stopped) == 2 and all("because rank 1 failed: ValueError" in text for text in stopped)


def test_receiver_owns_its_copy() -> None:
    def work(comm: Communicator) -> int:
        given, taken = message(7, 8), torch.empty(8, dtype=torch.uint8)
        if comm.rank == 0:
            comm.post(0, [(1, given)], [], at(0)).wait()
            given.fill_(99)
            comm.scrub(given)
            comm.all_gather_bytes(b"")
            return int(given[0])
        comm.post(0, [], [(0, taken)], at(0)).wait()
        comm.all_gather_bytes(b"")
        return int(taken[0])

    assert run_ranks(2, work) == [GARBAGE_BYTE, 7]


def test_reading_a_receive_buffer_early_reads_garbage_even_when_the_message_has_come() -> None:
    def work(comm: Communicator) -> tuple[int, int]:
        peer = 1 - comm.rank
        taken = message(1, 8)
        batch = comm.post(0, [(peer, message(5, 8))], [(peer, taken)], at(0))
        comm.all_gather_bytes(b"both have posted")
        early = int(taken[0])
        batch.wait()
        batch.wait()
        return early, int(taken[0])

    assert run_ranks(2, work) == [(GARBAGE_BYTE, 5)] * 2


@pytest.mark.parametrize("side", ["send", "receive"])
def test_touching_a_buffer_in_flight_is_an_error(side: str) -> None:
    def work(comm: Communicator) -> None:
        peer = 1 - comm.rank
        given, taken = message(5, 8), message(0, 8)
        batch = comm.post(0, [(peer, given)], [(peer, taken)], at(0))
        if comm.rank == 1:
            (given if side == "send" else taken)[3] = 0
        batch.wait()

    with pytest.raises(AssertionError, match=rf"rank 1 of 2: rank 1 .*buffer before its {side} (to|from) rank 0"):
        run_ranks(2, work, timeout=5)


def test_forgetting_to_wait_is_an_error() -> None:
    def work(comm: Communicator) -> None:
        peer = 1 - comm.rank
        comm.post(0, [(peer, message(0, 8))], [(peer, message(0, 8))], at(2))

    with pytest.raises(AssertionError, match="returned without waiting for its batch"):
        run_ranks(2, work, timeout=5)


def test_gate_withholds_messages_until_the_test_lets_them_go() -> None:
    launched = threading.Event()
    asked = []

    def gate(src: int, dst: int, lane: int, number: int) -> bool:
        asked.append((src, dst, lane, number))
        return number == 0 or launched.is_set()

    def work(comm: Communicator) -> str:
        peer = 1 - comm.rank
        batches = [comm.post(0, [(peer, message(t, 8))], [(peer, message(0, 8))], at(t)) for t in range(2)]
        batches[0].wait()
        launched.set()
        batches[1].wait()
        return "done"

    assert run_ranks(2, work, gate=gate, timeout=5) == ["done"] * 2
    assert {(0, 1, 0, 0), (1, 0, 0, 1)} <= set(asked)
    with pytest.raises(PeerError, match=r"waited 0.3 s to send 8 bytes"):
        run_ranks(2, work, gate=lambda src, dst, lane, number: False, timeout=0.3)


def test_gathers_and_sum() -> None:
    rows = [3, 0, 2, 1]

    def work(comm: Communicator) -> tuple[list[bytes], list[torch.Tensor], torch.Tensor]:
        x = torch.full((rows[comm.rank], 2), float(comm.rank), dtype=torch.bfloat16)
        parts = comm.all_gather_rows(x, rows)
        x.fill_(50.0)
        parts[0].fill_(comm.rank)  # one's own copy
        total = comm.all_reduce_sum(torch.tensor([1e8, 1.0, -1e8, 1.0])[comm.rank].reshape(1))
        return comm.all_gather_bytes(bytes([comm.rank] * comm.rank)), parts, total

    for rank, (payloads, parts, total) in enumerate(run_ranks(4, work)):
        assert payloads == [b"", b"\1", b"\2\2", b"\3\3\3"]
        assert [list(part.shape) for part in parts] == [[n, 2] for n in rows]
        assert parts[2].dtype == torch.bfloat16 and bool((parts[2] == 2).all()) and bool((parts[0] == rank).all())
        expected = ((torch.tensor(1e8) + 1.0) + -1e8) + 1.0
        assert torch.equal(total, expected.reshape(1)), "added in rank order"


def test_different_collectives_are_named() -> None:
    def work(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.all_gather_bytes(b"")
        else:
            comm.all_reduce_sum(torch.zeros(2))

    with pytest.raises(PeerError, match=r"calls all_(reduce_sum|gather_bytes).* where rank \d calls all_"):
        run_ranks(2, work, timeout=5)


def test_backward_runs_in_the_rank_s_own_thread() -> None:
    class Where(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # noqa: ANN001, ANN205
            return x * 2

        @staticmethod
        def backward(ctx, dout):  # noqa: ANN001, ANN205
            seen.add((threading.current_thread().name, threading.get_ident()))
            return dout * 2

    seen: set[tuple[str, int]] = set()

    def work(comm: Communicator) -> tuple[str, int]:
        x = torch.ones(2, requires_grad=True)
        Where.apply(x).sum().backward()
        return threading.current_thread().name, threading.get_ident()

    assert set(run_ranks(4, work)) == seen
