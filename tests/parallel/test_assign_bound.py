"""The lower bound: below all that is found by exhaustion, and its parts against counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.parallel.assign import assign
from distattn.parallel.assign_bound import _costs, _Edges, _edges, _rectangle, _straddling, lower_bound
from distattn.parallel.assignment import Load
from distattn.parallel.cells import Groups
from distattn.parallel.layout import contiguous, zigzag
from distattn.parallel.mask import causal, documents, prefix_lm


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 5), st.none() | st.integers(1, 30))
def test_pairs_across_the_beginning_of_a_shard(lengths: list[int], world: int, window: int | None) -> None:
    n = sum(lengths)
    if n < world:
        return
    mask, layout = documents(lengths, window=window), contiguous(n, world)
    visible = mask.bands.dense(n, n).numpy()
    lower = np.append(layout.seg_start, n)
    groups = Groups.of(mask)
    across = [visible[lower[r] : lower[r + 1], : lower[r]].sum() for r in range(world)]
    assert _straddling(groups, lower).tolist() == across
    edges = _edges(groups, lower)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for rank, (a, b) in enumerate(zip(lower, lower[1:], strict=False)):
        here = document[a:b]
        assert edges.before[rank] == (document[:a] == here[0]).sum() and edges.after[rank] == (document[b:] == here[-1]).sum()
        assert edges.rows[rank] == (here == here[0]).sum() * (edges.before[rank] > 0)
        assert edges.keys[rank] == (here == here[-1]).sum() * (edges.after[rank] > 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=8), st.integers(2, 6), st.sampled_from([1, 8]), st.none() | st.just(100)
)
def test_no_assignment_moves_less(lengths: list[int], world: int, query_row: int, window: int | None) -> None:
    n = sum(lengths)
    if n < world:
        return
    layout, mask = contiguous(n, world), documents(lengths, window=window)
    for tolerance in (0.1, 0.5):
        try:
            load = Load.of(assign(layout, mask, tolerance=tolerance, smallest=1), layout, mask)
        except ValueError:
            continue
        assert lower_bound(layout, mask, tolerance, 1, query_row) <= load.received(1, query_row, query_row).sum() + 1e-6


def test_a_rectangle_is_as_cheap_as_it_gets() -> None:
    pairs = np.array([0.0, 8.0, 5000.0, 3e6])
    for width in (50, 10**6):
        best = [
            min(8 * p / k + k for k in np.linspace(1e-3, min(width, 10**5), 400_000)) if p else 0.0 for p in pairs[:3].tolist()
        ]
        assert _rectangle(pairs[:3], width, 1, 8) == pytest.approx(best, rel=1e-3)


def test_what_it_is_not_for() -> None:
    for layout, mask in ((zigzag(64, 4), causal(64)), (contiguous(64, 4), prefix_lm(64, 8)), (contiguous(2, 4), causal(2))):
        with pytest.raises(ValueError, match="contiguous shards"):
            lower_bound(layout, mask, 0.02)


@pytest.mark.parametrize("one", [False, True])
def test_the_least_cost_of_a_rank_is_that_of_a_fine_search(one: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, before, keys, after = (int(v) for v in rng.integers(0, 4000, 4))
        if one:
            rows = keys = max(rows, 1)
        won = float(rng.integers(1, 4 * 10**7))
        edges = _Edges(*(np.array([v]) for v in (rows, before, keys, after)), np.array([one]))
        found = float(_costs(np.array([[won]]), edges, 10**6, 1, 8)[0, 0])
        k, x = np.linspace(0, before, 601)[:, None], np.linspace(0, after, 601)[None]
        rest = np.maximum(won - rows * k - keys * x - k * x * one, 0)
        more = 2 * np.sqrt(8 * rest)
        if not one:
            more = np.minimum(more, np.minimum(8 * rest / np.maximum(k, 1e-9), rest / np.maximum(x, 1e-9)))
        searched = float((k + 8 * x + more).min())
        assert 0.97 * searched <= found <= searched * (1 + 1e-9)
