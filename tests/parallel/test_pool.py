"""A pool of attention servers on gloo processes: the results of one device, whoever comes, leaves or dies meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest

from distattn.parallel.comm import PeerError
from distattn.parallel.mask import causal, documents, sliding_window
from distattn.parallel.pool_server import Ending
from tests.parallel.attend import make_problem
from tests.parallel.pools import TOLERANCE, Fault, Lines, aten, attend, group_of, say, send_self, serve, trainers
from tests.workers import Outcome, Pool

SILENCE = 1.0  # seconds, in these tests
MARGIN = 6.0  # for machines that do other things


def until(cp, servers: int, problem) -> list[float]:
    """Attends until the pool has so many servers; the worst error of each call."""
    deadline, worst = time.monotonic() + 20, []
    while not worst or cp.pool.servers != servers:
        assert time.monotonic() < deadline, f"{cp.pool.servers} servers, not {servers}"
        worst.append(max(attend(cp, problem).values()))
    return [*worst, max(attend(cp, problem).values())]


def come_and_go(rank: int, world: int) -> tuple[list[float], list[str]] | list[tuple[Ending, int, str]]:
    """Two trainers and two servers; one leaves, then it joins again, then both leave, then one joins trainers without any."""
    if rank == 2:
        group_of(2)
        return [serve(leave_at="leave 1")]
    if rank == 3:
        group_of(2)
        return [serve(leave_at="leave 2"), serve(leave_at="leave 3", start_at="join 2"), serve(start_at="join 3")]
    lines = Lines()
    cp = trainers(2, 2, SILENCE)
    small = make_problem(documents([30, 5, 29]), heads=(4, 2), seed=3)
    worst = []
    masks = (causal(61), documents([1, 40, 0, 22, 9]), sliding_window(50, 7))
    for seed, mask in enumerate(masks):
        problem = make_problem(mask, heads=(4, 2 + 2 * (seed % 2)), softcap=3.0 * seed, sinks=seed == 1, seed=seed)
        worst.append(max(attend(cp, problem).values()))
    worst += until(cp, 2, small)
    for keys, servers in ((["leave 2"], 1), (["join 2"], 2), (["leave 1", "leave 3"], 0), (["join 3"], 1)):
        for key in keys if rank == 0 else ():
            say(key)
        worst += until(cp, servers, small)
    cp.close()
    return worst, lines.lines


def test_servers_come_and_go(gloo: Pool) -> None:
    first, second, stays, moves = gloo(4).run(come_and_go, timeout=90)
    assert max(first[0]) <= TOLERANCE and max(second[0]) <= TOLERANCE, (first[0], second[0])
    assert [ending for ending, _, _ in stays] == [Ending.LEFT]
    assert [ending for ending, _, _ in moves] == [Ending.LEFT, Ending.LEFT, Ending.FINISHED]
    assert all(calls > 0 for _, calls, _ in [*stays, *moves]), "every server has computed"
    said = "\n".join(first[1])
    assert "leaves: the test wants it; 1 server, epoch 2" in said, said
    assert "joins; 2 servers, epoch 3" in said and ": the trainers attend themselves, in place" in said, said
    assert not second[1], "one trainer speaks for all"
    assert "runs again" not in said, "whoever leaves between two calls costs no call"


def deaths(rank: int, world: int) -> tuple[list[float], list[float], list[str], int] | object:
    """Rank 2 dies inside of a forward pass, rank 3 inside of a later backward pass, rank 1 and 0 train on."""
    if rank >= 2:
        group_of(2)
        strike = send_self(signal.SIGKILL)
        return serve(Fault(aten(), "forward", 3, strike) if rank == 2 else Fault(aten(), "backward", 6, strike))
    lines = Lines()
    cp = trainers(2, 2, SILENCE)
    problem = make_problem(documents([30, 5, 60]), seed=1)
    worst, seconds = [], []
    for _ in range(12):
        started = time.monotonic()
        worst.append(max(attend(cp, problem).values()))
        seconds.append(time.monotonic() - started)
    left = cp.pool.servers
    cp.close()
    return worst, seconds, lines.lines, left


def test_servers_killed_in_the_middle_of_forward_and_of_backward(spawn: Callable[..., list[Outcome]]) -> None:
    outcomes = spawn(4, deaths, timeout=90)
    assert [o.exitcode for o in outcomes[2:]] == [-signal.SIGKILL] * 2, [str(o) for o in outcomes]
    for outcome in outcomes[:2]:
        assert outcome.ok, str(outcome)
        worst, seconds, _, left = outcome.value
        assert max(worst) <= TOLERANCE and left == 0
        assert max(seconds) < SILENCE + MARGIN, seconds
    said = "\n".join(outcomes[0].value[2])
    assert "does not answer since 1." in said and ": dropped; 1 server, epoch 2; attention call " in said, said
    assert " (forward) runs again (" in said and " (backward) runs again (" in said, said
    assert said.count("runs again") == 2, said
    assert "dropped; 0 servers, epoch 3: the trainers attend themselves, in place; attention call" in said, said


def stall(rank: int, world: int, number: signal.Signals) -> tuple[float, float, list[str], int] | object:
    """Rank 1 stops in the middle of a call, connections open; rank 2 waits for nobody but the trainer."""
    if rank:
        group_of(1)
        return serve(Fault(aten(), "forward", 3, send_self(number)) if rank == 1 else None)
    lines = Lines()
    cp = trainers(1, 2, SILENCE)
    problem = make_problem(causal(64), seed=2)
    worst, longest = 0.0, 0.0
    for _ in range(6):
        started = time.monotonic()
        worst = max(worst, *attend(cp, problem).values())
        longest = max(longest, time.monotonic() - started)
    left = cp.pool.servers
    cp.close()
    return worst, longest, lines.lines, left


def test_a_server_that_stops_is_dropped_and_its_call_runs_again(spawn: Callable[..., list[Outcome]]) -> None:
    outcomes = spawn(3, stall, signal.SIGSTOP, timeout=60, grace=15.0)
    trainer, stopped, other = outcomes[0], outcomes[1], outcomes[2]
    assert trainer.ok and other.ok and not stopped.ok, [str(o) for o in outcomes]
    worst, longest, lines, left = trainer.value
    assert worst <= TOLERANCE and left == 1 and longest < SILENCE + MARGIN
    assert any("dropped; 1 server, epoch 2; attention call" in line for line in lines), lines
    assert other.value[0] == Ending.FINISHED


def trainer_dies(rank: int, world: int) -> tuple[float, str] | object:
    if rank == 2:
        group_of(2)
        return serve()
    cp = trainers(2, 1, SILENCE, timeout=8.0)
    problem = make_problem(causal(40))
    attend(cp, problem)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        attend(cp, problem)
    except PeerError as error:
        return time.monotonic() - started, str(error)
    return 0.0, "no error"


def test_a_trainer_that_dies_ends_the_job_and_its_servers_say_so(spawn: Callable[..., list[Outcome]]) -> None:
    outcomes = spawn(3, trainer_dies, timeout=60)
    assert outcomes[0].ok and outcomes[1].exitcode == -signal.SIGKILL, [str(o) for o in outcomes]
    seconds, text = outcomes[0].value
    assert "rank 1: DEAD" in text and seconds < 8.0 + MARGIN, text


def alone(rank: int, world: int) -> list[str]:
    """Mistakes, and what is said of them, on every trainer."""
    said = []
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.listen()
    taken = f"127.0.0.1:{held.getsockname()[1] if rank == 0 else 1}"
    for servers, store, timeout in ((2, "127.0.0.1:0", 1.0), (1, taken, 5.0), (1, "nowhere", 5.0), (-1, "auto", 5.0)):
        try:
            trainers(2, servers, timeout=timeout, pool_store=store)
            said.append("taken")
        except ValueError as error:
            said.append(str(error))
    held.close()
    return said


def test_mistakes_are_named_on_every_trainer(gloo: Pool) -> None:
    for nobody, taken, nowhere, negative in gloo(2).run(alone, timeout=60):
        assert "Only 0 of 2 attention servers came to 127.0.0.1:" in nobody and "within the timeout of 1 s" in nobody, nobody
        assert "cannot be opened at 127.0.0.1:" in taken and "EADDRINUSE" in taken, taken
        assert "pool_store='nowhere' is no address" in nowhere, nowhere
        assert "-1 servers" in negative, negative


def costs(rank: int, world: int) -> dict[str, float] | object:
    """Milliseconds, medians."""
    if rank == 2:
        group_of(2)
        return serve()
    cp = trainers(2, 1, SILENCE)
    problem = make_problem(documents([30, 5, 29]), seed=1)
    attend(cp, problem)

    def median(times: int, action: Callable[[], object]) -> float:
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - started)
        return 1e3 * sorted(seconds)[times // 2]

    def forward() -> None:
        plan = cp.plan(problem.mask)
        cp.attention(*(cp.shard(x, plan) for x in (problem.q, problem.k, problem.v)), plan)

    found = {
        "vote": median(500, lambda: cp.pool._vote(True)),
        "forward of 64 tokens, 2 trainers and 1 server": median(100, forward),
        "a new epoch": median(9, lambda: cp.pool._renew([], "")),
    }
    cp.close()
    return found


@pytest.mark.slow
def test_what_a_pool_costs_a_call(gloo: Pool) -> None:
    first, *_ = gloo(3).run(costs, timeout=60)
    print("\n".join(f"{name}: {value:.3f} ms" for name, value in first.items()))
    assert first["vote"] < 20, "a vote is one small message each way"
