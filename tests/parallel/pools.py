"""Ranks of a test as the trainers and servers of a pool: the first ones train, the others serve."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

import distattn
from distattn.kernels import load
from distattn.kernels.contract import Backend
from distattn.parallel.pool_board import Address
from distattn.parallel.pool_server import AttentionServer, Ending
from distattn.parallel.strategy import Balance, Strategy
from tests.parallel.attend import Problem, error, exact

TOLERANCE = 1e-6  # float32, relative L2 against float64


def store() -> dist.Store:
    """In which the ranks of a test tell each other what to do."""
    return dist.distributed_c10d._get_default_store()


def say(key: str, value: str = "yes") -> None:
    store().set(key, value)


def await_key(key: str) -> str:
    return store().get(key).decode()


def trainers(count: int, servers: int, silence: float = 1.0, **options) -> distattn.ContextParallel:
    """A trainer's connection; collective of the first ``count`` ranks, after :func:`group_of`."""
    from distattn.parallel import pool

    pool.SILENCE = silence
    group = group_of(count)
    return distattn.ContextParallel(
        group,
        Strategy("disaggregate", balance=Balance(smallest=4)),
        servers=servers,
        announce=lambda address: say("address", address),
        **{"timeout": 30.0, "pool_store": "127.0.0.1:0", **options},
    )


def group_of(count: int) -> dist.ProcessGroup:
    """The trainers' group; every rank of the test, servers too, calls this once."""
    return dist.new_group(list(range(count)))


@dataclass
class Fault:
    """A kernel that does something to its own process when it is called for the ``at``-th time in a direction."""

    inner: Backend
    direction: str
    at: int
    strike: Callable[[], None]
    name: str = "faulty"
    calls: int = 0

    def reject(self, *_) -> str | None:
        return None

    def forward(self, *arguments):
        self._count("forward")
        return self.inner.forward(*arguments)

    def backward(self, *arguments):
        self._count("backward")
        return self.inner.backward(*arguments)

    def _count(self, direction: str) -> None:
        self.calls += direction == self.direction
        if direction == self.direction and self.calls == self.at:
            self.strike()


def send_self(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def serve(fault: Fault | None = None, leave_at: str | None = None, start_at: str | None = None) -> tuple[Ending, int, str]:
    """One membership of this rank. ``leave_at``, ``start_at``: keys that somebody sets when it is time."""
    if start_at:
        await_key(start_at)
    server = AttentionServer(Address.parse(await_key("address"), "address"), distattn.__version__)
    if fault is not None:
        server._kernels = Always(fault)  # type: ignore[assignment]
    if leave_at:
        threading.Thread(target=leave_when_told, args=(server, leave_at), daemon=True).start()
    work = server.serve()
    return work.ending, work.calls, work.why


class Always(dict):
    """The same kernel for every call."""

    def __init__(self, kernel: Fault) -> None:
        self.kernel = kernel

    def get(self, *_):
        return self.kernel


def leave_when_told(server: AttentionServer, key: str) -> None:
    while not store().check([key]):
        time.sleep(0.02)
    server.leave("the test wants it")


def attend(cp: distattn.ContextParallel, problem: Problem, **options) -> dict[str, float]:
    """Relative errors of out, lse and all gradients of one call and its backward, against one device in float64."""
    plan = cp.plan(problem.mask)
    q, k, v = (cp.shard(x, plan).clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = cp.attention(q, k, v, plan, softcap=problem.scores.softcap, sinks=problem.sinks, return_lse=True)
    upstream = [cp.shard(problem.dout, plan), cp.shard(problem.dlse, plan).to(lse.dtype)]
    torch.autograd.backward([out, lse], upstream)
    found = [cp.unshard(x.detach(), plan) for x in (out, lse, q.grad, k.grad, v.grad)]
    return {name: error(a, b) for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, exact(problem), strict=True)}


class Lines(logging.Handler):
    """What the pool said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("distattn.parallel.pool").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def aten() -> Backend:
    return load("aten")
