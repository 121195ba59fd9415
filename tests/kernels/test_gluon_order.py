"""The order in which dq is added: ranks count lower numbers alone, everybody comes to an end, and waits are short."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.gluon_launch import FUSED, ORDERED, ROWS
from distattn.kernels.gluon_order import Order, goes_down, heads_at_once, order, waits
from distattn.kernels.gluon_plans import Shape, costs_of_cutting, plan
from distattn.kernels.gluon_schedule import schedule
from distattn.kernels.tiles import LEFT, START, TileTable, tile_table
from tests.kernels.cases import DOCUMENTS, GAPS, unions

CAUSAL = Bands([Band(0, 4096, 0, 4096, -INF, 0)])
LATER = Bands([Band(0, 4096, 0, 4096, 0, INF)])  # queries see later keys
FULL = Bands([Band(0, 4096, 0, 4096)])
SLIDING = Bands([Band(0, 4096, 0, 4096, -1000, 0)])


def table_of(bands: Bands, n: int = 4096, block_q: int = 64) -> TileTable:
    return tile_table(bands, n, n, block_q, 128, "k", block_q)


def contributions(made: Order, block_q: int) -> list[list[tuple[int, int]]]:
    """(tile of dq, rank) of every step of every place, as the kernel reads them."""
    found = []
    for place in range(made.table.n_work):
        mine = []
        for entry in range(made.table.ptr[place], made.table.ptr[place + 1]):
            count = int(made.table.entries[entry, LEFT:].sum())
            walk, at = (int(x) for x in made.walks[entry, :2])
            for n in range(count):
                tile = (walk + n if walk >= 0 else -1 - walk - n) % count
                rank = -1 - at if at < 0 else int(made.ranks[at + tile])
                mine.append((int(made.table.entries[entry, START]) // block_q + tile, rank))
        assert len(mine) == made.walks[made.table.ptr[place], 2]
        assert [tile for tile, _ in mine] == made.visits(place, block_q).tolist()
        found.append(mine)
    return found


@pytest.mark.parametrize("bands", [CAUSAL, LATER, FULL, SLIDING, DOCUMENTS, GAPS])
@pytest.mark.parametrize("down", [True, False, None])
def test_ranks_count_lower_numbers_and_own_earlier_steps(bands: Bands, down: bool | None) -> None:
    found = contributions(order(table_of(bands), 64, down), 64)
    seen: dict[int, int] = {}
    for mine in found:  # place after place: the order of numbers in every head
        for tile, rank in mine:
            assert rank == seen.get(tile, 0)
            seen[tile] = rank + 1
    want = table_of(bands)
    visits = {tile for first, count in zip(want.entries[:, START] // 64, want.entries[:, LEFT:].sum(1), strict=True)
              for tile in range(first, first + count)}  # fmt: skip
    assert set(seen) == visits and sum(seen.values()) == int(want.entries[:, LEFT:].sum())


@given(unions(700, 600), st.integers(1, 6), st.integers(0, 1000))
def test_all_come_to_an_end_however_few_run_at_once(bands: Bands, resident: int, seed: int) -> None:
    """Any progress of any number of programs that start in the order of their numbers."""
    made = order(tile_table(bands, 700, 600, 64, 128, "k", 64), 64)
    if made.table.n_work == 0:
        return
    draw, left, counted = random.Random(seed), contributions(made, 64), dict.fromkeys(range(20), 0)
    running, following = list(range(min(resident, len(left)))), min(resident, len(left))
    while running:
        able = [p for p in running if not left[p] or counted[left[p][0][0]] == left[p][0][1]]
        assert able, "nobody can go on"
        p = draw.choice(able)
        if left[p]:
            counted[left[p].pop(0)[0]] += 1
            continue
        running.remove(p)
        if following < len(left):
            running.append(following)
            following += 1


def test_ranks_of_one_number_take_no_table() -> None:
    for bands in (CAUSAL, FULL, LATER):
        made = order(table_of(bands), 64)
        assert (made.walks[:, 1] < 0).all() and len(made.ranks) == 4
    assert len(order(table_of(SLIDING), 64).ranks) > 400


def test_programs_begin_where_the_one_before_has_been() -> None:
    assert goes_down(table_of(CAUSAL), 64) and goes_down(table_of(SLIDING), 64)
    assert not goes_down(table_of(LATER), 64)
    assert order(table_of(CAUSAL), 64).visits(0, 64)[0] == 63 and order(table_of(LATER), 64).visits(0, 64)[0] == 0


def test_few_programs_of_a_head_set_out_together() -> None:
    assert heads_at_once(table_of(FULL), 16, 2, 1, 132) == 16, "short launches: all heads at once"
    long = tile_table(Bands([Band(0, 65536, 0, 65536)]), 65536, 65536, 64, 128, "k", 64)
    assert 1 <= heads_at_once(long, 16, 1, 1, 132) < 16
    assert heads_at_once(long, 16, 4, 1, 132) % 4 == 0


def makespan(bands: Bands, down: bool, heads: int, section: int, latency: float, n: int = 4096) -> float:
    made = order(table_of(bands, n), 64, down)
    return waits(made, schedule(made.table, 128, 64, heads, section, 12, False), 64, 1, 12, 1.0, latency)


@pytest.mark.parametrize("bands", [CAUSAL, SLIDING, FULL])
def test_programs_hardly_wait(bands: Bands) -> None:
    """12 multiprocessors, 4 heads: at most the turns with which three programs of a head set out."""
    free = makespan(bands, True, 4, 4, -INF)
    steps = int(table_of(bands).entries[:, LEFT:].sum()) * 4
    assert steps / 12 <= free <= 1.15 * steps / 12
    assert makespan(bands, True, 4, 4, 0.5) <= 1.03 * free
    if bands is CAUSAL:
        assert makespan(bands, False, 4, 1, 0.5) > 1.2 * makespan(bands, True, 4, 4, 0.5)


def test_the_wait_of_one_chain_by_hand() -> None:
    """Two key tiles of one head under a full mask of two query tiles, a program each: the second sets out one turn later."""
    bands = Bands([Band(0, 128, 0, 256)])
    made = order(tile_table(bands, 128, 256, 64, 128, "k", 64), 64)
    plan = schedule(made.table, 128, 64, 1, 1, 2, False)
    assert waits(made, plan, 64, 1, 2, 1.0, 0.25, overhead=0.0) == pytest.approx(2 + 1.25 - 1)
    assert waits(made, plan, 64, 1, 2, 1.0, 3.0, overhead=0.0) == pytest.approx(2 + 3.0)
    assert waits(made, plan, 64, 1, 1, 1.0, 0.25, overhead=0.0) == pytest.approx(4.0)


def test_launches_that_wait_are_whole_and_in_the_order_of_their_numbers() -> None:
    row, shape = ROWS[ORDERED][128, 128], Shape(4096, 4096, 16, 8, 128, 128)
    made = plan(ORDERED, row, shape, CAUSAL, 12, None, 64)
    assert made.work and made.order is order(table_of(CAUSAL), 64) and made.table is made.order.table
    assert plan(FUSED, row, shape, CAUSAL, 12, None, 64).order is None
    assert made.work.programs == len(made.work.slots) == 8 * made.table.n_work and made.work.pieces == 0
    for head in range(8):  # ranks count the places of the table
        mine = made.work.slots[made.work.slots[:, 0] == head]
        assert mine[:, 2].tolist() == made.table.ptr[: made.table.n_work].tolist()
    with pytest.raises(AssertionError, match="whole items"):
        plan(ORDERED, row, shape, CAUSAL, 12, costs_of_cutting(ORDERED, row, shape), 64)


def test_uploaded_once() -> None:
    import torch

    made = order(table_of(DOCUMENTS), 64)
    assert order(table_of(DOCUMENTS), 64) is made
    first, second = made.on(torch.device("cpu")), made.on(torch.device("cpu"))
    assert all(a is b for a, b in zip(first, second, strict=True)) and np.array_equal(first[0].numpy(), made.walks.reshape(-1))
