"""The algebra of bands against enumeration of every pair on a small grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.kernels.bands import INF, Band, Bands, areas, clip, drop_empty, localize, shift, tighten

GRID = np.arange(-12, 40)
I, J = GRID[:, None], GRID[None]

point = st.integers(-4, 24)
limit = st.integers(-20, 20)
band = st.builds(
    Band, point, point, point, point, st.one_of(st.just(-INF), limit), st.one_of(st.just(INF), limit)
)  # empty and inverted ones too
table = st.lists(band, min_size=1, max_size=6).map(lambda rows: np.array(rows, dtype=np.int64))


def pairs(row: np.ndarray | Band) -> np.ndarray:
    """Which pairs of the grid one band sees, by the definition."""
    q0, q1, k0, k1, lo, hi = (int(x) for x in row)
    return (q0 <= I) & (q1 > I) & (k0 <= J) & (k1 > J) & (lo <= J - I) & (hi >= J - I)


def count(rows: np.ndarray) -> np.ndarray:
    return sum((pairs(row).astype(int) for row in rows), np.zeros((len(GRID), len(GRID)), int))


@given(table)
def test_areas_count_pairs(rows: np.ndarray) -> None:
    assert areas(rows).tolist() == [pairs(row).sum() for row in rows]


def test_area_of_a_million_tokens_is_exact() -> None:
    n = 1 << 20
    assert Bands([Band(0, n, 0, n, -INF, 0)]).area == n * (n + 1) // 2
    assert Bands([Band(0, n, 0, n, -4095, 0)]).area == n * 4096 - 4095 * 4096 // 2


@given(table)
def test_tighten_keeps_pairs_and_leaves_no_idle_row_or_key(rows: np.ndarray) -> None:
    for before, after in zip(rows, tighten(rows), strict=True):
        seen = pairs(before)
        assert np.array_equal(pairs(after), seen)
        if not seen.any():
            assert after[0] == after[1]
            continue
        own_rows, own_keys = GRID[seen.any(1)], GRID[seen.any(0)]
        assert after[:4].tolist() == [own_rows[0], own_rows[-1] + 1, own_keys[0], own_keys[-1] + 1]
        assert len(own_rows) == after[1] - after[0], "every row of a tight band sees a key"
        rectangle = pairs(Band(*after[:4].tolist()))
        for column, cuts in ((4, after[4] > -INF), (5, after[5] < INF)):
            without = after.copy()
            without[column] = (-INF, INF)[column - 4]
            assert cuts == (not np.array_equal(pairs(without) & rectangle, seen)), "a limit is finite exactly where it cuts"


@given(table, st.integers(-6, 6), st.integers(-6, 6))
def test_shift_moves_queries_and_keys(rows: np.ndarray, dq: int, dk: int) -> None:
    for before, after in zip(rows, shift(rows, dq, dk), strict=True):
        moved = {(i + dq, j + dk) for i, j in np.argwhere(pairs(before)) + GRID[0]}
        assert moved == {(i, j) for i, j in np.argwhere(pairs(after)) + GRID[0]}


@given(table, point, point, point, point)
def test_clip_is_intersection(rows: np.ndarray, q0: int, q1: int, k0: int, k1: int) -> None:
    window = pairs(Band(q0, q1, k0, k1))
    for before, after in zip(rows, clip(rows, q0, q1, k0, k1), strict=True):
        assert np.array_equal(pairs(after), pairs(before) & window)


@given(table, st.integers(1, 8), point, st.integers(0, 9), point, st.integers(0, 9))
def test_localize_is_the_mask_seen_from_two_segments(
    rows: np.ndarray, step: int, q_start: int, q_count: int, k_start: int, k_count: int
) -> None:
    i, j = q_start + step * np.arange(q_count), k_start + step * np.arange(k_count)
    for before, after in zip(rows, localize(rows, q_start, q_count, k_start, k_count, step), strict=True):
        q0, q1, k0, k1, lo, hi = (int(x) for x in before)
        distance = j[None] - i[:, None]
        inside = ((q0 <= i) & (i < q1))[:, None] & ((k0 <= j) & (j < k1))[None]
        want = inside & (lo <= distance) & (distance <= hi)
        got = pairs(after)
        assert np.array_equal(got[12 : 12 + q_count, 12 : 12 + k_count], want)
        assert got.sum() == want.sum(), "nothing outside the segments"


@given(table, st.lists(st.tuples(st.integers(-3, 20), st.integers(0, 6)), min_size=6, max_size=6), st.integers(1, 4))
def test_localize_broadcasts_over_bands(rows: np.ndarray, segments: list[tuple[int, int]], step: int) -> None:
    start, counts = np.array(segments[: len(rows)]).T
    together = localize(rows, start, counts, 2, 5, step)
    alone = [localize(rows[n : n + 1], start[n], counts[n], 2, 5, step)[0] for n in range(len(rows))]
    assert np.array_equal(together, alone)


@given(table, point)
def test_splits_are_a_partition(rows: np.ndarray, at: int) -> None:
    whole = Bands(rows)
    for (low, high), axis in ((whole.split_queries(at), I), (whole.split_keys(at), J)):
        assert np.array_equal(count(low.table), count(rows) * (axis < at))
        assert np.array_equal(count(high.table), count(rows) * (axis >= at))


@given(table)
def test_transpose_exchanges_queries_and_keys(rows: np.ndarray) -> None:
    assert np.array_equal(count(Bands(rows).transpose().table), count(rows).T)
    assert Bands(rows).transpose().transpose() == Bands(rows)


@given(table)
def test_overlap_finds_two_bands_that_share_a_pair(rows: np.ndarray) -> None:
    found = Bands(rows).overlap()
    if found is None:
        assert count(rows).max() <= 1
    else:
        assert found[0] in list(Bands(rows)) and found[1] in list(Bands(rows))
        assert (pairs(found[0]) & pairs(found[1])).any()


@given(table)
def test_dense_counts_like_the_definition(rows: np.ndarray) -> None:
    assert np.array_equal(Bands(rows).dense(24, 24), count(rows)[12:36, 12:36])


@given(table)
def test_equal_unions_have_equal_digests(rows: np.ndarray) -> None:
    a, b = Bands(rows), Bands([Band(*map(int, row)) for row in rows])
    assert a == b and hash(a) == hash(b) and a.digest == b.digest
    assert len(a) == len(drop_empty(tighten(rows)))
    more = Bands(np.concatenate([rows, [[0, 1, 30, 31, -INF, INF]]]))
    assert more != a and more.digest != a.digest


def test_bands_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Bands([Band(0, 4, 0, 4)]).table[0, 0] = 1


def test_no_bands() -> None:
    none = Bands()
    assert len(none) == 0 and none.area == 0 and none.overlap() is None and "Bands(0" in repr(none)
    assert torch.equal(none.dense(2, 3), torch.zeros(2, 3, dtype=torch.int32))
    assert none.transpose() == none == Bands([Band(3, 3, 0, 9)])
