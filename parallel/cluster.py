"""Cluster: what the simulator knows of machines: kernels, links, hosts and memory; read from YAML, strictly.

Bandwidths are in GB/s = 1e9 bytes a second and count one direction, latencies and overheads in microseconds, speeds in TFLOP/s.
The descriptions that ship lie in ``configs/clusters``; ``launch/calibrate.py`` measures a cluster and writes another.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distattn.parallel.shape import Shape

Direction = Literal["forward", "backward"]
DTYPES = ("float64", "float32", "bfloat16", "float16")
# This layer knows no files but these: whoever names a cluster means its file. A wheel does not hold them.
SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "clusters"


def figure(doc: str, above: float = -math.inf, least: float = -math.inf, most: float = math.inf, default: Any = MISSING) -> Any:
    """A key of the file: what it means, and between which bounds it makes sense."""
    return field(default=default, metadata={"doc": doc, "above": above, "least": least, "most": most})


@dataclass(frozen=True)
class Curve:
    """How fast the kernel of one direction is."""

    launch_us: float = figure("of one launch, however small", least=0)
    band_us: float = figure("of each band in a launch, of each square along a window", least=0)
    memory_gb_s: float = figure("at which rows, states and gradients are read and written", above=0)
    efficiency: dict[int, dict[int, float]] = figure(
        "share of the peak, by head size and by the shorter side of a band's rectangle in rows", above=0, most=1
    )

    @cached_property
    def _tables(self) -> list[tuple[float, np.ndarray, np.ndarray]]:
        """(log2 of the head size, log2 of the sides, log2 of the efficiencies), in rising order."""
        made = []
        for size, points in sorted(self.efficiency.items()):
            sides = sorted(points)
            made.append((math.log2(size), np.log2(sides), np.log2([points[side] for side in sides])))
        return made

    def share(self, side: np.ndarray, head_size: int) -> np.ndarray:
        """Share of the peak; between points straight lines in logarithms, below the first in proportion to the side."""
        x = np.log2(np.maximum(side, 1))
        values = [np.interp(x, xs, ys) + np.minimum(x - xs[0], 0.0) for _, xs, ys in self._tables]
        sizes = [size for size, _, _ in self._tables]
        at = float(np.interp(math.log2(head_size), sizes, np.arange(len(sizes))))
        low, high = int(at), min(int(at) + 1, len(sizes) - 1)
        return np.exp2(values[low] * (1 - (at - low)) + values[high] * (at - low))

    def best(self, head_size: int) -> float:
        """The most that :meth:`share` is for any side."""
        sides = np.concatenate([list(points) for points in self.efficiency.values()])
        return float(self.share(sides, head_size).max())


@dataclass(frozen=True)
class Kernel:
    """Attention on one device."""

    peak_tflops: dict[str, float] = figure("of a large matrix product, by dtype", above=0)
    units: int = figure("programs that run at the same time; fewer leave a part of the device idle", least=1)
    tile: int = figure("rows of one program", least=1)
    diagonal_rows: dict[int, float] = figure(
        "width of the tiles along a diagonal edge, half of which are computed in vain, by the edge's length in rows", least=0
    )
    forward: Curve = figure("the forward kernel")
    backward: Curve = figure("the backward kernel")

    def diagonal(self, length: np.ndarray) -> np.ndarray:
        """Width of the tiles along an edge of so many rows; straight lines over the logarithm between those that are known."""
        known = sorted(self.diagonal_rows)
        return np.interp(np.log2(np.maximum(length, 1)), np.log2(known), [self.diagonal_rows[rows] for rows in known])


@dataclass(frozen=True)
class Inside:
    """Links between the devices of one node."""

    port_gb_s: float = figure("of one device, out and in each", above=0)
    latency_us: float = figure("of a message between two devices", least=0)
    shared_gb_s: float | None = figure("of all messages of a node; without: they meet only at ports", above=0, default=None)


@dataclass(frozen=True)
class Between:
    """Links between nodes."""

    nics: int = figure("rails of a node; device i uses rail i * nics // devices", least=1)
    nic_gb_s: float = figure("of one rail, out and in each", above=0)
    latency_us: float = figure("of a message between two nodes", least=0)
    through_port: bool = figure("whether such messages also occupy the device's port inside the node")


@dataclass(frozen=True)
class Host:
    """What the executor costs beside kernels and links."""

    pass_us: float = figure("of a pass: operator, autograd and the like", least=0)
    stage_us: float = figure("of a stage", least=0)
    message_us: float = figure("of posting one message, at each end", least=0)
    copy_gb_s: float = figure("at which messages are packed and unpacked, bytes of the message", above=0)
    asynchronous: bool = figure("whether the host runs ahead of its device (GPUs), or is the device (CPUs)")
    cores: int | None = figure("that all ranks of a node share, a thread each; without: each has a device", least=1, default=None)
    traffic_us_mb: float = figure("of a shared core for each million bytes that leave or reach its rank", least=0, default=0.0)


@dataclass(frozen=True)
class Cluster:
    """Nodes of devices. Rank r is device ``r % devices`` of node ``r // devices``; fewer ranks than devices are one node's."""

    name: str = figure("what it is called in tables")
    nodes: int = figure("at most", least=1)
    devices: int = figure("of a node: as many ranks", least=1)
    memory_gb: float = figure("of one device", above=0)
    kernel: Kernel = figure("attention on one device")
    inside: Inside = figure("links inside a node")
    host: Host = figure("the executor")
    sources: dict[str, str] = figure("where each figure is from")
    between: Between | None = figure("links between nodes; may be missing where there is one node", default=None)

    def check_world(self, world: int) -> None:
        """Raises ValueError where ``world`` ranks do not fit."""
        if world > self.nodes * self.devices:
            raise ValueError(
                f"{world} ranks do not fit cluster {self.name!r}: {self.nodes} nodes of {self.devices} devices. "
                f"Use at most {self.nodes * self.devices} ranks, or a description with more nodes."
            )
        if world > self.devices and world % self.devices:
            raise ValueError(
                f"{world} ranks do not fill nodes of cluster {self.name!r}, which have {self.devices} devices. "
                f"Use a multiple of {self.devices}, or at most {self.devices} ranks."
            )

    def peak(self, shape: Shape) -> float:
        """FLOP/s of a large matrix product in the shape's dtype.

        Raises:
            ValueError: the description does not say.
        """
        name = str(shape.dtype).removeprefix("torch.")
        if name not in self.kernel.peak_tflops:
            raise ValueError(
                f"Cluster {self.name!r} has no peak for {name}; it has {', '.join(self.kernel.peak_tflops)}. "
                f"Add kernel.peak_tflops.{name} to its file, or use another dtype."
            )
        return self.kernel.peak_tflops[name] * 1e12

    def curve(self, direction: Direction) -> Curve:
        """The kernel of a direction."""
        return self.kernel.forward if direction == "forward" else self.kernel.backward

    def task_seconds(
        self,
        areas: np.ndarray,
        q_rows: np.ndarray,
        k_rows: np.ndarray,
        shape: Shape,
        direction: Direction,
        launch: np.ndarray | None = None,
    ) -> np.ndarray:
        """Seconds of bands on one device, without :meth:`launch_seconds`.

        Work over rate, the rate by the band's shorter side, the work with what tiles on a diagonal edge compute in vain; and the
        rows' way through memory. A launch of fewer programs than the device runs at once is slower in proportion.

        Args:
            areas: visible pairs of each band [n].
            q_rows, k_rows: the band's rectangle [n].
            launch: int64 [n], bands of equal number run together; None: each band alone.

        Returns:
            float64 [n].
        """
        kernel, curve = self.kernel, self.curve(direction)
        areas, q_rows, k_rows = (np.asarray(x, dtype=np.float64) for x in (areas, q_rows, k_rows))
        # The mean length of a diagonal band is half the side of a triangle, so twice it: a causal square counts as a square.
        longer, shorter = np.maximum(q_rows, k_rows), np.minimum(q_rows, k_rows)
        whole = q_rows * k_rows
        window = areas < whole / 2  # less than a triangle has two diagonal edges
        side = np.minimum(shorter, 2 * areas / np.maximum(longer, 1))
        # Windows are cut into triangles of their own width, along both edges.
        tiles = kernel.diagonal(np.where(window, side / 2, side)) * np.where(window, 1.0, 0.5)
        vain = np.minimum(np.minimum(whole - areas, areas), tiles * shorter)
        programs = shape.heads * np.ceil((q_rows if direction == "forward" else k_rows) / kernel.tile)
        if launch is not None:
            programs = np.bincount(launch, weights=programs)[launch] if len(launch) else programs
        rate = self.peak(shape) * curve.share(side, shape.d) * np.minimum(1.0, programs / kernel.units)
        flops = (areas + vain) * shape.heads * pair_flops(shape, direction)
        per_query, per_key = row_traffic(shape, direction)
        rows = (q_rows * per_query + k_rows * per_key) / (curve.memory_gb_s * 1e9)
        empty = areas == 0
        # What cuts windows into rectangles and triangles pays for each; two triangles and a little are one rectangle.
        pieces = np.maximum(1.0, whole / np.where(empty, 1.0, areas) - 1)
        return np.where(empty, 0.0, flops / np.where(empty, 1.0, rate) + rows + pieces * curve.band_us * 1e-6)

    def launch_seconds(self, direction: Direction) -> float:
        """What a launch costs before its first band."""
        return self.curve(direction).launch_us * 1e-6

    def message_seconds(self, sizes: np.ndarray, same_node: np.ndarray | bool = True) -> np.ndarray:
        """Seconds of messages of ``sizes`` bytes that meet no others, float64 [n].

        Args:
            same_node: whether both ends are in one node [n].
        """
        inside, between = self.inside, self.between
        near = np.asarray(sizes, dtype=np.float64) / (min(inside.port_gb_s, inside.shared_gb_s or math.inf) * 1e9)
        near = near + inside.latency_us * 1e-6
        if between is None:
            assert np.all(same_node), f"cluster {self.name} has one node"
            return near
        rate = min(between.nic_gb_s, inside.port_gb_s) if between.through_port else between.nic_gb_s
        far = np.asarray(sizes, dtype=np.float64) / (rate * 1e9) + between.latency_us * 1e-6
        return np.where(same_node, near, far)


