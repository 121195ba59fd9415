from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from distattn.config import describe
from distattn.launch.train import Place, choose_device, main
from distattn.metrics import read
from tests.distattn.small_run import small_tokens

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs" / "debug.yaml"


def words(folder: Path, *changes: str) -> list[str]:
    shape = ["data.sequence_length=64", "model.dim=16", "train.device=cpu", "train.eval_sequences=1"]
    return ["--config", str(DEBUG), f"out={folder / 'run'}", f"data.path={folder / 'tokens'}", *shape, *changes]


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and doc in said for name, _, doc in describe())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No configuration file"),
        (["--config"], "No configuration file"),
        (["--conf", "x"], "Unknown option --conf"),
        (["--config", "nowhere.yaml"], "No configuration file nowhere.yaml"),
        (["--config", str(DEBUG), "train.stesp=1"], "Did you mean 'train.steps'"),
        (["--config", str(DEBUG), "parallel.cp=2"], "the run has 1 ranks"),
    ],
)
def test_mistakes_are_printed_and_end_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distattn.launch.train.run", lambda *_: pytest.fail("a run was started"))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_is_refused_before_torch_is_loaded() -> None:
    code = "import sys, distattn.launch.train as t; t.main(['--config', sys.argv[1], 'a=1']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(DEBUG)], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Unknown key 'a'" in done.stderr, done.stderr


def test_the_data_is_prepared_on_the_first_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for name in ("one.txt", "two.txt"):
        (tmp_path / "text" / name).write_text(name * 100)
    arguments = words(tmp_path, f"data.source={tmp_path / 'text'}", "train.steps=1", "train.warmup_steps=0")
    assert main(arguments) == 0
    assert "1,400 tokens in 2 documents" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "documents" not in capsys.readouterr().out


def test_a_corrupt_token_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokens(tmp_path / "tokens")
    path = tmp_path / "tokens" / "tokens.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert main(words(tmp_path)) == 2
    assert "tokens.bin is damaged: its checksum differs" in capsys.readouterr().err


def test_a_process_takes_its_own_gpu_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(rank=3, size=4, local_rank=1, local_size=2, started_by_torchrun=True)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", place) == torch.device("cuda", 1) and chosen == [1]
    assert choose_device("cpu", place) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="Use --nproc-per-node 1, or train.device=cpu"):
        choose_device("auto", place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", place) == torch.device("cpu")
    with pytest.raises(ValueError, match="finds no GPU"):
        choose_device("cuda", place)


@contextmanager
def torchrun(processes: int, arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun in a session of its own, which is gone afterwards with all that it started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, str(ROOT / "launch" / "train.py"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks, which have sessions of their own
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=40)
            process.kill()
            process.wait()


def children(parent: int) -> list[int]:
    """Processes started by ``parent``, oldest first."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return sorted(int(pid) for pid, ppid in (line.split() for line in listed.splitlines()) if int(ppid) == parent)


def wait_for(condition, process: subprocess.Popen[bytes], log: Path, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_a_rank_killed_in_a_step_ends_the_run_and_the_next_start_goes_on(tmp_path: Path) -> None:
    """SIGKILL to one of two ranks after the first checkpoint. The run that goes on ends as one that was never killed."""
    small_tokens(tmp_path / "tokens")
    steps = ["checkpoint.every=3", "train.steps=12", "parallel.timeout=60"]
    arguments, log = words(tmp_path, *steps), tmp_path / "log"
    metrics, first = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints" / "step_000003"
    with torchrun(2, arguments, log) as process:
        wait_for(lambda: first.exists() and metrics.exists() and read(metrics)[-1]["step"] >= 4, process, log)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    with torchrun(2, arguments, log) as process:
        assert process.wait(timeout=240) == 0, log.read_text()
    assert "resumed at step" in log.read_text()
    losses = [row["loss"] for row in read(metrics) if "loss" in row]
    assert main(words(tmp_path, *steps, f"out={tmp_path / 'alone'}")) == 0
    alone = [row["loss"] for row in read(tmp_path / "alone" / "metrics.jsonl") if "loss" in row]
    assert losses == pytest.approx(alone, rel=1e-5) and len(losses) == 12


def test_torchrun_says_what_is_wrong_with_a_configuration(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with torchrun(2, ["--config", str(DEBUG), "parallel.dp=2", "train.sequences_per_step=3"], log) as process:
        assert process.wait(timeout=120) != 0
    assert log.read_text().count("error: train.sequences_per_step=3 is not divisible") == 1, log.read_text()
