"""Published ratios between schedules, as the simulator sees them on described clusters: attention alone, no other layer.

What was published is of other machines, and of whole training steps or whole models: these ratios are no reproduction of the
measurement, but of what makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.parallel.cluster import Cluster
    from distattn.parallel.shape import Shape

SHAPE = (32, 8, 128)  # Llama-3-8B: query heads, key heads, head size


@dataclass(frozen=True)
class Claim:
    """One simulated ratio.

    Attributes:
        what: faster over slower.
        where: cluster, ranks, tokens, heads.
        ratio: seconds of the slower over those of the faster, simulated.
        published: in words, on their machines; "" where nobody did.
        bound: what arithmetic says of the ratio where kernels are all the time; None: nothing.
        fast, slow: seconds.
    """

    what: str
    where: str
    ratio: float
    published: str
    bound: float | None
    fast: float
    slow: float
    simulated: bool = True


def claims() -> list[Claim]:
    """All of them; Striped Attention (Brandon et al., 2023), Tree Attention (Shyam et al., 2024), double ring (LoongTrain)."""
    made = []
    for tokens, world, published in ((256 << 10, 8, "1.45"), (768 << 10, 16, "1.65")):
        for name in ("striped", "zigzag"):
            made.append(balance_claim("a100", name, tokens, world, (32, 32, 128), f"{published}, whole training step"))
    for cluster in ("h200", "a100"):
        for world in (8, 16):
            made.append(decode_claim(cluster, 1 << 20, world))
    for cluster in ("h200", "a100", "l40s"):
        for tokens in (64 << 10, 128 << 10, 256 << 10, 1 << 20):
            made.append(double_ring_claim(cluster, tokens, 64))
    return made


def balance_claim(name: str, schedule: str, tokens: int, world: int, heads: tuple[int, int, int], published: str) -> Claim:
    """A balanced ring over the contiguous one, causal, forward and backward. Bound: the work of the last rank, 2 - 1/P."""
    fast, slow = (_seconds(name, s, tokens, world, heads) for s in (schedule, "ring"))
    where = _where(name, tokens, world, heads)
    return Claim(f"{schedule} over ring", where, slow / fast, published, 2 - 1 / world, fast, slow)


def double_ring_claim(name: str, tokens: int, world: int, heads: tuple[int, int, int] = SHAPE) -> Claim:
    """A ring in each node and one over all rails, over one ring whose every hop waits for one rail; both zigzag, causal."""
    fast, slow = (_seconds(name, s, tokens, world, heads) for s in ("double_ring", "zigzag"))
    return Claim("double ring over single ring", _where(name, tokens, world, heads), slow / fast, "", None, fast, slow)


def decode_claim(name: str, tokens: int, world: int, heads: tuple[int, int, int] = SHAPE) -> Claim:
    """One new token over a sharded context, one layer: keys stay (tree), or go round (ring)."""
    from distattn.parallel.cluster import load_cluster

    fast, slow = decode_seconds(load_cluster(name), _shape(heads), tokens, world)
    said = "up to 8, whole model"
    return Claim("tree over ring decode", _where(name, tokens, world, heads), slow / fast, said, None, fast, slow)


def decode_seconds(cluster: Cluster, shape: Shape, tokens: int, world: int) -> tuple[float, float]:
    """(tree, ring) seconds a token and layer.

    Both read a shard's keys and values at the speed of memory, once a shard. Tree: then the exchange of partial results that
    distattn.decode_attention would choose. Ring: world - 1 hops of a shard, each while the shard before is read, as slow as the
    slowest link of the ring.

    Raises:
        ValueError: the cluster does not hold the ranks.
    """
    import numpy as np

    from distattn.parallel.merge_ranks import choose_exchange
    from distattn.parallel.plan import What

    cluster.check_world(world)
    devices = min(world, cluster.devices)
    shard = -(-tokens // world) * shape.row_bytes(What.KV)
    host = cluster.host
    read = shard / (cluster.kernel.forward.memory_gb_s * 1e9) + cluster.launch_seconds("forward")
    nodes = world // devices
    hop = float(cluster.message_seconds(np.array([shard]), nodes == 1)[0]) + 2 * host.message_us * 1e-6
    ring = read + (world - 1) * (max(read, hop) + host.stage_us * 1e-6)
    exchange = choose_exchange(shape.heads, shape.d_v, world, shape.accumulate, shape.dtype, False, devices)
    far = exchange.sent_between_nodes
    rounds = 1 if exchange.how == "gather" else 2
    # Levels of a round follow each other; the messages of a level share the rank's port, and each is posted.
    tree = read
    for bytes_sent, near, peers in ((exchange.sent - far, True, devices - 1), (far, False, nodes - 1)):
        if peers:
            posted = 2 * peers * (devices if exchange.how == "gather" and not near else 1)
            travel = float(cluster.message_seconds(np.array([bytes_sent / rounds]), near)[0])
            tree += rounds * (travel + posted * host.message_us * 1e-6)
    return tree + host.pass_us * 1e-6, ring + host.pass_us * 1e-6


def table(found: list[Claim]) -> str:
    """Markdown."""
    lines = ["Simulated, one attention layer (training: forward and backward; decode: one token):", ""]
    lines += [
        "| | cluster, ranks, tokens, heads | ratio | bound | published | fast ms | slow ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found:
        bound = "" if c.bound is None else f"{c.bound:.2f}"
        times = f"{c.fast * 1e3:.3g} | {c.slow * 1e3:.4g}"
        lines.append(f"| {c.what} | {c.where} | {c.ratio:.2f} | {bound} | {c.published} | {times} |")
    return "\n".join(lines)


def _shape(heads: tuple[int, int, int]) -> Shape:
    import torch

    from distattn.parallel.shape import Shape

    return Shape(*heads, heads[2], torch.bfloat16)


def _where(name: str, tokens: int, world: int, heads: tuple[int, int, int]) -> str:
    return f"{name}, {world}, {tokens >> 10}k, {heads[0]}:{heads[1]} x {heads[2]}"


def _seconds(name: str, schedule: str, tokens: int, world: int, heads: tuple[int, int, int]) -> float:
    from distattn.parallel.cluster import load_cluster
    from distattn.parallel.mask import causal
    from distattn.parallel.price import price
    from distattn.parallel.strategy import Strategy

    cluster = load_cluster(name)
    strategy = Strategy(schedule, devices=min(world, cluster.devices))
    return price(strategy, causal(tokens), world, _shape(heads), cluster).seconds
