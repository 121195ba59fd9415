"""Documents of a training step for long contexts, from a seed: two heavy-tailed mixes with documents up to a longest one."""

from __future__ import annotations

import math

import numpy as np

from distattn.document_lengths import document_lengths

MIXES = ("pretrain", "prolong")
STRETCH = 128 << 10  # tokens: the longest document of the fitted distribution
# Of the tokens of "prolong": in short documents, in long ones of any length, in ones of the longest length.
SHARES = (0.4, 0.3, 0.3)
SHORT_MEDIAN, SHORT_SIGMA = 1914, 0.74  # of a log-normal, as published ProLong documents below 10k tokens
LONG_FROM = 16 << 10


def mix(name: str, tokens: int, longest: int, seed: int) -> tuple[int, ...]:
    """Lengths in the order of the loader; the last document is cut where the step ends.

    "pretrain" is the fitted pretraining distribution, all documents stretched so that the longest has ``longest`` tokens, as
    DistCA (Zhuang et al.) does for longer contexts. "prolong" follows the recipe of ProLong (Gao et al.): short documents beside
    long ones, many of the longest length.

    Raises:
        ValueError: an unknown mix, or documents that cannot be that long.
    """
    if name not in MIXES:
        raise ValueError(f"There is no mix {name!r}. Use {' or '.join(MIXES)}.")
    if longest < LONG_FROM or tokens < longest:
        raise ValueError(
            f"Longest documents of {longest} tokens in steps of {tokens}: use {LONG_FROM} or more, and longer steps."
        )
    drawn = _pretrain(tokens, longest, seed) if name == "pretrain" else _prolong(tokens, longest, seed)
    stop = np.minimum(np.cumsum(drawn), tokens)
    lengths = np.diff(stop, prepend=0)
    return tuple(lengths[lengths > 0].tolist())


def _pretrain(tokens: int, longest: int, seed: int) -> np.ndarray:
    lengths = document_lengths("heavy_tail", -(-tokens * STRETCH // longest), seed)
    return np.minimum(-(-lengths * longest // STRETCH), longest)


def _prolong(tokens: int, longest: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    spread = math.log(longest / LONG_FROM)
    means = SHORT_MEDIAN * math.exp(SHORT_SIGMA**2 / 2), (longest - LONG_FROM) / spread if spread else longest, longest
    chances = np.array(SHARES) / np.array(means)
    n = int(2 * tokens * chances.sum()) + 1024
    kind = random.choice(3, n, p=chances / chances.sum())
    short = random.lognormal(math.log(SHORT_MEDIAN), SHORT_SIGMA, n)
    long = LONG_FROM * np.exp(random.random(n) * spread)
    return np.clip(np.choose(kind, [short, long, np.full(n, longest)]).astype(np.int64), 16, longest)
