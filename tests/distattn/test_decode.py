from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distattn
from distattn.attention import ContextParallel
from distattn.decode import decode_attention, plan_work
from distattn.kv_cache import KVCache
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.layout import Layout, contiguous, document_zigzag, striped, zigzag
from distattn.parallel.mask import sliding_window
from distattn.parallel.merge_ranks import NOTE, Exchange, choose_exchange
from distattn.parallel.rank_plan import PlanMismatch
from tests.distattn.dense import dense_attention, error

LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


@dataclasses.dataclass(frozen=True)
class Case:
    """A context of ``prefill + sum(steps)`` tokens; each step appends, and then attends with all that it appended."""

    prefill: int = 37
    steps: tuple[int, ...] = (1, 3, 1)
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    d_v: int = 16
    layout: str = "zigzag"
    block: int = 8
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    devices: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def length(self) -> int:
        return self.prefill + sum(self.steps)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        made = torch.Generator().manual_seed(self.length)
        q, k, v = (
            torch.randn(self.batch, self.length, h, d, generator=made, dtype=torch.float64).to(self.dtype)
            for h, d in ((self.heads, self.d), (self.kv_heads, self.d), (self.kv_heads, self.d_v))
        )
        return q, k, v, torch.randn(self.heads, generator=made) if self.sinks else None


