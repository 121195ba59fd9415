from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("name", sorted(path.stem for path in LAUNCH.glob("*.py") if path.stem != "__init__"))
def test_no_program_hides_a_package(name: str) -> None:
    """torchrun puts launch/ first on sys.path: a program of the same name would be imported in a package's place."""
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != LAUNCH.resolve()]
    assert importlib.machinery.PathFinder.find_spec(name, elsewhere) is None
    assert name not in sys.stdlib_module_names
