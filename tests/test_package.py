"""The wheel and the sdist as a user gets them: built from the checkout, installed, imported from another directory."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("distattn", "distattn.kernels", "distattn.parallel", "distattn.parallel.schedules", "distattn.launch")
PROGRAMS = (
    "train",
    "prepare",
    "generate",
    "plan",
    "calibrate",
    "doctor",
    "kernel_report",
    "bench_attention",
    "bench_kernels",
    "bench_decode",
    "bench_simulator",
)
SEVERAL_STARTS_OF_TORCH = 240  # seconds; some on an idle machine

# Imports every module of the installed package; with a first argument, as if there were no package of that name.
IMPORT_ALL = """
import importlib, importlib.abc, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import distattn
root = pathlib.Path(distattn.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(("distattn", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print("without", error.name, name)
    else:
        print("imported", name)
print("root", root)
"""

LAZY = """
import sys
import distattn, distattn.kernels
loaded = [name for name in sys.modules if name.startswith("distattn.") and not name.startswith("distattn.kernels")]
assert not loaded, loaded
assert set(distattn.__all__) <= set(dir(distattn))
for name in distattn.__all__:
    getattr(distattn, name)
try:
    distattn.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError("an unknown name must raise")
"""

ATTEND = """
import torch
import distattn

torch.manual_seed(0)
q, k, v = (torch.randn(96, heads, 32, requires_grad=True) for heads in (4, 2, 2))
cp = distattn.ContextParallel()
plan = cp.plan(distattn.causal(96))
out = cp.attention(q, k, v, plan)
out.square().sum().backward()
mine = [q.grad, k.grad, v.grad]
wanted = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
)[0].transpose(0, 1)
torch.testing.assert_close(out, wanted)
torch.testing.assert_close(mine, list(torch.autograd.grad(wanted.square().sum(), (q, k, v))))
"""

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(*command: str | Path, cwd: Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},  # it may lead back to the checkout
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SEVERAL_STARTS_OF_TORCH,
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def modules() -> set[str]:
    """The module files of the checkout, as paths inside the wheel."""
    found = set()
    for package in PACKAGES:
        folder = Path(*package.split("."))
        found |= {str(folder / path.name) for path in (ROOT / folder).glob("*.py")}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the sources that has no build products in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in ("distattn", "kernels", "parallel", "launch", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    # The wheel is built from the sdist, as `python -m build` does, so the sdist is shown to be enough.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy, cwd=copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a new environment: the wheel is installed, its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, next(built.glob("*.whl")), cwd=folder)
    # Paths that a .pth file names are searched, but .pth files inside them are not read: the editable install stays out.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(purelib, "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def test_wheel_holds_real_files(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
        assert names == modules() | {"distattn/py.typed", "distattn/kernels/measured.json"}
        for name in names:
            assert wheel.read(name) == (ROOT / name).read_bytes(), name
            assert (wheel.getinfo(name).external_attr >> 16) & 0o170000 in (0, 0o100000), f"{name} is not a regular file"


def test_sdist_holds_real_files(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = {member.name.split("/", 1)[1]: member for member in sdist.getmembers() if "/" in member.name}
        assert modules() | {"pyproject.toml", "LICENSE", "distattn/py.typed", "distattn/kernels/measured.json"} <= members.keys()
        links = [name for name, member in members.items() if not (member.isfile() or member.isdir())]
        assert not links


def test_wheel_imports_from_another_directory(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    root = Path(printed[-1].removeprefix("root "))
    assert root.is_relative_to(installed.parent) and not root.is_relative_to(ROOT)
    imported = {line.removeprefix("imported ") for line in printed if line.startswith("imported ")}
    assert set(PACKAGES) <= imported
    missing = [line for line in printed if line.startswith("without ") and line.split()[1] != "triton"]
    assert not missing


def test_everything_but_the_triton_kernels_imports_without_triton(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "python", "-c", IMPORT_ALL, "triton", cwd=tmp_path).splitlines()
    failed = [line.split()[2] for line in printed if line.startswith("without ")]
    kernels_in_triton = tuple(f"distattn.kernels.{name}" for name in ("triton_", "gluon_", "ahead_of_time"))
    assert all(name.startswith(kernels_in_triton) for name in failed), failed
    assert "imported distattn.kernels.triton_backend" in printed, "the backend must say why it cannot run, not fail to import"


def test_public_names_are_loaded_when_used(installed: Path, tmp_path: Path) -> None:
    run(installed / "python", "-c", LAZY, cwd=tmp_path)


@pytest.mark.parametrize("before", ["", WITHOUT_TRITON], ids=["as installed", "without triton"])
def test_attention_of_the_wheel(installed: Path, tmp_path: Path, before: str) -> None:
    run(installed / "python", "-c", before + ATTEND, cwd=tmp_path)


@pytest.mark.parametrize("program", PROGRAMS)
def test_console_scripts_explain_themselves(installed: Path, tmp_path: Path, program: str) -> None:
    printed = run(installed / f"distattn-{program.replace('_', '-')}", "--help", cwd=tmp_path)
    assert len(printed.split()) > 10 and "Traceback" not in printed