def decode(communicator: Any, case: Case) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of every step."""
    q, k, v, sinks = case.tensors()
    cp = ContextParallel(communicator=communicator)
    sizes = {"value_size": case.d_v, "batch": case.batch, "dtype": case.dtype, "block": case.block}
    cache = KVCache(cp, 1, case.kv_heads, case.d, **sizes)
    if case.prefill:
        layout = LAYOUTS[case.layout](case.prefill, cp.world)
        cache.prefill(layout)
        cache[0].fill(*(layout.shard(x[:, : case.prefill], cp.rank, 1) for x in (k, v)))
    found = []
    for n in case.steps:
        now = cache.extend(n)
        new = slice(now.start, now.stop)
        cache[0].append(k[:, new], v[:, new])
        options = {"window": case.window, "softcap": case.softcap, "sinks": sinks, "devices": case.devices, "return_lse": True}
        found.append(decode_attention(q[:, new], cache[0], cp, **options))  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


def expected(case: Case) -> list[tuple[Tensor, Tensor]]:
    q, k, v, sinks = case.tensors()
    mask = sliding_window(case.length, case.window or case.length)
    options: dict[str, Any] = {"softcap": case.softcap, "sinks": sinks}
    rows = [dense_attention(*x, mask, **options) for x in zip(q, k, v, strict=True)]
    out, lse = (torch.stack(x) for x in zip(*rows, strict=True))
    ends = np.cumsum((case.prefill, *case.steps))
    return [(out[:, a:b], lse[:, a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]


CASES = {
    "grouped": Case(),
    "all heads, batch": Case(batch=3, kv_heads=4),
    "one key head, other value size": Case(heads=6, kv_heads=1, d_v=24),
    "striped": Case(layout="striped", batch=2),
    "contiguous, many blocks": Case(layout="contiguous", prefill=150, steps=(1, 17, 1), block=4),
    "window": Case(window=11, steps=(1, 5)),
    "window in stripes": Case(window=19, layout="striped", prefill=90),
    "softcap": Case(softcap=3.0),
    "sinks": Case(sinks=True, batch=2),
    "sinks, window": Case(sinks=True, window=2),
    "ranks without rows": Case(prefill=2, steps=(1, 1, 2)),
    "no prefill": Case(prefill=0, steps=(5, 1, 1)),
    "more appended than filled": Case(prefill=3, steps=(1, 40, 1, 8), block=4),
    "float64": Case(dtype=torch.float64),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16, finished rows in bf16": Case(prefill=70, steps=(1, 2), heads=32, kv_heads=8, d=128, d_v=128, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str) -> None:
    """Also: the same bits on every rank, and in a second run."""
    case = CASES[name]
    want = expected(case)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3}[case.dtype]  # of out; bf16 rounds it once
    bounds = rounding, min(rounding, 1e-6)
    for world in (1, 2, 3, 8):
        ranks, again = (run_ranks(world, lambda c: decode(c, case), timeout=30) for _ in range(2))
        for step, wanted in enumerate(want):
            for mine, other, bound in zip(ranks[0][step], wanted, bounds, strict=True):
                assert error(mine, other) < bound, (world, step)
            for rank in (*ranks[1:], *again):
                assert all(torch.equal(a, b) for a, b in zip(rank[step], ranks[0][step], strict=True)), (world, step)


@pytest.mark.parametrize(("world", "devices"), [(4, 2), (8, 4), (8, 1), (6, 3), (6, 2), (12, 4)])
def test_nodes_first(world: int, devices: int) -> None:
    """Large enough that the exchange is a scatter; 24 and 5 * 8 rows are and are not a multiple of the ranks."""
    for case in (
        Case(steps=(3,), heads=8, kv_heads=2, d=128, d_v=128, devices=devices),
        Case(steps=(5,), heads=8, d=64, d_v=192),
    ):
        case = dataclasses.replace(case, devices=devices, sinks=True)
        assert exchange(case, world).how == "scatter"
        ranks = run_ranks(world, lambda c, case=case: decode(c, case), timeout=30)
        for mine, wanted in zip(ranks[0][0], expected(case)[0], strict=True):
            assert error(mine, wanted) < 1e-6
        assert all(torch.equal(rank[0][i], ranks[0][0][i]) for rank in ranks for i in (0, 1))


def exchange(case: Case, world: int, lse: bool = True) -> Exchange:
    rows = case.batch * case.steps[0] * case.heads
    return choose_exchange(rows, case.d_v, world, torch.float32, case.dtype, lse, case.devices)


class Counting:
    """A communicator that counts what it is given to send."""

    def __init__(self, inner: Any, devices: int) -> None:
        self.inner, self.devices, self.batches, self.bytes, self.between = inner, devices, 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def post(self, lane: int, sends: Any, receives: Any, awaited: Any) -> Any:
        self.batches += 1
        self.bytes += sum(tensor.nbytes for _, tensor in sends)
        node = self.inner.rank // self.devices
        self.between += sum(tensor.nbytes for peer, tensor in sends if peer // self.devices != node)
        return self.inner.post(lane, sends, receives, awaited)


LLAMA = Case(prefill=64, steps=(1,), heads=32, kv_heads=8, d=128, d_v=128)


def count(communicator: Any, case: Case, lse: bool, prefill: int) -> tuple[int, int, int]:
    """(batches, bytes, bytes between nodes) that one rank sends for one token and layer."""
    counting = Counting(communicator, case.devices or communicator.world)
    cp = ContextParallel(communicator=counting)
    cache = KVCache(cp, 1, case.kv_heads, case.d, dtype=case.dtype, block=4096)
    layout = zigzag(prefill, cp.world)
    cache.prefill(layout)
    rows = layout.rows(cp.rank)
    # One token's keys for all rows: what is sent does not depend on what they hold.
    one = torch.ones(1, 1, case.kv_heads, case.d, dtype=case.dtype)
    cache[0].fill(one.expand(1, rows, -1, -1), one.expand(1, rows, -1, -1))
    cache.extend(1)
    cache[0].append(one, one)
    counting.batches = counting.bytes = counting.between = 0
    decode_attention(torch.ones(1, 1, case.heads, case.d, dtype=case.dtype), cache[0], cp, devices=case.devices, return_lse=lse)
    return counting.batches, counting.bytes, counting.between


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_llama_3_8b_on_8_ranks(dtype: torch.dtype) -> None:
    """Published: 2 * 7/8 * (4096 + 2 * 32) * 4 = 29120 bytes, for any length of the context; a ring sends 3.76 GB."""
    case = dataclasses.replace(LLAMA, dtype=dtype)
    derived = 7 * (NOTE + 4 * 129 * 4) + 7 * 4 * 128 * dtype.itemsize  # 4 of 32 rows to each of 7 peers, and finished rows back
    assert derived == {torch.float32: 28952, torch.bfloat16: 21784}[dtype] <= 29_000 < 2 * 7 / 8 * (4096 + 2 * 32) * 4
    for context in (64, 8 * 1000):
        assert run_ranks(8, lambda c, n=context: count(c, case, False, n)) == [(2, derived, 0)] * 8
    assert exchange(case, 8, lse=False).sent == derived
    keys_and_values = (1 << 20) // 8 * 2 * 8 * 128 * 2
    assert 7 * keys_and_values == 3_758_096_384


@pytest.mark.slow
def test_bytes_at_a_million_tokens() -> None:
    """The same with a context of 2**20 tokens that is really there: 0.5 GB of bf16 keys and values a rank."""
    case = dataclasses.replace(LLAMA, dtype=torch.bfloat16)
    assert run_ranks(8, lambda c: count(c, case, False, (1 << 20) - 1), timeout=500) == [(2, 21784, 0)] * 8


@pytest.mark.parametrize(("world", "devices"), [(2, None), (3, None), (4, None), (4, 2), (8, 4)])
@pytest.mark.parametrize("lse", [False, True])
def test_counted_bytes_are_the_formula(world: int, lse: bool, devices: int | None) -> None:
    for heads, d in ((32, 128), (6, 64), (2, 16)):
        case = Case(steps=(1,), heads=heads, kv_heads=2, d=d, d_v=d, devices=devices)
        plan = exchange(case, world, lse)
        collectives = 1 if plan.how == "gather" else 2 * len(plan.radices)
        want = (collectives, plan.sent, plan.sent_between_nodes)
        assert run_ranks(world, lambda c, case=case: count(c, case, lse, 40)) == [want] * world


def test_the_exchange_is_chosen_by_bytes() -> None:
    """Two ranks send the same either way, so one collective is better; small states too; others are scattered."""
    for world, heads, d, how in ((2, 32, 128, "gather"), (8, 2, 16, "gather"), (3, 32, 128, "scatter"), (8, 32, 128, "scatter")):
        assert choose_exchange(heads, d, world, torch.float32, torch.float32, False).how == how
    with pytest.raises(ValueError, match="8 ranks cannot be nodes of 3"):
        choose_exchange(32, 128, 8, torch.float32, torch.float32, False, 3)


def test_a_message_between_nodes_is_a_part_of_the_rows() -> None:
    flat, nodes = (choose_exchange(32, 128, 16, torch.float32, torch.float32, False, devices) for devices in (None, 8))
    assert nodes.sent_between_nodes == 2 * (129 + 128) * 4 + NOTE  # 2 of 32 rows, to the one other node
    assert abs(nodes.sent - flat.sent) <= 15 * NOTE


def test_load_stays_level_and_nobody_holds_the_context() -> None:
    def ranks(communicator: Any) -> tuple[list[int], np.ndarray, int]:
        cp = ContextParallel(communicator=communicator)
        cache = KVCache(cp, 1, 1, 4, block=4)
        cache.prefill(document_zigzag([1, 9, 20], cp.world))
        layout_rows = cache.rows_here
        cache[0].fill(torch.zeros(1, layout_rows, 1, 4), torch.zeros(1, layout_rows, 1, 4))
        for n in (1, 1, 30, 5, 64, 1):
            cache.extend(n)
            cache[0].append(torch.zeros(1, n, 1, 4), torch.zeros(1, n, 1, 4))
            assert cache.rows.max() - cache.rows.min() <= cache.block and cache.rows.sum() == cache.length
        assert cache[0].filled == cache.rows_here and len(cache[0].k) * 4 <= 1.5 * cache.rows_here + 8
        return cache.rows.tolist(), cache.positions, cache.nbytes()

    found = run_ranks(3, ranks)
    assert all(rows == found[0][0] for rows, _, _ in found)
    assert [len(positions) for _, positions, _ in found] == found[0][0]
    assert sorted(np.concatenate([positions for _, positions, _ in found]).tolist()) == list(range(132))
    assert all((np.diff(positions) > 0).all() for _, positions, _ in found)


def test_padding_is_not_cached() -> None:
    for rank in range(4):
        for layout in (striped(9, 4, pad_to_equal=True), zigzag(10, 4, pad_to_equal=True)):
            cache = made_alone(layout, rank)
            assert cache.rows.sum() == layout.n_valid and cache.layout_rows == 3
            assert cache.positions.tolist() == [p for p in layout.positions(rank) if p < layout.n_valid]
            cache[0].fill(torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4))
            assert cache[0].filled == cache.rows_here


def made_alone(layout: Layout, rank: int) -> KVCache:
    """A cache as rank ``rank`` would make it, without its peers: what it holds follows from the calls alone."""
    cp = ContextParallel()
    cp.communicator.rank, cp.communicator.world = rank, layout.world  # type: ignore[misc]
    cache = KVCache(cp, 1, 1, 4, block=4)
    cache.prefill(layout)
    return cache


def test_rejected_tokens_are_dropped() -> None:
    """Three of five speculative tokens are taken back, then others come: the same as if they had never been."""
    case = Case(steps=(5, 2, 9), block=4)

    def ranks(communicator: Any, speculate: bool) -> Tensor:
        q, k, v, _ = case.tensors()
        cp = ContextParallel(communicator=communicator)
        cache = KVCache(cp, 1, case.kv_heads, case.d, block=4)
        layout = zigzag(case.prefill, cp.world)
        cache.prefill(layout)
        cache[0].fill(*(layout.shard(x[:, : case.prefill], cp.rank, 1) for x in (k, v)))
        for n, keep in ((7, 2), (4, 4), (12, 1)) if speculate else ((2, 2), (4, 4), (1, 1)):
            now = cache.extend(n)
            wrong = torch.full((1, n - keep, case.kv_heads, case.d), 9.0)
            cache[0].append(*(torch.cat([x[:, now.start : now.start + keep], wrong], 1) for x in (k, v)))
            cache.truncate(now.start + keep)
        assert cache.length == case.prefill + 7
        return decode_attention(q[:, cache.length - 3 : cache.length], cache[0], cp)

    with_them, without = (run_ranks(3, lambda c, s=s: ranks(c, s)) for s in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_them, without, strict=True))


def test_work_is_what_the_window_shows() -> None:
    """Blocks that are whole, parts, and blocks that nobody sees, against positions one by one."""
    for layout in (zigzag(100, 3), striped(100, 3), contiguous(100, 3)):
        for window in (None, 1, 13, 50):
            cache = made_alone(layout, 1)
            rows = cache.rows_here
            work = plan_work(cache, 3, window, 2)
            seen = np.zeros((6, -(-rows // 4) * 4), dtype=int)
            for first, stop in work.whole:
                seen[:, first * 4 : stop * 4] += 1
            for block, bands in work.parts:
                seen[:, block * 4 : block * 4 + 4] += bands.dense(6, 4).numpy()
            query = np.repeat([97, 98, 99], 2)[:, None]
            distance = query - cache.positions[None]
            assert (seen[:, :rows] == ((distance >= 0) & (distance < (window or 100)))).all() and not seen[:, rows:].any()


def test_gradients_are_not_recorded() -> None:
    case = Case(steps=(1,))
    q, k, v, _ = case.tensors()
    cp = distattn.ContextParallel()
    cache = distattn.KVCache(cp, 1, case.kv_heads, case.d)
    cache.extend(case.length)
    cache[0].append(k.requires_grad_(), v)
    out = distattn.decode_attention(q[:, -1:].requires_grad_(), cache[0], cp)
    assert isinstance(out, Tensor) and not out.requires_grad


def small(cp: ContextParallel, length: int = 5, **options: Any) -> KVCache:
    cache = KVCache(cp, 1, 2, 8, **options)
    if length:
        cache.extend(length)
        cache[0].append(torch.ones(1, length, 2, 8), torch.ones(1, length, 2, 8))
    return cache


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 1, 3, 8), {}, "3 query heads cannot share 2 key heads"),
        ((1, 1, 4, 16), {}, "one batch and head size"),
        ((2, 1, 4, 8), {}, "one batch and head size"),
        ((1, 6, 4, 8), {}, "q has 6 tokens, the context 5"),
        ((1, 0, 4, 8), {}, "q has 0 tokens"),
        ((4, 8), {}, r"q must be \[B, n, H, D\]"),
        ((1, 1, 4, 8), {"window": 0}, "window must be 1 or more"),
        ((1, 1, 4, 8), {"softcap": -1.0}, "softcap must be 0"),
        ((1, 1, 4, 8), {"sinks": torch.zeros(2)}, r"sinks must be \[4\]"),
        ((1, 1, 4, 8), {"devices": 2}, "1 ranks cannot be nodes of 2"),
    ],
)
def test_calls_that_cannot_be_are_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    cp = ContextParallel()
    cache = small(cp)
    with pytest.raises(ValueError, match=message):
        decode_attention(torch.ones(shape), cache[0], cp, **options)
    with pytest.raises(ValueError, match="another ContextParallel"):
        decode_attention(torch.ones(1, 1, 4, 8), cache[0], ContextParallel())
    with pytest.raises(ValueError, match="must be torch.float32 on cpu"):
        decode_attention(torch.ones(1, 1, 4, 8, dtype=torch.float16), cache[0], cp)


def test_a_wrong_cache_length_is_refused() -> None:
    cp = ContextParallel()
    q = torch.ones(1, 1, 4, 8)
    with pytest.raises(ValueError, match="The cache is empty on every rank. q has 1 tokens, the context 0"):
        decode_attention(q, KVCache(cp, 1, 2, 8)[0], cp)
    cache = small(cp)
    cache.extend(2)
    with pytest.raises(ValueError, match="The cache length does not match: layer 0 holds 5 of the 7 rows"):
        decode_attention(q, cache[0], cp)
    with pytest.raises(ValueError, match=r"Fill or append every layer before extend\(\)"):
        cache.extend(1)
    with pytest.raises(ValueError, match="extended by 2 tokens. Found 3 rows of k and 3 of v"):
        cache[0].append(torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8))
    new = torch.ones(1, 2, 2, 8)
    cache[0].append(new, new)
    with pytest.raises(ValueError, match="appended already"):
        cache[0].append(new, new)
    with pytest.raises(ValueError, match=r"takes k \[1, T, 2, 8\]"):
        cache[0].append(new[..., :4], new)
    with pytest.raises(ValueError, match=r"truncate\(9\) was asked of a context of 7 tokens"):
        cache.truncate(9)


def test_a_wrong_prefill_is_refused() -> None:
    cp = ContextParallel()
    with pytest.raises(ValueError, match="is for 2 ranks, the cache for 1"):
        KVCache(cp, 1, 2, 8).prefill(zigzag(10, 2))
    with pytest.raises(ValueError, match="holds 5 tokens. Use extend"):
        small(cp).prefill(zigzag(10, 1))
    cache = KVCache(cp, 1, 2, 8)
    cache.prefill(zigzag(10, 1))
    with pytest.raises(ValueError, match="holds 10 rows of this prefill of 10 tokens. Found 9 rows of k"):
        cache[0].fill(torch.ones(1, 9, 2, 8), torch.ones(1, 9, 2, 8))
    with pytest.raises(ValueError, match="10 of them from the prefill"):
        cache.truncate(9)
    with pytest.raises(ValueError, match="kv_heads of a key/value cache must be 1 or more. Found 0"):
        KVCache(cp, 1, 0, 8)


def test_the_capacity_is_a_bound_and_room_is_made_at_once() -> None:
    cp = ContextParallel()
    cache = small(cp, capacity=6, block=2)
    before = cache[0].k.data_ptr()
    cache.extend(1)
    cache[0].append(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
    assert cache[0].k.data_ptr() == before
    with pytest.raises(ValueError, match="holds 6 of at most 6 tokens; 1 more do not fit"):
        cache.extend(1)
    with pytest.raises(ValueError, match="holds 0 of at most 6 tokens; 7 more do not fit"):
        KVCache(cp, 1, 2, 8, capacity=6).prefill(zigzag(7, 1))


def disagree(communicator: Any, what: str) -> None:
    cp = ContextParallel(communicator=communicator)
    odd = cp.rank == 1
    cache = small(cp, block=4 if what == "block" and odd else 8)
    if what == "missed" and not odd:
        decode_attention(torch.ones(1, 1, 4, 8), cache[0], cp)
        cache.extend(1)
        cache[0].append(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
    elif what == "missed":
        decode_attention(torch.ones(1, 1, 4, 8), cache[0], cp)
    heads = 6 if what == "heads" and odd else 4
    n = 2 if what == "tokens" and odd else 1
    decode_attention(torch.ones(1, n, heads, 8), cache[0], cp, window=3 if what == "window" and odd else None)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", r"(?s)do not agree on this decode_attention call.*rank 1: q \[1, 1, 6, 8\]"),
        ("tokens", r"(?s)do not agree.*ranks 0, 2: q \[1, 1, 4, 8\].*rank 1: q \[1, 2, 4, 8\]"),
        ("window", "(?s)do not agree.*rank 1: .*window 3"),
        ("block", "(?s)do not agree.*rank 1: .*blocks of 4"),
        ("missed", "cache lengths of the ranks do not match: rank 1 holds a context of 5 tokens, rank 0 of 6"),
    ],
)
def test_ranks_that_disagree_are_named(what: str, message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        run_ranks(3, lambda c: disagree(c, what), timeout=20)


def on_gloo(rank: int, world: int, case: Case) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    from distattn.parallel.comm_process import ProcessCommunicator

    communicator = ProcessCommunicator(timeout=60)
    first, second = decode(communicator, case), decode(communicator, case)
    communicator.close()
    same = all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    return first, same


def test_processes_equal_dense_attention(gloo: Any) -> None:
    for case in (Case(batch=2, sinks=True), dataclasses.replace(LLAMA, steps=(1, 2), devices=2)):
        found = gloo(4).run(on_gloo, case)
        for step, wanted in enumerate(expected(case)):
            for rank, same in found:
                assert same and all(torch.equal(a, b) for a, b in zip(rank[step], found[0][0][step], strict=True))
            assert all(error(a, b) < 1e-6 for a, b in zip(found[0][0][step], wanted, strict=True))
