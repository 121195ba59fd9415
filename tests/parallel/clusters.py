"""Clusters for tests whose figures are round numbers, and the shape that they are asked about."""

from __future__ import annotations

import copy
from typing import Any

import torch

from distattn.parallel.cluster import Cluster, read_cluster
from distattn.parallel.shape import Shape

SHAPE = Shape(4, 2, 64, 64, torch.float32)
ROW = 2 * (64 + 64) * 4  # bytes of a row of keys and values
PAIR = 4 * 4 * 64  # operations of a pair forward


def description(**changes: Any) -> dict[str, Any]:
    """1 TFLOP/s at any shape, 1 GB/s out of and into each device, everything else free; ``a__b=x`` changes key b of section a."""
    curve = {"launch_us": 0, "band_us": 0, "memory_gb_s": 1e12, "efficiency": {64: {1: 1.0}}}
    data: dict[str, Any] = {
        "name": "round numbers",
        "nodes": 1,
        "devices": 64,
        "memory_gb": 1,
        "kernel": {
            "peak_tflops": {"float32": 1, "bfloat16": 1},
            "units": 1,
            "tile": 1,
            "diagonal_rows": {128: 0},
            "forward": curve,
            "backward": copy.deepcopy(curve),
        },
        "inside": {"port_gb_s": 1, "latency_us": 0},
        "host": {"pass_us": 0, "stage_us": 0, "message_us": 0, "copy_gb_s": 1e12, "asynchronous": True},
        "sources": {"all": "made up"},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return data


def cluster(**changes: Any) -> Cluster:
    return read_cluster(description(**changes), "test")


def seconds(q: int, k: int) -> float:
    """Of a full task at 1 TFLOP/s."""
    return q * k * PAIR / 1e12
