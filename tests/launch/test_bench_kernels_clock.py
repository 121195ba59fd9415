"""Readings of the card's clock, from a driver library that stands in for the real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distattn.launch import bench_kernels_clock
from distattn.launch.bench_kernels_clock import Reading, reader


class Library:
    """Clocks of one card; ``failing`` names the functions that return an error."""

    def __init__(self, *failing: str):
        self.failing = failing
        self.asked: list[bytes] = []

    def nvmlInit_v2(self) -> int:
        return "nvmlInit_v2" in self.failing

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked.append(name)
        return "nvmlDeviceGetHandleByUUID" in self.failing

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, into: Any) -> int:
        into._obj.value = {1: 1755}[kind]
        return "nvmlDeviceGetClockInfo" in self.failing

    def nvmlDeviceGetPowerUsage(self, handle: Any, into: Any) -> int:
        into._obj.value = 698_500
        return "nvmlDeviceGetPowerUsage" in self.failing


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(torch.version, "hip", None)
    bench_kernels_clock._reader.cache_clear()


CUDA = torch.device("cuda", 0)


def test_a_reading() -> None:
    library = Library()
    assert reader(CUDA, lambda name: library)() == Reading(1755, 698.5)
    assert library.asked == [b"GPU-12-34"]


@pytest.mark.parametrize("name", [name for name in vars(Library) if name.startswith("nvml")])
def test_a_driver_that_does_not_tell(name: str) -> None:
    assert reader(CUDA, lambda _: Library(name))() is None


def test_no_driver() -> None:
    def load(name: str) -> Any:
        raise OSError(name)

    assert reader(CUDA, load)() is None
    assert reader(torch.device("cpu"), load)() is None
