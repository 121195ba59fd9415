"""Layouts: every position in exactly one row, shards of nearly equal size, and shard and unshard that undo each other."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.parallel.layout import Layout, contiguous, document_striped, document_zigzag, striped, zigzag

PLAIN = (contiguous, zigzag, striped)
BY_DOCUMENT = (document_zigzag, document_striped)
worlds = st.integers(1, 9)
lengths = st.lists(st.integers(0, 30), max_size=8)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    world, sizes, pad = draw(worlds), draw(lengths), draw(st.booleans())
    make = draw(st.sampled_from(PLAIN + BY_DOCUMENT))
    return make(sum(sizes) if make in PLAIN else sizes, world, pad_to_equal=pad)


@settings(deadline=None, max_examples=80)
@given(layouts())
def test_every_position_stands_in_exactly_one_row(layout: Layout) -> None:
    positions = [layout.positions(rank) for rank in range(layout.world)]
    assert sorted(np.concatenate(positions).tolist()) == list(range(layout.n_tokens))
    for rank, held in enumerate(positions):
        assert len(held) == layout.rows(rank) == layout.rows_all[rank]
        assert (np.diff(held) > 0).all()
        owner, row = layout.owner_of(held)
        assert (owner == rank).all() and (row == np.arange(len(held))).all()
        starts, counts, rows = layout.segments(rank)
        listed = [list(range(s, s + layout.step * c, layout.step)) for s, c in zip(starts, counts, strict=True)]
        assert sum(listed, []) == held.tolist()
        assert [held[row] for row in rows] == starts.tolist()


@settings(deadline=None, max_examples=80)
@given(worlds, lengths)
def test_shards_differ_by_at_most_one_row_and_by_none_when_padded(world: int, sizes: list[int]) -> None:
    n = sum(sizes)
    for make in PLAIN + BY_DOCUMENT:
        asked = n if make in PLAIN else sizes
        assert np.ptp(make(asked, world).rows_all) <= 1
        padded = make(asked, world, pad_to_equal=True)
        assert np.ptp(padded.rows_all) == 0
        assert padded.n_valid == n and padded.n_tokens == -(-n // world) * world


@settings(deadline=None, max_examples=80)
@given(worlds, lengths)
def test_each_document_alone_is_spread_evenly(world: int, sizes: list[int]) -> None:
    for make in BY_DOCUMENT:
        rank, _ = make(sizes, world).owner_of(np.arange(sum(sizes)))
        for begin, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            held = np.bincount(rank[begin : begin + size], minlength=world)
            assert np.ptp(held) <= 1


def test_plain_layouts_are_the_known_ones() -> None:
    assert [contiguous(8, 4).positions(rank).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [zigzag(8, 2).positions(rank).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [striped(7, 3).positions(rank).tolist() for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert document_striped([64], 4) == striped(64, 4) and document_zigzag([64], 4) == zigzag(64, 4)
    assert contiguous(6, 4, pad_to_equal=True).positions(3).tolist() == [5, 7]


@pytest.mark.parametrize("world", [2, 8, 64])
@pytest.mark.parametrize("size", ["P/2", "P", "2P", "3P", "P+1"])
@pytest.mark.parametrize("make", BY_DOCUMENT)
def test_causal_work_of_many_equal_documents_is_balanced(make, size: str, world: int) -> None:
    size = {"P/2": world // 2, "P": world, "2P": 2 * world, "3P": 3 * world, "P+1": world + 1}[size]
    sizes = [size] * (32 * world)
    layout = make(sizes, world)
    keys = np.tile(np.arange(1, size + 1), len(sizes))
    work = np.array([keys[layout.positions(rank)].sum() for rank in range(world)])
    assert work.max() <= 1.03 * work.mean()  # without turns: 2 - 1/P for documents of P tokens


@pytest.mark.parametrize("world", [2, 8])
def test_causal_work_of_one_long_sequence_is_balanced(world: int) -> None:
    n = 4096 + 3
    for make in (zigzag, striped):
        work = np.array([(make(n, world).positions(rank) + 1).sum() for rank in range(world)])
        assert work.max() <= 1.01 * work.mean()


@settings(deadline=None, max_examples=80)
@given(layouts(), st.integers(-3, 2), st.booleans())
def test_unshard_undoes_shard_for_any_dim(layout: Layout, dim: int, whole: bool) -> None:
    rows = layout.n_tokens if whole else layout.n_valid
    shape = [2, 3, 4]
    shape[dim] = rows
    full = torch.randn(shape)
    shards = [layout.shard(full, rank, dim) for rank in range(layout.world)]
    assert [shard.shape[dim] for shard in shards] == layout.rows_all.tolist()
    assert torch.equal(layout.unshard(shards, dim), full.narrow(dim, 0, layout.n_valid))
    for rank, shard in enumerate(shards):
        held = layout.positions(rank)
        assert torch.equal(shard.narrow(dim, 0, (held < rows).sum()), full.index_select(dim, torch.tensor(held[held < rows])))
        assert (shard.narrow(dim, (held < rows).sum(), (held >= rows).sum()) == 0).all()


def test_shard_and_unshard_have_gradients() -> None:
    layout = document_zigzag([5, 4, 9], 4, pad_to_equal=True)
    full = torch.randn(18, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(18, 2, dtype=torch.float64)
    again = layout.unshard([layout.shard(full, rank) for rank in range(4)])
    (grad,) = torch.autograd.grad((again * weight).sum(), full)
    assert torch.equal(grad, weight)


def test_equal_placements_share_a_digest() -> None:
    assert striped(40, 4).digest == striped(40, 4).digest and hash(striped(40, 4)) == hash(striped(40, 4))
    different = [striped(40, 4), striped(41, 4), striped(40, 5), zigzag(40, 4), contiguous(40, 4)]
    different += [striped(39, 4, pad_to_equal=True), document_striped([20, 20], 4)]
    assert len({layout.digest for layout in different}) == len(different)
    with pytest.raises(ValueError, match="read-only"):
        striped(40, 4).seg_start[0] = 1


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="at least 1 rank, found world = 0"):
        zigzag(10, 0)
    with pytest.raises(ValueError, match="at least 1 rank"):
        document_striped([], 0)
    with pytest.raises(ValueError, match="cannot hold -1 tokens"):
        contiguous(-1, 2)
    with pytest.raises(ValueError, match="Document 1 has length -5"):
        document_zigzag([3, -5], 2)
    with pytest.raises(ValueError, match="whole numbers"):
        document_zigzag([3.5], 2)
    layout = striped(10, 4)
    with pytest.raises(ValueError, match="rank 4 is not in .*0 to 3"):
        layout.positions(4)
    with pytest.raises(ValueError, match="rank -1"):
        layout.shard(torch.zeros(10), -1)
    with pytest.raises(ValueError, match=r"needs 10 rows along dim 0, found 9"):
        layout.shard(torch.zeros(9), 0)
    with pytest.raises(ValueError, match=r"needs 10 \(or 12, padded\) rows"):
        striped(10, 4, pad_to_equal=True).shard(torch.zeros(11), 0)
    with pytest.raises(ValueError, match=r"4 shards of \[3, 3, 2, 2\] rows along dim 0, found 3 of \[3, 3, 2\]"):
        layout.unshard([torch.zeros(3), torch.zeros(3), torch.zeros(2)])
    with pytest.raises(ValueError, match="positions 0 to 10"):
        layout.owner_of([0, 10])


@pytest.mark.parametrize("make", BY_DOCUMENT)
def test_a_million_tokens_in_4096_documents_on_512_ranks(make) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(1 << 20, rng.dirichlet(np.ones(4096)))
    begin = time.process_time()
    layout = make(sizes, 512)
    assert time.process_time() - begin < 3  # 0.4 s at most when the machine is idle; a loop over segments takes far longer
    assert np.ptp(layout.rows_all) <= 1
    assert (np.sort(layout.unshard_index) == np.arange(1 << 20)).all()
