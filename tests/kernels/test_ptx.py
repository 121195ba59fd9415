"""The Hopper kernels as they are compiled, run on a CPU: the PTX that triton makes of them against dense attention in float64.

:mod:`tests.kernels.test_gluon` runs their source. Here the compiler has had its say: layouts, swizzles, descriptors,
fragments, phases, partitions, predicates, addresses. What is left is the assembler and the chip, for
:mod:`tests.kernels.test_gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="Gluon is part of triton 3.6 and newer")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton's compiler, and this process interprets", allow_module_level=True)

from distattn.kernels.bands import INF, Band, Bands  # noqa: E402
from distattn.kernels.gluon_launch import ADD, FORWARD, FUSED, KEYS, MERGE, ORDERED, QUERIES, ROWS, SCRATCH  # noqa: E402
from tests.kernels.cases import DOCUMENTS, GAPS, WINDOW, Case, check_backend, check_repeats, check_untouched  # noqa: E402
from tests.kernels.gluon_emulator import FREE  # noqa: E402
from tests.kernels.gluon_machine import KernelError  # noqa: E402
from tests.kernels.ptx_global import GlobalMemory  # noqa: E402
from tests.kernels.ptx_launch import Compiled, execute  # noqa: E402
from tests.kernels.ptx_parse import PtxError, parse  # noqa: E402
from tests.kernels.ptx_translate import translate  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16
LONG = Bands([Band(0, 200, 0, 290, -INF, 60)])
# several tiles an item, several items a program, a ragged end, two query heads a key head
RAGGED = Case("ragged", 200, 290, LONG, (4, 2), 64, 64, BF16, out_dtype=BF16)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# ---- right numbers


def test_out_at_once_and_all_gradients() -> None:
    backend = Compiled()
    check_backend(backend, RAGGED)
    check_backend(backend, replace(RAGGED, bands=GAPS))
    assert [r.kind for r in backend.reports] == ["forward", "key_gradient", "query_gradient"] * 2
    for report in backend.reports:
        assert report.shared.units == report.shared.ideal, f"{report.kind} has conflicts in shared memory"
        assert report.instructions["wgmma"] and report.loaded.units == report.loaded.ideal


def test_a_state_that_goes_on() -> None:
    check_backend(Compiled(seed=1), replace(RAGGED, calls=2, sinks=True, out_dtype=None))


def test_the_fused_backward() -> None:
    backend = Compiled(seed=2, deterministic=False)
    check_backend(backend, replace(RAGGED, bands=DOCUMENTS, n_q=150, n_k=140))
    assert {r.kind for r in backend.reports} == {FORWARD, FUSED, SCRATCH}
    fused = next(r for r in backend.reports if r.kind == FUSED)
    assert fused.stored.units == fused.stored.ideal, "the adds of dq are not whole sectors"


def test_items_that_are_cut() -> None:
    """Of one head: its strides are its width, which the compiler makes use of."""
    backend = Compiled(seed=3, processors=9, costs=FREE)
    check_backend(backend, replace(RAGGED, heads=(1, 1)))
    assert [r.kind for r in backend.reports] == [FORWARD, MERGE, KEYS, ADD, QUERIES, ADD]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ROWS[FORWARD], ids=str)
def test_items_that_are_cut_of_every_head_size(size: tuple[int, int]) -> None:
    case = replace(RAGGED, d=size[0], d_v=size[1], calls=2, sinks=True)
    backend = Compiled(seed=4, processors=21, costs=FREE)
    for each in (case, replace(case, out_dtype=None, dtype=F16, softcap=1.5)):
        check_backend(backend, each)
    assert {MERGE, ADD} <= {r.kind for r in backend.reports}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ROWS[FORWARD], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_every_head_size(size: tuple[int, int], softcap: float) -> None:
    d, d_v = size
    case = replace(RAGGED, d=d, d_v=d_v, softcap=softcap, calls=2, sinks=True)
    check_backend(Compiled(seed=3), case)  # "last": goes on from a state and writes 16 bits
    check_backend(Compiled(seed=4), replace(case, out_dtype=None, bands=GAPS))  # "state"
    check_backend(Compiled(seed=5), replace(case, calls=1, sinks=False, dtype=F16, out_dtype=F16, bands=DOCUMENTS))  # "out"
    check_backend(Compiled(seed=6), replace(case, calls=1, sinks=False, out_dtype=None, strided=True, bands=WINDOW))  # "fresh"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ROWS[FUSED], ids=str)
def test_the_fused_backward_of_every_head_size(size: tuple[int, int]) -> None:
    case = replace(RAGGED, d=size[0], d_v=size[1], n_q=150, n_k=140, out_dtype=None)
    for seed, bands in enumerate((GAPS, DOCUMENTS, WINDOW)):
        check_backend(Compiled(seed, deterministic=False), replace(case, bands=bands))
    check_backend(Compiled(7, deterministic=False), replace(case, bands=WINDOW, dtype=F16, calls=2, sinks=True, strided=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ROWS[ORDERED], ids=str)
def test_the_ordered_backward_of_every_head_size(size: tuple[int, int]) -> None:
    """Programs of a head meet: three at a time, which wait for each other's counters."""
    causal = Bands([Band(0, 260, 0, 290, -INF, 30)])
    case = replace(RAGGED, d=size[0], d_v=size[1], n_q=260, bands=causal, out_dtype=None)
    backend = Compiled(8, ordered=True)
    check_backend(backend, case)
    check_backend(backend, replace(case, bands=WINDOW))
    check_repeats(backend, case)
    assert {r.kind for r in backend.reports} == {FORWARD, ORDERED, SCRATCH}


