"""What distattn itself costs: time of the executor per stage, time of making plans, and counted bytes per rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distattn.attention import ContextParallel
from distattn.kernels.bands import Bands
from distattn.kernels.contract import Scores, State, accumulate_dtype, empty_state
from distattn.launch.bench_attention_ranks import SCHEDULES, Ranks, shape_of
from distattn.launch.bench_attention_single import Problem
from distattn.parallel.comm import Awaited, Communicator, Done, Pending, SoloCommunicator
from distattn.parallel.executor import Executor
from distattn.parallel.mask import Mask, causal, documents
from distattn.parallel.plan import Plan, What
from distattn.parallel.program import Program, compile_program
from distattn.parallel.schedule import make_schedule
from distattn.parallel.schedules import make_plan
from distattn.parallel.strategy import Strategy
from distattn.parallel.transpose import transpose

TINY = 64  # tokens a rank: what is left of a pass is the executor, its copies of 64 rows and the messages
WORLDS = range(1, 9)
LAPS = (1, 2)


class Idle:
    """A kernel that computes nothing, so that what is measured is everything but kernels."""

    name = "idle"

    def __init__(self) -> None:
        self._state: State | None = None

    def reject(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> str | None:
        """Nothing is refused."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bands: Bands, scores: Scores, state: State | None = None, out: Tensor | None = None
    ) -> State:
        """The state as it came."""
        if self._state is None:
            self._state = empty_state(q, v.shape[-1])
        return state or self._state

    def backward(self, *_: object) -> None:
        """Nothing."""


class Silent(SoloCommunicator):
    """One rank of a world whose messages go nowhere and are there at once."""

    def __init__(self, rank: int, world: int):
        super().__init__()
        self.rank, self.world = rank, world

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Awaited) -> Pending:
        return Done()


