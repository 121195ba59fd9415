"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, matrix instructions.

Exits with 1 when a variant spills, does not fit into shared memory, misses wgmma on sm_90, or computes float32 in TF32.
With --gluon the Hopper kernels, for sm_90: all their launches, which must also keep their partitions and registers; --loops
says for each what a tile costs every unit of a multiprocessor, by the machine code of its loops: bounds, nothing measured.
One variant takes 1 to 20 seconds; triton caches it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.kernels.ahead_of_time import Compiled
    from distattn.kernels.machine_cost import Cost, Turn

HEADS = ["64", "128", "192:128", "256"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a head size is D, or D:D_v."""
    parser = argparse.ArgumentParser(
        "kernel_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", nargs="+", default=["sm_80", "sm_90"], help="sm_80 sm_86 sm_90 sm_100 gfx942 (default: sm_80 sm_90)"
    )
    parser.add_argument("--head", nargs="+", default=HEADS, metavar="D[:D_v]", help=f"head sizes (default: {' '.join(HEADS)})")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument(
        "--kernel",
        nargs="+",
        default=["forward", "key_gradient", "query_gradient"],
        help="--gluon also knows fused_gradient, ordered_gradient, add_scratch, merge_pieces and add_pieces",
    )
    parser.add_argument("--softcap", action="store_true", help="the variants with a softcap")
    parser.add_argument("--gluon", action="store_true", help="the Hopper kernels instead: all variants of --kernel and --head")
    parser.add_argument("--loops", action="store_true", help="with --gluon: the cost of a tile in the loops of each warpgroup")
    parser.add_argument("--clock", type=float, default=1.755, metavar="GHZ", help="for rates of --loops (default: 1.755)")
    parser.add_argument("--processors", type=int, default=132, metavar="N", help="for rates of --loops (default: 132)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    asked = parser.parse_args(arguments)
    if asked.loops and not asked.gluon:
        parser.error("--loops reads the Hopper kernels. Add --gluon.")
    return asked


def as_json(made: Compiled) -> str:
    """One line: the case, the launch row, the figures, the violations."""
    fields = dataclasses.asdict(made)
    case, launch = fields.pop("case"), made.launch._asdict()
    fields.pop("launch")
    return json.dumps({**case, **launch, **fields, "violations": made.violations})


def as_table(reports: list[Compiled]) -> None:
    """Prints all figures, violations last and in red."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "target", "kernel", "dtype", "head", "tiles", "warps", "stages", "registers", "spills", "shared", "products", "verdict"
    )
    for made in reports:
        case, launch = made.case, made.launch
        head = str(case.d) if case.d == case.d_v else f"{case.d}:{case.d_v}"
        products = f"{made.wgmma} wgmma" if made.wgmma else f"{made.mma} mma" if made.mma else "FMA"
        verdict = f"[red]{'; '.join(made.violations)}[/red]" if made.violations else "ok"
        figures = [launch.warps, launch.stages, made.registers, made.spills, made.shared]
        tiles = f"{launch.block_q}x{launch.block_k}"
        table.add_row(case.target, case.kind, case.dtype, head, tiles, *map(str, figures), products, verdict)
    # Wide enough for a verdict when the output is a file.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 with a violation, 2 for a mistake in what was asked, which is printed."""
    asked = parse(arguments)
    if asked.gluon:
        return report_gluon(asked)
    try:
        from distattn.kernels.ahead_of_time import KERNELS, TARGETS, Case, compile_case
    except ImportError as error:
        print(f"error: compiling needs triton, found none ({error}). Install triton on Linux.", file=sys.stderr)
        return 2
    for kind, given, known in (("target", asked.target, TARGETS), ("kernel", asked.kernel, KERNELS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            print(f"error: {kind} {' '.join(unknown)} is not known. Use {' '.join(known)}.", file=sys.stderr)
            return 2
    reports = []
    for target, kernel, head, dtype in product(asked.target, asked.kernel, asked.head, asked.dtype):
        d, _, d_v = head.partition(":")
        made = compile_case(Case(kernel, target, dtype, int(d), int(d_v or d), asked.softcap))
        reports.append(made)
        if asked.json:
            print(as_json(made), flush=True)
    if not asked.json:
        as_table(reports)
    return 1 if any(made.violations for made in reports) else 0


def report_gluon(asked: argparse.Namespace) -> int:
    """One line a variant of the Hopper kernels, as soon as it is known."""
    try:
        from distattn.kernels.gluon_ahead_of_time import all_cases, compile_case, version
    except ImportError as error:
        print(f"error: the Hopper kernels need triton 3.6 or newer, found none ({error}). Install it on Linux.", file=sys.stderr)
        return 2
    sizes = {tuple(map(int, (head.split(":") * 2)[:2])) for head in asked.head}
    wrong = False
    for case in all_cases():
        if case.kind not in asked.kernel or (case.d, case.d_v) not in sizes or case.softcap != asked.softcap:
            continue
        made = compile_case(case)
        wrong |= bool(made.violations)
        fields = dataclasses.asdict(made)
        fields = {**fields.pop("case"), **fields, "violations": made.violations, "triton": version()}
        if not asked.loops:
            fields.pop("cost")
        elif made.cost:
            fields |= {"bounds": made.cost.bounds(), "masked_bounds": made.cost.bounds(True)}
        if asked.json:
            print(json.dumps(fields), flush=True)
            continue
        sizes_of = f"{made.registers} registers, {made.spills} bytes spilled, {made.shared} shared"
        figures = f"{made.warps} warps, {sizes_of}, {made.wgmma} wgmma"
        call = f" {case.call}" if case.kind in ("forward", "merge_pieces", "add_pieces") else ""
        call += ", pieces" if case.pieces else ""
        print(f"{case.kind} {case.d}:{case.d_v}{call}: {figures}: {'; '.join(made.violations) or 'ok'}", flush=True)
        if asked.loops and made.cost:
            print("\n".join(loop_lines(made.cost, asked.clock, asked.processors)), flush=True)
    return 1 if wrong else 0


def loop_lines(cost: Cost, clock: float, processors: int) -> list[str]:
    """What a tile costs, in words: each unit's cycles, what binds, and what each warp issues in which order."""

    def issued(who: str, turn: Turn, masked: Turn | None = None) -> list[str]:
        counts = ", ".join(f"{count} {kind}" for kind, count in turn.counts.items())
        with_mask = f" ({masked.instructions} with the mask)" if masked else ""
        return [f"    {who}: {turn.instructions} instructions{with_mask}: {counts}"]

    lines = [f"    tile: {cost.tile.area} pairs of {cost.tile.flops} operations, {cost.tile.fetched} bytes copied"]
    for name, masked in (("full", False), ("masked", True)):
        bounds = cost.bounds(masked)
        cycles = ", ".join(f"{unit} {value:.0f}" for unit, value in bounds.items())
        rate, most = cost.rate(masked, clock, processors), max(bounds.values())
        lines.append(f"    {name}, cycles: {cycles}")
        lines.append(
            f"    {name}, bound: {rate:.0f} TFLOP/s by {cost.binding(masked)} at {clock:g} GHz on {processors}, "
            f"tensor cores busy {bounds['tensor'] / most:.0%} of it"
        )
    copied, added = cost.traffic(clock, processors)
    lines.append(
        f"    traffic at the bound of full tiles: {copied:.1f} TB/s copied" + f", {added:.1f} TB/s added up" * (added > 0)
    )
    for place, (turn, masked_turn) in enumerate(zip(cost.full, cost.masked, strict=True)):
        lines += [*issued(f"consumer {place}", turn, masked_turn), f"        {turn.order}"]
    return lines + (issued("producer", cost.producer) if cost.producer else [])


if __name__ == "__main__":
    sys.exit(main())
