"""Examines the processes that it is started with: torchrun --nproc-per-node N launch/doctor.py

Every schedule and mask, forward and gradients, against float64 on one device; every plan by the verifier; the connections
between the ranks; versions; which kernels run and why not the faster ones. Ends with a verdict in words: exit code 0 all good,
1 something is wrong, 2 a mistake in what was asked. Alone, python launch/doctor.py examines one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from distattn.launch.train import Place, choose_device

if TYPE_CHECKING:
    import torch

    from distattn.launch.doctor_report import Report
    from distattn.parallel.comm import Communicator

Say = Callable[[str], None]


class Parser(argparse.ArgumentParser):
    """Mistakes are raised, so that one rank can say them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. --help lists the options.")


def parser() -> Parser:
    """The command line."""
    made = Parser("doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="two masks, fewer dtypes, short measurements")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    made.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for a rank (default: 60)")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: the GPUs where there are any")
    made.add_argument("--backend", choices=["triton", "aten", "reference"], help="examine this kernel and no other")
    made.add_argument("--head-dim", type=int, default=64, metavar="D", help="head size of the checks (default: 64)")
    return made


def parse(words: list[str]) -> argparse.Namespace:
    """Raises ValueError for what cannot be meant."""
    asked = parser().parse_args(words)
    if not asked.timeout > 0:
        raise ValueError(f"--timeout {asked.timeout:g} is no time to wait. Pass seconds above 0.")
    if not 1 <= asked.head_dim <= 1024:
        raise ValueError(f"--head-dim {asked.head_dim} is no head size. Pass 1 to 1024.")
    if asked.json and not asked.json.absolute().parent.is_dir():
        raise ValueError(f"--json {asked.json}: there is no folder {asked.json.absolute().parent}. Make it first.")
    return asked


def main(arguments: list[str] | None = None) -> int:
    """0 all good, 1 something is wrong, 2 a mistake in what was asked, which is printed."""
    words = sys.argv[1:] if arguments is None else arguments
    place = Place.of_this_process()
    if place.rank == 0 and {"-h", "--help"} & set(words):
        parser().print_help()
    if {"-h", "--help"} & set(words):
        return 0
    try:
        asked = parse(words)
        device = choose_device(asked.device, place)
    except ValueError as error:
        if place.rank != 0:
            time.sleep(10)  # rank 0 says it; torchrun ends the others when rank 0 has gone
            return 2
        # The shared function speaks of a key of the trainer's configuration.
        print(f"error: {str(error).replace('train.device=', '--device ')}", file=sys.stderr, flush=True)
        return 2
    return run(asked, place, device)


def run(asked: argparse.Namespace, place: Place, device: torch.device) -> int:
    """Connects the ranks, examines them, prints the verdict; whatever fails is part of the verdict."""
    import torch.distributed as dist

    from distattn.launch.doctor_report import Report
    from distattn.launch.doctor_vigil import Vigil
    from distattn.parallel.comm import SoloCommunicator

    report, start = Report(), time.monotonic()

    def conclude(failure: str = "") -> None:
        report.failure, report.seconds = failure, time.monotonic() - start
        if place.rank == 0:
            publish(report, asked.json)

    if place.size == 1:
        try:
            examine(SoloCommunicator(), device, asked, report, print_line, lambda _: None)
        except Exception as error:
            conclude(f"{type(error).__name__}: {error}")
            return 1
        conclude()
        return 1 if report.problems else 0

    from distattn.parallel.comm_process import ProcessCommunicator

    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=asked.timeout))
    vigil = Vigil(place.rank, 2 * asked.timeout + 60, conclude)
    try:
        vigil.at("connecting the ranks")
        communicator = ProcessCommunicator(timeout=asked.timeout)
        examine(communicator, device, asked, report, print_line if place.rank == 0 else lambda _: None, vigil.at)
        conclude()
        communicator.all_gather_bytes(b"the verdict is printed")
    except Exception as error:
        vigil.fail(f"rank {place.rank} failed in {vigil.activity}: {type(error).__name__}: {error}")
    vigil.close()
    communicator.close()
    dist.destroy_process_group()
    return 1 if report.problems else 0


