"""The kernel's part of a cluster description: the peak, and the curve of each direction from launches of many shapes.

What is fitted is the model of ``Cluster.task_seconds``: a launch, its bands, the rows' way through memory, and work over a rate
that depends on the shorter side; each figure from launches in which it is nearly alone. Differences of times are small: whoever
calibrates sweeps over all launches several times, so that a slow second of the machine hits no figure alone.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from distattn.kernels import choose
from distattn.kernels.bands import Band, Bands
from distattn.kernels.contract import Scores, accumulate_dtype, empty_state
from distattn.parallel.cluster import Direction, pair_flops, row_traffic
from distattn.parallel.shape import Shape

TINY, SOME = 16, 8  # rows of a band in which nothing counts but the launch; bands of it
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Grid:
    """What is measured: heads of each head size, shorter sides of bands against ``long`` rows, and for how long."""

    heads: int
    kv_heads: int
    sizes: tuple[int, ...]
    sides: tuple[int, ...]
    long: int
    dtype: torch.dtype
    others: tuple[torch.dtype, ...]
    rounds: int
    round_seconds: float

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Grid:
        """What suits a device."""
        if device.type == "cpu":
            sides, long = (
                ((16, 128), 256) if quick else ((16, 64, 256, 512, 768, 1536), 1536)
            )  # PyTorch's op changes tiles at 768
            sizes = (64,) if quick else (32, 64, 128)
            return cls(8, 8, sizes, sides, long, torch.float32, (torch.bfloat16,), 2, 0.005 if quick else 0.02)
        halves = torch.cuda.get_device_capability(device) >= (8, 0) or bool(torch.version.hip)
        dtype, others = (torch.bfloat16, (torch.float16, torch.float32)) if halves else (torch.float16, (torch.float32,))
        sides, long = ((128, 1024), 2048) if quick else ((16, 32, 64, 128, 256, 512, 1024, 2048, 8192), 8192)
        return cls(32, 8, (64, 128), sides, long, dtype, others, 3 if quick else 5, 0.02 if quick else 0.1)


class Bench:
    """Launches of the backend that would run."""

    def __init__(self, device: torch.device, grid: Grid, backend: str | None):
        self.device, self.grid, self.prefer = device, grid, backend
        self.name = ""
        self.rounds: dict[tuple[Any, ...], list[float]] = defaultdict(list)  # seconds of each launch, of all sweeps

    def shape(self, size: int, dtype: torch.dtype | None = None) -> Shape:
        return Shape(self.grid.heads, self.grid.kv_heads, size, size, dtype or self.grid.dtype)

    def launch(self, shape: Shape, direction: Direction, q_rows: int, k_rows: int, count: int, causal: bool) -> Callable[[], Any]:
        """A call of ``count`` bands, each on queries and keys of its own, that goes on from a state."""
        generator = torch.Generator().manual_seed(0)

        def tensor(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, shape.d, generator=generator).to(shape.dtype).to(self.device)

        q, dout = (tensor(count * q_rows, shape.heads) for _ in range(2))
        k, v = (tensor(count * k_rows, shape.kv_heads) for _ in range(2))
        scores = Scores(shape.d**-0.5)
        backend = choose(q, k, v, scores, self.prefer).backend
        self.name = backend.name
        limit = {"hi": k_rows - q_rows} if causal else {}
        whole = [Band(i * q_rows, (i + 1) * q_rows, i * k_rows, (i + 1) * k_rows, **limit) for i in range(count)]
        bands = Bands(whole) if not causal else Bands([b._replace(hi=i * (k_rows - q_rows)) for i, b in enumerate(whole)])
        if direction == "forward":
            return partial(backend.forward, q, k, v, bands, scores, empty_state(q, shape.d_v))
        lse = backend.forward(q, k, v, bands, scores).lse
        wide = accumulate_dtype(shape.dtype)
        sums = [torch.zeros(x.shape, dtype=wide, device=self.device) for x in (q, k, v)]
        return partial(backend.backward, dout, q, k, v, torch.zeros_like(lse), lse, bands, scores, *sums)

    def seconds(self, name: tuple[Any, ...], work: Callable[[], Any]) -> float:
        """The median of some more rounds and all before under this name. The machine should do nothing else."""
        work()
        rounds = self.rounds[name]
        # On one thread the processor's time is the kernel's, and what other programs take is not in it.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        for _ in range(self.grid.rounds):
            self._synchronize()
            count, start = 0, clock()
            while clock() - start < self.grid.round_seconds or not count:
                for _ in range(1 if self.device.type == "cpu" else 8):
                    work()
                    count += 1
                self._synchronize()
            rounds.append((clock() - start) / count)
        return statistics.median(rounds)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def task(self, size: int, direction: Direction, q_rows: int, k_rows: int, count: int = 1, causal: bool = False) -> float:
        work = self.launch(self.shape(size), direction, q_rows, k_rows, count, causal)
        return self.seconds((size, direction, q_rows, k_rows, count, causal), work)


def gemm_flops(bench: Bench) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if bench.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=bench.device).to(bench.grid.dtype)
    return 2 * size**3 / bench.seconds(("product",), lambda: a @ a)


def measure_kernel(bench: Bench, say: Callable[[str], None]) -> dict[str, Any]:
    """The section ``kernel`` of a description, from one more sweep over the launches and all before."""
    grid = bench.grid
    units, tile = (
        (torch.cuda.get_device_properties(bench.device).multi_processor_count, 128) if bench.device.type == "cuda" else (1, 1)
    )
    peak = gemm_flops(bench)
    curves, diagonals = {}, []
    for direction in ("forward", "backward"):
        found, rates = _curve(bench, direction, units, tile, say)
        peak = max(peak, *(rate for points in rates.values() for rate in points.values()))
        curves[direction] = found, rates
        size = grid.sizes[len(grid.sizes) // 2]
        diagonals.append({n: _diagonal(bench, size, direction, n, found, rates[size][n]) for n in grid.sides if n > TINY})
        text = ", ".join(f"{width:.0f} of {n}" for n, width in diagonals[-1].items())
        say(f"{direction}: rows of tiles along a diagonal edge: {text}")
    kernel: dict[str, Any] = {"peak_tflops": _peaks(bench, peak), "units": units, "tile": tile}
    kernel["diagonal_rows"] = {n: round(statistics.mean(widths[n] for widths in diagonals), 1) for n in diagonals[0]}
    for direction, (found, rates) in curves.items():
        shares = {size: {side: max(rate / peak, LEAST_SHARE) for side, rate in points.items()} for size, points in rates.items()}
        kernel[direction] = found | {"efficiency": {n: {m: round(x, 5) for m, x in p.items()} for n, p in shares.items()}}
    return kernel


def _peaks(bench: Bench, peak: float) -> dict[str, float]:
    """TFLOP/s by dtype; of dtypes beside the main one such that its curve is right for a long launch of them too."""
    grid = bench.grid
    size, long = grid.sizes[len(grid.sizes) // 2], grid.long
    whole = {
        dtype: bench.launch(bench.shape(size, dtype), "forward", long, long, 1, False) for dtype in (grid.dtype, *grid.others)
    }
    seconds = {dtype: bench.seconds((dtype,), work) for dtype, work in whole.items()}
    return {str(d).removeprefix("torch."): float(f"{peak / 1e12 * seconds[grid.dtype] / s:.4g}") for d, s in seconds.items()}


def _curve(
    bench: Bench, direction: Direction, units: int, tile: int, say: Callable[[str], None]
) -> tuple[dict[str, float], dict[int, dict[int, float]]]:
    """(overheads, FLOP/s on a full device by head size and shorter side)."""
    grid, size = bench.grid, bench.grid.sizes[len(bench.grid.sizes) // 2]
    one, some = (bench.task(size, direction, TINY, TINY, count) for count in (1, SOME))
    band = max(0.0, (some - one) / (SOME - 1))
    launch = max(0.0, one - band)
    per_query, per_key = row_traffic(bench.shape(size), direction)
    thin = sum(bench.task(size, direction, *rows) - launch - band for rows in ((grid.long, 1), (1, grid.long)))
    memory = grid.long * (per_query + per_key) / max(thin, 1e-7)
    band = max(0.0, band - TINY * (per_query + per_key) / memory)
    found = {"launch_us": _round(launch * 1e6), "band_us": _round(band * 1e6), "memory_gb_s": _round(memory / 1e9)}
    say(
        f"{direction}: {launch * 1e6:.1f} us a launch, {band * 1e6:.1f} us a band, rows at {memory / 1e9:.1f} GB/s ({bench.name})"
    )
    rates: dict[int, dict[int, float]] = {}
    for size in grid.sizes:
        per_query, per_key = row_traffic(bench.shape(size), direction)
        flops_of_pair = grid.heads * pair_flops(bench.shape(size), direction)
        points: dict[int, tuple[float, float]] = {}
        for side in grid.sides:
            flops = spent = total = 0.0
            for q_rows, k_rows in {(side, grid.long), (grid.long, side)}:
                rows = q_rows if direction == "forward" else k_rows
                filled = min(1.0, grid.heads * -(-rows // tile) / units)
                overhead = launch + band + (q_rows * per_query + k_rows * per_key) / memory
                seconds = bench.task(size, direction, q_rows, k_rows)
                spent += max(seconds - overhead, 1e-3 * seconds) * filled
                total += seconds * filled
                flops += q_rows * k_rows * flops_of_pair
            # A launch that is nearly all overhead tells nothing of the rate.
            points[side] = flops / spent, (spent / total) ** 2
        rates[size] = _rising(points)
        say(
            f"{direction}, head size {size}: "
            + ", ".join(f"{side} rows {rate / 1e12:.3g}" for side, rate in rates[size].items())
            + " TFLOP/s"
        )
    return found, rates


def _rising(points: dict[int, tuple[float, float]]) -> dict[int, float]:
    """Rates by side, rising, from (rate, weight): a longer side is never slower; neighbours which say otherwise are averaged."""
    blocks: list[tuple[float, float, list[int]]] = []  # time of an operation, weight, sides
    for side, (rate, weight) in sorted(points.items()):
        blocks.append((1 / rate, weight, [side]))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (late, w_late, late_sides), (early, w_early, early_sides) = blocks.pop(), blocks.pop()
            weight = w_early + w_late
            blocks.append(((early * w_early + late * w_late) / weight, weight, early_sides + late_sides))
    return {side: 1 / spent for spent, _, sides in blocks for side in sides}


def _diagonal(bench: Bench, size: int, direction: Direction, n: int, found: dict[str, float], rate: float) -> float:
    """Rows of the tiles along a causal edge of ``n``: what causal squares cost above their area, spread over their side."""
    count = max(1, bench.grid.long // n)
    per_query, per_key = row_traffic(bench.shape(size), direction)
    rows = n * (per_query + per_key) / (found["memory_gb_s"] * 1e9)
    spent = (bench.task(size, direction, n, n, count, causal=True) - found["launch_us"] * 1e-6) / count
    pairs = (spent - found["band_us"] * 1e-6 - rows) * rate / (bench.grid.heads * pair_flops(bench.shape(size), direction))
    return min(max(2 * (pairs - n * (n + 1) / 2) / n, 0.0), float(n))


def _round(x: float) -> float:
    return float(f"{x:.4g}")
