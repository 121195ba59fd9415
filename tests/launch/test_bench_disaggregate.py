from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distattn.kernels import load
from distattn.kernels.bands import Band, Bands
from distattn.kernels.contract import Scores, empty_state
from distattn.launch.bench_disaggregate import DISAGGREGATE, SLOW, TOLD, Problem, Twice, main, measure, parse, print_figures
from distattn.parallel.comm_threads import run_ranks

ROOT = Path(__file__).parents[2]
SMALL = Problem(2048, 0.5, 100, 2, 4, 2, 16, 1, 60.0)


def test_all_contenders_compute_the_same_and_the_slow_rank_is_relieved(capsys: pytest.CaptureFixture[str]) -> None:
    """On ranks as threads. Times are not looked at."""
    figures = run_ranks(2, lambda communicator: measure(SMALL, communicator), timeout=120)[0]
    assert figures["difference"] < 1e-5
    forward = {name: balance[0] for name, balance in figures["balance"].items()}
    assert forward["contiguous"] > 1.5 and forward["per-document zigzag"] < 1.02
    assert forward[DISAGGREGATE] <= 1.021 and forward[TOLD] <= 1.021, "the planner's tolerance"
    assert forward[SLOW] > 1.4, "half of the work, at half of the speed, where a third would be right"
    print_figures(SMALL, {"command": "python launch/bench_disaggregate.py", **figures})
    said = capsys.readouterr().out
    assert "speeds told" in said and "of the throughput that the remaining speed allows" in said


def test_twice_gives_what_once_gives() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(8, 2, 4, generator=g) for _ in range(4))
    inner, bands, scores = load("aten"), Bands([Band(0, 8, 0, 8, hi=0)]), Scores(0.5)
    found = []
    for backend in (inner, Twice(inner)):
        state = backend.forward(q, k, v, bands, scores, empty_state(q, 4))
        sums = [torch.zeros_like(x) for x in (q, k, v)]
        backend.backward(dout, q, k, v, (dout * state.o).sum(-1), state.lse, bands, scores, *sums)
        found.append([*state, *sums])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens 0 was asked for"),
        (["--long", "1.5"], "--long 1.5 is a share of the tokens: 0 to 1"),
        (["--ranks", "1"], "nothing travels between fewer than 2 ranks"),
        (["--tokens", "2", "--ranks", "3"], "--tokens 2 on 3 ranks: pass a token for each"),
        (["--heads", "8", "--kv-heads", "3"], "8 query heads cannot share 3 key heads"),
        (["--timeout", "-1"], "no time to wait"),
        (["--json", "nowhere/figures.json"], "there is no folder"),
    ],
)
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_lengths_fill_the_batch() -> None:
    assert parse([])[0].lengths() == [4096, *[256] * 16]
    assert SMALL.lengths() == [1024, *[100] * 10, 24]


@pytest.mark.slow
def test_a_small_run_of_processes(tmp_path: Path) -> None:
    words = ["--tokens", "2048", "--repeat", "1", "--timeout", "60", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, str(ROOT / "launch" / "bench_disaggregate.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["difference"] < 1e-5
