"""How evenly the Hopper kernels share a call out among multiprocessors, whole and with items cut: counted, not measured.

Occupancy is the mean over the busiest multiprocessor, in streamed tiles with the overhead of items; with cuts what they cost
(rows to scratch memory, the launch that joins them) counts against them. No GPU is needed.

    python launch/kernel_occupancy.py                    # dense, grouped heads, documents, a window, short shards with few heads
    python launch/kernel_occupancy.py --processors 78 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.launch.bench_kernels_cases import Case

PROCESSORS = 132  # of an H100 SXM or an H200


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        "kernel_occupancy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--processors", type=int, default=PROCESSORS, metavar="P", help=f"default: {PROCESSORS}")
    made.add_argument("--json", action="store_true", help="one JSON object a line")
    return made.parse_args(arguments)


def occupancies(case: Case, processors: int) -> dict[str, tuple[float, float]]:
    """By kernel: (with nothing cut, as it is launched with the rows of this process)."""
    from distattn.kernels.gluon_launch import FORWARD, KEYS, QUERIES, ROWS
    from distattn.kernels.gluon_plans import costs_of_cutting, counted_occupancy

    found = {}
    for kind in (FORWARD,) if case.direction == "forward" else (KEYS, QUERIES):
        row: Any = ROWS[kind].get((case.d, case.d_v))
        if row is None:
            continue
        costs = costs_of_cutting(kind, row, case.shape)
        before, after = (
            counted_occupancy(kind, row, case.shape, case.bands, processors, c) for c in (None, costs if row.split else None)
        )
        found[kind] = before, after
    return found


def cases() -> list[Case]:
    """Both directions of what the table in LOG.md has."""
    from distattn.launch.bench_kernels_cases import Case, both

    found = [Case("dense", mask, n << 10, 16, 16, 128, 128) for mask in ("full", "causal") for n in (8, 16, 32)]
    found += [Case("gqa", mask, 16384, 32, 8, 128, 128) for mask in ("full", "causal")]
    found += [Case(mask, mask, 65536, 16, 16, 128, 128) for mask in ("documents", "window")]
    few = [
        Case("few", "full", keys, heads, heads, 128, 128, rows=rows)
        for rows in (1024, 2048, 4096)
        for heads in (1, 2, 4, 8)
        for keys in (16384, 131072)
    ]
    turned = [Case("few", "full", case.rows or 0, case.heads, case.heads, 128, 128, "backward", rows=case.tokens) for case in few]
    return [direction for case in found for direction in both(case)] + few + turned


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for a mistake in what was asked."""
    asked = parse(arguments)
    if asked.processors < 1:
        print(f"error: --processors {asked.processors} was asked for. Pass 1 or more.", file=sys.stderr)
        return 2
    for case in cases():
        began = time.perf_counter()
        found = occupancies(case, asked.processors)
        seconds = time.perf_counter() - began
        if asked.json:
            fields = {kind: {"whole": before, "launched": after} for kind, (before, after) in found.items()}
            print(json.dumps({"case": case.name, "processors": asked.processors, **fields, "seconds": seconds}), flush=True)
            continue
        shares = ", ".join(f"{kind} {before:.3f} -> {after:.3f}" for kind, (before, after) in found.items())
        print(f"{case.name}: {shares}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
