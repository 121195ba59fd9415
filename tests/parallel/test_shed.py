"""What ranks give away, against the same decided cell by cell in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from distattn.parallel.cells import Cells, Groups
from distattn.parallel.layout import contiguous, zigzag
from distattn.parallel.mask import Mask, documents, sliding_window
from distattn.parallel.shed import amounts


def one_by_one(groups: Groups, cells: Cells, giving: list[int], excess: list[int], wanted_keys: int) -> list[int]:
    """The longest documents of a rank first, and of each first the rows that see more keys than a floor that falls."""

    def rows_that_see(cell: int, least: int) -> int:
        """Pairs of the rows from the first on that sees so many keys."""
        group, start, stop = int(cells.group[cell]), int(cells.first[cell]), int(cells.stop[cell])
        if groups.plain[group]:
            while start < stop and groups.rows_work(group, start, start + 1) < least:
                start += 1
        return groups.rows_work(group, start, stop)

    left, given = list(excess), dict.fromkeys(giving, 0)
    top = {c: groups.rows_work(int(cells.group[c]), int(cells.stop[c]) - 1, int(cells.stop[c])) for c in giving}
    for floor in (wanted_keys // 2, wanted_keys // 4, wanted_keys // 8, 0):
        for cell in sorted(giving, key=lambda c: (-top[c], c)):
            rank = int(cells.rank[cell])
            if not floor or top[cell] > floor:
                more = min(max(rows_that_see(cell, floor + 1 if floor else 0) - given[cell], 0), left[rank])
                given[cell] += more
                left[rank] -= more
    return [given[cell] for cell in giving]


@pytest.mark.parametrize("seed", range(12))
def test_amounts_are_those_of_one_cell_after_the_other(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, random.choice([20, 120]), 60)
    n = int(lengths.sum())
    masks: list[Mask] = [
        documents(lengths.tolist()),
        documents(lengths.tolist(), window=9),
        documents([n]),
        sliding_window(n, 30),
    ]
    for mask in masks:
        for layout in (contiguous(n, 6), zigzag(n, 6)):
            groups = Groups.of(mask)
            cells = Cells.of(layout, groups)
            load = cells.load(layout.world, cells.work)
            excess = np.maximum(load - random.integers(0, 2 * load.mean(), layout.world).astype(np.int64), 0)
            giving = np.flatnonzero((excess > 0)[cells.rank])
            for wanted in (0, 3, 40, 1000):
                found = amounts(groups, cells, giving, excess, wanted)
                assert found.tolist() == one_by_one(groups, cells, giving.tolist(), excess.tolist(), wanted)
                sums = np.bincount(cells.rank[giving], weights=found, minlength=layout.world)
                assert (sums == excess).all(), "all that is too much is given"
