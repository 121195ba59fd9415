"""Speeds from synthetic measurements: what is recognised, after how many steps, and what changes nothing."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from distattn import ContextParallel
from distattn.kernels.timed import Busy, Stopwatch
from distattn.metrics import read
from distattn.parallelize import make_world
from distattn.speeds import PATIENCE, UNIT, WINDOW, Speeds, gather, given
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens
from tests.workers import Pool

WORK = 10**12


def step(
    speeds: Speeds, rates: list[float], random: np.random.Generator, noise: float = 0.05, shares: list[float] | None = None
) -> bool:
    """One step in which rank r does between half and all of ``WORK`` at ``rates[r]``, all ranks alike slower by up to half for
    short documents, each on a core of which it gets ``shares[r]``, or whatever others leave there in this step."""
    work = random.integers(WORK // 2, WORK, len(rates)).tolist()
    documents = random.uniform(0.5, 1)
    ran = [round(w / (1000 * documents * rate) * random.normal(1, noise)) for w, rate in zip(work, rates, strict=True)]
    got = shares or random.uniform(0.4, 1, len(rates)).tolist()
    return speeds.add([Busy(n, w, round(n / share)) for n, w, share in zip(ran, work, got, strict=True)])


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
    assert changes.index(True) in ((2, 3) if slow == 0.5 else (2, 3, 4)), (
        "the median of five follows the third slow step, but for noise"
    )
    assert sum(changes) <= 2, "it does not go on moving"
    assert speeds.current[:-1] == (UNIT,) * (world - 1)
    assert speeds.current[-1] / UNIT == pytest.approx(slow, rel=0.12)
    rates[-1] = 1.0
    assert sum(step(speeds, rates, random) for _ in range(40)) >= 1
    assert speeds.current == (UNIT,) * world


def test_one_slow_step_is_no_slow_rank() -> None:
    speeds, random = Speeds(4), np.random.default_rng(0)
    for i in range(50):
        assert not step(speeds, [1.0, 0.1 if i % WINDOW == 0 else 1.0, 1.0, 1.0], random)


@pytest.mark.parametrize("world", [2, 8])
def test_a_rank_that_is_a_little_slower_is_known_after_many_steps(world: int) -> None:
    speeds, random = Speeds(world), np.random.default_rng(world)
    rates = [1.0] * (world - 1) + [0.88]
    changes = [step(speeds, rates, random) for _ in range(2 * PATIENCE)]
    assert not any(changes[: PATIENCE - 1]) and 1 <= sum(changes) <= 2
    assert speeds.current[-1] / UNIT == pytest.approx(0.88, abs=0.06) and speeds.current[:-1] == (UNIT,) * (world - 1)


def test_a_rank_that_always_gets_less_of_its_core_is_known_after_many_steps_and_forgiven() -> None:
    speeds, random = Speeds(4), np.random.default_rng(0)
    for _ in range(PATIENCE):
        step(speeds, [1.0] * 4, random, shares=[1.0] * 4)
    for less, first in (([1.0, 1.0, 1.0, 0.5], UNIT // 2), ([1.0] * 4, UNIT)):
        changes = [step(speeds, [1.0] * 4, random, shares=less) for _ in range(2 * PATIENCE)]
        assert changes.index(True) == 4 * PATIENCE // 5 and sum(changes) == 1
        assert speeds.current == (UNIT, UNIT, UNIT, pytest.approx(first, rel=0.1))


def test_more_slow_ranks_than_fast_ones_are_the_usual_speed() -> None:
    speeds, random = Speeds(4), np.random.default_rng(0)
    for _ in range(20):
        step(speeds, [1.0, 0.5, 0.5, 0.5], random)
    assert speeds.current[1:] == (UNIT,) * 3 and speeds.current[0] == pytest.approx(2 * UNIT, rel=0.2)


@pytest.mark.parametrize("idle", [lambda i: True, lambda i: i >= WINDOW, lambda i: i % 2 == 0], ids=["always", "later", "often"])
def test_a_rank_without_work_keeps_its_speed(idle: Callable[[int], bool]) -> None:
    speeds = Speeds(3)
    for i in range(4 * WINDOW):
        last = Busy(0, 0, 0) if idle(i) else Busy(1000, WORK, 1000)
        assert not speeds.add([Busy(1000, WORK, 1000), Busy(1000, WORK, 1000), last])
    assert speeds.current == (UNIT,) * 3


def test_a_step_in_which_most_ranks_had_no_work_tells_nothing() -> None:
    speeds = Speeds(2)
    for _ in range(4 * WINDOW):
        assert not speeds.add([Busy(1000, WORK, 1000), Busy(0, 0, 0)]) and not speeds.add([Busy(1000, WORK, 1000)] * 2)
        assert not speeds.add([Busy(0, 0, 0), Busy(4000, WORK, 4000)])


def test_all_ranks_come_to_the_same_whole_numbers() -> None:
    two, random = (Speeds(5), Speeds(5)), np.random.default_rng(3)
    for _ in range(60):
        measured = [Busy(int(n), WORK, 2 * int(n)) for n in random.integers(1, 10**9, 5)]
        changed = [speeds.add(measured) for speeds in two]
        assert changed[0] == changed[1] and two[0].current == two[1].current
        assert all(type(speed) is int and speed > 0 for speed in two[0].current)


def test_given_speeds_are_whole_numbers_of_the_fastest() -> None:
    assert given([1, 1, 0.5, 1]) == (64, 64, 32, 64)
    assert given([10.0, 0.2, 5.0]) == (64, 1, 32)


STEPS: dict[str, object] = {"train__steps": 12, "data__sequence_length": 512}
TURNS = 3  # steps after which the last rank takes twice as long, by a clock that follows its work: the machine may be busy


def run_with_a_rank_that_turns_slow(rank: int, world: int, folder: str, changes: dict[str, object]) -> tuple[list[Any], ...]:
    """(losses, speeds, work of every rank, each by step; what was printed)"""
    config = small_config(Path(folder), world, **STEPS, **changes, parallel__speeds="measure")
    said, work = io.StringIO(), []

    def recorded(cp: ContextParallel) -> list[Busy]:
        ranks = gather(cp)
        work.append([busy.work for busy in ranks])
        return ranks

    def clocked(stopwatch: Stopwatch) -> Busy:
        done = take(stopwatch).work
        took = done // (500 if rank == world - 1 and len(work) >= TURNS else 1000)
        return Busy(took, done, took)

    take = Stopwatch.take
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(mock.patch("distattn.trainer.gather", recorded))
        stack.enter_context(mock.patch.object(Stopwatch, "take", clocked))
        rows = read(Trainer(config, make_world(config, torch.device("cpu"))).train().metrics)
    losses, speeds = ([row[name] for row in rows if "loss" in row] for name in ("loss", "speeds"))
    return losses, speeds, work, said.getvalue().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speeds")
    small_tokens(folder / "tokens", longest=300)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The losses on one device."""
    config = small_config(folder, **STEPS, out=str(folder / "alone"))
    rows = read(Trainer(config, make_world(config, torch.device("cpu"))).train().metrics)
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_finds_its_slow_rank_and_says_so(folder: Path, alone: list[float], gloo: Pool) -> None:
    """Zigzag gives every rank the same work whatever its speed: it is measured and told, and nothing else changes."""
    changes = {"out": str(folder / "zigzag")}
    (losses, speeds, work, said), other = gloo(2).run(run_with_a_rank_that_turns_slow, str(folder), changes)
    assert (losses, speeds, work) == other[:3]
    assert speeds == [[1.0, 1.0]] * (TURNS + 2) + [[1.0, 0.5]] * (len(speeds) - TURNS - 2)
    assert any("attention of rank 1 at 0.50 of the usual speed" in line for line in said) and not other[3], (
        "rank 0 speaks for both"
    )
    assert losses == pytest.approx(alone, rel=1e-5)


def test_a_rank_that_turns_slow_is_relieved_within_a_few_steps(folder: Path, alone: list[float], gloo: Pool) -> None:
    """Known after its third slow step; the next one is planned by then, ahead of time, and the one after has the new speeds."""
    changes = {"out": str(folder / "cad"), "parallel__schedule": "disaggregate", "parallel__smallest": 16, "data__workers": 1}
    (losses, speeds, work, _), other = gloo(2).run(run_with_a_rank_that_turns_slow, str(folder), changes)
    assert (losses, speeds, work) == other[:3]
    shares = [last / (first + last) for first, last in work]
    assert shares[: TURNS + 4] == pytest.approx([1 / 2] * (TURNS + 4), abs=0.03)
    assert shares[TURNS + 4 :] == pytest.approx([1 / 3] * (len(shares) - TURNS - 4), abs=0.03)
    assert losses == pytest.approx(alone, rel=1e-5)
