from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distattn.launch.bench_peer import (
    BOTH,
    FORWARD,
    PEER,
    SCHEDULES,
    TENSORS,
    Ours,
    Problem,
    handed_out_wrong,
    judge,
    kernels,
    main,
    make_truth,
    parse,
    print_figures,
    relative,
    shares,
)
from distattn.parallel.comm_threads import run_ranks

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("ring_attention_pytorch") is not None


def problem(world: int = 2, schedule: str = "striped", tokens: int = 48) -> Problem:
    return Problem(tokens, world, 2, 8, schedule, 8, 1, False, 60.0)


@pytest.fixture
def as_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", [2, 3])
def test_ours_is_right_and_its_kernels_alone_do_all_of_the_work(world: int, schedule: str) -> None:
    """Parts of the ranks' work without messages add up to the whole result: nothing is timed twice, nothing is left out."""
    one = problem(world, schedule)
    truth = make_truth(one)

    def rank(communicator: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        ours = Ours(one, communicator, truth)
        assert len(ours.attend(False)) == 1 and list(ours.work(False)) == ["out"]  # type: ignore[call-overload]
        return ours.positions, ours.attend(True), ours.work(True)

    found = run_ranks(world, rank, timeout=60)
    for i, (positions, results, _) in enumerate(found):
        for name, result in zip(TENSORS, results, strict=True):
            assert relative(result, truth[name][positions[i]]) < 1e-6, name
    for name in TENSORS:
        total = torch.zeros_like(truth[name])
        for _, _, parts in found:
            for rows, part in parts[name]:
                total[rows] += part
        assert relative(total, truth[name]) < 1e-6, name


def test_truth_is_causal_attention() -> None:
    one = problem(tokens=16)
    truth = make_truth(one)
    q, k, v = (truth[name].double().requires_grad_() for name in ("q", "k", "v"))
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    scores = (torch.einsum("ihd,jhd->hij", q, k) / 8**0.5).masked_fill(hidden, -torch.inf)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    for name, right in zip(TENSORS, [out.detach(), *torch.autograd.grad(out, (q, k, v), truth["dout"].double())], strict=True):
        assert relative(truth[name], right) < 1e-12, name


def errors(**peer: float) -> dict[str, dict[str, float]]:
    return {"distattn": dict.fromkeys(TENSORS, 1e-7), PEER: {**dict.fromkeys(TENSORS, 1e-7), **peer}}


def test_right_results_are_measured() -> None:
    assert judge(errors(), False, False) == ([FORWARD, BOTH], [])


@pytest.mark.parametrize(
    ("wrong", "fault", "flag", "kinds"),
    [
        ({"dk": 1.2, "dv": 1.9}, True, False, [FORWARD]),
        ({"dk": 1.2, "dv": 1.9}, True, True, [FORWARD, BOTH]),
        ({"dk": 1.2, "dv": 1.9}, False, True, [FORWARD]),  # wrong in some other way
        ({"dk": 1.2}, True, True, [FORWARD]),
        ({"dq": 1e-4, "dk": 1.2, "dv": 1.9}, True, True, [FORWARD]),
        ({"out": 1e-4}, False, True, []),
        ({"out": float("nan")}, False, True, []),
    ],
)
def test_a_time_of_a_wrong_result_is_refused(wrong: dict[str, float], fault: bool, flag: bool, kinds: list[str]) -> None:
    measured, refused = judge(errors(**wrong), fault, flag)
    assert measured == kinds and bool(refused) == (kinds != [FORWARD, BOTH])
    for sentence in refused:
        assert all(name in sentence for name in wrong) and "(tolerance 1e-05)" in sentence
        assert ("--known-fault measures it" in sentence) == fault


def test_our_own_mistakes_are_not_excused() -> None:
    found = errors()
    found["distattn"].update(dk=1.2, dv=1.9)
    measured, refused = judge(found, True, True)
    assert measured == [FORWARD] and "distattn is wrong, dk by 1.2e+00" in refused[0]


def test_the_known_fault_is_told_from_others() -> None:
    one = problem()
    truth = make_truth(one)
    positions = list(torch.arange(one.tokens).view(2, -1))
    sums = truth["dk"] + truth["dv"]
    found = {"dk": sums[positions[0]], "dv": sums[positions[1]]}
    assert handed_out_wrong(found, truth, positions, 0) == 0
    assert handed_out_wrong(found, truth, positions, 1) > 1
    assert handed_out_wrong({"dk": truth["dv"][positions[0]], "dv": found["dv"]}, truth, positions, 0) > 0.1
    assert relative(found["dk"] * torch.nan, found["dk"]) == float("inf")


def test_shares_multiply_to_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"distattn": 2.0, PEER: 12.0, kernels("distattn"): 1.6, kernels(PEER): 6.4}
    found = shares(seconds)
    assert (found.total, found.kernel, found.schedule) == (6.0, 4.0, 1.5)
    rounds = {name: [0.5 * value, value, 4 * value] for name, value in seconds.items()}
    figures = {"versions": {"torch": "2"}, "errors": errors(dk=1.0), "fault": True, "refused": [], "command": "me"}
    times = {"seconds": {BOTH: rounds}, "processor_seconds": {BOTH: rounds}}
    print_figures(problem(), {**figures, **times})
    said = capsys.readouterr().out
    assert "peer's time over ours" in said and "6.000   (rounds: 6.000 to 6.000)" in said
    assert "1.500   (rounds: 1.500 to 1.500)" in said and "1.250" in said and "1.875" in said and "350%" in said
    assert "the kernels by processor seconds" in said and "BUSY" not in said
    assert "NOT the gradients" in said and "Made by: me" in said
    halves = {name: [value / 2 for value in values] for name, values in rounds.items()}
    print_figures(problem(), {**figures, "seconds": {FORWARD: rounds}, "processor_seconds": {FORWARD: halves}})
    said = capsys.readouterr().out
    assert "NOT the gradients" not in said and "THE MACHINE WAS BUSY: kernels that wait for nobody took 2.0 times" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens 0 was asked for"),
        (["--tokens", "8000"], "a multiple of 2 x 512 = 1024. Pass 8192"),
        (["--tokens", "8"], "Pass 1024"),
        (["--ranks", "1"], "nothing travels between fewer than 2 ranks"),
        (["--repeat", "0"], "--repeat 0 was asked for"),
        (["--timeout", "-1"], "no time to wait"),
        (["--json", "nowhere/figures.json"], "there is no folder"),
    ],
)
@pytest.mark.usefixtures("as_if_installed")
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_missing_peer_is_an_error_with_its_cure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([]) == 2
    assert "pip install ring-attention-pytorch" in capsys.readouterr().err


