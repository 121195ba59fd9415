"""Bands: the one mask atom, and its algebra on int64 tables.

    Band(q0, q1, k0, k1, lo, hi)     query i may see key j  iff  q0 <= i < q1,  k0 <= j < k1,  lo <= j - i <= hi

A mask is a disjoint union of bands. Tables have shape [n, 6], int64, columns in the order above; every function here is
vectorised over the rows of such a table and costs nothing per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

INF = 1 << 60  # "no limit" for lo (as -INF) and hi; far from overflow when positions are added
Q0, Q1, K0, K1, LO, HI = range(6)


class Band(NamedTuple):
    """One atom: query ``i`` sees key ``j`` iff ``q0 <= i < q1``, ``k0 <= j < k1`` and ``lo <= j - i <= hi``."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int = -INF
    hi: int = INF


def tighten(table: np.ndarray) -> np.ndarray:
    """Shrinks each band to the rows and keys that it touches; a limit that cuts nothing becomes infinite.

    Bands that see nothing come back with ``q0 == q1``; use :func:`drop_empty` to lose them. Two bands of the same pairs
    have the same tight form, up to bands of one row or one key.
    """
    q0, q1, k0, k1, lo, hi = table.T
    t = np.empty_like(table)
    t[:, Q0] = np.maximum(q0, k0 - hi)
    t[:, Q1] = np.minimum(q1, k1 - lo)
    t[:, K0] = np.maximum(k0, t[:, Q0] + lo)
    t[:, K1] = np.minimum(k1, t[:, Q1] + hi)
    empty = (t[:, Q0] >= t[:, Q1]) | (t[:, K0] >= t[:, K1]) | (lo > hi)
    t[:, LO] = np.where(lo <= t[:, K0] - t[:, Q1] + 1, -INF, lo)
    t[:, HI] = np.where(hi >= t[:, K1] - 1 - t[:, Q0], INF, hi)
    t[empty] = (0, 0, 0, 0, -INF, INF)
    return t


def drop_empty(table: np.ndarray) -> np.ndarray:
    """Rows of a tight table that see something."""
    return table[table[:, Q0] < table[:, Q1]]


