"""Ranks of a benchmark that starts them itself: processes of one thread, connected over gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.parallel.comm_process import ProcessCommunicator


@contextmanager
def connected(rank: int, ranks: int, folder: Path, timeout: float) -> Iterator[ProcessCommunicator]:
    """This process as one rank of ``ranks``, which meet in ``folder``; ``timeout`` in seconds."""
    import torch
    import torch.distributed as dist

    from distattn.parallel.comm_process import ProcessCommunicator

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, timeout=timedelta(seconds=timeout), world_size=ranks, rank=rank)
    communicator = ProcessCommunicator(timeout=timeout)
    yield communicator
    communicator.close()
    dist.destroy_process_group()
