"""Writes on from a prompt: torchrun --nproc-per-node N launch/generate.py --checkpoint RUN --prompt TEXT

The model is a checkpoint of launch/train.py. The context is spread over the ranks: each holds its part of the keys and values,
no rank all of them, so a prompt may be longer than one device could hold. On one device python launch/generate.py does it too.
The text goes to standard output as it comes, everything else to standard error.
"""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from distattn.launch.train import Place, choose_device

if TYPE_CHECKING:
    import numpy as np
    import torch

    from distattn.config import ModelConfig

Say = Callable[[int], str]
"""The text that one more token makes sure of; -1: there are no more."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="out= of a run, or one of its checkpoints")
    prompt = made.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to go on from")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with that text")
    made.add_argument("--tokens", type=int, default=256, metavar="N", help="how many to generate (default: 256)")
    made.add_argument("--temperature", type=float, default=0.8, metavar="T", help="of the sampling; 0 is --greedy (default: 0.8)")
    made.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 is all (default)")
    made.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    made.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    made.add_argument("--tokenizer", help="'byte' or a tokenizers JSON file (default: byte for a vocabulary of 256)")
    made.add_argument("--schedule", default="zigzag", help="how the prompt is spread over the ranks (default: zigzag)")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: GPUs where there are any")
    made.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds that a rank waits for another")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0 is success, 2 a mistake in what was asked, which is printed."""
    place = Place.of_this_process()
    asked = parser().parse_args(arguments)
    try:
        text = check(asked)
    except ValueError as error:
        if place.rank != 0:
            time.sleep(10)  # rank 0 says it; torchrun ends the others when rank 0 has gone
            return 2
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        run(asked, text, place)
    except (ValueError, OSError) as error:
        print(f"error on rank {place.rank}: {error}" if place.size > 1 else f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def check(asked: argparse.Namespace) -> bytes:
    """The text of the prompt. Raises ValueError for what can be found wrong without torch."""
    if asked.tokens < 1:
        raise ValueError(f"--tokens {asked.tokens} was asked for. Pass 1 or more.")
    if not 0 <= asked.temperature < float("inf"):
        raise ValueError(f"--temperature {asked.temperature:g} must be 0 (greedy) or positive.")
    if asked.top_k < 0:
        raise ValueError(f"--top-k {asked.top_k} must be 0 (all tokens) or positive.")
    if not asked.timeout > 0:
        raise ValueError(f"--timeout {asked.timeout:g} is no time to wait. Pass seconds above 0.")
    if not asked.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {asked.checkpoint}: no such folder. Name the out= of a run, such as runs/quickstart.")
    if asked.prompt_file is None:
        text = asked.prompt.encode("utf-8", "surrogateescape")
    else:
        try:
            text = asked.prompt_file.read_bytes()
        except OSError as error:
            raise ValueError(f"--prompt-file {asked.prompt_file} cannot be read: {error.strerror}.") from None
    if not text:
        raise ValueError("The prompt is empty. Pass some text with --prompt, or a file that is not empty with --prompt-file.")
    return text


def run(asked: argparse.Namespace, text: bytes, place: Place) -> None:
    """Connects the ranks, loads the model, generates."""
    import torch.distributed as dist

    device = choose_device(asked.device, place)
    if place.started_by_torchrun:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=asked.timeout))
    try:
        generate_text(asked, text, place, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def generate_text(asked: argparse.Namespace, text: bytes, place: Place, device: torch.device) -> None:
    """Prints the prompt and what comes after it, on rank 0."""
    import contextlib

    import torch
    import torch.distributed as dist

    from distattn.attention import ContextParallel
    from distattn.generation import Sampling, find_checkpoint, generate, load_model, read_model_config

    path = find_checkpoint(asked.checkpoint)
    prompt, vocabulary, say = tokens_of(text, asked.tokenizer, read_model_config(path), path)
    cp = ContextParallel(dist.group.WORLD if dist.is_initialized() else None, schedule=asked.schedule, timeout=asked.timeout)
    model = load_model(path, device)
    sampling = Sampling(0.0 if asked.greedy else asked.temperature, asked.top_k, asked.seed)
    show = show_text if place.rank == 0 else ignore
    show(text.decode("utf-8", "replace"))
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    devices = place.local_size if place.size % place.local_size == 0 else None
    start, first = time.monotonic(), None
    with autocast:
        for token in generate(
            model, cp, torch.from_numpy(prompt), asked.tokens, sampling, vocabulary=vocabulary, devices=devices
        ):
            first = first or time.monotonic()
            show(say(token))
    assert first is not None
    show(say(-1) + "\n")
    if place.rank == 0:
        each = (time.monotonic() - first) / max(1, asked.tokens - 1)
        print(
            f"{path}: prompt of {len(prompt)} tokens on {place.size} ranks in {first - start:.2f} s, then {asked.tokens} tokens, "
            f"{each * 1e3:.1f} ms each",
            file=sys.stderr,
        )
    cp.close()


def tokens_of(text: bytes, tokenizer: str | None, model: ModelConfig, path: Path) -> tuple[np.ndarray, int, Say]:
    """(int64 tokens [N], size of the vocabulary, tokens -> text). Raises ValueError where tokenizer and model do not fit."""
    import numpy as np

    from distattn.corpus import BYTE, load_tokenizer

    if tokenizer is None and model.vocab_size != 256:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens, not of bytes. Name its tokenizer with --tokenizer FILE."
        )
    name = tokenizer or BYTE
    vocabulary, encode = load_tokenizer(name)
    if vocabulary > model.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens, the tokenizer {name!r} makes {vocabulary}. Name the "
            "tokenizer that the model was trained with."
        )
    tokens = encode(text).astype(np.int64)
    if not len(tokens):
        raise ValueError(f"The tokenizer {name!r} makes no token of this prompt. Pass more text.")
    return tokens, vocabulary, say_bytes() if name == BYTE else say_tokens(name)


def say_bytes() -> Say:
    """Tokens are bytes; a character is said when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token: decoder.decode(b"", final=True) if token < 0 else decoder.decode(bytes([token]))


def say_tokens(name: str) -> Say:
    """Tokens of a tokenizers JSON file; text is said when no later token can change it."""
    from tokenizers import Tokenizer

    tokenizer, said = Tokenizer.from_file(name), ""
    tokens: list[int] = []

    def say(token: int) -> str:
        nonlocal said
        if token >= 0:
            tokens.append(token)
        whole = tokenizer.decode(tokens)
        if token >= 0 and whole.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character
            return ""
        new, said = whole[len(said) :], whole
        return new

    return say


def show_text(text: str) -> None:
    """At once, also into a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()


def ignore(text: str) -> None:
    """What ranks other than 0 do with the text."""


if __name__ == "__main__":
    sys.exit(main())
