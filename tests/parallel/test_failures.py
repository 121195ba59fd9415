"""What every rank is told when the ranks do not agree, or one of them fails, stalls or dies inside attention."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distattn
import distattn.ops
from distattn import ContextParallel
from distattn.kernels import Choice
from distattn.kernels.aten import Aten
from distattn.parallel.comm import Communicator, PeerError, SoloCommunicator
from distattn.parallel.comm_process import ProcessCommunicator
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.rank_plan import PlanMismatch
from tests.workers import Outcome, Pool

TIMEOUT = 3.0  # seconds that a wait may last
MARGIN = 10.0  # for heartbeats, and for machines that do other things
WORLD, ODD = 3, 1
TOKENS = 24

# What the odd rank does otherwise, and what its error and the others' must say of both sides.
DIFFERENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "mask": ({"mask": distattn.full(TOKENS)}, "Mask(causal, n_tokens=24", "Mask(full, n_tokens=24"),
    "documents": ({"mask": distattn.documents([10, 14])}, "Mask(causal", "Mask(documents(2, causal)"),
    "length": ({"mask": distattn.causal(TOKENS + 1)}, "n_tokens=24", "n_tokens=25"),
    "schedule": ({"schedule": "striped"}, "schedule zigzag", "schedule striped"),
    "keep": ({"keep": "all"}, "keep last", "keep all"),
    "heads": ({"heads": 4}, "heads 2:2, head sizes 8 and 8, torch.float32", "heads 4:2"),
    "head size": ({"d": 4}, "head sizes 8 and 8", "head sizes 4 and 4"),
    "dtype": ({"dtype": torch.float64}, "torch.float32", "torch.float64"),
    "home": ({"home": torch.bfloat16}, "home None", "home torch.bfloat16"),
    "softcap": ({"softcap": 5.0}, "softcap 0.0", "softcap 5.0"),
    "scale": ({"scale": 2.0}, "scale 0.35", "scale 2.0"),
}


def call(
    communicator: Communicator,
    mask: distattn.parallel.mask.Mask | None = None,
    heads: int = 2,
    d: int = 8,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    softcap: float = 0.0,
    **options: Any,
) -> str:
    """Plans and attends once; the words of the refusal."""
    cp = ContextParallel(communicator=communicator, **options)
    try:
        plan = cp.plan(mask or distattn.causal(TOKENS))
        q, k = (torch.ones(plan.rows, h, d, dtype=dtype) for h in (heads, 2))
        cp.attention(q, k, k, plan, scale=scale, softcap=softcap)
    except PlanMismatch as error:
        return str(error)
    return "no error"


def all_calls(communicator: Communicator) -> dict[str, str]:
    """Every disagreement, one after the other over one connection, and an agreement at the end: nothing is left in the way."""
    said = {}
    for name, (options, _, _) in DIFFERENT.items():
        said[name] = call(communicator, **(options if communicator.rank == ODD else {}))
    said["nothing"] = call(communicator)
    return said


def check_mismatches(ranks: list[dict[str, str]]) -> None:
    for rank, said in enumerate(ranks):
        assert said.pop("nothing") == "no error", rank
        for name, text in said.items():
            _, usual, odd = DIFFERENT[name]
            lines = text.splitlines()
            subject = (
                "this attention call" if name in ("heads", "head size", "dtype", "home", "softcap", "scale") else "this plan"
            )
            assert lines[0].startswith(f"The ranks of this group do not agree on {subject}; going on would hang"), text
            assert lines[1].startswith("  ranks 0, 2: ") and usual in lines[1], text
            assert lines[2].startswith("  rank 1: ") and odd in lines[2], text
            assert lines[3].startswith("Pass every rank the same mask, schedule, heads, head sizes and dtype"), text


def test_disagreeing_threads_are_named() -> None:
    check_mismatches(run_ranks(WORLD, all_calls, timeout=20.0))


def all_calls_of_process(rank: int, world: int) -> dict[str, str]:
    communicator = ProcessCommunicator(timeout=60.0)
    said = all_calls(communicator)
    communicator.close()
    return said


def test_disagreeing_processes_are_named(gloo: Pool) -> None:
    check_mismatches(gloo(WORLD).run(all_calls_of_process))


def test_messages_that_differ_in_spite_of_equal_inputs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two versions of a schedule would make them: one rank forgets the hop from its neighbour."""
    from distattn.parallel import rank_plan

    real = rank_plan.make_schedule

    def work(comm: Communicator) -> str:
        return call(comm)

    def make(strategy: Any, mask: Any, *rest: Any) -> Any:
        kept = mask if threading.current_thread().name != f"rank {ODD}" else distattn.sliding_window(TOKENS, 4)
        schedule = real(strategy, kept, *rest)
        schedule.mask = mask
        return schedule

    monkeypatch.setattr(rank_plan, "make_schedule", make)
    for text in run_ranks(WORLD, work, timeout=20.0):
        assert text.startswith("Ranks ") and "list different messages" in text and "install the same on all" in text, text


class Broken(Aten):
    """A kernel that does something else at a given launch of a pass."""

    def __init__(self, pass_name: str, launch: int, strike: Callable[[], None]) -> None:
        self.pass_name, self.left, self.strike = pass_name, launch, strike

    def count(self, pass_name: str) -> None:
        if pass_name == self.pass_name:
            self.left -= 1
            if self.left == 0:
                self.strike()

    def forward(self, *args: Any, **options: Any) -> Any:
        self.count("forward")
        return super().forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> None:
        self.count("backward")
        super().backward(*args, **options)


