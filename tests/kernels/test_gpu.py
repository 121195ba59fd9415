"""All block backends on a real GPU, against dense attention in float64: what no emulator and no compiler can show.

The cases are those of the CPU backends (``tests/kernels/cases.py``): their tensors are made on the CPU, run on the GPU, and
compared at home. Run all of it with: ``python -m pytest --all -m gpu tests/kernels/test_gpu.py``. A wrong count of arrivals
hangs a kernel for ever: pytest-timeout ends the process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distattn.kernels import choose, load
from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Backend, Scores, State
from distattn.kernels.gluon_backend import GluonBackend
from distattn.kernels.gluon_launch import FORWARD, FUSED, ROWS
from tests.kernels.cases import BASIC, CASES, Case, check_backend, check_repeats, make, oracle, visible_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
BF16, F16 = torch.bfloat16, torch.float16
N = 515  # no tile divides it


def there(x: Tensor) -> Tensor:
    """``x`` on the GPU with its strides, which ``cuda()`` does not keep."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda").copy_(x)


class OnGpu:
    """A backend whose callers keep their tensors on the CPU; what it writes in place is copied back."""

    def __init__(self, inner: Backend):
        self.inner, self.name = inner, inner.name

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        return self.inner.reject(there(q), there(k), there(v), scores)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        given = None if state is None else State(*(there(x) for x in state))
        out_there = None if out is None else there(out)
        made = self.inner.forward(there(q), there(k), there(v), bands, scores, given, out_there)
        if out is not None:
            out.copy_(out_there)
        if state is None:
            return State(*(x.cpu() for x in made))
        state.o.copy_(made.o)
        state.lse.copy_(made.lse)
        return state

    def backward(self, *arguments: Any) -> None:
        *inputs, dq, dk, dv = arguments
        sums = [there(x) for x in (dq, dk, dv)]
        self.inner.backward(*(there(x) if isinstance(x, Tensor) else x for x in inputs), *sums)
        for mine, theirs in zip((dq, dk, dv), sums, strict=True):
            mine.copy_(theirs)


def backend(name: str, case: Case) -> OnGpu:
    """Skips, with the backend's own reason, where it cannot take the case on this machine."""
    found = OnGpu(load(name))
    p = make(case)
    reason = found.reject(p.q, p.k, p.v, p.scores)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return found


def fit(case: Case, d: int = 64, d_v: int | None = None) -> Case:
    dtype = case.dtype if case.dtype in (BF16, F16) else BF16
    return replace(case, d=d, d_v=d_v or d, dtype=dtype, out_dtype=dtype if case.out_dtype else None)


ORDINARY = [case for case in CASES if case.d == case.d_v == 16 and case.dtype != torch.float64]


@pytest.mark.parametrize("name", ["gluon", "gluon_ordered", "gluon_fused", "triton"])
@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_what_every_backend_must_pass(name: str, case: Case) -> None:
    check_backend(backend(name, fit(case)), fit(case))


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype in (torch.float32, BF16, F16)], ids=str)
def test_the_portable_kernels_at_their_own_sizes(case: Case) -> None:
    check_backend(backend("triton", case), case)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("size", ROWS[FORWARD], ids=str)
def test_every_head_size(size: tuple[int, int], softcap: float) -> None:
    case = Case("sizes", N, N + 200, Bands([Band(0, N, 0, N + 200, -INF, 60)]), (8, 2), *size, BF16, softcap, calls=2, sinks=True)
    for each in (case, replace(case, dtype=F16, calls=1, sinks=False, out_dtype=F16)):
        check_backend(backend("gluon", each), each)
        if size in ROWS[FUSED] and not softcap:
            check_backend(backend("gluon_fused", each), each)
            check_backend(backend("gluon_ordered", each), each)


