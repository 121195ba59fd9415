"""The links' and the host's part of a cluster description, measured through attention's own communicator and executor."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from distattn.attention import ContextParallel
from distattn.launch.bench_attention_cost import TINY, Silent, seconds_a_pass
from distattn.launch.bench_attention_single import Problem, clock, step
from distattn.launch.doctor_links import SMALL, Probe
from distattn.parallel.comm import Communicator, SoloCommunicator
from distattn.parallel.mask import causal

SOME = 20  # small messages in one measurement
SHARED = 0.85  # less than this share of what a message alone gets means that something is shared


@dataclass(frozen=True)
class Nodes:
    """Where the ranks are: ``devices`` on each node, node by node."""

    world: int
    devices: int

    @property
    def count(self) -> int:
        return self.world // self.devices

    def neighbours(self, rank: int) -> tuple[int, int]:
        """(to, from) in the ring of the rank's node."""
        first = rank // self.devices * self.devices
        return first + (rank + 1 - first) % self.devices, first + (rank - 1 - first) % self.devices

    def across(self, rank: int) -> tuple[int, int]:
        """(to, from): the same device of the next node and of the one before."""
        return (rank + self.devices) % self.world, (rank - self.devices) % self.world


def everybody(communicator: Communicator, mine: Any) -> list[Any]:
    """What every rank found, in rank order."""
    return [json.loads(answer) for answer in communicator.all_gather_bytes(json.dumps(mine).encode())]


def alone(probe: Probe, a: int, b: int, size: int) -> tuple[float, float]:
    """(latency, bytes a second) of messages from rank a to rank b and back while the others are idle; the same on all ranks."""
    small = probe.seconds(partial(probe.there_and_back, a, b, SOME, SMALL), 3) / (2 * SOME)
    large = probe.seconds(partial(probe.there_and_back, a, b, 1, size), probe.repeat) / 2
    found = everybody(probe.communicator, [small, size / max(large - small, 1e-9)])[a]
    return found[0], found[1]


def at_once(probe: Probe, to: int, source: int, size: int) -> float:
    """Bytes a second out of each rank, on average, while all ranks send and receive."""

    def small_ones() -> None:
        for _ in range(SOME):
            probe.swap(to, source, SMALL)

    small = probe.seconds(small_ones, 3) / SOME
    large = probe.seconds(partial(probe.swap, to, source, size), probe.repeat)
    return statistics.mean(everybody(probe.communicator, size / max(large - small, 1e-9)))


def measure_links(probe: Probe, nodes: Nodes, say: Callable[[str], None]) -> dict[str, Any]:
    """The sections ``inside`` and ``between``, as far as there are such links."""
    found: dict[str, Any] = {}
    rank, size = probe.communicator.rank, len(probe.given)
    if nodes.devices > 1:
        pairs = [alone(probe, 0, peer, size) for peer in range(1, min(nodes.devices, 4))]
        latency, single = (statistics.median(column) for column in zip(*pairs, strict=True))
        together = at_once(probe, *nodes.neighbours(rank), size)
        found["inside"] = {"port_gb_s": _round(single / 1e9), "latency_us": _round(latency * 1e6)}
        if together < SHARED * single:
            found["inside"]["shared_gb_s"] = _round(together * nodes.devices / 1e9)
        say(f"inside a node: {single / 1e9:.3g} GB/s alone, {together / 1e9:.3g} all at once, {latency * 1e6:.1f} us")
    if nodes.count > 1:
        latency, single = alone(probe, 0, nodes.devices, size)
        together = at_once(probe, *nodes.across(rank), size)
        rails = max(1, min(nodes.devices, round(nodes.devices * together / single)))
        rail = together * nodes.devices / rails
        found["between"] = {
            "nics": rails,
            "nic_gb_s": _round(rail / 1e9),
            "latency_us": _round(latency * 1e6),
            "through_port": False,
        }
        say(f"between nodes: {single / 1e9:.3g} GB/s alone, {together / 1e9:.3g} all at once, {latency * 1e6:.1f} us")
    return found


