"""Local bands of all pairs of shards put together give the mask back, each pair once."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import Band, Bands, areas
from distattn.parallel import layout as layouts
from distattn.parallel import localize as localize_module
from distattn.parallel import mask as masks
from distattn.parallel.layout import Layout
from distattn.parallel.localize import local_bands, seen_positions
from distattn.parallel.mask import Mask


def dense(table: np.ndarray, n_q: int, n_k: int) -> np.ndarray:
    i, j = np.arange(n_q)[:, None], np.arange(n_k)[None]
    count = np.zeros((n_q, n_k), dtype=np.int64)
    for q0, q1, k0, k1, lo, hi in table:
        count += (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
    return count


@st.composite
def shuffled_strides(draw: st.DrawFn, n: int) -> Layout:
    """A layout as a user may make it: blocks of positions, in each of which any ranks hold the residues of any step."""
    step = draw(st.integers(1, 4))
    world = draw(st.integers(step, 6))
    segments, begin = [], 0
    while begin < n:
        stop = min(n, begin + step * draw(st.integers(1, 5)))
        ranks = draw(st.permutations(range(world)))[:step]
        segments += [(r, begin + s, -(-(stop - begin - s) // step)) for s, r in enumerate(ranks) if begin + s < stop]
        begin = stop
    columns = np.array(sorted(segments), dtype=np.int64).reshape(-1, 3).T.copy()
    return Layout("shuffled", n, n, world, step, *columns)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Mask, Layout]:
    sizes = draw(st.lists(st.integers(0, 14), max_size=5))
    n = sum(sizes)
    window, causal, sinks = draw(st.integers(1, 20)), draw(st.booleans()), draw(st.integers(0, 4))
    mask = draw(
        st.sampled_from(
            [
                masks.causal(n),
                masks.full(n),
                masks.sliding_window(n, window, sinks, symmetric=causal),
                masks.documents(sizes, causal, window if sinks else None),
                masks.prefix_lm(n, min(n, window)),
                masks.chunked(n, window, causal),
                masks.from_bands(n, [Band(n // 4, n - 1, sinks, n // 2, -window, sinks), Band(0, n // 4, 0, n, lo=window)]),
            ]
        )
    )
    if draw(st.integers(0, 3)) == 0:
        return mask, draw(shuffled_strides(n))
    world, pad = draw(st.integers(1, 5)), draw(st.booleans())
    make = draw(st.sampled_from([layouts.contiguous, layouts.zigzag, layouts.striped]))
    by_document = draw(st.sampled_from([None, layouts.document_zigzag, layouts.document_striped]))
    return mask, by_document(sizes, world, pad) if by_document else make(n, world, pad)


@settings(deadline=None, max_examples=100)
@given(problems(), st.randoms(use_true_random=False), st.sampled_from([1, 7, 1 << 18]))
def test_all_pairs_give_the_mask_back_each_once(problem: tuple[Mask, Layout], random, at_once: int) -> None:
    mask, layout = problem
    asked = [divmod(p, layout.world) for p in range(layout.world**2)]
    random.shuffle(asked)
    q_rank, kv_rank = np.array(asked).T
    with mock.patch.object(localize_module, "_AT_ONCE", at_once):
        found = local_bands(mask, layout, q_rank, kv_rank)
    assert (np.diff(found.pair) >= 0).all()
    whole = np.zeros((layout.n_tokens, layout.n_tokens), dtype=np.int64)
    for p, (q, kv) in enumerate(asked):
        table = found.table[found.pair == p]
        assert np.array_equal(table, Bands(table).table)  # tight, none empty
        whole[np.ix_(layout.positions(q), layout.positions(kv))] = dense(table, layout.rows(q), layout.rows(kv))
        for rows, first, stop in (
            (layout.segments(q).rows, table[:, 0], table[:, 1]),
            (layout.segments(kv).rows, table[:, 2], table[:, 3]),
        ):  # one segment of either shard
            assert np.array_equal(np.searchsorted(rows, first, side="right"), np.searchsorted(rows, stop - 1, side="right"))
    expected = np.zeros_like(whole)
    expected[: mask.n_tokens, : mask.n_tokens] = dense(mask.bands.table, mask.n_tokens, mask.n_tokens)
    assert np.array_equal(whole, expected)


@settings(deadline=None, max_examples=50)
@given(problems(), st.data())
def test_a_pair_does_not_depend_on_the_others_asked_for(problem: tuple[Mask, Layout], data: st.DataObject) -> None:
    mask, layout = problem
    ranks = st.integers(0, layout.world - 1)
    asked = data.draw(st.lists(st.tuples(ranks, ranks), min_size=1, max_size=6))  # repeats too
    q_rank, kv_rank = np.array(asked).T
    together = local_bands(mask, layout, q_rank, kv_rank)
    for p, (q, kv) in enumerate(asked):
        alone = local_bands(mask, layout, q, kv)
        assert np.array_equal(together.table[together.pair == p], alone.table) and not alone.pair.any()


def test_a_rank_broadcasts_and_no_pairs_give_no_bands() -> None:
    mask, layout = masks.causal(20), layouts.zigzag(20, 4)
    whole = local_bands(mask, layout, 2, np.arange(4))
    assert np.array_equal(whole.table, local_bands(mask, layout, np.full(4, 2), np.arange(4)).table)
    none = local_bands(mask, layout, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    assert none.table.shape == (0, 6) and none.pair.shape == (0,)


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Mask\(causal, n_tokens=21.*holds 20 tokens"):
        local_bands(masks.causal(21), layouts.zigzag(20, 8, pad_to_equal=True), 0, 0)


N = 1 << 20


def documents_4096() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.multinomial(N, rng.dirichlet(np.ones(4096)))


@pytest.mark.parametrize("make", [layouts.zigzag, layouts.striped])
def test_a_million_causal_tokens_on_all_pairs_of_512_ranks(make) -> None:
    mask, layout = masks.causal(N), make(N, 512)
    begin = time.process_time()
    found = local_bands(mask, layout, *np.divmod(np.arange(512 * 512), 512))
    assert time.process_time() - begin < 5  # 0.5 s when the machine is idle
    assert areas(found.table).sum() == mask.bands.area


@pytest.mark.parametrize("make", [layouts.document_zigzag, layouts.document_striped])
def test_4096_documents_for_one_of_512_ranks(make) -> None:
    sizes = documents_4096()
    mask, layout = masks.documents(sizes), make(sizes, 512)
    begin = time.process_time()
    found = local_bands(mask, layout, 7, np.arange(512))
    assert time.process_time() - begin < 4  # 0.4 s when the machine is idle
    positions = layout.positions(7)
    starts = mask.document_starts
    assert areas(found.table).sum() == (positions - starts[np.searchsorted(starts, positions, side="right") - 1] + 1).sum()


def test_4096_documents_on_all_pairs_of_16_ranks() -> None:
    sizes = documents_4096()
    mask, layout = masks.documents(sizes), layouts.document_striped(sizes, 16)
    found = local_bands(mask, layout, *np.divmod(np.arange(256), 16))
    assert areas(found.table).sum() == mask.bands.area


def test_a_window_meets_only_segments_near_it() -> None:
    """One band over shards of thousands of segments: the cost must not be segments times segments."""
    sizes = np.full(8192, 64)
    mask, layout = masks.sliding_window(sizes.sum(), 64), layouts.document_zigzag(sizes, 4)
    begin = time.process_time()
    found = local_bands(mask, layout, *np.divmod(np.arange(16), 4))
    assert time.process_time() - begin < 4  # 16384 segments a shard: 0.3 s; their square would take a minute
    assert areas(found.table).sum() == mask.bands.area


@settings(deadline=None, max_examples=100)
@given(problems(), st.integers(0, 60), st.integers(0, 60))
def test_what_ranks_see_and_hold_as_counted_position_by_position(problem: tuple[Mask, Layout], first: int, stop: int) -> None:
    """Seen runs hold what is seen and nothing else; of windows narrower than the step they may leave out, never add."""
    mask, layout = problem
    runs = seen_positions(mask, layout, np.arange(layout.world))
    visible = dense(mask.bands.table, mask.n_tokens, mask.n_tokens) > 0
    narrow = (mask.bands.table[:, 5] - mask.bands.table[:, 4] + 1 < layout.step).any()
    for rank in range(layout.world):
        own = layout.positions(rank)
        seen = visible[own[own < layout.n_valid]].any(0)
        counted = np.zeros(mask.n_tokens, dtype=bool)
        for _, a, b in zip(*(column[runs.key == rank] for column in runs), strict=True):
            counted[a:b] = True
        assert not (counted & ~seen).any() and (narrow or np.array_equal(counted, seen))
        rows = layout.rows_before(np.array(rank), np.array([first, stop]))
        assert rows.tolist() == [int((own < min(at, layout.n_tokens)).sum()) for at in (first, stop)]
