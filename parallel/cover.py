"""Fingerprints of sets of (query, key) pairs, in closed form: how a plan is proven to compute a mask exactly once.

A multiset of pairs is the polynomial  sum over pairs of X^i Y^j.  Two multisets are equal exactly when their polynomials are;
both are evaluated at random points of the field of p = 2^31 - 1 elements (Schwartz, Zippel). A band's value is a handful of
geometric sums, so a million tokens cost no more than a thousand. One point misses a difference with probability at most
(2 N) / p, three independent points at a million tokens with 1e-9.
"""

from __future__ import annotations

import numpy as np

from distattn.kernels.bands import HI, K0, K1, LO, Q0, Q1

P = (1 << 31) - 1
POINTS = 3


class Powers:
    """x^0 .. x^n modulo p in a table, and geometric sums of them."""

    def __init__(self, x: int, n: int):
        self.table = np.ones(n + 1, dtype=np.int64)
        filled = 1
        while filled <= n:
            count = min(filled, n + 1 - filled)
            self.table[filled : filled + count] = self.table[:count] * pow(x, filled, P) % P
            filled += count
        self.inverse = pow(x - 1, -1, P)

    def __getitem__(self, exponent: np.ndarray) -> np.ndarray:
        return self.table[exponent]

    def geometric(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Sum of x^e for start <= e < stop; 0 where that is empty."""
        stop = np.maximum(start, stop)
        return (self.table[stop] - self.table[start]) % P * self.inverse % P


class Fingerprint:
    """Values at ``POINTS`` random points of bands whose rows lie ``step`` apart, for positions below ``n``."""

    def __init__(self, n: int, step: int = 1, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.n = max(n, 1)
        self.points = []
        for _ in range(POINTS):
            x, y = (int(v) for v in rng.integers(1 << 20, P - (1 << 20), 2))
            xs, ys = pow(x, step, P), pow(y, step, P)
            self.points.append((Powers(x, self.n), Powers(y, self.n), *(Powers(g, self.n) for g in (xs, ys, xs * ys % P))))

    def __call__(self, table: np.ndarray, q_start: np.ndarray | int = 0, k_start: np.ndarray | int = 0) -> np.ndarray:
        """int64 [points, bands]. Row i of a band stands for position q_start + step * i, key row j for k_start + step * j.

        ``table`` must be tight (as :func:`~distattn.kernels.bands.tighten` leaves it).
        """
        lower, upper = np.clip(table[:, LO], -self.n, self.n), np.clip(table[:, HI] + 1, -self.n, self.n)
        values = []
        for x, y, u, w, uw in self.points:
            keys = self._key_sum(table, upper, u, w, uw) - self._key_sum(table, lower, u, w, uw)
            values.append(keys % P * w.inverse % P * x[np.asarray(q_start)] % P * y[np.asarray(k_start)] % P)
        return np.stack(values)

    @staticmethod
    def _key_sum(t: np.ndarray, c: np.ndarray, u: Powers, w: Powers, uw: Powers) -> np.ndarray:
        """Sum over the band's rows i of u^i w^clip(i + c, k0, k1)."""
        a = np.clip(t[:, K0] - c, t[:, Q0], t[:, Q1])  # rows below a see the clip at k0, rows from b on the one at k1
        b = np.clip(t[:, K1] - c, t[:, Q0], t[:, Q1])
        low = u.geometric(t[:, Q0], a) * w[t[:, K0]] % P
        high = u.geometric(b, t[:, Q1]) * w[t[:, K1]] % P
        middle = uw.geometric(np.zeros_like(a), b - a) * u[a] % P * w[np.where(b > a, a + c, 0)] % P
        return (low + middle + high) % P
