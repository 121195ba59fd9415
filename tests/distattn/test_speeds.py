"""Speeds from synthetic measurements: what is recognised, after how many steps, and what changes nothing."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from distattn.kernels.aten import Aten
from distattn.kernels.timed import Busy
from distattn.metrics import read
from distattn.parallelize import make_world
from distattn.speeds import UNIT, WINDOW, Speeds, given
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens
from tests.workers import Pool

WORK = 10**12


def step(speeds: Speeds, rates: list[float], random: np.random.Generator, noise: float = 0.05) -> bool:
    """One step in which rank r does between half and all of ``WORK`` at ``rates[r]``."""
    work = random.integers(WORK // 2, WORK, len(rates)).tolist()
    nanoseconds = [round(w / (1000 * rate) * random.normal(1, noise)) for w, rate in zip(work, rates, strict=True)]
    return speeds.add([Busy(n, w) for n, w in zip(nanoseconds, work, strict=True)])


@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_noise_of_five_percent_changes_nothing(world: int) -> None:
    speeds, random = Speeds(world), np.random.default_rng(world)
    assert not any(step(speeds, [1.0] * world, random) for _ in range(500))
    assert speeds.current == (UNIT,) * world


@pytest.mark.parametrize("world", [2, 3, 8, 64])
@pytest.mark.parametrize("slow", [0.5, 0.75])
def test_a_rank_that_turns_slow_is_known_after_three_steps_and_forgiven(world: int, slow: float) -> None:
    speeds, random = Speeds(world), np.random.default_rng(world)
    for _ in range(WINDOW):
        step(speeds, [1.0] * world, random)
    rates = [1.0] * world
    rates[-1] = slow
    changes = [step(speeds, rates, random) for _ in range(40)]
    assert changes.index(True) in (2, 3), "the median of five follows the third slow step, but for noise"
    assert sum(changes) <= 2, "it does not go on moving"
    assert speeds.current[:-1] == (UNIT,) * (world - 1)
    assert speeds.current[-1] / UNIT == pytest.approx(slow, rel=0.2)
    rates[-1] = 1.0
    assert sum(step(speeds, rates, random) for _ in range(40)) >= 1
    assert speeds.current == (UNIT,) * world


def test_one_slow_step_is_no_slow_rank() -> None:
    speeds, random = Speeds(4), np.random.default_rng(0)
    for i in range(50):
        assert not step(speeds, [1.0, 0.1 if i % WINDOW == 0 else 1.0, 1.0, 1.0], random)


def test_more_slow_ranks_than_fast_ones_are_the_usual_speed() -> None:
    speeds, random = Speeds(4), np.random.default_rng(0)
    for _ in range(20):
        step(speeds, [1.0, 0.5, 0.5, 0.5], random)
    assert speeds.current[1:] == (UNIT,) * 3 and speeds.current[0] == pytest.approx(2 * UNIT, rel=0.2)


@pytest.mark.parametrize("idle", [lambda i: True, lambda i: i >= WINDOW, lambda i: i % 2 == 0], ids=["always", "later", "often"])
def test_a_rank_without_work_keeps_its_speed(idle: Callable[[int], bool]) -> None:
    speeds = Speeds(3)
    for i in range(4 * WINDOW):
        last = Busy(0, 0) if idle(i) else Busy(1000, WORK)
        assert not speeds.add([Busy(1000, WORK), Busy(1000, WORK), last])
    assert speeds.current == (UNIT,) * 3


def test_all_ranks_come_to_the_same_whole_numbers() -> None:
    two, random = (Speeds(5), Speeds(5)), np.random.default_rng(3)
    for _ in range(60):
        measured = [Busy(int(n), WORK) for n in random.integers(1, 10**9, 5)]
        changed = [speeds.add(measured) for speeds in two]
        assert changed[0] == changed[1] and two[0].current == two[1].current
        assert all(type(speed) is int and speed > 0 for speed in two[0].current)


def test_given_speeds_are_whole_numbers_of_the_fastest() -> None:
    assert given([1, 1, 0.5, 1]) == (64, 64, 32, 64)
    assert given([10.0, 0.2, 5.0]) == (64, 1, 32)


def run_on_a_slow_rank(rank: int, world: int, folder: str) -> tuple[list[float], list[list[float]], str]:
    """(losses, speeds after each step, what was printed) of a run in which the last rank's kernels take four times as long."""
    config = small_config(Path(folder), world, parallel__speeds="measure", train__steps=2 * WINDOW, data__sequence_length=256)
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        for name in ("forward", "backward") if rank == world - 1 else ():
            stack.enter_context(mock.patch.object(Aten, name, slowed(getattr(Aten, name))))
        rows = read(Trainer(config, make_world(config, torch.device("cpu"))).train().metrics)
    return [row["loss"] for row in rows if "loss" in row], [row["speeds"] for row in rows if "loss" in row], said.getvalue()


def slowed(launch: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = launch(*arguments)
        time.sleep(3 * (time.perf_counter() - started))
        return result

    return slow


def test_a_run_finds_its_slow_rank_and_says_so(tmp_path: Path, gloo: Pool) -> None:
    """Zigzag gives every rank the same work whatever its speed: it is measured and told, and nothing else changes."""
    small_tokens(tmp_path / "tokens")
    (losses, speeds, said), other = gloo(2).run(run_on_a_slow_rank, str(tmp_path))
    assert (losses, speeds) == other[:2] and len(losses) == 2 * WINDOW
    assert all(after == [1.0, 1.0] for after in speeds[: WINDOW - 1]), "too early to tell"
    assert speeds[-1][0] == 1.0 and speeds[-1][1] < 0.6
    assert "attention of rank 1 at 0." in said and "usual speed" not in other[2]
    config = small_config(tmp_path, train__steps=2 * WINDOW, data__sequence_length=256, out=str(tmp_path / "alone"))
    rows = read(Trainer(config, make_world(config, torch.device("cpu"))).train().metrics)
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-5)
