"""Text from a trained model whose context is spread over ranks.

The prompt goes through the model as a sequence does in training: each rank has its rows of it, and keeps their keys and values.
Then every rank computes each new token (all but attention is cheap), attends with it over all ranks, and one of them keeps it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from distattn.attention import AttentionPlan, ContextParallel
from distattn.checkpoint import MANIFEST, PROGRESS, Checkpoints, read_progress
from distattn.config import ModelConfig
from distattn.decode import decode_attention
from distattn.kv_cache import KVCache, KVShard
from distattn.model import Attend, Decoder
from distattn.parallel.mask import causal


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Args:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens can be taken; 0 is all.
        seed: of the random numbers. The same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (the likeliest token) or positive. Found {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or positive. Found {self.top_k}.")

    def choose(self, logits: Tensor, chance: float) -> int:
        """The token of logits [V] that a number from [0, 1) stands for."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu() / self.temperature
        if 0 < self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        below = logits.softmax(0).cumsum(0)
        return int(torch.searchsorted(below, chance * below[-1], right=True).clamp(max=int(logits.isfinite().nonzero()[-1])))


def generate(
    model: Decoder,
    cp: ContextParallel,
    prompt: Tensor,
    count: int,
    sampling: Sampling | None = None,
    *,
    vocabulary: int | None = None,
    devices: int | None = None,
    block: int = 512,
) -> Iterator[int]:
    """The ``count`` tokens after ``prompt``, one by one. Every rank runs this with the same arguments and gets the same tokens.

    Args:
        model: whole on every rank, on the device of the rank.
        prompt: int64 [N], N at least 1, the same on every rank; it may be shorter than there are ranks.
        vocabulary: only the first so many tokens are taken; None is all that the model has.
        devices: ranks of a node, see :func:`distattn.decode_attention`.
        block: of the cache, see :class:`distattn.KVCache`.

    Raises:
        ValueError: an empty prompt, or one with tokens that the model does not have.
    """
    config, sampling = model.config, sampling or Sampling()
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(f"The prompt must have at least one token, [N]. Found {list(prompt.shape)}.")
    if int(prompt.min()) < 0 or int(prompt.max()) >= config.vocab_size:
        raise ValueError(
            f"The prompt has tokens from {int(prompt.min())} to {int(prompt.max())}, the model knows 0 to "
            f"{config.vocab_size - 1}. Use the tokenizer that the model was trained with."
        )
    device = model.embedding.weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.embedding.weight.dtype
    options: dict[str, Any] = {"dtype": dtype, "device": device, "capacity": len(prompt) + count, "block": block}
    cache = KVCache(cp, config.layers, config.kv_heads, config.head_width, **options)
    return _tokens(model, cp, cache, prompt.to(device), count, sampling, vocabulary, devices)


@torch.no_grad()
def _tokens(
    model: Decoder,
    cp: ContextParallel,
    cache: KVCache,
    prompt: Tensor,
    count: int,
    sampling: Sampling,
    vocabulary: int | None,
    devices: int | None,
) -> Iterator[int]:
    random = torch.Generator().manual_seed(sampling.seed)  # on every rank, so that any of them can choose
    logits, speaker = prefill(model, cp, cache, prompt), last_owner(cp, len(prompt))
    for number in range(count):
        chance = float(torch.rand((), generator=random, dtype=torch.float64))
        mine = sampling.choose(logits[-1, :vocabulary], chance) if cp.rank == speaker else 0
        # One rank's word counts: ranks of different hardware may round their logits differently.
        token = int.from_bytes(cp.communicator.all_gather_bytes(mine.to_bytes(8, "little"))[speaker], "little")
        yield token
        if number + 1 < count:
            logits, speaker = step(model, cp, cache, prompt.new_tensor([token]), devices), 0


def last_owner(cp: ContextParallel, length: int) -> int:
    """The rank that holds the last row of a prompt."""
    return int(cp.plan(causal(length)).layout.owner_of(length - 1)[0])


def prefill(model: Decoder, cp: ContextParallel, cache: KVCache, tokens: Tensor) -> Tensor:
    """Fills an empty cache with a prompt [N]. Returns the logits of its last token: [1, V] on its owner, [0, V] elsewhere."""
    plan = cp.plan(causal(len(tokens)))
    cache.prefill(plan.layout)
    batch = cp.shard_batch(tokens, plan)
    here = len(batch.tokens)
    last = slice(here - 1, here) if last_owner(cp, len(tokens)) == cp.rank else slice(0, 0)

    def attend(shard: KVShard, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shard.fill(k, v)
        return _attend(cp, plan, q, k, v)

    return model(batch.tokens, batch.positions, layer_by_layer(cache, attend), rows=last)


def step(model: Decoder, cp: ContextParallel, cache: KVCache, tokens: Tensor, devices: int | None = None) -> Tensor:
    """Appends tokens [n], the same on every rank, and returns their logits [n, V], the same on every rank."""
    positions = cache.extend(len(tokens))

    def attend(shard: KVShard, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shard.append(k, v)
        out = decode_attention(q, shard, cp, devices=devices)
        assert isinstance(out, Tensor)
        return out

    return model(tokens, torch.arange(positions.start, positions.stop, device=tokens.device), layer_by_layer(cache, attend))


def layer_by_layer(cache: KVCache, attend: Callable[[KVShard, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """What one pass of the model attends with: it asks once a layer, in order."""
    shards = iter([cache[layer] for layer in range(len(cache))])
    return lambda q, k, v: attend(next(shards), q, k, v)


def _attend(cp: ContextParallel, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = cp.attention(q, k, v, plan)
    assert isinstance(out, Tensor)
    return out


def find_checkpoint(path: Path) -> Path:
    """The newest whole checkpoint of a run (its out=) or of its folder ``checkpoints``, or ``path`` itself. All ranks call this.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"No folder {path}. Name the out= of a run of launch/train.py, or one of its checkpoints/step_...")
    if (path / PROGRESS).is_file():
        missing = _missing(path)
        if missing:
            raise ValueError(f"The checkpoint {path} is damaged: {missing}. Name another of the same run.")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, passed = Checkpoints(folder).newest()
    if found is None:
        why = f" {passed[0]}" if passed else ""
        raise ValueError(
            f"There is no whole checkpoint in {folder}.{why} Name the out= of a run of launch/train.py, or one of its "
            "checkpoints/step_..."
        )
    return found


def _missing(path: Path) -> str:
    """What a checkpoint lacks of its manifest; empty if nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or not readable"
    for name, (size, _) in manifest.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} has {size} bytes in {MANIFEST}, " + ("and is not there" if found is None else f"found {found}")
    return ""


def read_model_config(path: Path) -> ModelConfig:
    """What the model of a checkpoint is."""
    saved = read_progress(path)["model"]
    try:
        return ModelConfig(**saved)
    except TypeError as error:
        raise ValueError(f"{path} is a checkpoint of another version of distattn: {error}. Load it with that version.") from None


def load_model(path: Path, device: torch.device) -> Decoder:
    """The model of a checkpoint, whole, on ``device``. All ranks call this."""
    config = read_model_config(path)
    with torch.device("meta"):
        model = Decoder(config).to(getattr(torch, config.dtype))
    model.to_empty(device=device)
    if config.tie_head:
        model.head.weight = model.embedding.weight
    state = {"model": get_model_state_dict(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a process group the library says that it loads in a single process
        dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    return model.eval()
