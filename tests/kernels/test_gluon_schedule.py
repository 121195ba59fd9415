"""The division of work among programs that stay: everything once, longest first, nobody much busier than the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.gluon_division import OVERHEAD
from distattn.kernels.gluon_schedule import CACHE_BYTES, Schedule, heads_per_section, schedule
from distattn.kernels.tiles import LEFT, TileTable, tile_table
from tests.kernels.cases import DOCUMENTS, GAPS


def items(made: Schedule) -> list[np.ndarray]:
    """The items of each program, in order."""
    slots = made.slots.reshape(-1, made.programs, 5)
    return [slots[: made.counts[p], p] for p in range(made.programs)]


def tiles_of(table: TileTable, item: np.ndarray) -> int:
    return int(table.entries[item[2] : item[3], LEFT:].sum())


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("programs", [1, 3, 7, 10_000])
@pytest.mark.parametrize("bands", [DOCUMENTS, GAPS, Bands([Band(0, 133, 0, 133, -INF, 0)])], ids=["documents", "gaps", "causal"])
def test_every_tile_of_every_head_once(bands: Bands, programs: int, stay: bool) -> None:
    table = tile_table(bands, 133, 133, 16, 16, "q")
    made = schedule(table, 16, 16, 6, 2, programs, stay)
    assert made.programs == (programs if stay and programs < 10 else table.n_work * 6) and (made.counts >= 1).all()
    assert made.pieces == 0 and made.entries is table.entries
    found = sorted(map(tuple, np.concatenate(items(made)).tolist()))
    tiles = table.tiles[: table.n_work] * 16
    wanted = [(h, t, a, b, -1) for h in range(6) for t, a, b in zip(tiles, table.ptr[:-1], table.ptr[1:], strict=False)]
    assert found == sorted(wanted)


def test_sections_one_after_the_other_and_long_tiles_first() -> None:
    table = tile_table(Bands([Band(0, 400, 0, 400, -INF, 0)]), 400, 400, 16, 16, "q")
    made = schedule(table, 16, 16, 4, 2, 132, stay=False)
    assert [sorted(set(part)) for part in np.split(made.slots[:, 0], 2)] == [[0, 1], [2, 3]]
    for part in np.split(made.slots, 2):
        length = [tiles_of(table, item) for item in part]
        assert length == sorted(length, reverse=True)


def test_nobody_is_much_busier_than_the_mean() -> None:
    table = tile_table(Bands([Band(0, 8192, 0, 8192, -INF, 0)]), 8192, 8192, 128, 128, "q")
    made = schedule(table, 128, 128, 16, 2, 132)
    loads = [sum(tiles_of(table, item) + OVERHEAD for item in mine) for mine in items(made)]
    assert max(loads) < 1.01 * np.mean(loads)


def test_sections_fit_the_cache() -> None:
    assert heads_per_section(32, 8, CACHE_BYTES) == 4, "a group at least"
    assert heads_per_section(32, 8, CACHE_BYTES // 3) == 8, "a divisor of the key heads"
    assert heads_per_section(32, 8, 1) == 32
    assert heads_per_section(6, 6, 2 * CACHE_BYTES) == 1


def test_uploaded_once() -> None:
    made = schedule(tile_table(DOCUMENTS, 133, 133, 16, 16, "q"), 16, 16, 2, 1, 3)
    first, second = made.on(torch.device("cpu")), made.on(torch.device("cpu"))
    assert all(mine is theirs for mine, theirs in zip(first, second, strict=True))
    assert first.slots.tolist() == made.slots.reshape(-1).tolist() and first.counts.tolist() == made.counts.tolist()
    assert first.entries is made.table.on(torch.device("cpu")).entries, "shared with every other division of the table"
