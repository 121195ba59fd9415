from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distattn.launch.bench_straggler import (
    LEFT,
    MEASURED,
    WHOLE,
    Held,
    Problem,
    Straggler,
    busy,
    main,
    parse,
    phases,
    print_figures,
    throughput,
)

ROOT = Path(__file__).parents[2]
SMALL = Problem(1024, 2, 64, 1, 2, 1, before=8, after=12, hold=False, beside=0, seed=0, timeout=60.0)
DENSE, KERNELS = 1.0, 3.0  # seconds of a step


def figures_of(relieved: int, late: float = 1.0) -> dict[str, Any]:
    """What would be measured: from step 8 on a rank of half the speed, which has a third of the work from step ``relieved`` on;
    what is found then takes ``late`` times as long as it should."""

    def kernels(step: int, way: str) -> list[dict[str, float]]:
        share = 1 / 3 if way == MEASURED and step >= relieved else 1 / 2
        slow = 2 if way != WHOLE and step >= SMALL.before else 1
        return [
            {"work": 2 * KERNELS * part, "nanoseconds": KERNELS * part * times * 1e9, "elapsed": 2 * KERNELS * part * times * 1e9}
            for part, times in ((1 - share, 1), (share, slow))
        ]

    steps = range(SMALL.steps)
    found = {way: [kernels(step, way) for step in steps] for way in (WHOLE, LEFT, MEASURED)}
    seconds = {
        way: [
            DENSE
            + max(rank["elapsed"] for rank in found[way][step]) / 1e9 * (late if way == MEASURED and step >= relieved else 1)
            for step in steps
        ]
        for way in found
    }
    speeds = {WHOLE: [[1.0, 1.0]] * SMALL.steps, MEASURED: [[1.0, 0.5 if step >= relieved - 2 else 1.0] for step in steps]}
    losses = {way: [1.0] * SMALL.steps for way in found}
    del found[LEFT]  # which nobody measures
    return {"seconds": seconds, "kernels": found, "speeds": speeds, "losses": losses, "torch": "2", "command": "bench"}


def test_what_is_said_of_times_worked_out_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    figures = figures_of(relieved=12)
    found = phases(SMALL, figures)
    assert (found.slow, found.relieved) == (slice(8, 12), slice(12, 20))
    assert throughput(SMALL, figures, found.relieved) == pytest.approx((1.0, 1.0))
    assert throughput(SMALL, figures, found.slow) == pytest.approx((5 / 7, 2 / 3))
    late = figures_of(relieved=12, late=1.25)
    assert throughput(SMALL, late, found.relieved) == pytest.approx((5 / 6, 4 / 5))
    held = dataclasses.replace(SMALL, hold=True)
    assert throughput(held, figures, found.relieved) == pytest.approx(((2 * DENSE + 4) / 5, 4 / 3)), "the dense part is slow too"
    print_figures(SMALL, late)
    said = capsys.readouterr().out
    assert "known after 3 slow steps, relieved after 4" in said
    assert "relieved: 0.80 of the attention that the remaining speed allows (target when relieved 0.90), 0.83 of the step" in said
    assert "kernels had 50% of their cores (median step), less than 90% in 40 of 40 steps" in said
    assert "never relieved: 0.67 of the attention" in said and "changes of speed without cause: 0; with cause: 1" in said


def test_a_rank_that_is_never_relieved_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    figures = figures_of(relieved=SMALL.steps)
    print_figures(SMALL, figures)
    assert "12 steps after a rank turned slow it still has its share" in figures["refused"]
    assert "still has its share" in capsys.readouterr().out


def test_kernels_run_twice_inside_of_what_is_timed_and_only_while_slow() -> None:
    import torch

    from distattn import ContextParallel, causal
    from distattn.kernels.aten import Aten

    runs = []

    class Counted(Aten):
        def forward(self, *arguments: Any) -> Any:
            runs.append(arguments)
            return super().forward(*arguments)

    cp = ContextParallel(timed=True)
    straggler = Straggler(cp)
    x = torch.ones(8, 2, 4)
    straggler.kernels(x, x, x, None).backend = Counted()
    for slow, count in ((False, 1), (True, 2), (False, 1)):
        straggler.slow = slow
        cp.attention(x, x, x, cp.plan(causal(8)))
        assert len(runs) == count and cp.stopwatch is not None and cp.stopwatch.take().work == 2 * (4 + 4) * 2 * 36
        runs.clear()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the state of a process is read from Linux's /proc")
def test_another_program_holds_the_core_only_while_slow() -> None:
    def state_becomes(wanted: str) -> bool:
        deadline = time.monotonic() + 10
        while (found := Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[0]) not in wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"the program is in state {found}, not in one of {wanted}")
        return True

    with busy(1) as (program,):
        held = Held(program)
        assert not held.slow and state_becomes("T")
        held.slow = True
        assert held.slow and state_becomes("RS")
        held.slow = False
        assert state_becomes("T")
    assert program.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--before", "0"], "--before 0 was asked for"),
        (["--hold", "--ranks", "4096"], "--hold keeps each of 4096 ranks on a core of its own"),
        (["--beside", "-1"], "--beside -1 was asked for. Pass 0 or more"),
        (["--ranks", "1"], "nothing travels between fewer than 2 ranks"),
        (["--heads", "4", "--kv-heads", "3"], "kv_heads"),
        (["--json", "nowhere/figures.json"], "there is no folder"),
    ],
)
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_the_default_is_a_training_with_two_ranks() -> None:
    problem, path = parse([])
    assert (problem.ranks, problem.steps, path) == (2, 30, None)


@pytest.mark.slow
def test_a_small_run_of_processes(tmp_path: Path) -> None:
    """Times are not looked at: on a busy machine the rank may not be relieved in time, which is said and ends with 1."""
    words = [
        "--tokens",
        "1024",
        "--dim",
        "64",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--before",
        "6",
        "--after",
        "10",
    ]
    command = [sys.executable, str(ROOT / "launch" / "bench_straggler.py"), *words, "--beside", "1", "--json", "figures.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1) and "Made by: python launch/bench_straggler.py" in done.stdout, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(len(seconds) == 16 for seconds in figures["seconds"].values())
    assert figures["losses"][WHOLE] == pytest.approx(figures["losses"][MEASURED], rel=1e-5)
    assert figures["losses"][WHOLE] == figures["losses"][LEFT], "the same plans: the same bits"
