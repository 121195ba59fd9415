"""How long programs of the ordered Hopper backward wait for each other, simulated without a GPU.

Prints, for every mask and latency of a turn, the time of a launch over that of the same launch in which nobody waits, in three
ways: walks upwards, walks downwards, both with the heads that the fused kernel walks together, and what ships. No time here
was measured: a step's, and the latency of a turn (a fence, a count, and the look that sees it), are assumptions, to be given.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.launch.bench_kernels_cases import Case

WAYS = ("up", "down", "ordered")  # walks upwards and downwards with the fused kernel's sections, and what ships


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("kernel_waits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=2.3, help="microseconds of a step when nobody waits (default: 2.3)")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.7, 1.5, 3.0], help="microseconds (default: 0.7 1.5 3.0)")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors (default: 132, of an H100 or H200)")
    parser.add_argument("--quick", action="store_true", help="small launches, for a smoke test")
    asked = parser.parse_args(arguments)
    if asked.step <= 0 or min(asked.latency) < 0 or asked.processors < 1:
        parser.error(
            f"a step takes more than 0 us, a turn at least 0, on 1 multiprocessor or more; found --step {asked.step} "
            f"--latency {' '.join(map(str, asked.latency))} --processors {asked.processors}"
        )
    return asked


def cases(quick: bool) -> list[Case]:
    """The backward calls of ``bench_kernels.py`` that the kernel takes, and two in which a head's programs fill the device."""
    from distattn.launch.bench_kernels_cases import Case, all_cases

    groups = ("dense", "gqa", "documents", "window")
    found = [case for case in all_cases(quick) if case.direction == "backward" and case.group in groups]
    few = [Case("few heads", mask, 1024 if quick else 8192, 2, 1, 128, 128, "backward") for mask in ("causal", "full")]
    return [*dict.fromkeys(found), *few]


def simulate(case: Case, step: float, latencies: list[float], processors: int) -> dict[str, list[float]]:
    """By way, for each latency: the time of the launch over that of the fused kernel, where nobody waits."""
    from distattn.kernels.gluon_launch import ORDERED, ROWS
    from distattn.kernels.gluon_order import heads_at_once, order, waits
    from distattn.kernels.gluon_schedule import heads_per_section, schedule
    from distattn.kernels.tiles import tile_table

    row, n, heads, group = ROWS[ORDERED][case.d, case.d_v], case.tokens, case.kv_heads, case.heads // case.kv_heads
    block_q, block_k = row.block_q, row.key_tiles * 64  # type: ignore[attr-defined]
    table = tile_table(case.bands, n, n, block_q, block_k, "k", block_q)
    section = heads_per_section(heads, heads, group * n * (case.d + case.d_v) * 2)
    together = heads_at_once(table, heads, section, group, processors)
    plans = {"up": (False, section), "down": (True, section), "ordered": (None, together)}
    found: dict[str, list[float]] = {}
    for way in WAYS:
        down, at_once = plans[way]
        made = order(table, block_q, down)
        plan = schedule(made.table, block_k, block_q, heads, at_once, processors, False, group)
        if not found:
            free = waits(made, plan, block_q, group, processors, step, -math.inf)
        found[way] = [waits(made, plan, block_q, group, processors, step, latency) / free for latency in latencies]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    asked = parse(arguments)
    from rich.console import Console
    from rich.table import Table

    columns = [f"{way}, {latency:g} us" for way in WAYS for latency in asked.latency]
    table = Table("simulated: time over that without waits", *columns)
    for case in cases(asked.quick):
        found = simulate(case, asked.step, asked.latency, asked.processors)
        table.add_row(case.name.removeprefix("backward "), *(f"{x:.3f}" for way in WAYS for x in found[way]))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
