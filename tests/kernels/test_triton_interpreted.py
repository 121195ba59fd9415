"""The portable Triton kernels, in triton's interpreter, against the reference: runs inside :mod:`tests.kernels.test_triton`.

Every tensor is a strided view into a buffer of NaN, so that a read or a write one column, head or row too far shows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores, State
from distattn.kernels.reference import Reference
from distattn.kernels.triton_backend import TritonBackend, interpreted
from tests.kernels import cases

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before import: test_triton.py runs it so"
)

BACKEND, REFERENCE = TritonBackend(), Reference()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative L2. float32: sums in another order, measured up to 5e-7. float16: p and ds are rounded to 11 bits for the products,
# 2**-12 each. bfloat16 is widened to float32 in the interpreter, so only sums differ.
TOLERANCE = {F32: 2e-6, F16: 6e-4, BF16: 2e-6}


@dataclass(frozen=True)
class Case:
    name: str
    bands: Bands
    n_q: int
    n_k: int
    heads: int = 2
    key_heads: int = 1
    d: int = 32
    d_v: int = 32
    dtype: torch.dtype = F32
    softcap: float = 0.0
    sinks: bool = False

    @property
    def scores(self) -> Scores:
        return Scores(self.d**-0.5, self.softcap)


def documents(*lengths: int) -> Bands:
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return Bands([Band(a, b, a, b, -INF, 0) for a, b in zip(ends, ends[1:], strict=False)])


DILATED = [Band(0, 130, 0, 100, -90, -30), Band(20, 130, 40, 120, -10, 5), Band(131, 135, 60, 120)]
CASES = [
    Case("causal", Bands([Band(0, 133, 0, 133, -INF, 0)]), 133, 133),
    Case("window with sink tokens", Bands([Band(0, 140, 0, 4, -INF, -40), Band(0, 140, 0, 140, -39, 0)]), 140, 140, dtype=F16),
    Case("documents", documents(1, 64, 10, 63), 140, 138, dtype=BF16, sinks=True),
    Case("two diagonals, rows without keys, softcap", Bands(DILATED), 137, 120, d=24, d_v=48, softcap=3.0),
    Case("full, more keys than queries", Bands([Band(0, 70, 0, 195)]), 70, 195, heads=4, key_heads=2, d=64, d_v=64, dtype=F16),
    Case("head sizes 192 and 128", Bands([Band(0, 66, 0, 80, -INF, 3)]), 66, 80, d=192, d_v=128, sinks=True),
    Case("head size 256, float16 with softcap", Bands([Band(3, 66, 2, 70, -9, INF)]), 66, 70, 1, 1, 256, 256, F16, 2.0),
    Case("head size 96", Bands([Band(0, 65, 0, 65, -INF, -1)]), 65, 65, d=96, d_v=96, dtype=BF16, softcap=4.0),
]


def strided(values: Tensor) -> Tensor:
    """The same values as a view with gaps of NaN after columns, heads and rows, heads outermost in memory."""
    rows, heads, *size = values.shape
    buffer = torch.full((heads + 1, rows + 1, *(s + 8 for s in size)), torch.nan, dtype=values.dtype)
    view = buffer.transpose(0, 1)[(slice(rows), slice(heads), *(slice(s) for s in size))]
    return view.copy_(values)


def surroundings(view: Tensor) -> Tensor:
    """How many NaN the whole buffer of a strided view holds: the gaps, when its values are finite."""
    return torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).isnan().sum()


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, dout strided, sinks; rows of k and v that no band touches hold large finite garbage."""
    torch.manual_seed(len(case.name))
    make = lambda rows, heads, size: torch.randn(rows, heads, size).to(case.dtype)  # noqa: E731
    q, dout = make(case.n_q, case.heads, case.d), make(case.n_q, case.heads, case.d_v)
    k, v = make(case.n_k, case.key_heads, case.d), make(case.n_k, case.key_heads, case.d_v)
    unseen = case.bands.dense(case.n_q, case.n_k).sum(0) == 0
    k[unseen], v[unseen] = 6e4, -6e4
    sinks = torch.randn(case.heads) if case.sinks else None
    return strided(q), strided(k), strided(v), strided(dout), sinks


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN counts as a miss."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def expected_forward(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> State:
    lse = torch.full((case.n_q, case.heads), -torch.inf, dtype=torch.float64)
    if sinks is not None:
        lse = sinks.double().expand(case.n_q, case.heads).clone()
    state = State(torch.zeros(case.n_q, case.heads, case.d_v, dtype=torch.float64), lse)
    return REFERENCE.forward(q.double(), k.double(), v.double(), case.bands, case.scores, state)


def check_state(case: Case, o: Tensor, lse: Tensor, expected: State, tolerance: float) -> None:
    empty = expected.lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (o[empty] == 0).all()
    assert error(o, expected.o) < tolerance
    assert error(lse[~empty], expected.lse[~empty]) < 2e-6  # lse is float32 whatever the inputs


