"""Cluster descriptions: what a task costs, what ships, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn.parallel.cluster import SHIPPED, load_cluster, read_cluster
from distattn.parallel.mask import causal
from distattn.parallel.schedules import make_plan
from distattn.parallel.shape import Shape
from distattn.parallel.simulate import simulate
from distattn.parallel.transpose import transpose
from tests.parallel.clusters import ROW, SHAPE, cluster, description, seconds


def test_kernels_by_shape() -> None:
    """Efficiency in straight lines of logarithms, in proportion below the first point; row traffic, launches, bands, units."""
    curve = {"launch_us": 3, "band_us": 2, "memory_gb_s": 1e12, "efficiency": {64: {16: 0.25, 64: 0.5}, 256: {16: 1.0}}}
    one = cluster(kernel__forward=curve)

    def rate(q: int, k: int, area: int | None = None, shape: Shape = SHAPE) -> float:
        area = q * k if area is None else area
        [spent] = one.task_seconds(np.array([area]), np.array([q]), np.array([k]), shape, "forward")
        return area * shape.heads * 4 * shape.d / 1e12 / (spent - max(1, q * k / area - 1) * 2e-6)

    assert (
        rate(16, 16) == pytest.approx(0.25) and rate(4, 4096) == pytest.approx(0.25 / 4) and rate(512, 64) == pytest.approx(0.5)
    )
    assert rate(32, 1000) == pytest.approx(math.sqrt(0.125))
    assert rate(64, 64, 64 * 65 // 2) == pytest.approx(0.5)  # a triangle is as good as a square
    assert rate(64, 4096, 64 * 128) == pytest.approx(0.25 / 4)  # a narrow band is not
    assert rate(16, 16, shape=Shape(4, 2, 128, 128, torch.float32)) == pytest.approx(0.5)
    wide = cluster(kernel__units=16, kernel__tile=128, kernel__forward__memory_gb_s=1, kernel__diagonal_rows={64: 64})
    spent = wide.task_seconds(np.array([256 * 512]), np.array([256]), np.array([512]), SHAPE, "forward")
    rows = 256 * 4 * (64 * 4 + 2 * 65 * 4) + 512 * ROW
    assert spent == pytest.approx([2 * seconds(256, 512) + rows / 1e9])  # 4 heads x 2 tiles on 16 units
    together = wide.task_seconds(*(np.array([x, x]) for x in (256 * 512, 256, 512)), SHAPE, "forward", np.array([0, 0]))
    assert together == pytest.approx([seconds(256, 512) + rows / 1e9] * 2)
    diagonal = cluster(kernel__diagonal_rows={64: 64})
    triangle, window = 512 * 513 // 2, 512 * 100  # a window of 100 has an edge more; never more than the area again
    for n, area, vain in ((512, triangle, 32 * 512), (32, 528, 496), (512, window, 64 * 512), (512, 5120, 5120)):
        spent = diagonal.task_seconds(*(np.array([x]) for x in (area, n, n)), SHAPE, "forward")
        assert spent == pytest.approx([seconds(1, area + vain)])


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_clusters(name: str) -> None:
    one = load_cluster(name)
    plan = make_plan("zigzag", causal(4096), 8)
    shape = Shape(32, 8, 128, 128, torch.bfloat16)
    times = simulate(plan, shape, one, transpose(plan))
    assert times.backward is not None and times.backward.seconds > times.forward.seconds > 0
    described = " ".join(one.sources)
    for key in ("kernel.peak_tflops", "kernel.memory_gb_s", "inside.port_gb_s", "inside.latency_us", "host"):
        assert key in described, f"{name} does not say where {key} is from"
    assert load_cluster(SHIPPED / f"{name}.yaml") == one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inside__port_gb_s": 0}, "inside.port_gb_s is 0, but must be above 0"),
        ({"inside__latency_us": -1}, "inside.latency_us is -1, but must be at least 0"),
        ({"devices": 0}, "devices is 0, but must be at least 1"),
        ({"nodes": 2.5}, "nodes must be a whole number"),
        ({"nodes": True}, "nodes must be a whole number"),
        ({"nodes": 2}, "nodes is 2, but between is missing"),
        (
            {"kernel__forward__efficiency": {64: {128: 1.2}}},
            "kernel.forward.efficiency.64.128 is 1.2, but must be above 0 and at most 1",
        ),
        ({"kernel__forward__efficiency": {}}, "kernel.forward.efficiency must hold at least one value"),
        ({"kernel__forward__efficiency": {0: {1: 1}}}, "efficiency.0 is 0, but must be above 0 and at least 1"),
        ({"kernel__peak_tflops": {"float8": 1}}, "no dtype 'float8'"),
        ({"kernel__peak_tflops": 3}, "kernel.peak_tflops must hold at least one value"),
        ({"kernel__peak": 3}, "unknown key kernel.peak. Keys here are .* Did you mean kernel.peak_tflops"),
        ({"hosts": 3}, "unknown key hosts.* Did you mean host"),
        ({"host": 3}, "host is a section, found 3"),
        ({"memory_gb": float("nan")}, "memory_gb is nan"),
        ({"memory_gb": "80GB"}, "memory_gb must be a number .* Found '80GB'"),
        ({"inside__port_gb_s": float("inf")}, "inside.port_gb_s is inf"),
        ({"host__asynchronous": 1}, "host.asynchronous must be true or false"),
        ({"host__cores": 0}, "host.cores is 0, but must be at least 1"),
        (
            {"between": {"nics": 65, "nic_gb_s": 1, "latency_us": 0, "through_port": False}},
            "between.nics is 65, but a node has 64 devices",
        ),
    ],
)
def test_impossible_figures(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^somewhere.yaml: .*{message}") as error:
        read_cluster(description(**change), "somewhere.yaml")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "key", ["name", "devices", "kernel", "inside", "host", "sources", "kernel__tile", "kernel__forward__launch_us"]
)
def test_missing_figures(key: str) -> None:
    data = description()
    *sections, last = key.split("__")
    place = data
    for section in sections:
        place = place[section]
    del place[last]
    with pytest.raises(ValueError, match=f"^x: {key.replace('__', '.')} is missing: .* Add it"):
        read_cluster(data, "x")


def test_files_of_clusters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no cluster 'h20'.*Clusters are .*h100.* Did you mean 'h200'"):
        load_cluster("h20")
    with pytest.raises(ValueError, match="There is no cluster"):
        load_cluster(tmp_path / "none.yaml")
    for text, message in (("a: [1", "no YAML that can be read"), ("- 1\n- 2", "must hold keys"), ("", "name is missing")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"bad.yaml.*{message}"):
            load_cluster(tmp_path / "bad.yaml")