@pytest.mark.usefixtures("as_if_installed")
def test_defaults() -> None:
    made, path = parse([])
    assert dataclasses.asdict(made) == {
        **{"tokens": 8192, "ranks": 2, "heads": 8, "head_dim": 64, "schedule": "striped"},
        **{"bucket": 512, "repeat": 5, "known_fault": False, "timeout": 900.0},
    }
    assert path is None


def test_help_needs_no_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "pip install ring-attention-pytorch" in capsys.readouterr().out


@pytest.mark.skipif(not INSTALLED, reason="needs the package ring-attention-pytorch, which is not installed")
def test_a_tiny_run_against_the_installed_peer(tmp_path: Path) -> None:
    """Which of the two is faster at this size is not looked at."""
    shape = ["--tokens", "128", "--bucket", "16", "--heads", "2", "--head-dim", "16"]
    words = [*shape, "--repeat", "2", "--timeout", "60", "--known-fault", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, str(ROOT / "launch" / "bench_peer.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert max(found["errors"]["distattn"].values()) < 1e-6 and found["errors"][PEER]["out"] < 1e-6
    assert set(found["seconds"]) == {FORWARD, BOTH}
    for figures in (found["seconds"], found["processor_seconds"]):
        assert all(len(values) == 2 and min(values) > 0 for kind in figures.values() for values in kind.values())
    assert "of that the kernels'" in done.stdout and "Made by: python launch/bench_peer.py --tokens 128" in done.stdout
