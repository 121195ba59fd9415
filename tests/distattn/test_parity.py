"""The same run on any number of ranks: the losses of 50 steps on packed documents equal those of one device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from distattn.data import make_packers
from distattn.metrics import read
from distattn.parallel.mask import documents
from distattn.parallel.plan import WHAT, What
from distattn.parallel.schedule import make_schedule
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallelize import make_world
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens
from tests.workers import Pool

STEPS = 50
# Sums in another order: float32 rounds each to 6e-8, and training lets the difference grow.
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}

Changes = dict[str, object]


def losses(folder: Path, world_size: int, changes: Changes) -> tuple[list[float], float]:
    """(training loss of every step, held-out loss after the last)"""
    config = small_config(
        folder,
        world_size,
        **{
            "train__steps": STEPS,
            "train__warmup_steps": 10,
            "train__learning_rate": 3e-3,
            "train__eval_sequences": 3,
            "data__sequence_length": 128,
            **changes,
        },
    )
    result = Trainer(config, make_world(config, torch.device("cpu"))).train()
    assert result.loss is not None
    return [row["loss"] for row in read(result.metrics) if "loss" in row], result.loss


def losses_of_rank(rank: int, world: int, folder: str, runs: dict[str, Changes]) -> dict[str, tuple[list[float], float]]:
    return {name: losses(Path(folder), world, {**changes, "out": f"{folder}/{world}-{name}"}) for name, changes in runs.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    small_tokens(folder / "tokens", documents=60, longest=200)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[list[float], float]]:
    return {dtype: losses(folder, 1, {"model__dtype": dtype, "out": f"{folder}/1-{dtype}"}) for dtype in TOLERANCE}


def assert_equal(found: tuple[list[float], float], alone: tuple[list[float], float], tolerance: float) -> None:
    assert len(found[0]) == STEPS and found[0][-1] < found[0][0] - 1, "nothing was learnt: equal losses would show nothing"
    assert found[0] == pytest.approx(alone[0], rel=tolerance)
    assert found[1] == pytest.approx(alone[1], rel=tolerance)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ring_zigzag_and_striped_are_one_device(folder: Path, alone, gloo: Pool, world: int, dtype: str) -> None:
    runs: dict[str, Changes] = {
        f"{schedule}-{dtype}": {"parallel__schedule": schedule, "model__dtype": dtype}
        for schedule in ("ring", "zigzag", "striped")
    }
    for rank in gloo(world).run(losses_of_rank, str(folder), runs, timeout=400):
        for found in rank.values():
            assert_equal(found, alone[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize(("ulysses", "schedule"), [(2, "zigzag"), pytest.param(4, "striped", marks=pytest.mark.slow)])
def test_heads_traded_for_tokens_are_one_device(folder: Path, alone, gloo: Pool, ulysses: int, schedule: str) -> None:
    """On four ranks, in pairs or all with a head each; positions and labels are those of the finer layout."""
    changes: Changes = {"model__dtype": "float64", "parallel__ulysses": ulysses, "parallel__schedule": schedule}
    runs: dict[str, Changes] = {f"ulysses-{ulysses}": {**changes, "parallel__checkpointing": "selective"}}
    for rank in gloo(4).run(losses_of_rank, str(folder), runs, timeout=400):
        for found in rank.values():
            assert_equal(found, alone["float64"], TOLERANCE["float64"])


def run_name(changes: Changes) -> str:
    """A folder of its own for each run, or it would go on from another's checkpoint."""
    return changes["parallel__schedule"] + "-relays" * ("parallel__hops" in changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__schedule": "double_ring", "parallel__node_devices": 2},
        {"parallel__schedule": "disaggregate", "parallel__smallest": 8, "parallel__speeds": [1, 1, 0.5, 1]},
        {"parallel__schedule": "disaggregate", "parallel__smallest": 8, "parallel__hops": 2},
        pytest.param({"parallel__schedule": "gather", "parallel__stages": 2}, marks=pytest.mark.slow),
        pytest.param({"parallel__schedule": "tree", "parallel__node_devices": 2}, marks=pytest.mark.slow),
        pytest.param({"parallel__schedule": "zigzag", "parallel__rotate": "q"}, marks=pytest.mark.slow),
        pytest.param({"parallel__schedule": "auto", "parallel__cluster": "l40s"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: run_name(changes),
)
def test_every_schedule_is_one_device(folder: Path, alone, gloo: Pool, changes: Changes) -> None:
    runs = {run_name(changes): {**changes, "model__dtype": "float64"}}
    for rank in gloo(4).run(losses_of_rank, str(folder), runs, timeout=400):
        for found in rank.values():
            assert_equal(found, alone["float64"], TOLERANCE["float64"])


def test_what_disaggregate_trains_on_here_moves_queries(folder: Path) -> None:
    """Else its run above would be one in which everybody stays at home."""
    config = small_config(folder, 4, data__sequence_length=128)
    packer, _ = make_packers(config)
    strategy = Strategy("disaggregate", balance=Balance(smallest=8, speeds=(2, 2, 1, 2)))
    plans = [make_schedule(strategy, documents(packer.sequence(i).lengths.tolist()), 4).forward for i in range(20)]
    assert sum(What.Q in plan.transfers[:, WHAT] for plan in plans) > 10


def test_data_and_context_axes_together_are_one_device(folder: Path, gloo: Pool) -> None:
    """Two groups of two ranks, each with sequences of its own; and what is recomputed is not another result."""
    common: Changes = {"model__dtype": "float64", "train__sequences_per_step": 2}
    alone = losses(folder, 1, {**common, "out": f"{folder}/1-accumulated"})
    common["parallel__dp"] = 2
    runs: dict[str, Changes] = {
        "plain": common,
        "selective": {**common, "parallel__checkpointing": "selective"},
        "full": {**common, "parallel__checkpointing": "full"},
    }
    for rank in gloo(4).run(losses_of_rank, str(folder), runs, timeout=400):
        for found in rank.values():
            assert_equal(found, alone, TOLERANCE["float64"])


def test_a_tied_head_and_sharding_and_resume_on_another_number_of_ranks(folder: Path, gloo: Pool) -> None:
    """Half of a run on two ranks, the rest on one: as if it had been one device all along."""
    common: Changes = {"model__tie_head": True, "model__dtype": "float64", "train__steps": 10, "checkpoint__every": 5}
    expected = losses(folder, 1, {**common, "out": f"{folder}/1-whole"})
    (_, _) = gloo(2).run(losses_of_rank, str(folder), {"tied": common})
    shutil.rmtree(folder / "2-tied" / "checkpoints" / "step_000010")
    found = losses(folder, 1, {**common, "out": f"{folder}/2-tied"})
    assert found[0] == pytest.approx(expected[0], rel=1e-9) and len(found[0]) == 10
    assert found[1] == pytest.approx(expected[1], rel=1e-9)


def test_resume_on_the_same_two_ranks_is_the_same_run_bit_by_bit(folder: Path, gloo: Pool) -> None:
    runs: dict[str, Changes] = {"again": {"train__steps": 10, "checkpoint__every": 5}}
    whole = gloo(2).run(losses_of_rank, str(folder), runs)
    shutil.rmtree(folder / "2-again" / "checkpoints" / "step_000010")
    assert gloo(2).run(losses_of_rank, str(folder), runs) == whole and len(whole[0]["again"][0]) == 10


def test_parameters_gathered_in_bfloat16_learn_the_same(folder: Path, alone, gloo: Pool) -> None:
    runs: dict[str, Changes] = {"bfloat16": {"parallel__gather_dtype": "bfloat16"}}
    for rank in gloo(2).run(losses_of_rank, str(folder), runs, timeout=300):
        assert rank["bfloat16"][1] == pytest.approx(alone["float32"][1], rel=0.02)
