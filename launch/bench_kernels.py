"""Measures the attention kernels of one device: right first, then fast.

Every contender's output is checked against float32 before it is timed, over NaN, at the beginning, the middle and the end of the
sequence. Rates are sustained (at the card's power limit) and cold, contenders take turns, and the matrix product of the same
run is the bound. Libraries run as their own users call them; ours run as the executor calls them.

    python launch/bench_kernels.py                                  # all groups, on a GPU: about 15 minutes
    python launch/bench_kernels.py --only dense gqa --json r.json --plot r.png
    python launch/bench_kernels.py --only dense --check-only        # compiles and checks: groups side by side fill the caches
    python launch/bench_kernels.py --claims r.json s.json           # several runs held against the targets; measures nothing
    python launch/bench_kernels.py --write-table                    # what the choice of backends reads from then on
    python launch/bench_kernels.py --set forward:128:128.maximum_first=true --only dense    # another launch of the Hopper kernels
    python launch/bench_kernels.py --device cpu --quick             # shows that it works, its times mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from distattn.launch.bench_kernels_cases import Case
    from distattn.launch.bench_kernels_measure import Protocol
    from distattn.launch.bench_kernels_report import Results

GROUPS = ("dense", "gqa", "state", "documents", "window", "short", "few", "heads", "ranks")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("bench_kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU where there is one")
    made.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU")
    made.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of cases (default: all)")
    made.add_argument("--direction", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    made.add_argument("--backend", nargs="+", help="measure these of ours and no others")
    made.add_argument("--no-flex", action="store_true", help="leave out flex_attention, whose compilation takes long")
    made.add_argument("--rounds", type=int, default=3, metavar="R", help="rounds that count (default: 3)")
    made.add_argument("--seconds", type=float, default=0.2, metavar="S", help="of sustained running a round (default: 0.2)")
    made.add_argument("--world", type=int, default=8, metavar="P", help="ranks of the group ranks (default: 8)")
    made.add_argument("--tokens", type=int, metavar="N", help="of the group ranks (default: 131072; with --quick 512)")
    made.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KIND[:D:D_V].FIELD=VALUE",
        help="change the launch rows of the Hopper kernels, of all head sizes or of one",
    )
    made.add_argument("--check-only", action="store_true", help="make and check every contender, time none")
    made.add_argument(
        "--claims", nargs="+", type=Path, metavar="FILE", help="hold what --json wrote against the targets, measure nothing"
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, its times mean nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures there, a PNG")
    made.add_argument(
        "--write-table", nargs="?", const="", metavar="FILE", help="write the order of backends (default: kernels/measured.json)"
    )
    return made


def parse(words: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for what cannot be measured."""
    import torch

    asked = parser().parse_args(words)
    if asked.claims:
        return asked
    if asked.device == "auto":
        asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, and torch sees no GPU. Pass --device cpu --quick to see that it works.")
    if asked.device == "cpu" and not asked.quick:
        raise ValueError("On a CPU the sizes of a GPU would take hours. Pass --quick; launch/bench_attention.py measures CPUs.")
    if asked.device == "cpu" and asked.write_table == "":
        raise ValueError("--write-table without a file replaces the table of a GPU with figures of a CPU. Name a FILE.")
    for name, least in (("rounds", 1), ("world", 1)):
        if getattr(asked, name) < least:
            raise ValueError(f"--{name} {getattr(asked, name)} was asked for. Pass {least} or more.")
    if not asked.seconds > 0:
        raise ValueError(f"--seconds {asked.seconds:g} is no time to run. Pass seconds above 0.")
    for name in ("json", "plot", "write_table"):
        if asked.check_only and getattr(asked, name) is not None:
            raise ValueError(f"--check-only times nothing that --{name.replace('_', '-')} could write. Leave one of them out.")
    for name in ("json", "plot"):
        path = getattr(asked, name)
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {path.absolute().parent}. Make it first.")
    asked.dtype = getattr(torch, DTYPES[asked.dtype or ("fp32" if asked.device == "cpu" else "bf16")])
    asked.tokens = asked.tokens or (512 if asked.quick else 131072)
    change_rows(asked.set)
    return asked


def change_rows(words: list[str]) -> None:
    """``kind.field=value``, or ``kind:D:D_v.field=value`` for one head size, in the launch rows of this process.

    Raises:
        ValueError: there is no such kind, size or field, or the value is none.
    """
    from distattn.kernels.gluon_launch import FUSED, ORDERED, ROWS

    for word in words:
        place, _, rest = word.partition(".")
        name, _, text = rest.partition("=")
        kind, _, size = place.partition(":")
        if kind not in ROWS or any(name not in row._fields for row in ROWS[kind].values()):
            known = [f"{kind}.{field}" for kind, rows in ROWS.items() for field in next(iter(rows.values()))._fields]
            raise ValueError(f"--set {word}: there is no {kind}.{name}. Use one of {', '.join(known)}.")
        chosen = {f"{d}:{d_v}": (d, d_v) for d, d_v in ROWS[kind]}
        if size and size not in chosen:
            raise ValueError(f"--set {word}: {kind} has no head size {size}. Use one of {', '.join(chosen)}, or none for all.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--set {word}: {text!r} is no number and neither true nor false.") from error
        if kind in (FUSED, ORDERED) and (name == "split" and value or name == "stages" and value > 3):
            raise ValueError(f"--set {word}: {kind} takes up to 3 stages and is not split. Use another value.")
        for row in [chosen[size]] if size else chosen.values():
            ROWS[kind][row] = ROWS[kind][row]._replace(**{name: value})