CHANGES: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    (FORWARD, (64, 64), {"consumers": 3, "registers": 160, "producer_registers": 32, "entry_registers": 128}),
    (FORWARD, (128, 128), {"maximum_first": True}),
    (FORWARD, (64, 64), {"maximum_first": True, "ping_pong": False}),
    (FORWARD, (128, 128), {"block_k": 64, "stages": 4}),
    (KEYS, (64, 64), {"values_first": True}),
    (KEYS, (128, 128), {"values_first": True, "stages": 3}),
    (FUSED, (128, 128), {"values_first": True, "stages": 3}),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind, size, change", CHANGES, ids=str)
def test_launches_that_are_to_be_measured(kind: str, size: tuple[int, int], change: dict[str, Any]) -> None:
    case = replace(RAGGED, d=size[0], d_v=size[1], n_q=400)
    check_backend(Compiled(deterministic=kind != FUSED, rows={kind: change}), case)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_untouched_rows_keep_their_bits(deterministic: bool) -> None:
    bands = Bands([Band(3, 40, 5, 30, -INF, -4), Band(60, 90, 40, 77), Band(261, 290, 300, 331, 12, INF)])
    check_untouched(Compiled(deterministic=deterministic), replace(RAGGED, bands=bands, n_q=400, n_k=460))


@pytest.mark.slow
def test_the_same_bits_whoever_runs_when() -> None:
    check_repeats(Compiled(), RAGGED)  # launches are numbered, and every launch draws anew


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_other_orders(seed: int) -> None:
    case = replace(RAGGED, d=64, n_q=300, bands=Bands([Band(0, 300, 0, 290, -INF, 0)]))
    check_backend(Compiled(100 + seed, processors=1 + seed % 4), case, seed)


# ---- small programs


def run_text(body: str, out: torch.Tensor, programs: int = 1, seed: int = 0) -> None:
    """Runs a body of PTX whose only parameter is the address of ``out``."""
    memory = GlobalMemory()
    address = memory.add(out, "out")
    execute(translate(parse(HEAD + body + "\nret;\n}\n")), 1024, memory, {"k_param_0": address}, {}, (programs,), seed)


PLACE = "mov.u32 %r0, %tid.x; mov.u32 %r3, %ctaid.x; ld.param.b64 %rd0, [k_param_0]; mad.wide.u32 %rd1, %r0, 4, %rd0;"