def pair_flops(shape: Shape, direction: Direction) -> int:
    """Operations of one visible pair of one head: two products forward, five backward."""
    return 2 * (shape.d + shape.d_v) if direction == "forward" else 2 * (3 * shape.d + 2 * shape.d_v)


def row_traffic(shape: Shape, direction: Direction) -> tuple[int, int]:
    """(bytes of a query row, bytes of a key row) that a launch reads and writes at least: inputs, and sums there and back."""
    item, wide = shape.dtype.itemsize, shape.accumulate.itemsize
    keys = shape.kv_heads * (shape.d + shape.d_v)
    if direction == "forward":
        return shape.heads * (shape.d * item + 2 * (shape.d_v + 1) * wide), keys * item
    return shape.heads * ((shape.d + shape.d_v) * item + 2 * wide + 2 * shape.d * wide), keys * (item + 2 * wide)


def load_cluster(name: str | Path) -> Cluster:
    """A description that ships (``"h200"``), or any file by its path.

    Raises:
        ValueError: no such file, or the file says what cannot be; names the file, the key, what was found and what to do.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
        near = difflib.get_close_matches(str(name), shipped, n=1)
        known = f"Clusters are {', '.join(shipped)}" if shipped else f"There are no descriptions in {SHIPPED}"
        raise ValueError(
            f"There is no cluster {str(name)!r}: no file {path}. {known}, or the path of a .yaml file."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    try:
        loaded = OmegaConf.load(path)
        data = OmegaConf.to_container(loaded, resolve=True) if isinstance(loaded, DictConfig) else None
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold keys and values. See {SHIPPED / 'h200.yaml'} for an example.")
    return read_cluster(data, str(path))


def read_cluster(data: Mapping[Any, Any], origin: str) -> Cluster:
    """A cluster from nested mappings; ``origin`` names them in errors.

    Raises:
        ValueError: missing, unknown or impossible figures.
    """
    cluster = _read(Cluster, data, origin, "")
    if cluster.nodes > 1 and cluster.between is None:
        raise ValueError(f"{origin}: nodes is {cluster.nodes}, but between is missing. Describe the links, or set nodes: 1.")
    if cluster.between is not None and cluster.between.nics > cluster.devices:
        raise ValueError(
            f"{origin}: between.nics is {cluster.between.nics}, but a node has {cluster.devices} devices, each with one rail. "
            f"Set at most {cluster.devices}, with nic_gb_s for what one device gets."
        )
    unknown = [dtype for dtype in cluster.kernel.peak_tflops if dtype not in DTYPES]
    if unknown:
        raise ValueError(f"{origin}: kernel.peak_tflops has no dtype {unknown[0]!r}. Use {', '.join(DTYPES)}.")
    return cluster


def _read(kind: Any, data: Any, origin: str, prefix: str) -> Any:
    """One dataclass of the description."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{origin}: {prefix.rstrip('.')} is a section, found {data!r}. Give its keys, one a line.")
    known = {f.name: f for f in fields(kind)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{origin}: unknown key {prefix}{key}. Keys here are {', '.join(known)}.{hint}")
    types_of = typing.get_type_hints(kind)
    values = {}
    for key, f in known.items():
        if key in data:
            values[key] = _value(types_of[key], data[key], f.metadata, origin, prefix + key)
        elif f.default is MISSING:
            raise ValueError(f"{origin}: {prefix}{key} is missing: {f.metadata['doc']}. Add it.")
    return kind(**values)


def _value(kind: Any, found: Any, bounds: Mapping[str, Any], origin: str, key: str) -> Any:
    """One value, of its type and between its bounds."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if found is None else _value(arguments[0], found, bounds, origin, key)
    if is_dataclass(kind):
        return _read(kind, found, origin, key + ".")
    if typing.get_origin(kind) is dict:
        if not isinstance(found, Mapping) or not found:
            raise ValueError(f"{origin}: {key} must hold at least one value ({bounds['doc']}). Found {found!r}.")
        key_bounds = {"doc": bounds["doc"], "above": 0, "least": 1, "most": math.inf}
        return {
            _value(arguments[0], k, key_bounds, origin, f"the name of {key}.{k}"): _value(
                arguments[1], v, bounds, origin, f"{key}.{k}"
            )
            for k, v in found.items()
        }
    whole = isinstance(found, int) and not isinstance(found, bool)
    right = {bool: isinstance(found, bool), str: isinstance(found, str), int: whole, float: whole or isinstance(found, float)}[
        kind
    ]
    if not right:
        word = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{origin}: {key} must be {word} ({bounds['doc']}). Found {found!r}.")
    if kind in (int, float):
        _check_bounds(float(found), bounds, origin, key)
    return kind(found)


def _check_bounds(found: float, bounds: Mapping[str, Any], origin: str, key: str) -> None:
    above, least, most = bounds["above"], bounds["least"], bounds["most"]
    if math.isfinite(found) and found > above and least <= found <= most:
        return
    limits = [f"above {above:g}"] * (above > -math.inf) + [f"at least {least:g}"] * (least > -math.inf)
    limits += [f"at most {most:g}"] * (most < math.inf)
    raise ValueError(
        f"{origin}: {key} is {found:g}, but must be {' and '.join(limits) or 'finite'} ({bounds['doc']}). Correct it."
    )
