from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distattn.metrics import Metrics, Pace, duration, peak_memory, plot, progress_line, read


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the process was killed while it wrote
    Metrics(tmp_path, 2).write(3, {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in read(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    Metrics(tmp_path, 0).write(1, {"loss": 1.0})
    Metrics(tmp_path, 0)
    assert read(tmp_path / "metrics.jsonl") == []


def test_tensorboard_files_are_written_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    Metrics(tmp_path, 0, tensorboard=True).write(1, {"loss": 1.0})
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_the_plot_is_a_png_of_all_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        metrics = Metrics(tmp_path / name, 0)
        metrics.write(1, {"loss": 2.0})
        metrics.write(1, {"eval_loss": 2.1})
    path = plot({name: tmp_path / name / "metrics.jsonl" for name in ("one", "two")}, tmp_path / "loss.png", "byte")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_progress_line_has_what_is_asked_of_it() -> None:
    values = {"loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 12345.6, "memory_bytes": 2**30}
    line = progress_line(7, 300, values, 125)
    for part in ("step   7/300", "loss 2.5000", "12,346 tokens/s", "1.00 GiB", "ETA 2:05"):
        assert part in line


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0, 59.6, 3600, 7384)] == ["0:00", "1:00", "1:00:00", "2:03:04"]


def test_pauses_do_not_count_as_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Pace(step=10)
    now[0] = 4.0
    assert pace.lap(12) == (2, 4.0)
    with pace.paused():
        now[0] = 100.0
    now[0] = 101.0
    assert pace.lap(13) == (1, 1.0)
    assert pace.seconds_a_step == pytest.approx(1.9)


def test_memory_is_counted_in_bytes() -> None:
    assert 50e6 < peak_memory(torch.device("cpu")) < 1e12
