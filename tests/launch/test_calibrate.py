"""Calibration: what it fits from launches of known cost, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn.launch import bench_simulator, calibrate_kernels
from distattn.launch.bench_simulator import CASES, Row
from distattn.launch.calibrate import describe, main, measure, parse, write
from distattn.launch.calibrate_kernels import Bench, Grid, measure_kernel
from distattn.launch.calibrate_links import Nodes, same_sizes
from distattn.launch.train import Place
from distattn.parallel.cluster import Cluster, Direction, load_cluster, read_cluster
from distattn.parallel.comm_threads import run_ranks
from tests.launch.test_train import ROOT

CPU = torch.device("cpu")
SMALL = Grid(2, 2, (16,), (16, 32), 64, torch.float32, (torch.bfloat16,), 1, 0.0)


class Model(Bench):
    """A device that takes exactly as long as a description says."""

    def __init__(self, cluster: Cluster, grid: Grid):
        super().__init__(CPU, grid, None)
        self.cluster = cluster

    def task(self, size: int, direction: Direction, q_rows: int, k_rows: int, count: int = 1, causal: bool = False) -> float:
        area = q_rows * (q_rows + 1) // 2 if causal else q_rows * k_rows
        columns = (np.full(count, x) for x in (area, q_rows, k_rows))
        together = np.zeros(count, dtype=np.int64)
        seconds = self.cluster.task_seconds(*columns, self.shape(size), direction, together)
        return float(seconds.sum()) + self.cluster.launch_seconds(direction)

    def launch(self, *_: Any) -> Callable[[], None]:
        return lambda: None

    def seconds(self, name: tuple[Any, ...], work: Callable[[], Any]) -> float:
        return 1.0


def test_the_fit_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose figures are known, measured by its own model: what was fitted prices shapes that were not measured alike."""
    monkeypatch.setattr(calibrate_kernels, "gemm_flops", lambda _: 0.1e12)
    shares = {32: {16: 0.2, 64: 0.5, 256: 0.6, 1024: 0.7}, 64: {16: 0.3, 64: 0.5, 256: 0.7, 1024: 0.8}}
    shares[128] = {16: 0.2, 64: 0.4, 256: 0.8, 1024: 0.9}
    curve = {"launch_us": 200, "band_us": 300, "memory_gb_s": 3, "efficiency": shares}
    kernel = {"peak_tflops": {"float32": 0.1}, "units": 1, "tile": 1, "diagonal_rows": {64: 60, 1536: 500}}
    kernel |= {"forward": curve, "backward": curve | {"launch_us": 600, "memory_gb_s": 2}}
    host = {"pass_us": 0, "stage_us": 0, "message_us": 0, "copy_gb_s": 1, "asynchronous": False}
    known = {"name": "a", "nodes": 1, "devices": 1, "memory_gb": 1, "kernel": kernel, "host": host}
    known |= {"inside": {"port_gb_s": 1, "latency_us": 1}, "sources": {"all": "made up"}}
    said: list[str] = []
    cpu = Model(read_cluster(known, "known"), Grid.of(CPU, False))
    found = measure_kernel(cpu, said.append)
    assert len(said) == 2 * (1 + 3 + 1)
    assert found["peak_tflops"] == {"float32": 0.1, "bfloat16": 0.1}
    assert found["diagonal_rows"][1536] == pytest.approx(500, rel=0.15) and found["diagonal_rows"][64] <= 64
    assert [found[way]["launch_us"] for way in ("forward", "backward")] == pytest.approx([200, 600], abs=1)
    fitted = Model(read_cluster(known | {"kernel": found}, "fitted"), cpu.grid)
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        for size, q_rows, k_rows, count, causal in [
            (64, 512, 512, 1, False),
            (64, 4096, 4096, 1, True),
            (64, 100, 3000, 1, False),
            (96, 700, 300, 2, False),
            (32, 200, 200, 5, True),
            (128, 30, 2000, 1, False),
            (64, 16, 16, 20, False),
        ]:
            task = size, direction, q_rows, k_rows, count, causal
            assert fitted.task(*task) == pytest.approx(cpu.task(*task), rel=0.25), task


def answers(world: int, words: list[str]) -> list[dict[str, Any]]:
    """What the ranks of one node measure, as threads."""
    asked = parse(words)

    def rank(communicator: Any) -> dict[str, Any]:
        return measure(communicator, CPU, asked, Place(communicator.rank, world, communicator.rank, world, True), lambda _: None)

    return run_ranks(world, rank, timeout=100)


