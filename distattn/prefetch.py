"""Sequences made ready ahead of time: rows read, plans made and compiled by a process beside each rank, while a step runs.

The process gets the configuration, and then jobs in the order in which they will be needed; all else it reads for itself. It
knows no other rank and no device: agreeing on a plan is left to the rank. What it makes is a function of the job alone, so a
rank may as well make for itself what it needs before the process is up.

It is started afresh (spawned, not forked: process groups and CUDA do not live through a fork), leaves interrupts to the rank,
and ends when its pipe does, however the rank ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch

from distattn.config import Config
from distattn.data import Packer, Rows, make_packers
from distattn.parallel.mask import documents
from distattn.parallel.rank_plan import Call, RankPlan, Recipe

NOTICEABLE = 0.01  # of a step
FAREWELL = 5.0  # seconds between the end of a pipe and that of its process


class Job(NamedTuple):
    """Some sequences of the stream, and those of them that this rank attends."""

    held_out: bool
    numbers: range
    mine: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """This rank's part of one packed sequence, ready to be attended once all ranks have agreed on the plan."""

    table: np.ndarray
    """int64 [3, T]: tokens, labels, positions"""
    plan: RankPlan

    @property
    def rows(self) -> Rows:
        return Rows(*torch.from_numpy(self.table))


@dataclass(frozen=True)
class Source:
    """Makes what jobs ask for, in any process; the same every time."""

    config: Config
    recipe: Recipe
    calls: tuple[Call, ...]
    """the attention calls that the plans are compiled for"""

    @cached_property
    def packers(self) -> tuple[Packer, Packer | None]:
        return make_packers(self.config)

    def answers(self, job: Job, speeds: tuple[int, ...] | None) -> Iterator[int | Prepared]:
        """How many labels the job's sequences have, all ranks together; then each of this rank's sequences.

        Args:
            speeds: of the ranks, for a schedule that shares out work by them.
        """
        packer = self.packers[job.held_out]
        assert packer is not None
        yield sum(packer.sequence(number).labels for number in job.numbers)
        recipe = at_speeds(self.recipe, speeds)
        for number in job.mine:
            sequence = packer.sequence(number)
            plan = recipe.prepare(documents(sequence.lengths.tolist()), self.calls)
            yield Prepared(torch.stack(sequence.rows(plan.layout.positions(recipe.rank))).numpy(), plan)


def at_speeds(recipe: Recipe, speeds: tuple[int, ...] | None) -> Recipe:
    """The recipe for ranks of these speeds: another one where its schedule shares out work by them."""
    if speeds is None or recipe.strategy.balance is None:
        return recipe
    balance = replace(recipe.strategy.balance, speeds=speeds)
    return replace(recipe, strategy=replace(recipe.strategy, balance=balance))


