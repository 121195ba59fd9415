"""Merging partial results: any cut of the keys, in any order, empty rows included."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores, State, empty_state
from distattn.kernels.merge import merge, merge_into
from distattn.kernels.reference import Reference, attention

SCORES = Scores(0.4)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(20, 2, 8).double(), torch.randn(30, 1, 8).double(), torch.randn(30, 1, 4).double()


@given(st.integers(0, 30), st.booleans())
def test_parts_merge_to_the_whole(at: int, swapped: bool) -> None:
    q, k, v = tensors()
    bands = Bands([Band(2, 18, 0, 30, -INF, 5)])
    halves = [Reference().forward(q, k, v, part, SCORES) for part in bands.split_keys(at)]
    whole = merge(*(halves[::-1] if swapped else halves))
    out, lse = attention(q, k, v, bands, SCORES)
    assert torch.allclose(whole.o, out, atol=1e-14) and torch.allclose(whole.lse, lse, atol=1e-14)
    assert (whole.lse[:2] == -torch.inf).all() and not whole.o[:2].any()


def test_merge_into_some_rows_leaves_the_others() -> None:
    q, k, v = tensors()
    state = Reference().forward(q, k, v, Bands([Band(0, 20, 0, 10)]), SCORES)
    before = State(state.o.clone(), state.lse.clone())
    part = Reference().forward(q[5:9], k[10:], v[10:], Bands([Band(0, 4, 0, 20)]), SCORES)
    merge_into(state, part, slice(5, 9))
    out, lse = attention(q, k, v, Bands([Band(5, 9, 0, 30)]), SCORES)
    assert torch.allclose(state.o[5:9], out[5:9], atol=1e-14) and torch.allclose(state.lse[5:9], lse[5:9], atol=1e-14)
    for rows in (slice(0, 5), slice(9, 20)):
        assert torch.equal(state.o[rows], before.o[rows]) and torch.equal(state.lse[rows], before.lse[rows])


def test_scores_far_apart_do_not_overflow() -> None:
    q = torch.zeros(3, 1, 4)
    state = empty_state(q, 4, sinks=torch.tensor([500.0]))
    merge_into(state, State(torch.ones(3, 1, 4), torch.tensor([[-500.0], [1000.0], [-torch.inf]])))
    assert state.lse.flatten().tolist() == [500.0, 1000.0, 500.0]
    assert state.o[:, 0, 0].tolist() == [0.0, 1.0, 0.0]