def test_what_is_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grid, "of", classmethod(lambda *_: SMALL))
    path = tmp_path / "mine.yaml"
    first, other = answers(2, ["--quick", "--out", str(path), "--name", "mine"])
    assert first["kernel"] == other["kernel"] and first["inside"] == other["inside"]
    write(first, path)
    cluster = load_cluster(path)
    assert cluster.name == "mine" and cluster.nodes == 1 and cluster.between is None
    assert cluster.host.cores and cluster.devices == 16 * cluster.host.cores and not cluster.host.asynchronous
    assert set(cluster.kernel.peak_tflops) == {"float32", "bfloat16"} and set(cluster.kernel.forward.efficiency[16]) == {16, 32}
    assert cluster.inside.port_gb_s > 0 and "measured by launch/calibrate.py" in cluster.sources["inside"]
    spent = cluster.task_seconds(
        np.array([64 * 64]), np.array([64]), np.array([64]), Bench(CPU, SMALL, None).shape(16), "forward"
    )
    assert 0 < spent[0] < 1


def test_impossible_measurements_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"what was measured: (name|kernel) is missing"):
        write({"nodes": 1}, tmp_path / "bad.yaml")
    assert not (tmp_path / "bad.yaml").exists()


def test_what_cannot_be_measured_comes_from_the_base() -> None:
    asked = parse(["--out", "x.yaml", "--base", "h200"])
    host = {"cores": 2, "pass_us": 1}
    data = describe(asked, CPU, Nodes(1, 1), {}, {}, host)
    assert data["inside"]["port_gb_s"] == load_cluster("h200").inside.port_gb_s and data["between"]["nics"] == 8
    assert data["sources"]["inside"] == "from h200, not measured here" and data["nodes"] > 1
    measured = describe(asked, CPU, Nodes(2, 2), {}, {"inside": {"port_gb_s": 3}}, host)
    assert measured["inside"] == {"port_gb_s": 3} and measured["sources"]["inside"].startswith("measured by")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out is missing"),
        (["--out", "a.json"], r"descriptions are .yaml files. Pass --out a.json.yaml"),
        (["--out", "none/a.yaml"], "there is no folder"),
        (["--out", "a.yaml", "--ranks", "0"], "--ranks 0 is no number"),
        (["--out", "a.yaml", "--timeout", "0"], "--timeout 0 is no time"),
        (["--out", "a.yaml", "--base", "h300"], "There is no cluster 'h300'"),
        (["--out", "a.yaml", "--fast"], "unrecognized arguments: --fast. --help lists"),
        (["--out", "a.yaml", "--ranks", "1", "--device", "cpu"], "One process has no links to measure"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--out", "--base", "--ranks", "--quick", "--device"))


def test_nodes() -> None:
    nodes = Nodes(6, 3)
    assert nodes.count == 2
    assert [nodes.neighbours(r) for r in range(6)] == [(1, 2), (2, 0), (0, 1), (4, 5), (5, 3), (3, 4)]
    assert nodes.across(4) == (1, 1) and nodes.across(0) == (3, 3)
    assert same_sizes([3] * 6) == 3
    with pytest.raises(ValueError, match=r"Nodes hold \[1, 2\] ranks each"):
        same_sizes([1, 2, 2])


def test_bench_predicts_every_case() -> None:
    """Before any rank starts: each case and schedule of the benchmark has a price, more for both passes than for one."""
    cluster = load_cluster("gloo2")
    for case in CASES[:4]:
        for schedule in bench_simulator.SCHEDULES:
            forward, step = bench_simulator.predict(schedule, case, 2, cluster)
            assert 0 < forward < step < 10


def test_bench_report(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row(2, "a", "ring", 1, 4, 1, 5), Row(2, "a", "zigzag", 1, 2, 1, 1.5), Row(4, "a", "ring", 1, 1, 1, 2)]
    rows += [Row(4, "a", "tree", 1, 1.5, 1, 1.8)]
    assert [row.error for row in rows] == pytest.approx([0.25, -0.25, 1, 0.2])
    assert bench_simulator.regrets(rows) == pytest.approx([0, 0.5])
    bench_simulator.report(rows)
    said = capsys.readouterr().out
    assert "all: median error 25.0%, worst 100.0% of 4" in said and "25.0% of the best on average, 50.0% at worst" in said
    assert "1.25 of 4000" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--worlds", "1"], "--worlds of 2"), (["--cluster", "no"], "no cluster 'no'"), (["--cases", "99"], "--cases of 1 to 14")],
)
def test_bench_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_simulator.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_bench_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "launch" / "bench_simulator.py"), "--worlds", "2", "--rounds", "1", "--cases", "1"]
    done = subprocess.run([*command, "--json", str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [Row(**row) for row in json.loads(path.read_text())]
    assert [row.schedule for row in rows] == list(bench_simulator.SCHEDULES) and all(0 < row.forward < row.step for row in rows)


@pytest.mark.slow
def test_started_alone_it_starts_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    command = [sys.executable, str(ROOT / "launch" / "calibrate.py"), "--quick", "--device", "cpu", "--out", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout and "inside a node" in done.stdout
    assert json.dumps(load_cluster(path).sources)
