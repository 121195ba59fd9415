"""Strategies: names and options that cannot be are refused before anything is planned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distattn.parallel import mask as masks
from distattn.parallel.schedule import make_schedule
from distattn.parallel.schedules import LAYOUTS, SCHEDULES, checked_strategy, make_layout
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallel.verify import verify_schedule


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("gathr", "There is no schedule 'gathr'.*Did you mean 'gather'"),
        (Strategy("ring", layout="zigzga"), "There is no layout 'zigzga'.*Did you mean 'zigzag'"),
        (Strategy(ulysses=3), "ulysses=3 does not divide the 8 ranks of the group. Use one of 1, 2, 4, 8"),
        (Strategy(ulysses=0), "ulysses must be a whole number of 1 or more. Found 0"),
        (Strategy("double_ring", devices=3), "devices=3 a node does not fit 8 ranks"),
        (Strategy("gather", stages=-1), "stages must be a whole number"),
        (Strategy("gather", stages=True), "stages must be a whole number"),
        (Strategy("tree", in_flight=0), "in_flight must be a whole number"),
        (Strategy("zigzag", stages=2), "stages is an option of gather, disaggregate; zigzag has none"),
        (Strategy("gather", in_flight=2), "in_flight is an option of tree"),
        (Strategy("zigzag", layout="striped"), "For a ring on striped, ask for schedule 'ring'"),
        (Strategy("gather", rotate="q"), "rotate='q' is for ring, zigzag, striped; gather moves"),
        (Strategy(rotate="k"), "rotate must be one of auto, kv, q. Found 'k'"),
        (Strategy(keep="first"), "keep must be one of all, last, none"),
        (Strategy("ring", servers=2), "servers without tokens are for disaggregate; ring has none"),
        (Strategy("disaggregate", servers=8), "servers=8 of 8 ranks leave none that holds tokens. Use at most servers=7"),
        (Strategy("disaggregate", servers=-1), "servers must be a whole number of 0 or more. Found -1"),
        (Strategy("disaggregate", servers=2, ulysses=2), "servers=2 hold no rows to exchange heads for, but ulysses=2"),
        (Strategy("ring", balance=Balance()), "balance is an option of disaggregate; ring has none"),
        (7, "named by a text or a Strategy. Found 7"),
    ],
)
def test_what_does_not_fit_eight_ranks_is_refused(strategy, text):
    with pytest.raises(ValueError, match=text):
        checked_strategy(strategy, 8)


def test_nodes_and_head_exchanges_must_nest():
    for strategy in (Strategy(ulysses=4, devices=6), Strategy(ulysses=6, devices=4)):
        with pytest.raises(ValueError, match="one of the two degrees the other"):
            checked_strategy(strategy, 12)
    assert checked_strategy(Strategy(ulysses=2, devices=6), 12).devices == 6


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 3, 0], [2, 0, 1]], ids=str)
def test_more_ranks_than_rows_and_empty_documents_are_plans_too(name, lengths):
    """Nothing to do is not an error: some ranks hold no rows, or none does."""
    schedule = make_schedule(Strategy(name, devices=4, ulysses=2), masks.documents(lengths), 8)
    verify_schedule(schedule, Shape(4, 2, 8, 8, torch.float32))
    assert schedule.layout.rows_all.sum() == sum(lengths)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ulysses", [1, 2, 3])
def test_padded_shards_are_equal_in_both_layouts(layout, ulysses):
    for n in (0, 1, 7, 30, 41):
        outer, inner = make_layout(Strategy("ring", layout=layout, ulysses=ulysses), masks.causal(n), 6, pad_to_equal=True)
        assert len(set(outer.rows_all.tolist())) == 1 and len(set(inner.rows_all.tolist())) == 1
        assert (
            outer.n_valid == n and outer.n_tokens < n + 6 * ulysses and np.array_equal(outer.unshard_index, inner.unshard_index)
        )


def test_a_strategy_says_what_is_not_usual():
    assert str(Strategy("gather", layout="zigzag", stages=2)) == "gather, keep last, layout zigzag, stages 2"
