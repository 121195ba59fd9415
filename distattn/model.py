"""A plain decoder: RMSNorm, rotary positions, grouped queries, SwiGLU. It knows one device and no ranks.

Shapes: T tokens (of one packed sequence, or the rows of it that this rank holds), C model width, H query heads,
G key heads, D head width, V vocabulary. There is no batch dimension: documents are packed one after another, and
``attend`` knows where they begin. All that parallelism changes is what ``tokens``, ``positions`` and ``attend`` are.

``together`` walks several sequences through the layers side by side: while the attention of one waits for other ranks, the dense
part of another is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distattn.config import ModelConfig
from distattn.loss import cross_entropy_sum

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H, D], with the mask and the scale inside."""


class InProgress(Protocol):
    """Attention that has begun: ``compute`` once, with others in turns, then ``collect`` once, for the result [T, H, D]."""

    def compute(self, *others: Any) -> None: ...

    def collect(self) -> Tensor: ...


Begin = Callable[[Tensor, Tensor, Tensor], InProgress]
"""What ``Attend`` is, in three steps."""


class NanoBatch(NamedTuple):
    """A sequence that walks together with others: tokens, positions, labels int64 [T], and its attention."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    begin: Begin


def rotary_angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, width / 2] for integer positions [T].

    The angle is computed in float64: at a million tokens a float32 angle is off by 0.03 radians.
    """
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angle = positions.to(torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by its positions; the first half of a head is paired with the second."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.head_width
        self.zero = config.zero_attention
        self.query = nn.Linear(config.dim, self.heads * self.width, bias=False)
        self.key = nn.Linear(config.dim, self.kv_heads * self.width, bias=False)
        self.value = nn.Linear(config.dim, self.kv_heads * self.width, bias=False)
        self.output = nn.Linear(self.heads * self.width, config.dim, bias=False)

    def inputs(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = rotate(self.query(x).unflatten(-1, (self.heads, self.width)), cos, sin)
        k = rotate(self.key(x).unflatten(-1, (self.kv_heads, self.width)), cos, sin)
        return q, k, self.value(x).unflatten(-1, (self.kv_heads, self.width))

    def outputs(self, out: Tensor) -> Tensor:
        if self.zero:  # multiplied, not skipped: the control does the same work and every parameter has a gradient
            out = out * 0
        return self.output(out.flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.after(x, attend(*self.before(x, cos, sin)))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return self.attention.inputs(self.attention_norm(x), cos, sin)

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """The rest of the layer, from what attention returned."""
        x = x + self.attention.outputs(out)
        return x + self.mlp(self.mlp_norm(x))

    def together(
        self, xs: Sequence[Tensor], angles: Sequence[tuple[Tensor, Tensor]], begins: Sequence[Begin]
    ) -> tuple[Tensor, ...]:
        """:meth:`forward` of several sequences. What one sends travels while another computes, there and back; the backward
        pass is the same in reverse."""
        attentions = [begin(*self.before(x, *angle)) for x, angle, begin in zip(xs, angles, begins, strict=True)]
        attentions[0].compute(*attentions[1:])
        return tuple(self.after(x, attention.collect()) for x, attention in zip(xs, attentions, strict=True))


class Decoder(nn.Module):
    """The whole model. ``loss_rows`` rows have their logits at one time when labels are given."""

    def __init__(self, config: ModelConfig, loss_rows: int = 0, fused_loss: bool = False) -> None:
        super().__init__()
        self.config, self.loss_rows, self.fused_loss = config, loss_rows, fused_loss
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_head:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, labels: Tensor | None = None, rows: slice | None = None
    ) -> Tensor:
        """tokens, positions, labels int64 [T]. Returns logits [T, V], or with labels the SUM of their cross entropies.

        A label of -100 counts nothing. T may be 0 (a rank without rows): the sum is then a zero with a gradient. ``rows`` keeps
        the logits of these rows only: of a long prompt nobody needs more than the last.
        """
        x = self.embedding(tokens)
        cos, sin = self._angles(positions, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        if labels is None:
            x = self.norm(x)
            return self.head(x if rows is None else x[rows])
        return self._loss(x, labels)

    def together(self, batches: Sequence[NanoBatch]) -> Tensor:
        """The SUM of the cross entropies of several sequences, which take each layer side by side."""
        xs: tuple[Tensor, ...] = tuple(self.embedding(batch.tokens) for batch in batches)
        angles = [self._angles(batch.positions, x.dtype) for batch, x in zip(batches, xs, strict=True)]
        for block in self.blocks:
            assert isinstance(block, Block)
            xs = block.together(xs, angles, [batch.begin for batch in batches])
        return torch.stack([self._loss(x, batch.labels) for x, batch in zip(xs, batches, strict=True)]).sum()

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return rotary_angles(positions, self.config.head_width, self.config.rope_theta, wide)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(self.norm(x), self.head.weight, labels, self.loss_rows, self.fused_loss)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """What a parameter starts with, float32 on the CPU: a function of its name and the seed, of nothing else.

    So any rank can make any parameter, in any order, and all worlds begin equal.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    deviation = 0.02
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        deviation /= math.sqrt(2 * config.layers)  # these add to the residual stream, twice a block
    return torch.randn(shape, generator=generator) * deviation


def build(config: ModelConfig, seed: int, loss_rows: int = 0, fused_loss: bool = False) -> Decoder:
    """The model with its initial parameters, whole, on the CPU."""
    model = Decoder(config, loss_rows, fused_loss).to(getattr(torch, config.dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed))
    return model
