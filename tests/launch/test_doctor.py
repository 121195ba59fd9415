from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distattn.ops
from distattn.kernels import Choice, load
from distattn.kernels.aten import Aten
from distattn.launch.doctor import examine, main, parse
from distattn.launch.doctor_checks import ALONE, TOLERANCES, Attention, Finding, cases
from distattn.launch.doctor_links import Link, Overlap
from distattn.launch.doctor_report import Report
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.schedules import SCHEDULES
from tests.launch.test_train import ROOT


def test_one_process_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--device", "cpu", "--json", str(tmp_path / "report.json")]) == 0
    said = capsys.readouterr().out
    assert f"All good: {', '.join(SCHEDULES)} on one process" in said and "triton: not considered for CPU tensors" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["plans"] == 4 * len(SCHEDULES) and not report["wrong_plans"]
    assert {f["schedule"] for f in report["findings"]} == {ALONE, *SCHEDULES}
    assert all(set(f["errors"]) == {"out", "lse", "dq", "dk", "dv"} for f in report["findings"])
    assert report["ranks"][0]["torch"] == torch.__version__


class Wounded(Aten):
    """Adds a little to a gradient."""

    def backward(self, dout, q, k, v, delta, lse, bands, scores, dq, dk, dv) -> None:
        super().backward(dout, q, k, v, delta, lse, bands, scores, dq, dk, dv)
        dk += 1e-3


def test_a_wrong_kernel_is_a_verdict_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distattn.ops, "choose", lambda *_: Choice(Wounded()))
    assert main(["--quick", "--device", "cpu", "--json", str(tmp_path / "report.json")]) == 1
    said = capsys.readouterr().out
    assert "WRONG: one device alone on causal, float32: dk differs by" in said and "All good" not in said
    assert not json.loads((tmp_path / "report.json").read_text())["ok"]


def test_a_kernel_that_raises_is_a_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_):
        raise RuntimeError("this GPU has fallen off the bus")

    monkeypatch.setattr(distattn.ops, "choose", refuse)
    assert main(["--quick", "--device", "cpu"]) == 1
    assert "WRONG: RuntimeError: this GPU has fallen off the bus" in capsys.readouterr().out


def examined(world: int) -> list[Report]:
    asked = parse(["--quick"])

    def rank(communicator) -> Report:
        report = Report()
        examine(communicator, torch.device("cpu"), asked, report, lambda _: None, lambda _: None)
        return report

    return run_ranks(world, rank, timeout=60)