def test_lanes_that_part_meet_again() -> None:
    """Every lane counts down from its number in a loop of its own, odd lanes by another way."""
    out = torch.full((128,), -1, dtype=torch.int32)
    body = """
    and.b32 %r1, %r0, 1; setp.eq.b32 %p0, %r1, 0; mov.b32 %r2, 0; mov.b32 %r1, %r0; @%p0 bra EVEN;
    add.s32 %r2, %r2, 1000;
    EVEN: setp.eq.b32 %p1, %r1, 0; @%p1 bra DONE;
    add.s32 %r1, %r1, -1; add.s32 %r2, %r2, 2; bra.uni EVEN;
    DONE: st.global.b32 [ %rd1 + 0 ], { %r2 };
    """
    run_text(PLACE + body, out)
    lane = torch.arange(128)
    assert torch.equal(out, (lane * 2 + lane % 2 * 1000).to(torch.int32))


COUNTED = """
{ .reg .pred p; .reg .b32 v; setp.ne.u32 p, %r0, 0;
@p bra done; again: ld.acquire.gpu.global.u32 v, [%rd0]; setp.lt.u32 p, v, %r3; @p bra again;
fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%rd0], 1; done: mov.u32 %r2, 0; }
"""


@pytest.mark.parametrize("seed", range(3))
def test_programs_that_wait_for_each_other(seed: int) -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    run_text(PLACE + COUNTED, counter, 6, seed)
    assert counter.item() == 6
    with pytest.raises(KernelError, match="waits for ever for a counter that stands at 0"):
        run_text(PLACE + COUNTED.replace("p, v, %r3", "p, v, 1"), torch.zeros(1, dtype=torch.int32), 2, seed)


@pytest.mark.parametrize(
    "body, said",
    [
        ("st.global.b32 [ %rd1 + 0 ], { %r0 };", "outside of a tensor"),
        ("st.global.b32 [ %rd0 + 0 ], { %r0 };", "two lanes write one place"),
        ("add.s64 %rd1, %rd1, 2; ld.global.b32 { %r1 }, [ %rd1 + 0 ];", "no multiples of 4|outside"),
        ("bar.sync 0, 160;", "deadlock"),
        ("setp.lt.s32 %p0, %r0, 5; @%p0 bra L; bar.sync 0, 128; L: mov.b32 %r1, 0;", "in divergent code"),
        ("mov.b32 %r1, global_smem; ld.shared.b32 %r2, [%r1+0];", "nobody wrote"),
        (
            "shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, 1024; st.shared.b32 [%r1+0], %r0; ld.shared.b32 %r2, [global_smem+256];",
            "race",
        ),
        ("mov.b32 %r1, global_smem; mbarrier.arrive.shared::cta.b64 _, [%r1];", "no mbarrier at"),
        ("setmaxnreg.inc.sync.aligned.u32 100;", "with 255 registers"),
    ],
)
def test_what_the_chip_would_not_forgive(body: str, said: str) -> None:
    with pytest.raises(KernelError, match=said):
        run_text(PLACE + body, torch.zeros(100, dtype=torch.int32))


# ---- what the reader refuses

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid 128
{
	.reg .pred %p<2>;
	.reg .b32 %r<4>;
	.reg .b64 %rd<4>;
"""


@pytest.mark.parametrize(
    "body, said",
    [
        ("bfi.b32 %r0, %r1, %r1, 0, 8;", "not known"),
        ("mov.u32 %r0, %tid.x; add.s32 %r1, %r0, %r2;", "was not written on every path"),
        ("mov.u32 %r0, %tid.x; setp.lt.s32 %p0, %r0, 4; @%p0 bra L; mov.b32 %r1, 0; L: add.s32 %r2, %r1, 1;", "every path"),
        ("mov.b64 %rd0, %r0;", "a register of r used as Q"),
        ("mov.u32 %r0, %clock;", "operand '%clock'"),
        ("mov.b32 %r9, 0;", "is not declared"),
        ("mov.u32 %r0, %tid.x; @%p1 add.s32 %r1, %r0, 1;", "no guard"),
        ("mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 32;", "a shift by 32"),
        ("bra M;", "Symbol"),
    ],
)
def test_what_is_not_known_is_refused(body: str, said: str) -> None:
    with pytest.raises(PtxError, match=said):
        translate(parse(HEAD + body + "\nret;\n}\n"))
