"""survey.py: a quick grid with its files, what goes on after an interruption, published ratios against arithmetic."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from distattn.launch import survey as surveying
from distattn.launch.survey import Case, grid, main, reason, run_grid, whole_lines
from distattn.launch.survey_claims import SHAPE, balance_claim, decode_seconds, double_ring_claim, table
from distattn.launch.survey_regret import TRUTHS, regrets, with_bandwidth
from distattn.launch.survey_report import family, sentences, summary
from distattn.parallel.cluster import load_cluster
from distattn.parallel.price import price
from distattn.parallel.schedule import make_schedule
from distattn.parallel.shape import Shape
from distattn.parallel.strategy import Strategy


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder with a quick grid in it."""
    out = tmp_path_factory.mktemp("survey")
    assert main(["--out", str(out), "--quick", "--grid"]) == 0
    return out


def test_a_quick_grid_with_its_files(quick):
    records = whole_lines(quick / "cases.jsonl")
    assert len(records) == len(grid(True)) and {r["mask"] for r in records} == set(surveying.MASKS)
    for record in records:
        case = Case(**{name: record[name] for name in Case.__dataclass_fields__})
        strategy, mask = Strategy(**{**record["strategy"], "balance": None}), case.make_mask()
        assert make_schedule(strategy, mask, case.world).world == case.world
        assert record["simulated"] and 0 <= record["exposed_share"] < 1
        assert record["kinds"][record["kind"]] == record["seconds"]
        assert min(record["kinds"].values()) >= 0.98 * record["seconds"]  # auto does not look at less than 2%
        area = {"causal": case.tokens * (case.tokens + 1) // 2, "full": case.tokens**2}.get(case.mask, record["area"])
        shape = case.shape()
        flops = 14 * shape.heads * area * shape.d  # 4 forward, 10 backward
        assert record["tflops"] == pytest.approx(flops / record["seconds"] / case.world / 1e12)
        assert record["tflops"] < load_cluster(case.cluster).kernel.peak_tflops["bfloat16"]
    assert (quick / "survey.png").read_bytes().startswith(b"\x89PNG")
    text = (quick / "summary.md").read_text()
    assert "all simulated" in text and all(s in text for s in sentences(records))


def test_a_survey_goes_on_where_it_was_interrupted(quick, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cases.jsonl"
    lines = (quick / "cases.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while it wrote
    priced = []

    def price_two(case, cluster):
        if len(priced) == 2:
            raise KeyboardInterrupt
        priced.append(case)
        return next(r for r in map(json.loads, lines) if all(r[name] == getattr(case, name) for name in ("mask", "world")))

    monkeypatch.setattr(surveying, "survey_case", price_two)
    assert main(["--out", str(tmp_path), "--quick", "--grid"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert path.read_bytes() == b"".join(lines[:5]) and priced == grid(True)[3:5]
    assert "5 cases priced, 3 left out" in (tmp_path / "summary.md").read_text()
    monkeypatch.setattr(surveying, "digest", lambda cluster: "another description")
    priced.clear()
    records, skipped = run_grid(grid(True), path, 1, lambda *_: None)
    assert priced == grid(True)[:2] and len(records) == 2 and skipped == Counter({surveying.INTERRUPTED: 6})


def test_cases_that_cannot_be_are_counted(tmp_path):
    cases = [
        Case("h200", "32:8", "causal", 8, 16),
        Case("h200", "32:8", "causal", 8 << 10, 512),
        Case("h200", "32:8", "full", 8 << 20, 8192),
        Case("h200", "32:8", "documents", 1 << 20, 64),
    ]
    clusters = [load_cluster(c.cluster) for c in cases]
    assert [reason(case, cluster, 4096).split(",")[0] for case, cluster in zip(cases, clusters, strict=True)] == [
        "more ranks than tokens",
        "fewer than 128 tokens a rank",
        "more ranks than the cluster has",
        "more than 4096 documents x ranks",
    ]
    records, skipped = run_grid(cases, tmp_path / "cases.jsonl", 4096, lambda *_: None)
    assert not records and sum(skipped.values()) == 4 and "left out, 1: more ranks than tokens" in summary(records, skipped)


def test_documents_are_those_that_are_stated():
    mask = Case("h200", "32:8", "documents", 4 << 20, 8).make_mask()
    assert mask.lengths is not None and sum(mask.lengths) == 4 << 20 == mask.n_tokens
    logs = [math.log(length) for length in mask.lengths[:-1]]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    assert spread == pytest.approx(1.0, abs=0.08)  # three standard errors of some 1000 samples
    assert mean + spread**2 / 2 == pytest.approx(math.log(4096), abs=0.12)
    assert Case("a100", "64:8", "documents", 4 << 20, 2).make_mask() == mask


def test_balance_ratios_are_those_of_the_last_ranks_work():
    """2 - 1/P of work; 3%: what is left to diagonal tiles, launches and links."""
    for schedule in ("zigzag", "striped"):
        claim = balance_claim("h200", schedule, 4 << 20, 4, (32, 32, 128), "")
        assert claim.bound == 1.75 and claim.ratio == pytest.approx(1.75, rel=0.03)
        assert claim.ratio == claim.slow / claim.fast and f"{claim.ratio:.2f} | 1.75" in table([claim])


def test_a_double_ring_wins_where_network_links_bind_and_only_there():
    """A single ring waits for one rail at every hop; the double ring loads all of them, once a node."""
    bound = double_ring_claim("h200", 64 << 10, 64)
    free = double_ring_claim("h200", 2 << 20, 64)
    assert bound.ratio > 1.5 and free.ratio == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("name", ["h200", "l40s"])
def test_decode_is_hops_of_shards_against_one_small_exchange(name):
    import torch

    cluster, shape = load_cluster(name), Shape(*SHAPE, SHAPE[2], torch.bfloat16)
    shard = (1 << 20) // 8 * 2 * 8 * 128 * 2  # keys and values of a rank, bytes
    assert 7 * shard == pytest.approx(3.76e9, rel=0.001)  # what the tree's paper says of the ring
    link = min(cluster.inside.port_gb_s, cluster.inside.shared_gb_s or math.inf) * 1e9
    read = shard / cluster.kernel.forward.memory_gb_s / 1e9
    tree, ring = decode_seconds(cluster, shape, 1 << 20, 8)
    assert ring == pytest.approx(read + 7 * max(read, shard / link), rel=0.05)
    assert read < tree < read + 1e-3 and ring / tree > 8
    across = decode_seconds(cluster, shape, 1 << 20, 16)
    assert across[0] < tree + 1e-3 and across[1] > ring / 2
    with pytest.raises(ValueError, match="do not fill nodes"):
        decode_seconds(cluster, shape, 1 << 20, 12)


def test_regret_is_that_of_the_shipped_choice_on_other_links():
    found = regrets(True, lambda *_: None)
    assert len(found) == len(TRUTHS) and all(0 <= f["regret"] < 5 for f in found)
    assert all(f["regret"] == 0 for f in found if f["choice"] == f["best"])
    cluster = load_cluster("l40s")
    slow = with_bandwidth(cluster, "all", 0.5)
    assert slow.inside.shared_gb_s == 40 and slow.inside.port_gb_s == 11 and slow.between.nic_gb_s == 11
    assert slow.inside.latency_us == cluster.inside.latency_us and slow.kernel == cluster.kernel
    case = Case("l40s", "32:8", "causal", 32 << 10, 16)
    seconds = [price(Strategy("zigzag", devices=8), case.make_mask(), 16, case.shape(), c).seconds for c in (cluster, slow)]
    assert seconds[1] > 1.2 * seconds[0]


def test_families():
    record = {"kind": "hybrid", "strategy": {"schedule": "zigzag"}}
    assert family(record) == "ulysses x zigzag" and family({**record, "kind": "ring"}) == "ring"
    assert surveying.described(Strategy("gather", "zigzag", ulysses=4), 8) == "ulysses 4 x gather zigzag"
    assert surveying.described(Strategy("zigzag", ulysses=8), 8) == "ulysses"
