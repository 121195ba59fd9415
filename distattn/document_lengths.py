"""Lengths of packed documents for experiments, from a seed: the same on every machine and numpy for ever.

All arithmetic is in integers. ``heavy_tail`` is a log-normal body with a heavy tail, fitted to the percentiles that DistCA
(Zhuang et al.) publishes of its pretraining mix: mean 3,962 tokens, median 3,227, 99th percentile 26k, longest 125k.
"""

from __future__ import annotations

import difflib

import numpy as np

from distattn.data import scatter

_ONE = 1 << 20
# Quantiles of `heavy_tail`, straight lines between them: (probability * 2**20, tokens). To 31/32 a log-normal of median 3,227
# and sigma 0.2, from there on the published tail; sigma and the two inner points of the tail give the published mean.
_HEAVY_TAIL = (
    (0, 1899),
    (16384, 2098),
    (32768, 2223),
    (65536, 2374),
    (131072, 2564),
    (262144, 2820),
    (393216, 3028),
    (524288, 3227),
    (655360, 3439),
    (786432, 3693),
    (917504, 4062),
    (983040, 4386),
    (1015808, 4684),
    (1029701, 6000),
    (1038090, 26000),
    (1043333, 50000),
    (1048576, 125000),
)
KINDS = ("heavy_tail", "uniform", "bimodal", "giant")


def document_lengths(kind: str, tokens: int, seed: int, mean: int = 4096, multiple: int = 16) -> np.ndarray:
    """Lengths of documents that fill ``tokens`` positions, int64 [documents]; the last one is cut.

    Args:
        kind: ``heavy_tail``; ``uniform`` from 1 to 2 * mean - 1; ``bimodal``: 15 of 16 documents of mean / 2, one of 8.5 * mean,
            each up to a quarter longer or shorter; ``giant``: the first document has half of all tokens, the others are uniform.
        mean: tokens of a document, of all kinds but ``heavy_tail``.
        multiple: lengths are rounded down to a multiple of it, and are at least that.

    Raises:
        ValueError: an unknown kind, or a size below 1.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise ValueError(
            f"There are no document lengths {kind!r}. Kinds are {', '.join(KINDS)}."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    if min(tokens, mean, multiple) < 1:
        raise ValueError(f"tokens={tokens}, mean={mean} and multiple={multiple} must be 1 or more.")
    parts, filled = [np.zeros(0, dtype=np.int64)], 0
    if kind == "giant":
        parts.append(np.array([max(tokens // 2 // multiple * multiple, min(multiple, tokens))], dtype=np.int64))
        filled = int(parts[-1][0])
    block, number = max(16, tokens // mean), 0
    while filled < tokens:
        drawn = scatter(np.arange(number, number + block), seed)
        lengths = np.maximum(_lengths(kind, drawn, mean) // multiple, 1) * multiple
        parts.append(lengths)
        filled += int(lengths.sum())
        number += block
    stop = np.minimum(np.cumsum(np.concatenate(parts)), tokens)
    made = np.diff(stop, prepend=0)
    return made[made > 0]


def _lengths(kind: str, drawn: np.ndarray, mean: int) -> np.ndarray:
    """int64 [n] from random bits, uint64 [n]."""
    low, high = (drawn & np.uint64(_ONE - 1)).astype(np.int64), (drawn >> np.uint64(44)).astype(np.int64)
    if kind == "heavy_tail":
        at, tokens = (np.array(column, dtype=np.int64) for column in zip(*_HEAVY_TAIL, strict=True))
        right = np.searchsorted(at, high, side="right")
        left = right - 1
        return tokens[left] + (tokens[right] - tokens[left]) * (high - at[left]) // (at[right] - at[left])
    if kind == "bimodal":
        middle = np.where(low < _ONE // 16, 17 * mean // 2, mean // 2)
        return middle * 3 // 4 + (middle // 2 + 1) * high // _ONE
    return 1 + (2 * mean - 1) * high // _ONE