def test_all_ranks_come_to_the_same_verdict() -> None:
    first, *others = examined(3)
    assert not first.problems and all(report.findings == first.findings for report in others)
    assert [(x.src, x.dst) for x in sorted(first.neighbours, key=lambda x: x.src)] == [(0, 1), (1, 2), (2, 0)]
    assert [(x.src, x.dst) for x in first.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(x.intact and x.gigabytes_per_second > 0 for x in first.neighbours + first.pairs)


def test_a_wrong_plan_is_named_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    named = SCHEDULES["zigzag"]

    def lossy(*arguments):
        plan = named.build(*arguments)
        return replace(plan, transfers=plan.transfers[:-1])

    monkeypatch.setitem(SCHEDULES, "zigzag", replace(named, build=lossy))
    report = examined(2)[0]
    assert report.verdict.startswith("WRONG: the plan of zigzag on causal: ")
    assert {f.schedule for f in report.findings} == {ALONE, *SCHEDULES} - {"zigzag"} and not any(f.wrong for f in report.findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_keeps_its_tolerance(dtype: torch.dtype) -> None:
    some = cases(2)
    assert len(some) == 8

    def rank(communicator) -> list[Finding]:
        attention = Attention(communicator, torch.device("cpu"), head_dim=32)
        return attention.check(ALONE, some, dtype) + attention.check("zigzag", some, dtype)

    findings = run_ranks(2, rank, timeout=120)[0]
    assert not [f.describe() for f in findings if f.wrong]
    assert "dsinks" in findings[-1].errors and findings[-1].allowed["lse"] == TOLERANCES[torch.float32].alone


def test_the_rank_with_a_wrong_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_this_thread(*_) -> Choice:
        return Choice(Wounded() if threading.current_thread().name == "rank 1" else Aten())

    monkeypatch.setattr(distattn.ops, "choose", of_this_thread)
    first = examined(2)[0].verdict.splitlines()[0]
    assert first.startswith("WRONG: one device alone on causal, float32: dk differs by") and first.endswith("on rank 1")


def test_half_precision_partials_are_noticed() -> None:
    """The mildest fault that we know: what one block computed is rounded before it is merged."""

    class Rounding(Aten):
        def forward(self, q, k, v, bands, scores, state=None, out=None):
            state = super().forward(q, k, v, bands, scores, state)
            state.o.copy_(state.o.bfloat16())
            if out is not None:
                out.copy_(state.o)
            return state

    def rank(communicator) -> list[Finding]:
        attention = Attention(communicator, torch.device("cpu"), head_dim=32)
        some = [case for case in cases(4) if case.name == "full"]
        attention.check(ALONE, some, torch.bfloat16)
        return attention.check("ring", some, torch.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distattn.ops, "choose", lambda *_: Choice(Rounding()))
        [finding] = run_ranks(4, rank, timeout=120)[0]
    assert finding.wrong == ["out"], finding


def test_the_worst_is_said_first_and_long_lists_are_cut() -> None:
    errors, allowed = {"out": 2e-6, "dk": 0.5}, {"out": 1e-6, "dk": 1e-6}
    finding = Finding("zigzag", "documents", "float32", errors, allowed, {"out": [0], "dk": list(range(20))})
    report = Report(findings=[finding] * 9, neighbours=[Link(0, 1, 1.0, 1.0, False)])
    assert report.verdict.startswith("WRONG: zigzag on documents, float32: dk differs by 5.0e-01 (allowed 1.0e-06) on ranks 0, 1")
    assert "and 12 more; out differs" in report.verdict and report.verdict.endswith("and 4 more")
    assert "bytes from rank 0 to rank 1 arrive changed" in report.problems


def test_different_versions_are_a_warning_and_hidden_time_is_a_share() -> None:
    report = Report(ranks=[{"torch": "1"}, {"torch": "2"}])
    assert not report.problems and "rank 0: 1, rank 1: 2" in report.warnings[0]
    assert Overlap(0, message=1.0, work=2.0, together=2.25).hidden == 0.75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timeout", "0"], "Pass seconds above 0"),
        (["--timeout", "soon"], "--timeout"),
        (["--head-dim", "0"], "Pass 1 to 1024"),
        (["--json", "nowhere/report.json"], "there is no folder"),
        (["--fast"], "--fast"),
    ],
)
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_named_by_the_doctors_own_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "Use --device cpu" in capsys.readouterr().err


WOUNDS = {
    "none": "",
    "raises": "raise RuntimeError('wounded')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    ("wound", "verdict"),
    [
        ("none", f"All good: {', '.join(SCHEDULES)} on 2 processes"),
        pytest.param("raises", "WRONG: rank 1 failed in ring on causal, float32: RuntimeError: wounded", marks=pytest.mark.slow),
        ("killed", "WRONG: rank "),
    ],
)
def test_two_processes(wound: str, verdict: str, tmp_path: Path) -> None:
    """Of a rank that raises or dies: a verdict of rank 0 and exit code 1, long before the timeout."""
    program = f"""
        import sys
        import distattn.ops
        from distattn.kernels import Choice
        from distattn.kernels.aten import Aten
        from distattn.launch.doctor import main
        from distattn.launch.train import Place

        class Wounded(Aten):
            def backward(self, dout, q, k, v, delta, lse, bands, scores, dq, dk, dv):
                super().backward(dout, q, k, v, delta, lse, bands, scores, dq, dk, dv)
                if len(q) < 173:  # alone it has all of the tokens
                    {WOUNDS[wound] or "pass"}

        if Place.of_this_process().rank == 1:
            distattn.ops.choose = lambda *_: Choice(Wounded())
        sys.exit(main(sys.argv[1:]))
    """
    script = tmp_path / "wounded_doctor.py"
    script.write_text(textwrap.dedent(program))
    done = torchrun_to_the_end([str(script), "--quick", "--device", "cpu", "--timeout", "90", "--json", str(tmp_path / "r.json")])
    assert verdict in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == (wound == "none")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verdict"].startswith(verdict) and report["ok"] == (wound == "none")


def torchrun_to_the_end(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    process = subprocess.Popen(command, cwd=ROOT.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said, complained = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        said, complained = process.communicate(timeout=40)
        pytest.fail(f"the doctor hung\n{said}\n{complained}")
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def test_a_named_backend_is_the_one_examined(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("reference").name == "reference"
    assert main(["--quick", "--device", "cpu", "--backend", "reference", "--head-dim", "16"]) == 0
    assert "reference" in capsys.readouterr().out
