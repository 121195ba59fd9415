"""What only the aten backend has: its pieces, its substitute for ``out``, and :func:`distattn.kernels.choose`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from distattn.kernels import aten, aten_pieces, choose
from distattn.kernels.aten import Aten, _out_for_delta
from distattn.kernels.aten_pieces import CAUSAL, FLIPPED, FULL, MASKED, Pieces, pieces, tiles
from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores
from tests.kernels.cases import BASIC, CASES, Case, check_backend, check_repeats, unions, visible_pairs

WIDE = Band(0, 5000, 0, 5000, -999, 0)


def cut(bands: Bands) -> Pieces:
    pieces.cache_clear()
    return pieces(bands)


def counts(work: Pieces, n_q: int, n_k: int) -> np.ndarray:
    """How often the pieces compute each pair, by what the op does for each kind."""
    total = np.zeros((n_q, n_k), int)
    for p in work.calls:
        rows, keys = p.q1 - p.q0, p.k1 - p.k0
        i, j = np.arange(rows)[:, None], np.arange(keys)[None]
        top_left = j <= i
        seen = {
            FULL: np.ones((rows, keys), bool),
            CAUSAL: top_left,
            FLIPPED: top_left[::-1, ::-1],
            MASKED: (p.lo <= j - i) & (j - i <= p.hi),
        }[p.kind]
        assert seen.any(1).all(), "every row of a piece sees a key"
        q, k = work.rows.start + p.q0, work.keys.start + p.k0
        total[q : q + rows, k : k + keys] += seen
    return total


@pytest.fixture
def small_limits() -> Iterator[None]:
    """Limits so low that small masks need every kind of piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten_pieces, "SMALL_PAIRS", 6)
        patch.setattr(aten_pieces, "NARROW", 4)
        yield
    pieces.cache_clear()


@pytest.mark.usefixtures("small_limits")
def test_pieces_compute_every_pair_once() -> None:
    every_kind = Bands([Band(0, 20, 0, 20, -9, 0), Band(20, 40, 20, 40, -1, 1), Band(40, 50, 0, 60)])

    @example(every_kind)
    @given(unions(50, 60))
    def check(bands: Bands) -> None:
        work = cut(bands)
        assert np.array_equal(counts(work, 50, 60), visible_pairs(bands, 50, 60).numpy())
        touched = np.zeros(50, bool)
        for p in work.calls:
            assert p.fresh == (not touched[p.q0 : p.q1].any())
            touched[p.q0 : p.q1] = True

    check()
    assert {p.kind for p in cut(every_kind).calls} == {FULL, CAUSAL, FLIPPED, MASKED}


@pytest.mark.parametrize("op_knows_groups", sorted({False, aten.OP_KNOWS_GROUPS}))
@pytest.mark.usefixtures("small_limits")
def test_small_pieces_add_up_to_dense_attention(op_knows_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "OP_KNOWS_GROUPS", op_knows_groups)

    @given(unions(50, 60), st.booleans())
    def check(bands: Bands, sinks: bool) -> None:
        pieces.cache_clear()
        check_backend(Aten(), Case("pieces", 50, 60, bands, heads=(2, 1), d=8, d_v=8, dtype=torch.float64, sinks=sinks))

    check()


@pytest.mark.parametrize(
    "bands, kinds",
    [
        ([Band(0, 4096, 0, 4096, -INF, 0)], [CAUSAL]),
        ([Band(0, 4096, 0, 4096, -INF, -1)], [CAUSAL]),
        ([Band(0, 4096, 0, 512)], [FULL]),
        ([Band(0, 100, 0, 300, -INF, 199)], [MASKED]),
        ([Band(0, 1000, 0, 3000, -INF, 1999)], [FULL, CAUSAL]),
        ([Band(0, 1000, 0, 3000, -10, INF)], [FLIPPED, FULL]),
        ([WIDE], [CAUSAL, *[FLIPPED, CAUSAL] * 4]),
        ([Band(0, 1000, 0, 1000, -99, 0)], [MASKED] * 8),
    ],
)
def test_few_pieces(bands: list[Band], kinds: list[int]) -> None:
    assert [p.kind for p in cut(Bands(bands)).calls] == kinds


