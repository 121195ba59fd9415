"""Nano-batches: attention in steps, sequences that take each layer side by side, what travels behind what, and mutants."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distattn
from distattn import Balance, ContextParallel, Strategy
from distattn.config import Config, ModelConfig
from distattn.metrics import read
from distattn.model import Block, Decoder, NanoBatch, build
from distattn.ops import save_attention
from distattn.parallel.comm import LANES, Awaited, Communicator, PeerError, Pending, SoloCommunicator, lane_of
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.exchange import LANE as EXCHANGE_LANE
from distattn.parallel.steps import InProgress, Steps
from distattn.parallelize import attend_with, begin_with, context_parallel, make_world, recompute
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens
from tests.workers import Pool

SHARED_OUT = Strategy("disaggregate", balance=Balance(smallest=4))
STRATEGIES = [
    Strategy("zigzag"),
    Strategy("ring", keep="none"),
    Strategy("gather", stages=1),
    Strategy("tree"),
    Strategy("double_ring", devices=2),
    Strategy("striped", ulysses=2),
    Strategy("ring", ulysses=4),
    SHARED_OUT,
]
LAYERS = 2
MODEL = ModelConfig(vocab_size=32, dim=16, layers=LAYERS, heads=4, kv_heads=2, hidden_dim=24, dtype="float64")
DOCUMENTS = [[1, 1, 60, 2], [64], [30, 10, 24]]  # a ring of the last has fewer stages


def name(strategy: object) -> str:
    return str(strategy).replace(", ", "-") if isinstance(strategy, Strategy) else str(strategy)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=name)
def test_attention_in_steps_is_attention_bit_by_bit(strategy: Strategy) -> None:
    """Three calls in progress together against one after the other, with sinks, lse and their gradients."""

    def work(communicator: Communicator, split: bool) -> list[Tensor]:
        cp = ContextParallel(schedule=strategy, communicator=communicator)
        plans = [cp.plan(distattn.documents(lengths)) for lengths in DOCUMENTS]
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
        full, sinks = [[draw(64, heads, 8) for heads in (4, 2, 2)] for _ in plans], draw(4)
        local = [[cp.shard(x, plan) for x in inputs] for inputs, plan in zip(full, plans, strict=True)]
        if split:
            calls = [
                cp.begin_attention(*inputs, plan, slot, sinks=sinks, return_lse=True)
                for slot, (inputs, plan) in enumerate(zip(local, plans, strict=True))
            ]
            calls[0].compute(*calls[1:])
            results = [call.collect() for call in calls]
        else:
            results = [cp.attention(*x, plan, sinks=sinks, return_lse=True) for x, plan in zip(local, plans, strict=True)]
        sum(out.sin().sum() + lse.cos().sum() for out, lse in results).backward()  # type: ignore[union-attr]
        return [*(x.detach() for pair in results for x in pair), *(x.grad for inputs in full for x in inputs), sinks.grad]

    plain, split = (run_ranks(4, lambda c, s=s: work(c, s), timeout=20.0) for s in (False, True))
    for found, want in zip(split, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert all(bool(x.any()) for x in plain[0])


def sequences(count: int) -> list[tuple[list[int], Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(DOCUMENTS[i % 3], torch.randint(MODEL.vocab_size, (64,), generator=g)) for i in range(count)]


def gradients(
    communicator: Communicator, strategy: Strategy, together: int, count: int = 2, prepare: Callable[..., None] | None = None
) -> list[Tensor]:
    """This rank's sum of losses and its gradient of every parameter, ``together`` sequences side by side."""
    cp = ContextParallel(schedule=strategy, communicator=communicator)
    model = build(MODEL, 0)
    batches = []
    for i, (lengths, tokens) in enumerate(sequences(count)):
        plan = cp.plan(distattn.documents(lengths))
        batch = cp.shard_batch(tokens, plan)
        rows = batch.tokens, batch.positions, batch.labels
        batches.append((rows, attend_with(cp, plan), begin_with(cp, plan, i % together)))
    if prepare:
        prepare(model, cp)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, count, together):
        some = batches[first : first + together]
        if together == 1:
            (tokens, positions, labels), attend, _ = some[0]
            loss = model(tokens, positions, attend, labels)
        else:
            loss = model.together([NanoBatch(*rows, begin) for rows, _, begin in some])
        loss.backward()
        total += loss.detach()
    slots = {slot for executor in cp._executors.values() for slot, _ in executor._workspace}
    assert slots == set(range(together)), "a workspace for every sequence in flight, and none for what is not"
    return [total, *(p.grad for p in model.parameters())]  # type: ignore[misc]


