"""Attention over gloo processes: every layout and mask against one device, every way in; and context groups side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import distattn
from distattn import ContextParallel
from distattn.kernels.aten import Aten
from distattn.parallel.comm_process import ProcessCommunicator
from distattn.parallel.schedules.ring import ring
from distattn.parallel.strategy import Balance, Strategy
from distattn.parallel.transpose import transpose
from tests.distattn.dense import dense_attention, error
from tests.parallel.attend import Problem, attend, errors, exact, make_problem, programs
from tests.parallel.plans import LAYOUTS, MASKS, make_layout, make_mask
from tests.workers import Pool

# Relative L2: sums of about a hundred terms, each rounded to 6e-8 (float32) or 1e-16; bfloat16 rounds every element to 2^-9.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 5e-3}
STRATEGIES = (
    Strategy("ring"),
    Strategy("zigzag", rotate="q"),
    Strategy("striped", rotate="kv"),
    Strategy("double_ring", devices=2),
    Strategy("gather", stages=3),
    Strategy("tree", devices=2),
    Strategy("gather", layout="zigzag", ulysses=2),
    Strategy("disaggregate", balance=Balance(smallest=2)),
    Strategy("disaggregate", stages=1, keep="all", servers=1, balance=Balance(smallest=1)),
    Strategy("disaggregate", hops=2, balance=Balance(smallest=1)),
)

Errors = dict[str, dict[str, float]]


def one(comm: ProcessCommunicator, layout_kind: str, mask_kind: str, dtype: torch.dtype) -> dict[str, float]:
    """Errors of the whole tensors; every third mask is run twice and must give the same bits."""
    mask = make_mask(mask_kind, 60 + comm.world)
    layout = make_layout(layout_kind, mask, comm.world)
    plan = ring(layout, mask)
    problem: Problem = make_problem(mask, dtype, sinks=mask_kind == "causal")
    pair = programs(plan, transpose(plan), comm.rank, problem.shape)
    first = attend(comm, pair, layout, problem, Aten())
    if MASKS.index(mask_kind) % 3 == 0:
        second = attend(comm, pair, layout, problem, Aten())
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not the same bits in another run"
    whole = tuple(layout.unshard(comm.all_gather_rows(x, layout.rows_all.tolist())) for x in first)
    return errors(whole, exact(problem))


def every_mask(rank: int, world: int, layout_kind: str, dtype: torch.dtype, masks: tuple[str, ...]) -> Errors:
    comm = ProcessCommunicator(timeout=60.0)
    found = {kind: one(comm, layout_kind, kind, dtype) for kind in masks}
    comm.close()
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_mask_in_float32(gloo: Pool, world: int, layout: str) -> None:
    for rank in gloo(world).run(every_mask, layout, torch.float32, MASKS):
        assert max(max(tensors.values()) for tensors in rank.values()) <= TOLERANCE[torch.float32], rank


@pytest.mark.parametrize(
    ("layout", "dtype", "masks"),
    [
        ("document_zigzag", torch.float64, MASKS),
        ("document_striped", torch.float64, ("documents", "sinks")),
        ("zigzag", torch.bfloat16, ("causal", "union")),
    ],
    ids=str,
)
def test_other_dtypes(gloo: Pool, layout: str, dtype: torch.dtype, masks: tuple[str, ...]) -> None:
    for rank in gloo(4).run(every_mask, layout, dtype, masks):
        assert max(max(tensors.values()) for tensors in rank.values()) <= TOLERANCE[dtype], rank


def everything(cp: ContextParallel, mask: distattn.parallel.mask.Mask, seed: int) -> list[float]:
    """Errors of out, lse and the gradients of q, k, v and the sinks, through the public API."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(mask.n_tokens, h, d) for h, d in ((4, 8), (2, 8), (2, 6), (4, 6))]
    q, k, v, dout = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    sinks = torch.randn(4, generator=g, dtype=torch.float64)

    def leaves() -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (q, k, v, sinks)]

    mine, theirs = leaves(), leaves()
    plan = cp.plan(mask)
    out, lse = cp.attention(*(cp.shard(x, plan) for x in mine[:3]), plan, sinks=mine[3], softcap=3.0, return_lse=True)
    whole = cp.unshard(out, plan), cp.unshard(lse, plan)
    want = dense_attention(*theirs[:3], mask, sinks=theirs[3], softcap=3.0)
    for values in (whole, want):
        torch.autograd.backward(values, [dout, dout[..., 0]])
    assert mine[3].grad is not None
    mine[3].grad = cp.communicator.all_reduce_sum(mine[3].grad)
    pairs = [*zip(whole, want, strict=True), *((a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))]
    return [error(a, b) for a, b in pairs]  # type: ignore[arg-type]


def schedules(rank: int, world: int) -> list[float]:
    """The default group of the world, each schedule; fewer tokens than ranks and none at all among the masks."""
    worst = []
    group = torch.distributed.group.WORLD
    contexts = [ContextParallel(group, s, timeout=60.0, pad_to_equal=s.schedule in ("striped", "tree")) for s in STRATEGIES]
    for cp in contexts:
        for seed, lengths in enumerate(([20, 0, 1, 13], [1], [world - 1], [])):
            worst.append(max(everything(cp, distattn.documents(lengths), seed)))
    for cp in contexts:
        cp.communicator.close()
    return worst


@pytest.mark.parametrize("world", [2, 4])
def test_context_parallel_of_a_process_group(gloo: Pool, world: int) -> None:
    for worst in gloo(world).run(schedules):
        assert max(worst) <= TOLERANCE[torch.float64], worst


def groups_side_by_side(rank: int, world: int) -> tuple[int, int, list[float]]:
    """Two context groups of two, each with sequences and masks of its own, in another number."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    try:
        ContextParallel(mesh)
    except ValueError as refused:
        assert "Need a mesh of one dimension, such as mesh['cp']. Found" in str(refused), refused
    else:
        raise AssertionError("a mesh of two dimensions was taken")
    cp = ContextParallel(mesh["cp"], timeout=60.0)
    data = mesh.get_local_rank("dp")
    masks = [distattn.documents([30, 5 + data]), distattn.causal(17), distattn.sliding_window(40, 7)][: 2 + data]
    worst = [max(everything(cp, mask, seed=10 * data + i)) for i, mask in enumerate(masks)]
    cp.communicator.close()
    return cp.rank, cp.world, worst


def test_context_groups_side_by_side(gloo: Pool) -> None:
    results = gloo(4).run(groups_side_by_side)
    assert [(rank, world, len(worst)) for rank, world, worst in results] == [(0, 2, 2), (1, 2, 2), (0, 2, 3), (1, 2, 3)]
    assert max(max(worst) for _, _, worst in results) <= TOLERANCE[torch.float64], results
