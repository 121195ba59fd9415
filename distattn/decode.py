"""Attention of a few new tokens over a context that is spread over ranks: tree decoding.

The queries are the same on every rank, the keys stay where they are. Each rank attends over its own rows and brings one partial
(o, lse) for each query and head; :mod:`distattn.parallel.merge_ranks` makes one softmax of them. What travels does not depend on
the length of the context (Shyam et al., "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters").

Inside a rank the same trick splits the work once more: each block of the cache is a key head of its own, with the query heads
that share it (and the new tokens) as rows. A kernel made for long queries then has enough to do, and reads every key once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distattn.attention import ContextParallel
from distattn.kernels.bands import Band, Bands
from distattn.kernels.contract import Scores, State, accumulate_dtype, empty_state
from distattn.kv_cache import KVCache, KVShard
from distattn.ops import Kernels
from distattn.parallel.merge_ranks import choose_exchange, combine, merge_ranks, note_of, read_note
from distattn.parallel.rank_plan import PlanMismatch, agree


@torch.no_grad()
def decode_attention(
    q: Tensor,
    kv_shard: KVShard,
    cp: ContextParallel,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    devices: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last ``n`` tokens of the context over all of it. No gradient.

    Args:
        q: [B, n, H_q, D] (or [n, H_q, D] for a cache of batch 1), the same on every rank, of the dtype of the cache; H_q is a
            multiple of the key heads, which are not expanded. Token i of n stands at position ``length - n + i``: its own key is
            in the cache already, and it sees nothing after itself (speculative tokens).
        kv_shard: one layer of a :class:`distattn.KVCache`, on every rank the same layer.
        cp: the ranks of the cache.
        scale, softcap, sinks: as for :meth:`ContextParallel.attention`; ``sinks`` [H_q] is the same on every rank.
        window: a query sees this many keys, itself included; None sees all before it.
        return_lse: also return the float32 lse [B, n, H_q].
        devices: ranks of a node (ranks of one node are neighbours): exchanges inside the nodes come first.

    Returns:
        out [B, n, H_q, D_v] in q's dtype: the same bits on every rank, and in every run.

    Raises:
        ValueError: q and the cache do not fit, or this layer lacks tokens.
        PlanMismatch: the ranks ask for different things, or hold contexts of different lengths.
    """
    cache = kv_shard.cache
    batched = q.dim() == 4
    _check(q, kv_shard, cp, sinks, softcap, window)
    q = q if batched else q.unsqueeze(0)
    batch, n, heads, d = q.shape
    group, d_v = heads // cache.kv_heads, cache.value_size
    scores = Scores(d**-0.5 if scale is None else float(scale), float(softcap))
    exchange = choose_exchange(batch * n * heads, d_v, cp.world, accumulate_dtype(q.dtype), q.dtype, return_lse, devices)
    _agree(cache, cp, f"q {list(q.shape)}, {scores}, window {window}, {'no' if sinks is None else 'with'} sinks, {exchange}")

    rows = q.unflatten(2, (cache.kv_heads, group)).permute(1, 3, 0, 2, 4).reshape(n * group, batch * cache.kv_heads, d)
    first = sinks if cp.rank == 0 else None  # a sink is one key of the whole context: one rank enters it
    if first is not None:
        first = first.unflatten(0, (cache.kv_heads, group)).T.repeat(n, batch)
    state = attend_shard(rows, kv_shard, plan_work(cache, n, window, group), scores, cp._kernels, first)

    note = note_of(cache.rows_here, cache.length, cp.rank, cp.world, q.device)
    flat = State(state.o.reshape(-1, d_v), state.lse.reshape(-1))
    out, lse, note = merge_ranks(flat, note, exchange, cp.communicator, q.dtype)
    _check_note(note, cache)

    def unfold(x: Tensor) -> Tensor:
        """[n * group * B * H_kv, ...] as [B, n, H_q, ...]."""
        x = x.unflatten(0, (n, group, batch, cache.kv_heads)).movedim(2, 0).transpose(2, 3).flatten(2, 3)
        return x if batched else x.squeeze(0)

    return (unfold(out), unfold(lse)) if return_lse else unfold(out)


