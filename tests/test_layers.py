"""The layers of the design, read from the sources by ast: kernels <- parallel <- distattn <- launch."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "parallel", "distattn", "launch")  # an import may only go to the left
FOLDERS = set(LAYERS) - {"distattn"}
# Names of well-known packages that need not be installed where this test runs: torchrun puts launch/ first on sys.path.
WELL_KNOWN = {
    "accelerate",
    "apex",
    "datasets",
    "deepspeed",
    "diffusers",
    "einops",
    "evaluate",
    "flash_attn",
    "kernels",
    "megatron",
}
WELL_KNOWN |= {
    "numpy",
    "peft",
    "profile",
    "tokenizers",
    "torchtitan",
    "transformers",
    "triton",
    "trl",
    "vllm",
    "wandb",
    "xformers",
}


def sources(layer: str) -> list[Path]:
    """The files of one layer; distattn's own do not include those behind its links."""
    files = [path for path in (ROOT / layer).rglob("*.py") if "__pycache__" not in path.parts]
    if layer == "distattn":
        files = [path for path in files if path.relative_to(ROOT / layer).parts[0] not in FOLDERS]
    return sorted(files)


def layer_of(module: str) -> str | None:
    """The layer that a dotted name belongs to, None for other people's packages."""
    parts = module.split(".")
    if parts[0] != "distattn":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "distattn"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions, under TYPE_CHECKING and by import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from distattn import kernels` imports distattn.kernels, so the names count as parts of the module.
            yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)
        elif (
            isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args
        ):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def wrong_imports(layer: str, tree: ast.AST) -> Iterator[str]:
    for line, name in imports(tree):
        first, target = name.split(".")[0], layer_of(name)
        if name.startswith("."):
            yield f"{line}: relative import of {name}; write distattn.{'' if layer == 'distattn' else layer + '.'}..."
        elif first in FOLDERS:
            yield f"{line}: import of {name}; the folder's import name is distattn.{first}"
        elif target and LAYERS.index(target) > LAYERS.index(layer):
            yield f"{line}: {layer} must not know {target}, but imports {name}"
        elif layer == "kernels" and name.startswith("torch.distributed"):
            yield f"{line}: kernels must not know ranks, but imports {name}"


def surroundings(tree: ast.AST) -> Iterator[str]:
    """Uses of the command line and the environment."""
    forbidden = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv", "sys.argv", "sys.orig_argv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in forbidden:
            yield f"{node.lineno}: {ast.unparse(node)}; only launch/ reads the command line and the environment"
    for line, name in imports(tree):
        if name in forbidden or name.split(".")[0] == "argparse":
            yield f"{line}: import of {name}; only launch/ reads the command line and the environment"


def complaints(layer: str, text: str) -> list[str]:
    tree = ast.parse(text)
    return [*wrong_imports(layer, tree), *(() if layer == "launch" else surroundings(tree))]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_to_the_left(layer: str) -> None:
    files = sources(layer)
    assert files, f"{layer}/ holds no Python file"
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in complaints(layer, path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_programs_do_not_shadow_packages(path: Path) -> None:
    if path.stem == "__init__":
        return
    spec = importlib.util.find_spec(path.stem)
    assert path.stem not in sys.stdlib_module_names | WELL_KNOWN, f"{path.name}: torchrun would import it instead of the package"
    assert spec is None or Path(str(spec.origin)).parent == path.parent, f"{path.name} shadows {spec.origin}"


def test_links_lead_to_the_folders() -> None:
    for folder in sorted(FOLDERS):
        link = ROOT / "distattn" / folder
        assert link.is_symlink() and link.readlink() == Path("..", folder), f"distattn/{folder} is not a link to ../{folder}"


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("kernels", "from distattn.parallel import plan"),
        ("kernels", "from distattn import parallel"),
        ("kernels", "def f():\n    import distattn.model"),
        ("kernels", "import torch.distributed as dist"),
        ("kernels", "from torch import distributed"),
        ("kernels", "from .bands import Band"),
        ("kernels", "import kernels.bands"),
        ("parallel", "from distattn import ContextParallel"),
        ("parallel", "if TYPE_CHECKING:\n    from distattn.attention import ContextParallel"),
        ("parallel", "from kernels import bands"),
        ("parallel", "importlib.import_module('distattn.launch.train')"),
        ("distattn", "import distattn.launch.train"),
        ("distattn", "from parallel.mask import full"),
        ("distattn", "import os\nos.environ['RANK']"),
        ("distattn", "from os import environ"),
        ("parallel", "import os\nos.getenv('RANK')"),
        ("distattn", "import sys\nsys.argv[1:]"),
        ("distattn", "import argparse"),
        ("launch", "import parallel.mask"),
    ],
)
def test_wrong_sources_are_found(layer: str, text: str) -> None:
    assert len(complaints(layer, text)) == 1


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("kernels", "import torch\nfrom distattn.kernels.bands import Band"),
        ("parallel", "import torch.distributed\nfrom distattn.kernels import bands\nimport distattn.parallel.mask"),
        ("distattn", "from distattn import kernels, parallel\nfrom distattn.model import Model"),
        ("launch", "import os, sys, argparse\nos.environ, sys.argv\nfrom distattn import trainer"),
    ],
)
def test_right_sources_are_not(layer: str, text: str) -> None:
    assert complaints(layer, text) == []
