"""What a server of a pool has to know to take part in one attention call, as text. No pickles: a store is an open socket."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores
from distattn.parallel.assign_cost import Cost
from distattn.parallel.mask import Mask
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Balance, Strategy

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class PlanInputs:
    """What all ranks make a plan from; how many servers there are is for the epoch to say."""

    mask: Mask
    strategy: Strategy
    pad_to_equal: bool
    version: str  # of the program that asks

    def encode(self) -> str:
        words = {
            "n_tokens": self.mask.n_tokens,
            "name": self.mask.name,
            "lengths": self.mask.lengths,
            "strategy": asdict(self.strategy),
            "pad_to_equal": self.pad_to_equal,
            "version": self.version,
            "bands": self.mask.bands.table.tolist(),
        }
        return json.dumps(words)

    @classmethod
    def decode(cls, text: str) -> PlanInputs:
        words = json.loads(text)
        table = np.array(words["bands"], dtype=np.int64).reshape(-1, 6)
        mask = Mask(Bands(table), words["n_tokens"], words["name"], _frozen(words["lengths"]))
        return cls(mask, _strategy(words["strategy"]), words["pad_to_equal"], words["version"])


@dataclass(frozen=True)
class Call:
    """One pass over one plan: ``number`` counts the passes of the trainers, ``plan`` names the inputs of the plan."""

    number: int
    plan: int
    direction: Direction
    shape: Shape
    scores: Scores
    sinks: bool

    def __str__(self) -> str:
        return f"attention call {self.number} ({self.direction})"

    def as_words(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        shape = {name: _name(value) if isinstance(value, torch.dtype) else value for name, value in vars(self.shape).items()}
        return {**vars(self), "shape": shape, "scores": asdict(self.scores)}

    @classmethod
    def of_words(cls, words: dict[str, Any]) -> Call:
        shape = {name: getattr(torch, value) if isinstance(value, str) else value for name, value in words["shape"].items()}
        return cls(**{**words, "shape": Shape(**shape), "scores": Scores(**words["scores"])})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _strategy(words: dict[str, Any]) -> Strategy:
    options = {name: _frozen(value) for name, value in words.items()}
    if options["balance"] is not None:
        balance = {name: _frozen(value) for name, value in options["balance"].items()}
        for direction in ("forward", "backward"):
            balance[direction] = Cost(**{name: _frozen(value) for name, value in balance[direction].items()})
        options["balance"] = Balance(**balance)
    return Strategy(**options)


def _frozen(value: Any) -> Any:
    """JSON knows lists only; options of a strategy are hashable."""
    return tuple(_frozen(part) for part in value) if isinstance(value, list) else value
