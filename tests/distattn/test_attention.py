"""ContextParallel on one rank and on strict ranks as threads: values, every gradient, batches, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distattn
from distattn import ContextParallel
from distattn.kernels.aten import Aten
from distattn.ops import HANDLES, Handles
from distattn.parallel.comm import Communicator, SoloCommunicator
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.mask import Mask
from tests.distattn.dense import dense_attention, dense_batch, error
from tests.parallel.plans import MASKS, make_mask

SCHEDULES = ("ring", "zigzag", "striped")
# Relative L2. float32: sums of about a hundred terms, each rounded to 6e-8; float64 likewise 1e-16. bfloat16: out and gradients
# are rounded to 8 bits once, 2^-9 at most per element, and delta is taken of the rounded out. In the gradient of the sinks, a
# sum of deltas of both signs, that weighs more; and each rank's part of it is rounded.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 5e-3}
TOKENS_DIM = {"thd": 0, "bshd": 1, "sbhd": 0}
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def draw(
    mask: Mask, dtype: torch.dtype, heads: tuple[int, int], d: tuple[int, int], batch: int = 0, seed: int = 0
) -> list[Tensor]:
    """q, k, v, dout, dlse, sinks of the whole sequence, token-major with a batch in front if there is one."""
    g = torch.Generator().manual_seed(seed)
    lead = (batch, mask.n_tokens) if batch else (mask.n_tokens,)
    shapes = [(heads[0], d[0]), (heads[1], d[0]), (heads[1], d[1]), (heads[0], d[1]), (heads[0],)]
    q, k, v, dout, dlse = (torch.randn(*lead, *shape, generator=g, dtype=torch.float64) for shape in shapes)
    seen = mask.bands.dense(mask.n_tokens, mask.n_tokens).any(1)
    sinks = torch.randn(heads[0], generator=g, dtype=torch.float64)
    return [*(x.to(dtype) for x in (q, k, v, dout)), dlse * seen[:, None], sinks.to(dtype)]


def want_all(tensors: list[Tensor], mask: Mask, sinks: bool, **options: Any) -> dict[str, Tensor]:
    """The float64 answer, values and gradients."""
    q, k, v, sink = (tensors[i].double().clone().requires_grad_() for i in (0, 1, 2, 5))
    dense = dense_attention if q.dim() == 3 else dense_batch
    out, lse = dense(q, k, v, mask, sinks=sink if sinks else None, **options)
    leaves = [q, k, v, *([sink] if sinks else [])]
    gradients = torch.autograd.grad([out, lse], leaves, [tensors[3].double(), tensors[4]])
    return dict(zip(NAMES, (out, lse, *gradients), strict=False))


def found_all(
    cp: ContextParallel, tensors: list[Tensor], mask: Mask, sinks: bool, format: str, **options: Any
) -> dict[str, Tensor]:
    """The same through shard, attention and unshard; the gradient of the sinks summed over the ranks."""
    plan, dim = cp.plan(mask), TOKENS_DIM[format]
    turn = (lambda x: x.transpose(0, 1)) if format == "sbhd" else (lambda x: x)
    q, k, v, sink = (tensors[i].clone().requires_grad_() for i in (0, 1, 2, 5))
    out, lse = cp.attention(
        *(cp.shard(turn(x), plan, dim) for x in (q, k, v)),
        plan,
        sinks=sink if sinks else None,
        return_lse=True,
        format=format,  # type: ignore[arg-type]
        **options,
    )
    assert out.dtype == q.dtype and lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    whole = [turn(cp.unshard(x, plan, dim)) for x in (out, lse)]
    torch.autograd.backward(whole, [tensors[3], tensors[4].to(lse.dtype)])
    gradients = [q.grad, k.grad, v.grad, *([cp.communicator.all_reduce_sum(sink.grad)] if sinks else [])]  # type: ignore[arg-type]
    assert all(g is not None and g.dtype == q.dtype for g in gradients)
    return dict(zip(NAMES, (*whole, *gradients), strict=False))


def on_ranks(world: int, work: Callable[[ContextParallel], Any], schedule: str = "zigzag", **options: Any) -> list[Any]:
    """``work`` of a ContextParallel on every rank; a world of one without any connection."""
    if world == 1:
        return [work(ContextParallel(schedule=schedule, **options))]
    return run_ranks(world, lambda comm: work(ContextParallel(schedule=schedule, communicator=comm, **options)), timeout=30.0)


def compare(
    world: int,
    mask: Mask,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    d: tuple[int, int] = (16, 16),
    format: str = "thd",
    sinks: bool = False,
    schedule: str = "zigzag",
    pad: bool = False,
    backend: str | None = None,
    keep: str = "last",
    **options: Any,
) -> None:
    """Every rank ends with the whole answer of one device."""
    tensors = draw(mask, dtype, heads, d, batch=0 if format == "thd" else 2)
    want = want_all(tensors, mask, sinks, **options)

    def work(cp: ContextParallel) -> dict[str, Tensor]:
        return found_all(cp, tensors, mask, sinks, format, **options)

    for rank, found in enumerate(on_ranks(world, work, schedule, pad_to_equal=pad, backend=backend, keep=keep)):
        assert found.keys() == want.keys()
        errors = {name: error(found[name], want[name]) for name in want}
        if dtype == torch.bfloat16 and sinks:
            assert errors.pop("dsinks") <= 3 * TOLERANCE[dtype]
        assert max(errors.values()) <= TOLERANCE[dtype], (rank, errors)


@pytest.mark.parametrize(
    ("world", "schedule"),
    [(1, "zigzag"), *((3, name) for name in SCHEDULES), (8, "zigzag"), *((2, name) for name in SCHEDULES[::2])],
)
def test_every_mask_is_dense_attention(world: int, schedule: str) -> None:
    for seed, kind in enumerate(MASKS):
        compare(
            world, make_mask(kind, 41, seed), torch.float64, d=(4, 4), schedule=schedule, pad=bool(seed % 2), sinks=seed % 3 == 0
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("format", TOKENS_DIM)
def test_formats_and_dtypes(world: int, format: str, dtype: torch.dtype) -> None:
    compare(world, make_mask("documents", 96), dtype, format=format, sinks=True)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("format", ["thd", "bshd"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"softcap": 2.0},
        {"scale": 1.5, "softcap": 1.0, "sinks": True},
        {"d": (16, 24)},
        {"d": (5, 3)},
        {"heads": (6, 1)},
        {"heads": (3, 3)},
        {"backend": "reference", "softcap": 2.0, "sinks": True},
        {"keep": "none"},
        {"keep": "all"},
    ],
    ids=str,
)
def test_options(world: int, format: str, options: dict[str, Any]) -> None:
    compare(world, distattn.causal(67), format=format, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        distattn.causal(3),
        distattn.full(1),
        distattn.documents([0, 1, 0, 1, 7, 0]),
        distattn.documents([1, 1, 1]),
        distattn.causal(0),
        distattn.documents([]),
    ],
    ids=repr,
)
def test_ranks_without_rows_and_tiny_documents(schedule: str, pad: bool, mask: Mask) -> None:
    compare(5, mask, torch.float64, d=(4, 4), schedule=schedule, pad=pad, sinks=True)
    compare(1, mask, torch.float64, d=(4, 4), schedule=schedule, pad=pad, sinks=True)


def test_gradient_only_into_lse_and_only_into_some_inputs() -> None:
    mask = distattn.causal(24)
    q, k, v, _, dlse, _ = draw(mask, torch.float64, (2, 2), (4, 4))
    dense_q = q.clone().requires_grad_()
    dense_attention(dense_q, k, v, mask)[1].backward(dlse)

    def work(cp: ContextParallel) -> Tensor:
        plan, leaf = cp.plan(mask), q.clone().requires_grad_()
        _, lse = cp.attention(cp.shard(leaf, plan), cp.shard(k, plan), cp.shard(v, plan), plan, return_lse=True)
        cp.unshard(lse, plan).backward(dlse)
        assert leaf.grad is not None
        return leaf.grad

    for gradient in on_ranks(3, work):
        assert error(gradient, dense_q.grad) < 1e-13  # type: ignore[arg-type]


def test_gradients_that_are_expanded_or_transposed() -> None:
    """``out.sum()`` hands back a gradient of strides 0; a permuted loss one whose head dimension is not contiguous."""
    mask = distattn.causal(24)
    q, k, v, *_ = draw(mask, torch.float64, (2, 2), (4, 4))

    def gradients(loss: Callable[[Tensor], Tensor]) -> Callable[[ContextParallel], Tensor]:
        def work(cp: ContextParallel) -> Tensor:
            plan = cp.plan(mask)
            leaves = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
            return torch.cat([cp.unshard(g, plan) for g in torch.autograd.grad(loss(cp.attention(*leaves, plan)), leaves)], -1)

        return work

    weight = torch.arange(4, dtype=torch.float64)
    for plain, odd in (
        (lambda x: (x * torch.ones_like(x)).sum(), lambda x: x.sum()),
        (lambda x: (x * weight).sum(), lambda x: (x.permute(2, 1, 0) * weight[:, None, None]).sum()),
    ):
        a, b = on_ranks(2, gradients(plain))[0], on_ranks(2, gradients(odd))[0]
        assert error(b, a) < 1e-14


class SummedGradient(torch.autograd.Function):
    """A parameter that every rank holds alike: its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.communicator.all_reduce_sum(gradient), None


