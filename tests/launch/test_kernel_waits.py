"""Simulated waits of the ordered backward: the table is printed, and its figures follow what is given."""

from __future__ import annotations

import pytest

from distattn.launch.bench_kernels_cases import Case
from distattn.launch.kernel_waits import WAYS, main, simulate


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--processors", "4", "--latency", "0.5", "2"]) == 0
    said = capsys.readouterr().out
    assert "causal" in said and "documents" in said and "full 1k D128 2:1" in said


def test_longer_turns_take_longer_and_what_ships_waits_least() -> None:
    found = simulate(Case("dense", "causal", 4096, 8, 8, 128, 128, "backward"), 1.0, [0.0, 0.5, 4.0], 32)
    assert all(times == sorted(times) for times in found.values()) and list(found) == list(WAYS)
    assert found["ordered"][1] < 1.03 < 1.06 < found["up"][1]


def test_mistakes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--step", "0"])
    assert "found --step 0.0" in capsys.readouterr().err
