"""What the doctor checks: sharded attention and its gradients against one device, and every plan by the verifier.

The float64 answer comes from the reference on the CPU, whatever device is examined. A kernel that is wrong on one device is
told from a schedule or a connection that is wrong: each rank first runs the whole problem alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distattn.attention import ContextParallel
from distattn.kernels.contract import Scores
from distattn.kernels.reference import attention as reference_attention
from distattn.parallel import mask as masks
from distattn.parallel.comm import Communicator, SoloCommunicator
from distattn.parallel.mask import Mask
from distattn.parallel.schedules import SCHEDULES, make_plan
from distattn.parallel.transpose import transpose
from distattn.parallel.verify import PlanError, verify

ALONE = "one device"
HEADS = (4, 2)  # query heads, key heads: every check is of grouped-query attention
NOT_FINITE = 1e30  # stands for infinite and not-a-number in reports, which JSON does not know


@dataclass(frozen=True)
class Case:
    """A mask; ``extras`` adds a softcap, learned sinks and a gradient into lse."""

    name: str
    mask: Mask
    extras: bool = False

    @property
    def softcap(self) -> float:
        return 5.0 if self.extras else 0.0


@dataclass(frozen=True)
class Tolerance:
    """Relative L2 error per tensor that is allowed on one device, and for shards as a multiple of what one device makes."""

    alone: float
    growth: float | None
    reason: str


TOLERANCES = {
    torch.float32: Tolerance(
        1e-6, None, "float32 sums of some hundred products round to 2 to 4e-7; TF32, or one lost row, would be above 2e-4"
    ),
    torch.bfloat16: Tolerance(
        5e-3,
        1.1,
        "bf16 rounds to 1.7e-3, a few roundings on the way; bf16 partial results, the mildest known fault, give 1.13 times",
    ),
    torch.float16: Tolerance(
        6.5e-4, 1.1, "fp16 rounds to 2.1e-4, a few roundings on the way; fp16 partial results would give 1.13 times"
    ),
}


@dataclass(frozen=True)
class Finding:
    """One attention call, forward and backward: relative L2 errors by tensor, what is allowed, and the ranks above it."""

    schedule: str
    case: str
    dtype: str
    errors: dict[str, float]
    allowed: dict[str, float]
    ranks: dict[str, list[int]]

    @property
    def wrong(self) -> list[str]:
        return [name for name, error in self.errors.items() if error > self.allowed[name]]

    def describe(self) -> str:
        """What is wrong, in words; of several tensors the worst first."""
        names = sorted(self.wrong, key=lambda name: -self.errors[name] / self.allowed[name])
        parts = [
            f"{name} differs by {_size(self.errors[name])} (allowed {self.allowed[name]:.1e}) on rank"
            f"{'s' if len(self.ranks[name]) > 1 else ''} {', '.join(map(str, self.ranks[name][:8]))}"
            + (f" and {len(self.ranks[name]) - 8} more" if len(self.ranks[name]) > 8 else "")
            for name in names
        ]
        place = "one device alone" if self.schedule == ALONE else self.schedule
        return f"{place} on {self.case}, {self.dtype}: {'; '.join(parts)}"


def _size(error: float) -> str:
    return "something not finite" if error >= NOT_FINITE else f"{error:.1e}"


def cases(world: int, quick: bool = False) -> list[Case]:
    """Every mask kind, over some hundred tokens that no number of ranks divides."""
    n = min(max(160 if quick else 320, 24 * world), 2048) + 13
    lengths = [n // 3, 1, n // 5, 7, n // 4]
    lengths.append(n - sum(lengths))
    some = [
        Case("causal", masks.causal(n)),
        Case("full", masks.full(n)),
        Case("window with sinks", masks.sliding_window(n, n // 6, sinks=4)),
        Case("documents", masks.documents(lengths)),
        Case("documents with window", masks.documents(lengths, window=n // 9)),
        Case("prefix", masks.prefix_lm(n, n // 3)),
        Case("chunked", masks.chunked(n, n // 4)),
        Case("causal with softcap and learned sinks", masks.causal(n), extras=True),
    ]
    return [case for case in some if case.name in ("causal", "documents with window")] if quick else some


def verify_plans(communicator: Communicator, some: Sequence[Case]) -> dict[tuple[str, str], str]:
    """(schedule, case) of each plan that the verifier of any rank refuses, with what it says. Nobody should run those."""
    mine: list[tuple[str, str, str]] = []
    for schedule in SCHEDULES:
        for case in some:
            try:
                plan = make_plan(schedule, case.mask, communicator.world)
                verify(plan)
                verify(transpose(plan, "last"))
            except PlanError as error:
                mine.append((schedule, case.name, error.findings[0]))
    found: dict[tuple[str, str], str] = {}
    for answer in communicator.all_gather_bytes(json.dumps(mine).encode()):
        for schedule, name, text in json.loads(answer):
            found.setdefault((schedule, name), text)
    return found


@dataclass
class Attention:
    """The problems, their float64 answers, and what one device makes of them; each is made once."""

    communicator: Communicator
    device: torch.device
    head_dim: int = 64
    backend: str | None = None
    _answers: dict[tuple[str, torch.dtype], tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    _alone: dict[tuple[str, torch.dtype], dict[str, float]] = field(default_factory=dict)

    def check(
        self, schedule: str, some: Sequence[Case], dtype: torch.dtype, begin: Callable[[str], None] = lambda _: None
    ) -> list[Finding]:
        """Runs the cases on a schedule, or (:data:`ALONE`) the whole of each on every rank; the same findings on all ranks.

        ``begin`` is told what is about to run.
        """
        alone = schedule == ALONE
        communicator = SoloCommunicator() if alone else self.communicator
        cp = ContextParallel(schedule="ring" if alone else schedule, backend=self.backend, communicator=communicator)
        squares: dict[str, dict[str, tuple[float, float]]] = {}
        for case in some:
            begin(f"{schedule} on {case.name}, {_name(dtype)}")
            inputs, want = self._problem(case, dtype)
            plan = cp.plan(case.mask)
            found = attend(cp, case, inputs, self.device)
            squares[case.name] = {
                name: _squares(x, want[name] if name == "dsinks" else plan.layout.shard(want[name], cp.rank))
                for name, x in found.items()
            }
        answers = [json.loads(a) for a in self.communicator.all_gather_bytes(json.dumps(squares).encode())]
        return [self._finding(schedule, case, dtype, [a[case.name] for a in answers]) for case in some]

    def _finding(self, schedule: str, case: Case, dtype: torch.dtype, ranks: list[dict[str, tuple[float, float]]]) -> Finding:
        tolerance = TOLERANCES[dtype]
        own = {name: [_ratio(*rank[name]) for rank in ranks] for name in ranks[0]}
        if schedule == ALONE:
            errors = {name: max(values) for name, values in own.items()}
            self._alone[case.name, dtype] = errors
            allowed = dict.fromkeys(errors, tolerance.alone)
        else:
            errors = {name: _ratio(*map(sum, zip(*(rank[name] for rank in ranks), strict=True))) for name in own}
            alone = self._alone.get((case.name, dtype), {})
            allowed = {name: tolerance.alone for name in errors}
            if alone and tolerance.growth is not None:
                grown = {name: tolerance.growth * alone[name] for name in ("out", "dq", "dk", "dv")}
                allowed |= {name: min(tolerance.alone, value) for name, value in grown.items()}
        allowed["lse"] = TOLERANCES[torch.float32].alone  # never rounded to the dtype of the inputs
        blamed = {
            name: [r for r, value in enumerate(values) if value > allowed[name]]
            or [max(range(len(values)), key=values.__getitem__)]
            for name, values in own.items()
        }
        return Finding(schedule, case.name, _name(dtype), errors, allowed, blamed)

    def _problem(self, case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(inputs and upstream gradients in ``dtype``, float64 answers for them), whole tensors on the CPU."""
        if (case.name, dtype) not in self._answers:
            inputs = _inputs(case, dtype, self.head_dim)
            self._answers[case.name, dtype] = inputs, _truth(case, inputs)
        return self._answers[case.name, dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(case: Case, dtype: torch.dtype, d: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    n, (heads, kv_heads) = case.mask.n_tokens, HEADS

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"q": draw(n, heads, d), "k": draw(n, kv_heads, d), "v": draw(n, kv_heads, d), "dout": draw(n, heads, d)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if case.extras:
        inputs |= {"dlse": draw(n, heads).float(), "sinks": draw(heads).float()}
    return inputs


def _truth(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.double().requires_grad_(name in ("q", "k", "v", "sinks")) for name, x in inputs.items()}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    scores = Scores(q.shape[-1] ** -0.5, case.softcap)
    out, lse = reference_attention(q, k, v, case.mask.bands, scores, leaves.get("sinks"))
    return _backward(out, lse, leaves)


def attend(cp: ContextParallel, case: Case, inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """This rank's rows of out, lse and the gradients, through the public interface; the sinks' gradient over all ranks."""
    plan = cp.plan(case.mask)
    local = {name: (x if name == "sinks" else plan.layout.shard(x, cp.rank)).to(device) for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_(name in ("q", "k", "v", "sinks")) for name, x in local.items()}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    out, lse = cp.attention(q, k, v, plan, softcap=case.softcap, sinks=leaves.get("sinks"), return_lse=True)
    found = _backward(out, lse, leaves)
    if "dsinks" in found:
        found["dsinks"] = cp.communicator.all_reduce_sum(found["dsinks"])
    return found


def _backward(out: Tensor, lse: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in ("q", "k", "v", "sinks") if name in leaves]
    results, upstream = [out], [leaves["dout"]]
    if "dlse" in leaves:
        results, upstream = [out, lse], [leaves["dout"], leaves["dlse"].to(lse.dtype)]
    gradients = torch.autograd.grad(results, [leaves[name] for name in names], upstream)
    return {"out": out.detach(), "lse": lse.detach(), **{f"d{n}": g for n, g in zip(names, gradients, strict=True)}}


def _squares(found: Tensor, want: Tensor) -> tuple[float, float]:
    """(squared norm of the difference, squared norm of the answer)"""
    found = found.double().cpu()
    if not bool(torch.isfinite(found).all()):
        return NOT_FINITE**2, float(want.square().sum())
    return float((found - want).square().sum()), float(want.square().sum())


def _ratio(difference: float, answer: float) -> float:
    if answer == 0.0:
        return 0.0 if difference == 0.0 else NOT_FINITE
    return min((difference / answer) ** 0.5, NOT_FINITE)