# Few heads and more keys than rows: fewer items than an H100 has multiprocessors, so that items are cut and joined.
SPLIT = Case("split", N, 6000, Bands([Band(0, N, 0, 6000, -INF, 5500)]), (4, 2), dtype=BF16)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("size", ROWS[FORWARD], ids=str)
def test_split_calls_of_every_head_size(size: tuple[int, int], softcap: float) -> None:
    """All four calls of the forward; keys cut along queries in the last, which has many of these."""
    case = replace(SPLIT, d=size[0], d_v=size[1], softcap=softcap)
    turned = replace(case, n_q=6000, n_k=N, bands=Bands([Band(0, 6000, 0, N, -5500, INF)]))
    for each in (replace(case, calls=2, sinks=True), replace(case, calls=2, out_dtype=BF16), replace(case, dtype=F16), turned):
        check_backend(backend("gluon", each), each)


def test_split_calls_are_split_and_differ_from_whole_ones_by_rounding_alone() -> None:
    q, k, v = (torch.randn(n, 2, 128, device="cuda", dtype=BF16) for n in (N, 6000, 6000))
    cut, whole = GluonBackend(), GluonBackend(split=False)
    reason = cut.reject(q, k, v, Scores(0.1))
    if reason is not None:
        pytest.skip(reason)
    row = ROWS[FORWARD][128, 128]
    bands = Bands([Band(0, N, 0, 6000)])
    work, as_before = (each._plan(FORWARD, row, q, k, v, bands).work for each in (cut, whole))
    assert work is not None and work.pieces > 20 and as_before is not None and as_before.pieces == 0
    a, b = (each.forward(q, k, v, bands, Scores(0.1)) for each in (cut, whole))
    assert float((a.o - b.o).norm() / b.o.norm()) < 2e-3 and float((a.lse - b.lse).abs().max()) < 1e-4


def test_split_calls_give_the_same_bits_in_a_hundred_runs() -> None:
    case = replace(SPLIT, d=128, d_v=128)
    found = backend("gluon", case)
    for _ in range(50):
        check_repeats(found, case)


LIBRARY_CASES = [
    replace(
        BASIC, name="causal", n_q=N, n_k=N, bands=Bands([Band(0, N, 0, N, -INF, 0)]), d=128, d_v=128, dtype=BF16, heads=(4, 2)
    ),
    replace(BASIC, name="full", n_q=N, n_k=N, bands=Bands([Band(0, N, 0, N)]), d=64, d_v=64, dtype=BF16, out_dtype=BF16, calls=2),
]


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("case", LIBRARY_CASES, ids=str)
def test_libraries_as_blocks(name: str, case: Case) -> None:
    check_backend(backend(name, case), case)


