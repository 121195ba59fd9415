from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import distattn.checkpoint as checkpoint_module
from distattn.checkpoint import Checkpoints, read_progress
from tests.workers import Pool


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(folder: Path, *steps: int, keep: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(*trained(step), {"step": step})
    return checkpoints


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    path = Checkpoints(tmp_path).save(model, optimizer, {"step": 3, "note": "x"})
    expected = torch.randn(5)
    other, other_optimizer = trained(1, seed=9)
    torch.manual_seed(77)
    Checkpoints(tmp_path).load(path, other, other_optimizer)
    assert same(model, other) and read_progress(path) == {"step": 3, "note": "x"}
    assert torch.equal(torch.randn(5), expected), "the random numbers go on where they were"
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][name]), name


def test_an_optimizer_that_has_taken_no_step_can_be_loaded_into(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    path = Checkpoints(tmp_path).save(model, optimizer, {"step": 2})
    other, other_optimizer = trained(0, seed=9)
    Checkpoints(tmp_path).load(path, other, other_optimizer)
    assert same(model, other)
    states = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(torch.equal(x, other_optimizer.state[p]["exp_avg"]) for x, p in zip(states, other.parameters(), strict=True))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_a_damaged_one_of_a_later_step_displaces_no_whole_one(tmp_path: Path) -> None:
    saved(tmp_path, 20, 30, keep=2)
    truncate(tmp_path / "step_000030")
    checkpoints = saved(tmp_path, 25, keep=1)
    assert checkpoints.newest()[0] == tmp_path / "step_000025"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000025", "step_000030"]
    assert saved(tmp_path, 35, keep=1).newest() == (tmp_path / "step_000035", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step_000035"]


def test_copies_under_other_names_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001_best")
    (tmp_path / "step_notes.txt").write_text("the best so far")
    assert saved(tmp_path, 2, keep=1).newest() == (tmp_path / "step_000002", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001_best", "step_000002", "step_notes.txt"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)
    os.rename(tmp_path / "step_000002", tmp_path / "step_10000000")
    saved(tmp_path, 3)
    assert checkpoints.newest()[0] == tmp_path / "step_10000000"


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest() == (None, [])


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size - 1)


def flip(folder: Path) -> None:
    raw = bytearray(largest(folder).read_bytes())
    raw[len(raw) // 2] ^= 1
    largest(folder).write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"has \d+ bytes, \d+ were written"),
        (flip, "the checksum of .* differs"),
        (lambda folder: largest(folder).unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or not readable"),
        (lambda folder: os.truncate(folder / "manifest.json", 40), "manifest.json is missing or not readable"),
        (lambda folder: os.truncate(folder / "progress.json", 1), "progress.json has 1 bytes"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step_000002")
    path, passed = checkpoints.newest()
    assert path == tmp_path / "step_000001"
    assert len(passed) == 1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(passed[0])


def test_a_damaged_checkpoint_gives_way_when_its_step_comes_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    truncate(tmp_path / "step_000002")
    saved(tmp_path, 2)
    assert checkpoints.newest() == (tmp_path / "step_000002", [])


def die_while_saving(folder: Path, moment: str) -> int:
    """Saves step 2 in a copy of this process that is killed when ``moment`` is reached. Returns how it ended."""
    model, optimizer = trained(2)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        owner, _, name = moment.rpartition(".")
        target = getattr(checkpoint_module, owner) if owner else checkpoint_module
        setattr(target, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        Checkpoints(folder, keep=1).save(model, optimizer, {"step": 2})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", ["dcp.save", "torch.save", "_fingerprint", "_sync_all", "os.replace"])
def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path, moment: str) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    assert die_while_saving(tmp_path, moment) == -signal.SIGKILL
    assert checkpoints.newest() == (tmp_path / "step_000001", [])
    saved(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"], "what the killed one left is gone"


def save_and_load(rank: int, world: int, folder: str) -> list[float]:
    """On several ranks: the files of all ranks are in the manifest, and all ranks agree on what is damaged."""
    checkpoints = saved(Path(folder), 1, 2)
    if rank == world - 1:
        shutil.rmtree(Path(folder) / "step_000002")
    torch.distributed.barrier()
    path, passed = checkpoints.newest()
    assert path is not None and path.name == "step_000001" and not passed
    if rank == 0:
        os.truncate(path / f"random_{world - 1}.pt", 3)
    torch.distributed.barrier()
    found, reasons = checkpoints.newest()
    assert found is None and f"random_{world - 1}.pt has 3 bytes" in reasons[0]
    return [parameter.sum().item() for parameter in trained(1)[0].parameters()]


def test_ranks_agree_on_what_is_whole(tmp_path: Path, gloo: Pool) -> None:
    gloo(2).run(save_and_load, str(tmp_path))
