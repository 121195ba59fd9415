"""Mutants of compiled Hopper kernels: each changes one thing in the PTX text, and the emulator must say so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="Gluon is part of triton 3.6 and newer")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton's compiler, and this process interprets", allow_module_level=True)

from distattn.kernels.bands import INF, Band, Bands  # noqa: E402
from distattn.kernels.gluon_launch import FORWARD, FUSED, KEYS, SCRATCH  # noqa: E402
from tests.kernels.cases import Case, Problem, make, oracle, relative_error  # noqa: E402
from tests.kernels.gluon_machine import KernelError  # noqa: E402
from tests.kernels.ptx_launch import Change, Compiled  # noqa: E402

BF16 = torch.bfloat16
CASE = Case("mutants", 200, 330, Bands([Band(0, 200, 0, 330, -INF, 130)]), (2, 1), 64, 64, BF16, out_dtype=BF16)
ROWS = {FORWARD: {"block_k": 64, "stages": 2}}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def swap(pattern: str, by: str | Callable[[re.Match[str]], str], at: int | None = 0) -> Change:
    """Replaces the ``at``-th match of a pattern, counted from the end if negative; all of them if None."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert found, f"{pattern!r} is not in the text any more"
        for match in reversed(found if at is None else [found[at]]):
            text = text[: match.start()] + (by if isinstance(by, str) else by(match)) + text[match.end() :]
        return text

    return change


def more(amount: int) -> Callable[[re.Match[str]], str]:
    return lambda match: str(int(match[0]) + amount)


def plus(amount: int) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{match[0]}+{amount}"


def swapped(match: re.Match[str]) -> str:
    return f"{{{match[2]}, {match[1]}}}"


@lru_cache(maxsize=1)
def problem() -> tuple[Problem, dict[str, torch.Tensor]]:
    p = make(CASE)
    return p, oracle(p)


def run_forward(change: Change) -> None:
    p, want = problem()
    out = torch.full(p.dout.shape, torch.nan, dtype=BF16)
    backend = Compiled(processors=1, rows=ROWS, change={FORWARD: change})
    backend.forward(p.q, p.k, p.v, CASE.bands, p.scores, None, out)
    error = relative_error(out, want["out"])
    assert error < 5e-3, f"out is wrong by {error}"


def run_backward(kind: str, change: Change) -> None:
    p, want = problem()
    lse = want["lse"].float()
    delta = (p.dout.double() * want["out"]).sum(-1).float() - p.dlse
    sums = [torch.zeros(x.shape) for x in (p.q, p.k, p.v)]
    backend = Compiled(deterministic=kind == KEYS, change={kind: change})
    backend.backward(p.dout, p.q, p.k, p.v, delta, lse, CASE.bands, p.scores, *sums)
    errors = [relative_error(x, want[name]) for x, name in zip(sums, ("dq", "dk", "dv"), strict=True)]
    assert max(errors) < 5e-3, f"a gradient is wrong by {max(errors)}"


TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[(%r\d+)\], %r\d+;"
WAIT = r"wgmma\.wait_group\.sync\.aligned \t?\d;"
IN_FLIGHT = "products in flight"
SHORT = {
    "a wait for products is dropped": (swap(r"wgmma\.wait_group\.sync\.aligned \t?1;", ""), IN_FLIGHT),
    "a wait lets one more group fly": (swap(r"(?<=wait_group\.sync\.aligned )\t?0(?=;)", "1", 2), f"{IN_FLIGHT}|race"),
    "the wrong phase": (swap(TRY_WAIT, lambda m: m[0].rsplit(",", 1)[0] + ", 1;", 1), "race|deadlock|nobody wrote"),
    "a descriptor is off by 32 bytes": (swap(r"461168629330529485[24]", more(2), 0), "wrong by|swizzle width"),
    "a fence before the store is dropped": (swap(r"fence\.proxy\.async\.shared::cta;", "", 1), "no fence.proxy.async"),
    "coordinates of a box change places": (swap(r"(?<=%rd\d, )\{(%r\d+), (%r\d+)\}(?=\], \[)", swapped, 1), "wrong by"),
    "a barrier before an arrival is missing": (swap(r"bar\.sync \t?\d, 128;", "", None), "race"),
}
LONG = {
    "no phase is waited for": (swap(TRY_WAIT, "mov.pred complete, -1;", None), "race|arrivals|announced|nobody wrote"),
    "the fence of wgmma is dropped": (swap(r"wgmma\.fence\.sync\.aligned;", "", None), "before any wgmma.fence"),
    "one fence of wgmma is dropped": (swap(r"wgmma\.fence\.sync\.aligned;", "", 1), "since the last wgmma.fence"),
    "the mbarriers are not fenced": (swap(r"fence\.proxy\.async\.shared::cta;", "", 0), "without a fence.proxy.async"),
    "the swizzle of a descriptor": (swap(r"4611686293305294848", str(4611686293305294848 + (1 << 62))), "swizzle|atoms|wrong by"),
    "the stride of a descriptor": (swap(r"4611686293305294848", more(64 << 32), None), "wrong by|race|nobody wrote|bytes"),
    "too few bytes are announced": (swap(r"(?<=\], )8192(?=;)", "4096"), "before they were announced"),
    "too many bytes are announced": (swap(r"(?<=\], )8192(?=;)", "8208"), "deadlock"),
    "an mbarrier for fewer arrivals": (swap(r"(?<=\], )2(?=;)", "1"), "expects 1 arrivals|deadlock"),
    "all threads arrive": (swap(r"@%p\d+ (?=mbarrier\.arrive\.shared)", "", 1), "expects . arrivals|deadlock"),
    "a store is not waited for": (swap(r"cp\.async\.bulk\.wait_group\.read \t?0;", "", 0), "race"),
    "the last store is not waited for": (swap(r"cp\.async\.bulk\.wait_group\.read \t?0;", "", -1), "still read shared memory"),
    "rows past the end are stored": (swap(r"@%p\d+ (?=st\.global)", "", 0), "outside of a tensor|two lanes|another thread"),
    "another lane of a sum": (swap(r"(?<=shfl\.sync\.bfly\.b32 \t%r\d\d\d\d, %r\d\d\d\d, )2", "4", None), "wrong by|two lanes"),
    "more registers than there are": (swap(r"(?<=setmaxnreg\.inc\.sync\.aligned\.u32 \t)240", "256"), "deadlock"),
    "a partition waits for too many": (swap(r"bar\.sync \t?3, 128;", "bar.sync 3, 256;", None), "deadlock"),
    "the box lands elsewhere": (swap(r"(?<=global\.mbarrier::complete_tx::bytes \[)%r\d+", plus(512), 2), "swizzle of"),
    "an accumulator is written in flight": (
        swap(r"(wgmma\.mma_async\S+ \{(%r\d+),[^;]*;)", lambda m: f"{m[0]} add.f32 {m[2]}, {m[2]}, {m[2]};", 0), IN_FLIGHT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_the_emulator_catches(name: str) -> None:
    change, message = SHORT[name]
    with pytest.raises((KernelError, AssertionError), match=message):
        run_forward(change)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_emulator_catches_also(name: str) -> None:
    change, message = LONG[name]
    with pytest.raises((KernelError, AssertionError), match=message):
        run_forward(change)


@pytest.mark.slow
def test_without_a_change_nothing_is_caught() -> None:
    run_forward(lambda text: text)
    for kind in (KEYS, FUSED):
        run_backward(kind, lambda text: text)


BACKWARD = {
    "ds is shared without a fence": (FUSED, swap(r"fence\.proxy\.async\.shared::cta;", "", 2), "no fence.proxy.async"),
    "ds is shared without a barrier": (
        FUSED, swap(r"(?s)(fence\.proxy\.async\.shared::cta;.*?)bar\.sync \t?\d, 128;", lambda m: m[1], 2), "race|nobody wrote",
    ),
    "ds is not transposed": (FUSED, swap(r"1, 1, 1, 1;", "1, 1, 0, 1;", 0), "wrong by|swizzle width|leading"),
    "dq is added elsewhere": (FUSED, swap(r"(?<= \+ )2048(?=\], \{)", "2064", 0), "wrong by"),
    "dq is added in flight": (FUSED, swap(r"wgmma\.wait_group\.sync\.aligned \t?1;", "", -1), IN_FLIGHT),
    "lse of the other row": (KEYS, swap(r"(?<=ld\.shared\.v2\.b32 \t)\{(%r\d+), (%r\d+)\}", swapped, 0), "wrong by"),
    "a stage is released before lse is read": (
        KEYS, swap(r"bar\.sync \t?0, 128;", "", None), "race",
    ),
    "dout is not waited for": (KEYS, swap(TRY_WAIT, "mov.pred complete, -1;", 2), "race|nobody wrote"),
    "dk lands on other rows": (KEYS, swap(r"(?<=st\.global\.v2\.b32 \[ %rd\d\d\d \+ )0", "8", 0), "another thread|wrong by"),
    "the scratch is read elsewhere": (SCRATCH, swap(r"(?<=add\.s64 \t%rd5, %rd1, )2048(?=;)", "2056"), "wrong by|outside"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKWARD)
def test_the_emulator_catches_in_the_backward(name: str) -> None:
    kind, change, message = BACKWARD[name]
    with pytest.raises((KernelError, AssertionError), match=message):
        run_backward(kind, change)
