"""The figures of the attention benchmark as tables and as one picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from distattn.launch.bench_attention_cost import Memory, Overhead, Planning, flatness
from distattn.launch.bench_attention_ranks import Row as RanksRow
from distattn.launch.bench_attention_single import Problem
from distattn.launch.bench_attention_single import Row as SingleRow

TARGET_RATIO, TARGET_THROUGHPUT, TARGET_FLAT = 1.05, 0.9, 1.05


@dataclass
class Results:
    """What was measured; parts that did not run are empty."""

    command: str
    problem: Problem
    world: int
    threads: int
    torch: str
    quick: bool
    gemm_tflops: float = 0.0
    single: list[SingleRow] = field(default_factory=list)
    ranks: list[RanksRow] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    planning: list[Planning] = field(default_factory=list)
    cached_plan_microseconds: float = 0.0
    memory: list[Memory] = field(default_factory=list)


def _pass(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def print_results(results: Results) -> None:
    """One table a part, and the command that made them."""
    # Wide enough for a table when the output is a file.
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in (_single(results), _ranks(results), _overheads(results), _planning(results), _memory(results)):
        if table.row_count:
            table.box = box.ROUNDED if console.is_terminal else box.SIMPLE_HEAD if console.encoding == "utf-8" else box.ASCII
            console.print(table)
    if results.quick:
        console.print("--quick: the sizes are tiny, the times mean nothing; bytes and balance are exact.", style="yellow")
    console.print(f"Made by: {results.command} (torch {results.torch})", highlight=False, markup=False)


def _single(results: Results) -> Table:
    p = results.problem
    what = f"causal, {p.tokens} tokens, {p.heads}:{p.kv_heads} heads of {p.head_dim}, {str(p.dtype).removeprefix('torch.')}"
    title = f"One process, {results.threads} threads ({what}); bound: a matrix product, {results.gemm_tflops:.3g} TFLOP/s"
    table = Table(
        "pass", "attention", "median ms", "spread", "x fastest of PyTorch", "target", "TFLOP/s", "of the bound", title=title
    )
    for row in results.single:
        target = f"<= {TARGET_RATIO}" if row.name == "distattn" else ""
        figures = (f"{row.times.median * 1e3:.2f}", f"{row.times.spread:.0%}", f"{row.ratio:.3f}", target)
        table.add_row(_pass(row.backward), row.name, *figures, f"{row.tflops:.3g}", f"{row.share:.0%}")
    return table


def _ranks(results: Results) -> Table:
    title = f"{results.world} ranks of one thread, throughput over one process of {results.world} threads"
    table = Table("pass", "schedule", "ranks ms", "spread", "one process ms", "throughput", "bound", "target", title=title)
    table.caption = f"bound: 1 / (busiest rank over mean work); contiguous (ring) has 2 - 1/P = {2 - 1 / results.world:.3f} of it"
    for row in results.ranks:
        target = "" if row.schedule == "ring" else f">= {TARGET_THROUGHPUT}"
        times = (f"{row.times.median * 1e3:.2f}", f"{row.times.spread:.0%}", f"{row.one_process.median * 1e3:.2f}")
        bound = f"{row.bound:.4f} (work {row.balance:.4f})"
        table.add_row(_pass(row.backward), row.schedule, *times, f"{row.throughput:.3f}", bound, target)
    return table


def _overheads(results: Results) -> Table:
    table = Table("microseconds a stage", "ranks", "stages", "forward", "backward", "of a stage here", title="Executor overhead")
    table.caption = "a pass with a kernel that computes nothing and 64 tokens a rank, over its stages; bound: 0"
    busy = next((row.times.median / results.world * 1e6 for row in results.ranks if row.schedule == "zigzag"), None)
    for row in results.overheads:
        share = f"{row.forward / busy:.2%}" if busy and row.world == results.world else ""
        table.add_row(row.how, str(row.world), str(row.stages), f"{row.forward:.0f}", f"{row.backward:.0f}", share)
    return table


def _planning(results: Results) -> Table:
    cached = f"a plan that is there already: {results.cached_plan_microseconds:.2f} us"
    table = Table(
        "milliseconds for a new mask", "ranks", "plan", "backward plan", "programs", "all", title="Plan making", caption=cached
    )
    for row in results.planning:
        figures = (row.plan, row.transposed, row.programs, row.total)
        table.add_row(row.mask, str(row.world), *(f"{x:.1f}" for x in figures))
    return table


def _memory(results: Results) -> Table:
    tokens = results.memory[0].tokens if results.memory else 0
    title = f"Counted bytes per rank (KiB), {tokens} tokens a rank, forward and backward of one layer"
    table = Table(
        "schedule", "ranks", "inputs", "outputs", "kept", "workspace", "all", "over 2 ranks", "stated buffer", title=title
    )
    flat = "; ".join(f"{name} {flatness(results.memory, name):.3f}" for name in dict.fromkeys(row.name for row in results.memory))
    table.caption = (
        f"largest over smallest, 2 to 8 ranks (target {TARGET_FLAT}): {flat}. "
        "Stated: foreign rows at most, without messages in flight"
    )
    two = {row.name: row.total for row in results.memory if row.world == 2}
    for row in results.memory:
        sizes = (row.inputs, row.outputs, row.kept, row.workspace, row.total)
        over = f"{row.total / two[row.name]:.3f}"
        kib = (f"{size / 1024:.0f}" for size in sizes)
        table.add_row(row.name, str(row.world), *kib, over, f"{row.stated / 1024:.0f}")
    return table


def draw(results: Results, path: Path) -> None:
    """Four panels, one a part, with bounds and targets as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    single, ranks, cost, memory = figure.subplots(2, 2).flat
    names = [f"{row.name}\n{_pass(row.backward)}".replace(" and ", "\nand ") for row in results.single]
    single.bar(names, [row.ratio for row in results.single])
    single.axhline(TARGET_RATIO, color="red", linestyle="--", label=f"target {TARGET_RATIO}")
    single.set_title("One process: time over the fastest of PyTorch")
    names = [f"{row.schedule}\n{_pass(row.backward)}".replace(" and ", "\nand ") for row in results.ranks]
    ranks.bar(names, [row.throughput for row in results.ranks])
    ranks.scatter(names, [row.bound for row in results.ranks], marker="_", s=900, color="black", label="bound by balance of work")
    ranks.axhline(TARGET_THROUGHPUT, color="red", linestyle="--", label=f"target {TARGET_THROUGHPUT}")
    ranks.set_title(f"{results.world} ranks: throughput over one process")
    names = [f"{row.how}\n{row.world} ranks" for row in results.overheads]
    cost.bar(names, [row.forward for row in results.overheads], width=-0.4, align="edge", label="forward")
    cost.bar(names, [row.backward for row in results.overheads], width=0.4, align="edge", label="backward")
    cost.set_title("Executor: microseconds a stage")
    for name in dict.fromkeys(row.name for row in results.memory):
        rows = [row for row in results.memory if row.name == name]
        memory.plot([row.world for row in rows], [row.total / 2**20 for row in rows], marker="o", label=name)
    memory.set(title="Counted MiB per rank at constant tokens per rank", xlabel="ranks", ylim=(0, None))
    for axes in (single, ranks, cost, memory):
        axes.tick_params(axis="x", labelsize=7)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
