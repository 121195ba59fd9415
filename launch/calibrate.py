"""Measures a cluster for the simulator: torchrun --nproc-per-node N launch/calibrate.py --out FILE

Kernels of many shapes, links alone and all at once through the communicator that attention uses, and what the executor itself
costs; written as a description that --cluster takes. Started alone on CPUs it starts its own processes (--ranks). Exit code 0:
written; 1: something failed; 2: a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distattn.launch.doctor import Parser, print_line
from distattn.launch.other_load import OtherLoad
from distattn.launch.train import Place, choose_device

if TYPE_CHECKING:
    import torch

    from distattn.parallel.comm import Communicator

QUIET = 0.05  # of the cores, for other programs, that does no harm
SWEEPS = 4  # over everything: the speed of a machine wanders by 20% within seconds
MANY_NODES = 512  # what is measured on some nodes is taken to hold on as many


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("calibrate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="FILE", help="the description to write, a .yaml file (needed)")
    made.add_argument("--name", default="", help="what the cluster is called in tables (default: what it is made of)")
    made.add_argument(
        "--base", default="", metavar="CLUSTER", help="take links that cannot be measured here from this description"
    )
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: the GPUs where there are any")
    made.add_argument("--backend", choices=["triton", "aten", "reference"], help="measure this kernel and no other")
    made.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that a start without torchrun makes on CPUs")
    made.add_argument("--quick", action="store_true", help="fewer shapes, short measurements: to see that it runs")
    made.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait for a rank (default: 600)")
    return made


def parse(words: list[str]) -> argparse.Namespace:
    """Raises ValueError for what cannot be meant."""
    from distattn.parallel.cluster import load_cluster

    asked = parser().parse_args(words)
    if asked.out is None:
        raise ValueError("--out is missing: the description to write. Pass for example --out mine.yaml.")
    if asked.out.suffix != ".yaml":
        raise ValueError(f"--out {asked.out}: descriptions are .yaml files. Pass --out {asked.out}.yaml.")
    if not asked.out.absolute().parent.is_dir():
        raise ValueError(f"--out {asked.out}: there is no folder {asked.out.absolute().parent}. Make it first.")
    if asked.ranks < 1:
        raise ValueError(f"--ranks {asked.ranks} is no number of processes. Pass 2 or more, or 1 with --base.")
    if not asked.timeout > 0:
        raise ValueError(f"--timeout {asked.timeout:g} is no time to wait. Pass seconds above 0.")
    if asked.base:
        load_cluster(asked.base)
    return asked


def main(arguments: list[str] | None = None) -> int:
    """0 written, 1 something failed, 2 a mistake in what was asked, which is printed."""
    words = sys.argv[1:] if arguments is None else arguments
    place = Place.of_this_process()
    if {"-h", "--help"} & set(words):
        if place.rank == 0:
            parser().print_help()
        return 0
    try:
        asked = parse(words)
        device = choose_device(asked.device, place)
        starts = not place.started_by_torchrun and device.type == "cpu" and asked.ranks > 1
        if not starts and place.size == 1 and not asked.base:
            raise ValueError(
                "One process has no links to measure. Start torchrun --nproc-per-node N launch/calibrate.py ..., "
                "or pass --base CLUSTER to take them from its description."
            )
    except ValueError as error:
        if place.rank != 0:
            time.sleep(10)  # rank 0 says it; torchrun ends the others when rank 0 has gone
            return 2
        print(f"error: {str(error).replace('train.device=', '--device ')}", file=sys.stderr, flush=True)
        return 2
    return start_ranks(asked.ranks, words) if starts else run(asked, place, device)


def start_ranks(ranks: int, words: list[str]) -> int:
    """This program again, under torchrun, a thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__, *words]
    return min(subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode, 1)