def test_the_interpreter_is_on() -> None:
    assert interpreted()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_in_one_step_and_backward(case: Case) -> None:
    q, k, v, dout, _ = inputs(case)
    expected = expected_forward(case, q, k, v, None)
    assert BACKEND.reject(q, k, v, case.scores) is None
    state = BACKEND.forward(q, k, v, case.bands, case.scores)
    assert state.o.dtype == state.lse.dtype == F32
    check_state(case, state.o, state.lse, expected, TOLERANCE[case.dtype])

    delta = strided((dout.double() * expected.o).sum(-1).float())
    lse = strided(expected.lse.float())
    arguments = (dout, q, k, v)
    sizes = [(case.n_q, case.heads, case.d), (case.n_k, case.key_heads, case.d), (case.n_k, case.key_heads, case.d_v)]
    before = [torch.randn(size) for size in sizes]
    exact = [x.double() for x in before]
    REFERENCE.backward(*(x.double() for x in arguments), delta.double(), lse.double(), case.bands, case.scores, *exact)
    found = [strided(x) for x in before]
    gaps = [surroundings(x) for x in found]
    BACKEND.backward(*arguments, delta, lse, case.bands, case.scores, *found)
    for name, mine, theirs, start, gap in zip(("dq", "dk", "dv"), found, exact, before, gaps, strict=True):
        assert error(mine - start, theirs - start.double()) < TOLERANCE[case.dtype], name
        assert surroundings(mine) == gap, f"{name} was written outside"


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.name)
def test_states_go_on_and_the_last_step_writes_every_row(case: Case) -> None:
    q, k, v, _, sinks = inputs(case)
    expected = expected_forward(case, q, k, v, sinks)
    lse = torch.full((case.n_q, case.heads), -torch.inf) if sinks is None else sinks.expand(case.n_q, case.heads)
    poison = torch.full((case.n_q, case.heads, case.d_v), torch.nan)  # o of a row whose lse is -inf must not be read
    poison[lse > -torch.inf] = 0
    state = State(strided(poison), strided(lse.contiguous()))
    early, late = case.bands.split_keys(case.n_k // 3)
    before = [x.clone() for x in state]
    assert BACKEND.forward(q, k, v, early, case.scores, state) is state
    untouched = early.dense(case.n_q, case.n_k).sum(1) == 0
    assert untouched.any() or case.name.startswith(("causal", "full", "window"))
    for mine, old in zip(state, before, strict=True):
        assert torch.equal(mine[untouched].nan_to_num(7.0), old[untouched].nan_to_num(7.0)), "untouched rows keep their bits"
    out = strided(torch.full((case.n_q, case.heads, case.d_v), torch.nan, dtype=case.dtype))
    gap = surroundings(strided(torch.zeros(out.shape, dtype=case.dtype)))
    finished = BACKEND.forward(q, k, v, late, case.scores, state, out)
    rounding = {F32: 0.0, F16: 3e-4, BF16: 3e-3}[case.dtype]  # of the output dtype
    check_state(case, out, finished.lse, expected, TOLERANCE[case.dtype] + rounding)
    assert surroundings(out) == gap, "out was written outside, or not everywhere"


def test_nothing_at_all() -> None:
    q, k = torch.randn(70, 2, 32), torch.randn(0, 1, 32)
    out = torch.full((70, 2, 32), torch.nan)
    state = BACKEND.forward(q, k, k, Bands(), Scores(1.0), out=out)
    assert (out == 0).all() and (state.lse == -torch.inf).all()
    assert BACKEND.forward(q[:0], k, k, Bands(), Scores(1.0)).o.shape == (0, 2, 32)
    given = State(torch.randn(70, 2, 32), torch.randn(70, 2))
    out.fill_(torch.nan)
    BACKEND.forward(q, k, k, Bands(), Scores(1.0), given, out)
    assert torch.equal(out, given.o)


def test_rows_with_lse_minus_infinity_contribute_nothing() -> None:
    q, k = torch.randn(65, 1, 16), torch.randn(65, 1, 16)
    lse = torch.full((65, 1), -torch.inf)
    gradients = [torch.zeros(65, 1, 16) for _ in range(3)]
    BACKEND.backward(q, q, k, k, torch.zeros(65, 1), lse, Bands([Band(0, 65, 0, 65)]), Scores(0.25), *gradients)
    assert all((x == 0).all() for x in gradients)


def test_the_same_bits_every_time() -> None:
    case = CASES[0]
    q, k, v, _, _ = inputs(case)
    first, second = (BACKEND.forward(q, k, v, case.bands, case.scores) for _ in range(2))
    assert torch.equal(first.o, second.o) and torch.equal(first.lse, second.lse)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in cases.CASES if case.dtype != torch.float64], ids=str)
def test_what_every_backend_must_pass(case: cases.Case) -> None:
    cases.check_backend(BACKEND, case)


@pytest.mark.slow
def test_untouched_rows_keep_their_bits() -> None:
    cases.check_untouched(BACKEND, cases.replace(cases.BASIC, bands=cases.GAPS))
