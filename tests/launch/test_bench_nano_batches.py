from __future__ import annotations

import json
from pathlib import Path

import pytest

from distattn.launch.bench_nano_batches import WAYS, Wire, lengths, main, parse
from distattn.parallel.comm import LANES, Awaited, SoloCommunicator


def test_both_ways_on_two_processes_and_a_wire(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of both ways are compared by the program itself; times are not looked at."""
    file = tmp_path / "rows.json"
    words = ["--tokens", "64", "--dim", "128", "--layers", "1", "--repeat", "1", "--wire-gb-s", "1", "--schedules", "tree"]
    assert main([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["schedule"], row["way"]) for row in rows] == [("tree", way) for way in WAYS]
    assert all(0 < row["waiting"] < row["step"] for row in rows)
    assert "a wire of 1 GB/s" in capsys.readouterr().out


def test_a_wire_is_as_slow_as_it_says() -> None:
    """Two batches of lanes of one kind one after the other, on the clock of the one that waits."""
    import time

    import torch

    class Quiet(SoloCommunicator):
        world = 2

    wire, message = Wire(Quiet(2 * LANES), 0.001), torch.zeros(20_000, dtype=torch.uint8)  # 20 ms each
    begun = time.perf_counter()
    pending = [wire.post(lane, [(1, message)], [(1, message)], Awaited("test", 0, 0)) for lane in (0, LANES)]
    for batch in pending:
        batch.wait()
    assert time.perf_counter() - begun >= 0.04 and wire.waiting > 0.03


def test_prices(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["--price", "h200", "--ranks", "16", "--tokens", "32768", "--schedules", "disaggregate", "--json", str(file)]
    assert main(words) == 0
    (row,) = json.loads(file.read_text())
    assert row["dense"] < row["beside"] < row["beside_shared"] < row["alone"] and row["exposed_beside"] <= row["exposed_alone"]


def test_documents_fill_both_sequences() -> None:
    some = lengths(parse(["--tokens", "1000"]))
    assert [sum(s) for s in some] == [1000, 1000] and some[0] != some[1] and min(map(min, some)) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dim", "100"], "pass a multiple of 128"),
        (["--ranks", "0"], "--ranks 0 was asked for"),
        (["--schedules", "circle"], "There is no schedule 'circle'"),
        (["--wire-gb-s", "-1"], "--wire-gb-s must be 0 or more"),
    ],
)
def test_mistakes_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2 and message in capsys.readouterr().err