def timed(answers: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    """Each with the seconds that it took to make."""
    while True:
        started = time.perf_counter()
        try:
            answer = next(answers)
        except StopIteration:
            return
        yield time.perf_counter() - started, answer


@dataclass
class Spent:
    """Seconds of making sequences ready, of waiting for them, and of agreeing on their plans."""

    made: float = 0.0
    waited: float = 0.0
    agreed: float = 0.0
    """in the agreements of all ranks on plans, with waiting for the last of them"""

    @property
    def hidden(self) -> float:
        """The part that nobody waited for."""
        return max(0.0, 1 - self.waited / self.made) if self.made else 1.0

    def text(self, steps: int, seconds: float) -> str:
        """For the progress line, after so many steps in so many seconds; empty where planning is too short to matter."""
        if self.made < NOTICEABLE * seconds:
            return ""
        return f"plan {self.made / steps * 1e3:.3g} ms hidden {self.hidden:.0%}"


class Prefetch:
    """The jobs of one rank: asked for ahead of time, opened in the same order.

    Args:
        workers: 1 lets a process make what is asked for; 0 makes it when it is opened.
        timeout: seconds after which a process that does not answer is an error.

    Attributes:
        speeds: of the ranks, for the jobs that are asked for from now on.
        spent: since somebody set it.
    """

    def __init__(self, source: Source, workers: int, timeout: float) -> None:
        self.source, self.timeout = source, timeout
        self.speeds: tuple[int, ...] | None = None
        self.spent = Spent()
        self._worker = Worker(source) if workers else None
        self._asked: deque[tuple[Job, Iterator[tuple[float, Any]]]] = deque()

    def ask(self, job: Job) -> None:
        """This job will be opened after those asked for before."""
        if self._worker is not None and self._worker.ready:
            self._worker.send(job, self.speeds)
            self._asked.append((job, self._worker.answers(1 + len(job.mine), self.timeout)))
        else:
            self._asked.append((job, timed(self.source.answers(job, self.speeds))))

    def open(self, job: Job) -> tuple[int, Iterator[Prepared]]:
        """(labels of all the job's sequences, this rank's sequences). All of them must be taken before the next is opened.

        A job that is not the next of those asked for is made here and now.

        Raises:
            RuntimeError: the process is gone or does not answer. What it raised itself is raised here.
        """
        if self._asked and self._asked[0][0] == job:
            answers = self._taken(self._asked.popleft()[1])
        else:
            answers = self._taken(timed(self.source.answers(job, self.speeds)))
        return next(answers), answers

    def close(self) -> None:
        """Ends the process. A second call does nothing."""
        self._asked.clear()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _taken(self, answers: Iterator[tuple[float, Any]]) -> Iterator[Any]:
        for waited, (made, answer) in timed(answers):
            self.spent.made += made
            self.spent.waited += waited
            yield answer


class Worker:
    """The process, as the rank sees it. A thread reads its answers, so that none is waited for or unpickled by the step."""

    def __init__(self, source: Source) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=serve, args=(theirs, source), name="prefetch", daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends with the process
        self._answers: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=receive, args=(self._pipe, self._answers), name="prefetch", daemon=True).start()
        self._end = weakref.finalize(self, end, self._process)
        self._up = False

    @property
    def ready(self) -> bool:
        """Whether it takes jobs by now. Does not wait."""
        if not self._up and not self._answers.empty():
            self._up = self._next(0.0) is None
        return self._up

    def send(self, job: Job, speeds: tuple[int, ...] | None) -> None:
        with contextlib.suppress(OSError):  # it is gone: the next answer says so
            self._pipe.send((job, speeds))

    def answers(self, count: int, timeout: float) -> Iterator[tuple[float, Any]]:
        for _ in range(count):
            yield self._next(timeout)

    def close(self) -> None:
        self._end()

    def _next(self, timeout: float) -> Any:
        try:
            answer = self._answers.get(timeout=timeout)
        except Empty:
            raise RuntimeError(
                f"The process that prepares sequences has not answered for {timeout:g} s. data.workers=0 does without it."
            ) from None
        if isinstance(answer, EOFError):
            self._answers.put(answer)
            raise self._gone()
        if isinstance(answer, Raised):
            raise answer.error from RuntimeError(f"in the process that prepares sequences:\n{answer.stack}")
        return answer

    def _gone(self) -> RuntimeError:
        self._process.join(FAREWELL)
        code = self._process.exitcode
        cause = f"signal {-code} ended it" if code is not None and code < 0 else f"it ended with exit code {code}"
        return RuntimeError(
            f"The process that prepares sequences is gone: {cause}. If memory was short, data.workers=0 does without it."
        )


def receive(pipe: Connection, answers: SimpleQueue[Any]) -> None:
    """What comes, to the end."""
    try:
        while True:
            answers.put(pickle.loads(pipe.recv_bytes()))
    except OSError:
        answers.put(EOFError())
    except EOFError as error:
        answers.put(error)


def end(process: BaseProcess) -> None:
    """At once: it has nothing to finish, and its pipe ends with it."""
    process.kill()
    process.join()


class Raised(NamedTuple):
    """What ended the process."""

    error: Exception
    stack: str


def serve(pipe: Connection, source: Source) -> None:
    """The main function of the process: says that it is up, then answers job after job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts both; the rank's end is this one's
    torch.set_num_threads(1)
    try:
        _answer(pipe, None)
        while True:
            job, speeds = pipe.recv()
            for answer in timed(source.answers(job, speeds)):
                _answer(pipe, answer)
    except (EOFError, ConnectionError):  # the rank has ended
        return
    except Exception as error:
        _answer(pipe, Raised(_portable(error), traceback.format_exc()))


def _answer(pipe: Connection, answer: object) -> None:
    # By plain pickle: a connection's own way puts tensors in shared memory, which would have to be kept for the reader.
    pipe.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


def _portable(error: Exception) -> Exception:
    """The error itself if the rank can read it, else one with its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
