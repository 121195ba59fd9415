"""The processes that other tests rely on: results by rank, failures that name the rank, hangs that end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.workers import Outcome, Pool, RanksFailed


def total(rank: int, world: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    value = start + rank
    dist.all_reduce(value)
    assert torch.get_num_threads() == 1
    return os.getpid(), value


def raise_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        raise KeyError("the last rank's own words")
    dist.barrier()


def sleep_on_first(rank: int, world: int) -> str:
    if rank == 0:
        wait_in_vain()
    return "done"


def wait_in_vain() -> None:
    threading.Event().wait()


def kill_first(rank: int, world: int) -> str:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        return f"survivor: {type(error).__name__}"
    return "nothing noticed"


@pytest.mark.parametrize("world", [2, 4])
def test_results_come_by_rank(gloo: Pool, world: int) -> None:
    results = gloo(world).run(total, torch.tensor([1.0, 2.0]))
    expected = torch.tensor([1.0, 2.0]) * world + sum(range(world))
    assert len(results) == world
    for _, value in results:
        assert torch.equal(value, expected)


def test_processes_are_reused_with_fresh_groups(gloo: Pool) -> None:
    four = gloo(4).run(total, torch.zeros(1))
    two = gloo(2).run(total, torch.zeros(1))
    assert [pid for pid, _ in two] == [pid for pid, _ in four[:2]]
    assert os.getpid() not in {pid for pid, _ in four}


def test_exception_names_rank_and_traceback(gloo: Pool) -> None:
    with pytest.raises(RanksFailed) as caught:
        gloo(2).run(raise_on_last, timeout=60)
    text = str(caught.value)
    assert "rank 1: Traceback" in text and "the last rank's own words" in text and "in raise_on_last" in text
    assert len(gloo(2).run(total, torch.zeros(1))) == 2, "the pool works again after a failure"


def test_hang_ends_within_the_timeout_and_shows_the_stack(gloo: Pool) -> None:
    gloo(2).run(total, torch.zeros(1))
    victims = [worker.process for worker in gloo.workers]
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        gloo(2).run(sleep_on_first, timeout=3)
    assert time.monotonic() - start < 20
    assert [outcome.timed_out for outcome in caught.value.outcomes] == [True, False]
    assert "wait_in_vain" in str(caught.value)
    assert all(process.poll() is not None for process in victims), "no process of the failed call is left"


def test_spawn_shows_who_died_and_what_survivors_say(spawn: Callable[..., list[Outcome]]) -> None:
    died, survived = spawn(2, kill_first, timeout=60)
    assert died.exitcode == -signal.SIGKILL and not died.ok
    assert survived.ok and survived.value.startswith("survivor"), str(survived)


def test_closures_are_refused(gloo: Pool) -> None:
    with pytest.raises(ValueError, match="top-level function"):
        gloo(2).run(lambda rank, world: rank)
