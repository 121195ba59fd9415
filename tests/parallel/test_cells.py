"""Cells: sums in closed form against counting."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.parallel.cells import Cells, Groups
from distattn.parallel.layout import contiguous, document_zigzag, zigzag
from distattn.parallel.mask import causal, documents, full, prefix_lm, sliding_window, union


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 6), st.sampled_from([0, 1, 2]))
def test_work_of_cells_is_counted_right(lengths: list[int], world: int, kind: int, placed: int) -> None:
    n = sum(lengths)
    mask = {
        0: documents(lengths),
        1: documents(lengths, causal=False),
        2: documents(lengths, window=7),
        3: causal(n),
        4: sliding_window(n, 9, sinks=3),
        5: prefix_lm(n, n // 3),
        6: full(n),
    }[kind]
    layout = [contiguous(n, world), zigzag(n, world), document_zigzag(lengths, world)][placed]
    groups = Groups.of(mask)
    cells = Cells.of(layout, groups)
    seen = mask.bands.dense(n, n).sum(1).numpy()
    assert cells.work.sum() == seen.sum()
    for i in range(len(cells)):
        first, stop, group = int(cells.first[i]), int(cells.stop[i]), int(cells.group[i])
        assert cells.work[i] == seen[first:stop].sum() == groups.rows_work(group, first, stop)
        assert layout.owner_of(first) == (cells.rank[i], cells.row[i])
        if groups.plain[group]:
            rising = np.arange(first, stop) - groups.first[group] + groups.lead[group]
            assert (np.minimum(groups.keys[group], rising) == seen[first:stop]).all()
    by_rank = [seen[layout.positions(rank)].sum() for rank in range(world)]
    assert cells.load(world, cells.work).tolist() == by_rank


def test_what_shares_positions_is_one_group() -> None:
    assert len(Groups.of(documents([5, 7, 1]))) == 3
    assert len(Groups.of(sliding_window(30, 4, sinks=2))) == 1
    assert Groups.of(prefix_lm(30, 10)).plain.tolist() == [False]
    assert Groups.of(causal(30)).plain.tolist() == [True]
    assert not len(Groups.of(union(causal(0))))
