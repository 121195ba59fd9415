"""Ranks as processes over gloo: right results, and errors that name the rank at fault when one dies or stalls."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distattn.parallel.comm import Awaited, Communicator, PeerError
from distattn.parallel.comm_process import ProcessCommunicator
from tests.workers import Outcome, Pool

TIMEOUT = 3.0  # seconds that a wait may last in these tests
MARGIN = 10.0  # for heartbeats, and for machines that do other things


def at(boundary: int, detail: str = "") -> Awaited:
    return Awaited("forward", boundary, 4, detail, call=1)


def ring(comm: Communicator, hops: int, size: int = 1000, before: Callable[[int], None] | None = None) -> list[int]:
    """Pass a message round the ring on lane hop % lanes; the first byte of what came in at each hop."""
    held = torch.full((size,), comm.rank, dtype=torch.uint8)
    left, right = (comm.rank - 1) % comm.world, (comm.rank + 1) % comm.world
    seen = []
    for hop in range(hops):
        where = at(hop, f"kv rows of rank {(comm.rank - hop - 1) % comm.world}")
        comm.report(where)
        if before is not None:
            before(hop)
        taken = torch.empty_like(held)
        comm.post(hop % comm.lanes, [(right, held)], [(left, taken)], where).wait()
        held = taken
        seen.append(int(held[-1]))
    return seen


def everything(rank: int, world: int) -> None:
    comm = ProcessCommunicator(timeout=60.0)
    assert isinstance(comm, Communicator) and (comm.rank, comm.world, comm.backend) == (rank, world, "gloo")
    assert ring(comm, world - 1) == [(rank - hop) % world for hop in range(1, world)]
    comm.post(0, [], [], at(0)).wait()
    check_lanes(comm)
    check_gathers(comm)
    comm.close()
    comm.close()


def check_lanes(comm: Communicator) -> None:
    """Posted and waited in opposite orders on two ranks, with several messages for one peer."""
    peer = comm.rank ^ 1
    lanes = [0, 1, 2] if comm.rank < peer else [2, 1, 0]
    taken = {lane: [torch.empty(lane + index + 1, dtype=torch.uint8) for index in range(2)] for lane in lanes}
    pending = []
    for lane in lanes:
        given = [torch.full((lane + index + 1,), 10 * lane + index, dtype=torch.uint8) for index in range(2)]
        pending.append(comm.post(lane, [(peer, x) for x in given], [(peer, x) for x in taken[lane]], at(0)))
    for batch in pending:
        batch.wait()
        batch.wait()
    assert all(bool((taken[lane][index] == 10 * lane + index).all()) for lane in lanes for index in range(2))


def check_gathers(comm: Communicator) -> None:
    for length in (1, 40):  # short enough to travel with their sizes, and not all of them
        assert comm.all_gather_bytes(bytes([comm.rank]) * length * comm.rank) == [
            bytes([rank]) * length * rank for rank in range(comm.world)
        ]
    rows = [3, 0, 5, 1][: comm.world]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        parts = comm.all_gather_rows(torch.full((rows[comm.rank], 2, 3), comm.rank, dtype=dtype), rows)
        assert [list(part.shape) for part in parts] == [[n, 2, 3] for n in rows]
        assert all(part.dtype == dtype and bool((part == rank).all()) for rank, part in enumerate(parts))
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])[: comm.world]
    expected = values[0].clone()
    for value in values[1:]:
        expected += value
    assert torch.equal(comm.all_reduce_sum(values[comm.rank]), expected), "added in rank order"
    assert comm.all_reduce_sum(torch.full((2, 2), 0.5, dtype=torch.float64)).tolist() == [[comm.world / 2] * 2] * 2


def side_by_side(rank: int, world: int, own_groups: bool) -> tuple[list[int], list[bytes]]:
    """2 x 2 ranks: communicators of the two context groups, made at different times."""
    if own_groups:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = groups[rank // 2]
    else:
        group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"].get_group()
    if rank >= 2:
        time.sleep(0.5)
    first = ProcessCommunicator(group, timeout=60.0)
    second = ProcessCommunicator(group, lanes=1, timeout=60.0)
    seen = ring(first, 3), second.all_gather_bytes(b"%d" % rank)
    first.close()
    second.close()
    return seen


@pytest.mark.parametrize("world", [2, 4])
def test_messages_lanes_and_gathers(gloo: Pool, world: int) -> None:
    gloo(world).run(everything)


@pytest.mark.parametrize("own_groups", [False, True], ids=["mesh", "new_group"])
def test_context_groups_side_by_side(gloo: Pool, own_groups: bool) -> None:
    results = gloo(4).run(side_by_side, own_groups)
    assert results == [([1, 0, 1], [b"0", b"1"]), ([0, 1, 0], [b"0", b"1"]), ([1, 0, 1], [b"2", b"3"]), ([0, 1, 0], [b"2", b"3"])]


def among_other_groups(rank: int, world: int) -> list[int]:
    """Rank 0 is in a group more than rank 1 (as with tied embeddings of a pipeline), and one communicator follows another."""
    dist.new_group([0])
    seen = []
    for _ in range(3):
        communicator = ProcessCommunicator(timeout=60.0)
        seen += ring(communicator, 2)
        communicator.close()
    return seen


def test_other_groups_and_earlier_communicators_do_not_matter(gloo: Pool) -> None:
    assert gloo(2).run(among_other_groups) == [[1, 0] * 3, [0, 1] * 3]


def outsider(rank: int, world: int) -> str:
    group = dist.new_group([0])
    try:
        ProcessCommunicator(group, timeout=10.0).close()
        return "created"
    except ValueError as error:
        return str(error)


def test_rank_outside_the_group_is_told(gloo: Pool) -> None:
    inside, outside = gloo(2).run(outsider)
    assert inside == "created" and "1" in outside and "group" in outside


def strike(comm: Communicator, how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stall":
        time.sleep(TIMEOUT + MARGIN)
    if how == "raise":
        error = ValueError("a mask of another length")
        comm.fail(error)
        raise error


def until_the_end(rank: int, world: int, victim: int, how: str) -> tuple[float, str, list[int]]:
    """What a rank sees when `victim` fails before hop 2: seconds, the error, the ranks it blames."""
    comm = ProcessCommunicator(timeout=TIMEOUT)
    assert len(ring(comm, 2)) == 2
    started = time.monotonic()
    try:
        ring(comm, 4, before=lambda hop: strike(comm, how) if (hop, rank) == (2, victim) else None)
    except (PeerError, ValueError) as error:
        seconds = time.monotonic() - started
        time.sleep(TIMEOUT + 2.0)  # alive and connected: whoever waits for a survivor gets no help from a closed connection
        comm.close()
        if isinstance(error, ValueError):
            return seconds, str(error), []
        assert error.rank == rank and error.peer is not None and error.awaited is not None
        return seconds, str(error), error.late
    return 0.0, "no error", []


def check_survivor(rank: int, seen: tuple[float, str, list[int]]) -> None:
    """The error of a rank that outlived rank 2 of 4."""
    seconds, text, late = seen
    print(f"after {seconds:.1f} s:\n{text}\n")
    assert seconds < TIMEOUT + MARGIN, text
    assert late == [2], text
    assert text.startswith(f"rank {rank}: forward pass 1, boundary "), text
    assert "kv rows of rank" in text and "(lane " in text and "Dead or late: rank 2." in text, text


def test_every_survivor_of_a_killed_rank_names_it(spawn: Callable[..., list[Outcome]]) -> None:
    outcomes = spawn(4, until_the_end, 2, "kill", timeout=100)
    assert outcomes[2].exitcode == -signal.SIGKILL
    for rank in (0, 1, 3):
        assert outcomes[rank].ok, str(outcomes[rank])
        check_survivor(rank, outcomes[rank].value)
        assert "rank 2: DEAD or cut off" in outcomes[rank].value[1]
    assert "1000 bytes to be received from rank 2 (lane 2)" in outcomes[3].value[1]


def test_every_peer_of_a_stalled_rank_names_it(gloo: Pool) -> None:
    results = gloo(4).run(until_the_end, 2, "stall", timeout=60)
    for rank in (0, 1, 3):
        check_survivor(rank, results[rank])
        assert "rank 2: alive" in results[rank][1]
        assert "in forward pass 1, boundary 2 of 4 stages: kv rows of rank 3 for " in results[rank][1]
    assert results[2][0] > 0 and "First failure" in results[2][1], "who comes too late is told what has happened"


def test_every_peer_of_a_rank_that_raises_hears_why(gloo: Pool) -> None:
    results = gloo(4).run(until_the_end, 2, "raise", timeout=60)
    assert results[2][1] == "a mask of another length"
    for rank in (0, 1, 3):
        check_survivor(rank, results[rank])
        assert "rank 2: ValueError: a mask of another length" in results[rank][1]
        assert "rank 2: has given up in forward pass 1, boundary 2" in results[rank][1]


def again_after_giving_up(rank: int, world: int) -> str:
    comm = ProcessCommunicator(timeout=TIMEOUT)
    ring(comm, 1)
    if rank == 0:
        comm.fail(torch.OutOfMemoryError("no memory for stage 1"))
    try:
        ring(comm, 1)
    except PeerError as error:
        time.sleep(TIMEOUT + 2.0)  # the peers are to get no help from a closed connection
        return str(error)
    return "no error"


def test_a_rank_that_gave_up_cannot_try_again_with_messages_that_its_peers_take_for_others(gloo: Pool) -> None:
    first, second = gloo(2).run(again_after_giving_up, timeout=60)
    assert "OutOfMemoryError: no memory for stage 1" in first and "create a new one" in first, first
    assert "rank 0: OutOfMemoryError: no memory for stage 1" in second and "Dead or late: rank 0" in second, second


def with_store(rank: int, world: int) -> tuple[float, str]:
    """As torchrun never does it: rank 0, which dies, hosts the store."""
    seconds = timedelta(seconds=30)
    hosted = dist.TCPStore("127.0.0.1", 0, world, True, seconds, wait_for_workers=False) if rank == 0 else None
    port = [hosted and hosted.port]  # one that the system found free
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    store = hosted or dist.TCPStore("127.0.0.1", port[0], world, False, seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    comm = ProcessCommunicator(timeout=TIMEOUT)
    ring(comm, 2)
    started = time.monotonic()
    try:
        ring(comm, 4, before=lambda hop: strike(comm, "kill") if (hop, rank) == (2, 0) else None)
    except PeerError as error:
        return time.monotonic() - started, str(error)
    return 0.0, "no error"


def test_dead_store_does_not_hide_the_error(spawn: Callable[..., list[Outcome]]) -> None:
    outcomes = spawn(2, with_store, timeout=100)
    assert outcomes[1].ok, str(outcomes[1])
    seconds, text = outcomes[1].value
    assert seconds < TIMEOUT + MARGIN
    assert text.startswith("rank 1: forward pass 1, boundary 2 of 4 stages: kv rows of rank 0: ") and "rank 0 (lane 2)" in text
    assert "Where the other ranks are is not known: the store " in text