def main(arguments: list[str] | None = None) -> int:
    """0 when all was right and measured, 1 when a contender computes something else, 2 for a mistake in what was asked."""
    try:
        asked = parse(arguments)
        if asked.claims:
            report_claims(asked.claims)
            return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from distattn.kernels import measured
    from distattn.launch.bench_kernels_report import as_json, as_order, draw, print_results, write_json
    from distattn.launch.bench_kernels_run import Wrong

    try:
        results = measure(
            asked, f"python launch/bench_kernels.py {' '.join(arguments if arguments is not None else sys.argv[1:])}"
        )
    except Wrong as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_results(results)
    if asked.json:
        write_json(asked.json, as_json(results))
    if asked.plot:
        draw(results, asked.plot)
    if asked.write_table is not None:
        write_json(Path(asked.write_table) if asked.write_table else measured.TABLE, as_order(results))
    return 0


def report_claims(paths: list[Path]) -> None:
    """The targets beside what the runs in some files found."""
    from rich.console import Console

    from distattn.launch.bench_kernels_claims import Runs, claims, print_claims

    contents = []
    for path in paths:
        try:
            contents.append(json.loads(path.read_text()))
            contents[-1]["hardware"]["name"], contents[-1]["rates"], contents[-1]["ranks"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--claims {path}: not a file that --json wrote ({error!r}). Name one.") from error
    print_claims(Console(width=None if sys.stdout.isatty() else 160), claims(Runs(contents)))


def measure(asked: argparse.Namespace, command: str) -> Results:
    """All groups that were asked for."""
    import torch

    from distattn.kernels import choose
    from distattn.launch import bench_kernels_ranks
    from distattn.launch.bench_kernels_cases import Case, all_cases, inputs
    from distattn.launch.bench_kernels_measure import Protocol
    from distattn.launch.bench_kernels_report import Results, as_json, hardware, write_json

    device = torch.device(asked.device)
    protocol = Protocol(asked.rounds, asked.seconds, 0.0 if asked.quick else 0.25, 2 if asked.quick else 4)
    size = 512 if asked.quick else 8192
    results = Results(command, hardware(device), 2 * size**3)
    a = torch.randn(size, size, device=device).to(asked.dtype)
    for case in all_cases(asked.quick):
        if case.group in asked.only and case.direction in asked.direction:
            measure_case(case, asked, protocol, results, lambda: a @ a)
            if asked.json:  # what was measured outlives whatever comes next
                write_json(asked.json, as_json(results))
    if "ranks" in asked.only and not asked.check_only:
        heads = 2 if asked.quick else 16
        case = Case("ranks", "causal", asked.tokens, heads, heads, 128, 128)
        x = inputs(case, asked.dtype, device)
        backend = choose(x.q, x.k, x.v, case.scores, asked.backend[0] if asked.backend else None).backend
        say(f"{asked.world} ranks one after the other, {backend.name}")
        results.distributed = bench_kernels_ranks.measure(case, x, backend, asked.world, protocol)
    return results


def measure_case(case: Case, asked: argparse.Namespace, protocol: Protocol, results: Results, gemm: Any) -> None:
    """Makes and checks every contender of a case, then times all of them and the matrix product in turns."""
    import torch

    from distattn.kernels import choose
    from distattn.launch.bench_kernels_cases import inputs
    from distattn.launch.bench_kernels_measure import in_turns
    from distattn.launch.bench_kernels_report import GEMM
    from distattn.launch.bench_kernels_run import OURS, WHOLE, Finished, Wrong, finish, libraries, ours
    from distattn.launch.kernel_occupancy import PROCESSORS, occupancies

    device: torch.device = torch.device(asked.device)
    x = inputs(case, asked.dtype, device)
    finished: Finished | None = None
    if case.direction == "backward":
        finished = finish(case, x, choose(x.q, x.k, x.v, case.scores).backend)
    makers: dict[str, Any] = {
        name: lambda name=name: ours(case, x, name, finished) for name in asked.backend or OURS[device.type]
    }
    if "gluon" in makers:
        results.occupancy[case] = counted = occupancies(case, results.hardware.get("processors", PROCESSORS))
        if any(before != after for before, after in counted.values()):
            makers[WHOLE] = lambda: ours(case, x, WHOLE, finished)
    makers |= dict(libraries(case, x, finished, not asked.no_flex))
    if case.direction == "forward":
        for name in ("gluon_fused", "gluon_ordered"):  # their forward is that of gluon
            makers.pop(name, None)
    contenders = {}
    for name, make in makers.items():
        try:
            work, check = make()
            check()
            work()
        except Wrong:
            raise
        except Exception as error:  # it cannot take the case and says why, or the compiler cannot take it
            results.refused.setdefault(case, {})[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        contenders[name] = work
    say(f"{case.name}: right: {', '.join(contenders) or 'nobody takes it'}")
    if not asked.check_only:
        results.rates[case] = in_turns(device, {GEMM: gemm, **contenders}, protocol)


def say(text: str) -> None:
    """Progress, apart from the figures."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
