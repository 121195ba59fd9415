"""The figures of the kernel benchmark as a table, a picture, JSON, and as the table that the choice of backends reads."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from distattn.kernels import RANKING
from distattn.kernels.measured import mask_of
from distattn.launch.bench_kernels_cases import Case
from distattn.launch.bench_kernels_claims import Runs, claims, print_claims
from distattn.launch.bench_kernels_measure import Rate
from distattn.launch.bench_kernels_ranks import SCHEDULES, Distributed
from distattn.launch.bench_kernels_run import WHOLE

GEMM = "GEMM"


@dataclass
class Results:
    """What was measured; ``refused`` says who could not take a case, and why."""

    command: str
    hardware: dict[str, Any]
    gemm_flops: int
    rates: dict[Case, dict[str, Rate]] = field(default_factory=dict)
    refused: dict[Case, dict[str, str]] = field(default_factory=dict)
    distributed: list[Distributed] = field(default_factory=list)
    occupancy: dict[Case, dict[str, tuple[float, float]]] = field(default_factory=dict)  # counted: see kernel_occupancy.py

    def counted(self, case: Case, who: str) -> str:
        """Mean over busiest multiprocessor of each launch of the Hopper kernels, by count of tiles; empty for others."""
        if who not in ("gluon", WHOLE) or case not in self.occupancy:
            return ""
        return " ".join(f"{found[who == 'gluon']:.3f}" for found in self.occupancy[case].values())

    def tflops(self, case: Case, who: str, cold: bool = False) -> float:
        """TFLOP/s of unmasked pairs; of the matrix product for :data:`GEMM`."""
        rate = self.rates[case][who]
        return (self.gemm_flops if who == GEMM else case.flops) / (min(rate.cold) if cold else rate.seconds) / 1e12

    def ratio(self, case: Case, who: str, library: str) -> float | None:
        """Sustained rate over a library's in the same run, None where it did not run."""
        found = self.rates[case].get(f"{library} (library)")
        return found.seconds / self.rates[case][who].seconds if found and who != GEMM else None


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if device.type != "cuda":
        return found | {"name": "cpu", "threads": torch.get_num_threads()}
    import triton

    properties = torch.cuda.get_device_properties(device)
    found |= {"name": properties.name, "capability": [properties.major, properties.minor], "triton": triton.__version__}
    return found | {"cudnn": torch.backends.cudnn.version(), "processors": properties.multi_processor_count}