def run(asked: argparse.Namespace, place: Place, device: torch.device) -> int:
    """Connects the ranks, measures, writes."""
    import torch.distributed as dist

    from distattn.parallel.comm import SoloCommunicator

    say = print_line if place.rank == 0 else lambda _: None
    communicator: Communicator = SoloCommunicator()
    try:
        if place.size > 1:
            from distattn.parallel.comm_process import ProcessCommunicator

            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=asked.timeout))
            communicator = ProcessCommunicator(timeout=asked.timeout)
        start, load = time.monotonic(), OtherLoad(communicator)
        data = measure(communicator, device, asked, place, say)
        others = load.share()
        if others > QUIET and device.type == "cpu":
            say(f"OTHER PROGRAMS took {others:.0%} of the cores: measure again when the machine does nothing else.")
        if place.rank == 0:
            write(data, asked.out)
            say(f"written to {asked.out} in {time.monotonic() - start:.0f} s")
        communicator.all_gather_bytes(b"written")
    except (ValueError, RuntimeError, OSError) as error:
        communicator.fail(error)
        print(f"error on rank {place.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        communicator.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def measure(
    communicator: Communicator, device: torch.device, asked: argparse.Namespace, place: Place, say: Callable[[str], None]
) -> dict[str, Any]:
    """The whole description; what rank 0 returns is what counts. Kernels run on all ranks that have a core of their own."""
    from distattn.launch.bench_attention_single import Problem
    from distattn.launch.calibrate_kernels import Bench, Grid, measure_kernel
    from distattn.launch.calibrate_links import Nodes, everybody, measure_host, measure_links, measure_traffic, same_sizes
    from distattn.launch.doctor_links import Probe

    nodes = Nodes(communicator.world, same_sizes(everybody(communicator, place.local_size)))
    cores = usable_cores() if device.type == "cpu" else None
    grid = Grid.of(device, asked.quick)
    probe = Probe(
        communicator, device, (1 if asked.quick else 8 if device.type == "cpu" else 64) * 2**20, 3 if asked.quick else 9
    )
    bench = Bench(device, grid, asked.backend)
    kernel: dict[str, Any] = {}
    sweeps: list[dict[str, dict[str, Any]]] = []
    for sweep in range(1 if asked.quick else SWEEPS):
        last = sweep == (0 if asked.quick else SWEEPS - 1)
        tell = say if last else lambda _: None
        if not last:
            say(f"sweep {sweep + 1} of {SWEEPS}")
        if cores is None or place.local_rank < cores:
            kernel = measure_kernel(bench, tell)
        kernel = everybody(communicator, _with_text_keys(kernel))[0]
        problem = Problem(1, grid.heads, grid.kv_heads, grid.sizes[len(grid.sizes) // 2], grid.dtype, device)
        found = measure_links(probe, nodes, tell)
        host = measure_host(probe, problem, kernel, cores, 3 if asked.quick else 10)
        if cores is not None and nodes.devices > 1:
            host["traffic_us_mb"] = round(measure_traffic(probe, *nodes.neighbours(communicator.rank)), 1)
        sweeps.append(found | {"host": host})
    found = medians(sweeps)
    host = found.pop("host")
    say("host: " + ", ".join(f"{key} {value}" for key, value in host.items()))
    return describe(asked, device, nodes, kernel, found, host)


def medians(sweeps: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each figure of each section as the middle one of all sweeps that found it; what is no measurement from the last."""
    made: dict[str, dict[str, Any]] = {}
    for section, figures in sweeps[-1].items():
        made[section] = {}
        for key, value in figures.items():
            found = [sweep[section][key] for sweep in sweeps if key in sweep[section]]
            made[section][key] = float(f"{statistics.median(found):.4g}") if isinstance(value, float) else value
    return made


def describe(
    asked: argparse.Namespace,
    device: torch.device,
    nodes: Any,
    kernel: dict[str, Any],
    found: dict[str, Any],
    host: dict[str, Any],
) -> dict[str, Any]:
    """The description as nested mappings, with where each part is from."""
    from dataclasses import asdict

    import torch

    from distattn.parallel.cluster import load_cluster

    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{host['cores']} CPU cores, gloo"
    measured = f"measured by launch/calibrate.py with torch {torch.__version__}, {nodes.world} ranks"
    sources = dict.fromkeys(("kernel", "host", *found), measured)
    sources["kernel.peak_tflops"] = measured + "; of dtypes beside the main one such that its curve fits a long launch of theirs"
    sources |= {"kernel.memory_gb_s": measured, "memory_gb": "what the device says"}
    for section in ("inside", "between"):
        base = asdict(load_cluster(asked.base))[section] if asked.base and section not in found else None
        if base is not None:
            found[section], sources[section] = base, f"from {asked.base}, not measured here"
    for key in ("port_gb_s", "latency_us"):
        sources[f"inside.{key}"] = sources.get("inside", measured)
    if device.type == "cpu":
        devices = 16 * host["cores"]
        sources["devices"] = "as many ranks as anybody may start; they share the cores"
    else:
        devices = nodes.devices if nodes.devices > 1 or not asked.base else load_cluster(asked.base).devices
    return {
        "name": asked.name or (what if device.type == "cpu" else f"{devices}x{what}"),
        "nodes": MANY_NODES if "between" in found else 1,
        "devices": devices,
        "memory_gb": memory_gb(device),
        "kernel": kernel,
        **found,
        "host": host,
        "sources": sources,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb(device: torch.device) -> float:
    """Memory of the device, or of the machine, in 1e9 bytes."""
    import torch

    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _with_text_keys(data: Any) -> Any:
    """JSON knows no numbers as keys; made explicit, so that both ways are seen in one place."""
    return {str(k): _with_text_keys(v) for k, v in data.items()} if isinstance(data, dict) else data


def _with_whole_keys(data: Any) -> Any:
    return {int(k) if k.isdigit() else k: _with_whole_keys(v) for k, v in data.items()} if isinstance(data, dict) else data


def write(data: dict[str, Any], path: Path) -> None:
    """Checks the description as whoever reads it will, then writes it.

    Raises:
        ValueError: a figure came out impossible.
    """
    import yaml  # type: ignore[import-untyped]

    from distattn.parallel.cluster import read_cluster

    data = _with_whole_keys(data)
    read_cluster(data, "what was measured")
    head = "# Made by launch/calibrate.py. What each figure means: parallel/cluster.py.\n"
    figures = {key: value for key, value in data.items() if key != "sources"}
    text = yaml.safe_dump(figures, sort_keys=False, width=120, default_flow_style=None)
    path.write_text(head + text + yaml.safe_dump({"sources": data["sources"]}, width=120))


if __name__ == "__main__":
    sys.exit(main())
