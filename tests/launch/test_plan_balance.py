"""plan.py --balance: figures of work before and after, and their picture."""

from __future__ import annotations

import json

import pytest

from distattn.launch.plan import main

WORDS = ["--cluster", "h200", "--heads", "64:8", "--balance"]


def test_figures_and_bars(tmp_path, capsys):
    files = {name: tmp_path / f"balance.{name}" for name in ("json", "png")}
    words = ["--seq-len", "64k", "--world", "4", "--mask", f"documents:{1 << 14},{','.join(['2048'] * 24)}"]
    assert main([*WORDS, *words, *(str(x) for name, path in files.items() for x in (f"--{name}", path))]) == 0
    said = capsys.readouterr().out
    found = json.loads(files["json"].read_text())
    pairs = (1 << 14) * ((1 << 14) + 1) // 2, 8 * 2048 * 2049 // 2
    assert found["by_rank"]["before"] == [pairs[0], *[pairs[1]] * 3]
    assert sum(found["by_rank"]["after"]) == pairs[0] + 3 * pairs[1]
    assert found["before_max_over_mean"] == pytest.approx(pairs[0] / (pairs[0] + 3 * pairs[1]) * 4)
    assert found["after_max_over_mean"] < 1.3 and f"{found['after_max_over_mean']:.3f} disaggregated" in said
    rows = found["by_rank"]["keys"], found["by_rank"]["queries"]
    assert found["key_rows"] == sum(rows[0]) and found["query_rows"] == sum(rows[1]) > 0 == rows[1][0]
    assert found["traffic_units_a_token"] == pytest.approx((found["key_rows"] + 8 * found["query_rows"]) / 65536)
    assert files["png"].read_bytes().startswith(b"\x89PNG") and "planning:" in said


def test_lengths_of_a_kind_and_groups_that_trade_heads(capsys):
    assert main([*WORDS, "--seq-len", "128k", "--world", "16", "--documents", "giant", "--seed", "2", "--ulysses", "8"]) == 0
    said = capsys.readouterr().out
    assert "16 ranks (2 groups of 8 that trade heads)" in said and "busiest receiver" in said


def test_what_cannot_be_is_refused(capsys):
    words = [*WORDS, "--seq-len", "64k", "--world", "8"]
    assert main([*words, "--documents", "heavy"]) == 2
    assert "Did you mean heavy_tail?" in capsys.readouterr().err
    assert main([*words, "--trace", "x.json"]) == 2
    assert "leave --trace and --all out" in capsys.readouterr().err
    assert main([*words, "--ulysses", "3"]) == 2
    assert "ulysses=3 does not divide" in capsys.readouterr().err
