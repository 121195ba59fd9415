from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from distattn.launch.bench_decode import Problem, main, measure, parse, print_figures, ratios_of
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.merge_ranks import choose_exchange

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("world", [2, 3])
def test_both_ways_give_the_same_and_send_what_they_must(world: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On ranks as threads; 1600 tokens: whole blocks and the begun one of 512 rows. Times are not looked at."""
    problem = Problem(1600, world, 8, 4, 32, "fp32", 2, 60.0)
    found = run_ranks(world, lambda c: measure(problem, c), timeout=60)
    import torch

    figures = found[0]
    assert figures["difference"] < 1e-6 and all(other["difference"] == figures["difference"] for other in found)
    assert figures["bytes"]["tree"] == choose_exchange(8, 32, world, torch.float32, torch.float32, False).sent
    blocks = math.ceil(math.ceil(1600 / world) / 512)
    assert figures["bytes"]["ring"] == (world - 1) * blocks * 512 * 2 * 4 * 32 * 4
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in figures["seconds"].values())
    print_figures(problem, {"command": "python launch/bench_decode.py", **figures})
    said = capsys.readouterr().out
    assert "times faster than ring" in said and f"{figures['bytes']['ring']:,}" in said


def test_ratios_are_of_rounds() -> None:
    assert ratios_of({"seconds": {"tree": [1.0, 2.0], "ring": [8.0, 20.0]}}) == [8.0, 10.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens 0 was asked for"),
        (["--tokens", "4"], "every rank needs one of its own"),
        (["--ranks", "1"], "nothing travels between fewer than 2 ranks"),
        (["--heads", "8", "--kv-heads", "3"], "8 query heads cannot share 3 key heads"),
        (["--repeat", "0"], "--repeat 0 was asked for"),
        (["--timeout", "-1"], "no time to wait"),
        (["--json", "nowhere/figures.json"], "there is no folder"),
    ],
)
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_the_default_is_the_target() -> None:
    problem, path = parse([])
    assert (problem.tokens, problem.ranks, problem.heads, problem.kv_heads, problem.head_dim) == (65536, 4, 32, 8, 128)
    assert path is None


@pytest.mark.slow
def test_a_small_run_of_processes(tmp_path: Path) -> None:
    """Whether a tree is faster at this size is not looked at."""
    shape = ["--tokens", "2000", "--ranks", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    words = [*shape, "--repeat", "2", "--timeout", "60", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, str(ROOT / "launch" / "bench_decode.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["difference"] < 1e-6 and "Made by: python launch/bench_decode.py --tokens 2000" in done.stdout
