"""Mutants of the Hopper kernels: each breaks one thing that hardware would not forgive, and the emulator must say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.gluon_launch import FORWARD, QUERIES
from tests.kernels.cases import BASIC, Case, check_backend

pytest.importorskip("triton", reason="descriptors of the launches are triton's")

from tests.kernels.gluon_emulator import FREE, SMALL, Emulated  # noqa: E402
from tests.kernels.gluon_machine import KernelError  # noqa: E402


def swap(old: str, new: str, count: int = 1) -> Callable[[str], str]:
    def change(source: str) -> str:
        assert source.count(old) >= count, f"{old!r} is not in the kernel any more"
        return source.replace(old, new, count)

    return change


FORWARD_MUTANTS = {
    "v is released before its product is done": (
        "    if not MAXIMUM_FIRST:\n        accs = await_parts(accs, 0, D_V2 > 0)\n        mbarrier.arrive(v_empty, count=1)\n",
        "    if not MAXIMUM_FIRST:\n        mbarrier.arrive(v_empty, count=1)\n        accs = await_parts(accs, 0, D_V2 > 0)\n",
        "race",
    ),
    "v is not waited for": (
        "                mbarrier.wait(v_full.index(before), lap_before)\n                accs",
        "                accs",
        "race",
    ),
    "k is not waited for": (
        "                mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)\n                if PING",
        "                if PING",
        "race",
    ),
    "the wrong phase": (
        "lap_before = ((it - 1) // STAGES) & 1",
        "lap_before = (it // STAGES) & 1",
        "race|deadlock",
    ),
    "the scores are used in flight": (
        "warpgroup_mma_wait(PV_GROUPS, deps=[products])",
        "warpgroup_mma_wait(PV_GROUPS + 1, deps=[products])",
        "before it was awaited",
    ),
    "q is released early": (
        "        mbarrier.arrive(q_empty.index(CID), count=1)\n        before",
        "        before",
        "deadlock",
    ),
    "q is not waited for": (
        "        mbarrier.wait(q_full.index(CID), turn & 1)\n",
        "",
        "race",
    ),
    "the producer does not wait": (
        "                mbarrier.wait(k_empty.index(s), lap ^ 1)\n",
        "",
        "race|expects 1 arrivals",
    ),
    "v is never released": (
        "        accs = await_parts(accs, 0, D_V2 > 0)\n"
        "        mbarrier.arrive(v_empty.index(before), count=1)\n"
        "        if PIECES",
        "        accs = await_parts(accs, 0, D_V2 > 0)\n        if PIECES",
        "deadlock",
    ),
    "too few bytes": (
        "BLOCK_K * (D + D2) * 2)",
        "BLOCK_K * (D + D2))",
        "before they were announced",
    ),
    "no fence before the store": (
        "    fence_async_shared()\n    async_store",
        "    async_store",
        "no fence",
    ),
    "o is overwritten while it is stored": (
        "    tma.store_wait(0)  # the last item's store has read the buffer\n",
        "",
        "race",
    ),
    "the last store is not waited for": (
        "    if TMA_OUT:\n        tma.store_wait(0)\n",
        "",
        "still read shared memory",
    ),
    "the last product is not awaited": (
        "accs = await_parts(accs, 0, D_V2 > 0)\n        mbarrier.arrive(v_empty.index(before), count=1)\n        if PIECES",
        "mbarrier.arrive(v_empty.index(before), count=1)\n        if PIECES",
        "before it was awaited",
    ),
    "rows past the end are stored": (
        "exists = rows < limit",
        "exists = rows >= 0",
        "outside of a tensor",
    ),
    "consumers own the same rows": (
        "row0 = start + CID * 64",
        "row0 = start",
        "two warpgroups write|writes",
    ),
    "turns go wrong": (
        "(CID + 1) % CONSUMERS",
        "CID",
        "deadlock|arrivals",
    ),
}


def mutant_case(out: bool) -> Case:
    n = 450
    bands = Bands([Band(0, n, 0, n, -INF, 0)])
    out_dtype = torch.bfloat16 if out else None
    return replace(BASIC, n_q=n, n_k=n, heads=(4, 2), bands=bands, d=64, d_v=64, dtype=torch.bfloat16, out_dtype=out_dtype)


@pytest.mark.parametrize("name", FORWARD_MUTANTS)
def test_the_emulator_catches_in_the_forward(name: str) -> None:
    old, new, message = FORWARD_MUTANTS[name]
    out = "past the end" not in name
    backend = Emulated(rows={FORWARD: {"block_k": 32, "stages": 2}}, processors=2, replace={"gluon_forward": swap(old, new)})
    with pytest.raises(KernelError, match=message):
        check_backend(backend, mutant_case(out))


BACKWARD_MUTANTS = {
    "lse and delta are read after their release": (
        "    barrier()  # all threads have read lse and delta before one of them arrives\n",
        "",
        "race",
    ),
    "a stage is released before its products": (
        "    dks = await_parts(dks, 0, D_SPLIT)\n    barrier()",
        "    mbarrier.arrive(empty.index(stage), count=1)\n    dks = await_parts(dks, 0, D_SPLIT)\n    barrier()",
        "race|arrivals",
    ),
    "dout is not waited for": (
        "        mbarrier.wait(g_full.index(stage), lap)\n",
        "",
        "race",
    ),
    "k and v are not waited for": (
        "    mbarrier.wait(kv_full.index(0), 0)\n",
        "",
        "race",
    ),
    "ds of the other is not waited for": (
        "        mbarrier.wait(ds_full.index(it & 3), (it >> 2) & 1)\n        dq = _query_product(ds_r, k_r, it & 3, z",
        "        dq = _query_product(ds_r, k_r, it & 3, z",
        "race",
    ),
    "ds is shared without a fence": (
        "    fence_async_shared()\n    barrier()\n    mbarrier.arrive(ds_full",
        "    barrier()\n    mbarrier.arrive(ds_full",
        "no fence",
    ),
    "ds is shared by one thread": (
        "    fence_async_shared()\n    barrier()\n    mbarrier.arrive(ds_full",
        "    fence_async_shared()\n    mbarrier.arrive(ds_full",
        "race",
    ),
    "two slots for ds": (
        "(it + 1) & 3",
        "(it + 1) & 0",
        "race|deadlock|arrivals",
    ),
    "dp is used in flight": (
        " if VALUES_FIRST else 0",
        " if VALUES_FIRST else 1",
        "before it was awaited",
    ),
    "dq is taken in flight": (
        "        dq = warpgroup_mma_wait(1, deps=[dq])\n        dvs = await_parts(dvs, 1, V_SPLIT)\n",
        "        dq = warpgroup_mma_wait(2, deps=[dq])\n        dvs = await_parts(dvs, 2, V_SPLIT)\n",
        "before it was awaited",
    ),
}


@pytest.mark.parametrize("name", BACKWARD_MUTANTS)
def test_the_emulator_catches_in_the_backward(name: str) -> None:
    old, new, message = BACKWARD_MUTANTS[name]
    # handing ds over has a barrier of its own, which makes the one after lse and delta redundant in the fused kernel
    backend = Emulated(deterministic="lse and delta" in name, replace={"gluon_backward": swap(old, new)})
    with pytest.raises(KernelError, match=message):
        check_backend(backend, mutant_case(True))


QUERY_MUTANTS = {
    "k is released before dq is done": (
        "            dqs = await_parts(dqs, 0, SPLIT)\n            mbarrier.arrive(k_empty.index(before), count=1)\n",
        "            mbarrier.arrive(k_empty.index(before), count=1)\n            dqs = await_parts(dqs, 0, SPLIT)\n",
        "race",
    ),
    "v is released before dp is done": (
        "dp = warpgroup_mma_wait(D_GROUPS, deps=[dp])",
        "mbarrier.arrive(v_empty.index(stage), count=1)\n            dp = warpgroup_mma_wait(D_GROUPS, deps=[dp])",
        "race|arrivals|deadlock",
    ),
    "dp is used in flight": (
        "dp = warpgroup_mma_wait(D_GROUPS, deps=[dp])",
        "dp = warpgroup_mma_wait(D_GROUPS + 1, deps=[dp])",
        "before it was awaited",
    ),
    "v is not waited for": (
        "            mbarrier.wait(v_full.index(stage), lap)\n",
        "",
        "race",
    ),
}


@pytest.mark.parametrize("name", QUERY_MUTANTS)
def test_the_emulator_catches_in_dq(name: str) -> None:
    old, new, message = QUERY_MUTANTS[name]
    backend = Emulated(rows={QUERIES: {"stages": 2}}, replace={"gluon_query_backward": swap(old, new)})
    with pytest.raises(KernelError, match=message):
        check_backend(backend, mutant_case(True))


PIECE_MUTANTS = {
    "a piece is also written to its row": (
        "gluon_forward",
        "limit = gl.where(place < 0, n_q, row0)",
        "limit = n_q",
        "two warpgroups write",
    ),
    "a piece is staged as if it were whole": (
        "gluon_forward",
        "            elif TMA_OUT:\n",
        "            if TMA_OUT:\n",
        "two warpgroups write",
    ),
    "consumers share the rows of a piece": (
        "gluon_forward",
        "o_at = at + CID * 64 * (D_V + D_V2)",
        "o_at = at",
        "two warpgroups write",
    ),
    "pieces of dk and dv overlap": (
        "gluon_backward",
        "at + (D + D2) + HALF * D_V",
        "at + HALF * D_V",
        "relative L2",
    ),
    "a piece of dq is added to its row": (
        "gluon_query_backward",
        "keep = rows < gl.where(place < 0, n_q, row0)",
        "keep = rows < n_q",
        "after another warpgroup wrote|two warpgroups",
    ),
    "pieces past the end are joined": (
        "gluon_merge",
        "exists = rows < (last - piece) * 16",
        "exists = rows >= 0",
        "relative L2|outside of a tensor",
    ),
    "pieces past the end are added": (
        "gluon_merge",
        "rows < left - 48, columns",
        "rows < left + 48, columns",
        "relative L2|outside of a tensor",
    ),
    "every fifth piece is forgotten": (
        "gluon_merge",
        "acc = acc * gl.expand_dims(decay, 1) + o0",
        "acc = o0",
        "relative L2",
    ),
}


@pytest.mark.parametrize("name", PIECE_MUTANTS)
def test_the_emulator_catches_in_split_calls(name: str) -> None:
    module, old, new, message = PIECE_MUTANTS[name]
    backend = Emulated(rows=SMALL, processors=100, costs=FREE, replace={module: swap(old, new)})
    with pytest.raises(AssertionError, match=message):
        check_backend(backend, mutant_case(True))


def test_wrong_numbers_are_caught_too() -> None:
    late = swap("decay = gl.exp2(top - new_top)", "decay = gl.exp2(new_top - new_top)")
    with pytest.raises(AssertionError, match="relative L2"):
        check_backend(Emulated(replace={"gluon_forward": late}, rows=SMALL), mutant_case(False))
