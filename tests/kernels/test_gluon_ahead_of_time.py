"""The Hopper kernels compiled for a GPU that is not here: partitions in place, nothing spilled, everything fits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.6", reason="Gluon is part of triton 3.6 and newer")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton's compiler, and this process interprets", allow_module_level=True)

from distattn.kernels.gluon_ahead_of_time import CALLS, KINDS, Case, Compiled, all_cases, compile_case, record  # noqa: E402
from distattn.kernels.gluon_launch import FORWARD, FUSED, KEYS, ORDERED, QUERIES, ROWS, SCRATCH  # noqa: E402

# 12 compilations; everything else is in the long tier.
SHORT = [
    Case(FORWARD, 128, 128),
    Case(FORWARD, 128, 128, "state", softcap=True),
    Case(FORWARD, 64, 64),
    Case(FORWARD, 192, 128, "last"),
    Case(KEYS, 128, 128),
    Case(QUERIES, 128, 128),
    Case(QUERIES, 256, 256),
    Case(FUSED, 64, 64),
    Case(FUSED, 128, 128),
    Case(ORDERED, 64, 64),
    Case(ORDERED, 128, 128),
    Case(KEYS, 256, 256),
]


def name(case: Case) -> str:
    return f"{case.kind}-{case.d}-{case.d_v}-{case.call}{'-softcap' * case.softcap}"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A fresh cache, so that a test compiles what is in the tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("case", SHORT, ids=name)
def test_a_variant_is_fit_to_ship(case: Case) -> None:
    made = compile_case(case)
    assert made.violations == [], made
    assert made.warps == 12 and made.registers == 168 and made.setmaxnreg >= 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in all_cases() if case not in SHORT], ids=name)
def test_every_variant_is_fit_to_ship(case: Case) -> None:
    assert compile_case(case).violations == []


THREE_CONSUMERS = {"consumers": 3, "stages": 4, "registers": 160, "producer_registers": 32, "entry_registers": 128}
MEASURED = [
    *((Case(FORWARD, 64, 64, call, softcap), THREE_CONSUMERS) for call in CALLS for softcap in (False, True)),
    *((Case(FORWARD, size, size), {"maximum_first": True}) for size in (64, 128)),
    *((Case(FORWARD, size, size), {"maximum_first": True, "ping_pong": False}) for size in (64, 128)),
    (Case(FORWARD, 128, 128), {"ping_pong": False}),
    (Case(FORWARD, 128, 128), {"block_k": 64, "stages": 4}),
    *((Case(KEYS, size, size), {"values_first": True}) for size in (64, 128)),
    (Case(KEYS, 128, 128), {"stages": 3}),
    (Case(KEYS, 128, 128), {"values_first": True, "stages": 3}),
    (Case(FUSED, 128, 128), {"values_first": True}),
    (Case(FUSED, 128, 128), {"stages": 3}),
    (Case(FUSED, 128, 128), {"values_first": True, "stages": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case, change", MEASURED, ids=str)
def test_launches_that_are_to_be_measured(case: Case, change: dict[str, Any]) -> None:
    assert compile_case(case, change).violations == []


@pytest.mark.slow
def test_spills_are_found() -> None:
    made = compile_case(Case(FORWARD, 128, 128), {"block_k": 256, "stages": 1, "stage_out": False})
    assert made.spills_in_loops and len(made.violations) >= 2


def test_what_is_compiled_is_what_is_launched() -> None:
    cases = all_cases()
    assert {case.kind for case in cases} == set(KINDS) and {case.call for case in cases} == set(CALLS)
    assert {(case.d, case.d_v) for case in cases if case.kind == FORWARD} == set(ROWS[FORWARD])
    state, last, out = (record(Case(FORWARD, 64, 64, call)).named for call in ("state", "last", "out"))
    assert (state["STATE"], last["STATE"], out["STATE"]) == (True, True, False) and not state["ALL_ROWS"] and last["ALL_ROWS"]
    assert out["TMA_OUT"] and not last["TMA_OUT"]
    assert record(Case(FUSED, 64, 64)).named["STATISTICS_FIRST"] and not record(Case(KEYS, 64, 64)).named["STATISTICS_FIRST"]
    assert record(Case(KEYS, 128, 128, softcap=True)).named["BLOCK_Q"] < record(Case(KEYS, 128, 128)).named["BLOCK_Q"]
    assert record(Case(KEYS, 256, 256)).named["KEY_TILES"] == 1
    assert record(Case(SCRATCH, 128, 128)).named["D"] == 128
    ordered, fused = (record(Case(kind, 128, 128)).named for kind in (ORDERED, FUSED))
    assert ordered["ORDERED"] and ordered["FUSED"] and {**ordered, "ORDERED": False} == fused


def test_registers_fit_into_a_multiprocessor() -> None:
    """setmaxnreg beyond the register file is not refused: the kernel hangs."""
    for rows in ROWS.values():
        for row in rows.values():
            consumers = getattr(row, "consumers", 2)
            asked = consumers * row.registers + row.producer_registers  # type: ignore[attr-defined]
            assert asked <= (consumers + 1) * row.entry_registers <= 512  # type: ignore[attr-defined]
            assert row.registers % 8 == row.producer_registers % 8 == row.entry_registers % 8 == 0  # type: ignore[attr-defined]


def test_every_violation_has_a_line() -> None:
    good = Compiled(Case(KEYS, 128, 128), 1.0, 12, 168, 0, 0, 227 << 10, 48, 8, False, 64)
    assert good.violations == []
    assert replace(good, spills=4).violations == ["spills 4 bytes"]
    assert replace(good, spills=8, spills_in_loops=2).violations == [
        "2 instructions of its loops move spilled registers",
        "spills 8 bytes",
    ]
    assert replace(good, shared=good.shared + 1).violations == ["232449 bytes of shared memory, sm_90 has 232448"]
    assert replace(good, pairs=0).violations == ["the float32 numbers of its tiles move one by one"]
    assert replace(good, pairs=0, case=Case(FORWARD, 128, 128)).violations == []
    assert replace(good, serialized=True).violations == ["its wgmma run one by one"]
    assert replace(good, wgmma=0, setmaxnreg=0, warps=4).violations == [
        "no wgmma",
        "4 warps: the partitions were lost",
        "no setmaxnreg",
    ]
    assert replace(good, case=Case(SCRATCH, 128, 128), wgmma=0, setmaxnreg=0, warps=4).violations == []
