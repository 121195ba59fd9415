"""Masks: which query may see which key, as disjoint bands in global positions.

Every constructor returns a :class:`Mask`; its cost is one row of a table a document or chunk, nothing per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distattn.kernels.bands import INF, K0, K1, Q0, Q1, Band, Bands
from distattn.parallel.layout import checked_lengths


@dataclass(frozen=True, eq=False)
class Mask:
    """A disjoint union of bands over ``n_tokens`` queries and keys; rows that see no key are legal.

    Args:
        bands: the visible pairs, in global positions.
        n_tokens: length of the sequence, padding not included.
        name: how the mask was made, for messages.
        lengths: lengths of the packed documents where the mask was made from them, else None. Layouts split each document
            over the ranks, and positions restart with each.
    """

    bands: Bands
    n_tokens: int
    name: str
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.lengths is None or sum(self.lengths) == self.n_tokens
        table = self.bands.table
        outside = (table[:, [Q0, K0]] < 0).any(1) | (table[:, [Q1, K1]] > self.n_tokens).any(1)
        if outside.any():
            raise ValueError(
                f"A mask over {self.n_tokens} tokens was asked for with {_text(table[outside][0])}. "
                f"Cut its queries and keys to 0 .. {self.n_tokens}."
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({self.name}, n_tokens={self.n_tokens}, bands={len(self.bands)})"

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this mask and its documents; equal on every machine."""
        lengths = () if self.lengths is None else (len(self.lengths), *self.lengths)
        head = np.array([self.n_tokens, self.lengths is not None, *lengths]).astype("<i8").tobytes()
        return hashlib.blake2b(self.bands.digest + head, digest_size=16).digest()

    @property
    def document_starts(self) -> np.ndarray:
        """Global position where each document begins, int64; the whole sequence is one document where there are none."""
        lengths = np.array(self.lengths if self.lengths is not None else (self.n_tokens,), dtype=np.int64)
        return np.cumsum(lengths) - lengths


def full(n: int) -> Mask:
    """Every query sees every key."""
    _check_count(n, 0, "the length of a mask")
    return Mask(Bands([Band(0, n, 0, n)]), n, "full")


def causal(n: int) -> Mask:
    """Query i sees the keys j <= i."""
    _check_count(n, 0, "the length of a mask")
    return Mask(Bands([Band(0, n, 0, n, hi=0)]), n, "causal")


def sliding_window(n: int, window: int, sinks: int = 0, symmetric: bool = False) -> Mask:
    """Query i sees the ``window`` keys i - window + 1 .. i; symmetric, the keys with ``|i - j| <= window``.

    The first ``sinks`` keys stay visible: causal, to all later queries; symmetric, to all queries.
    """
    _check_count(n, 0, "the length of a mask")
    lo, hi = _window_limits(window, causal=not symmetric)
    _check_count(sinks, 0, "the sink tokens of a sliding window")
    last_sink = min(sinks, n)
    bands = [Band(0, n, 0, n, lo, hi), Band(0, n, 0, last_sink, hi=lo - 1)]
    if symmetric:
        bands.append(Band(0, n, 0, last_sink, lo=hi + 1))
    kind = ", symmetric" if symmetric else ""
    return Mask(Bands(bands), n, f"sliding_window({window}{f', sinks={sinks}' if sinks else ''}{kind})")


def documents(lengths: Sequence[int], causal: bool = True, window: int | None = None) -> Mask:
    """Packed documents, each of which sees only itself: causal or full, and within ``window`` if given.

    ``window`` counts as in :func:`sliding_window`, symmetric where ``causal`` is False.
    """
    sizes = checked_lengths(lengths)
    lo, hi = (-INF, 0 if causal else INF) if window is None else _window_limits(window, causal)
    kind = ("causal" if causal else "full") + (f", window={window}" if window is not None else "")
    return Mask(_diagonal(sizes, lo, hi), int(sizes.sum()), f"documents({len(sizes)}, {kind})", tuple(sizes.tolist()))


def prefix_lm(n: int, prefix: int) -> Mask:
    """The first ``prefix`` tokens see each other; the rest is causal."""
    _check_count(n, 0, "the length of a mask")
    _check_count(prefix, 0, "the tokens of a prefix")
    if prefix > n:
        raise ValueError(f"A prefix of {prefix} tokens does not fit a sequence of {n}. Pass {n} at most.")
    return Mask(Bands([Band(0, prefix, 0, prefix), Band(prefix, n, 0, n, hi=0)]), n, f"prefix_lm({prefix})")


def chunked(n: int, chunk: int, causal: bool = True) -> Mask:
    """Chunked-local attention: a query sees only keys of its own chunk of ``chunk`` tokens. One document all the same."""
    _check_count(n, 0, "the length of a mask")
    _check_count(chunk, 1, "the tokens of a chunk")
    sizes = np.minimum(chunk, n - np.arange(0, n, chunk))
    return Mask(_diagonal(sizes, -INF, 0 if causal else INF), n, f"chunked({chunk}, {'causal' if causal else 'full'})")


def from_bands(n: int, bands: Iterable[Band] | np.ndarray, name: str = "bands") -> Mask:
    """Any disjoint union of bands. Raises ValueError that names two of them if they share a pair."""
    _check_count(n, 0, "the length of a mask")
    whole = Bands(bands)
    common = whole.overlap()
    if common is not None:
        raise ValueError(
            f"The bands of a mask must be disjoint, but {_text(common[0])} and {_text(common[1])} share a pair. "
            "Cut one of them, or leave it out where the other sees the same pairs."
        )
    return Mask(whole, n, name)


def union(*masks: Mask) -> Mask:
    """The pairs that any of ``masks`` sees. Raises ValueError if two of them see the same pair, or lengths differ."""
    if not masks:
        raise ValueError("union was asked for with no masks. Pass at least one.")
    if len({mask.n_tokens for mask in masks}) > 1:
        raise ValueError(f"Masks of one union must have one length, found {', '.join(map(repr, masks))}.")
    tables = np.concatenate([mask.bands.table for mask in masks])
    return from_bands(masks[0].n_tokens, tables, f"union({', '.join(mask.name for mask in masks)})")


def _diagonal(sizes: np.ndarray, lo: int, hi: int) -> Bands:
    """Square blocks of the given sizes along the diagonal, each with the limits lo <= j - i <= hi."""
    stop = np.cumsum(sizes)
    start = stop - sizes
    limits = np.broadcast_to(np.array([lo, hi]), (len(sizes), 2))
    return Bands(np.concatenate([np.stack([start, stop, start, stop], 1), limits], 1))


def _window_limits(window: int, causal: bool) -> tuple[int, int]:
    if causal:
        _check_count(window, 1, "a causal window (keys, the own one included)")
        return 1 - window, 0
    _check_count(window, 0, "a symmetric window (keys on each side)")
    return -window, window


def _check_count(value: int, least: int, what: str) -> None:
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{value!r} was given for {what}. Pass a whole number of {least} or more.")


def _text(row: Iterable[int]) -> str:
    q0, q1, k0, k1, lo, hi = map(int, row)
    limits = (f", lo={lo}" if lo > -INF else "") + (f", hi={hi}" if hi < INF else "")
    return f"Band({q0}, {q1}, {k0}, {k1}{limits})"
