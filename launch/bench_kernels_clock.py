"""What the card's multiprocessors run at while something is measured: slow repeats at a lower clock are no fault of the kernel.

Asked of the driver's own library (NVML) in this process, where it is: a tool that has to start takes longer than a burst runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"
MULTIPROCESSORS = 1  # NVML_CLOCK_SM


@dataclass(frozen=True)
class Reading:
    """At one moment."""

    megahertz: int
    watts: float


def reader(device: torch.device, load: Callable[[str], Any] = ctypes.CDLL) -> Callable[[], Reading | None]:
    """Reads ``device``; the function returns None where there is no NVIDIA driver, or where it does not tell."""
    if device.type != "cuda" or torch.version.hip:
        return lambda: None
    return _reader(str(torch.cuda.get_device_properties(device).uuid), load)


@lru_cache(maxsize=8)
def _reader(uuid: str, load: Callable[[str], Any]) -> Callable[[], Reading | None]:
    try:
        library = load(LIBRARY)
    except OSError:
        return lambda: None
    handle, clock, power = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return lambda: None

    def read() -> Reading | None:
        if library.nvmlDeviceGetClockInfo(handle, MULTIPROCESSORS, ctypes.byref(clock)):
            return None
        if library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(power)):
            return None
        return Reading(clock.value, power.value / 1e3)

    return read
