"""The backward that adds dq in a fixed order, on a CPU: several programs at once under the emulator, and mutants it must refuse.

What this proves: numbers, hand-over of turns as the memory model has it, the same bits whoever runs when, and that nobody
waits for ever with as few as one program at a time. What it does not: how long turns take on hardware.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores
from distattn.kernels.gluon_launch import FUSED, ORDERED, ROWS
from tests.kernels.cases import BASIC, DOCUMENTS, GAPS, WINDOW, Case, check_backend, check_untouched, make, unions

pytest.importorskip("triton", reason="descriptors of the launches are triton's")

from tests.kernels.gluon_emulator import Emulated  # noqa: E402
from tests.kernels.test_gluon import fit  # noqa: E402
from tests.kernels.test_gluon_mutants import swap  # noqa: E402

BF16 = torch.bfloat16
LONG_WINDOW = Bands([Band(0, 520, 0, 520, -200, 0)])
PACKED = Bands([Band(a, b, a, b, -INF, 0) for a, b in ((0, 70), (70, 75), (75, 300), (300, 301), (301, 520))])


@pytest.mark.parametrize("size", ROWS[ORDERED], ids=str)
@pytest.mark.parametrize("bands", [BASIC.bands, GAPS, DOCUMENTS, WINDOW, LONG_WINDOW, PACKED], ids=range(6))
def test_the_ordered_backward(bands: Bands, size: tuple[int, int]) -> None:
    case = replace(fit(BASIC, *size), bands=bands, heads=(4, 2), n_q=520, n_k=520)
    check_backend(Emulated(4, ordered=True), case)
    check_backend(Emulated(2, ordered=True), replace(case, sinks=True, calls=2, heads=(3, 1), n_q=290))


def test_untouched_rows_keep_their_bits() -> None:
    bands = Bands([Band(3, 40, 5, 30, -INF, -4), Band(60, 90, 40, 77), Band(261, 290, 300, 331, 12, INF)])
    check_untouched(Emulated(3, ordered=True), replace(fit(BASIC), bands=bands, n_q=400, n_k=460))


def check_random(data: st.DataObject) -> None:
    n_q, n_k = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 600))
    size, heads = data.draw(st.sampled_from(list(ROWS[ORDERED]))), data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    case = Case("random", n_q, n_k, data.draw(unions(n_q, n_k)), heads, *size, BF16)
    seed, rows = data.draw(st.integers(0, 1 << 20)), {ORDERED: {"stages": data.draw(st.sampled_from([2, 3]))}}
    check_backend(Emulated(seed, data.draw(st.integers(1, 200)), rows, ordered=True), case, seed)


@settings(max_examples=8)
@given(data=st.data())
def test_random_unions(data: st.DataObject) -> None:
    check_random(data)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=200)
@given(data=st.data())
def test_many_random_unions(data: st.DataObject) -> None:
    check_random(data)


def gradients(backend: Emulated, case: Case, seed: int) -> list[torch.Tensor]:
    """dq, dk, dv of the whole case in one call."""
    p = make(case, seed)
    state = backend.forward(p.q, p.k, p.v, case.bands, p.scores)
    sums = [torch.zeros(x.shape) for x in (p.q, p.k, p.v)]
    backend.backward(p.dout, p.q, p.k, p.v, torch.zeros_like(state.lse), state.lse, case.bands, p.scores, *sums)
    return sums


@pytest.mark.parametrize("bands", [Bands([Band(0, 400, 0, 640)]), PACKED], ids=["full", "packed"])
def test_the_same_bits_whoever_runs_when(bands: Bands) -> None:
    case = replace(fit(BASIC), n_q=400, n_k=640, heads=(2, 1), bands=bands, softcap=0.0)
    wanted = gradients(Emulated(0, ordered=True), case, 7)
    assert all(bool(torch.isfinite(x).all()) for x in wanted)
    for seed in range(1, 9):
        found = gradients(Emulated(seed, ordered=True), case, 7)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), f"seed {seed}"


def test_without_an_order_the_bits_depend_on_who_runs_when() -> None:
    """What the test above asserts is not true of itself: the same sums as they come."""
    case = replace(fit(BASIC), n_q=400, n_k=640, heads=(2, 1), bands=Bands([Band(0, 400, 0, 640)]), softcap=0.0)
    found = [gradients(Emulated(seed, deterministic=False), case, 7)[0] for seed in range(1, 5)]
    assert not all(torch.equal(found[0], other) for other in found[1:])


MUTANTS = {
    "sums are counted without a fence": ("gluon_turns", "fence.acq_rel.gpu; red", "red", "race: nothing orders what"),
    "turns are read without acquire": (
        "gluon_turns",
        "again: ld.acquire.gpu",
        "again: ld.relaxed.gpu",
        "race: nothing orders what",
    ),
    "turns are not awaited": (
        "gluon_backward",
        "            mbarrier.wait(turn.index(0), it & 1)\n            before",
        "            before",
        "race: nothing orders what|expects 1 arrivals",
    ),
    "the last turn is not awaited": (
        "gluon_backward",
        "dq = warpgroup_mma_wait(0, deps=[dq])\n        if ORDERED:\n            mbarrier.wait(turn.index(0), it & 1)\n",
        "dq = warpgroup_mma_wait(0, deps=[dq])\n        if ORDERED:\n",
        "race: nothing orders what",
    ),
    "a turn is passed on before the sums are added": (
        "gluon_turns",
        "count_contribution(COUNTERS, words, it - STAGES - 1)",
        "count_contribution(COUNTERS, words, it - STAGES)",
        "race: nothing orders what|gone by|deadlock",
    ),
    "the last turn is passed on before its sums are added": (
        "gluon_loads",
        "    mbarrier.wait(empty.index(it % STAGES), ((it // STAGES) & 1) ^ 1)\n    count_contribution",
        "    count_contribution",
        "race: nothing orders what",
    ),
    "one thread's sums are counted": (
        "gluon_backward",
        "    barrier()  # all threads have read lse and delta before one of them arrives\n",
        "",
        "race",
    ),
    "the last sums of one thread are counted": (
        "gluon_backward",
        "    if ORDERED:\n        barrier()\n        mbarrier.arrive(empty",
        "    if ORDERED:\n        mbarrier.arrive(empty",
        "race: nothing orders what",
    ),
    "ranks are one too low": ("gluon_turns", "    rank = -1 - at\n", "    rank = -2 - at\n", "race: nothing orders what|gone by"),
    "ranks are one too high": ("gluon_turns", "    rank = -1 - at\n", "    rank = 0 - at\n", "deadlock|gone by"),
    "heads share their counters": (
        "gluon_loads",
        "tell(words, slot + 2, 1 + query_head * query_tiles",
        "tell(words, slot + 2, 1 + query_head * 0",
        "gone by|relative L2|race",
    ),
    "a word is told late": (
        "gluon_loads",
        "            barrier()\n            _load_queries(",
        "            _load_queries(",
        "race",
    ),
    "words are overwritten while they are read": (
        "gluon_loads",
        "slot = (it & 7) * 4",
        "slot = (it & 1) * 4",
        "race|gone by|deadlock|relative L2|outside",
    ),
    "the tile of another step": (
        "gluon_backward",
        "told(words, ((it + 7) & 7) * 4 + 2)",
        "told(words, (it & 7) * 4 + 2)",
        "race|relative L2",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulator_refuses(name: str) -> None:
    module, old, new, message = MUTANTS[name]
    case = replace(fit(BASIC), n_q=300, n_k=640, heads=(4, 2), bands=Bands([Band(0, 300, 0, 640)]), out_dtype=BF16)
    with pytest.raises(AssertionError, match=message):
        for seed in (1, 2, 3, 4, 6, 8):  # 2 to 5 programs at once; a missing wait is found when two of them meet
            check_backend(Emulated(seed, ordered=True, replace={module: swap(old, new)}), case)


def test_stages_that_would_race_are_refused() -> None:
    with pytest.raises(AssertionError, match="with 4 stages ds would be overwritten"):
        check_backend(Emulated(ordered=True, rows={ORDERED: {"stages": 4}}), fit(BASIC))


def test_refusals_are_those_of_the_fused_kernel() -> None:
    x = torch.zeros(8, 2, 64, dtype=BF16)
    ordered = Emulated(ordered=True)
    assert ordered.name == "gluon_ordered" and ordered.deterministic and ordered.reject(x, x, x, Scores(1.0)) is None
    assert "know no softcap, found 2.0" in (ordered.reject(x, x, x, Scores(1.0, 2.0)) or "")
    y = torch.zeros(8, 2, 96, dtype=BF16)
    assert "gluon_ordered kernels take head sizes D:D_v of 64:64, 128:128, found 96:96" in (
        ordered.reject(y, y, y, Scores(1.0)) or ""
    )
    assert ROWS[ORDERED].keys() == ROWS[FUSED].keys()