def random_case(generator: np.random.Generator) -> Case:
    """Up to eight bands of any kind over shapes of any length."""
    n_q, n_k = (int(n) for n in generator.integers(1, 1500, 2))
    taken: list[Band] = []
    seen = np.zeros((n_q, n_k), dtype=bool)
    for _ in range(generator.integers(1, 9)):
        q0, q1 = sorted(int(n) for n in generator.integers(0, n_q + 1, 2))
        k0, k1 = sorted(int(n) for n in generator.integers(0, n_k + 1, 2))
        lo, hi = (int(n) for n in generator.integers(-n_q, n_k + 1, 2))
        kind = generator.integers(0, 4)
        band = Band(q0, q1, k0, k1, lo if kind & 1 else -INF, hi if kind & 2 else INF)
        mine = visible_pairs(Bands([band]), n_q, n_k).numpy()
        if not (mine & seen).any():
            taken.append(band)
            seen |= mine
    size = list(ROWS[FORWARD])[generator.integers(0, len(ROWS[FORWARD]))]
    heads = [(1, 1), (4, 2), (6, 2), (8, 1)][generator.integers(0, 4)]
    dtype, softcap = [BF16, F16][generator.integers(0, 2)], float([0.0, 0.0, 1.2][generator.integers(0, 3)])
    sinks, calls, strided = bool(generator.integers(0, 2)), int(generator.integers(1, 4)), bool(generator.integers(0, 2))
    return Case("random", n_q, n_k, Bands(taken), heads, *size, dtype, softcap, sinks, calls, strided=strided)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_random_masks(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for turn in range(100):
        case = random_case(generator)
        check_backend(backend("gluon", case), case, seed * 1000 + turn)
        if (case.d, case.d_v) in ROWS[FUSED] and not case.softcap and turn % 4 == 0:
            check_backend(backend("gluon_fused", case), case, seed * 1000 + turn)
            check_backend(backend("gluon_ordered", case), case, seed * 1000 + turn)


@pytest.mark.parametrize("name", ["gluon", "gluon_ordered"])
@pytest.mark.parametrize("mask", ["causal", "full", "window", "packed"])
def test_the_same_bits_in_a_hundred_runs(name: str, mask: str) -> None:
    """For gluon_ordered with more programs than multiprocessors, which start and end as they like."""
    ends = [0, 700, 710, 1999, 3000]
    bands = {
        "causal": [Band(0, 3000, 0, 3000, -INF, 0)],
        "full": [Band(0, 3000, 0, 3000)],
        "window": [Band(0, 3000, 0, 3000, -500, 0)],
        "packed": [Band(a, b, a, b, -INF, 0) for a, b in zip(ends, ends[1:], strict=False)],
    }[mask]
    case = replace(LIBRARY_CASES[0], n_q=3000, n_k=3000, heads=(16, 8), bands=Bands(bands))
    found = backend(name, case)
    for _ in range(50):  # two runs each
        check_repeats(found, case)


def device_errors(name: str, case: Case) -> dict[str, float]:
    """Relative L2 of out and gradients against float64, everything in one call."""
    p = make(case)
    want = oracle(p)
    found = backend(name, case)
    out = torch.full((case.n_q, case.heads[0], case.d_v), torch.nan, dtype=case.dtype)
    state = found.forward(p.q, p.k, p.v, case.bands, p.scores, None, out)
    delta = (p.dout.float() * out.float()).sum(-1) - p.dlse
    sums = [torch.zeros(x.shape) for x in (p.q, p.k, p.v)]
    found.backward(p.dout, p.q, p.k, p.v, delta, state.lse, case.bands, p.scores, *sums)
    got = {"out": out, **{n: s.to(case.dtype) for n, s in zip(("dq", "dk", "dv"), sums, strict=True)}}
    return {n: float((x.double() - want[n]).norm() / want[n].norm()) for n, x in got.items()}


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_errors_are_no_larger_than_those_of_cudnn(mask: str) -> None:
    n = 2048
    bands = Bands([Band(0, n, 0, n, -INF, 0 if mask == "causal" else INF)])
    case = Case("errors", n, n, bands, (4, 4), 128, 128, BF16)
    ours, theirs = device_errors("gluon", case), device_errors("cudnn", case)
    worse = {n: (ours[n], theirs[n]) for n in ours if ours[n] > 1.05 * theirs[n]}
    assert not worse, f"relative L2 of ours and of cuDNN: {worse}"


def test_the_choice_on_this_machine_is_right_for_every_kind_of_call() -> None:
    for case in (*LIBRARY_CASES, fit(ORDINARY[8])):
        p = make(case)
        chosen = choose(p.q.cuda(), p.k.cuda(), p.v.cuda(), p.scores)
        check_backend(OnGpu(chosen.backend), case)


def test_several_streams_and_tables_that_are_dropped() -> None:
    """Launches on other streams while the cache of tables turns over."""
    found = load("gluon")
    q, k, v = (torch.randn(1000, 4, 64, device="cuda", dtype=BF16) for _ in range(3))
    reason = found.reject(q, k, v, Scores(0.1))
    if reason is not None:
        pytest.skip(reason)
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs: list[Tensor] = []
    masks = [Bands([Band(0, 1000, 0, 1000, -200 - n, n)]) for n in range(30)]
    torch.cuda.synchronize()
    for n, bands in enumerate(masks):
        with torch.cuda.stream(streams[n % 3]):
            outs.append(found.forward(q, k, v, bands, Scores(0.1)).o)
    torch.cuda.synchronize()
    for bands, o in zip(masks, outs, strict=True):
        assert torch.equal(found.forward(q, k, v, bands, Scores(0.1)).o, o)
