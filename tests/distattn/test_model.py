from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distattn.config import ModelConfig
from distattn.loss import IGNORED
from distattn.model import Attend, Decoder, build, rotary_angles, rotate

SHAPE = {"vocab_size": 50, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden_dim": 24, "dtype": "float64"}


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention with grouped queries, [T, H, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def straightforward(model: Decoder, tokens: list[int]) -> Tensor:
    """The same model written out row by row with complex rotations, from its parameters alone. Logits [T, V]."""
    p = dict(model.named_parameters())
    config, width = model.config, model.config.head_width

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean() + config.norm_eps) * weight

    def turned(x: Tensor, position: int) -> Tensor:
        heads = x.view(-1, width)
        pairs = torch.complex(heads[:, : width // 2], heads[:, width // 2 :])
        angle = torch.tensor([position * config.rope_theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
        return torch.cat([(pairs * torch.polar(torch.ones_like(angle), angle)).real, (pairs * torch.exp(1j * angle)).imag], -1)

    rows = [p["embedding.weight"][token] for token in tokens]
    for block in range(config.layers):
        w = {name.removeprefix(f"blocks.{block}."): value for name, value in p.items() if name.startswith(f"blocks.{block}.")}
        inside = [norm(x, w["attention_norm.weight"]) for x in rows]
        q = [turned(w["attention.query.weight"] @ x, i) for i, x in enumerate(inside)]
        k = [turned(w["attention.key.weight"] @ x, i) for i, x in enumerate(inside)]
        v = [(w["attention.value.weight"] @ x).view(-1, width) for x in inside]
        for i in range(len(rows)):
            heads = []
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                scores = torch.stack([q[i][head] @ k[j][group] / math.sqrt(width) for j in range(i + 1)])
                heads.append(sum(a * v[j][group] for j, a in enumerate(scores.softmax(0))))
            rows[i] = rows[i] + w["attention.output.weight"] @ torch.cat(heads)
            x = norm(rows[i], w["mlp_norm.weight"])
            gate = w["mlp.gate.weight"] @ x
            rows[i] = rows[i] + w["mlp.down.weight"] @ (gate * torch.sigmoid(gate) * (w["mlp.up.weight"] @ x))
    head = p.get("head.weight", p["embedding.weight"])
    return torch.stack([head @ norm(x, p["norm.weight"]) for x in rows])


@pytest.mark.parametrize("tie", [False, True])
def test_logits_equal_the_model_written_out(tie: bool) -> None:
    model = build(ModelConfig(**SHAPE, tie_head=tie), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from the linear regime of the initial values
    tokens = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(tokens, torch.arange(9), causal)
        torch.testing.assert_close(found, straightforward(model, tokens.tolist()), rtol=1e-11, atol=1e-12)


def test_labels_give_the_sum_of_cross_entropies() -> None:
    model = build(ModelConfig(**SHAPE), seed=0, loss_rows=3)
    tokens, labels = torch.arange(8), torch.tensor([1, 2, IGNORED, 4, 5, 6, 7, IGNORED])
    logits = model(tokens, torch.arange(8), causal)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(model(tokens, torch.arange(8), causal, labels), expected)


def test_rows_may_come_in_any_order_with_their_positions() -> None:
    """What a rank does: its rows, in its order, with an ``attend`` that knows where they belong."""
    model, order = build(ModelConfig(**SHAPE), seed=0), torch.tensor([5, 0, 3, 1, 4, 2])
    back = order.argsort()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q[back], k[back], v[back])[order]

    tokens = torch.arange(6) + 10
    whole = model(tokens, torch.arange(6), causal)
    torch.testing.assert_close(model(tokens[order], order, attend), whole[order])


def test_zeroed_attention_lets_no_token_see_another_but_keeps_every_gradient() -> None:
    model = build(ModelConfig(**SHAPE, zero_attention=True), seed=0)
    tokens = torch.tensor([1, 2, 3, 4])
    first = model(tokens, torch.arange(4), causal)
    tokens[0] = 9
    second = model(tokens, torch.arange(4), causal)
    assert torch.equal(first[1:], second[1:])
    second.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rotary_angles_are_right_a_million_tokens_on() -> None:
    position = 1_000_003
    cos, sin = rotary_angles(torch.tensor([position]), 64, 500000.0, torch.float32)
    for i in (0, 1, 7, 31):
        angle = position * 500000.0 ** (-2 * i / 64)
        assert cos[0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        turned = [rotate(x, *rotary_angles(torch.tensor([at]), 16, 1e4, torch.float64)) for x, at in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))


def test_parameters_depend_on_name_and_seed_only() -> None:
    config = ModelConfig(**SHAPE)
    first = dict(build(config, seed=1).named_parameters())
    torch.manual_seed(99)
    again = dict(build(config, seed=1).named_parameters())
    other = dict(build(config, seed=2).named_parameters())
    deeper = dict(build(ModelConfig(**{**SHAPE, "layers": 3}), seed=1).named_parameters())
    name = "blocks.0.attention.query.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(first[name], deeper[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["blocks.1.attention.query.weight"])


def test_no_rows_are_a_zero_loss() -> None:
    none = torch.zeros(0, dtype=torch.long)
    attend: Attend = lambda q, k, v: q  # noqa: E731
    model = build(ModelConfig(**SHAPE), seed=0)
    loss = model(none, none, attend, none)
    loss.backward()
    assert loss.item() == 0
