"""The portable Triton backend without a GPU: its kernels in a process of their own that interprets them, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy
import pytest
import torch
from torch.torch_version import TorchVersion

from distattn.kernels.contract import Scores
from distattn.kernels.triton_backend import TritonBackend

ROOT = Path(__file__).parents[2]


def python(*arguments: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter at the root of the repository; killed after ``timeout`` seconds."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def interpret(report: Path, *options: str) -> int:
    """Runs the interpreted tests; how many ran. Fails unless all of them passed and none was skipped."""
    triton = pytest.importorskip("triton", reason="the interpreter is part of triton")
    if TorchVersion(triton.__version__) < TorchVersion("3.7") and TorchVersion(numpy.__version__) >= TorchVersion("2.4"):
        pytest.skip("the interpreter of triton before 3.7 makes numbers of arrays in a way that numpy 2.4 and newer refuse")
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--junitxml={report}", *options)
    done = python("-m", "pytest", *options, "tests/kernels/test_triton_interpreted.py", timeout=1000, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    assert suite.get("skipped") == suite.get("failures") == suite.get("errors") == "0"
    return int(suite.get("tests", 0))


@pytest.mark.timeout(1100)
def test_kernels_agree_with_the_reference_in_the_interpreter(tmp_path: Path) -> None:
    assert interpret(tmp_path / "report.xml", "-m", "not slow") >= 15


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_kernels_pass_what_every_backend_must_pass(tmp_path: Path) -> None:
    assert interpret(tmp_path / "report.xml", "--all", "-m", "slow") >= 25


def test_without_triton_the_backend_imports_and_says_so() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import torch
from distattn.kernels.contract import Scores
from distattn.kernels.triton_backend import TritonBackend
x = torch.zeros(1, 1, 16)
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
print(TritonBackend().reject(x, x, x, Scores(1.0)))
"""
    done = python("-c", code, timeout=120, PYTHONPATH=str(ROOT))
    assert done.stdout.strip() == "triton is not installed", done.stderr[-3000:]


def test_importing_the_backend_does_not_import_triton() -> None:
    code = "import sys, distattn.kernels.triton_backend; print([n for n in sys.modules if 'distattn.kernels.triton_f' in n])"
    done = python("-c", code, timeout=120, PYTHONPATH=str(ROOT))
    assert done.stdout.strip() == "[]", done.stderr[-3000:]


def test_refusals_name_what_was_found() -> None:
    pytest.importorskip("triton")
    backend = TritonBackend()

    def reason(d: int = 64, d_v: int = 64, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> str:
        q, v = torch.zeros(4, 2, d, dtype=dtype), torch.zeros(4, 2, d_v, dtype=dtype)
        return backend.reject(q, q, v, Scores(scale)) or ""

    assert "torch.float64" in reason(dtype=torch.float64)
    assert "D 320, D_v 64" in reason(d=320)
    assert "D_v 257" in reason(d_v=257)
    assert "found -1.0" in reason(scale=-1.0)
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "needs a GPU, found tensors on cpu" in reason()
    q, k = torch.zeros(4, 2, 64), torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    assert "one dtype" in (backend.reject(q, k, k, Scores(1.0)) or "")


@pytest.mark.parametrize("version, refused", [("3.2.0", True), ("3.3.0", False), ("3.10.1+git", False)])
def test_refuses_float32_where_triton_cannot_compile_it(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="asks triton for its version")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(TritonBackend, "_reject_device", lambda self, device: None)
    monkeypatch.setattr("distattn.kernels.triton_backend.interpreted", lambda: False)
    x = torch.randn(5, 2, 8)
    assert ("Install triton 3.3" in (TritonBackend().reject(x, x, x, Scores(1.0)) or "")) == refused
    assert TritonBackend().reject(*[x.bfloat16()] * 3, Scores(1.0)) is None
