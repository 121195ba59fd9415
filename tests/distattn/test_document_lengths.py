"""Document lengths for experiments: sums, shapes, the published percentiles, and that they never change."""

from __future__ import annotations

import numpy as np
import pytest

from distattn.document_lengths import KINDS, document_lengths

FIRST = [4096, 3328, 3376, 2528, 3104, 3040, 3664, 3040]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 15, 16, 1000, 1 << 20])
def test_fill_the_tokens_with_whole_multiples(kind: str, tokens: int) -> None:
    made = document_lengths(kind, tokens, seed=3)
    assert made.sum() == tokens and made.dtype == np.int64 and (made > 0).all()
    assert (made[:-1] % 16 == 0).all()


def test_heavy_tail_has_the_published_percentiles() -> None:
    made = document_lengths("heavy_tail", 1 << 29, seed=0, multiple=1)[:-1]
    assert made.mean() == pytest.approx(3962, rel=0.01)
    assert np.median(made) == pytest.approx(3227, rel=0.005)
    assert np.percentile(made, 99) == pytest.approx(26_000, rel=0.05)
    assert 120_000 < made.max() <= 125_000


@pytest.mark.parametrize("kind", ["uniform", "bimodal"])
def test_means_are_as_asked(kind: str) -> None:
    made = document_lengths(kind, 1 << 26, seed=1, mean=2000, multiple=1)
    assert made.mean() == pytest.approx(2000, rel=0.03)


def test_giant_is_half_of_all() -> None:
    made = document_lengths("giant", 1 << 18, seed=0, mean=1024)
    assert made[0] == 1 << 17 and made[1:].max() < 2048


def test_seeds_differ_and_stay_the_same_for_ever() -> None:
    first = document_lengths("heavy_tail", 65536, seed=0)
    assert not np.array_equal(first, document_lengths("heavy_tail", 65536, seed=1))
    assert first[:8].tolist() == FIRST


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean heavy_tail"):
        document_lengths("heavytail", 100, 0)
    with pytest.raises(ValueError, match="multiple=0"):
        document_lengths("uniform", 100, 0, multiple=0)
