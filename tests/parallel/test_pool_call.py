"""What servers are told of a call comes out as it went in."""

from __future__ import annotations

import json

import pytest
import torch

from distattn.kernels.contract import Scores
from distattn.parallel.pool_board import Address
from distattn.parallel.pool_call import Call, PlanInputs
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy
from tests.parallel.plans import MASKS, make_mask


@pytest.mark.parametrize("kind", MASKS)
def test_plan_inputs(kind: str) -> None:
    inputs = PlanInputs(make_mask(kind, 41), Strategy("gather", stages=3, keep="none"), True, "1.2")
    back = PlanInputs.decode(inputs.encode())
    assert back == inputs and back.mask.digest == inputs.mask.digest and repr(back.mask) == repr(inputs.mask)


def test_documents_of_no_tokens_and_no_mask_at_all() -> None:
    for mask in (make_mask("documents", 0), make_mask("full", 0)):
        inputs = PlanInputs(mask, Strategy(), False, "")
        assert PlanInputs.decode(inputs.encode()).mask.digest == mask.digest


@pytest.mark.parametrize("home", [None, torch.bfloat16])
def test_call(home: torch.dtype | None) -> None:
    call = Call(7, 3, "backward", Shape(8, 2, 64, 32, torch.float64, home), Scores(0.125, 30.0), True)
    assert Call.of_words(json.loads(json.dumps(call.as_words()))) == call


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:-1", "host:70000", "host:x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=f"pool_store={text!r} is no address. Write HOST:PORT"):
        Address.parse(text, "pool_store")


def test_addresses() -> None:
    assert Address.parse("::1:29500", "x") == Address("::1", 29500)
    assert Address.parse("auto", "x").port == 0 and str(Address("node7", 1)) == "node7:1"
