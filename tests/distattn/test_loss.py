from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from distattn.loss import IGNORED, cross_entropy_sum


@pytest.mark.parametrize("rows", [0, 1, 7, 32, 100])
def test_the_sum_and_its_gradients_do_not_depend_on_the_groups(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(32, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (32,))
    labels[::5] = IGNORED
    expected = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
    gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    found = cross_entropy_sum(hidden, weight, labels, rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(3 * found, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_no_more_rows_than_asked_have_their_logits_at_one_time() -> None:
    """All tensors that autograd keeps, counted: none has the size of the logits of more than one group."""
    rows, vocabulary = 8, 1000
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        cross_entropy_sum(hidden, weight, torch.zeros(64, dtype=torch.long), rows).backward()
    assert max(kept) <= rows * vocabulary


def test_a_rank_without_rows_has_a_zero_loss_with_gradients() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.zeros(0, dtype=torch.long), 8)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None and not weight.grad.any()


def test_bfloat16_rows_are_summed_in_float32() -> None:
    hidden, weight = torch.randn(16, 4, dtype=torch.bfloat16), torch.randn(9, 4, dtype=torch.bfloat16)
    assert cross_entropy_sum(hidden, weight, torch.zeros(16, dtype=torch.long), 4).dtype == torch.float32


def test_a_missing_liger_kernel_is_named() -> None:
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="train.fused_loss=false"):
            cross_entropy_sum(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), fused=True)
    else:
        pytest.skip("liger-kernel is installed")
