from __future__ import annotations

from pathlib import Path

import pytest

from distattn.config import BACKENDS, SCHEDULES, Config, ParallelConfig, check, check_shares, check_speeds, describe, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  path: somewhere\nmodel:\n  dim: 64\ntrain:\n  steps: 20\n  warmup_steps: 2\n")
    return path


def test_the_file_is_read_and_words_come_after_it(file: Path) -> None:
    config = load_config(file, ["train.steps=30", "train.learning_rate=1e-3", "model.zero_attention=true"])
    assert isinstance(config, Config)
    assert (config.model.dim, config.train.steps, config.train.learning_rate) == (64, 30, 1e-3)
    assert config.model.zero_attention is True
    assert config.train.warmup_steps == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stesp=3", "Did you mean 'train.steps'"),
        ("model.steps=3", "Did you mean 'train.steps'"),
        ("trian.steps=3", "Did you mean 'train'"),
        ("data.sequence_lenght=9", "Did you mean 'data.sequence_length'"),
        ("flux=1", "--help lists the keys|See --help"),
        ("train.steps=many", "train.steps must be of type int"),
        ("train.steps=2.5", "train.steps must be of type int"),
        ("train.autocast=perhaps", "train.autocast must be of type bool"),
        ("train=3", "train is a section"),
        ("train.steps", "written key=value"),
        ("--fast", "written key=value"),
        ("out=[1", "not readable as YAML"),
        ("parallel.schedule=zigzga", "Did you mean 'zigzag'"),
        ("parallel.schedule=auto", "Set parallel.cluster"),
        ("parallel.layout=zigzga", "Did you mean 'zigzag'"),
        ("parallel.ulysses=0", "at least 1"),
        ("parallel.ulysses=3", "does not divide"),
        ("parallel.rotate=k", "parallel.rotate"),
        ("parallel.tolerance=0.1", "parallel.tolerance=0.1 is for disaggregate; zigzag has no use for it"),
        ("parallel.smallest=1", "parallel.smallest=1 is for disaggregate"),
        ("parallel.cluster=h200", "parallel.cluster=h200 is read by disaggregate and auto; zigzag has no use for it"),
        ("parallel.speeds=equl", "Did you mean 'equal'"),
        ("parallel.speeds=2", "neither equal nor measure nor a list of positive numbers"),
        ("parallel.speeds=[1,-1]", "neither equal nor measure nor a list of positive numbers"),
        ("parallel.speeds=[1,fast]", "neither equal nor measure nor a list of positive numbers"),
        ("parallel.speeds=[1,2]", "of use to disaggregate only: zigzag gives ranks their work whatever their speed"),
        ("data.workers=2", "must be 1, or 0"),
        ("parallel.stages=2", "stages is an option of gather, disaggregate; zigzag has none. Leave it out."),
        ("parallel.hops=2", "hops is an option of disaggregate; zigzag has none. Leave it out."),
        ("parallel.in_flight=2", "in_flight is an option of tree; zigzag has none"),
        ("parallel.layout=striped", "ask for schedule 'ring'"),
        ("parallel.backend=tritn", "Did you mean 'triton'"),
        ("model.dtype=float31", "Did you mean 'float32'"),
        ("model.kv_heads=3", "model.kv_heads=2"),
        ("model.dim=66", "not divisible by model.heads=4"),
        ("model.head_dim=7", "must be even"),
        ("train.warmup_steps=21", "longer than train.steps=20"),
        ("train.beta2=1", "less than 1"),
        ("train.final_learning_rate=2", "between 0 and 1"),
        ("train.steps=0", "at least 1"),
        ("train.steps=???", r"train.steps=\?\?\? says that its value is still missing. Give it one, or leave it out"),
        ("parallel.laps=-1", "parallel.laps"),
        ("data.held_out=1.5", "less than 1"),
        ("data.path=", "data.path is empty"),
        ("checkpoint.keep=0", "at least 1"),
        ("parallel.timeout=0", "positive"),
        ("parallel.timeout=1e30", "at most"),
        ("parallel.timeout=inf", "parallel.timeout=inf is not a finite number"),
        ("model.rope_theta=nan", "model.rope_theta=nan is not a finite number"),
        ("train.epsilon=-1", "train.epsilon=-1.0 must be at least 0"),
        ("compare=runs/nowhere/metrics.jsonl", "compare=runs/nowhere/metrics.jsonl is no file"),
        ("out=", "out is empty"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(file: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, [word])


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (["parallel.dp=3"], 4, "4 ranks cannot be split"),
        (["parallel.cp=2"], 4, "Use parallel.cp=4, or start 2 processes"),
        (["parallel.dp=2", "train.sequences_per_step=3"], 2, "train.sequences_per_step=2"),
        (["data.sequence_length=4"], 8, "cannot be spread over 8 ranks"),
    ],
)
def test_what_does_not_fit_the_number_of_ranks_is_refused(file: Path, words: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, words, world_size)


