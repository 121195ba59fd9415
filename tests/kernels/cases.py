"""What every backend must pass: one check, and the cases to run it on.

The oracle is dense attention in float64 under plain autograd, written from the definition of a band and sharing nothing with
the code under test. Errors are relative L2 norms per tensor, so that one wrong row in a thousand shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Backend, Scores, State, accumulate_dtype, empty_state

# Inputs are exact in float64, so these bound the arithmetic alone: about 10 roundings of the accumulate dtype; in bf16 and fp16
# a kernel may round p and ds to the input dtype before its matrix products (2e-3 and 3e-4 measured).
TOLERANCE = {torch.float64: 2e-14, torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
GARBAGE = 3e4  # finite in every dtype


@dataclass(frozen=True)
class Case:
    """One problem. ``bands`` are in rows of q and of k; ``calls`` cuts the keys into that many calls on one state."""

    name: str
    n_q: int
    n_k: int
    bands: Bands
    heads: tuple[int, int] = (2, 2)
    d: int = 16
    d_v: int = 16
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    sinks: bool = False
    calls: int = 1
    out_dtype: torch.dtype | None = None
    strided: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Problem:
    """The tensors of a case. ``dlse`` is 0 for rows without keys and sink, whose lse is -inf whatever the inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    sinks: Tensor | None
    scores: Scores
    visible: Tensor


