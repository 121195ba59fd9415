"""The kernel benchmark on a CPU: that it measures, that it refuses, and that what is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distattn.kernels.aten import Aten
from distattn.kernels.gluon_launch import ROWS
from distattn.kernels.measured import read
from distattn.launch import bench_kernels
from distattn.launch.bench_kernels_cases import GROUPS, Case, all_cases
from distattn.launch.bench_kernels_measure import Rate
from distattn.launch.bench_kernels_report import Results, as_order

QUICK = ["--device", "cpu", "--quick", "--rounds", "1", "--seconds", "0.001"]


def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("all.json", "all.png", "table.json")]
    only = ["--only", "gqa", "state", "documents", "short", "few", "ranks", "--world", "3", "--tokens", "300"]
    assert (
        bench_kernels.main([*QUICK, *only, "--json", str(files[0]), "--plot", str(files[1]), "--write-table", str(files[2])]) == 0
    )
    said = capsys.readouterr()
    assert (
        "right: aten, SDPA (library)" in said.err
        and "sum of the ranks" in said.out
        and "Made by: python launch/bench_" in said.out
    )
    found = json.loads(files[0].read_text())
    who = {(row["group"], row["direction"], row["who"]) for row in found["rates"]}
    assert {("gqa", "backward", "SDPA (library)"), ("state", "forward", "aten"), ("documents", "backward", "aten")} <= who
    assert {("few", "forward", "aten"), ("few", "backward", "aten")} <= who
    assert {(row["rows"], row["tokens"]) for row in found["rates"] if row["group"] == "few"} == {(128, 256), (256, 128)}
    assert {row["occupancy"] for row in found["rates"]} == {""}, "counted for the Hopper kernels alone"
    assert all(row["tflops_sustained"] > 0 for row in found["rates"])
    assert {(row["schedule"], row["direction"]) for row in found["ranks"]} == {
        (schedule, direction) for schedule in ("zigzag", "striped", "ring") for direction in ("forward", "backward")
    }
    assert files[1].read_bytes().startswith(b"\x89PNG")
    table = read.__wrapped__(files[2]) if "capability" in found["hardware"] else json.loads(files[2].read_text())
    assert table["status"] == "measured" and {row["mask"] for row in table["order"]} == {"causal", "full", "other"}


def test_it_can_check_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*QUICK, "--only", "gqa", "ranks", "--check-only"]) == 0
    said = capsys.readouterr()
    assert "right: aten, SDPA (library)" in said.err and "TFLOP/s" not in said.out and "Made by: " in said.out


@pytest.mark.parametrize("what", ["out", "lse", "state", "dq", "dk", "dv"])
def test_what_is_wrong_is_not_timed(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Off(Aten):
        def forward(self, q, k, v, bands, scores, state=None, out=None):  # type: ignore[no-untyped-def]
            resumed = state is not None
            made = super().forward(q, k, v, bands, scores, state, out)
            if what == "out" and out is not None:
                out[-1] += 0.1
            if what == "lse":
                made.lse[0] += 0.1
            if what == "state" and resumed:
                made.o[:9] += 0.1
            return made

        def backward(self, dout, q, k, v, delta, lse, bands, scores, dq, dk, dv):  # type: ignore[no-untyped-def]
            super().backward(dout, q, k, v, delta, lse, bands, scores, dq, dk, dv)
            if what in ("dq", "dk", "dv"):
                {"dq": dq, "dk": dk, "dv": dv}[what][-1] += 0.1

    monkeypatch.setattr("distattn.launch.bench_kernels_run.load", lambda name: Off())
    assert bench_kernels.main([*QUICK, "--only", "state", "gqa", "--backend", "aten"]) == 1
    said = capsys.readouterr().err
    assert f"error: aten on {'' if what != 'state' else 'forward full 128 D128 2:2, state'}" in said
    assert f"{'out' if what == 'state' else what} is off by" in said


def test_who_cannot_take_a_case_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("No available kernel.\nAborting")

    monkeypatch.setattr("distattn.launch.bench_kernels_run.scaled_dot_product_attention", refuse)
    assert bench_kernels.main([*QUICK, "--only", "gqa", "--backend", "aten", "gluon"]) == 0
    said = capsys.readouterr().out
    assert "not measured: SDPA (library): No available kernel." in said
    assert "not measured: gluon: " in said


def test_what_was_measured_outlives_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failing(Aten):
        def forward(self, q, k, v, bands, scores, state=None, out=None):  # type: ignore[no-untyped-def]
            made = super().forward(q, k, v, bands, scores, state, out)
            if state is not None:
                made.o[:9] += 0.1
            return made

    monkeypatch.setattr("distattn.launch.bench_kernels_run.load", lambda name: Failing())
    assert bench_kernels.main([*QUICK, "--only", "state", "--backend", "aten", "--json", str(tmp_path / "x.json")]) == 1
    assert [row["state"] for row in json.loads((tmp_path / "x.json").read_text())["rates"]] == [False] * 3


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class OutOfResources(Exception):
        pass

    def refuse(*arguments: object, **options: object) -> None:
        raise OutOfResources("out of resource: shared memory")

    monkeypatch.setattr("distattn.launch.bench_kernels_run.scaled_dot_product_attention", refuse)
    assert bench_kernels.main([*QUICK, "--only", "gqa", "--backend", "aten"]) == 0
    assert "not measured: SDPA (library): out of resource: shared memory" in capsys.readouterr().out


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, text in (
        (["--device", "cpu"], "Pass --quick"),
        ([*QUICK, "--write-table"], "Name a FILE"),
        ([*QUICK, "--rounds", "0"], "Pass 1 or more"),
        ([*QUICK, "--check-only", "--plot", "x.png"], "Leave one of them out"),
        (["--claims", str(tmp_path)], "not a file that --json wrote"),
        ([*QUICK, "--seconds", "0"], "above 0"),
        ([*QUICK, "--json", str(tmp_path / "no" / "x")], "there is no folder"),
        ([*QUICK, "--set", "forward.speed=9"], "Use one of forward.consumers"),
        ([*QUICK, "--set", "forward.stages=many"], "is no number"),
        ([*QUICK, "--set", "fused_gradient.split=true"], "is not split"),
        ([*QUICK, "--set", "fused_gradient:128:128.stages=4"], "up to 3 stages"),
        ([*QUICK, "--set", "fused_gradient:96:96.stages=3"], "no head size 96:96. Use one of 64:64, 128:128"),
    ):
        assert bench_kernels.main(words) == 2
        assert text in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench_kernels.main(["--device", "cuda"]) == 2


def test_cut_and_whole_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where the Hopper kernels cut items they are measured with nothing cut too, and the counted occupancy stands beside."""

    class StandIn(Aten):
        def __init__(self, split: bool = True):
            self.split = split

    made: list[bool] = []

    def whole(split: bool) -> StandIn:
        made.append(split)
        return StandIn(split)

    monkeypatch.setattr("distattn.launch.bench_kernels_run.load", lambda name: StandIn())
    monkeypatch.setattr("distattn.launch.bench_kernels_run.GluonBackend", whole)
    monkeypatch.setattr("distattn.launch.kernel_occupancy.occupancies", lambda case, processors: {"forward": (0.25, 0.875)})
    path = tmp_path / "few.json"
    only = ["--only", "few", "--direction", "forward", "--backend", "gluon", "--json", str(path)]
    assert bench_kernels.main([*QUICK, *only]) == 0
    rows = {row["who"]: row["occupancy"] for row in json.loads(path.read_text())["rates"]}
    assert rows["gluon"] == "0.875" and rows["gluon, nothing cut"] == "0.250" and made == [False, False]
    assert "right: gluon, gluon, nothing cut, SDPA (library)" in capsys.readouterr().err