def test_a_missing_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean .*run.yaml"):
        load_config(file.with_name("rum.yaml"))


def test_a_file_with_an_unknown_key_is_named(file: Path) -> None:
    file.write_text(file.read_text() + "paralel:\n  cp: 2\n")
    with pytest.raises(ValueError, match=r"'paralel' in .*run.yaml. Did you mean 'parallel'"):
        load_config(file)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_files_in_configs_are_valid(path: Path, world_size: int) -> None:
    load_config(path, [], world_size)


def test_every_key_is_explained() -> None:
    keys = list(describe())
    assert len({name for name, _, _ in keys}) == len(keys) > 40
    assert all(doc and not doc.endswith(".") for _, _, doc in keys)


def test_the_defaults_are_valid_but_for_the_data() -> None:
    config = Config()
    config.data.path = "somewhere"
    check(config, 1)


@pytest.mark.parametrize(("name", "value"), [("layout", "zigzag"), ("ulysses", 2), ("stages", 3), ("rotate", "q")])
def test_auto_leaves_nothing_to_choose(name: str, value: object) -> None:
    config = Config()
    config.data.path = "somewhere"
    config.parallel.schedule, config.parallel.cluster = "auto", "h100"
    check(config, 2)
    setattr(config.parallel, name, value)
    with pytest.raises(ValueError, match=f"parallel.{name}={value} is chosen by parallel.schedule=auto"):
        check(config, 2)


def test_the_cluster_of_auto_is_read_before_ranks_start() -> None:
    config = Config()
    config.data.path = "somewhere"
    config.parallel.schedule, config.parallel.cluster = "auto", "h10"
    with pytest.raises(ValueError, match="Did you mean 'h100'"):
        check(config, 2)


def test_schedules_are_those_that_there_are() -> None:
    from distattn.parallel.schedules import SCHEDULES as known

    assert sorted(SCHEDULES) == sorted([*known, "auto"])


def test_backends_are_those_that_there_are() -> None:
    from distattn.kernels import RANKING

    assert sorted(BACKENDS) == sorted(RANKING)


def test_what_a_disaggregation_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="parallel.node_devices=2 is not for disaggregate, .* set parallel.cluster"):
        check_shares(ParallelConfig("disaggregate", node_devices=2))
    for speeds in ("measure", [1, 0.5]):
        with pytest.raises(ValueError, match="of single ranks, but with parallel.ulysses=2 groups of them share their work"):
            check_shares(ParallelConfig("disaggregate", ulysses=2, speeds=speeds))
    with pytest.raises(ValueError, match="parallel.hops=3 .* Set parallel.cluster to a name or a file, or parallel.hops=2"):
        check_shares(ParallelConfig("disaggregate", hops=3))
    check_shares(ParallelConfig("disaggregate", hops=3, cluster="h200"))
    check_shares(ParallelConfig("disaggregate", ulysses=2, tolerance=0.1))


def test_speeds_are_one_number_a_rank() -> None:
    check_speeds(ParallelConfig("disaggregate", speeds=[1, 1, 0.5, 1]), cp=4)
    check_speeds(ParallelConfig(speeds="measure"), cp=4)
    with pytest.raises(ValueError, match="has 2 numbers for the 4 ranks that share a sequence"):
        check_speeds(ParallelConfig("disaggregate", speeds=[1, 1]), cp=4)
    with pytest.raises(ValueError, match="less than 1/64 of the fastest"):
        check_speeds(ParallelConfig("disaggregate", speeds=[1, 0.01]), cp=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.servers=-1"], "parallel.servers=-1 must be at least 0"),
        (["parallel.servers=2"], "parallel.servers=2 needs a schedule that gives work to ranks without tokens, found .*=zigzag"),
        (["parallel.schedule=disaggregate", "parallel.servers=2", "parallel.keep=all"], "keep nothing between two calls"),
        (["parallel.schedule=disaggregate", "parallel.servers=2", "train.device=cuda"], "reached over gloo, .* train.device=cpu"),
        (["parallel.schedule=disaggregate", "parallel.servers=2", "parallel.ulysses=2"], "found parallel.ulysses=2"),
        (["parallel.schedule=disaggregate", "parallel.servers=2", "parallel.dp=2"], "found parallel.dp=2"),
        (["parallel.pool_store=node1"], "parallel.pool_store='node1' is no address. Write host:port"),
        (["parallel.pool_store=node1:99999"], "is no address"),
        (["parallel.schedule=disaggregate", "parallel.servers=2", "parallel.speeds=measure"], "found parallel.speeds=measure"),
        (
            ["parallel.schedule=disaggregate", "parallel.servers=2", "parallel.nano_batches=2", "train.sequences_per_step=2"],
            "found parallel.nano_batches=2",
        ),
    ],
)
def test_pools_that_cannot_be_are_refused_before_anything_starts(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, words, 4)