def assert_close(found: list[list[Tensor]], want: list[list[Tensor]]) -> None:
    """Sums over ranks, since parameters are whole on each; 1e-12: sums of float64 in another order."""
    for a, b in zip(zip(*found, strict=True), zip(*want, strict=True), strict=True):
        torch.testing.assert_close(sum(a), sum(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=name)
def test_side_by_side_is_one_after_the_other(strategy: Strategy) -> None:
    """Losses and gradients of every parameter against a single device, and the same bits in a second run."""
    alone = [gradients(SoloCommunicator(), Strategy("ring"), 1)]
    found, again = (run_ranks(4, lambda c: gradients(c, strategy, 2), timeout=30.0) for _ in range(2))
    assert_close(found, alone)
    assert all(torch.equal(a, b) for x, y in zip(found, again, strict=True) for a, b in zip(x, y, strict=True))


def test_three_side_by_side_twice_on_ranks_without_rows() -> None:
    """Six sequences of 64 tokens on 2 ranks; documents of one token; and one rank that is alone."""
    alone = [gradients(SoloCommunicator(), Strategy("ring"), 1, 6)]
    assert_close([gradients(SoloCommunicator(), Strategy("ring"), 3, 6)], alone)
    assert_close(run_ranks(2, lambda c: gradients(c, Strategy("tree"), 3, 6), timeout=30.0), alone)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_with_blocks_that_are_computed_again(checkpointing: str) -> None:
    """Under the selective policy no step of attention runs again; under the full one each forward step does."""
    steps: dict[str, list[str]] = defaultdict(list)

    def prepare(model: Decoder, cp: ContextParallel) -> None:
        class Counted(InProgress):
            def begin(self, slot: int, steps_: Steps[Any]) -> None:
                super().begin(slot, steps_)
                steps[threading.current_thread().name].append(f"begin {slot}")

        (executor,) = cp._executors.values()
        executor.in_progress = Counted()
        parallel = Config().parallel
        parallel.checkpointing = checkpointing
        for block in model.blocks:
            recompute(block, parallel)  # type: ignore[arg-type]

    alone = [gradients(SoloCommunicator(), Strategy("ring"), 1)]
    assert_close(run_ranks(2, lambda c: gradients(c, Strategy("zigzag"), 2, prepare=prepare), timeout=30.0), alone)
    forward, backward, again = ["begin 0", "begin 1"], ["begin 1", "begin 0"], checkpointing == "full"
    want = forward * LAYERS + (forward * again + backward) * LAYERS
    assert list(steps.values()) == [want, want]
    assert callable(save_attention)


class Sent(NamedTuple):
    """What a message was posted for: the n-th pass of a slot, counted over layers forward and then backward."""

    turn: int
    slot: int
    step: str
    home: bool  # awaited when the pass is collected


class Watched(InProgress):
    """Knows which step of which call runs, and what has been computed."""

    def __init__(self, events: set[Any]) -> None:
        super().__init__()
        self.events = events
        self.turns: dict[int, int] = defaultdict(int)
        self.now = (0, 0, "")

    def begin(self, slot: int, steps: Steps[Any]) -> None:
        self.turns[slot] += 1
        super().begin(slot, steps)

    def _next(self, slot: int) -> bool:
        first = (self.turns[slot], slot, "begin") not in self.events
        self.now = (self.turns[slot], slot, "begin" if first else "compute")
        home = super()._next(slot)
        if first or home:
            self.events.add(self.now)
        return home


class Mark(torch.autograd.Function):
    """The identity; backward says that it was reached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Callable[[], None]) -> Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.tell()
        return gradient, None


def tell_of_dense_parts(model: Decoder, events: set[Any]) -> None:
    """Adds (turn, slot, "before" or "after") when a dense part is done, forward and backward."""

    def mark(layer: int, block: Block) -> None:
        before, after, turns = block.before, block.after, {"before": 0, "after": 0}

        def both(part: str) -> tuple[Callable[[], None], Callable[[], None]]:
            slot = turns[part] % 2
            turns[part] += 1
            return (
                lambda: events.add((layer + 1, slot, part)),
                lambda: events.add((2 * LAYERS - layer, slot, part)),
            )

        def marked_before(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
            forward, backward = both("before")
            found = before(Mark.apply(x, backward), cos, sin)
            forward()
            return found

        def marked_after(x: Tensor, out: Tensor) -> Tensor:
            forward, backward = both("after")
            found = after(x, Mark.apply(out, backward))
            forward()
            return found

        block.before, block.after = marked_before, marked_after  # type: ignore[method-assign]

    for layer, block in enumerate(model.blocks):
        mark(layer, block)  # type: ignore[arg-type]


Rule = Callable[[Sent], tuple[int, int, str] | None]
"""What both ends must have done before a message moves; None lets it pass."""


def first_beside_dense(sent: Sent) -> tuple[int, int, str] | None:
    """What the first call of a layer sends when it begins travels beside the other sequence's dense part: forward that before
    attention, backward that after it."""
    forward = sent.turn <= LAYERS
    if sent.step != "begin" or sent.slot != (0 if forward else 1):
        return None
    return (sent.turn, 1, "before") if forward else (sent.turn, 0, "after")


def last_beside_dense(sent: Sent) -> tuple[int, int, str] | None:
    """What comes home last travels beside the other's dense part: forward that after attention, backward that before it."""
    forward = sent.turn <= LAYERS
    if not sent.home or sent.slot != (1 if forward else 0):
        return None
    return (sent.turn, 0, "after") if forward else (sent.turn, 1, "before")


def second_beside_kernels(sent: Sent) -> tuple[int, int, str] | None:
    """What the second call sends when it begins travels while the first computes, where that sends no more on the lane."""
    forward = sent.turn <= LAYERS
    return (sent.turn, 0, "compute") if forward and sent.step == "begin" and sent.slot == 1 else None


def first_home_beside_kernels(sent: Sent) -> tuple[int, int, str] | None:
    """What the first call sends home travels while the second computes."""
    forward = sent.turn <= LAYERS
    return (sent.turn, 1, "compute") if forward and sent.home and sent.slot == 0 else None


CASES = [
    (Strategy("zigzag"), [first_beside_dense, last_beside_dense]),
    (Strategy("ring", keep="none"), [first_beside_dense, last_beside_dense]),
    (Strategy("gather", stages=1), [first_beside_dense, second_beside_kernels]),
    (Strategy("tree"), [first_beside_dense, last_beside_dense]),
    (SHARED_OUT, [first_beside_dense, first_home_beside_kernels, last_beside_dense]),
    (Strategy("ring", ulysses=4), [first_beside_dense, second_beside_kernels, first_home_beside_kernels, last_beside_dense]),
]


def withheld(
    strategy: Strategy, rule: Rule, early: bool, timeout: float, lanes: int = 2 * LANES, overtaken: bool = False
) -> tuple[int, list[list[Tensor]]]:
    """Runs with messages held until ``rule`` lets them go. Returns how many it was asked to hold, and the gradients.

    Args:
        early: whether a mutant waits for these messages right after it has posted them.
        overtaken: whether these messages are also held until all that the other sequence sends home has arrived.
    """
    world = 4
    carried: set[tuple[int, int, int, int]] = set()
    events: list[set[Any]] = [set() for _ in range(world)]
    sent: dict[tuple[int, int, int], list[Sent]] = defaultdict(list)
    held = set()

    def gate(src: int, dst: int, lane: int, number: int) -> bool:
        message = sent[src, dst, lane][number]
        wanted = rule(message)
        if wanted is None:
            carried.add((src, dst, lane, number))
            return True
        held.add((src, dst, lane, number))
        if not overtaken:
            return wanted in events[src] and wanted in events[dst]
        others = [
            (*way, n) for way, kinds in sent.items() for n, kind in enumerate(kinds) if kind.home and kind[:2] == wanted[:2]
        ]
        return all(wanted in rank for rank in events) and carried.issuperset(others)

    def work(communicator: Any) -> list[Tensor]:
        rank, post = communicator.rank, communicator.post

        def watched_post(lane: int, sends: Any, receives: Any, awaited: Awaited) -> Pending:
            turn, slot, step = watched[0].now
            home = step == "compute" and awaited.boundary == awaited.stages
            home &= strategy.ulysses == 1 or lane == EXCHANGE_LANE
            kind = Sent(turn, slot, step, home)
            for peer, _ in sends:
                sent[rank, peer, lane].append(kind)
            pending = post(lane, sends, receives, awaited)
            if early and rule(kind) is not None:
                pending.wait()
            return pending

        watched: list[Watched] = []

        def prepare(model: Decoder, cp: ContextParallel) -> None:
            (executor,) = cp._executors.values()
            executor.in_progress = Watched(events[rank])
            watched.append(executor.in_progress)
            tell_of_dense_parts(model, events[rank])
            communicator.post = watched_post

        return gradients(communicator, strategy, 2, prepare=prepare)

    found = run_ranks(world, work, timeout=timeout, lanes=lanes, gate=gate)
    return len(held), found


@pytest.mark.parametrize(
    ("strategy", "rule"), [(s, r) for s, rules in CASES for r in rules], ids=lambda x: getattr(x, "__name__", name(x))
)
def test_what_travels_waits_for_the_other_sequence(strategy: Strategy, rule: Rule) -> None:
    """Messages are withheld until the other sequence's work is done; the run ends, and its gradients are right."""
    held, found = withheld(strategy, rule, early=False, timeout=20.0)
    assert held, "no message was withheld: the test would show nothing"
    assert_close(found, [gradients(SoloCommunicator(), Strategy("ring"), 1)])
    with pytest.raises(PeerError):
        withheld(strategy, rule, early=True, timeout=0.5)


def first_home(sent: Sent) -> tuple[int, int, str] | None:
    """What the first call of a layer sends home, once the second has computed."""
    first = 0 if sent.turn <= LAYERS else 1
    return (sent.turn, 1 - first, "compute") if sent.home and sent.slot == first else None


@pytest.mark.parametrize("strategy", [SHARED_OUT, Strategy("tree"), Strategy("ring", ulysses=4)], ids=name)
def test_results_of_the_second_sequence_overtake_those_of_the_first(strategy: Strategy) -> None:
    """What the first sends home is held until all that the second sends home has arrived; on the same lanes it waits for ever."""
    held, found = withheld(strategy, first_home, early=False, timeout=20.0, overtaken=True)
    assert held, "no message was withheld: the test would show nothing"
    assert_close(found, [gradients(SoloCommunicator(), Strategy("ring"), 1)])
    with pytest.raises(PeerError):
        withheld(strategy, first_home, early=False, timeout=0.5, lanes=LANES, overtaken=True)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=name)