@pytest.mark.parametrize(("world", "softcap"), [(1, 1.5), (2, 1.5), (3, 0.0)])
def test_gradcheck_of_unshard_attention_shard(world: int, softcap: float) -> None:
    """Against differences, on all ranks in lockstep: every rank perturbs the same element at the same time."""
    mask = distattn.documents([3, 2])
    q, k, v, _, _, sinks = draw(mask, torch.float64, (2, 1), (2, 3))

    def work(cp: ContextParallel) -> bool:
        plan = cp.plan(mask)

        def whole(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
            local = [cp.shard(x, plan) for x in (q, k, v)]
            sinks = SummedGradient.apply(sinks, cp.communicator)
            out, lse = cp.attention(*local, plan, sinks=sinks, softcap=softcap, return_lse=True)
            return cp.unshard(out, plan), cp.unshard(lse, plan)

        return torch.autograd.gradcheck(whole, [x.clone().requires_grad_() for x in (q, k, v, sinks)])

    assert all(on_ranks(world, work))


@pytest.mark.parametrize(("dtype", "sinks"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_operators_pass_opcheck(dtype: torch.dtype, sinks: bool) -> None:
    mask = distattn.causal(20)
    q, k, v, dout, dlse, sink = draw(mask, dtype, (4, 2), (8, 6))
    handle = ContextParallel().plan(mask).handle
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    the_sink = sink.clone().requires_grad_() if sinks else None
    torch.library.opcheck(torch.ops.distattn.attention.default, (*leaves, the_sink, handle, 0.3, 0.0))
    with torch.no_grad():
        out, lse, kept = torch.ops.distattn.attention(q, k, v, sink if sinks else None, handle, 0.3, 0.0)
    saved = (q, k, v, sink if sinks else None, out, lse, kept, handle, 0.3, 0.0)
    for upstream in [(dout, dlse.to(lse.dtype)), (None, dlse.to(lse.dtype))] if sinks else [(dout, None)]:
        torch.library.opcheck(torch.ops.distattn.attention_backward.default, (*upstream, *saved))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shard_and_unshard_and_their_gradients(schedule: str, pad: bool, dim: int) -> None:
    """The full tensor is one and the same on every rank: shard's backward gathers, unshard's slices and does not sum."""
    mask = distattn.documents([7, 4])
    full = torch.randn(*((3, 11) if dim else (11, 3)), dtype=torch.float64)

    def work(cp: ContextParallel) -> tuple[Tensor, ...]:
        plan = cp.plan(mask)
        leaf = full.clone().requires_grad_()
        local = cp.shard(leaf, plan, dim)
        assert local.shape[dim] == plan.rows and (not pad or plan.rows == 3)
        held = torch.from_numpy(plan.layout.positions(cp.rank))
        valid = held < 11
        assert torch.equal(local.index_select(dim, valid.nonzero()[:, 0]), full.index_select(dim, held[valid]))
        local.backward(torch.full_like(local, cp.rank + 1.0))
        whole = cp.unshard((mine := local.detach()).requires_grad_(), plan, dim)
        assert torch.equal(whole, full)
        whole.backward(10 * full)
        assert leaf.grad is not None and mine.grad is not None
        assert torch.equal(mine.grad, 10 * mine.detach())
        return leaf.grad, cp.unshard(torch.full_like(local, cp.rank + 1.0), plan, dim)

    for gradient, owner in on_ranks(4, work, schedule, pad_to_equal=pad):
        assert torch.equal(gradient, owner) and set(gradient.unique().tolist()) == {1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("lengths", [[9], [5, 0, 1, 12, 1, 4], [1, 1], [], [0]], ids=str)
def test_shard_batch(schedule: str, pad: bool, lengths: list[int]) -> None:
    """Tokens count from 100, so that a label is its token plus one wherever there is one."""
    n, world = sum(lengths), 4
    tokens = torch.arange(100, 100 + n)
    labels = [t + 1 for t in range(100, 100 + n)]
    positions = [p for length in lengths for p in range(length)]
    end = 0
    for length in lengths:
        end += length
        if length:
            labels[end - 1] = -100
    mask = distattn.documents(lengths)

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(mask)
        held = plan.layout.positions(cp.rank).tolist()
        assert not pad or len(held) == -(-n // world)
        for given in (tokens, torch.stack([tokens, tokens + 1000])):
            batch = cp.shard_batch(given, plan)
            shape = (*given.shape[:-1], len(held))
            assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == shape
            found = zip(
                *(x.reshape(given.dim(), len(held)).tolist() for x in (batch.tokens, batch.labels, batch.positions)), strict=True
            )
            for first, (ids, following, row) in zip((0, 1000), found, strict=False):
                assert ids == [100 + p + first if p < n else 0 for p in held]
                assert following == [labels[p] + (first if labels[p] > 0 else 0) if p < n else -100 for p in held]
                assert [x for x, p in zip(row, held, strict=True) if p < n] == [positions[p] for p in held if p < n]
                assert all(0 <= x < max(n, 1) for x in row), "padding too has a position that tables of angles hold"

    on_ranks(world, work, schedule, pad_to_equal=pad)
    with pytest.raises(ValueError, match=rf"for {n} tokens, found {n + 1} .*Make a plan for this length"):
        cp = ContextParallel(schedule=schedule)
        cp.shard_batch(torch.zeros(n + 1, dtype=torch.int64), cp.plan(mask))


def test_a_sequence_without_documents_is_one_document() -> None:
    def work(cp: ContextParallel) -> list[list[int]]:
        batch = cp.shard_batch(torch.arange(10), cp.plan(distattn.causal(10)))
        return [batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist()]

    (a, b), labels = on_ranks(2, work, "striped"), [*range(1, 10), -100]
    assert a == [[0, 2, 4, 6, 8], labels[0::2], [0, 2, 4, 6, 8]]
    assert b == [[1, 3, 5, 7, 9], labels[1::2], [1, 3, 5, 7, 9]]


def test_plans_are_cached_by_content() -> None:
    cp = ContextParallel(cached_plans=2)
    one = cp.plan(distattn.causal(8))
    assert cp.plan(distattn.causal(8)) is one
    two = cp.plan(distattn.documents([8]))
    assert two is not one, "positions restart: documents of the same bands are another plan"
    assert cp.plan(distattn.causal(8)) is one
    cp.plan(distattn.full(8))
    assert cp.plan(distattn.causal(8)) is one and cp.plan(distattn.documents([8])) is not two, "the one not used longest went"


def test_a_plan_that_left_the_cache_still_runs_backward() -> None:
    cp = ContextParallel(cached_plans=1)
    q = torch.randn(8, 2, 4, requires_grad=True)
    out = cp.attention(q, q, q, cp.plan(distattn.causal(8)))
    cp.plan(distattn.full(8))
    out.sum().backward()
    assert q.grad is not None


def test_a_plan_in_hand_outlives_any_number_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HANDLES, "capacity", 3)
    cp = ContextParallel()
    plan = cp.plan(distattn.causal(8))
    for n in range(1, 6):
        cp.plan(distattn.full(n))
    q = torch.randn(8, 2, 4)
    assert cp.attention(q, q, q, plan).shape == q.shape


def test_a_handle_that_nobody_holds_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="plan 7 is gone: nobody holds it, and 2 plans were used after it.*hold the plan"):
        Handles(capacity=2)[7]


def rows(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


Q, KV = (8, 4, 16), (8, 2, 16)
REFUSED: dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], list[str]]] = {
    "heads": (
        (rows(8, 40, 16), rows(8, 12, 16), rows(8, 12, 16)),
        {},
        ["40 query heads cannot share 12 key heads", "Found q [8, 40, 16], k [8, 12, 16]", "Use 8 or 10 key heads, or repeat"],
    ),
    "heads of a batch": (
        (rows(2, 8, 40, 16), rows(2, 8, 12, 16), rows(2, 8, 12, 16)),
        {},
        ["40 query heads cannot share 12 key heads", "q [2, 8, 40, 16], k [2, 8, 12, 16]", "Use 8 or 10 key heads"],
    ),
    "no heads": (
        (rows(8, 4, 16), rows(8, 0, 16), rows(8, 0, 16)),
        {},
        ["4 query heads cannot share 0 key heads", "key heads, or"],
    ),
    "batches": (
        (rows(2, 8, 4, 16), rows(4, 8, 2, 16), rows(4, 8, 2, 16)),
        {},
        ["q, k and v must have one batch size", "q [2, 8, 4, 16], k [4, 8, 2, 16]", "Repeat"],
    ),
    "head sizes": (
        (rows(8, 4, 16), rows(8, 2, 8), rows(8, 2, 16)),
        {},
        ["q and k the same head size", "q [8, 4, 16], k [8, 2, 8]"],
    ),
    "key and value heads": (
        (rows(*Q), rows(*KV), rows(8, 4, 16)),
        {},
        ["k and v must have the same rows and heads", "v [8, 4, 16]"],
    ),
    "key and value rows": (
        (rows(*Q), rows(*KV), rows(9, 2, 16)),
        {},
        ["k and v must have the same rows and heads", "v [9, 2, 16]"],
    ),
    "rows of all": (
        (rows(16, 4, 16), rows(16, 2, 16), rows(16, 2, 16)),
        {},
        ["Rank 0 holds 8 rows of this plan (Mask(causal, n_tokens=8", "Found q [16, 4, 16]", "Pass local rows (cp.shard)"],
    ),
    "rows of keys": (
        (rows(*Q), rows(4, 2, 16), rows(4, 2, 16)),
        {},
        ["Rank 0 holds 8 rows", "k [4, 2, 16]", "of q, k and v alike"],
    ),
    "order of dimensions": (
        (rows(8, 2, 4, 16), rows(8, 2, 2, 16), rows(8, 2, 2, 16)),
        {},
        ["Rank 0 holds 8 rows", "name the format, 'bshd' or 'sbhd'"],
    ),
    "two dimensions": (
        (rows(8, 16), rows(8, 16), rows(8, 16)),
        {},
        ["needs q with 4 dimensions, found [8, 16]", "'thd' [T, H, D]"],
    ),
    "format and dimensions": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"format": "sbhd"},
        ["'sbhd' needs q with 4 dimensions, found [8, 4"],
    ),
    "unknown format": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"format": "bhsd"},
        ["There is no format 'bhsd'", "'thd' [T, H, D]", "'sbhd'"],
    ),
    "dtypes": (
        (rows(*Q), rows(*KV, dtype=torch.float64), rows(*KV)),
        {},
        ["one floating-point dtype", "Found torch.float32, torch.float64, torch.float32", "Convert"],
    ),
    "whole numbers": (
        tuple(rows(*s, dtype=torch.int64) for s in (Q, KV, KV)),  # type: ignore[dict-item]
        {},
        ["one floating-point dtype", "Found torch.int64"],
    ),
    "devices": ((rows(*Q), rows(*KV, device="meta"), rows(*KV)), {}, ["must be on one device", "Found cpu, meta, cpu", "Move"]),
    "sinks of keys": ((rows(*Q), rows(*KV), rows(*KV)), {"sinks": rows(2)}, ["sinks must be [4] on cpu", "Found [2] on cpu"]),
    "sinks by token": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"sinks": rows(8, 4)},
        ["sinks must be [4] on cpu", "Found [8, 4] on cpu"],
    ),
    "sinks elsewhere": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"sinks": rows(4, device="meta")},
        ["sinks must be [4] on cpu", "on meta"],
    ),
    "sinks of a batch": (
        (rows(2, 8, 4, 16), rows(2, 8, 2, 16), rows(2, 8, 2, 16)),
        {"sinks": rows(8)},
        ["sinks must be [4] on cpu", "Found [8]"],
    ),
    "softcap": ((rows(*Q), rows(*KV), rows(*KV)), {"softcap": -1.0}, ["softcap must be 0 (none) or positive. Found -1.0"]),
    "dropout": ((rows(*Q), rows(*KV), rows(*KV)), {"dropout_p": 0.1}, ["asked for dropout_p=0.1", "apply dropout outside"]),
    "dense mask": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"attn_mask": torch.ones(8, 8, dtype=torch.bool)},
        ["asked for attn_mask", "[8, 8]", "make a mask of bands"],
    ),
    "bias": ((rows(*Q), rows(*KV), rows(*KV)), {"bias": torch.zeros(1)}, ["asked for bias", "not supported"]),
    "alibi": ((rows(*Q), rows(*KV), rows(*KV)), {"alibi_slopes": torch.zeros(4)}, ["asked for alibi_slopes", "not supported"]),
    "is_causal": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"is_causal": True},
        ["asked for is_causal=True", "cp.plan(distattn.causal(n))"],
    ),
    "causal": ((rows(*Q), rows(*KV), rows(*KV)), {"causal": True}, ["asked for causal=True", "cp.plan(distattn.causal(n))"]),
    "window": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"window_size": (128, 0)},
        ["window_size=(128, 0)", "distattn.sliding_window(n"],
    ),
    "cu_seqlens": (
        (rows(*Q), rows(*KV), rows(*KV)),
        {"cu_seqlens": torch.tensor([0, 8])},
        ["for cu_seqlens", "distattn.documents("],
    ),
    "enable_gqa": ((rows(*Q), rows(*KV), rows(*KV)), {"enable_gqa": True}, ["enable_gqa=True", "pass them as they are"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_are_refused(case: str) -> None:
    tensors, options, texts = REFUSED[case]
    cp = ContextParallel()
    with pytest.raises(ValueError) as caught:
        cp.attention(*tensors, cp.plan(distattn.causal(8)), **options)
    for text in texts:
        assert text in str(caught.value)


def test_what_is_switched_off_is_no_request() -> None:
    cp = ContextParallel()
    plan = cp.plan(distattn.causal(8))
    off = {"dropout_p": 0.0, "attn_mask": None, "is_causal": False, "window_size": None, "enable_gqa": False}
    assert cp.attention(rows(*Q), rows(*KV), rows(*KV), plan, **off).shape == Q
    with pytest.raises(TypeError, match="unexpected keyword argument 'sofcap'"):
        cp.attention(rows(*Q), rows(*KV), rows(*KV), plan, sofcap=2.0)


def test_tensors_without_data_are_refused() -> None:
    cp = ContextParallel()
    with pytest.raises(ValueError, match="meta"):
        cp.attention(*(rows(*s, device="meta") for s in (Q, KV, KV)), cp.plan(distattn.causal(8)))


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"schedule": "zigzga"}, ["no schedule 'zigzga'", "ring, zigzag, striped"]),
        ({"backend": "cutlass"}, ["no backend 'cutlass'", "triton, aten, reference"]),
        ({"keep": "some"}, ["keep must be one of all, last, none", "Found 'some'"]),
        ({"home": torch.int8}, ["home must be a floating-point dtype", "Found torch.int8"]),
        ({"home": "bfloat16"}, ["home must be a floating-point dtype", "Found 'bfloat16'"]),
        ({"cached_plans": 0}, ["cached_plans must be 1 or more", "Found 0"]),
        pytest.param(
            {"group": object(), "communicator": SoloCommunicator()}, ["A group and a communicator", "Pass one"], id="both"
        ),
    ],
    ids=str,
)
def test_constructions_that_are_refused(options: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ContextParallel(**options)
    for text in texts:
        assert text in str(caught.value)


def test_process_groups_without_torch_distributed_are_refused() -> None:
    with pytest.raises(ValueError, match="torch.distributed"):
        ContextParallel(object())  # type: ignore[arg-type]


def test_a_backend_that_cannot_take_the_call_says_why() -> None:
    class Never:
        name = "never"

        def reject(self, *_: object) -> str:
            return "it never can"

    cp = ContextParallel(backend="aten")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distattn.kernels.load", lambda name: Never())
        with pytest.raises(ValueError, match="Backend 'aten' was asked for but it never can. Found q .*Leave the choice open"):
            cp.attention(rows(*Q), rows(*KV), rows(*KV), cp.plan(distattn.causal(8)))


def test_a_backend_is_asked_about_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that it cannot take, after one that it can, goes to another backend and is not computed wrongly."""
    monkeypatch.setattr(Aten, "reject", lambda self, q, k, v, scores: "scales below 0" if scores.scale < 0 else None)
    mask = distattn.causal(8)
    tensors = draw(mask, torch.float32, (2, 2), (4, 4))
    insists, leaves_open = ContextParallel(backend="aten"), ContextParallel()
    insists.attention(*tensors[:3], insists.plan(mask), scale=0.5)
    with pytest.raises(ValueError, match="Backend 'aten' was asked for but scales below 0"):
        insists.attention(*tensors[:3], insists.plan(mask), scale=-0.5)
    plan = leaves_open.plan(mask)
    for scale, backend in ((0.5, "aten"), (-0.5, "reference")):
        leaves_open.attention(*tensors[:3], plan, scale=scale)
        assert [choice.backend.name for choice in plan.session.kernels.chosen.values()] == [backend]


@pytest.mark.parametrize("world", [1, 2])
def test_second_derivatives_are_refused_and_not_lost(world: int) -> None:
    mask = distattn.causal(6)

    def work(cp: ContextParallel) -> None:
        plan = cp.plan(mask)
        full = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
        loss = cp.unshard(cp.shard(full, plan) ** 3, plan).sum()
        (gradient,) = torch.autograd.grad(loss, full, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    on_ranks(world, work)


def test_shard_of_another_length_is_refused() -> None:
    cp = ContextParallel()
    with pytest.raises(ValueError, match="needs 8 rows along dim 0, found 9 .*Pass the whole sequence, or name the dim"):
        cp.shard(torch.zeros(9, 2), cp.plan(distattn.causal(8)))


def test_gradients_may_travel_in_bfloat16() -> None:
    mask = distattn.causal(64)
    tensors = draw(mask, torch.float32, (4, 2), (16, 16))
    want = want_all(tensors, mask, sinks=False)
    found = on_ranks(4, lambda cp: found_all(cp, tensors, mask, False, "thd"), home=torch.bfloat16)[0]
    errors = {name: error(found[name], want[name]) for name in want}
    assert max(errors["out"], errors["lse"], errors["dq"]) < 1e-6, errors
    assert all(1e-4 < errors[name] < 8e-3 for name in ("dk", "dv")), errors  # sums of 3 hops, each rounded to 8 bits


def test_inference_mode() -> None:
    """The call works where no gradient can be asked for; it still sets aside the bytes that a backward pass would keep."""
    mask = distattn.causal(24)
    tensors = draw(mask, torch.float32, (4, 2), (16, 16))
    want = dense_attention(*tensors[:3], mask)[0]

    def work(cp: ContextParallel) -> Tensor:
        plan = cp.plan(mask)
        with torch.inference_mode():
            out = cp.attention(*(cp.shard(x, plan) for x in tensors[:3]), plan)
            return cp.unshard(out, plan)

    for found in on_ranks(2, work):
        assert error(found, want) < 1e-6
