"""Masks against their definitions, pair by pair, and the texts that name them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.bands import Band, Bands
from distattn.parallel import mask as masks
from distattn.parallel.mask import Mask
from distattn.parallel.mask_text import parse_mask

sizes_lists = st.lists(st.integers(0, 9), max_size=6)


def seen(mask: Mask) -> np.ndarray:
    """How often the mask sees each pair, [n, n]."""
    return mask.bands.dense(mask.n_tokens, mask.n_tokens).numpy()


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n)[:, None], np.arange(n)[None]


def agree(mask: Mask, expected: np.ndarray) -> None:
    assert np.array_equal(seen(mask), np.broadcast_to(expected, (mask.n_tokens, mask.n_tokens)).astype(int))
    assert mask.bands.area == seen(mask).sum()
    assert mask.bands.overlap() is None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(1, 25), st.integers(0, 25))
def test_masks_of_one_sequence(n: int, size: int, other: int) -> None:
    i, j = pairs(n)
    agree(masks.full(n), i == i)
    agree(masks.causal(n), j <= i)
    agree(masks.sliding_window(n, size), (j <= i) & (i - j < size))
    agree(masks.sliding_window(n, size, sinks=other), (j <= i) & ((i - j < size) | (j < other)))
    agree(masks.sliding_window(n, other, symmetric=True), abs(i - j) <= other)
    agree(masks.sliding_window(n, size, sinks=other, symmetric=True), (abs(i - j) <= size) | (j < other))
    agree(masks.chunked(n, size), (j <= i) & (i // size == j // size))
    agree(masks.chunked(n, size, causal=False), i // size == j // size)
    if other <= n:
        agree(masks.prefix_lm(n, other), (j <= i) | ((i < other) & (j < other)))


@settings(deadline=None, max_examples=50)
@given(sizes_lists, st.integers(1, 10))
def test_documents_see_only_themselves(sizes: list[int], window: int) -> None:
    i, j = pairs(sum(sizes))
    document = np.repeat(np.arange(len(sizes)), sizes)
    same = document[i] == document[j]
    agree(masks.documents(sizes), same & (j <= i))
    agree(masks.documents(sizes, causal=False), same)
    agree(masks.documents(sizes, window=window), same & (j <= i) & (i - j < window))
    agree(masks.documents(sizes, causal=False, window=window), same & (abs(i - j) <= window))
    mask = masks.documents(np.array(sizes, dtype=np.int32))
    assert mask.lengths == tuple(sizes) and mask.n_tokens == sum(sizes)
    assert mask.document_starts.tolist() == [sum(sizes[:d]) for d in range(len(sizes))]


def test_only_documents_have_lengths() -> None:
    assert masks.causal(9).lengths is None and masks.chunked(9, 3).lengths is None
    assert masks.causal(9).document_starts.tolist() == [0]


def test_union_adds_disjoint_masks_and_names_bands_that_overlap() -> None:
    strictly_later = masks.from_bands(6, [Band(0, 6, 0, 6, lo=1)])
    assert np.array_equal(seen(masks.union(masks.causal(6), strictly_later)), np.ones((6, 6)))
    with pytest.raises(ValueError, match=r"Band\(0, 6, 0, 6, hi=0\).*Band\(0, 6, 0, 6, lo=-1, hi=1\).*share a pair"):
        masks.union(masks.causal(6), masks.sliding_window(6, 1, symmetric=True))
    with pytest.raises(ValueError, match="one length, found .*n_tokens=6.*n_tokens=7"):
        masks.union(masks.causal(6), masks.causal(7))
    with pytest.raises(ValueError, match="no masks"):
        masks.union()


@settings(deadline=None, max_examples=50)
@given(sizes_lists, st.integers(0, 9), st.integers(0, 9))
def test_from_bands_refuses_exactly_the_overlapping(sizes: list[int], lo: int, hi: int) -> None:
    n = sum(sizes)
    parts = masks.documents(sizes).bands.table
    more = np.concatenate([parts, [Band(0, n, 0, n, lo, hi)]])
    counts = sum(Bands([Band(*row)]).dense(n, n) for row in more.tolist())
    if n and counts.max() > 1:
        with pytest.raises(ValueError, match="must be disjoint"):
            masks.from_bands(n, more)
    else:
        assert np.array_equal(seen(masks.from_bands(n, more)), counts)


def test_digest_names_the_pairs_and_the_documents() -> None:
    assert masks.causal(8) == masks.causal(8) and hash(masks.causal(8)) == hash(masks.causal(8))
    assert masks.sliding_window(8, 8) == masks.causal(8)  # the same pairs, whatever the name
    different = [masks.causal(8), masks.causal(9), masks.documents([8]), masks.documents([4, 4]), masks.documents([4, 4, 0])]
    assert len({mask.digest for mask in different}) == len(different)


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="Cut its queries and keys to 0 .. 8"):
        masks.from_bands(8, [Band(0, 9, 0, 8)])
    for call, found in [
        (lambda: masks.causal(-1), "-1 was given for the length"),
        (lambda: masks.causal(1.5), "1.5 was given for the length"),
        (lambda: masks.sliding_window(8, 0), "0 was given for a causal window.* 1 or more"),
        (lambda: masks.sliding_window(8, -1, symmetric=True), "-1 was given for a symmetric window"),
        (lambda: masks.sliding_window(8, 2, sinks=-1), "-1 was given for the sink tokens"),
        (lambda: masks.documents([2, -1]), "Document 1 has length -1"),
        (lambda: masks.documents([2], window=0), "0 was given for a causal window"),
        (lambda: masks.documents([[2, 3]]), "whole numbers, found shape"),
        (lambda: masks.prefix_lm(8, 9), "prefix of 9 tokens does not fit a sequence of 8"),
        (lambda: masks.chunked(8, 0), "0 was given for the tokens of a chunk"),
    ]:
        with pytest.raises(ValueError, match=found):
            call()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", masks.full(20)),
        ("causal", masks.causal(20)),
        ("window:4", masks.sliding_window(20, 4)),
        ("window:4:sinks=2", masks.sliding_window(20, 4, sinks=2)),
        ("window:4:symmetric:sinks=2", masks.sliding_window(20, 4, sinks=2, symmetric=True)),
        ("documents:5,3,12", masks.documents([5, 3, 12])),
        ("documents:20", masks.documents([20])),
        ("documents:5,15:window=3:full", masks.documents([5, 15], causal=False, window=3)),
        (" prefix:7 ", masks.prefix_lm(20, 7)),
        ("chunked:6", masks.chunked(20, 6)),
        ("chunked:6:full", masks.chunked(20, 6, causal=False)),
    ],
)
def test_texts(text: str, expected: Mask) -> None:
    mask = parse_mask(text, 20)
    assert mask == expected and mask.lengths == expected.lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("casual", "unknown kind 'casual'. Did you mean causal"),
        ("windows:4", r"Did you mean window:KEYS\[:sinks=KEYS\]"),
        ("xyz", "Write one of: full, causal, window:KEYS"),
        ("window", "needs one size"),
        ("window:4,5", "needs one size"),
        ("window:four", "'four' where a whole number belongs"),
        ("documents:", "'' where a whole number belongs"),
        ("documents:5,3", "8 tokens in all, but the sequence has 20"),
        ("window:4:sink=2", "option 'sink=2'. Did you mean 'sinks'"),
        ("window:4:sinks", r"option 'sinks'. Write window:KEYS\[:sinks=KEYS\]"),
        ("window:4:symmetric=1", "option 'symmetric=1'"),
        ("window:4:sinks=1:sinks=2", "option 'sinks=2'"),
        ("causal:3", "option '3'"),
        ("prefix:21", "prefix of 21 tokens does not fit"),
    ],
)
def test_bad_texts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mask(text, 20)