def no_memory() -> None:
    raise MemoryError("no memory for this tile")


class Recording(SoloCommunicator):
    def __init__(self) -> None:
        super().__init__()
        self.failures: list[BaseException] = []

    def fail(self, error: BaseException) -> None:
        self.failures.append(error)


def tensors(rows: int) -> list[Tensor]:
    return [torch.ones(rows, 2, 8, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_executor_tells_its_peers_of_an_error(pass_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distattn.ops, "choose", lambda *_: Choice(Broken(pass_name, 1, no_memory)))
    communicator = Recording()
    cp = ContextParallel(communicator=communicator)
    with pytest.raises(MemoryError, match="no memory for this tile"):
        cp.attention(*tensors(TOKENS), cp.plan(distattn.causal(TOKENS))).sum().backward()
    assert [type(error) for error in communicator.failures] == [MemoryError]


def test_threads_hear_of_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[int, str] = {}

    def work(comm: Communicator) -> None:
        cp = ContextParallel(communicator=comm)
        plan = cp.plan(distattn.full(TOKENS))
        kind = "torch.float32 on cpu, head sizes 8 and 8"
        cp._kernels.chosen[kind] = Choice(Broken("forward", 1, no_memory) if comm.rank == ODD else Aten())
        try:
            cp.attention(*tensors(plan.rows), plan)
        except PeerError as error:
            said[comm.rank] = str(error)
            raise

    with pytest.raises(MemoryError, match="rank 1 of 3: no memory for this tile"):
        run_ranks(WORLD, work, timeout=20.0)
    assert all(f"rank {rank} stops, because rank 1 failed: MemoryError" in text for rank, text in said.items()) and said


def strike(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stall":
        time.sleep(TIMEOUT + MARGIN)
    if how == "raise":
        no_memory()


def struck(rank: int, world: int, how: str, pass_name: str) -> tuple[float, str, list[int], str]:
    """Seconds to the error, the error, whom it blames and what was awaited; all ranks have done a whole step before."""
    cp = ContextParallel(torch.distributed.group.WORLD, "striped", timeout=120.0)
    plan = cp.plan(distattn.full(TOKENS))
    inputs = tensors(plan.rows)
    cp.attention(*inputs, plan).sum().backward()
    cp.communicator.timeout = TIMEOUT  # from here on: what torch imports at the first call takes processes seconds apart
    cp.communicator.all_gather_bytes(b"")
    if rank == ODD:
        [kind] = cp._kernels.chosen
        # In stage 0: what its peers need in stage 1 is on its way, what they need after that is not.
        cp._kernels.chosen[kind] = Choice(Broken(pass_name, 1, lambda: strike(how)))
    started = time.monotonic()
    try:
        out = cp.attention(*inputs, plan)
        out.sum().backward()
        cp.attention(*inputs, plan)
    except (PeerError, MemoryError) as error:
        seconds = time.monotonic() - started
        time.sleep(TIMEOUT + 3.0)  # alive and connected: nobody gets help from a closed connection
        cp.communicator.close()
        if isinstance(error, PeerError):
            return seconds, str(error), error.late, str(error.awaited)
        return seconds, str(error), [], ""
    return 0.0, "no error", [], ""


def check_survivor(rank: int, found: tuple[float, str, list[int], str], pass_name: str) -> None:
    seconds, text, late, awaited = found
    assert 0 < seconds < TIMEOUT + MARGIN, (seconds, text)
    assert late == [ODD] and f"Dead or late: rank {ODD}." in text, text
    number = 3 if pass_name == "forward" else 4
    assert text.startswith(f"rank {rank}: {pass_name} pass {number}, boundary "), text
    assert awaited in text and "of 3 stages: " in awaited and " rows) from rank " in awaited, (awaited, text)


@pytest.mark.parametrize("pass_name", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_survivors_of_a_killed_rank_name_it(spawn: Callable[..., list[Outcome]], pass_name: str) -> None:
    outcomes = spawn(WORLD, struck, "kill", pass_name, timeout=240)
    assert outcomes[ODD].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert outcomes[rank].ok, str(outcomes[rank])
        check_survivor(rank, outcomes[rank].value, pass_name)
        assert f"rank {ODD}: DEAD or cut off" in outcomes[rank].value[1]


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_peers_of_a_stalled_rank_name_it(gloo: Pool, pass_name: str) -> None:
    results = gloo(WORLD).run(struck, "stall", pass_name, timeout=240)
    for rank in (0, 2):
        check_survivor(rank, results[rank], pass_name)
        number = {"forward": 3, "backward": 4}[pass_name]
        assert re.search(
            rf"rank {ODD}: alive \(.* ago\), in {pass_name} pass {number}, boundary 0 of 3 stages for ", results[rank][1]
        )
    assert "First failure" in results[ODD][1], "who comes too late is told what has happened"


def test_peers_of_a_rank_whose_kernel_fails_hear_why(gloo: Pool) -> None:
    results = gloo(WORLD).run(struck, "raise", "forward", timeout=240)
    assert results[ODD][1] == "no memory for this tile"
    for rank in (0, 2):
        check_survivor(rank, results[rank], "forward")
        assert f"rank {ODD}: MemoryError: no memory for this tile" in results[rank][1]
