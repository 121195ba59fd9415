"""The Hopper kernels on a CPU: their source under the emulator against dense attention, and mutants that the emulator must catch.

What this proves: the mathematics over any bands, every index, every wait and every hand-over. What it does not: that the
hardware and triton's compiler do what the emulator takes them to do; :mod:`tests.kernels.test_gpu` is for that.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distattn.kernels
from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores
from distattn.kernels.gluon_backend import GluonBackend
from distattn.kernels.gluon_launch import FORWARD, FUSED, KEYS, ROWS
from tests.kernels.cases import BASIC, CASES, DOCUMENTS, GAPS, WINDOW, Case, check_backend, check_repeats, check_untouched, unions

pytest.importorskip("triton", reason="descriptors of the launches are triton's")

from tests.kernels.gluon_emulator import SMALL, Emulated  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16


def fit(case: Case, d: int = 64, d_v: int | None = None) -> Case:
    """The case at a head size that the kernels take, in 16 bits."""
    dtype = case.dtype if case.dtype in (BF16, F16) else BF16
    out = dtype if case.out_dtype else None
    return replace(case, d=d, d_v=d_v or d, dtype=dtype, out_dtype=out)


ORDINARY = [case for case in CASES if case.d == case.d_v == 16 and case.dtype != torch.float64]


@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_what_every_backend_must_pass(case: Case) -> None:
    check_backend(Emulated(rows=SMALL), fit(case))


@pytest.mark.parametrize("size", ROWS[FORWARD], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_every_head_size_with_the_tiles_that_ship(size: tuple[int, int], softcap: float) -> None:
    case = Case("sizes", 200, 290, Bands([Band(0, 200, 0, 290, -INF, 60)]), (4, 2), *size, BF16, softcap, calls=2, sinks=True)
    check_backend(Emulated(), case)
    check_backend(Emulated(), replace(case, dtype=F16, bands=DOCUMENTS, calls=1, sinks=False, out_dtype=F16))


@pytest.mark.parametrize("size", ROWS[FUSED], ids=str)
@pytest.mark.parametrize("case", [BASIC, *(replace(BASIC, bands=bands) for bands in (GAPS, DOCUMENTS, WINDOW))], ids=range(4))
def test_the_fused_backward(case: Case, size: tuple[int, int]) -> None:
    check_backend(Emulated(deterministic=False), replace(fit(case, *size), heads=(4, 2), n_q=150, n_k=140))
    check_backend(Emulated(deterministic=False), replace(fit(case, *size), sinks=True, calls=2))


@settings(max_examples=25)
@given(
    bands=unions(210, 170),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    size=st.sampled_from([(64, 64), (64, 64), (96, 96), (192, 128)]),
    dtype=st.sampled_from([BF16, F16]),
    calls=st.integers(1, 3),
    sinks=st.booleans(),
    strided=st.booleans(),
    final=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 1.2]),
    seed=st.integers(0, 1 << 20),
    processors=st.integers(1, 5),
)
def test_random_unions(bands, heads, size, dtype, calls, sinks, strided, final, softcap, seed, processors) -> None:  # type: ignore[no-untyped-def]
    case = Case(
        "random", 210, 170, bands, heads, *size, dtype, softcap, sinks, calls, dtype if final else None, strided
    )  # fmt: skip
    check_backend(Emulated(seed, processors, SMALL), case, seed)
    if size == (64, 64) and not softcap:
        check_backend(Emulated(seed, processors, deterministic=False), case, seed)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=300)
@given(data=st.data())
def test_many_random_unions(data: st.DataObject) -> None:
    n_q, n_k = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    size = data.draw(st.sampled_from(list(ROWS[FORWARD])))
    case = Case(
        "random", n_q, n_k, data.draw(unions(n_q, n_k, 8)), data.draw(st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)])), *size,
        data.draw(st.sampled_from([BF16, F16])), data.draw(st.sampled_from([0.0, 1.2])), data.draw(st.booleans()),
        data.draw(st.integers(1, 3)), strided=data.draw(st.booleans()),
    )  # fmt: skip
    values_first = {"values_first": data.draw(st.booleans())}
    rows = {FORWARD: {"maximum_first": data.draw(st.booleans()), "ping_pong": data.draw(st.booleans())}, KEYS: values_first}
    seed = data.draw(st.integers(0, 1 << 20))
    check_backend(Emulated(seed, data.draw(st.integers(1, 9)), rows), case, seed)
    if size in ROWS[FUSED] and not case.softcap:
        check_backend(Emulated(seed, deterministic=False), case, seed)


@pytest.mark.parametrize(
    "change", [{"ping_pong": False}, {"maximum_first": True}, {"consumers": 3}, {"stages": 2}, {"stage_out": False}]
)
def test_other_launches_of_the_forward(change: dict[str, object]) -> None:
    case = replace(fit(BASIC), n_q=300, n_k=300, bands=Bands([Band(0, 300, 0, 300, -INF, 0)]), out_dtype=BF16)
    check_backend(Emulated(rows={FORWARD: {"block_k": 32, **change}}), case)


@pytest.mark.parametrize(
    "kind, size, change",
    [
        (KEYS, (64, 64), {"values_first": True}),
        (KEYS, (96, 96), {"values_first": True, "stages": 3}),
        (KEYS, (256, 256), {"values_first": True}),
        (FUSED, (64, 64), {"values_first": True}),
        (FUSED, (128, 128), {"values_first": True, "stages": 3}),
    ],
    ids=str,
)
def test_other_launches_of_the_backward(kind: str, size: tuple[int, int], change: dict[str, object]) -> None:
    case = replace(fit(BASIC, *size), n_q=300, n_k=200, bands=Bands([Band(0, 300, 0, 200, -INF, 90)]))
    check_backend(Emulated(deterministic=kind == KEYS, rows={kind: change}), case)


def test_the_fused_backward_refuses_stages_that_would_race() -> None:
    with pytest.raises(AssertionError, match="with 4 stages ds would be overwritten"):
        check_backend(Emulated(deterministic=False, rows={FUSED: {"stages": 4}}), fit(BASIC))


@pytest.mark.parametrize("softcap, deterministic", [(0.0, True), (2.0, True), (0.0, False)])
def test_untouched_rows_keep_their_bits(softcap: float, deterministic: bool) -> None:
    bands = Bands([Band(3, 40, 5, 30, -INF, -4), Band(60, 90, 40, 77), Band(261, 290, 300, 331, 12, INF)])
    case = replace(fit(BASIC), bands=bands, n_q=400, n_k=460, softcap=softcap)
    check_untouched(Emulated(deterministic=deterministic), case)


def test_the_same_bits_whoever_runs_when() -> None:
    case = replace(fit(BASIC), n_q=200, n_k=200, heads=(4, 2), bands=Bands([Band(0, 200, 0, 200, -INF, 0)]))
    check_repeats(Emulated(rows=SMALL), case)  # launches are numbered, and every launch draws anew


def test_no_variable_is_set_to_a_literal_in_a_loop() -> None:
    """The compiler takes a literal for a constant and does not carry it: the emulator, which is Python, would not notice."""
    folder = Path(distattn.kernels.__file__).parent
    for path in folder.glob("gluon_*.py"):
        if path.stem in ("gluon_backend", "gluon_launch", "gluon_order", "gluon_schedule", "gluon_ahead_of_time"):
            continue
        loops = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.For)]
        literals = [
            f"{path.name}:{statement.lineno}"
            for loop in loops
            for statement in ast.walk(loop)
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        ]
        assert not literals, literals


# ---- what the backend refuses


def reason(
    q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None, scale: float = 1.0, **options: bool
) -> str:
    class Here(GluonBackend):
        def _reject_device(self, device: torch.device) -> str | None:
            return None

    k = q if k is None else k
    return Here(**options).reject(q, k, k if v is None else v, Scores(scale)) or ""


def test_refusals_name_what_was_found() -> None:
    x = torch.zeros(8, 2, 64, dtype=BF16)
    assert reason(x) == ""
    assert "found torch.float32" in reason(x.float())
    assert "torch.float16" in reason(x, x.half())
    assert "found 80:80" in reason(torch.zeros(8, 2, 80, dtype=BF16))
    assert "found 96:96" in reason(torch.zeros(8, 2, 96, dtype=BF16), deterministic=False)
    assert "know no softcap, found 2.0" in (Emulated(deterministic=False).reject(x, x, x, Scores(1.0, 2.0)) or "")
    assert "found 64:128" in reason(x, x, torch.zeros(8, 2, 128, dtype=BF16))
    assert "scales > 0, found 0.0" in reason(x, scale=0.0)
    head_major = torch.zeros(2, 8, 64, dtype=BF16).transpose(0, 1)
    assert "found k with strides (64, 512, 1) with heads outside of tokens" in reason(x, head_major)
    assert "multiples of 16 bytes" in reason(torch.zeros(8, 2, 68, dtype=BF16)[..., :64])
    assert "multiples of 16 bytes" in reason(torch.zeros(1025, dtype=BF16)[1:].view(8, 2, 64))
    assert "compute capability 9.0, found tensors on cpu" in (GluonBackend().reject(x, x, x, Scores(1.0)) or "")