def visible_pairs(bands: Bands, n_q: int, n_k: int) -> Tensor:
    """bool [n_q, n_k], by the definition of a band."""
    i, j = np.arange(n_q)[:, None], np.arange(n_k)[None]
    seen = np.zeros((n_q, n_k), dtype=bool)
    for q0, q1, k0, k1, lo, hi in bands.table.tolist():
        seen |= (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
    return torch.from_numpy(seen)


def make(case: Case, seed: int = 0) -> Problem:
    """Random inputs of order one; rows of k and v that nobody sees hold garbage, and so does what lies between strided rows."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(rows: int, heads: int, width: int) -> Tensor:
        values = torch.randn(rows, heads, width, generator=generator, dtype=torch.float64).to(case.dtype)
        if not case.strided:
            return values
        spread = torch.full((rows, heads + 1, width + 8), torch.nan, dtype=case.dtype)
        spread[:, 1:, :width] = values
        return spread[:, 1:, :width]

    heads, kv_heads = case.heads
    q, k, v = tensor(case.n_q, heads, case.d), tensor(case.n_k, kv_heads, case.d), tensor(case.n_k, kv_heads, case.d_v)
    visible = visible_pairs(case.bands, case.n_q, case.n_k)
    unseen = ~visible.any(0)
    k[unseen], v[unseen] = GARBAGE, -GARBAGE
    dout = tensor(case.n_q, heads, case.d_v)
    dlse = torch.randn(case.n_q, heads, generator=generator, dtype=torch.float64).to(accumulate_dtype(case.dtype))
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64) if case.sinks else None
    if sinks is None:
        dlse[~visible.any(1)] = 0.0
    # a few rows with a gradient into lse only, and a few with none
    dout[::7] = 0.0
    dlse[::14] = 0.0
    return Problem(q, k, v, dout, dlse, sinks, Scores(case.d**-0.5 * 1.3, case.softcap), visible)


def oracle(p: Problem) -> dict[str, Tensor]:
    """out, lse and all gradients in float64 by autograd of dense attention."""
    q, k, v = (x.double().clone().requires_grad_() for x in (p.q, p.k, p.v))
    sinks = None if p.sinks is None else p.sinks.clone().requires_grad_()
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * p.scores.scale
    if p.scores.softcap:
        s = p.scores.softcap * torch.tanh(s / p.scores.softcap)
    s = s.masked_fill(~p.visible, -torch.inf)
    column = torch.full_like(s[:, :, :1], -torch.inf) if sinks is None else sinks[:, None, None].expand(-1, len(q), 1)
    s = torch.cat([s, column], -1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)[..., :-1]
    out = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, 1))
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf).T
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out * p.dout.double()).sum() + (finite * p.dlse.double()).sum()
    names, leaves = ["dq", "dk", "dv"], [q, k, v]
    if sinks is not None:
        names, leaves = [*names, "dsinks"], [*leaves, sinks]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def parts(case: Case) -> list[Bands]:
    """The bands of each call: the keys cut into ``case.calls`` runs."""
    found, rest = [], case.bands
    for n in range(1, case.calls):
        part, rest = rest.split_keys(case.n_k * n // case.calls)
        found.append(part)
    return [*found, rest]


def run(backend: Backend, case: Case, p: Problem) -> dict[str, Tensor]:
    """What the backend makes of a problem: outputs over NaN, gradients added to numbers of order one and taken off again."""
    dtype = accumulate_dtype(case.dtype)
    heads = case.heads[0]
    state = empty_state(p.q, case.d_v, p.sinks) if p.sinks is not None else None
    work = parts(case)
    for bands in work[:-1]:
        state = backend.forward(p.q, p.k, p.v, bands, p.scores, state)
    out = None if case.out_dtype is None else torch.full((case.n_q, heads, case.d_v), torch.nan, dtype=case.out_dtype)
    state = backend.forward(p.q, p.k, p.v, work[-1], p.scores, state, out)
    out = state.o if out is None else out
    assert state.lse.dtype == dtype and state.lse.shape == (case.n_q, heads)
    assert out.shape == (case.n_q, heads, case.d_v) and (case.out_dtype is not None or out.dtype == dtype)

    delta = (p.dout.to(dtype) * out.to(dtype)).sum(-1) - p.dlse
    bases = [torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape) for x in (p.q, p.k, p.v)]
    sums = [base.clone() for base in bases]
    for bands in work:
        backend.backward(p.dout, p.q, p.k, p.v, delta, state.lse, bands, p.scores, *sums)
    grads = {name: total - base for name, total, base in zip(("dq", "dk", "dv"), sums, bases, strict=True)}
    if p.sinks is not None:
        grads["dsinks"] = -(torch.exp(p.sinks - state.lse) * delta).sum(0)
    return {"out": out, "lse": state.lse, **grads}


def sink_terms(p: Problem, want: dict[str, Tensor]) -> Tensor:
    """What the gradients of the sinks are sums of, float64 [n_q, heads]."""
    return torch.exp(p.sinks - want["lse"]) * ((p.dout.double() * want["out"]).sum(-1) - p.dlse.double())


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Relative L2; tensors smaller than a quarter on average are measured against a quarter, as inputs are of order one."""
    floor = max(floor, 0.25 * want.numel() ** 0.5)
    return float((got.double() - want).norm() / max(float(want.norm()), floor, 1e-30))


def check_backend(backend: Backend, case: Case, seed: int = 0) -> None:
    """Asserts that ``backend`` computes ``case``: out, lse, dq, dk, dv and, with sinks, dsinks."""
    p = make(case, seed)
    assert backend.reject(p.q, p.k, p.v, p.scores) is None, backend.reject(p.q, p.k, p.v, p.scores)
    got, want = run(backend, case, p), oracle(p)
    empty = want["lse"] == -torch.inf
    assert torch.equal(got["lse"] == -torch.inf, empty), "lse is -inf in the wrong rows"
    assert not got["out"][empty].any(), "out is not 0 in rows without keys"
    errors = {}
    for name, expected in want.items():
        actual = got[name]
        if name == "lse":
            actual, expected = actual.masked_fill(empty, 0.0), expected.masked_fill(empty, 0.0)
        # dsinks sums a number a row of either sign, each rounded by itself: measured against what is summed
        floor = float(sink_terms(p, want).norm()) if name == "dsinks" else 0.0
        errors[name] = relative_error(actual, expected, floor)
    rounded = case.out_dtype or case.dtype
    tolerance = {name: max(TOLERANCE[case.dtype], TOLERANCE[rounded]) for name in errors}
    tolerance["lse"] = TOLERANCE[case.dtype]
    wrong = {name: error for name, error in errors.items() if not error <= tolerance[name]}
    assert not wrong, f"{backend.name} on {case}: relative L2 {wrong}, allowed {tolerance}"


def check_repeats(backend: Backend, case: Case) -> None:
    """Asserts that two runs give the same bits."""
    p = make(case)
    first, second = run(backend, case, p), run(backend, case, p)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{backend.name} on {case}: {different} differ from run to run"


def check_untouched(backend: Backend, case: Case) -> None:
    """Asserts that rows which no band touches keep the bits of the state that was given, and their accumulators theirs."""
    p = make(case)
    shape = case.n_q, case.heads[0]
    given = State(torch.randn(*shape, case.d_v), torch.randn(*shape))
    state = State(*(x.clone() for x in given))
    returned = backend.forward(p.q, p.k, p.v, case.bands, p.scores, state)
    assert returned.o.data_ptr() == state.o.data_ptr() and returned.lse.data_ptr() == state.lse.data_ptr(), "goes on in place"
    idle = ~p.visible.any(1)
    assert torch.equal(state.o[idle], given.o[idle]) and torch.equal(state.lse[idle], given.lse[idle])
    assert not torch.equal(state.o[~idle], given.o[~idle])
    sums = [torch.randn(x.shape) for x in (p.q, p.k, p.v)]
    before = [x.clone() for x in sums]
    backend.backward(p.dout, p.q, p.k, p.v, torch.randn(shape), torch.randn(shape) + 5, case.bands, p.scores, *sums)
    for total, base, rows in zip(sums, before, (idle, ~p.visible.any(0), ~p.visible.any(0)), strict=True):
        assert torch.equal(total[rows], base[rows])


def causal(n: int, start: int = 0) -> Band:
    return Band(start, start + n, start, start + n, -INF, 0)


DOCUMENTS = Bands([causal(37), causal(1, 37), causal(64, 38), causal(31, 102)])
WINDOW = Bands([Band(0, 133, 0, 133, -20, 0)])
GAPS = Bands(
    [Band(3, 40, 5, 30, -INF, -4), Band(60, 90, 40, 77), Band(60, 90, 90, 101, 12, INF), Band(95, 110, 20, 110, -70, -30)]
)

BASIC = Case("causal", 133, 133, Bands([causal(133)]))
CASES = [
    BASIC,
    replace(BASIC, name="full", n_k=77, bands=Bands([Band(0, 133, 0, 77)])),
    replace(BASIC, name="causal, more rows than keys", n_k=60, bands=Bands([Band(0, 133, 0, 60, -INF, 0)])),
    replace(BASIC, name="causal, rows without keys", bands=Bands([Band(0, 133, 0, 133, -INF, -1)]), heads=(4, 2)),
    replace(BASIC, name="bottom-right causal", n_q=70, bands=Bands([Band(0, 70, 0, 133, -INF, 63)])),
    replace(BASIC, name="lo only", n_k=70, bands=Bands([Band(0, 133, 0, 70, -63, INF)])),
    replace(BASIC, name="window", bands=WINDOW, heads=(4, 1)),
    replace(BASIC, name="symmetric window", bands=Bands([Band(0, 133, 0, 133, -9, 9)])),
    replace(BASIC, name="documents", bands=DOCUMENTS, heads=(4, 2)),
    replace(BASIC, name="window and first keys", bands=Bands([Band(0, 133, 4, 133, -20, 0), Band(0, 133, 0, 4, -INF, 0)])),
    replace(BASIC, name="gaps", bands=GAPS, n_k=120),
    replace(BASIC, name="no bands", bands=Bands()),
    replace(BASIC, name="no keys", n_k=0, bands=Bands()),
    replace(BASIC, name="one row", n_q=1, n_k=1, bands=Bands([Band(0, 1, 0, 1)])),
    replace(BASIC, name="small D_v", d=24, d_v=8),
    replace(BASIC, name="small D", d=8, d_v=40, bands=DOCUMENTS),
    replace(BASIC, name="odd head sizes", d=20, d_v=12, heads=(6, 2), bands=WINDOW),
    replace(BASIC, name="softcap", softcap=1.5, heads=(4, 2), bands=DOCUMENTS),
    replace(BASIC, name="softcap, window, two calls", softcap=0.8, calls=2, bands=WINDOW, sinks=True),
    replace(BASIC, name="sinks", sinks=True, heads=(4, 2)),
    replace(BASIC, name="sinks, rows without keys", sinks=True, bands=GAPS),
    replace(BASIC, name="three calls", calls=3, heads=(4, 2)),
    replace(BASIC, name="three calls, gaps, sinks", calls=3, sinks=True, bands=GAPS),
    replace(BASIC, name="out bf16", out_dtype=torch.bfloat16, calls=2),
    replace(BASIC, name="bf16", dtype=torch.bfloat16, out_dtype=torch.bfloat16, heads=(4, 2), bands=DOCUMENTS),
    replace(BASIC, name="bf16, two calls", dtype=torch.bfloat16, calls=2, strided=True, sinks=True),
    replace(BASIC, name="fp16", dtype=torch.float16, bands=WINDOW),
    replace(BASIC, name="float64", dtype=torch.float64, bands=GAPS, calls=2, heads=(4, 2), sinks=True, d_v=6),
    replace(BASIC, name="strided", strided=True, heads=(4, 2), bands=DOCUMENTS),
    replace(BASIC, name="strided, out", strided=True, out_dtype=torch.float32, bands=GAPS),
]


@st.composite
def unions(draw: st.DrawFn, n_q: int, n_k: int, most: int = 5) -> Bands:
    """Random disjoint bands: whatever overlaps what is there already is left out."""
    taken: list[Band] = []
    for _ in range(draw(st.integers(1, most))):
        q0, q1 = sorted((draw(st.integers(0, n_q)), draw(st.integers(0, n_q))))
        k0, k1 = sorted((draw(st.integers(0, n_k)), draw(st.integers(0, n_k))))
        lo = draw(st.one_of(st.just(-INF), st.integers(-n_q, n_k)))
        hi = draw(st.one_of(st.just(INF), st.sampled_from([0, -1]), st.integers(-n_q, n_k)))
        band = Band(q0, q1, k0, k1, lo, hi)
        seen = visible_pairs(Bands([band]), n_q, n_k)
        if not (seen & visible_pairs(Bands(taken), n_q, n_k)).any():
            taken.append(band)
    return Bands(taken)
