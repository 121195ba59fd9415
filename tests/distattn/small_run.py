"""A token file and a configuration small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distattn.config import Config, check
from distattn.data import TokenFile, open_tokens, write_tokens


def small_tokens(folder: Path, documents: int = 40, longest: int = 90, seed: int = 0) -> TokenFile:
    """Documents of 1 to ``longest`` bytes that repeat themselves, so that there is something to learn."""
    random = np.random.default_rng(seed)
    texts = [np.resize(random.integers(97, 123, 7), size) for size in random.integers(1, longest + 1, documents)]
    write_tokens(folder, texts, 256, "byte")
    return open_tokens(folder)


def small_config(folder: Path, world_size: int = 1, **changes: object) -> Config:
    """A run that reads ``folder``/tokens and writes ``folder``/run; changes are named section__key."""
    config = Config(out=str(folder / "run"))
    for section, values in SMALL.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    config.data.path = str(folder / "tokens")
    for name, value in changes.items():
        section, _, inner = name.partition("__")
        setattr(getattr(config, section) if inner else config, inner or name, value)
    check(config, world_size)
    return config


SMALL: dict[str, dict[str, object]] = {
    "model": {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden_dim": 32},
    "data": {"sequence_length": 64, "held_out": 0.1, "workers": 0},
    "train": {"steps": 6, "warmup_steps": 2, "learning_rate": 1e-2, "loss_rows": 24, "eval_sequences": 2, "device": "cpu"},
}