def test_all_ranks_post_on_all_lanes_in_one_order(strategy: Strategy) -> None:
    """A device may run what several lanes have posted one after the other: here all lanes are one, and nobody waits for ever."""

    def work(communicator: Any) -> list[Tensor]:
        post, communicator.lanes, used = communicator.post, 2 * LANES, set()

        def post_on_one(lane: int, sends: Any, receives: Any, awaited: Awaited) -> Pending:
            used.add(lane // LANES)
            return post(0, sends, receives, awaited)

        communicator.post = post_on_one
        found = gradients(communicator, strategy, 2)
        assert used == {0, 1}
        return found

    assert_close(run_ranks(4, work, timeout=20.0, lanes=1), [gradients(SoloCommunicator(), Strategy("ring"), 1)])


def test_more_sequences_than_lanes_share_them() -> None:
    assert [lane_of(2 * LANES, lane, slot) for slot in range(3) for lane in (0, 3)] == [0, 3, 4, 7, 0, 3]
    assert [lane_of(LANES, 2, slot) for slot in range(3)] == [2, 2, 2]
    alone = [gradients(SoloCommunicator(), Strategy("ring"), 1, 6)]
    found = run_ranks(4, lambda c: gradients(c, SHARED_OUT, 3, 6), timeout=30.0, lanes=2 * LANES)
    assert_close(found, alone)


def test_slots_have_process_groups_of_their_own(folder: Path, gloo: Pool) -> None:
    assert gloo(2).run(lanes_of_rank, str(folder)) == [[3 * LANES, 2 * LANES, LANES]] * 2
    with pytest.raises(ValueError, match="slots must be 1 or more: a call of attention needs one. Found 0"):
        ContextParallel(slots=0)


def lanes_of_rank(rank: int, world: int, folder: str) -> list[int]:
    found = [ContextParallel(dist.group.WORLD, slots=3)]
    for together in (2, 1):
        config = small_config(Path(folder), world, parallel__nano_batches=together, train__sequences_per_step=2)
        found.append(context_parallel(config, make_world(config, torch.device("cpu"))))
    lanes = [cp.communicator.lanes for cp in found]
    for cp in found:
        cp.close()
    return lanes


def test_steps_out_of_order_are_refused() -> None:
    cp = ContextParallel()
    plan, x = cp.plan(distattn.causal(8)), torch.ones(8, 2, 4)
    call = cp.begin_attention(x, x, x, plan)
    with pytest.raises(RuntimeError, match="slot 0, where another call has not been collected"):
        cp.begin_attention(x, x, x, plan)
    call.compute()
    with pytest.raises(RuntimeError, match="computed twice"):
        call.compute()
    call.collect()
    with pytest.raises(RuntimeError, match="No attention is in progress in slot 0"):
        call.collect()
    with pytest.raises(RuntimeError, match="before it was computed"):
        cp.begin_attention(x, x, x, plan, 1).collect()
    with pytest.raises(ValueError, match="slot=-1"):
        cp.begin_attention(x, x, x, plan, -1)


def losses_of_rank(rank: int, world: int, folder: str, runs: dict[str, dict[str, object]]) -> dict[str, list[float]]:
    found = {}
    for run, changes in runs.items():
        options = {"data__sequence_length": 96, "model__dtype": "float64", "out": f"{folder}/{world}-{run}", **changes}
        config = small_config(Path(folder), world, **options)
        result = Trainer(config, make_world(config, torch.device("cpu"))).train()
        rows = read(result.metrics)
        found[run] = [row[key] for row in rows for key in ("loss", "gradient_norm", "eval_loss") if key in row]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    small_tokens(folder / "tokens", documents=60, longest=90)
    return folder


def test_training_is_that_of_one_sequence_after_the_other(folder: Path, gloo: Pool) -> None:
    """Losses and gradient norms of every step on 1, 2 and 4 processes, sharded parameters, computed again or not."""
    four = {"train__sequences_per_step": 4}
    plain = losses_of_rank(0, 1, str(folder), {"plain": four})["plain"]
    two: dict[str, object] = {**four, "parallel__nano_batches": 2}
    alone = losses_of_rank(0, 1, str(folder), {"two": two, "four": {**four, "parallel__nano_batches": 4}})
    runs: dict[str, dict[str, object]] = {
        "plain": two,
        "again": {**two, "parallel__checkpointing": "full", "parallel__schedule": "gather"},
        "selective": {**two, "parallel__checkpointing": "selective", "parallel__schedule": "tree"},
    }
    groups: dict[str, dict[str, object]] = {
        "groups": {**two, "parallel__dp": 2, "parallel__checkpointing": "selective"},
        "heads": {**two, "parallel__ulysses": 2},
    }
    found = [alone, *gloo(2).run(losses_of_rank, str(folder), runs, timeout=200)]
    found += gloo(4).run(losses_of_rank, str(folder), groups, timeout=200)
    for rank in found:
        for run, losses in rank.items():
            assert losses == pytest.approx(plain, rel=1e-9), run
    assert plain[-3] < plain[0], "nothing was learnt: equal losses would show nothing"


@pytest.mark.slow
def test_dense_parts_compiled(folder: Path) -> None:
    four = {"train__sequences_per_step": 4}
    plain = losses_of_rank(0, 1, str(folder), {"to compile": four})["to compile"]
    for checkpointing in ("none", "full", "selective"):
        options = {"parallel__nano_batches": 2, "parallel__compile": True, "parallel__checkpointing": checkpointing}
        found = losses_of_rank(0, 1, str(folder), {f"compiled {checkpointing}": {**four, **options}})
        assert next(iter(found.values())) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__nano_batches": 0}, "parallel.nano_batches=0 must be at least 1"),
        ({"parallel__nano_batches": 2}, "train.sequences_per_step=1 for parallel.dp=1 groups. Use a multiple of 2"),
        ({"parallel__nano_batches": 2, "parallel__dp": 2, "train__sequences_per_step": 6}, "Use a multiple of 4"),
    ],
)
def test_steps_that_cannot_be_split_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(folder, 4, **changes)
