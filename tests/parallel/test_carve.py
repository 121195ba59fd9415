"""Carving: regions of one document cut into pieces that cover it once, none above its share, of cheap shapes."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.parallel.carve import Piece, Region, Share, Uncut, Weights, carve
from distattn.parallel.strips import WHOLE, Strip


def count(pieces: list[Piece], rows: int, keys: int) -> tuple[np.ndarray, dict[int, int]]:
    """How often each pair of the strips is computed, and how many pairs each server has."""
    times, work = np.zeros((rows, keys), np.int64), dict.fromkeys((p.server for p in pieces), 0)
    for server, s, first, stop in pieces:
        for row in range(s.start, s.stop):
            seen = min(s.cap, s.seen + row - s.start, stop)
            times[row, first:seen] += 1
            work[server] += max(seen - first, 0)
    return times, work


@settings(deadline=None, max_examples=80)
@given(st.integers(20, 120), st.integers(0, 80), st.integers(1, 7), st.integers(0, 3))
def test_a_staircase_is_covered_once(rows: int, before: int, servers: int, seed: int) -> None:
    """Rows from `before` on: a rectangle first, then whole rows."""
    rng = np.random.default_rng(seed)
    at = rows // 2
    strips = (Strip(0, 0, at, before + 1, before), Strip(0, at, rows, before + at + 1, WHOLE))
    region = Region(strips, 0, WHOLE).trimmed()
    parts = rng.integers(10, 30, servers)
    shares = [Share(i, int(region.work * p // parts.sum()) + 2 * (rows + before)) for i, p in enumerate(parts)]
    try:
        pieces = carve(region, shares, Weights(8, 1, 1))
    except Uncut:
        assert servers > 2
        return
    times, work = count(pieces, rows, before + rows)
    wanted = np.zeros_like(times)
    for row in range(rows):
        wanted[row, : before if row < at else before + row + 1] = 1
    assert (times == wanted).all()
    assert all(work[share.server] <= share.most for share in shares if share.server in work)


@pytest.mark.parametrize("servers", [2, 3, 5, 8, 13, 30])
def test_pieces_have_cheap_shapes(servers: int) -> None:
    """x rows against y keys cost 8 x + y, at least 2 sqrt(8 x y)."""
    rows, keys = 8192, 65536
    region = Region((Strip(0, 0, rows, keys + 1, keys),), 0, WHOLE).trimmed()
    pieces = carve(region, [Share(i, rows * keys // servers + 2 * keys) for i in range(servers)], Weights(8, 1, 128))
    cost = sum(8 * (p.strip.stop - p.strip.start) + p.k_stop - p.k_first for p in pieces)
    assert len(pieces) == servers and cost <= 1.12 * servers * 2 * sqrt(8 * rows * keys / servers)
    assert min(p.strip.stop - p.strip.start for p in pieces) >= 128


def test_too_small_pieces_are_refused() -> None:
    region = Region((Strip(0, 0, 200, 301, 300),), 0, WHOLE).trimmed()
    with pytest.raises(Uncut):
        carve(region, [Share(i, 15100) for i in range(4)], Weights(8, 1, 160))
    assert len(carve(region, [Share(i, 15100) for i in range(4)], Weights(8, 1, 100))) == 4
