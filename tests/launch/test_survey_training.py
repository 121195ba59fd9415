"""survey_training.py: packing, steps, bounds that hold, files."""

from __future__ import annotations

import json

import pytest

from distattn.launch import survey_training_report as report
from distattn.launch.survey_training import main
from distattn.launch.training_mix import MIXES, mix
from distattn.launch.training_step import DENSE_EFFICIENCY, MODELS, dense_seconds, step_of
from distattn.launch.training_ways import Batch, Machines, Survey, dealt, moving, published_rivals, rivals
from distattn.parallel.cluster import load_cluster
from distattn.parallel.plan import Plan
from distattn.parallel.verify import verify

H200 = load_cluster("h200")
SMALL = ["--worlds", "16", "--each", "4096", "--longest", "32", "--models", "8b", "--seeds", "1"]


@pytest.mark.parametrize("name", MIXES)
def test_mixes_fill_a_step_from_a_seed(name):
    lengths = mix(name, 1 << 18, 1 << 16, seed=3)
    assert sum(lengths) == 1 << 18 and min(lengths) >= 1 and max(lengths) <= 1 << 16
    assert lengths == mix(name, 1 << 18, 1 << 16, seed=3) != mix(name, 1 << 18, 1 << 16, seed=4)


def test_prolong_has_its_shares_of_tokens():
    lengths = mix("prolong", 1 << 26, 1 << 17, seed=0)
    share = sum(n for n in lengths if n == 1 << 17) / sum(lengths), sum(n for n in lengths if n < 1 << 14) / sum(lengths)
    assert share == pytest.approx((0.3, 0.4), abs=0.04)


def test_mixes_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="There is no mix 'web'. Use pretrain or prolong"):
        mix("web", 1 << 20, 1 << 17, 0)
    with pytest.raises(ValueError, match="Longest documents of 131072 tokens in steps of 65536"):
        mix("prolong", 1 << 16, 1 << 17, 0)


@pytest.mark.parametrize("slack", (0.02, 0.25))
def test_documents_are_dealt_whole_and_within_the_slack(slack):
    lengths = mix("prolong", 1 << 19, 1 << 16, seed=1)
    groups = dealt(lengths, 4, slack, per_pair=1e-9, per_token=1e-6)
    assert sorted(n for group in groups for n in group) == sorted(lengths)
    assert max(map(sum, groups)) <= (1 + slack) * sum(lengths) / 4
    work = [sum(n * (n + 1) / 2 for n in group) for group in groups]
    in_order = [sum(n * (n + 1) / 2 for n in lengths[i::4]) for i in range(4)]
    assert max(work) < max(in_order)


def test_a_document_that_fits_no_group_goes_where_most_room_is():
    assert dealt([100, 10, 10], 2, 0.0, 1.0, 0.0) == [[100], [10, 10]]


def test_a_step_adds_up():
    model = MODELS["8b"]
    forward, backward = dense_seconds(model, 4096, H200)
    weights = 4096 * 128 * (64 + 16) + 3 * 4096 * 14336
    assert forward == pytest.approx(2 * weights * 4096 / (740e12 * DENSE_EFFICIENCY)) and backward == 2 * forward
    assert dense_seconds(MODELS["34b"], 4096, H200)[1] == pytest.approx(3 * dense_seconds(MODELS["34b"], 4096, H200)[0])
    step = step_of(model, H200, 64, 4096, (0.01, 0.02))
    assert step.dense == pytest.approx(32 * 3 * forward) and step.attention == pytest.approx(32 * 0.03)
    short = step_of(model, H200, 64, 16, (0.0, 0.0))  # too short to hide weights
    assert short.weights > step.weights and step.seconds == pytest.approx(sum(vars(step).values()))


@pytest.mark.parametrize(("tensor", "seed"), [(1, 0), (1, 1), (8, 0)])
def test_no_way_is_faster_than_its_bound_nor_than_perfect_balance(tensor, seed):
    batch = Batch(mix("prolong", 16 * 4096, 32768, seed), 16, 4096)
    survey = Survey(batch, MODELS["8b"], Machines(H200, tensor))
    ways = [*rivals(survey), *published_rivals(survey), *moving(survey)]
    kinds = {way.kind for way in ways}
    assert {"ring", "zigzag", "gather", "document zigzag", "disaggregate"} <= kinds
    assert ("Ulysses, disaggregate" in kinds) == (tensor == 1)
    for way in ways:
        found = survey.price(way)
        assert survey.bound(way) <= found.step.seconds * 1.0001, way
        if way.slack is None:
            assert survey.perfect.seconds <= found.step.seconds, way
        for plan in (phase for call in survey._calls(survey.documents_of(way), way) for phase in call if isinstance(phase, Plan)):
            verify(plan)
    assert {way.halves for way in moving(survey)} == {True, False} and not any(way.waits for way in moving(survey))
    best = survey.best(ways)
    assert best is not None and best.step.seconds == min(survey.price(way).step.seconds for way in ways)


def test_the_program_writes_its_files(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--grid", "--mixes", "prolong", *SMALL]) == 0
    said = capsys.readouterr().out
    [record] = json.loads((tmp_path / "grid.json").read_text())
    ways = record["seeds"][0]["ways"]
    assert all(way["over_perfect"] >= 0.99 for way in ways.values())
    assert (tmp_path / "grid.md").read_text() in said and "| 8b | 16 | prolong | 32k |" in said
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    gain = min(ways[k]["over_perfect"] for k in report.STAY) / min(ways[k]["over_perfect"] for k in report.MOVED)
    assert f"| {gain:.2f} |" in said


def test_published_ratios_stand_beside_simulated_ones():
    kinds = report.PACKED
    row = {
        "model": "8b",
        "mix": "prolong",
        "published": [0.97, 1.63],
        "ratio": dict.fromkeys(kinds, 1.2),
        "hidden": dict.fromkeys(kinds, 1.5),
    }
    text = report.published_table([row, {**row, "ratio": {**row["ratio"], kinds[0]: 1.4}}])
    first, second = "1.20 to 1.40 (1.30) | 1.50 to 1.50 (1.50)", "1.20 to 1.20 (1.20) | 1.50 to 1.50 (1.50)"
    assert f"| 8b prolong | {first} | {second} | 0.97 to 1.63 |" in text


def test_what_cannot_be_is_refused(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--models", "70b"]) == 2
    assert "There is no model '70b'. Use 8b or 34b." in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--seeds", "0"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err