def _pairs_below(table: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Pairs of each band's rectangle with ``j - i <= limit``: sum over rows of clamp(x + t + 1, 0, m) in closed form."""
    n, m = table[:, Q1] - table[:, Q0], table[:, K1] - table[:, K0]
    t = np.clip(limit + table[:, Q0] - table[:, K0], -n, m)

    def partial(z: np.ndarray) -> np.ndarray:  # sum of min(u, m) for u in 1..z
        below = np.clip(z, 0, m)
        return below * (below + 1) // 2 + (np.maximum(z, m) - m) * m

    return partial(n + t) - partial(t)


def areas(table: np.ndarray) -> np.ndarray:
    """Number of visible (query, key) pairs of each band, int64 [n]."""
    valid = (table[:, Q0] < table[:, Q1]) & (table[:, K0] < table[:, K1]) & (table[:, LO] <= table[:, HI])
    safe = np.where(valid[:, None], table, 0)
    count = _pairs_below(safe, safe[:, HI]) - _pairs_below(safe, safe[:, LO] - 1)
    return np.where(valid, count, 0)


def shift(table: np.ndarray, dq: np.ndarray | int, dk: np.ndarray | int) -> np.ndarray:
    """The same pairs where every query index has grown by ``dq`` and every key index by ``dk``."""
    d = np.asarray(dk) - np.asarray(dq)
    out = table.copy()
    out[:, Q0] += dq
    out[:, Q1] += dq
    out[:, K0] += dk
    out[:, K1] += dk
    out[:, LO] = np.where(table[:, LO] <= -INF, -INF, table[:, LO] + d)
    out[:, HI] = np.where(table[:, HI] >= INF, INF, table[:, HI] + d)
    return out


def clip(table: np.ndarray, q0: np.ndarray | int, q1: np.ndarray | int, k0: np.ndarray | int, k1: np.ndarray | int) -> np.ndarray:
    """Bands cut to the rectangle [q0, q1) x [k0, k1), tight; arguments broadcast over the rows of the table."""
    out = table.copy()
    out[:, Q0] = np.maximum(out[:, Q0], q0)
    out[:, Q1] = np.minimum(out[:, Q1], q1)
    out[:, K0] = np.maximum(out[:, K0], k0)
    out[:, K1] = np.minimum(out[:, K1], k1)
    return tighten(out)


def localize(
    table: np.ndarray,
    q_start: np.ndarray | int,
    q_count: np.ndarray | int,
    k_start: np.ndarray | int,
    k_count: np.ndarray | int,
    step: int,
) -> np.ndarray:
    """Bands in the local indices of two segments ``start, start + step, ...`` of ``count`` rows; tight, empties kept.

    All arguments but ``step`` broadcast over the rows of the table.
    """
    d = np.asarray(k_start) - np.asarray(q_start)
    out = np.empty_like(table)
    out[:, Q0] = np.maximum(0, -((q_start - table[:, Q0]) // step))
    out[:, Q1] = np.minimum(q_count, -((q_start - table[:, Q1]) // step))
    out[:, K0] = np.maximum(0, -((k_start - table[:, K0]) // step))
    out[:, K1] = np.minimum(k_count, -((k_start - table[:, K1]) // step))
    out[:, LO] = np.where(table[:, LO] <= -INF, -INF, -((d - table[:, LO]) // step))
    out[:, HI] = np.where(table[:, HI] >= INF, INF, (table[:, HI] - d) // step)
    return tighten(out)


class Bands:
    """An immutable disjoint union of bands, tight and in a fixed order; equal unions given alike compare equal.

    Args:
        bands: :class:`Band` tuples or an int64 table [n, 6]. Bands that see nothing are dropped.

    Disjointness is the caller's promise (:meth:`overlap` finds a counterexample); kernels count a pair once per band.
    """

    def __init__(self, bands: Iterable[Band] | np.ndarray = ()):
        rows = bands if isinstance(bands, np.ndarray) else np.array(list(bands), dtype=np.int64)
        self.table = drop_empty(tighten(rows.reshape(-1, 6).astype(np.int64, copy=False)))
        self.table.flags.writeable = False

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Band]:
        return (Band(*map(int, row)) for row in self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bands) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        head = ", ".join(str(tuple(b)) for b in list(self)[:3])
        return f"Bands({len(self)}: {head}{', ...' if len(self) > 3 else ''})"

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this union; equal on every machine."""
        return hashlib.blake2b(np.ascontiguousarray(self.table).astype("<i8").tobytes(), digest_size=16).digest()

    @cached_property
    def area(self) -> int:
        """Visible pairs, exact."""
        return int(areas(self.table).sum())

    def split_queries(self, at: int) -> tuple[Bands, Bands]:
        """The parts with query ``i < at`` and ``i >= at``, coordinates unchanged."""
        return Bands(clip(self.table, -INF, at, -INF, INF)), Bands(clip(self.table, at, INF, -INF, INF))

    def split_keys(self, at: int) -> tuple[Bands, Bands]:
        """The parts with key ``j < at`` and ``j >= at``, coordinates unchanged."""
        return Bands(clip(self.table, -INF, INF, -INF, at)), Bands(clip(self.table, -INF, INF, at, INF))

    def transpose(self) -> Bands:
        """Queries and keys exchanged."""
        t = self.table
        return Bands(np.stack([t[:, K0], t[:, K1], t[:, Q0], t[:, Q1], -t[:, HI], -t[:, LO]], 1))

    def dense(self, n_q: int, n_k: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """How often each pair is visible, int32 [n_q, n_k] (1 where disjoint bands see it). For the reference and for tests."""
        i, j = torch.arange(n_q, device=device)[:, None], torch.arange(n_k, device=device)[None]
        count = torch.zeros(n_q, n_k, dtype=torch.int32, device=device)
        for b in self:
            count += (i >= b.q0) & (i < b.q1) & (j >= b.k0) & (j < b.k1) & (j - i >= b.lo) & (j - i <= b.hi)
        return count

    def overlap(self) -> tuple[Band, Band] | None:
        """Two bands that share a pair, or None. A sweep over query rows: linear for masks whose rows see few bands."""
        order = np.argsort(self.table[:, Q0], kind="stable")
        active: list[int] = []
        for n in order:
            row = self.table[n : n + 1]
            active = [m for m in active if self.table[m, Q1] > row[0, Q0]]
            if active:
                both = self.table[active]
                lo, hi = np.maximum(both[:, LO], row[:, LO]), np.minimum(both[:, HI], row[:, HI])
                common = np.stack([both[:, Q0], both[:, Q1], both[:, K0], both[:, K1], lo, hi], 1)
                common = clip(common, row[0, Q0], row[0, Q1], row[0, K0], row[0, K1])
                hit = np.flatnonzero(common[:, Q0] < common[:, Q1])
                if len(hit):
                    return Band(*map(int, self.table[active[hit[0]]])), Band(*map(int, row[0]))
            active.append(int(n))
        return None
