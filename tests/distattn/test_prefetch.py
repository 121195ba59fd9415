"""The process that makes sequences ready: what it makes, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distattn.config import Config
from distattn.kernels.contract import Scores
from distattn.metrics import read
from distattn.parallel.rank_plan import Call, Recipe
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy
from distattn.parallelize import make_world
from distattn.prefetch import Job, Prefetch, Source, Spent
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens
from tests.workers import Pool

CALL = Call(Shape(4, 2, 4, 4, torch.float32), Scores(0.5))
JOBS = [Job(False, range(4), (1, 3)), Job(True, range(2), (1,)), Job(False, range(4, 8), (5, 7)), Job(False, range(9, 9), ())]


def source(folder: Path) -> Source:
    return Source(small_config(folder), Recipe(Strategy("gather"), 2, 1), (CALL,))


def started(folder: Path, timeout: float = 60.0) -> Prefetch:
    """One whose process is up."""
    prefetch = Prefetch(source(folder), 1, timeout)
    assert prefetch._worker is not None
    deadline = time.monotonic() + 60
    while not prefetch._worker.ready:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return prefetch


def process(prefetch: Prefetch) -> int:
    assert prefetch._worker is not None and prefetch._worker._process.pid is not None
    return prefetch._worker._process.pid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetch")
    small_tokens(folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def beside(folder: Path) -> Iterator[Prefetch]:
    prefetch = started(folder)
    yield prefetch
    prefetch.close()


def test_the_process_makes_what_the_rank_makes_for_itself(folder: Path, beside: Prefetch) -> None:
    in_line = Prefetch(source(folder), 0, 60.0)
    beside.spent = Spent()
    for job in JOBS:
        beside.ask(job)
    for job in JOBS:
        (labels, ready), (expected, made) = beside.open(job), in_line.open(job)
        assert labels == expected
        for one, other in zip(ready, made, strict=True):
            assert one.plan.digest == other.plan.digest and np.array_equal(one.table, other.table)
            for mine, theirs in zip(one.plan._programs[CALL.shape], other.plan._programs[CALL.shape], strict=True):
                assert mine.plan.digest == theirs.plan.digest and mine.workspace_bytes == theirs.workspace_bytes
                assert [[x.bands for x in stage] for stage in mine.launches] == [[x.bands for x in s] for s in theirs.launches]
    assert beside.spent.made > 0 and in_line.spent.hidden < 0.1


def test_a_job_that_nobody_asked_for_is_made_at_once(folder: Path, beside: Prefetch) -> None:
    beside.ask(JOBS[0])
    (_, (one,)), (_, (again,)) = beside.open(JOBS[1]), Prefetch(source(folder), 0, 60.0).open(JOBS[1])
    assert np.array_equal(one.table, again.table)
    assert len(list(beside.open(JOBS[0])[1])) == 2, "what was asked for is still there"


def test_what_is_made_while_the_rank_works_is_not_waited_for(beside: Prefetch) -> None:
    beside.spent = Spent()
    beside.ask(JOBS[0])
    time.sleep(1.0)
    list(beside.open(JOBS[0])[1])
    assert beside.spent.hidden > 0.5


def test_an_interrupt_is_the_rank_s_affair(beside: Prefetch) -> None:
    os.kill(process(beside), signal.SIGINT)
    beside.ask(JOBS[0])
    assert len(list(beside.open(JOBS[0])[1])) == 2


def test_a_process_that_hangs_is_an_error(beside: Prefetch) -> None:
    os.kill(process(beside), signal.SIGSTOP)
    beside.timeout = 0.2
    try:
        beside.ask(JOBS[2])
        with pytest.raises(RuntimeError, match=r"has not answered for 0\.2 s. data\.workers=0"):
            beside.open(JOBS[2])
    finally:
        beside.timeout = 60.0
        os.kill(process(beside), signal.SIGCONT)


def test_a_process_that_is_killed_is_named_with_its_signal(folder: Path) -> None:
    prefetch = started(folder)
    prefetch.ask(JOBS[0])
    list(prefetch.open(JOBS[0])[1])
    os.kill(process(prefetch), signal.SIGKILL)
    prefetch.ask(JOBS[1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is gone: signal 9 ended it. If memory was short, data.workers=0"):
            prefetch.ask(JOBS[1])
            prefetch.open(JOBS[1])
    prefetch.close()


def test_an_error_of_the_process_has_its_own_words(tmp_path: Path) -> None:
    tokens = small_tokens(tmp_path / "tokens")
    prefetch = started(tmp_path)
    (tokens.path / "meta.json").unlink()
    prefetch.ask(JOBS[0])
    with pytest.raises(ValueError, match=r"is not a token file: meta.json missing") as raised:
        prefetch.open(JOBS[0])
    assert "in the process that prepares sequences" in str(raised.value.__cause__) and "make_packers" in str(
        raised.value.__cause__
    )
    prefetch.close()
    prefetch.close()


DIES = """
import os, signal, sys
from pathlib import Path
from tests.distattn.test_prefetch import process, started
print(process(started(Path(sys.argv[1]))), flush=True)
os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] == "killed" else signal.SIGTERM)
"""


@pytest.mark.parametrize("end", ["killed", "terminated"])
def test_the_process_does_not_outlive_its_rank(folder: Path, end: str) -> None:
    code = "import sys; sys.path.append(sys.argv.pop())" + DIES
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, str(folder), end, root]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert ended.returncode < 0, ended.stderr
    deadline = time.monotonic() + 20
    while _alive(int(ended.stdout)):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def run(config: Config) -> tuple[list[float], list[float]]:
    """(training losses, held-out losses)"""
    one = Trainer(config, make_world(config, torch.device("cpu")))
    if one.prefetch._worker is not None:
        deadline = time.monotonic() + 60
        while not one.prefetch._worker.ready and time.monotonic() < deadline:
            time.sleep(0.02)
    rows = read(one.train().metrics)
    assert all(row["plan_seconds"] > 0 and 0 <= row["plan_hidden"] <= 1 for row in rows if "loss" in row)
    return [row["loss"] for row in rows if "loss" in row], [row["eval_loss"] for row in rows if "eval_loss" in row]


def losses_of_rank(rank: int, world: int, folder: str) -> dict[int, tuple[list[float], list[float]]]:
    """By workers; the run with one is interrupted after half of its steps."""
    changes: dict[str, object] = {"train__eval_every": 2, "train__sequences_per_step": 2, "checkpoint__every": 3}
    found = {}
    for workers in (0, 1):
        changes |= {"data__workers": workers, "out": f"{folder}/{world}-{workers}"}
        if workers:
            run(small_config(Path(folder), world, **changes, train__steps=3))
        found[workers] = run(small_config(Path(folder), world, **changes))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_runs_are_the_same_bit_by_bit_also_where_they_resume(folder: Path, gloo: Pool, world: int) -> None:
    ranks = gloo(world).run(losses_of_rank, str(folder)) if world > 1 else [losses_of_rank(0, 1, str(folder))]
    for found in ranks:
        assert found[0][0] == found[1][0] and len(found[0][0]) == 6
        assert found[0][1][-2:] == found[1][1][-2:] and len(found[0][1]) >= 3
