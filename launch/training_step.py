"""What a training step costs beside attention: dense products, embedding and head, weights on the links. A simple model, stated.

Dense products run at ``DENSE_EFFICIENCY`` of the described peak, which is that of a large product; what stands between them
(norms, rotary angles, activations, residuals) is in that figure. Backward has twice the forward operations, and three times where
activations are computed again; attention is never computed again. Weights are sharded over all ranks (FSDP): each layer's are
gathered before its forward and its backward pass and its gradients reduced after it, in float32, over the rails of a node and
then inside; only what lasts longer than the layer is exposed. That the two meet attention's messages on the links is left out.
With tensor parallelism a node holds the weights together, and each pass of a layer gathers and reduces its activations twice,
not hidden. Optimizer, data loading and pipelines are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from distattn.parallel.cluster import Cluster
from distattn.parallel.shape import Shape

DENSE_EFFICIENCY = 0.75  # of kernel.peak_tflops
WEIGHT, GRADIENT, ACTIVATION = 2, 4, 2  # bytes


@dataclass(frozen=True)
class Model:
    """Shape of a decoder-only model with gated feed-forward layers.

    Args:
        recompute: whether the dense part of a layer is computed again in the backward pass, where its activations do not fit.
    """

    name: str
    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    recompute: bool

    @property
    def layer_weights(self) -> int:
        """Of the matrices of one layer."""
        attention = self.dim * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.dim * self.hidden

    @property
    def before_share(self) -> float:
        """Part of a layer's products that comes before attention: those of queries, keys and values."""
        return self.dim * self.head_size * (self.heads + 2 * self.kv_heads) / self.layer_weights

    @property
    def shape(self) -> Shape:
        """Of the attention calls, bfloat16."""
        import torch

        return Shape(self.heads, self.kv_heads, self.head_size, self.head_size, torch.bfloat16)

    def __str__(self) -> str:
        again = ", dense part computed again in backward" if self.recompute else ""
        return (
            f"{self.name}: {self.layers} layers, dim {self.dim}, hidden {self.hidden}, heads {self.heads}:{self.kv_heads} of "
            f"{self.head_size}, vocabulary {self.vocabulary}{again}"
        )


MODELS = {
    "8b": Model("Llama 3 8B", 32, 4096, 14336, 32, 8, 128, 128256, recompute=False),
    "34b": Model("CodeLlama 34B", 48, 8192, 22016, 64, 8, 128, 32000, recompute=True),
}


@dataclass(frozen=True)
class Step:
    """Seconds of one step on the rank that lasts longest."""

    dense: float
    attention: float
    weights: float  # exposed
    head: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.dense + self.attention + self.weights + self.head


def dense_seconds(model: Model, tokens: int, cluster: Cluster, tensor: int = 1) -> tuple[float, float]:
    """(forward, backward) of the dense part of one layer.

    Args:
        tokens: of a rank; with tensor parallelism, of the ``tensor`` devices of a node together.
    """
    products = 2.0 * model.layer_weights * tokens / tensor / (cluster.peak(model.shape) * DENSE_EFFICIENCY)
    # Gathered before and reduced after attention and the feed-forward layer, each device sends its share to the others.
    moved = 4 * tokens * model.dim * ACTIVATION * (tensor - 1) / tensor / (cluster.inside.port_gb_s * 1e9)
    times = 3 if model.recompute else 2
    return products + moved, times * products + (times - 1) * moved


def head_seconds(model: Model, tokens: int, cluster: Cluster, tensor: int = 1) -> float:
    """Forward and backward of the output layer; the embedding only looks rows up."""
    return 6.0 * model.dim * model.vocabulary * tokens / tensor / (cluster.peak(model.shape) * DENSE_EFFICIENCY)


def gather_seconds(weights: int, world: int, cluster: Cluster, size: int = WEIGHT, tensor: int = 1) -> float:
    """Seconds in which sharded weights reach every rank, or in which their gradients are reduced: a node takes them in once."""
    volume = weights * size
    nodes = -(-world // cluster.devices)
    between = 0.0
    if nodes > 1 and cluster.between is not None:
        between = volume * (nodes - 1) / nodes / (cluster.between.nics * cluster.between.nic_gb_s * 1e9)
    inside = volume / tensor / (cluster.inside.port_gb_s * 1e9) if tensor < cluster.devices else 0.0
    return between + inside


def step_of(model: Model, cluster: Cluster, world: int, tokens: int, attention: tuple[float, float], tensor: int = 1) -> Step:
    """A step of ``model``.

    Args:
        tokens: see :func:`dense_seconds`.
        attention: seconds of one layer's attention, forward and backward.
    """
    forward, backward = dense_seconds(model, tokens, cluster, tensor)
    gather = gather_seconds(model.layer_weights, world, cluster, WEIGHT, tensor)
    reduce = gather_seconds(model.layer_weights, world, cluster, GRADIENT, tensor)
    exposed = max(0.0, gather - forward - attention[0]) + max(0.0, gather + reduce - backward - attention[1])
    # The first layer's are awaited, the last one's gradients too; of the embedding and the head likewise.
    ends = 2 * gather + reduce + 2 * gather_seconds(model.dim * model.vocabulary, world, cluster, WEIGHT, tensor)
    return Step(
        dense=model.layers * (forward + backward),
        attention=model.layers * sum(attention),
        weights=model.layers * exposed + ends,
        head=head_seconds(model, tokens, cluster, tensor),
    )