@dataclass(frozen=True)
class Overhead:
    """Microseconds of one stage of a pass without kernels."""

    how: str
    world: int
    stages: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Planning:
    """Milliseconds until a rank can run a new mask: plan, transposition and this rank's programs."""

    mask: str
    world: int
    plan: float
    transposed: float
    programs: float

    @property
    def total(self) -> float:
        return self.plan + self.transposed + self.programs


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on the rank that has the most of them: forward, then backward, at ``tokens`` rows a rank."""

    schedule: str
    laps: int
    world: int
    tokens: int
    inputs: int  # q, k, v and the upstream gradient
    outputs: int  # out, lse and the gradients as they are summed up
    kept: int  # of received keys from forward to backward
    workspace: int  # received keys, sums on their way home, messages; shared by all layers
    stated: int  # two shards (in laps: parts) of all that travels in a backward pass: foreign rows at most, without messages

    @property
    def name(self) -> str:
        return self.schedule if self.laps == 1 else f"{self.schedule}, {self.laps} laps"

    @property
    def total(self) -> int:
        return self.inputs + self.outputs + self.kept + self.workspace


def seconds_a_pass(communicator: Communicator, tokens: int, problem: Problem, repeat: int) -> tuple[float, float, int]:
    """(forward, backward, stages): median seconds of a pass of a causal zigzag plan with tiny shards and no kernel."""
    plan = make_plan("zigzag", causal(tokens), communicator.world)
    forward, backward = _programs(plan, transpose(plan, "last"), communicator.rank, problem)
    executor, idle, scores = Executor(communicator), Idle(), Scores(1.0)
    q, k, v, dout = (x.cpu() for x in problem.inputs(plan.layout.rows(communicator.rank)))
    out, lse, kept = executor.forward(forward, idle, q, k, v, scores)
    delta = torch.zeros_like(lse)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        communicator.all_gather_bytes(b"")
        start = time.perf_counter()
        _, _, kept = executor.forward(forward, idle, q, k, v, scores)
        times[0].append(time.perf_counter() - start)
        communicator.all_gather_bytes(b"")
        start = time.perf_counter()
        executor.backward(backward, idle, dout, q, k, v, delta, lse, kept, scores)
        times[1].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1]), forward.stages


def overheads(ranks: Ranks, world: int, problem: Problem, repeat: int) -> list[Overhead]:
    """The executor alone, in a world of 8; and with real messages between the ranks of the benchmark."""
    rows = []
    forward, backward, stages = seconds_a_pass(Silent(1, 8), 8 * TINY, problem, repeat)
    rows.append(Overhead("executor alone, nothing sent", 8, stages, forward / stages * 1e6, backward / stages * 1e6))
    answers = ranks.run("idle_stages", world * TINY, repeat)
    forward, backward = (max(answer[i] for answer in answers) for i in range(2))
    stages = answers[0][2]
    carrier = "gloo" if problem.device.type == "cpu" else "NCCL"
    rows.append(Overhead(f"with messages over {carrier}", world, stages, forward / stages * 1e6, backward / stages * 1e6))
    return rows


def planning(problem: Problem, quick: bool, say: Callable[[str], None]) -> list[Planning]:
    """Plan making for a million tokens (quick: a few thousand): one sequence, and 4,096 documents."""
    tokens, count, worlds = (2**13, 32, (8,)) if quick else (2**20, 4096, (8, 64))
    lengths = [tokens // count - 5 + i % 11 for i in range(count)]
    rows = []
    for world in worlds:
        for mask in (causal(tokens), documents(lengths)):
            rows.append(_planning(problem, mask, world))
            say(f"plan of {mask.name} over {mask.n_tokens:,} tokens for {world} ranks: {rows[-1].total:.1f} ms")
    return rows


def _planning(problem: Problem, mask: Mask, world: int) -> Planning:
    start = time.perf_counter()
    plan = make_plan("zigzag", mask, world, rank=0)
    planned = time.perf_counter()
    back = transpose(plan, "last")
    transposed = time.perf_counter()
    _programs(plan, back, 0, problem)
    end = time.perf_counter()
    name = f"{mask.name}, {mask.n_tokens:,} tokens"
    return Planning(name, world, (planned - start) * 1e3, (transposed - planned) * 1e3, (end - transposed) * 1e3)


def cached_plan_microseconds(repeat: int) -> float:
    """A plan that is there already: what a layer of a model pays."""
    cp, mask = ContextParallel(), causal(1024)
    cp.plan(mask)
    start = time.perf_counter()
    for _ in range(100 * repeat):
        cp.plan(mask)
    return (time.perf_counter() - start) / (100 * repeat) * 1e6


def _programs(plan: Plan, back: Plan, rank: int, problem: Problem) -> tuple[Program, Program]:
    forward, backward = plan.view(rank), back.view(rank)
    program = compile_program(forward, shape_of(problem), backward.kept)
    return program, compile_program(backward, shape_of(problem), forward=program)


def memory(problem: Problem, tokens: int) -> list[Memory]:
    """Counted from what the programs allocate, for worlds of 1 to 8 with ``tokens`` rows a rank."""
    return [_memory(problem, schedule, laps, world, tokens) for schedule in SCHEDULES for laps in LAPS for world in WORLDS]


def _memory(problem: Problem, schedule: str, laps: int, world: int, tokens: int) -> Memory:
    shape = shape_of(problem)
    made = make_schedule(Strategy(schedule, laps=laps), causal(world * tokens), world)
    rotation = made.rotation(shape)
    plan, back = made.forward, made.backward(rotation)
    key_side, query_side = problem.kv_heads * problem.head_dim, problem.heads * problem.head_dim
    item, wide = problem.dtype.itemsize, accumulate_dtype(problem.dtype).itemsize
    inputs = tokens * 2 * (key_side + query_side) * item
    outputs = tokens * (query_side * item + problem.heads * wide + (query_side + 2 * key_side) * wide)
    pairs = [_programs(plan, back, rank, problem) for rank in range(world)]
    # One workspace serves both passes; kept bytes are a call's own.
    kept, workspace = max(
        ((f.kept_bytes, max(f.workspace_bytes, b.workspace_bytes)) for f, b in pairs), key=lambda entry: sum(entry)
    )
    travels = (What.KV, What.DKV) if rotation == "kv" else (What.Q, What.DOUT, What.DQ)
    stated = 2 * tokens * sum(shape.row_bytes(what) for what in travels) // laps if world > 1 else 0
    return Memory(schedule, laps, world, tokens, inputs, outputs, kept, workspace, stated)


def flatness(rows: list[Memory], name: str, least: int = 2) -> float:
    """Largest total over the smallest, of the rows of a name, in worlds from ``least`` ranks on."""
    totals = [row.total for row in rows if row.name == name and row.world >= least]
    return max(totals) / min(totals)
