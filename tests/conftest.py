"""Options, markers and the processes that tests of many ranks share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import pytest

from tests.workers import Outcome, Pool, spawn

MOST_PROCESSES = 4  # each of them starts up to four ranks of its own: some 2 GB


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the long tier (tests marked slow)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``, as launch/test.sh asks: the cores of this process; none beside it where output is to be seen as it comes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 or config.getoption("capture") == "no" else min(cores, MOST_PROCESSES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """``gloo(world).run(function, *arguments, timeout=120)``: function(rank, world, *arguments) in the pool's processes."""
    pool = Pool(tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.stop()


@pytest.fixture(name="spawn")
def spawn_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Outcome]]:
    """``spawn(world, function, *arguments, timeout=120)``: fresh processes, for tests in which ranks die; returns outcomes."""
    return functools.partial(spawn, tmp_path_factory.mktemp("spawn"))
