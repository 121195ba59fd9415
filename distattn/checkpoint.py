"""Checkpoints of a sharded run: whole or not there, and found damaged before they are loaded.

    checkpoints/step_000100.tmp/     being written; whatever dies here leaves the checkpoint before it as it was
    checkpoints/step_000100/         whole: renamed when every file and the manifest are on disk
        __0_0.distcp ... .metadata   model and optimizer, in PyTorch's distributed checkpoint format
        random_0.pt ...              the state of each rank's random numbers
        progress.json                step, place in the data, what the model is
        manifest.json                size and checksum of every other file

All ranks call every method, and see one file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


class Checkpoints:
    """The checkpoints in one folder, of which the newest ``keep`` are kept."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
        """Writes the checkpoint of ``progress["step"]`` and removes those that are too old. Returns its folder."""
        final = self.folder / f"step_{progress['step']:06d}"
        partial = final.with_name(final.name + ".tmp")
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier()
        with _quiet():
            dcp.save(_state(model, optimizer), checkpoint_id=partial)
        torch.save(_random_state(), partial / f"random_{_rank()}.pt")
        if _rank() == 0:
            (partial / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
        _barrier()
        # Each rank reads a part of the files, so that a large checkpoint is not summed by one.
        files = sorted(path for path in partial.iterdir())
        sums = _gather({path.name: _fingerprint(path) for path in files[_rank() :: _world()]})
        if _rank() == 0:
            manifest = {name: entry for part in sums for name, entry in part.items()}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync_all(partial)
            shutil.rmtree(final, ignore_errors=True)  # can only be a damaged one: resume goes on from every other
            os.replace(partial, final)
            _sync(self.folder)
            self._remove_old(progress["step"])
        _barrier()
        return final

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint (None: there is none), and why each newer one was passed over."""
        passed: list[str] = []
        for path in self._all():
            reasons = [reason for reason in _gather(_damage(path)) if reason]
            if not reasons:
                return path, passed
            passed.append(f"{path} is damaged and was passed over: {reasons[0]}.")
        return None, passed

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts model, optimizer and (in a world of the same size) the random numbers back, in place."""
        state = _state(model, optimizer)
        with _quiet():
            dcp.load(state, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if len(list(path.glob("random_*.pt"))) == _world():
            _restore_random(torch.load(path / f"random_{_rank()}.pt", weights_only=True))

    def _all(self) -> list[Path]:
        """Newest first, by rank 0's view of the folder: all ranks must go through the same list."""
        return _gather(self._list()[::-1])[0]

    def _list(self) -> list[Path]:
        """Oldest first. Other names are the user's: a copy under another name is neither read nor removed."""
        return sorted((path for path in self.folder.glob("step_*") if _step(path) >= 0 and path.is_dir()), key=_step)

    def _remove_old(self, saved: int) -> None:
        """One of a later step than ``saved`` is damaged (resume passed it over): it does not count, and waits for its step."""
        for path in [path for path in self._list() if _step(path) <= saved][: -self.keep]:
            shutil.rmtree(path)
        for path in self.folder.glob("step_*.tmp"):  # left by a run that was killed while it saved
            shutil.rmtree(path)


def read_progress(path: Path) -> dict[str, Any]:
    return json.loads((path / PROGRESS).read_text(encoding="utf-8"))


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments}


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def _damage(path: Path) -> str:
    """What is wrong with this rank's part of the files; empty if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or not readable"
    for name in sorted(manifest)[_rank() :: _world()]:
        size, checksum = manifest[name]
        if not (path / name).is_file():
            return f"{name} is missing"
        found = (path / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
        if _fingerprint(path / name)[1] != checksum:
            return f"the checksum of {name} differs from the one in {MANIFEST}"
    return ""


def _fingerprint(path: Path) -> tuple[int, int]:
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return size, checksum


def _sync_all(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a process group the library warns that it saves in a single process, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
