"""One process against PyTorch's scaled_dot_product_attention on the same causal problem, run by run in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from distattn.attention import ContextParallel
from distattn.parallel.mask import causal

PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}  # asked for by name on a GPU
FORWARD_FLOPS, BOTH_FLOPS = 4, 14  # times heads, head size and visible pairs; the backward alone is 10


@dataclass(frozen=True)
class Problem:
    """Causal attention of one sequence."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        return self.tokens * (self.tokens + 1) // 2

    def flops(self, backward: bool) -> int:
        return (BOTH_FLOPS if backward else FORWARD_FLOPS) * self.heads * self.head_dim * self.pairs

    def inputs(self, rows: int | None = None) -> list[Tensor]:
        """q, k, v and the upstream gradient, token-major; ``rows`` of them, by default all."""
        generator = torch.Generator().manual_seed(0)
        n = self.tokens if rows is None else rows
        return [
            torch.randn(n, heads, self.head_dim, generator=generator).to(self.dtype).to(self.device)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]


@dataclass(frozen=True)
class Times:
    """Seconds of each run."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest run, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Row:
    """One contender of one pass. ``ratio`` is its median over the fastest of PyTorch's, ``share`` its speed over the GEMM's."""

    name: str
    backward: bool
    times: Times
    ratio: float
    tflops: float
    share: float


def clock(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one run, the device's included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(device: torch.device, contenders: dict[str, Callable[[], object]], repeat: int) -> dict[str, Times]:
    """Each contender once per round, so that a slow minute of the machine hits all alike. The first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeat + 1):
        for name, work in contenders.items():
            spent = clock(device, work)
            if turn:
                seconds[name].append(spent)
    return {name: Times(values) for name, values in seconds.items()}


def against_pytorch(problem: Problem, repeat: int, backend: str | None, say: Callable[[str], None]) -> tuple[list[Row], float]:
    """(rows, TFLOP/s of a square matrix product of the same dtype: the bound)."""
    bound = gemm_tflops(problem)
    rows = []
    for backward in (False, True):
        contenders = {"distattn": ours(problem, backward, backend), **peers(problem, backward)}
        times = in_turns(problem.device, contenders, repeat)
        best = min(t.median for name, t in times.items() if name != "distattn")
        for name, t in times.items():
            tflops = problem.flops(backward) / t.median / 1e12
            rows.append(Row(name, backward, t, t.median / best, tflops, tflops / bound))
        say(f"one process, {'forward and backward' if backward else 'forward'}: {rows[-len(times)].ratio:.3f} x PyTorch's time")
    return rows, bound


def ours(problem: Problem, backward: bool, backend: str | None) -> Callable[[], object]:
    """One call through the public interface, in a world of one."""
    cp = ContextParallel(backend=backend)
    plan = cp.plan(causal(problem.tokens))
    q, k, v, dout = problem.inputs()
    return partial(step, partial(cp.attention, plan=plan), [q, k, v], dout, backward)


def peers(problem: Problem, backward: bool) -> dict[str, Callable[[], object]]:
    """PyTorch's own choice and, on a GPU, each fast kernel that takes the problem. Tensors lie as PyTorch likes them best."""
    q, k, v, dout = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in problem.inputs())
    shared: dict[str, Any] = {"enable_gqa": True} if problem.kv_heads != problem.heads else {}

    def attend(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend | None = None) -> Tensor:
        if kernel is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, **shared)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, is_causal=True, **shared)

    made: dict[str, Callable[[], object]] = {"PyTorch": partial(step, attend, [q, k, v], dout, backward)}
    for name, kernel in PEERS.items() if problem.device.type == "cuda" else ():
        once = partial(step, partial(attend, kernel=kernel), [q, k, v], dout, backward)
        try:
            once()
        except RuntimeError:  # this kernel does not take the problem
            continue
        made[f"PyTorch {name}"] = once
    return made


def step(attend: Callable[..., Any], inputs: list[Tensor], dout: Tensor, backward: bool) -> None:
    """One forward, or one forward and backward, with gradients of all inputs."""
    if not backward:
        with torch.no_grad():
            attend(*inputs)
        return
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.autograd.grad(attend(*leaves), leaves, dout)


def gemm_tflops(problem: Problem) -> float:
    """What a matrix product reaches here: no attention is faster."""
    size = 8192 if problem.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=problem.device).to(problem.dtype)
    times = in_turns(problem.device, {"gemm": lambda: a @ a}, 5)["gemm"]
    return 2 * size**3 / times.median / 1e12
