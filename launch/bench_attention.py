"""Measures attention: one process against PyTorch, ranks against one process, the executor's own time, bytes per rank.

Every figure stands beside its bound. Runs of contenders take turns; medians and the spread are given. The ranks are processes
that this program starts and ends: python launch/bench_attention.py needs no torchrun. Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.launch.bench_attention_report import Results
    from distattn.launch.bench_attention_single import Problem

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
PARTS = ("single", "ranks", "cost", "memory")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "bench_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seq-len", type=int, metavar="N", help="tokens (default: 16384; with --quick 512)")
    made.add_argument("--heads", type=int, default=8, help="query heads (default: 8)")
    made.add_argument("--kv-heads", type=int, help="key heads (default: as many as query heads)")
    made.add_argument("--head-dim", type=int, default=64, metavar="D", help="head size (default: 64)")
    made.add_argument("--dtype", choices=list(DTYPES), help="default: fp32 on the CPU, bf16 on a GPU")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU where there is one")
    made.add_argument("--backend", choices=["triton", "aten", "reference"], help="measure this kernel and no other")
    made.add_argument("--ranks", type=int, default=2, metavar="P", help="ranks of one thread each (default: 2)")
    made.add_argument("--repeat", type=int, metavar="R", help="rounds that count (default: 5; with --quick 2)")
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    made.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds that one round may last (default: 600)")
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, its times mean nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures there, a PNG")
    return made


def parse(words: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for what cannot be measured."""
    asked = parser().parse_args(words)
    asked.seq_len = asked.seq_len if asked.seq_len is not None else 512 if asked.quick else 16384
    asked.repeat = asked.repeat if asked.repeat is not None else 2 if asked.quick else 5
    asked.kv_heads = asked.kv_heads if asked.kv_heads is not None else asked.heads
    for name in ("seq_len", "heads", "kv_heads", "head_dim", "ranks", "repeat"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(asked, name)} was asked for. Pass 1 or more.")
    if asked.heads % asked.kv_heads:
        raise ValueError(
            f"{asked.heads} query heads cannot share {asked.kv_heads} key heads. Pass --kv-heads that divides --heads."
        )
    if not asked.timeout > 0:
        raise ValueError(f"--timeout {asked.timeout:g} is no time to wait. Pass seconds above 0.")
    for name in ("json", "plot"):
        path = getattr(asked, name)
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {path.absolute().parent}. Make it first.")
    return asked


def main(arguments: list[str] | None = None) -> int:
    """0 when everything was measured, 1 when a rank failed, 2 for a mistake in what was asked, which is printed."""
    try:
        asked = parse(arguments)
        problem = make_problem(asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from distattn.launch.bench_attention_ranks import RanksFailed
    from distattn.launch.bench_attention_report import draw, print_results

    command = " ".join(["python launch/bench_attention.py", *(sys.argv[1:] if arguments is None else arguments)])
    start = time.monotonic()
    try:
        results = measure(asked, problem, command)
    except RanksFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_results(results)
    if asked.json:
        asked.json.write_text(json.dumps(as_json(results), indent=1) + "\n")
    if asked.plot:
        draw(results, asked.plot)
    files = [str(path) for path in (asked.json, asked.plot) if path]
    print(f"{time.monotonic() - start:.0f} s" + (f", written: {', '.join(files)}" if files else ""))
    return 0


def make_problem(asked: argparse.Namespace) -> Problem:
    """Device and dtype as asked, or as they fit the machine."""
    import torch

    from distattn.launch.bench_attention_single import Problem

    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no GPU. Use --device cpu, or a CUDA build of torch.")
    on_gpu = asked.device == "cuda" or (asked.device == "auto" and torch.cuda.is_available())
    if on_gpu and asked.dtype == "fp64":
        raise ValueError("--dtype fp64 has no fast kernel on a GPU. Use bf16, fp16 or fp32, or --device cpu.")
    dtype = getattr(torch, DTYPES[asked.dtype or ("bf16" if on_gpu else "fp32")])
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    return Problem(asked.seq_len, asked.heads, asked.kv_heads, asked.head_dim, dtype, device)


def measure(asked: argparse.Namespace, problem: Problem, command: str) -> Results:
    """Part by part; idle ranks do not compute while another part is measured."""
    import torch

    from distattn.launch.bench_attention_cost import cached_plan_microseconds, memory, overheads, planning
    from distattn.launch.bench_attention_ranks import Ranks, against_one_process
    from distattn.launch.bench_attention_report import Results
    from distattn.launch.bench_attention_single import against_pytorch

    results = Results(command, problem, asked.ranks, torch.get_num_threads(), torch.__version__, asked.quick)
    if "single" in asked.only:
        results.single, results.gemm_tflops = against_pytorch(problem, asked.repeat, asked.backend, say)
    if {"ranks", "cost"} & set(asked.only):
        threads = torch.get_num_threads()
        # Ranks of one thread against as many threads in one process; ranks share a GPU with nobody, or run on the CPU.
        shared = ranks_problem(problem, asked.ranks)
        torch.set_num_threads(asked.ranks)
        say(f"starting {asked.ranks} ranks on {shared.device.type}")
        try:
            with Ranks(asked.ranks, shared, asked.backend if shared == problem else None, asked.timeout) as ranks:
                if "ranks" in asked.only:
                    results.ranks = against_one_process(ranks, asked.ranks, shared, asked.repeat, asked.backend, say)
                if "cost" in asked.only:
                    results.overheads = overheads(ranks, asked.ranks, shared, 20 * asked.repeat)
        finally:
            torch.set_num_threads(threads)
    if "cost" in asked.only:
        results.planning = planning(problem, asked.quick, say)
        results.cached_plan_microseconds = cached_plan_microseconds(asked.repeat)
    if "memory" in asked.only:
        results.memory = memory(problem, 64 if asked.quick else 2048)
    return results


def ranks_problem(problem: Problem, ranks: int) -> Problem:
    """The same on the CPU in float32 where there are fewer GPUs than ranks."""
    import torch

    if problem.device.type == "cpu" or torch.cuda.device_count() >= ranks:
        return problem
    return dataclasses.replace(problem, device=torch.device("cpu"), dtype=torch.float32)


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def as_json(results: Results) -> dict[str, Any]:
    """Every sample, and the figures that are derived from them."""
    from distattn.launch.bench_attention_cost import flatness
    from distattn.launch.bench_attention_single import Times

    def plain(row: Any) -> dict[str, Any]:
        fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
        for name, value in list(fields.items()):
            if isinstance(value, Times):
                fields[name] = {"seconds": value.seconds, "median": value.median, "spread": value.spread}
        return fields | {n: getattr(row, n) for n in ("throughput", "bound", "total") if hasattr(row, n)}

    def rows(some: Sequence[Any]) -> list[dict[str, Any]]:
        return [plain(row) for row in some]

    problem = plain(results.problem) | {"dtype": str(results.problem.dtype), "device": str(results.problem.device)}
    return {
        "command": results.command,
        "quick": results.quick,
        "torch": results.torch,
        "threads": results.threads,
        "world": results.world,
        "problem": problem,
        "gemm_tflops": results.gemm_tflops,
        "single": rows(results.single),
        "ranks": rows(results.ranks),
        "overhead_per_stage": rows(results.overheads),
        "planning": rows(results.planning),
        "cached_plan_microseconds": results.cached_plan_microseconds,
        "memory": rows(results.memory),
        "memory_flatness": {name: flatness(results.memory, name) for name in dict.fromkeys(row.name for row in results.memory)},
    }


if __name__ == "__main__":
    sys.exit(main())
