"""The choice by table: who is asked for which call, what the shipped table says of itself, and tables that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distattn.kernels
from distattn.kernels import ON_DEMAND, RANKING, choose, measured
from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores
from distattn.kernels.cuda_library import Library
from distattn.kernels.measured import BACKWARD, FORWARD, Measured, Table, mask_of, read
from distattn.kernels.reference import Reference
from tests.kernels.cases import BASIC, DOCUMENTS, check_backend

FULL, CAUSAL = Bands([Band(0, 133, 0, 133)]), Bands([Band(0, 133, 0, 133, -INF, 0)])
WINDOW = Bands([Band(0, 133, 0, 133, -20, 0)])
X = torch.zeros(133, 2, 64, dtype=torch.bfloat16)


class Named(Reference):
    def __init__(self, name: str):
        self.name = name


class FakeLibrary(Library, Reference):  # type: ignore[misc]
    name, forward_operator, largest_head, oldest = "cudnn", "none", 128, (8, 0)
    reject, forward, backward = Reference.reject, Reference.forward, Reference.backward  # type: ignore[assignment]


def table(**order: tuple[str, ...]) -> Table:
    """Rows by ``direction_mask``, at head size 64."""
    rows = {(*name.split("_"), 64, 64): names for name, names in order.items()}
    return Table("measured", {"capability": [9, 0]}, rows)  # type: ignore[arg-type]


def pick(made: Measured, direction: str, bands: Bands, whole: bool = True) -> str:
    return made.pick(direction, X, X, X, bands, Scores(1.0), whole).name


def test_masks() -> None:
    assert [mask_of(bands) for bands in (FULL, CAUSAL, WINDOW, Bands(), DOCUMENTS)] == ["full", "causal", *3 * ["other"]]


def test_the_fastest_that_can() -> None:
    candidates = (Named("gluon"), FakeLibrary(), Named("triton"))
    rows = table(forward_full=("cudnn", "gluon"), forward_causal=("gluon", "cudnn"), backward_full=("cudnn", "triton", "gluon"))
    made = Measured(candidates, rows)
    assert pick(made, FORWARD, FULL) == "cudnn"
    assert pick(made, FORWARD, FULL, whole=False) == "gluon", "a state is not rounded"
    assert pick(made, FORWARD, CAUSAL) == "gluon"
    assert pick(made, FORWARD, WINDOW) == "gluon"
    assert pick(made, BACKWARD, FULL) == "triton", "no fixed order of sums"
    assert pick(Measured(candidates, rows, deterministic=False), BACKWARD, FULL) == "cudnn"
    assert pick(Measured(candidates, rows), BACKWARD, CAUSAL) == "gluon", "no row, no library"
    assert made.varies(64, 64) and not made.varies(128, 128)
    assert not Measured(candidates, table(forward_full=("gluon", "cudnn"))).varies(64, 64)


def test_it_is_a_backend() -> None:
    made = Measured((Named("gluon"), FakeLibrary()), table(forward_causal=("cudnn", "gluon")))
    check_backend(made, replace(BASIC, out_dtype=torch.float32, calls=2))
    check_backend(made, BASIC)
    assert made.name == "measured (gluon, cudnn)" and made.reject(X, X, X, Scores(1.0)) is None


def test_the_shipped_table_says_what_it_rests_on() -> None:
    shipped = read()
    assert shipped.status == "measured" or "prototypes" in shipped.status and "never run" in shipped.status
    assert {"name", "capability", "torch", "triton", "cudnn"} <= shipped.hardware.keys()
    assert all(set(names) <= set(RANKING) for names in shipped.order.values())


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for text in ("{", "[]", json.dumps({"status": "measured", "order": []})):
        path.write_text(text)
        with pytest.raises(ValueError, match="Write it anew"):
            read.__wrapped__(path)


def test_choose_asks_the_table_on_its_hardware_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        """As much of a tensor as the choice looks at."""

        device, dtype, shape = torch.device("cuda"), torch.bfloat16, torch.Size((133, 2, 64))

    made = {name: Named(name) for name in RANKING} | {"cudnn": FakeLibrary()}
    monkeypatch.setattr(distattn.kernels, "load", made.__getitem__)
    monkeypatch.setattr(measured, "capability", lambda device: (9, 0))
    monkeypatch.setattr(measured, "read", lambda: table(forward_full=("cudnn", "gluon"), backward_full=("gluon_fused", "gluon")))
    x = OnGpu()
    assert choose(x, x, x, Scores(1.0)).backend.name == "measured (gluon, gluon_ordered, cudnn, flash, triton)"  # type: ignore[arg-type]
    loose = choose(x, x, x, Scores(1.0), deterministic=False).backend  # type: ignore[arg-type]
    assert isinstance(loose, Measured) and pick(loose, BACKWARD, FULL) == "gluon_fused"
    monkeypatch.setattr(measured, "read", lambda: table(backward_full=("gluon_fused", "gluon_ordered", "gluon")))
    strict = choose(x, x, x, Scores(1.0)).backend  # type: ignore[arg-type]
    assert isinstance(strict, Measured) and pick(strict, BACKWARD, FULL) == "gluon_ordered", (
        "deterministic, and faster by the table"
    )
    monkeypatch.setattr(measured, "capability", lambda device: (8, 0))
    assert choose(x, x, x, Scores(1.0)).backend is made["gluon"]  # type: ignore[arg-type]
    assert set(ON_DEMAND) < set(RANKING)
