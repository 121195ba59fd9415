"""Targets of the kernels held against runs: what is met, what is missed, and that nothing is called met that was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distattn.launch import bench_kernels
from distattn.launch.bench_kernels_cases import Case, all_cases
from distattn.launch.bench_kernels_claims import CUDNN, FLEX, Claim, Runs, claims
from distattn.launch.bench_kernels_measure import Rate
from distattn.launch.bench_kernels_ranks import SCHEDULES, Distributed
from distattn.launch.bench_kernels_report import Results, as_json

HARDWARE = {"name": "a card", "capability": [9, 0]}
WHO = ("gluon", "gluon_fused", CUDNN, FLEX)
Speed = Callable[[Case, str, int], float]


def run(speed: Speed, groups: set[str] | None = None) -> dict[str, Any]:
    """Three rounds of every case and eight ranks; ``speed`` in operations a second."""
    results = Results("made up", HARDWARE, 1)
    for case in all_cases():
        if groups is None or case.group in groups:
            results.rates[case] = {
                who: Rate([1.0] * 3, [case.flops / speed(case, who, turn) for turn in range(3)], [[]] * 3) for who in WHO
            }
    if groups is None or "ranks" in groups:
        one = Rate([1.0], [8.0], [[]])
        ranks = {name: [Rate([1.0], [1.03], [[]]), *[Rate([1.0], [1.02], [[]])] * 7] for name in SCHEDULES}
        results.distributed = [Distributed(way, 8, 131072, one, ranks) for way in ("forward", "backward")]
    return json.loads(json.dumps(as_json(results)))


def good(case: Case, who: str, turn: int) -> float:
    return {"gluon": 1.3e14 if case.direction == "forward" else 1.01e14, "gluon_fused": 1.3e14, CUDNN: 1e14, FLEX: 0.5e14}[who]


def verdicts(found: list[Claim]) -> dict[str, str]:
    return {claim.what: claim.verdict for claim in found}


def test_all_is_met_by_kernels_that_are_fast() -> None:
    found = claims(Runs([run(good)]))
    assert {claim.verdict for claim in found} == {"met", "met, goal too"} and len(found) == len(verdicts(found)) >= 25


SLOW = {
    "forward full, D 128 / cuDNN": lambda c, who, turn: who == "gluon" and c.tokens == 32768 and c.mask == "full",
    "forward, float32 state in and out / none, 16k x 16k": lambda c, who, turn: who == "gluon" and c.state,
    "backward, the slowest round of any shape / cuDNN": lambda c, who, turn: who == "gluon_fused" and turn == 1 and c.d == 64,
    "backward, shards of 128 rows / of 2,048, a pair": lambda c, who, turn: who == "gluon_fused" and c.mask == "short",
    "forward, window at 64k / dense causal, a pair": lambda c, who, turn: who == "gluon" and c.group == "window",
    "forward causal, heads 32:8 / 16:16": lambda c, who, turn: who == "gluon" and c.group == "gqa" and c.mask == "causal",
}


@pytest.mark.parametrize("missed", SLOW)
def test_what_is_slow_is_missed(missed: str) -> None:
    slow = SLOW[missed]
    found = claims(Runs([run(lambda case, who, turn: good(case, who, turn) * (0.6 if slow(case, who, turn) else 1))]))
    assert verdicts(found)[missed] == "missed"
    assert verdicts(found)["deterministic backward causal, D 128 / cuDNN"] == "met, goal too"


def test_ranks_that_cost_or_differ_are_missed() -> None:
    content = run(good)
    for row in content["ranks"]:
        row["sum_over_one"] = 1.05 if row["schedule"] == "zigzag" else 1.0
        row["seconds"] = [1.0 if row["schedule"] == "zigzag" else 0.99, *[1.015] * 7]
    said = verdicts(claims(Runs([content])))
    assert [said[f"8 ranks, 128k, {name}: sum of kernels / one device"] for name in ("zigzag", "striped")] == ["missed", "met"]
    assert [said[f"8 ranks, 128k, {name}: slowest / fastest rank"] for name in ("zigzag", "striped")] == ["met", "missed"]


def test_what_was_not_measured_is_not_met() -> None:
    content = run(good, {"dense"})
    content["rates"] = [row for row in content["rates"] if not (row["who"] == "gluon" and row["tokens"] == 32768)]
    said = verdicts(claims(Runs([content])))
    assert said["forward causal, D 128 / cuDNN"] == said["8 ranks, 128k, zigzag: slowest / fastest rank"] == "not measured"
    assert said["backward full, D 64 / cuDNN"] == said["backward causal, D 64 / cuDNN"] == "met"


def test_ratios_of_two_runs_say_so() -> None:
    runs = Runs([run(good, {"dense"}), run(good, {"window"})])
    assert verdicts(claims(runs))["forward, window at 64k / dense causal, a pair"] == "met (of two runs)"
    with pytest.raises(ValueError, match="Runs of one card can be held against each other, found a card, another"):
        Runs([*runs.contents, {"hardware": {"name": "another"}}])


def test_files_are_held_against_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, groups in (("a.json", {"dense"}), ("b.json", {"state"})):
        (tmp_path / name).write_text(json.dumps(run(good, groups)))
    assert bench_kernels.main(["--claims", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr().out
    assert "forward full, D 128 / cuDNN" in said and "met, goal too" in said and "targets not measured" in said
