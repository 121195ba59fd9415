"""The count of how evenly the Hopper kernels share a call out."""

from __future__ import annotations

import json

import pytest

from distattn.kernels.gluon_launch import ROWS
from distattn.launch import kernel_occupancy
from distattn.launch.bench_kernels_cases import Case


def test_it_prints_both_and_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    short = Case("few", "full", 16384, 4, 4, 128, 128, rows=1024)
    monkeypatch.setattr(kernel_occupancy, "cases", lambda: [short])
    assert kernel_occupancy.main([]) == 0
    assert capsys.readouterr().out.startswith("forward full 1k x 16k D128 4:4: forward 0.242 -> 0.7")
    assert kernel_occupancy.main(["--json", "--processors", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["processors"] == 32 and found["forward"]["whole"] == found["forward"]["launched"] == 1.0
    assert kernel_occupancy.main(["--processors", "0"]) == 2
    assert "Pass 1 or more" in capsys.readouterr().err


def test_the_launch_rows_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Case("few", "full", 1024, 2, 1, 128, 128, "backward", rows=16384)
    found = kernel_occupancy.occupancies(short, 132)
    assert set(found) == {"key_gradient", "query_gradient"} and found["key_gradient"][1] > 10 * found["key_gradient"][0]
    size = (128, 128)
    monkeypatch.setitem(ROWS["key_gradient"], size, ROWS["key_gradient"][size]._replace(split=False))  # type: ignore[call-arg]
    found = kernel_occupancy.occupancies(short, 132)
    assert found["key_gradient"][1] == found["key_gradient"][0]


def test_the_table_has_every_kind_of_call() -> None:
    cases = kernel_occupancy.cases()
    assert {case.group for case in cases} == {"dense", "gqa", "documents", "window", "few"} and len(set(cases)) == len(cases)
    assert {(case.direction, min(case.queries, case.tokens)) for case in cases if case.group == "few"} == {
        (direction, rows) for direction, least in (("forward", 1024), ("backward", 1024)) for rows in (least, 2048, 4096)
    }