@dataclass(frozen=True)
class Work:
    """What of a shard some queries see: whole blocks in runs, and parts of blocks."""

    whole: tuple[tuple[int, int], ...]
    """runs [first, stop) of blocks that every query sees whole"""
    everything: Bands
    """of the folded queries and a whole block"""
    parts: tuple[tuple[int, Bands], ...]
    """(block, bands in rows of the folded queries and of the block)"""


def plan_work(cache: KVCache, n: int, window: int | None, group: int) -> Work:
    """What the last ``n`` tokens see of this rank's rows, with ``group`` query heads as rows of each token; made once a length.

    Args:
        window: keys that a query sees, itself included; None sees all before it.
    """
    key = (n, window, group)
    if key not in cache.planned:
        cache.planned[key] = _plan_work(cache, n, window, group)
    return cache.planned[key]


def _plan_work(cache: KVCache, n: int, window: int | None, group: int) -> Work:
    starts = np.arange(0, cache.rows_here, cache.block)
    stops = np.minimum(starts + cache.block, cache.rows_here)
    runs = cache.runs
    seen = [_visible(runs, 0 if window is None else p - window + 1, p) for p in range(cache.length - n, cache.length)]
    some, full = (np.array(x).reshape(n, len(starts)) for x in zip(*(_meets(s, starts, stops) for s in seen), strict=True))
    common = np.logical_and.reduce(full)
    whole = common & (stops - starts == cache.block)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], whole, [False]]).astype(np.int8))).tolist()
    parts = []
    for b in np.flatnonzero(some.any(0) & ~whole).tolist():
        if common[b]:
            bands = Bands([Band(0, n * group, 0, int(stops[b] - starts[b]))])
        else:
            bands = Bands(_rectangles(seen, int(starts[b]), int(stops[b]), group))
        parts.append((b, bands))
    everything = Bands([Band(0, n * group, 0, cache.block)])
    return Work(tuple(zip(edges[::2], edges[1::2], strict=True)), everything, tuple(parts))


