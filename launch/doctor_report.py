"""What the doctor found, in a form to print and to write: versions, kernels, checks, connections, and the verdict in words."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

import distattn
from distattn.kernels import choose
from distattn.kernels.contract import Scores
from distattn.launch.doctor_checks import ALONE, Finding
from distattn.launch.doctor_links import Link, Overlap

HEAD_SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))
MUST_AGREE = ("distattn", "torch", "triton", "CUDA", "NCCL")  # versions that ranks should share


@dataclass(frozen=True)
class KernelChoice:
    """Who attends for a dtype and head size on this device, and why nobody faster does."""

    dtype: str
    head: str
    backend: str
    reasons: list[str]


@dataclass
class Report:
    """Filled while the doctor works; printed and written by rank 0."""

    ranks: list[dict[str, str]] = field(default_factory=list)
    kernels: list[KernelChoice] = field(default_factory=list)
    tolerances: dict[str, str] = field(default_factory=dict)
    plans: int = 0
    wrong_plans: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    neighbours: list[Link] = field(default_factory=list)
    pairs: list[Link] = field(default_factory=list)
    overlap: list[Overlap] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What is wrong, each in a sentence; a kernel that is wrong alone comes first, since all else may follow from it."""
        found = [self.failure] if self.failure else []
        found += [f.describe() for f in sorted(self.findings, key=lambda f: f.schedule != ALONE) if f.wrong]
        found += self.wrong_plans
        return found + [
            f"bytes from rank {x.src} to rank {x.dst} arrive changed" for x in self.neighbours + self.pairs if not x.intact
        ]

    @property
    def warnings(self) -> list[str]:
        """Not wrong, but worth a look."""
        differing = [name for name in MUST_AGREE if len({rank.get(name) for rank in self.ranks}) > 1]
        return [
            f"ranks hold different versions of {name}: "
            + ", ".join(f"rank {r}: {x.get(name)}" for r, x in enumerate(self.ranks[:8]))
            for name in differing
        ]

    @property
    def verdict(self) -> str:
        """All good, or what is wrong."""
        problems, many = self.problems, 6
        if problems:
            more = f"\n  - and {len(problems) - many} more" if len(problems) > many else ""
            return "WRONG: " + "\n  - ".join(problems[:many]) + more
        schedules = list(dict.fromkeys(f.schedule for f in self.findings if f.schedule != ALONE))
        count = len({f.case for f in self.findings})
        dtypes = " and ".join(dict.fromkeys(f.dtype for f in self.findings))
        where = f"{len(self.ranks)} processes" if len(self.ranks) > 1 else "one process"
        return (
            f"All good: {', '.join(schedules)} on {where} equal one device on {count} masks, forward and gradients, in {dtypes}; "
            f"{self.plans} plans verified."
        )

    def as_json(self) -> str:
        """The whole report with its verdict."""
        ok = not self.problems
        whole: dict[str, Any] = {"ok": ok, "verdict": self.verdict, "warnings": self.warnings, **dataclasses.asdict(self)}
        for row, measured in zip(whole["overlap"], self.overlap, strict=True):
            row["hidden"] = measured.hidden
        return json.dumps(whole, indent=1)


def versions(device: torch.device) -> dict[str, str]:
    """What this rank runs on and with."""
    cuda = torch.version.cuda
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "distattn": distattn.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "gloo": "there" if dist.is_available() and dist.is_gloo_available() else "missing from this torch",
        "CUDA": cuda or "none: this torch is built without",
        "cuDNN": str(torch.backends.cudnn.version()) if cuda else "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else "none",
        "driver": _driver(),
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none found"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {type(error).__name__}"
    return said[0] if said else "none found"


def kernel_choices(device: torch.device, dtypes: Sequence[torch.dtype], backend: str | None) -> list[KernelChoice]:
    """One row a dtype and head size."""
    rows = []
    for dtype in dtypes:
        for d, d_v in HEAD_SIZES:
            q, v = torch.zeros(8, 2, d, dtype=dtype, device=device), torch.zeros(8, 2, d_v, dtype=dtype, device=device)
            choice = choose(q, q, v, Scores(d**-0.5), backend)
            head = str(d) if d == d_v else f"{d}:{d_v}"
            rows.append(KernelChoice(str(dtype).removeprefix("torch."), head, choice.backend.name, choice.reasons))
    return rows


def print_report(report: Report, console: Console) -> None:
    """Tables, then warnings, then the verdict."""
    for table in (_versions(report), _kernels(report), _checks(report), _links(report)):
        if table.row_count:
            table.box = box.ROUNDED if console.is_terminal else box.SIMPLE_HEAD if console.encoding == "utf-8" else box.ASCII
            console.print(table)
    for name, text in report.tolerances.items():
        console.print(f"Tolerance in {name}: {text}.", highlight=False)
    for text in report.warnings:
        console.print(f"Warning: {text}", style="yellow", highlight=False, markup=False)
    console.print(report.verdict, style="bold red" if report.problems else "bold green", highlight=False, markup=False)


def _versions(report: Report) -> Table:
    table = Table("", "ranks", "", title="Versions")
    for name in report.ranks[0] if report.ranks else ():
        groups: dict[str, list[int]] = {}
        for rank, values in enumerate(report.ranks):
            groups.setdefault(values[name], []).append(rank)
        for value, ranks in groups.items():
            table.add_row(name, "all" if len(groups) == 1 else _ranges(ranks), value)
    return table


def _ranges(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:6])) + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")


def _kernels(report: Report) -> Table:
    table = Table("dtype", "head size", "runs on", "why not a faster one", title="Kernels of this device")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in report.kernels:
        groups.setdefault((row.dtype, row.backend, "; ".join(row.reasons) or "it is the fastest"), []).append(row.head)
    for (dtype, backend, reasons), heads in groups.items():
        table.add_row(dtype, " ".join(heads), backend, reasons)
    return table


def _checks(report: Report) -> Table:
    table = Table(
        "dtype", "schedule", "masks", "worst", "error", "allowed", "verdict", title="Against float64 on one device, relative L2"
    )
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault((finding.dtype, finding.schedule), []).append(finding)
    for (dtype, schedule), findings in groups.items():
        # The tensor nearest to its limit, over all masks.
        share, name, worst = max(
            ((f.errors[n] / f.allowed[n], n, f) for f in findings for n in f.errors), key=lambda entry: entry[0]
        )
        wrong = sum(bool(f.wrong) for f in findings)
        verdict = f"[red]{wrong} wrong[/red]" if wrong else "good"
        errors = (f"{worst.errors[name]:.1e}", f"{worst.allowed[name]:.1e}")
        table.add_row(dtype, schedule, str(len(findings)), f"{name} on {worst.case}", *errors, verdict)
    return table


def _links(report: Report) -> Table:
    table = Table(
        "connection", "from", "to", "latency us", "GB/s", "overlap", title="Connections, through the lanes that attention uses"
    )
    hidden = {measured.rank: f"{measured.hidden:.0%} hidden" for measured in report.overlap}
    for kind, links in (("ring, all at once", report.neighbours), ("pair alone", report.pairs)):
        for x in links[:32]:
            overlap = hidden.get(x.dst, "") if links is report.neighbours else ""
            table.add_row(kind, str(x.src), str(x.dst), f"{x.microseconds:.0f}", f"{x.gigabytes_per_second:.2f}", overlap)
    return table
