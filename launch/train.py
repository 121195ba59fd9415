"""Trains a model: torchrun --nproc-per-node N launch/train.py --config FILE key=value ...

On one device python launch/train.py does it too. Each rank reads the configuration, and refuses what cannot run before
any process group starts.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from distattn.config import Config, describe, load_config

if TYPE_CHECKING:
    import torch

USAGE = "train.py --config FILE [key=value ...]     --help lists the keys"


def main(arguments: list[str] | None = None) -> int:
    """Runs one training. 0 is success, 2 a mistake in what was asked, which is printed."""
    words = sys.argv[1:] if arguments is None else arguments
    place = Place.of_this_process()
    if "--help" in words or "-h" in words:
        if place.rank == 0:
            print_help()
        return 0
    try:
        path, overrides = read_arguments(words)
        config = load_config(path, overrides, place.size)
    except ValueError as error:
        if place.rank != 0:
            time.sleep(10)  # rank 0 says it; torchrun ends the others when rank 0 has gone
            return 2
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        run(config, place)
    except (ValueError, OSError) as error:
        print(f"error on rank {place.rank}: {error}" if place.size > 1 else f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


@dataclass(frozen=True)
class Place:
    """What torchrun says about this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    started_by_torchrun: bool

    @classmethod
    def of_this_process(cls) -> Place:
        def number(name: str, alone: int) -> int:
            return int(os.environ.get(name, alone))

        numbers = (number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))
        return cls(*numbers, started_by_torchrun="RANK" in os.environ)


def read_arguments(words: list[str]) -> tuple[Path, list[str]]:
    """(configuration file, key=value words)"""
    overrides, path, rest = [], None, iter(words)
    for word in rest:
        if word == "--config":
            path = next(rest, None)
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        elif word.startswith("-"):
            raise ValueError(f"Unknown option {word}. {USAGE}")
        else:
            overrides.append(word)
    if not path:
        raise ValueError(f"No configuration file. {USAGE}")
    return Path(path), overrides


def print_help() -> None:
    print(f"{__doc__}\n{USAGE}\n")
    for name, default, doc in describe():
        print(f"  {name + '=' + str(default):<38} {doc}")


def run(config: Config, place: Place) -> None:
    """Prepares the data where it is missing, connects the ranks, trains."""
    import torch.distributed as dist

    from distattn.parallelize import make_world
    from distattn.trainer import Trainer

    logging.basicConfig(format="%(message)s", level=logging.INFO if place.rank == 0 else logging.WARNING)
    device = choose_device(config.train.device, place)
    ready_kernels(config, device)
    if place.local_rank == 0:  # the others wait for this one where the process group starts
        ready_data(config)
    if place.started_by_torchrun:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.parallel.timeout))
    trainer = Trainer(config, make_world(config, device))
    try:
        trainer.train()
    finally:
        if trainer.cp.pool is not None:
            trainer.cp.pool.close()  # servers are told; the groups end with the process, as after an error nobody may wait
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str, place: Place) -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if place.local_size > found:
        raise ValueError(
            f"{place.local_size} processes were started here, one a GPU, but torch finds {found} GPUs. "
            f"Use --nproc-per-node {found}, or train.device=cpu."
            if found
            else "train.device=cuda, but torch finds no GPU. Use train.device=cpu, or install a CUDA build of torch."
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def ready_kernels(config: Config, device: torch.device) -> None:
    """Refuses a configuration whose kernels cannot run on this device."""
    import torch

    from distattn.kernels import choose
    from distattn.kernels.contract import Scores

    model = config.model
    dtype = torch.bfloat16 if device.type == "cuda" and config.train.autocast else getattr(torch, model.dtype)
    q, k = (torch.empty(1, heads, model.head_width, dtype=dtype, device=device) for heads in (model.heads, model.kv_heads))
    choose(q, k, k, Scores(model.head_width**-0.5), config.parallel.backend or None)
    if config.train.fused_loss and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("train.fused_loss needs liger-kernel: pip install 'distattn[gpu]', or set train.fused_loss=false.")


def ready_data(config: Config) -> None:
    """Makes the token file where it is missing and the configuration says from what; verifies it where it is there."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    from distattn.corpus import prepare
    from distattn.data import open_tokens

    data = config.data
    if data.source and not Path(data.path).exists():
        from distattn.launch.prepare import show_progress

        meta = prepare([data.source], data.path, data.tokenizer, show_progress, replace=False)
        print(f"prepared {data.path}: {meta['tokens']:,} tokens in {meta['documents']:,} documents", flush=True)
    open_tokens(data.path, data.verify).check_vocabulary(config.model.vocab_size)


if __name__ == "__main__":
    sys.exit(main())
