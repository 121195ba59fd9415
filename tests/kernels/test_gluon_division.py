"""Cut items: every pair once, equal shares, nothing cut where it does not pay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.gluon_division import (
    FROM,
    ITEM,
    OVERHEAD,
    PROGRAM,
    TO,
    Costs,
    busiest_of,
    costs_of,
    divide,
    entries_of_piece,
    in_turn,
    is_piece,
)
from distattn.kernels.gluon_launch import FORWARD, KEYS, QUERIES, ROWS
from distattn.kernels.gluon_plans import Shape, Tiling, costs_of_cutting, counted_occupancy, plan, tiling
from distattn.kernels.gluon_schedule import Schedule, schedule
from distattn.kernels.tiles import COL0, COL1, HIGH, LEFT, LOW, ROW0, ROW1, START, tile_table
from tests.kernels.cases import DOCUMENTS, unions, visible_pairs

FREE = Costs(0.0, 0.0, 1, 0.0)
REAL = costs_of(4 * 128**3, 128 * 128 * 4)
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda n: np.array(sorted(n, reverse=True)))
costs = st.builds(Costs, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 3.0]), st.integers(1, 9), st.just(0.01))


def runs(division: np.ndarray, tiles: np.ndarray) -> None:
    """Asserts that the rows of every item cover its tiles once."""
    order = np.lexsort((division[:, FROM], division[:, ITEM]))
    item, start, stop = division[order, ITEM], division[order, FROM], division[order, TO]
    assert sorted(set(item.tolist())) == list(range(len(tiles)))
    new = np.diff(item, prepend=-1) > 0
    assert (start[new] == 0).all() and (stop > start).all() and (start[~new] == stop[:-1][~new[1:]]).all()
    assert (stop[np.append(new[1:], True)] == tiles).all()


@settings(max_examples=200)
@given(tiles=lengths, unit=st.sampled_from([1, 1, 3]), programs=st.integers(1, 50), stay=st.booleans(), costs=costs)
def test_every_tile_once_and_never_slower(tiles: np.ndarray, unit: int, programs: int, stay: bool, costs: Costs) -> None:
    found, whole = (divide(tiles, unit, programs, stay, price) for price in (costs, None))
    runs(found, tiles)
    runs(whole, tiles)
    assert not is_piece(whole, tiles).any()
    before, after = (busiest_of(made, tiles, unit, programs, stay, costs.write) for made in (whole, found))
    pieces = found[is_piece(found, tiles)]
    if len(pieces):
        assert after + costs.merge + costs.write * len(pieces) / programs < (1 - costs.gain) * before
        assert ((pieces[:, TO] - pieces[:, FROM]) * unit >= min(costs.least, unit * tiles.min())).all()
    else:
        assert np.array_equal(found, whole)
    assert np.array_equal(found, divide(tiles, unit, programs, stay, costs)), "the same division every time"
    if stay:
        assert found[:, PROGRAM].max() < programs
    else:
        assert found[:, PROGRAM].tolist() == list(range(len(found)))


@settings(max_examples=100)
@given(n=st.integers(1, 700), length=st.integers(400, 2000), stay=st.booleans())
def test_equal_items_are_shared_equally(n: int, length: int, stay: bool) -> None:
    """What splitting is for: the busiest program ends a few pieces' costs after the mean, or cutting would not pay."""
    tiles = np.full(n, length)
    found = divide(tiles, 1, 132, stay, REAL)
    mean = (tiles + OVERHEAD).sum() / 132
    busiest = busiest_of(found, tiles, 1, 132, stay, REAL.write)
    cost = 3 * (OVERHEAD + REAL.write) + REAL.least + REAL.merge + 2 * REAL.write  # two pieces and a half a program, merged
    assert busiest * (1 - REAL.gain) <= mean + cost


