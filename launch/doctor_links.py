"""What the connections between ranks give, measured through the communicator's own lanes: latency, bandwidth, overlap."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distattn.parallel.comm import Awaited, Communicator, Pending

LANE = 0
SMALL = 64  # bytes; what a message costs however small it is
ALL_PAIRS = 8  # ranks; with more of them only neighbours are measured
PROBE = Awaited("doctor", 0, 0, "a probe of the connection")


@dataclass(frozen=True)
class Link:
    """From rank ``src`` to rank ``dst``: one-way latency of a small message, and bandwidth of a large one."""

    src: int
    dst: int
    microseconds: float
    gigabytes_per_second: float
    intact: bool


@dataclass(frozen=True)
class Overlap:
    """Seconds of a rank's message and of its work, alone and together; ``hidden``: the part of the shorter one that is free."""

    rank: int
    message: float
    work: float
    together: float

    @property
    def hidden(self) -> float:
        return max(0.0, min(1.0, (self.message + self.work - self.together) / min(self.message, self.work)))


class Probe:
    """Buffers of one rank and the clock."""

    def __init__(self, communicator: Communicator, device: torch.device, size: int, repeat: int):
        self.communicator, self.device, self.repeat = communicator, device, repeat
        self.given = (torch.arange(size) * 31 + communicator.rank).to(torch.uint8).to(device)
        self.taken = torch.zeros(size, dtype=torch.uint8, device=device)

    def wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], None], repeat: int) -> float:
        """Median over some runs, after one that does not count; all ranks begin together."""
        times = []
        for _ in range(repeat + 1):
            self.communicator.all_gather_bytes(b"")
            self.wait_for_device()
            start = time.perf_counter()
            work()
            self.wait_for_device()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def swap(self, to: int, source: int, size: int) -> None:
        """One batch: sends to a rank while receiving from another."""
        self.post([(to, self.given[:size])], [(source, self.taken[:size])]).wait()

    def post(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> Pending:
        return self.communicator.post(LANE, sends, receives, PROBE)

    def there_and_back(self, a: int, b: int, times: int, size: int) -> None:
        """From rank a to rank b and back; the others do nothing."""
        rank = self.communicator.rank
        for _ in range(times if rank in (a, b) else 0):
            peer = b if rank == a else a
            out, back = [(peer, self.given[:size])], [(peer, self.taken[:size])]
            first, second = ((out, []), ([], back)) if rank == a else (([], back), (out, []))
            self.post(*first).wait()
            self.post(*second).wait()

    def intact(self, source: int) -> bool:
        return torch.equal(self.taken.cpu(), (torch.arange(len(self.taken)) * 31 + source).to(torch.uint8))


def neighbours(probe: Probe) -> list[Link]:
    """The ring, as ring attention uses it: every rank sends to the next one while it receives from the one before."""
    communicator, size = probe.communicator, len(probe.given)
    rank, world = communicator.rank, communicator.world
    after, before = (rank + 1) % world, (rank - 1) % world
    some = 20

    def small() -> None:
        for _ in range(some):
            probe.swap(after, before, SMALL)

    latency = probe.seconds(small, 3) / some
    large = probe.seconds(lambda: probe.swap(after, before, size), probe.repeat)
    link = (before, rank, latency * 1e6, size / large / 1e9, probe.intact(before))
    return _everybody(communicator, [link])


def pairs(probe: Probe) -> list[Link]:
    """Each pair alone, there and back, while the others are idle."""
    communicator, size, mine = probe.communicator, len(probe.given), []
    for a in range(communicator.world):
        for b in range(a + 1, communicator.world):
            latency = probe.seconds(partial(probe.there_and_back, a, b, 20, SMALL), 1) / 40
            large = probe.seconds(partial(probe.there_and_back, a, b, 1, size), probe.repeat) / 2
            if communicator.rank == a:
                mine.append((a, b, latency * 1e6, size / large / 1e9, probe.intact(b)))
    return _everybody(communicator, mine)


def overlap(probe: Probe) -> list[Overlap]:
    """Whether a message travels while the rank computes; about as much work as the message takes."""
    communicator, size = probe.communicator, len(probe.given)
    after, before = (communicator.rank + 1) % communicator.world, (communicator.rank - 1) % communicator.world
    factor = torch.full((512, 512), 1 / 512, device=probe.device)
    product = torch.empty_like(factor)

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(factor, factor, out=product)

    def together(times: int) -> None:
        pending = probe.post([(after, probe.given)], [(before, probe.taken)])
        work(times)
        pending.wait()

    message = probe.seconds(lambda: probe.swap(after, before, size), probe.repeat)
    times = max(1, round(message / max(probe.seconds(lambda: work(8), 3) / 8, 1e-7)))
    times = max(json.loads(answer) for answer in communicator.all_gather_bytes(json.dumps(times).encode()))
    alone = probe.seconds(lambda: work(times), probe.repeat)
    both = probe.seconds(lambda: together(times), probe.repeat)
    answers = communicator.all_gather_bytes(json.dumps([communicator.rank, message, alone, both]).encode())
    return [Overlap(*json.loads(answer)) for answer in answers]


def _everybody(communicator: Communicator, mine: Sequence[tuple[int, int, float, float, bool]]) -> list[Link]:
    return [Link(*row) for answer in communicator.all_gather_bytes(json.dumps(mine).encode()) for row in json.loads(answer)]