WIDE_IN_GROUPS = replace(BASIC, name="wide", n_q=1300, n_k=1300, bands=Bands([Band(0, 1300, 0, 1300, -519, 0)]), heads=(4, 2))


@pytest.mark.parametrize("case", [*(case for case in CASES if case.heads[0] > case.heads[1]), WIDE_IN_GROUPS], ids=str)
def test_old_torch_gets_as_many_key_heads_as_query_heads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class KeyHeads(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "flash_attention_for_cpu" in op.name():
                calls.append((op.name().endswith("backward"), {x.shape[1] for x in args if isinstance(x, torch.Tensor)}))
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(aten, "OP_KNOWS_GROUPS", False)
    with KeyHeads():
        check_backend(Aten(), case)
    assert case.softcap or {backward for backward, _ in calls} == {False, True}
    assert all(heads == {case.heads[0]} for _, heads in calls), "the op sees one number of heads"
    check_repeats(Aten(), case)


def test_masks_stay_small() -> None:
    for width in (1, 100, 300, 511):
        masked = cut(Bands([Band(0, 3000, 0, 3000, 1 - width, 0)])).calls
        assert max((p.q1 - p.q0) * (p.k1 - p.k0) for p in masked) <= 256 * (256 + aten_pieces.NARROW)


@given(unions(50, 60), st.integers(1, 20))
def test_tiles_are_a_partition(bands: Bands, size: int) -> None:
    tiles.cache_clear()
    total = np.zeros((50, 60), int)
    for rows, keys, own in tiles(bands, size):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        assert 0 < n <= size and 0 < m <= size
        total[rows, keys] += visible_pairs(own, n, m).numpy()
    assert np.array_equal(total, visible_pairs(bands, 50, 60).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size_of_dout", [1.0, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("size_of_delta", [1.0, 1e-18, 1e18, 0.0])
def test_out_for_delta(dtype: torch.dtype, size_of_dout: float, size_of_delta: float) -> None:
    torch.manual_seed(0)
    dout, delta = torch.randn(9, 3, 16, dtype=dtype) * size_of_dout, torch.randn(9, 3, dtype=dtype) * size_of_delta
    same, out = _out_for_delta(dout.clone(), delta)
    rounding = torch.finfo(dtype).eps
    error = ((same.double() * out.double()).sum(-1) - delta.double()).abs()
    beside_dout = 1e-8 * rounding * dout.abs().amax(-1)  # delta may be lost where it is nothing beside dout.v
    assert torch.isfinite(out).all() and (error <= 8 * rounding * delta.abs() + beside_dout).all()
    assert ((same - dout).abs().amax(-1) <= 1e-8 * rounding * delta.abs()).all(), "dout changes by less than rounding"


def test_choose_says_why() -> None:
    q = torch.randn(5, 2, 8)
    choice = choose(q, q, q, Scores(1.0))
    assert choice.backend.name == "aten" and [reason.split(":")[0] for reason in choice.reasons] == ["gluon", "triton"]
    assert choose(q, q, q, Scores(1.0), prefer="reference").backend.name == "reference"
    odd = q.to(torch.complex64)
    choice = choose(odd, odd, odd, Scores(1.0))
    assert choice.backend.name == "reference" and "complex64" in choice.reasons[2]


def test_choose_refuses() -> None:
    q = torch.randn(5, 2, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'aten' was asked for but takes float64.*Found q \[5, 2, 8\]"):
        choose(q, q, q, Scores(1.0), prefer="aten")
    with pytest.raises(
        ValueError, match="no backend 'fast'. Use one of gluon, gluon_ordered, gluon_fused, cudnn, flash, triton, aten, reference"
    ):
        choose(q, q, q, Scores(1.0), prefer="fast")
