"""Ranks of one thread each, as processes of their own, against one process that has all of their threads."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from distattn.launch.bench_attention_single import Problem, Times, clock, ours, step
from distattn.parallel.mask import causal
from distattn.parallel.schedules import make_plan
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import statistics

SCHEDULES = ("ring", "zigzag", "striped")  # the rest is for several nodes, documents and windows: launch/bench_schedules.py
START_SECONDS = 120.0


class RanksFailed(RuntimeError):
    """A rank of the benchmark did not answer; says which and why."""


@dataclass(frozen=True)
class Row:
    """A schedule's throughput over that of one process with as many threads; ``bound`` is what its balance of work allows."""

    schedule: str
    backward: bool
    times: Times
    one_process: Times
    balance: float

    @property
    def throughput(self) -> float:
        return self.one_process.median / self.times.median

    @property
    def bound(self) -> float:
        return 1 / self.balance


class Ranks:
    """Processes that stay, so that runs can take turns; idle ranks wait in a read. All are gone when the block ends."""

    def __init__(self, world: int, problem: Problem, backend: str | None, timeout: float):
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="bench-attention-")
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            near, far = context.Pipe()
            arguments = (far, rank, world, str(Path(self._folder.name) / "store"), problem, backend, timeout)
            process = context.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            far.close()
            self.pipes.append(near)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        try:
            self.answers(max(self.timeout, START_SECONDS))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def run(self, what: str, *arguments: Any) -> list[Any]:
        """What every rank answers."""
        for pipe in self.pipes:
            pipe.send((what, arguments))
        return self.answers(self.timeout)

    def answers(self, seconds: float) -> list[Any]:
        """One answer of each rank, within ``seconds``."""
        deadline = time.monotonic() + seconds
        found: dict[int, Any] = {}
        while len(found) < len(self.pipes):
            missing = [rank for rank in range(len(self.pipes)) if rank not in found]
            ready = wait([self.pipes[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RanksFailed(f"Ranks {missing} did not answer within {seconds:g} s. Pass a longer --timeout.")
            for rank in (rank for rank in missing if self.pipes[rank] in ready):
                try:
                    error, found[rank] = self.pipes[rank].recv()
                except EOFError:
                    error = f"its process ended with exit code {self.processes[rank].exitcode}"
                if error:
                    raise RanksFailed(f"Rank {rank} failed: {error}")
        return [found[rank] for rank in range(len(self.pipes))]


def rank_main(pipe: Connection, rank: int, world: int, store: str, problem: Problem, backend: str | None, timeout: float) -> None:
    """A rank: answers (error, value) to every request until the pipe closes."""
    try:
        worker = _Rank(rank, world, store, problem, backend, timeout)
        pipe.send(("", None))
        while True:
            what, arguments = pipe.recv()
            pipe.send(("", getattr(worker, what)(*arguments)))
    except EOFError:
        return
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", None))


class _Rank:
    def __init__(self, rank: int, world: int, store: str, problem: Problem, backend: str | None, timeout: float):
        import torch.distributed as dist

        from distattn.parallel.comm_process import ProcessCommunicator

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        torch.set_num_threads(1)
        self.device = torch.device("cuda", rank) if problem.device.type == "cuda" else problem.device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.problem, self.backend = problem, backend
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        self.communicator = ProcessCommunicator(timeout=timeout)
        self.ready: dict[str, Any] = {}

    def attention(self, schedule: str, backward: bool) -> float:
        """Seconds of one call, all ranks beginning together."""
        from distattn.attention import ContextParallel

        if schedule not in self.ready:
            cp = ContextParallel(schedule=schedule, backend=self.backend, communicator=self.communicator)
            plan = cp.plan(causal(self.problem.tokens))
            *inputs, dout = (x.to(self.device) for x in self.problem.inputs(plan.rows))
            self.ready[schedule] = partial(cp.attention, plan=plan), inputs, dout
        attend, inputs, dout = self.ready[schedule]
        self.communicator.all_gather_bytes(b"")
        return clock(self.device, lambda: step(attend, inputs, dout, backward))

    def idle_stages(self, tokens: int, repeat: int) -> tuple[float, float, int]:
        """See :func:`distattn.launch.bench_attention_cost.seconds_a_pass`: messages are sent, nothing is computed."""
        from distattn.launch.bench_attention_cost import seconds_a_pass

        return seconds_a_pass(self.communicator, tokens, self.problem, repeat)


def against_one_process(
    ranks: Ranks, world: int, problem: Problem, repeat: int, backend: str | None, say: Callable[[str], None]
) -> list[Row]:
    """Each schedule and the one process in turns; a round of the ranks lasts as long as its slowest rank."""
    one_device_is_all = problem.device.type == "cpu"  # on GPUs the ranks have a device each, one process has one of them
    rows = []
    for backward in (False, True):
        one = ours(problem, backward, backend)
        contenders: dict[str, Callable[[], float]] = {"one process": lambda one=one: clock(problem.device, one)}  # type: ignore[misc]
        for schedule in SCHEDULES:
            contenders[schedule] = lambda s=schedule, b=backward: max(ranks.run("attention", s, b))  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(repeat + 1):
            for name, work in contenders.items():
                spent = work()
                if turn:
                    seconds[name].append(spent)
        ideal = Times([t / (1 if one_device_is_all else world) for t in seconds.pop("one process")])
        for name, values in seconds.items():
            rows.append(Row(name, backward, Times(values), ideal, balance(name, problem, world)))
            kind = "forward and backward" if backward else "forward"
            say(f"{world} ranks, {name}, {kind}: {rows[-1].throughput:.3f} of one process, bound {rows[-1].bound:.3f}")
    return rows


def balance(schedule: str, problem: Problem, world: int) -> float:
    """Work of the busiest rank over the mean, exact."""
    return statistics(make_plan(schedule, causal(problem.tokens), world), shape_of(problem)).balance


def shape_of(problem: Problem) -> Shape:
    """The shape of the benchmark's calls."""
    return Shape(problem.heads, problem.kv_heads, problem.head_dim, problem.head_dim, problem.dtype)