def _visible(runs: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows at positions first..last (both included) as disjoint rising intervals [start, stop), int64 [n, 2]."""
    start, step, count = runs.T
    row = np.cumsum(count) - count
    low = np.clip(-((start - first) // step), 0, count)
    high = np.clip((last - start) // step + 1, 0, count)
    some = low < high
    low, high = (row + low)[some], (row + high)[some]
    new = np.ones(len(low), dtype=bool)
    new[1:] = low[1:] != high[:-1]
    begin = np.flatnonzero(new)
    return np.stack([low[begin], high[np.append(begin[1:], len(low)) - 1]], 1) if len(low) else np.zeros((0, 2), dtype=np.int64)


def _meets(seen: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(is any row of the block seen, are all) for blocks [starts, stops)."""
    if not len(seen):
        none = np.zeros(len(starts), dtype=bool)
        return none, none
    next_one = np.minimum(np.searchsorted(seen[:, 1], starts, side="right"), len(seen) - 1)  # the first that ends in or after it
    low, high = seen[next_one].T
    return (low < stops) & (high > starts), (low <= starts) & (high >= stops)


def _rectangles(seen: list[np.ndarray], start: int, stop: int, group: int) -> Iterator[Band]:
    """The rows that each query sees of one block, as bands."""
    for t, intervals in enumerate(seen):
        for low, high in np.clip(intervals, start, stop).tolist():
            if low < high:
                yield Band(t * group, (t + 1) * group, low - start, high - start)


def attend_shard(q: Tensor, shard: KVShard, work: Work, scores: Scores, kernels: Kernels, sinks: Tensor | None = None) -> State:
    """The state of folded queries [M, B * H_kv, D] over what they see of a shard: o [M, B * H_kv, D_v], lse [M, B * H_kv].

    Args:
        sinks: [M, B * H_kv], logits of one more key without value; None has none.
    """
    heads = q.shape[1]
    parts: list[tuple[Tensor, Tensor]] = []
    if sinks is not None:
        start = empty_state(q, shard.v.shape[-1])
        parts.append((start.o.unsqueeze(0), sinks.to(start.lse.dtype).unsqueeze(0)))
    for first, stop in work.whole:
        blocks = stop - first
        k, v = (x[first:stop].flatten(0, 2).transpose(0, 1) for x in (shard.k, shard.v))  # [block, blocks * B * H_kv, D]
        many = q.unsqueeze(1).expand(-1, blocks, -1, -1).flatten(1, 2)
        o, lse = kernels(many, k, v, scores).forward(many, k, v, work.everything, scores)
        parts.append((o.unflatten(1, (blocks, heads)).transpose(0, 1), lse.unflatten(1, (blocks, heads)).transpose(0, 1)))
    for block, bands in work.parts:
        k, v = (x[block].flatten(0, 1).transpose(0, 1) for x in (shard.k, shard.v))
        o, lse = kernels(q, k, v, scores).forward(q, k, v, bands, scores)
        parts.append((o.unsqueeze(0), lse.unsqueeze(0)))
    if not parts:
        return empty_state(q, shard.v.shape[-1])
    o, lse = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    return State(o[0], lse[0]) if len(o) == 1 else combine(o, lse)


def _check(q: Tensor, shard: KVShard, cp: ContextParallel, sinks: Tensor | None, softcap: float, window: int | None) -> None:
    """All that one rank can say of a call."""
    cache = shard.cache
    if cp is not cache.cp:
        raise ValueError(
            f"The cache belongs to another ContextParallel (rank {cache.rank} of {cache.world}). Pass the one it has."
        )
    if q.dim() != 4 and not (q.dim() == 3 and cache.batch == 1):
        raise ValueError(f"q must be [B, n, H, D], or [n, H, D] for a cache of batch 1. Found {list(q.shape)}, {_about(cache)}.")
    batch = q.shape[0] if q.dim() == 4 else 1
    n, heads, d = q.shape[-3:]
    if (batch, d) != (cache.batch, cache.head_size):
        raise ValueError(f"q and the cache must have one batch and head size. Found q {list(q.shape)}, {_about(cache)}.")
    if heads == 0 or heads % cache.kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {cache.kv_heads} key heads: query heads must be a multiple of key heads. "
            f"Found q {list(q.shape)}, {_about(cache)}."
        )
    if q.dtype != cache.dtype or q.device != shard.k.device:
        raise ValueError(f"q must be {cache.dtype} on {shard.k.device} like the cache. Found {q.dtype} on {q.device}.")
    if n < 1 or n > cache.length:
        empty = "The cache is empty on every rank. " if cache.length == 0 else ""
        raise ValueError(
            f"{empty}q has {n} tokens, the context {cache.length}: the keys of the new tokens belong to it. Call "
            "cache.extend(n) and cache[layer].append(k, v) first, and pass 1 or more queries."
        )
    if shard.filled != cache.rows_here:
        raise ValueError(
            f"The cache length does not match: layer {shard.layer} holds {shard._holds()}. Give every layer its keys "
            "(fill after prefill, append after extend) before it attends."
        )
    if sinks is not None and (sinks.shape != (heads,) or sinks.device != q.device):
        raise ValueError(f"sinks must be [{heads}] on {q.device}, one a query head. Found {list(sinks.shape)} on {sinks.device}.")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be 0 (none) or positive. Found {softcap}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more keys, the query's own included, or None for all. Found {window}.")


def _about(cache: KVCache) -> str:
    return f"a cache of batch {cache.batch}, {cache.kv_heads} key heads, head size {cache.head_size}"


def _agree(cache: KVCache, cp: ContextParallel, said: str) -> None:
    """The first call of a kind: all ranks compare what they ask for. No time is spent on it afterwards."""
    if said in cache.agreed:
        return
    about = f"{said}; {_about(cache)}, {cache.dtype}, blocks of {cache.block}"
    agree(cp.communicator, bytes(16), about, "this decode_attention call")
    cache.agreed.add(said)


def _check_note(note: Tensor, cache: KVCache) -> None:
    """All ranks must hold the same context. On a GPU, where reading waits, once for each length."""
    if note.is_cuda and cache.verified == cache.length:
        return
    rows, (shortest, short_rank), (longest, long_rank) = read_note(note, cache.world)
    if shortest != longest:
        raise PlanMismatch(
            f"The cache lengths of the ranks do not match: rank {short_rank} holds a context of {shortest} tokens, "
            f"rank {long_rank} of {longest}. Call prefill(), extend() and truncate() on every rank alike."
        )
    if rows != cache.length:
        raise PlanMismatch(
            f"The ranks hold {rows} rows of a context of {cache.length} tokens. Call prefill(), extend() and truncate() on every "
            "rank alike, with the same block= and layout."
        )
    cache.verified = cache.length
