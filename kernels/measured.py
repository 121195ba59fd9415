"""Which backend was fastest for which kind of call, read from a table that ``launch/bench_kernels.py --write-table`` writes.

A call's kind is its direction, its head sizes and its mask: ``full`` and ``causal`` blocks, ``other`` bands. The table says on
what it was measured and holds for that compute capability alone; where it has no row, and on other hardware, the order of
:data:`distattn.kernels.RANKING` stands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distattn.kernels.bands import Bands
from distattn.kernels.contract import Backend, Scores, State
from distattn.kernels.cuda_library import Library, blocks

TABLE = Path(__file__).with_name("measured.json")
FORWARD, BACKWARD = "forward", "backward"
MASKS = ("full", "causal", "other")


@dataclass(frozen=True)
class Table:
    """``order[direction, mask, d, d_v]``: names, fastest first. ``status`` is "measured", or says what it rests on instead."""

    status: str
    hardware: dict[str, Any]
    order: dict[tuple[str, str, int, int], tuple[str, ...]]

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = self.hardware["capability"]
        return major, minor


@lru_cache(maxsize=4)
def read(path: Path = TABLE) -> Table:
    """The table in a file.

    Raises:
        ValueError: the file is no table.
    """
    try:
        content = json.loads(path.read_text())
        order = {
            (row["direction"], row["mask"], int(row["d"]), int(row["d_v"])): tuple(row["backends"]) for row in content["order"]
        }
        return Table(content["status"], content["hardware"], order)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} should be a table of launch/bench_kernels.py --write-table, found {error!r}. Write it anew."
        ) from error


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, None of anything else."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1024)
def mask_of(bands: Bands) -> str:
    """``full`` or ``causal`` when the bands are one such block, else ``other``."""
    found = blocks(bands)
    if not found or len(found) > 1:
        return "other"
    return "causal" if found[0].causal else "full"


class Measured:
    """See :class:`distattn.kernels.contract.Backend`: each call runs on the fastest of ``candidates`` that can take it.

    A library rounds what it returns to 16 bits. It is asked only where nothing else would be kept: a whole forward that begins
    and ends in the call. Its backward sums in no fixed order, so it is asked for gradients only when not ``deterministic``.

    Args:
        candidates: backends that take such tensors, fastest first by default.
    """

    def __init__(self, candidates: tuple[Backend, ...], table: Table, deterministic: bool = True):
        self.candidates, self.table, self.deterministic = candidates, table, deterministic
        self.name = f"measured ({', '.join(backend.name for backend in candidates)})"

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Why none of the candidates can take the call, or None."""
        reasons = [backend.reject(q, k, v, scores) for backend in self.candidates]
        return None if None in reasons else "; ".join(filter(None, reasons))

    def _ranked(self, direction: str, mask: str, d: int, d_v: int) -> list[Backend]:
        """The candidates that may be asked for such calls, fastest first. A library needs a row: its order is not a guess."""
        row = self.table.order.get((direction, mask, d, d_v), ())
        rank = {name: place for place, name in enumerate(row)}
        allowed = [
            backend
            for backend in self.candidates
            if not isinstance(backend, Library)
            or (backend.name in rank and mask != "other" and (direction == FORWARD or not self.deterministic))
        ]
        return sorted(allowed, key=lambda backend: rank.get(backend.name, len(rank)))

    def varies(self, d: int, d_v: int) -> bool:
        """Whether some kind of call at these head sizes runs on another backend than the first candidate."""
        kinds = [(direction, mask) for direction in (FORWARD, BACKWARD) for mask in MASKS]
        return any(self._ranked(*kind, d, d_v)[0] is not self.candidates[0] for kind in kinds)

    def pick(self, direction: str, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, whole: bool) -> Backend:
        """The backend for one call; ``whole`` when the forward begins and ends in it, and leaves 16 bits."""
        for backend in self._ranked(direction, mask_of(bands), q.shape[2], v.shape[2]):
            if isinstance(backend, Library) and direction == FORWARD and not whole:
                continue
            if backend.reject(q, k, v, scores) is None:
                return backend
        raise AssertionError(self.reject(q, k, v, scores))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """See :class:`distattn.kernels.contract.Backend`."""
        whole = state is None and out is not None and out.dtype == q.dtype
        return self.pick(FORWARD, q, k, v, bands, scores, whole).forward(q, k, v, bands, scores, state, out)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        delta: Tensor,
        lse: Tensor,
        bands: Bands,
        scores: Scores,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """See :class:`distattn.kernels.contract.Backend`."""
        backend = self.pick(BACKWARD, q, k, v, bands, scores, False)
        backend.backward(dout, q, k, v, delta, lse, bands, scores, dq, dk, dv)