def test_rows_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "forward", dict(ROWS["forward"]))
    bench_kernels.change_rows(["forward.maximum_first=true", "forward.stages=3"])
    assert all(row.maximum_first is True and row.stages == 3 for row in ROWS["forward"].values())  # type: ignore[attr-defined]
    bench_kernels.change_rows(["forward:128:128.stages=4"])
    assert {size for size, row in ROWS["forward"].items() if row.stages == 4} == {(128, 128)}  # type: ignore[attr-defined]


def test_cases() -> None:
    cases = all_cases()
    assert {case.group for case in cases} == set(GROUPS) and len(set(cases)) == len(cases)
    assert {*GROUPS, "ranks"} == set(bench_kernels.GROUPS)
    n = 16384
    assert Case("x", "full", n, 16, 16, 128, 128).flops == 4 * 16 * 128 * n * n
    assert Case("x", "causal", n, 16, 16, 128, 128, "backward").flops == 10 * 16 * 128 * n * (n + 1) // 2
    short, long = (Case("x", mask, 65536, 16, 16, 128, 128) for mask in ("short", "long"))
    assert 0.95 < short.bands.area / long.bands.area < 1.05, "the same keys a row, so that only the length of a shard differs"
    assert all(case.bands.overlap() is None for case in all_cases(small=True))
    few = [case for case in cases if case.group == "few"]
    assert {(case.queries, case.tokens) for case in few} == {(1024, 131072), (131072, 1024)} and few[0].name.startswith(
        "forward full 1k x 128k"
    )
    assert few[0].flops == 4 * 128 * 1024 * 131072


def test_the_order_is_by_mean_rates_of_who_ran_everywhere() -> None:
    results = Results("", {}, 1)
    for n, seconds in ((1024, {"gluon": 2.0, "cudnn": 1.0, "triton": 3.0}), (2048, {"gluon": 2.0, "cudnn": 9.0})):
        rates = {who: Rate([s], [s]) for who, s in seconds.items()} | {
            "GEMM": Rate([1.0], [1.0]),
            "cuDNN (library)": Rate([1.0], [1.0]),
        }
        results.rates[Case("dense", "full", n, 2, 2, 128, 128)] = rates
    (row,) = as_order(results)["order"]
    assert row["backends"] == ["gluon", "cudnn"] and row["mask"] == "full"
