from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distattn.attention import ContextParallel
from distattn.launch.bench_attention import main, make_problem, parse
from distattn.launch.bench_attention_cost import Idle, Silent, flatness, memory, seconds_a_pass
from distattn.launch.bench_attention_ranks import SCHEDULES, Ranks, RanksFailed, balance
from distattn.launch.bench_attention_single import Problem, Times, in_turns, ours, peers
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.mask import causal
from distattn.parallel.strategy import Strategy

ROOT = Path(__file__).parents[2]


def problem(tokens: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> Problem:
    return Problem(tokens, heads, kv_heads, head_dim, torch.float32, torch.device("cpu"))


def test_a_quick_run_has_every_part(tmp_path: Path) -> None:
    """In a process of its own, since it starts ranks and sets threads. Its times are not looked at."""
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    command = [sys.executable, str(ROOT / "launch" / "bench_attention.py"), "--quick", "--device", "cpu", *files]
    command += ["--seq-len", "200", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--repeat", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the times mean nothing" in done.stdout and "Made by: python launch/bench_attention.py --quick" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {(row["name"], row["backward"]) for row in found["single"]} == {
        (name, backward) for name in ("distattn", "PyTorch") for backward in (False, True)
    }
    assert {(row["schedule"], row["backward"]) for row in found["ranks"]} == {(s, b) for s in SCHEDULES for b in (False, True)}
    assert {row["schedule"]: round(row["bound"], 2) for row in found["ranks"]} == {"ring": 0.67, "zigzag": 1.0, "striped": 1.0}
    assert [row["world"] for row in found["overhead_per_stage"]] == [8, 2] and len(found["planning"]) == 2
    sizes = {(row["schedule"], row["laps"], row["world"]) for row in found["memory"]}
    assert sizes == {(s, laps, w) for s in SCHEDULES for laps in (1, 2) for w in range(1, 9)}
    assert all(len(row["times"]["seconds"]) == 1 for row in found["single"] + found["ranks"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_balance_of_work_is_the_closed_form() -> None:
    for world in (2, 4):
        n = 64 * world
        pairs, last = n * (n + 1) // 2, sum(range(n - 63, n + 1))
        assert balance("ring", problem(n), world) == pytest.approx(last * world / pairs)
        assert balance("zigzag", problem(n), world) == 1.0
        assert 1.0 < balance("striped", problem(n), world) < 1 + world / n * 2


@pytest.mark.parametrize(("schedule", "laps"), [*((schedule, 1) for schedule in SCHEDULES), ("zigzag", 2)])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_counted_bytes_are_those_of_a_run(schedule: str, laps: int, world: int) -> None:
    """Every tensor of a forward and backward pass on ranks as threads, on the rank that has the most."""
    tokens, one = 24, problem(24 * world)

    def rank(communicator) -> tuple[int, int]:
        cp = ContextParallel(schedule=Strategy(schedule, laps=laps), communicator=communicator)
        plan = cp.plan(causal(one.tokens))
        q, k, v, dout = (x[: plan.rows].clone().requires_grad_() for x in one.inputs())
        out, lse, kept = torch.ops.distattn.attention(q, k, v, None, plan.handle, 1.0, 0.0)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        # The operator hands out gradients in the dtype of the inputs, which here is the one they are summed up in.
        mine = sum(x.nbytes for x in (q, k, v, dout, out, lse, dq, dk, dv))
        return mine, kept.nbytes + sum(x.nbytes for x in cp._executors[1]._workspace.values())

    found = run_ranks(world, rank, timeout=60)
    [row] = [row for row in memory(one, tokens) if (row.schedule, row.laps, row.world) == (schedule, laps, world)]
    assert row.inputs + row.outputs == found[0][0]
    assert row.kept + row.workspace == max(foreign for _, foreign in found)


def test_a_rank_holds_no_more_in_a_larger_world() -> None:
    """Bytes do not grow with the world once the ring is as long as its buffers; in two laps that is from two ranks on."""
    rows = memory(problem(kv_heads=4, head_dim=64), 256)  # the benchmark's head size: in small ones lse and delta weigh more
    for schedule in ("zigzag", "striped"):
        assert flatness(rows, schedule, least=4) <= 1.01 and flatness(rows, f"{schedule}, 2 laps") <= 1.05
        for alone in (row for row in rows if row.schedule == schedule and row.world == 1):
            assert alone.kept == alone.workspace == alone.stated == 0


def test_overhead_is_measured_without_kernels_and_messages() -> None:
    forward, backward, stages = seconds_a_pass(Silent(1, 8), 8 * 16, problem(), repeat=2)
    assert stages == 8 and forward > 0 and backward > 0
    q, k, v, _ = problem().inputs()
    assert not Idle().forward(q, k, v, causal(64).bands, None).o.any()  # type: ignore[arg-type]


def test_both_contenders_compute_the_same() -> None:
    one = problem()
    q, k, v, _ = one.inputs()
    cp = ContextParallel()
    found = cp.attention(q, k, v, cp.plan(causal(one.tokens)))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found, want[0].transpose(0, 1))
    for backward in (False, True):
        for work in (ours(one, backward, None), *peers(one, backward).values()):
            assert work() is None


def test_rounds_take_turns_and_the_first_does_not_count() -> None:
    order: list[str] = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = in_turns(torch.device("cpu"), contenders, repeat=2)
    assert order == ["a", "b"] * 3 and len(times["a"].seconds) == 2
    assert Times([1.0, 2.0, 4.0]).median == 2.0 and Times([1.0, 2.0, 4.0]).spread == 1.5


@pytest.mark.slow
def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(RanksFailed, match=r"Rank \d failed: AttributeError"), Ranks(2, problem(), None, 60) as ranks:
        ranks.run("dance")


def test_a_rank_that_hangs_is_named_and_gone() -> None:
    with pytest.raises(RanksFailed, match="did not answer within 0.01 s"), Ranks(1, problem(), None, 60) as ranks:
        ranks.timeout = 0.01
        ranks.run("idle_stages", 4096, 10**6)
    assert not [p for p in multiprocessing.active_children() if p in ranks.processes]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-len", "0"], "--seq-len 0 was asked for"),
        (["--heads", "8", "--kv-heads", "3"], "Pass --kv-heads that divides --heads"),
        (["--repeat", "-1"], "Pass 1 or more"),
        (["--timeout", "0"], "Pass seconds above 0"),
        (["--json", "nowhere/bench.json"], "there is no folder"),
        (["--plot", "nowhere/bench.png"], "there is no folder"),
    ],
)
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_missing_gpu_and_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "Use --device cpu" in capsys.readouterr().err
    made = make_problem(parse([]))
    assert (made.tokens, made.heads, made.kv_heads, made.head_dim, made.dtype) == (16384, 8, 8, 64, torch.float32)
