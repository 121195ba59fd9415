"""The portable kernels compiled for GPUs that are not here: nothing spills, everything fits, the right matrix instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from distattn.kernels.triton_launch import FORWARD, KEYS, QUERIES, Launch
from distattn.launch import kernel_report

triton = pytest.importorskip("triton", reason="compiling needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton's compiler, and this process interprets", allow_module_level=True)

from distattn.kernels.ahead_of_time import Case, Compiled, compile_case, table_launch  # noqa: E402

KINDS = (FORWARD, KEYS, QUERIES)
# 13 compilations, and 3 below; everything else is in the long tier.
SHORT = [
    *(Case(kind, "sm_90", "bf16", *size) for kind in KINDS for size in ((128, 128), (192, 128))),
    *(Case(kind, "sm_80", "bf16", 128, 128) for kind in KINDS),
    Case(FORWARD, "sm_90", "bf16", 64, 64),
    Case(KEYS, "sm_80", "bf16", 64, 64),
    Case(FORWARD, "sm_80", "fp32", 64, 64),
    Case(KEYS, "sm_90", "fp32", 64, 64),
]
SIZES = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
LONG = [
    Case(kind, target, dtype, *size, softcap)
    for kind, target, dtype, size, softcap in product(KINDS, ("sm_80", "sm_90"), ("bf16", "fp32"), SIZES, (False, True))
    if softcap <= (size == (128, 128))
]


def name(case: Case) -> str:
    return f"{case.kind}-{case.target}-{case.dtype}-{case.d}-{case.d_v}{'-softcap' * case.softcap}"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A fresh cache, so that a test compiles what is in the tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# Bytes. The rows of tiles were chosen with triton 3.7, where nothing spills; with others one variant in five does, by so little.
SPILLS = 0 if triton.__version__.startswith("3.7.") else 200


def unexpected(made: Compiled) -> list[str]:
    """What is wrong with a variant besides spills that its compiler is known for."""
    return [text for text in made.violations if made.spills > SPILLS or not text.startswith("spills")]


@pytest.mark.parametrize("case", SHORT, ids=name)
def test_a_variant_is_fit_to_ship(case: Case) -> None:
    made = compile_case(case)
    assert unexpected(made) == [], made
    assert 0 < made.registers <= 255
    assert (made.wgmma > 0) == (case.target == "sm_90" and case.dtype == "bf16")
    assert (made.mma > 0) == (case.target == "sm_80" and case.dtype == "bf16")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in LONG if case not in SHORT], ids=name)
def test_every_variant_is_fit_to_ship(case: Case) -> None:
    assert unexpected(compile_case(case)) == []


OTHERS = [
    *(Case(kind, "sm_86", "bf16", 128, 128) for kind in KINDS),
    *(
        Case(kind, target, dtype, *size)
        for target in ("sm_100", "gfx942")
        for kind in KINDS
        for dtype in ("bf16", "fp32")
        for size in ((64, 64), (128, 128), (192, 128), (256, 256))
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name)
def test_other_targets_compile(case: Case) -> None:
    made = compile_case(case)
    assert unexpected(made) == []
    assert made.mma > 0 or case.dtype == "fp32"


def test_spills_are_found() -> None:
    made = compile_case(Case(FORWARD, "sm_80", "bf16", 128, 128), Launch(128, 64, 4, 2))
    assert made.spills > 0 and any(text.startswith("spills") for text in made.violations)


def test_float32_in_tf32_is_found(tmp_path: Path) -> None:
    from distattn.kernels import triton_forward

    source = Path(triton_forward.__file__).read_text()
    assert source.count('input_precision="ieee"') == 2
    mutant = tmp_path / "triton_forward_in_tf32.py"
    mutant.write_text(source.replace('input_precision="ieee"', 'input_precision="tf32"'))
    spec = importlib.util.spec_from_file_location(mutant.stem, mutant)
    sys.modules[mutant.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = compile_case(Case(FORWARD, "sm_80", "fp32", 32, 32), Launch(32, 32, 4, 1), module.forward_kernel)
    finally:
        del sys.modules[mutant.stem]
    assert made.tf32 and "a float32 product runs in TF32" in made.violations


def test_every_violation_has_a_line() -> None:
    case = Case(FORWARD, "sm_90", "bf16", 128, 128)
    good = Compiled(case, table_launch(case), 1.0, 255, 0, 227 << 10, wgmma=1, mma=0, tf32=False, serialized=False)
    assert good.violations == []
    assert replace(good, shared=good.shared + 1).violations == ["232449 bytes of shared memory, sm_90 has 232448"]
    assert replace(good, wgmma=0, mma=5).violations == ["no wgmma"]
    assert replace(good, spills=4, case=replace(case, target="sm_80")).violations[0] == "spills 4 bytes"
    assert len(replace(good, case=replace(case, target="sm_80")).violations) == 1, "163 KB on sm_80"
    assert replace(good, case=replace(case, dtype="fp32"), wgmma=0).violations == []


def test_the_report_prints_json_and_fails_on_a_violation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--target", "sm_80", "--head", "16", "--dtype", "bf16", "--kernel", "forward"]
    assert kernel_report.main([*arguments, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["target"] == "sm_80" and line["violations"] == [] and line["mma"] > 0
    monkeypatch.setattr("distattn.kernels.ahead_of_time.SHARED_LIMIT", {"sm_80": 1})
    assert kernel_report.main(arguments) == 1
    assert "shared memory" in capsys.readouterr().out
    assert kernel_report.main(["--target", "sm_70"]) == 2
    assert "sm_70 is not known. Use sm_80" in capsys.readouterr().err
