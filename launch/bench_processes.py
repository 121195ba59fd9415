"""Ranks of a benchmark that starts them itself: processes of one thread, connected over gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.parallel.comm_process import ProcessCommunicator


def check_asked(asked: dict[str, Any], counts: tuple[str, ...], path: Path | None) -> None:
    """What every such benchmark asks of its command line.

    Args:
        asked: its arguments; ``ranks`` and ``timeout`` are among them.
        counts: those that must be 1 or more.
        path: where ``--json`` writes.

    Raises:
        ValueError: for what cannot be measured or written.
    """
    for name in counts:
        if asked[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {asked[name]} was asked for. Pass 1 or more.")
    if asked["ranks"] < 2:
        raise ValueError(f"--ranks {asked['ranks']}: nothing travels between fewer than 2 ranks. Pass 2 or more.")
    if not asked["timeout"] > 0:
        raise ValueError(f"--timeout {asked['timeout']:g} is no time to wait. Pass seconds above 0.")
    if path and not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.absolute().parent}. Make it first.")


@contextmanager
def connected(rank: int, ranks: int, folder: Path, timeout: float, slots: int = 1) -> Iterator[ProcessCommunicator]:
    """This process as one rank of ``ranks``, which meet in ``folder``; ``timeout`` in seconds, ``slots`` with their own lanes."""
    import torch
    import torch.distributed as dist

    from distattn.parallel.comm import LANES
    from distattn.parallel.comm_process import ProcessCommunicator

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, timeout=timedelta(seconds=timeout), world_size=ranks, rank=rank)
    communicator = ProcessCommunicator(lanes=slots * LANES, timeout=timeout)
    yield communicator
    communicator.close()
    dist.destroy_process_group()


def benchmark(
    name: str,
    words: list[str] | None,
    parse: Callable[[list[str] | None], tuple[Any, Path | None]],
    rank_main: Callable[[int, Any, str], None],
    print_figures: Callable[[Any, dict[str, Any]], None],
    prepare: Callable[[Any, Path], None] | None = None,
) -> int:
    """What ``launch/<name>`` does: reads its command line, runs ``rank_main`` on processes, prints and writes the figures.

    Args:
        parse: makes a problem (a dataclass with ``ranks``) and the file for the figures, from words.
        rank_main: takes (rank, problem, folder); rank 0 writes ``figures.json`` into the folder.
        prepare: what is done in the folder before the ranks start.

    Returns:
        0 when everything was measured, 1 when a rank failed or a figure was ``refused``, 2 for a mistake in what was asked.
    """
    try:
        problem, path = parse(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch.multiprocessing as multiprocessing
    from torch.multiprocessing.spawn import ProcessException

    command = " ".join([f"python launch/{name}", *(sys.argv[1:] if words is None else words)])
    with tempfile.TemporaryDirectory(prefix="distattn-bench-") as folder:
        if prepare is not None:
            prepare(problem, Path(folder))
        try:
            multiprocessing.spawn(rank_main, (problem, folder), nprocs=problem.ranks)
        except ProcessException as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        figures = json.loads((Path(folder) / "figures.json").read_text())
    figures = {"command": command, "problem": dataclasses.asdict(problem), **figures}
    print_figures(problem, figures)
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"written: {path}")
    return 1 if figures.get("refused") else 0
