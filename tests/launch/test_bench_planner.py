"""The planner's benchmark: a whole run, its figures against counting, mistakes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from distattn.launch import bench_planner
from distattn.launch.bench_planner import Setting, main, packed


def test_a_small_run_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(["700", "900", "30", "12000"]) + "\n")
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    words = [
        "--settings",
        "8x2k",
        "--seeds",
        "2",
        "--repeat",
        "1",
        "--lengths",
        str(lengths),
        "--out",
        str(out),
        "--png",
        str(png),
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "file" in shown and "heavy_tail" in shown
    rows = json.loads(out.read_text())["rows"]
    assert [row["source"] for row in rows] == ["file", "heavy_tail"]
    for row in rows:
        assert all(len(row[name]) == 2 for name in ("balance", "traffic", "bound", "forward_mb", "backward_mb", "plan_ms"))
        assert max(row["balance"]) <= 1.0201 and all(b <= t for b, t in zip(row["bound"], row["traffic"], strict=True))
        assert all(f < b for f, b in zip(row["forward_mb"], row["backward_mb"], strict=True))
    assert png.read_bytes().startswith(b"\x89PNG")


def test_other_heads_and_windows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--settings", "8x4k", "--seeds", "1", "--heads", "64:64", "--window", "1024", "--smallest", "32"]) == 0
    assert "8x4k" in capsys.readouterr().out


def test_figures_of_peers_appear_only_for_their_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, other = tmp_path / "lengths.txt", tmp_path / "other.txt"
    lengths.write_text("300\n1200\n")
    other.write_text("300\n1300\n")
    monkeypatch.setattr(bench_planner, "PEERS", {"2x1k": (7.0, 8.0)})
    monkeypatch.setattr(bench_planner, "PEERS_SEEDS", 2)
    monkeypatch.setattr(bench_planner, "PEERS_LENGTHS", hashlib.sha256(b"300\n1200").hexdigest())

    def peers(file: Path, seeds: int, *more: str) -> dict[str, list[float] | None]:
        out = tmp_path / "out.json"
        words = ["--settings", "2x1k", "--repeat", "1", "--lengths", str(file), "--seeds", str(seeds), "--out", str(out), *more]
        assert main(words) == 0
        return {row["source"]: row["peers"] for row in json.loads(out.read_text())["rows"]}

    assert peers(lengths, 2) == {"file": [7.0, 8.0], "heavy_tail": None}
    for refused in (
        peers(lengths, 1),
        peers(other, 2),
        peers(lengths, 2, "--heads", "64:64"),
        peers(lengths, 2, "--window", "512"),
    ):
        assert refused == {"file": None, "heavy_tail": None}


def test_packing_fills_the_ranks_and_is_seeded() -> None:
    made = packed([5, 100, 40], 1000, 3)
    assert sum(made) == 1000 and made == packed([5, 100, 40], 1000, 3) != packed([5, 100, 40], 1000, 4)
    assert set(made[:-1]) <= {16, 96, 32}
    assert Setting.read("16x8k") == Setting(16, 8192) and str(Setting.read("4x500")) == "4x500"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--settings", "16"], "no setting"),
        (["--heads", "8:3"], "multiple"),
        (["--kind", "none"], "nothing to plan for"),
        (["--kind", "heavytail"], "Did you mean heavy_tail"),
        (["--lengths", "nowhere.txt"], "nowhere.txt"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_mistakes_are_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert named in capsys.readouterr().err


def test_a_refusal_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--settings", "4x64", "--seeds", "1", "--smallest", "4096", "--repeat", "1", "--kind", "giant"]) == 1
    assert "can be kept" in capsys.readouterr().out
