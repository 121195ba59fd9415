"""plan.py: the table, its files, and what it refuses."""

from __future__ import annotations

import json

import pytest

from distattn.launch.plan import main, tokens

WORDS = ["--world", "16", "--cluster", "l40s", "--heads", "8:2", "--head-dim", "64"]


def test_a_choice_with_its_table_and_files(tmp_path, capsys):
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "png", "trace")}
    words = [*WORDS, "--seq-len", "16k", "--all", "--top", "5"]
    assert main([*words, *(str(x) for name, path in files.items() for x in (f"--{name}", path))]) == 0
    said = capsys.readouterr().out
    found = json.loads(files["json"].read_text())
    best = found["best"]
    assert f"parallel.schedule={best['schedule']}" in said and "more candidates: --top 0 shows all" in said
    prices = [c["price"]["forward"] + c["price"]["backward"] for c in found["candidates"]]
    assert (
        found["candidates"][0]["strategy"] == best
        and prices[0] == min(prices)
        and "1.000 x" not in found["candidates"][0]["refused"]
    )
    trace = json.loads(files["trace"].read_text())
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert events and all({"pid", "tid", "ts", "dur", "name"} <= set(e) for e in events)
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_lengths_from_a_file(tmp_path, capsys):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("300\n212\n512\n")
    assert main([*WORDS, "--seq-len", "1k", "--lengths", str(lengths)]) == 0
    assert "documents" in capsys.readouterr().out
    assert main([*WORDS, "--seq-len", "2k", "--lengths", str(lengths)]) == 2
    assert "documents of 1024 tokens in all, --seq-len is 2048" in capsys.readouterr().err
    lengths.write_text("300\nmany\n")
    assert main([*WORDS, "--seq-len", "1k", "--lengths", str(lengths)]) == 2
    assert "must hold whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cluster", "h20"], "h20"),
        (["--heads", "8"], "not of the form"),
        (["--heads", "8:3"], "multiple of key heads"),
        (["--head-dim", "0"], "--head-dim 0"),
        (["--mask", "casual"], "Did you mean causal"),
        (["--world", "12"], "do not fill nodes"),
        (["--memory", "1e-9"], "No schedule fits"),
    ],
)
def test_what_cannot_be_is_said(words, text, capsys):
    assert main([*WORDS, "--seq-len", "1k", *words]) == 2
    assert text in capsys.readouterr().err


def test_numbers_of_tokens():
    assert [tokens(t) for t in ("64k", "1M", "1.5k", "65536")] == [65536, 1 << 20, 1536, 65536]
    for wrong in ("many", "", "0", "1.3"):
        with pytest.raises(Exception, match="tokens"):
            tokens(wrong)
