"""The CPU backends against dense attention, and the check itself against backends with one defect each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.kernels.aten import Aten
from distattn.kernels.bands import HI, INF, Band, Bands
from distattn.kernels.contract import Backend
from distattn.kernels.reference import Reference
from tests.kernels.cases import BASIC, CASES, GAPS, Case, check_backend, check_repeats, check_untouched, unions

BACKENDS = [Aten(), Reference()]

# long enough for every kind of piece: triangles cut off rectangles, flipped ones, tiles of wide and of narrow windows
LARGE = [
    replace(BASIC, name="wide window", n_q=1300, n_k=1300, bands=Bands([Band(0, 1300, 0, 1300, -519, 0)])),
    replace(BASIC, name="narrow window", n_q=700, n_k=700, bands=Bands([Band(0, 700, 0, 700, -100, 7)]), heads=(2, 1)),
    replace(BASIC, name="long lo", n_q=500, n_k=900, bands=Bands([Band(0, 500, 0, 900, 117, INF)]), calls=2),
    replace(BASIC, name="long hi", n_q=500, n_k=900, bands=Bands([Band(0, 500, 0, 900, -INF, 290)]), d_v=8),
    replace(BASIC, name="softcap in tiles", n_q=300, n_k=520, bands=Bands([Band(0, 300, 0, 520, -40, 290)]), softcap=1.0),
]


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_out_lse_and_gradients(backend: Backend, case: Case) -> None:
    check_backend(backend, case)


@given(
    bands=unions(40, 50),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    calls=st.integers(1, 3),
    sinks=st.booleans(),
    strided=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 1.2]),
)
def test_random_unions(bands: Bands, **options: object) -> None:
    case = Case("random", 40, 50, bands, d=8, d_v=8, dtype=torch.float64, **options)
    for backend in BACKENDS:
        check_backend(backend, case)


@pytest.mark.parametrize("case", [BASIC, *LARGE], ids=str)
def test_repeats_bitwise(case: Case) -> None:
    check_repeats(Aten(), case)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_untouched_rows_keep_their_bits(backend: Backend, softcap: float) -> None:
    check_untouched(backend, replace(BASIC, bands=GAPS, softcap=softcap))


class Defect(Aten):
    """A backend with a defect; subclasses override one method."""

    name = "defect"


class ZeroGradients(Defect):
    def backward(self, *arguments: object) -> None:
        pass


class SwappedKeyAndValueGradients(Defect):
    def backward(self, *arguments: object) -> None:
        *inputs, dq, dk, dv = arguments
        super().backward(*inputs, dq, dv, dk)


class LseZero(Defect):
    def forward(self, *arguments: object, **options: object) -> object:
        state = super().forward(*arguments, **options)
        state.lse[state.lse > -torch.inf] = 0.0
        return state


class DiagonalOffByOne(Defect):
    """In forward and backward alike, so that the gradients are those of the wrong function."""

    @staticmethod
    def moved(bands: Bands) -> Bands:
        table = bands.table.copy()
        table[:, HI] += table[:, HI] < INF
        return Bands(table)

    def forward(self, q, k, v, bands, *rest, **options):  # type: ignore[no-untyped-def]
        return super().forward(q, k, v, self.moved(bands), *rest, **options)

    def backward(self, dout, q, k, v, delta, lse, bands, *rest):  # type: ignore[no-untyped-def]
        super().backward(dout, q, k, v, delta, lse, self.moved(bands), *rest)


class DiagonalOffByOneInBackward(DiagonalOffByOne):
    forward = Aten.forward


class AssignedGradients(Defect):
    """The accumulators are overwritten, not added into."""

    def backward(self, *arguments: object) -> None:
        for total in arguments[-3:]:
            total.zero_()
        super().backward(*arguments)


class StateForgotten(Defect):
    """Every call starts from empty: a hop is lost."""

    def forward(self, q, k, v, bands, scores, state=None, out=None):  # type: ignore[no-untyped-def]
        return super().forward(q, k, v, bands, scores, None, out)


class DeltaIgnored(Defect):
    def backward(self, dout, q, k, v, delta, *rest):  # type: ignore[no-untyped-def]
        super().backward(dout, q, k, v, torch.zeros_like(delta), *rest)


DEFECTS = [
    ZeroGradients,
    SwappedKeyAndValueGradients,
    LseZero,
    DiagonalOffByOne,
    DiagonalOffByOneInBackward,
    AssignedGradients,
    StateForgotten,
    DeltaIgnored,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_rejects(defect: type[Defect], dtype: torch.dtype) -> None:
    case = replace(BASIC, dtype=dtype, calls=2)
    check_backend(Aten(), case)
    with pytest.raises(AssertionError):
        check_backend(defect(), case)


def test_the_check_repeats_rejects_noise() -> None:
    class Noisy(Defect):
        def backward(self, *arguments: object) -> None:
            super().backward(*arguments)
            arguments[-1].add_(torch.randn_like(arguments[-1]), alpha=1e-6)

    with pytest.raises(AssertionError, match="dv"):
        check_repeats(Noisy(), BASIC)