def print_line(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def publish(report: Report, path: Path | None) -> None:
    """Prints the report, and writes it where that was asked for."""
    from rich.console import Console

    from distattn.launch.doctor_report import print_report

    # Wide enough for a reason when the output is a file.
    print_report(report, Console(width=None if sys.stdout.isatty() else 160))
    if path is not None:
        path.write_text(report.as_json() + "\n")
    print(f"{report.seconds:.1f} s" + (f", report in {path}" if path else ""), flush=True)


def examine(
    communicator: Communicator, device: torch.device, asked: argparse.Namespace, report: Report, say: Say, begin: Say
) -> None:
    """Fills the report, alike on every rank but for the kernels, which are of this device.

    Args:
        say: takes lines of progress.
        begin: is told what is about to run.
    """
    from distattn.launch.doctor_checks import ALONE, TOLERANCES, Attention, cases, verify_plans
    from distattn.launch.doctor_report import kernel_choices, versions
    from distattn.parallel.schedules import SCHEDULES

    begin("comparing versions")
    answers = communicator.all_gather_bytes(json.dumps(versions(device)).encode())
    report.ranks = [json.loads(answer) for answer in answers]
    dtypes = choose_dtypes(device, asked.quick)
    report.kernels = kernel_choices(device, dtypes, asked.backend)
    report.tolerances = {str(dtype).removeprefix("torch."): TOLERANCES[dtype].reason for dtype in dtypes}
    some = cases(communicator.world, asked.quick)
    say(f"{communicator.world} x {report.ranks[0]['device']}: {len(some)} masks over {some[0].mask.n_tokens} tokens")
    begin("verifying the plans")
    refused = verify_plans(communicator, some)
    report.plans = 2 * len(SCHEDULES) * len(some)
    report.wrong_plans = [f"the plan of {schedule} on {case}: {text}" for (schedule, case), text in refused.items()]
    say(f"plans: {report.plans - 2 * len(refused)} of {report.plans} verified")
    attention = Attention(communicator, device, asked.head_dim, asked.backend)
    for dtype in dtypes:
        for schedule in (ALONE, *SCHEDULES):
            start = time.monotonic()
            sound = [case for case in some if (schedule, case.name) not in refused]
            findings = attention.check(schedule, sound, dtype, begin)
            report.findings += findings
            worst = max((f.errors[n] / f.allowed[n] for f in findings for n in f.errors), default=0.0)
            label = f"{schedule}, {str(dtype).removeprefix('torch.')}"
            say(f"{label}: worst error {worst:.2f} of what is allowed, {time.monotonic() - start:.1f} s")
    if communicator.world > 1:
        measure_links(communicator, device, asked.quick, report, say, begin)


def choose_dtypes(device: torch.device, quick: bool) -> list[torch.dtype]:
    """float32 and bf16; on GPUs fp16 as well, and no bf16 where it is emulated."""
    import torch

    if device.type == "cpu":
        return [torch.float32] if quick else [torch.float32, torch.bfloat16]
    halves = [torch.bfloat16] if torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip else []
    return [torch.float32, *(halves or [torch.float16])] if quick else [torch.float32, *halves, torch.float16]


def measure_links(communicator: Communicator, device: torch.device, quick: bool, report: Report, say: Say, begin: Say) -> None:
    """Latency, bandwidth and overlap."""
    from distattn.launch.doctor_links import ALL_PAIRS, Probe, neighbours, overlap, pairs

    size = (1 if quick else 8 if device.type == "cpu" else 64) * 2**20
    probe = Probe(communicator, device, size, 3 if quick else 5)
    begin("measuring the ring")
    report.neighbours = neighbours(probe)
    slowest = min(report.neighbours, key=lambda x: x.gigabytes_per_second)
    say(f"ring: {slowest.gigabytes_per_second:.2f} GB/s at the slowest connection, rank {slowest.src} to rank {slowest.dst}")
    if communicator.world <= ALL_PAIRS:
        begin("measuring the pairs")
        report.pairs = pairs(probe)
    if not quick:
        begin("measuring overlap")
        report.overlap = overlap(probe)


if __name__ == "__main__":
    sys.exit(main())