def measure_traffic(probe: Probe, to: int, source: int) -> float:
    """Microseconds that a million bytes, sent or received, take from the kernels of a rank while all cores are busy."""
    size = len(probe.given)
    factor = torch.full((256, 256), 1 / 256)
    product = torch.empty_like(factor)

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(factor, factor, out=product)

    def both(times: int) -> None:
        pending = probe.post([(to, probe.given)], [(source, probe.taken)])
        work(times)
        pending.wait()

    message = probe.seconds(partial(probe.swap, to, source, size), probe.repeat)
    times = round(4 * message / max(probe.seconds(lambda: work(16), 3) / 16, 1e-7))
    times = max(everybody(probe.communicator, times))
    stolen = probe.seconds(lambda: both(times), probe.repeat) - probe.seconds(lambda: work(times), probe.repeat)
    return max(0.0, statistics.mean(everybody(probe.communicator, stolen))) / (2 * size / 1e6) * 1e6


def measure_host(probe: Probe, problem: Problem, kernel: dict[str, Any], cores: int | None, repeat: int) -> dict[str, Any]:
    """The section ``host``: a pass, a stage, a message and copies, each by itself."""
    device = problem.device
    passes = seconds_a_pass(Silent(1, 8), 8 * TINY, problem, repeat)
    stage = (passes[0] + passes[1]) / (2 * passes[2])
    copies = [probe.given.clone() for _ in range(2)]
    copy = len(probe.given) / min(clock(device, partial(copies[0].copy_, copies[1])) for _ in range(5 * repeat))
    found = {
        "pass_us": _round(_pass_seconds(problem, kernel, stage, repeat) * 1e6),
        "stage_us": _round(stage * 1e6),
        "message_us": _round(_post_seconds(probe) * 1e6),
        "copy_gb_s": _round(copy / 1e9),
        "asynchronous": device.type == "cuda",
    }
    return found if cores is None else found | {"cores": cores}


def _pass_seconds(problem: Problem, kernel: dict[str, Any], stage: float, repeat: int) -> float:
    """What a call costs beside its one stage and its kernel: operator and autograd, the mean of forward and backward."""
    cp = ContextParallel(communicator=SoloCommunicator())
    plan = cp.plan(causal(16))
    *inputs, dout = problem.inputs(16)
    attend = partial(cp.attention, plan=plan)
    # The fastest: the first calls compile and compare plans, and what disturbs only adds.
    both = min(clock(problem.device, lambda: step(attend, inputs, dout, True)) for _ in range(10 * repeat))
    kernels = sum(kernel[direction][key] for direction in ("forward", "backward") for key in ("launch_us", "band_us")) * 1e-6
    return max(0.0, (both - kernels) / 2 - stage)


def _post_seconds(probe: Probe) -> float:
    """Of posting one message, at one end; without waiting."""
    rank, world = probe.communicator.rank, probe.communicator.world
    if world == 1:
        return 0.0
    to, source = (rank + 1) % world, (rank - 1) % world
    spent = []
    for _ in range(SOME):
        start = time.perf_counter()
        pending = probe.post([(to, probe.given[:SMALL])], [(source, probe.taken[:SMALL])])
        spent.append((time.perf_counter() - start) / 2)
        pending.wait()
    return statistics.median(everybody(probe.communicator, statistics.median(spent)))


def same_sizes(answers: Sequence[int]) -> int:
    """How many ranks each node has.

    Raises:
        ValueError: not all nodes have as many.
    """
    if len(set(answers)) != 1 or len(answers) % answers[0]:
        raise ValueError(f"Nodes hold {sorted(set(answers))} ranks each. Start as many on every node: the same --nproc-per-node.")
    return answers[0]


def _round(x: float) -> float:
    return float(f"{x:.4g}")