def test_pieces_follow_the_order_of_items_and_whole_items_stay_first() -> None:
    """2,048 items on 132: fifteen full waves are left alone, the last one is shared out in order."""
    tiles = np.full(2048, 128)
    found = divide(tiles, 1, 132, True, REAL)
    assert not is_piece(found[: 15 * 132], tiles).any() and is_piece(found[15 * 132 :], tiles).mean() > 0.9
    assert (np.diff(found[:, ITEM]) >= 0).all()
    before = busiest_of(divide(tiles, 1, 132, True, None), tiles, 1, 132, True, 0.0)
    mean = (tiles + OVERHEAD).sum() / 132
    assert before / mean > 1.03 and busiest_of(found, tiles, 1, 132, True, REAL.write) / mean < 1.006
    assert np.bincount(found[is_piece(found, tiles)][:, PROGRAM]).max() <= 3


def test_programs_of_their_own_start_long_pieces_first() -> None:
    tiles = np.full(2048, 256)
    found = divide(tiles, 1, 132, False, REAL)
    piece = is_piece(found, tiles)
    assert piece.any() and not piece[: len(piece) - piece.sum()].any(), "whole items come first"
    assert (np.diff((found[:, TO] - found[:, FROM])[piece]) <= 0).all()


def test_fewer_items_than_programs_become_one_piece_each() -> None:
    found = divide(np.full(8, 128), 1, 132, True, REAL)
    assert len(found) == 128 and set(found[:, TO] - found[:, FROM]) == {8}
    assert len(divide(np.full(4, 16), 1, 132, True, REAL)) == 8, "as many as pay: a piece is twice as long as its costs"
    assert not is_piece(divide(np.full(4, 9), 1, 132, True, REAL), np.full(4, 9)).any()


def test_nothing_is_cut_where_it_does_not_pay() -> None:
    causal = np.tile(np.repeat(np.arange(128, 0, -1), 2), 8)
    for stay in (False, True):
        assert not is_piece(divide(causal, 1, 132, stay, REAL), causal).any(), "16k causal is balanced as it is"
    full = np.full(132 * 3, 40)
    assert not is_piece(divide(full, 1, 132, True, REAL), full).any()
    assert not is_piece(divide(np.full(512, 32), 1, 132, True, REAL), np.full(512, 32)).any(), "3% of 134 tiles"


def test_in_turn_is_whoever_is_free_first() -> None:
    owner, done = in_turn(np.array([5.0, 3.0, 1.0, 1.0, 4.0]), 2)
    assert owner.tolist() == [0, 1, 1, 1, 0] and done.tolist() == [5, 3, 4, 5, 9]


# ---- what pieces see


def seen(entries: np.ndarray, n_rows: int, n_columns: int, block: int) -> np.ndarray:
    """How often a stationary row sees a streamed one, tile by tile; tiles that need no mask must see all."""
    count = np.zeros((n_rows, n_columns + block), int)
    x, y = np.arange(n_rows)[:, None], np.arange(n_columns + block)[None]
    for e in entries:
        pairs = (x >= e[ROW0]) & (x < e[ROW1]) & (y >= e[COL0]) & (y < e[COL1]) & (y - x >= e[LOW]) & (y - x <= e[HIGH])
        stop = e[START] + e[LEFT:].sum() * block
        count += pairs & (y >= e[START]) & (y < stop)
        whole = slice(e[START] + e[LEFT] * block, e[START] + e[LEFT : LEFT + 2].sum() * block)
        assert pairs[e[ROW0] : e[ROW1], whole].all()
    return count[:, :n_columns]


def slots_of(made: Schedule) -> list[tuple[list[int], int]]:
    """(item, place) of every slot in use."""
    slots = made.slots.reshape(-1, made.programs, 5).tolist()
    return [(slots[n][p][:4], slots[n][p][4]) for p in range(made.programs) for n in range(made.counts[p])]


