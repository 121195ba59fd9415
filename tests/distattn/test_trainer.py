from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from distattn.checkpoint import read_progress
from distattn.config import Config, TrainConfig
from distattn.metrics import read
from distattn.parallel.executor import Executor
from distattn.parallelize import make_world
from distattn.prefetch import Job
from distattn.trainer import Result, Trainer, learning_rate
from tests.distattn.small_run import small_config, small_tokens


def trainer(config: Config) -> Trainer:
    return Trainer(config, make_world(config, torch.device("cpu")))


def run(config: Config) -> tuple[Result, dict[str, torch.Tensor], dict[int, float]]:
    """(result, parameters, step -> training loss)"""
    one = trainer(config)
    result = one.train()
    parameters = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}
    return result, parameters, {row["step"]: row["loss"] for row in read(result.metrics) if "loss" in row}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokens(tmp_path / "tokens")
    return tmp_path


def test_a_run_learns_and_leaves_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _, losses = run(small_config(folder, train__steps=40, train__eval_every=20))
    assert losses[1] == pytest.approx(math.log(256), abs=0.1)
    assert losses[40] < losses[1] - 1.5
    assert result.loss is not None and result.loss < losses[1] - 1.5
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    assert read_progress(result.checkpoint)["step"] == 40
    assert [row["step"] for row in read(result.metrics) if "eval_loss" in row] == [20, 40]
    said = capsys.readouterr().out
    for part in (str(result.plot), str(result.checkpoint), "ETA", "tokens/s", "held-out loss"):
        assert part in said


def test_resume_is_the_same_run_bit_by_bit(folder: Path) -> None:
    config = small_config(folder, checkpoint__every=3, checkpoint__keep=5)
    _, expected, losses = run(config)
    shutil.rmtree(folder / "run" / "checkpoints" / "step_000006")
    _, found, again = run(config)
    assert again == losses
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_truncated_checkpoint_is_passed_over_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(folder, checkpoint__every=3)
    _, expected, _ = run(config)
    broken = next((folder / "run" / "checkpoints" / "step_000006").glob("*.distcp"))
    os.truncate(broken, broken.stat().st_size // 2)
    capsys.readouterr()
    _, found, _ = run(config)
    said = capsys.readouterr().out
    assert "step_000006 is damaged and was passed over" in said and "resumed at step 3" in said
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_a_whole_checkpoint_nothing_is_overwritten(folder: Path) -> None:
    config = small_config(folder, train__steps=2)
    run(config)
    (folder / "run" / "checkpoints" / "step_000002" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="No checkpoint in .* is whole"):
        trainer(config)


def test_a_finished_run_is_not_run_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(folder, train__steps=2)
    result, expected, losses = run(config)
    again, found, same = run(config)
    assert (again.checkpoint, same) == (result.checkpoint, losses)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "already holds a run of 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__hidden_dim": 64}, "made with model: hidden_dim=32, this run has 64"),
        ({"data__sequence_length": 32}, "made with data: length=64, this run has 32"),
        ({"data__seed": 3}, "made with data"),
        ({"checkpoint__resume": False}, "holds checkpoints of another run"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    run(small_config(folder, train__steps=2))
    with pytest.raises(ValueError, match=message):
        trainer(small_config(folder, **changes))


def test_a_vocabulary_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="Use model.vocab_size=256 or more"):
        trainer(small_config(folder, model__vocab_size=100))


def test_sequences_of_one_step_are_one_mean(folder: Path) -> None:
    """The gradient of a step is that of the mean over all labels of its sequences, not of means of means."""
    one = trainer(small_config(folder, train__sequences_per_step=3, train__clip_norm=0.0))
    labels = [one.packer.sequence(number).labels for number in range(3)]
    assert len(set(labels)) > 1, "sequences with as many labels each would show nothing"
    counted, sequences = one.prefetch.open(Job(False, range(3), (0, 1, 2)))
    assert counted == sum(labels)
    mean = sum(one.loss_sum(sequence) for sequence in sequences) / sum(labels)
    gradients = torch.autograd.grad(mean, list(one.model.parameters()))
    expected = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    loss, norm = one.take_step()
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    assert one.next_sequence == 3


def test_clipping_shortens_the_gradient(folder: Path) -> None:
    from distattn.trainer import clip

    one = trainer(small_config(folder))
    _, (sequence,) = one.prefetch.open(Job(False, range(1), (0,)))
    one.loss_sum(sequence).backward()
    before = clip(one.model, 0.0)
    assert clip(one.model, 1.0).item() == pytest.approx(before.item())
    assert clip(one.model, 0.0).item() == pytest.approx(1.0, rel=1e-4)


def test_the_learning_rate_rises_and_falls() -> None:
    train = TrainConfig(steps=100, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [learning_rate(step, train) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.1)
    assert 0.2 < rates[99] < 0.202
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_zeroed_attention_is_a_run_of_its_own(folder: Path) -> None:
    result, _, losses = run(small_config(folder, train__steps=2))
    config = small_config(
        folder, train__steps=2, model__zero_attention=True, out=str(folder / "zero"), compare=str(result.metrics)
    )
    _, _, zeroed = run(config)
    assert zeroed[2] != losses[2]


def test_a_loss_that_is_not_a_number_ends_the_run(folder: Path) -> None:
    with pytest.raises(FloatingPointError, match="Lower train.learning_rate"):
        run(small_config(folder, train__learning_rate=1e30, train__clip_norm=0.0))


def test_a_run_that_is_lost_leaves_the_checkpoints_from_before(folder: Path) -> None:
    """Also where it would not have said its loss for many steps yet."""
    result, expected, _ = run(small_config(folder, train__steps=2))
    saving = {"checkpoint__every": 2, "train__log_every": 50, "train__steps": 20}
    with pytest.raises(FloatingPointError, match="The loss of step 4 is .* and its gradient nan long"):
        run(small_config(folder, train__learning_rate=1e30, train__clip_norm=0.0, **saving))
    assert [path.name for path in result.checkpoint.parent.iterdir()] == [result.checkpoint.name]
    assert all(torch.equal(expected[name], found) for name, found in trainer(small_config(folder)).model.named_parameters())


@pytest.fixture
def attention_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that attention was computed forward."""
    runs: list[int] = []
    forward = Executor.forward_steps
    monkeypatch.setattr(Executor, "forward_steps", lambda self, *arguments: runs.append(1) or forward(self, *arguments))
    return runs


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 1), ("full", 2), ("selective", 1)])
def test_recomputing_changes_nothing(folder: Path, checkpointing: str, times: int, attention_runs: list[int]) -> None:
    changes = {"train__steps": 3, "train__eval_sequences": 0}
    _, expected, _ = run(small_config(folder, **changes))
    attention_runs.clear()
    config = small_config(folder, **changes, parallel__checkpointing=checkpointing, out=str(folder / "again"))
    _, found, _ = run(config)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(attention_runs) == times * 3 * config.model.layers


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_are_the_same_model(folder: Path, checkpointing: str, attention_runs: list[int]) -> None:
    changes = {"train__steps": 5, "train__eval_sequences": 0, "model__dtype": "float64", "parallel__checkpointing": checkpointing}
    _, _, expected = run(small_config(folder, **changes))
    attention_runs.clear()
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    _, _, found = run(small_config(folder, **changes, parallel__compile=True, out=str(folder / "compiled")))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-9)
    assert len(attention_runs) == 5 * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - compilations <= 2, "once, and once for any documents"
