"""From a configuration to a model on many ranks. The order of the wrapping is the order of this file:

1. context parallelism: not a wrapper, but the ``attend`` that the model is called with, and the rows it is called on
2. activation checkpointing, around each block, so that backward computes it again
3. compilation of each block, which then sees the checkpointing inside
4. FSDP2 around each block, outermost: it gathers a block's parameters before any of the above runs

The mesh has two axes, data and context. Parameters are sharded over both at once (the flattened mesh): a rank holds
1/ranks of the model, however the ranks are split. FSDP averages gradients over these ranks; the trainer's loss allows for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from distattn.attention import AttentionPlan, ContextParallel
from distattn.config import Config, ParallelConfig, context_ranks, strategy_of
from distattn.kernels.contract import Scores
from distattn.model import Attend, Begin, Block, Decoder, initial_value
from distattn.ops import save_attention
from distattn.parallel.auto import Auto
from distattn.parallel.cluster import load_cluster
from distattn.parallel.rank_plan import Call
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallel.transpose import Keep


@dataclass(frozen=True)
class World:
    """Where this process stands. Ranks that share a sequence are neighbours."""

    rank: int
    size: int
    device: torch.device
    dp: int
    dp_rank: int
    mesh: DeviceMesh | None
    """[dp, cp]; None without a process group"""
    flat: DeviceMesh | None
    """the same ranks along one axis"""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value


def make_world(config: Config, device: torch.device) -> World:
    """Splits the ranks of the default process group (a world of one without) into the mesh of ``config``."""
    if not dist.is_initialized():
        return World(0, 1, device, 1, 0, None, None)
    size, dp = dist.get_world_size(), config.parallel.dp
    mesh = init_device_mesh(device.type, (dp, context_ranks(config, size)), mesh_dim_names=("dp", "cp"))
    flat = mesh["dp", "cp"]._flatten("ranks")
    return World(dist.get_rank(), size, device, dp, mesh.get_local_rank("dp"), mesh, flat)


def context_parallel(config: Config, world: World) -> ContextParallel:
    """Attention over the ranks that share this rank's sequence."""
    parallel = config.parallel
    group = None if world.mesh is None else world.mesh["cp"]
    schedule: Strategy | Auto
    if parallel.schedule == "auto":
        schedule = Auto(attention_call(config, world).shape, load_cluster(parallel.cluster), keep=cast(Keep, parallel.keep))
    else:
        schedule = strategy_of(parallel)
        if parallel.schedule == "disaggregate":
            schedule = replace(schedule, balance=balance_of(config, world))
    options: dict[str, Any] = {"backend": parallel.backend or None, "timeout": parallel.timeout}
    options.update(timed=parallel.speeds == "measure", slots=parallel.nano_batches)
    if parallel.servers:
        if world.device.type != "cpu":
            raise ValueError(
                f"parallel.servers={parallel.servers} are reached over gloo, with tensors on the CPU, but this run is on "
                f"{world.device}. Use train.device=cpu, or parallel.servers=0."
            )
        announce = functools.partial(_announce, Path(config.out) / "pool_store")
        options.update(servers=parallel.servers, pool_store=parallel.pool_store, announce=announce)
    return ContextParallel(group, schedule, **options)


def _announce(path: Path, address: str) -> None:
    """Says where attention servers join; a server may read the file instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(address + "\n")
    print(f"attention servers join with: distattn-serve-attention --store {address}   (or --store {path})", flush=True)


def balance_of(config: Config, world: World) -> Balance:
    """How a disaggregation shares out the work of the model's attention."""
    parallel = config.parallel
    cluster = load_cluster(parallel.cluster) if parallel.cluster else None
    if cluster is not None and parallel.ulysses > 1:  # the plan's ranks are groups of them
        cluster = replace(cluster, devices=max(1, cluster.devices // parallel.ulysses))
    return Balance.of(
        attention_call(config, world).shape,
        cluster,
        tolerance=parallel.tolerance or None,
        receive_rows=parallel.receive_rows or None,
        smallest=parallel.smallest,
    )


def attention_call(config: Config, world: World) -> Call:
    """How the model calls attention."""
    autocast = world.device.type == "cuda" and config.train.autocast
    dtype = torch.bfloat16 if autocast else cast(torch.dtype, getattr(torch, config.model.dtype))
    model, width = config.model, config.model.head_width
    return Call(Shape(model.heads, model.kv_heads, width, width, dtype), Scores(width**-0.5))


def attend_with(cp: ContextParallel, plan: AttentionPlan) -> Attend:
    """What the model attends with: its local queries over all keys that ``plan`` shows them."""
    return cast(Attend, functools.partial(cp.attention, plan=plan))


def begin_with(cp: ContextParallel, plan: AttentionPlan, slot: int) -> Begin:
    """The same in steps, beside the attention of other sequences in other slots."""
    return cast(Begin, functools.partial(cp.begin_attention, plan=plan, slot=slot))


def parallelize(config: Config, world: World) -> Decoder:
    """The model with its initial parameters, the same in every world, sharded over the ranks of ``world``.

    Parameters are made block by block, so that no rank ever holds more of the whole model than one block.
    """
    with torch.device("meta"):
        model = Decoder(config.model, config.train.loss_rows, config.train.fused_loss).to(getattr(torch, config.model.dtype))
    for number, block in enumerate(cast("list[Block]", model.blocks)):
        fill(block, f"blocks.{number}.", config)
        recompute(block, config.parallel)
        if config.parallel.compile:
            compile_block(block, config.parallel)
        shard(block, config.parallel, world)
    for name in ("embedding", "norm", "head"):
        fill(getattr(model, name), f"{name}.", config)
    if config.model.tie_head:
        model.head.weight = model.embedding.weight
    shard(model, config.parallel, world)
    return model


def fill(module: nn.Module, prefix: str, config: Config) -> None:
    """Gives a module on the meta device its initial parameters, on the CPU."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(prefix + name, parameter.shape, config.model, config.train.seed))


def recompute(block: Block, parallel: ParallelConfig) -> None:
    """Backward computes the block again: all of it, or (selective) all but attention and its communication."""
    if parallel.checkpointing == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if parallel.checkpointing == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, save_attention)
    block.forward = _checkpointed(block.forward, options)  # type: ignore[method-assign]
    block.together = _checkpointed(block.together, options)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda *arguments: checkpoint(forward, *arguments, **options)


def compile_block(block: Block, parallel: ParallelConfig) -> None:
    """The block as one graph; with nano-batches its dense parts, as a graph cannot see the order of what stands between."""
    if parallel.nano_batches == 1:
        block.compile(fullgraph=True)
        return
    block.before = torch.compile(block.before, fullgraph=True)  # type: ignore[method-assign]
    block.after = torch.compile(block.after, fullgraph=True)  # type: ignore[method-assign]


def shard(module: nn.Module, parallel: ParallelConfig, world: World) -> None:
    """Leaves 1/ranks of each parameter on this rank's device, not yet in another unit of FSDP."""
    if world.flat is None:
        module.to(world.device)
        return
    gather = getattr(torch, parallel.gather_dtype) if parallel.gather_dtype else None
    # Inputs are not cast: the cos and sin of the rotary positions would lose their last 16 bits.
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32 if gather else None, cast_forward_inputs=False)
    fully_shard(module, mesh=world.flat, mp_policy=policy)
    register_fsdp_forward_method(module, "together")