def print_results(results: Results) -> None:
    """One table of all cases, one of the ranks, and the command that made them."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(
        "case", "who", "sustained", "spread", "cold", "of GEMM", "/ cuDNN", "/ flash", "/ flex", "/ SDPA", "occupancy",
        title="TFLOP/s of unmasked pairs", box=box.ROUNDED if console.is_terminal else box.SIMPLE_HEAD,
    )  # fmt: skip
    for case, rates in results.rates.items():
        gemm = results.tflops(case, GEMM)
        for who, rate in sorted(rates.items(), key=lambda item: item[1].seconds):
            ratios = (results.ratio(case, who, library) for library in ("cuDNN", "flash", "flex_attention", "SDPA"))
            table.add_row(
                case.name, who, f"{results.tflops(case, who):.4g}", f"{rate.spread:.1%}",
                f"{results.tflops(case, who, True):.4g}",
                f"{results.tflops(case, who) / gemm:.1%}",
                *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
                results.counted(case, who),
            )  # fmt: skip
        table.add_section()
    if results.rates:
        console.print(table)
    if results.occupancy:
        console.print("occupancy: counted, mean over busiest multiprocessor in tiles, launch by launch", highlight=False)
    for found in results.distributed:
        for name in SCHEDULES:
            console.print(
                f"{found.direction}, {found.tokens} tokens on {found.world} ranks, {name}: sum of the ranks "
                f"{found.share(name):.3f} x one device, slowest rank {found.imbalance(name):+.1%} of the mean",
                highlight=False,
            )
    said = {(who, why) for refused in results.refused.values() for who, why in refused.items()}
    for who, why in sorted(said):
        console.print(f"not measured: {who}: {why}", style="yellow", highlight=False, markup=False)
    console.print(f"Made by: {results.command} on {results.hardware}", highlight=False, markup=False)
    if results.hardware.get("capability") == [9, 0]:
        print_claims(console, claims(Runs([as_json(results)])))


def as_json(results: Results) -> dict[str, Any]:
    """All samples, for the record."""
    rows = [
        {
            "case": case.name, "group": case.group, "mask": case.mask, "tokens": case.tokens, "rows": case.queries,
            "direction": case.direction,
            "d": case.d, "d_v": case.d_v, "heads": case.heads, "kv_heads": case.kv_heads, "state": case.state, "who": who,
            "occupancy": results.counted(case, who),
            "tflops_sustained": results.tflops(case, who), "tflops_cold": results.tflops(case, who, True),
            "seconds_sustained": rate.sustained, "seconds_cold": rate.cold,
            "megahertz": [[reading.megahertz for reading in found] for found in rate.readings],
            "watts": [[reading.watts for reading in found] for found in rate.readings],
        }
        for case, rates in results.rates.items()
        for who, rate in rates.items()
    ]  # fmt: skip
    ranks = [
        {"direction": found.direction, "world": found.world, "tokens": found.tokens, "schedule": name,
         "sum_over_one": found.share(name),
         "imbalance": found.imbalance(name), "seconds": [rate.seconds for rate in found.ranks[name]], "one": found.one.seconds}
        for found in results.distributed
        for name in SCHEDULES
    ]  # fmt: skip
    refused = [{"case": case.name, **who} for case, who in results.refused.items()]
    return {"command": results.command, "hardware": results.hardware, "rates": rows, "ranks": ranks, "refused": refused}


def as_order(results: Results) -> dict[str, Any]:
    """The table of :mod:`distattn.kernels.measured`: backends by the geometric mean of their sustained rates over the lengths."""
    rates: dict[tuple[str, str, int, int], dict[str, list[float]]] = {}
    for case, found in results.rates.items():
        if case.state or case.rows is not None:  # shapes that leave most of a card idle say nothing of ordinary ones
            continue
        row = rates.setdefault((case.direction, mask_of(case.bands), case.d, case.d_v), {})
        for who in found:
            if who in RANKING:
                row.setdefault(who, []).append(results.tflops(case, who))
    rows = []
    for (direction, mask, d, d_v), row in sorted(rates.items()):
        most = max((len(values) for values in row.values()), default=0)
        means = {who: math.exp(sum(map(math.log, v)) / len(v)) for who, v in row.items() if len(v) == most}
        order = sorted(means, key=means.__getitem__, reverse=True)
        tflops = {who: round(means[who], 1) for who in order}
        rows.append({"direction": direction, "mask": mask, "d": d, "d_v": d_v, "backends": order, "tflops": tflops})
    return {"status": "measured", "command": results.command, "hardware": results.hardware, "order": rows}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def draw(results: Results, path: Path) -> None:
    """One bar a contender and case, the matrix product as a line above them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(results.rates)
    names = list(dict.fromkeys(who for rates in results.rates.values() for who in rates if who != GEMM))
    figure, axes = pyplot.subplots(figsize=(max(8, 1.1 * len(cases)), 6), layout="constrained")
    width = 0.8 / max(1, len(names))
    for n, who in enumerate(names):
        places = [i for i, case in enumerate(cases) if who in results.rates[case]]
        axes.bar([i + n * width for i in places], [results.tflops(cases[i], who) for i in places], width, label=who)
    gemm = [results.tflops(case, GEMM) for case in cases]
    axes.step(
        [i - 0.1 for i in range(len(cases))] + [len(cases) - 0.1], [*gemm, gemm[-1]], where="post", color="black", label=GEMM
    )
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(cases))], [case.name for case in cases], rotation=60, ha="right", fontsize=8
    )
    axes.set_ylabel("TFLOP/s of unmasked pairs, sustained")
    axes.set_title(f"{results.hardware['name']}, torch {results.hardware['torch']}")
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