@settings(max_examples=40)
@given(
    bands=unions(90, 110),
    by_key=st.booleans(),
    heads=st.integers(1, 3),
    programs=st.integers(1, 60),
    stay=st.booleans(),
    least=st.integers(1, 3),
)
def test_pieces_see_every_pair_of_their_item_once(
    bands: Bands, by_key: bool, heads: int, programs: int, stay: bool, least: int
) -> None:
    table = tile_table(bands, 90, 110, 16, 8, "k" if by_key else "q", 4)
    if not table.n_work:
        return
    rows, block, shape = (8, 16, (110, 90)) if by_key else (16, 8, (90, 110))
    made = schedule(table, rows, block, heads, 1, programs, stay, 1, Costs(0.1, 0.0, least, 0.0))
    found = np.zeros((heads, *shape), int)
    places = []
    for (head, _, first, last), place in slots_of(made):
        found[head] += seen(made.entries[first:last], *shape, block)
        places += [place] if place >= 0 else []
    visible = visible_pairs(bands, 90, 110).numpy()
    assert (found == (visible.T if by_key else visible)).all()
    assert sorted(places) == list(range(made.pieces))
    where = {place: item for item, place in slots_of(made) if place >= 0}
    assert made.merges.size == 0 or made.merges[0, 2] == 0
    for n, (head, row, first, last, _) in enumerate(made.merges.tolist()):
        assert last - first >= 2 and all(where[place][:2] == [head, row] for place in range(first, last))
        starts = [made.entries[where[place][2], START] for place in range(first, last)]
        assert len(bands) > 1 or starts == sorted(set(starts)), "added in the order of the rows that they stream"
        assert n == 0 or made.merges[n - 1, 3] == first


def test_a_piece_of_several_entries() -> None:
    table = tile_table(DOCUMENTS, 133, 133, 128, 8, "q")
    entries = table.entries[: table.ptr[1]]
    total = int(entries[:, LEFT:].sum())
    both = sum(seen(entries_of_piece(entries, a, b, 8), 133, 133, 8) for a, b in ((0, 5), (5, 6), (6, total)))
    assert (both == seen(entries, 133, 133, 8)).all()
    assert entries_of_piece(entries, 5, 6, 8)[:, LEFT:].sum() == 1


# ---- the model on the shapes that matter


def occupancies(kind: str, shape: Shape, bands: Bands) -> tuple[float, float]:
    row = ROWS[kind][shape.d, shape.d_v]
    return tuple(counted_occupancy(kind, row, shape, bands, 132, c) for c in (None, costs_of_cutting(kind, row, shape)))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [FORWARD, KEYS, QUERIES])
def test_occupancy_of_full_and_short_calls(kind: str) -> None:
    n = 16384
    full = Bands([Band(0, n, 0, n)])
    before, after = occupancies(kind, Shape(n, n, 16, 16, 128, 128), full)
    assert before < 0.971 and after > 0.993
    causal = Bands([Band(0, n, 0, n, -INF, 0)])
    before, after = occupancies(kind, Shape(n, n, 16, 16, 128, 128), causal)
    assert before == after > 0.997
    short = Shape(1024, n, 4, 4, 128, 128) if kind != KEYS else Shape(n, 1024, 4, 4, 128, 128)
    before, after = occupancies(kind, short, Bands([Band(0, short.n_q, 0, short.n_k)]))
    assert before < 0.25 and after > 0.75


def test_cached_and_off() -> None:
    row, shape, bands = ROWS[FORWARD][128, 128], Shape(1024, 16384, 4, 4, 128, 128), Bands([Band(0, 1024, 0, 16384)])
    price = costs_of_cutting(FORWARD, row, shape)
    first, second, off = (plan(FORWARD, row, shape, bands, 132, c).work for c in (price, price, None))
    assert first is second and first is not None and first.pieces == 128 and off is not None and off.pieces == 0
    assert off.programs == 32 and first.programs == 128
    assert tiling(KEYS, ROWS[KEYS][128, 128], shape) == Tiling(128, 64, 512, 256, 1, False)


def test_what_a_cut_costs() -> None:
    """A tile of 128 x 128 at head size 128 takes 1.85 us of one multiprocessor at 600 TFLOP/s of 132."""
    assert 1.84e-6 < 4 * 128**3 * 132 / 600e12 < 1.85e-6
    assert REAL.write == pytest.approx(1.5625) and REAL.merge == pytest.approx(2.71, abs=0.01) and REAL.least == 7
