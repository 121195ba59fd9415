"""Processes for tests of many ranks: one pool for the whole run (importing torch takes seconds), or fresh ones that may die.

A rank runs a top-level function of a test module, ``function(rank, world, *arguments)``, inside a gloo process group of its own.
Arguments and results travel by pickle; ranks find the function by name, so it cannot be a lambda or a closure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
GRACE = 5.0  # seconds that the other ranks get to report once one has failed

# The folder of the repository must not be on sys.path (kernels/ would be importable), so the package `tests` is made by hand.
START = """
import sys, types
sys.path[:] = [path for path in sys.path if path]
sys.modules["tests"] = tests = types.ModuleType("tests")
tests.__path__ = [sys.argv[1]]
from tests.workers import serve
serve(int(sys.argv[2]))
"""


@dataclass(frozen=True)
class Call:
    """What one rank is asked to do: ``work`` is the pickled (function, arguments)."""

    rank: int
    world: int
    store: str
    timeout: float
    work: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: a value, or the error's text, or (value and error None) a process that is gone or was killed."""

    rank: int
    value: Any = None
    error: str | None = None
    exitcode: int | None = None  # negative: the signal that ended the process
    timed_out: bool = False
    log: str = ""  # what the process printed during the call, stacks of a hung one included

    @property
    def ok(self) -> bool:
        return self.error is None and self.exitcode is None and not self.timed_out

    def __str__(self) -> str:
        if self.ok:
            return f"rank {self.rank}: finished"
        what = "hung, killed after the timeout" if self.timed_out else self.error or f"process gone, exit code {self.exitcode}"
        return f"rank {self.rank}: {what}" + (f"\n--- printed by rank {self.rank}:\n{self.log}" if self.log else "")


class RanksFailed(AssertionError):
    """At least one rank did not finish; the text holds the error or the stack of each."""

    def __init__(self, function: Callable[..., Any], outcomes: Sequence[Outcome]) -> None:
        self.outcomes = list(outcomes)
        super().__init__(f"{function.__qualname__} on {len(outcomes)} ranks:\n" + "\n".join(map(str, outcomes)))


@dataclass
class Worker:
    """One process, its pipe and the file that takes what it prints."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    log: Path
    log_start: int = field(default=0)

    @classmethod
    def start(cls, folder: Path) -> Worker:
        ours, theirs = Pipe()
        handle, name = tempfile.mkstemp(prefix="worker-", suffix=".log", dir=folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(TESTS), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        os.close(handle)
        theirs.close()
        return cls(process, ours, Path(name))

    def send(self, call: Call) -> None:
        self.log_start = self.log.stat().st_size
        # A process that died between two calls shows in the outcome, by its exit code.
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send_bytes(pickle.dumps(call))

    def printed(self) -> str:
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")[-8000:]

    def outcome(self, rank: int) -> Outcome:
        """What a worker that has written something, or closed its pipe, has to say."""
        try:
            value, error = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return Outcome(rank, exitcode=self.process.wait(), log=self.printed())
        return Outcome(rank, value, error, log=self.printed() if error else "")

    def kill_hung(self, rank: int) -> Outcome:
        """Ends a worker that is still busy; its stacks are in the outcome."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        self.stop()
        return Outcome(rank, timed_out=True, log=self.printed())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def run_call(
    workers: Sequence[Worker],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: Path,
    timeout: float,
    grace: float,
) -> list[Outcome]:
    """Runs the function with one rank a worker; afterwards no worker is busy. Workers that hung have been killed.

    Once a rank has failed the others get ``grace`` seconds: without that, a test of a failure would wait for the whole timeout.
    """
    if "<" in function.__qualname__ or function.__module__.split(".")[0] != "tests":
        raise ValueError(
            f"ranks cannot find {function.__module__}.{function.__qualname__} by name. Use a top-level function of a test module."
        )
    work = pickle.dumps((function, arguments))
    store = tempfile.mktemp(prefix="store-", dir=folder)
    for rank, worker in enumerate(workers):
        worker.send(Call(rank, len(workers), store, timeout, work))
    outcomes: dict[int, Outcome] = {}
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            outcomes[rank] = workers[rank].outcome(rank)
            if not outcomes[rank].ok:
                deadline = min(deadline, time.monotonic() + grace)
    for rank in waiting.values():
        outcomes[rank] = workers[rank].kill_hung(rank)
    return [outcomes[rank] for rank in range(len(workers))]


class Pool:
    """The persistent workers. ``pool(world).run(function, *arguments)`` returns the results by rank or raises RanksFailed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: list[Worker] = []

    def __call__(self, world: int) -> Ranks:
        return Ranks(self, world)

    def run(self, world: int, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        while len(self.workers) < world:
            self.workers.append(Worker.start(self.folder))
        outcomes = run_call(self.workers[:world], function, arguments, self.folder, timeout, GRACE)
        if all(outcome.ok for outcome in outcomes):
            return [outcome.value for outcome in outcomes]
        self.stop()  # what a failure left behind in these processes is nobody's business: the next call gets new ones
        raise RanksFailed(function, outcomes)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()


@dataclass(frozen=True)
class Ranks:
    """The first ``world`` workers of a pool."""

    pool: Pool
    world: int

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """``function(rank, world, *arguments)`` on every rank; the values by rank. RanksFailed if a rank raised, died or hung."""
        return self.pool.run(self.world, function, arguments, timeout)


def spawn(
    folder: Path, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0, grace: float | None = None
) -> list[Outcome]:
    """Runs the function in fresh processes that are all gone afterwards, for tests in which ranks die. Nothing is raised.

    After the first failure the others go on until ``timeout`` (or for ``grace`` seconds), so that a test sees what survivors say.
    """
    workers: list[Worker] = []
    try:
        workers.extend(Worker.start(folder) for _ in range(world))
        return run_call(workers, function, arguments, folder, timeout, timeout if grace is None else grace)
    finally:
        for worker in workers:
            worker.stop()


def serve(descriptor: int) -> None:
    """The main loop of a worker process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    pipe = Connection(descriptor)
    while True:
        try:
            call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(answer(call))


def answer(call: Call) -> bytes:
    """The pickled (value, error text) of one call."""
    try:
        return pickle.dumps((in_process_group(call), None))
    except Exception:
        return pickle.dumps((None, traceback.format_exc()))


def in_process_group(call: Call) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    function, arguments = pickle.loads(call.work)
    store = dist.FileStore(call.store, call.world)
    dist.init_process_group("gloo", store=store, rank=call.rank, world_size=call.world, timeout=timedelta(seconds=call.timeout))
    try:
        return function(call.rank, call.world, *arguments)
    finally:
        if dist.is_initialized():  # the function may have ended the group itself
            dist.destroy_process_group()


def exit_with_parent(parent: int) -> None:
    """A worker that is busy, or hung, does not see its pipe close when pytest is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
