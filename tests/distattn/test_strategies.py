"""Every strategy x mask x heads on strict ranks against one device, in float32, through the public interface.

The whole product belongs to the long tier; the default tier runs a part of it that meets every strategy, mask and head layout.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from distattn.attention import ContextParallel
from distattn.parallel.assign_cost import Cost
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.mask import Mask
from distattn.parallel.strategy import Balance, Strategy
from tests.distattn.dense import dense_attention, error
from tests.parallel.plans import make_mask

FLOAT32 = 1e-6  # relative L2: sums of about a hundred terms, each rounded to 6e-8
WORLDS = (2, 3, 4, 8)
MASKS = ("causal", "full", "sinks", "documents", "document_windows", "prefix", "symmetric", "chunked")
HEADS = ((4, 4), (8, 1), (32, 8), (6, 6), (6, 2))
STRATEGIES = (
    Strategy("ring"),
    Strategy("zigzag", rotate="kv"),
    Strategy("zigzag", rotate="q"),
    Strategy("striped"),
    Strategy("striped", keep="none"),
    Strategy("zigzag", laps=2),
    Strategy("double_ring"),
    Strategy("gather", stages=1),
    Strategy("gather", layout="zigzag", stages=3, keep="all"),
    Strategy("tree"),
    Strategy("tree", layout="contiguous", in_flight=1),
    Strategy("zigzag", ulysses=2),
    Strategy("gather", ulysses=4, stages=2),
    Strategy("double_ring", layout="striped", ulysses=2),
    Strategy("striped", ulysses=8),
    Strategy("disaggregate", balance=Balance(smallest=4)),
    Strategy("disaggregate", layout="zigzag", stages=3, keep="all", balance=Balance(smallest=4)),
    Strategy("disaggregate", stages=1, servers=1, balance=Balance(smallest=1)),
    Strategy("disaggregate", ulysses=2, balance=Balance(smallest=4)),
    Strategy("disaggregate", hops=2, servers=1, balance=Balance(smallest=1)),
    Strategy("disaggregate", hops=3, stages=4, balance=Balance(Cost(devices=2), Cost(devices=2), smallest=4)),
)

Case = tuple[Strategy, str, tuple[int, int]]


def fits(strategy: Strategy, world: int, heads: int) -> bool:
    nodes = world > 2 or strategy.hops != 3  # whose costs know nodes of two
    return world % strategy.ulysses == 0 and strategy.ulysses <= heads and strategy.servers < world and nodes


def placed(strategy: Strategy, world: int) -> Strategy:
    """Nodes of two, so that eight ranks are four nodes; heads are traded inside of a node or among whole nodes."""
    return replace(strategy, devices=2 if world % 2 == 0 and world > 2 else None)


def problem(mask: Mask, heads: tuple[int, int], seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(mask.n_tokens, h, d) for h, d in ((heads[0], 8), (heads[1], 8), (heads[1], 6), (heads[0], 6))]
    return [torch.randn(*shape, generator=g) for shape in shapes]


def check(world: int, cases: list[Case], times: int = 1) -> None:
    """Runs the cases one after the other on one set of ranks; outputs and every gradient, ``times`` times the same bits."""

    def work(communicator):
        found = []
        for seed, (strategy, kind, heads) in enumerate(cases):
            mask = make_mask(kind, 61 + world, seed)
            *inputs, dout = problem(mask, heads, seed)
            cp = ContextParallel(schedule=placed(strategy, world), communicator=communicator)
            plan = cp.plan(mask)
            runs = []
            for _ in range(times):
                local = [cp.shard(x, plan).detach().requires_grad_() for x in inputs]
                out = cp.attention(*local, plan)
                out.backward(cp.shard(dout, plan).detach())
                runs.append([out.detach(), *(x.grad for x in local)])
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)), (
                "other bits in another run"
            )
            found.append([cp.unshard(x, plan) for x in runs[0]])
        return found[0:] if communicator.rank == 0 else None

    found = run_ranks(world, work, timeout=300.0)[0]
    for seed, (strategy, kind, heads) in enumerate(cases):
        mask = make_mask(kind, 61 + world, seed)
        *inputs, dout = (x.double() for x in problem(mask, heads, seed))
        leaves = [x.requires_grad_() for x in inputs]
        want, _ = dense_attention(*leaves, mask)
        want.backward(dout)
        for name, a, b in zip(("out", "dq", "dk", "dv"), found[seed], (want, *(x.grad for x in leaves)), strict=True):
            assert error(a.double(), b) <= FLOAT32, (str(strategy), kind, heads, name, float(error(a.double(), b)))


@pytest.mark.parametrize("world", WORLDS)
def test_a_part_of_all_strategies(world: int) -> None:
    """Each strategy with four of the pairs of mask and heads, other ones for each, twice to the same bits."""
    pairs = list(itertools.product(MASKS, HEADS))
    cases = []
    for i, strategy in enumerate(STRATEGIES):
        some = [pairs[(11 * i + 7 * world + 13 * j) % len(pairs)] for j in range(4)]
        cases += [(strategy, kind, heads) for kind, heads in some if fits(strategy, world, heads[0])]
    assert {kind for _, kind, _ in cases} == set(MASKS) and {heads for _, _, heads in cases} == set(HEADS)
    check(world, cases, times=2)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_all_of_a_strategy(strategy: Strategy, world: int) -> None:
    cases = [(strategy, kind, heads) for kind in MASKS for heads in HEADS if fits(strategy, world, heads[0])]
    if not cases:
        pytest.skip(f"ulysses={strategy.ulysses} does not divide {world} ranks")
    check(world, cases)
