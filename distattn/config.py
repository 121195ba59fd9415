"""The configuration of a training run: what can be set, what each key means, and what is refused.

A run is one YAML file plus ``key=value`` words. Everything that can be found wrong without touching a device is found
here, before any process group starts: unknown keys, wrong types, names that do not exist, numbers that do not fit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from distattn.parallel.strategy import Rotate, Strategy
    from distattn.parallel.transpose import Keep

SCHEDULES = ("ring", "zigzag", "striped", "double_ring", "gather", "tree", "disaggregate", "auto")
TAKE_SPEEDS = ("disaggregate",)  # schedules that share out work by the speeds of the ranks
SHARES = ("tolerance", "receive_rows", "smallest")  # keys that say how they do it
SPEEDS = ("equal", "measure")
SLOWEST = 1 / 64  # of the fastest rank; slower ones are of no use
POOLED = ("disaggregate",)  # schedules that give work to servers
LAYOUTS = ("contiguous", "zigzag", "striped")
ROTATE = ("auto", "kv", "q")
KEEP = ("last", "all", "none")
DTYPES = ("float32", "float64", "bfloat16")
BACKENDS = ("gluon", "gluon_ordered", "gluon_fused", "cudnn", "flash", "triton", "aten", "reference")
DEVICES = ("auto", "cpu", "cuda")
LONGEST_TIMEOUT = 31_536_000  # clocks of process groups overflow somewhere above
CHECKPOINTING = ("none", "full", "selective")


def key(default: Any, doc: str) -> Any:
    """A configuration key with its one-line explanation, which ``--help`` prints."""
    return field(default=default, metadata={"doc": doc})


@dataclass
class ModelConfig:
    vocab_size: int = key(256, "number of tokens; 256 for bytes")
    dim: int = key(256, "width of the residual stream")
    layers: int = key(4, "number of blocks")
    heads: int = key(4, "query heads")
    kv_heads: int = key(4, "key heads; divides heads (fewer key heads than query heads is GQA)")
    head_dim: int = key(0, "width of a head; 0 means dim / heads")
    hidden_dim: int = key(768, "width of the SwiGLU layer")
    rope_theta: float = key(10000.0, "base of the rotary angles")
    norm_eps: float = key(1e-5, "added to the mean square in RMSNorm")
    tie_head: bool = key(False, "the output head is the embedding")
    zero_attention: bool = key(False, "control run: what attention returns is multiplied by zero")
    dtype: str = key("float32", f"of the parameters: {', '.join(DTYPES)}")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.heads


@dataclass
class DataConfig:
    path: str = key("", "folder with tokens.bin, documents.bin and meta.json (made by prepare)")
    source: str = key("", "what to prepare where path is missing: 'stdlib' (Python's own source), a text file or a folder")
    tokenizer: str = key("byte", "for source: 'byte' or a tokenizers JSON file")
    sequence_length: int = key(4096, "tokens in one packed sequence, over all ranks that share it")
    longest_document: int = key(0, "documents of more tokens are cut into parts of this many, each its own document; 0 does not")
    held_out: float = key(0.02, "part of the documents that is never trained on, but evaluated")
    seed: int = key(0, "of the order of the documents and of the choice of those held out")
    workers: int = key(
        1, "processes beside each rank that read and plan the next sequences while a step runs; 0 does it in the step"
    )
    verify: bool = key(True, "compare the checksum of the token file before training (reads it once)")


@dataclass
class TrainConfig:
    steps: int = key(1000, "optimizer steps")
    sequences_per_step: int = key(1, "sequences in one optimizer step; what the data axis does not hold is accumulated")
    learning_rate: float = key(3e-4, "the highest, reached after the warm-up")
    final_learning_rate: float = key(0.1, "the last, as part of learning_rate (cosine in between)")
    warmup_steps: int = key(100, "steps of linear warm-up")
    weight_decay: float = key(0.1, "of matrices; vectors are not decayed")
    beta1: float = key(0.9, "AdamW, first moment")
    beta2: float = key(0.95, "AdamW, second moment")
    epsilon: float = key(1e-8, "AdamW, added to the root of the second moment")
    clip_norm: float = key(1.0, "gradients longer than this are shortened to it; 0 does not clip")
    seed: int = key(0, "of the initial parameters; the same parameters on any number of ranks")
    device: str = key("auto", f"one of {', '.join(DEVICES)}; auto takes GPUs where there are any")
    autocast: bool = key(True, "bfloat16 autocast, on GPUs only")
    loss_rows: int = key(2048, "rows whose logits exist at one time; 0 means all of them")
    fused_loss: bool = key(False, "liger-kernel's fused cross entropy (GPU only, an optional package)")
    log_every: int = key(1, "steps between progress lines")
    eval_every: int = key(0, "steps between evaluations; 0 evaluates at the end only")
    eval_sequences: int = key(4, "held-out sequences of one evaluation; 0 never evaluates")
    tensorboard: bool = key(False, "write TensorBoard files too")


@dataclass
class ParallelConfig:
    schedule: str = key("zigzag", f"how attention is spread over ranks: {', '.join(SCHEDULES)}")
    cluster: str = key("", "description of the machines, for auto and disaggregate: a100, h100, h200, l40s, gloo2 or a file")
    layout: str = key("", f"which rank holds which tokens: {', '.join(LAYOUTS)}; empty is the schedule's own")
    ulysses: int = key(1, "neighbouring ranks that exchange heads for tokens around the schedule")
    node_devices: int = key(0, "ranks of a sequence in one node, for double_ring and tree; 0 means all of them")
    stages: int = key(0, "parts in which gather receives and disaggregate works for others; 0 is the schedule's own choice")
    in_flight: int = key(0, "owners whose queries travel at once in a tree; 0 is its own choice")
    rotate: str = key("auto", f"what travels in the backward pass of a ring: {', '.join(ROTATE)} (auto: fewer bytes)")
    laps: int = key(0, "rounds of a ring, each with its part of every shard: 2 halve its memory; 0 is its own choice, 1")
    hops: int = key(
        0,
        "disaggregate: 1 sends rows straight, 2 lets ranks that need the same rows pass them on, 3 to each node once; 0 chooses",
    )
    servers: int = key(0, "attention servers to wait for, beside these ranks (distattn-serve-attention); more may join later")
    pool_store: str = key(
        "auto", "host:port at which rank 0 lets servers join; auto: this host, any free port (see out/pool_store)"
    )
    keep: str = key("last", f"received keys that stay until the backward pass: {', '.join(KEEP)}")
    smallest: int = key(128, "query rows of a piece that disaggregate takes off its rank, unless its document is shorter")
    tolerance: float = key(0.0, "a rank's work above its share that disaggregate may leave, 0.02 is 2%; 0 is its own choice")
    receive_rows: int = key(0, "rows of others that a rank may receive for disaggregate; 0 is any number")
    speeds: Any = key("equal", "of the ranks: equal, measure (over the last steps), or one number a rank, [1, 1, 0.5, 1]")
    cp: int = key(0, "ranks that share one sequence; 0 means all that dp leaves")
    dp: int = key(1, "groups of ranks with sequences of their own")
    nano_batches: int = key(
        1, "sequences that take each layer side by side, so that one computes while another's attention travels"
    )
    backend: str = key("", f"attention kernel: {', '.join(BACKENDS)}; empty takes the fastest that can")
    checkpointing: str = key("none", f"what backward computes again: {', '.join(CHECKPOINTING)} (selective: all but attention)")
    compile: bool = key(False, "torch.compile each block")
    gather_dtype: str = key("", f"FSDP gathers parameters in this dtype ({', '.join(DTYPES)}); empty keeps theirs")
    timeout: float = key(600.0, "seconds that a rank waits for another before the run ends with an error")


@dataclass
class CheckpointConfig:
    every: int = key(0, "steps between checkpoints; 0 saves at the end only")
    keep: int = key(2, "whole checkpoints kept; older ones are removed")
    resume: bool = key(True, "go on from the newest whole checkpoint in out")


@dataclass
class Config:
    out: str = key("runs/run", "folder for checkpoints, metrics and the plot")
    compare: str = key("", "metrics.jsonl of another run, drawn into the plot")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def describe(section: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key as (dotted name, default, explanation), in the order of the dataclasses."""
    section = Config() if section is None else section
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from describe(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, f.metadata["doc"]


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """The configuration in ``path`` with ``key=value`` words over it, checked for ``world_size`` ranks.

    Raises ValueError that names the key, what was found and the nearest valid name or value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    for origin, part in [(str(path), _read_yaml(Path(path)))] + [(word, _read_word(word)) for word in overrides]:
        _refuse_missing(part, origin)
        _refuse_unknown(part, origin)
        try:
            merged = OmegaConf.merge(merged, part)
        except OmegaConfBaseException as error:
            raise ValueError(_type_message(error, origin)) from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config, world_size)
    return config


def _read_yaml(path: Path) -> Any:
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ValueError(f"No configuration file {path}." + (f" Did you mean {path.parent / near[0]}?" if near else ""))
    loaded = _parse(lambda: OmegaConf.load(path), str(path))
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} must hold keys and values, found a list. See --help for the keys.")
    return loaded


def _read_word(word: str) -> Any:
    from omegaconf import OmegaConf

    name, equals, value = word.partition("=")
    if not equals or not name or word.startswith("-"):
        raise ValueError(f"Cannot read {word!r}. Overrides are written key=value, for example train.steps=100.")
    word = word if value else f"{name}=''"  # nothing is an empty text, not YAML's null
    return _parse(lambda: OmegaConf.from_dotlist([word]), repr(word))


def _parse(load: Callable[[], Any], origin: str) -> Any:
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        return load()
    except (YAMLError, ValueError, OSError) as error:
        raise ValueError(f"{origin} is not readable as YAML: {error}") from None


def _refuse_missing(part: Any, origin: str, prefix: str = "") -> None:
    """``???`` is OmegaConf's word for a value that somebody is still to give."""
    from omegaconf import DictConfig, OmegaConf

    for name in part:
        if OmegaConf.is_missing(part, name):
            raise ValueError(f"{origin}: {prefix}{name}=??? says that its value is still missing. Give it one, or leave it out.")
        if isinstance(part[name], DictConfig):
            _refuse_missing(part[name], origin, f"{prefix}{name}.")


def _refuse_unknown(part: Any, origin: str) -> None:
    sections = {name: value for name, value in vars(Config()).items() if is_dataclass(value)}
    known = [name for name, _, _ in describe()]
    for name in part:
        if name not in sections and name not in known:
            raise ValueError(_unknown_message(str(name), origin, known + list(sections)))
        if name not in sections:
            continue
        if not hasattr(part[name], "keys"):
            raise ValueError(
                f"{origin}: {name} is a section, found {part[name]!r}. Set its keys, for example {_first(known, name)}."
            )
        for inner in part[name]:
            if f"{name}.{inner}" not in known:
                raise ValueError(_unknown_message(f"{name}.{inner}", origin, known))


def _first(known: list[str], section: str) -> str:
    return next(name for name in known if name.startswith(section + "."))


def _unknown_message(name: str, origin: str, known: list[str]) -> str:
    # The same last word in another section beats a similar spelling: 'model.steps' means 'train.steps'.
    tail = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == tail] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        tails = {k.rpartition(".")[2]: k for k in known}
        near = [tails[t] for t in difflib.get_close_matches(tail, tails, n=1)]
    return f"Unknown key {name!r} in {origin}." + (f" Did you mean {near[0]!r}?" if near else " See --help for the keys.")


def _type_message(error: Any, origin: str) -> str:
    name = getattr(error, "full_key", None) or "?"
    known = {k: default for k, default, _ in describe()}
    wanted = type(known[name]).__name__ if name in known else "another type"
    reason = str(error).splitlines()[0]
    return f"{origin}: {name} must be of type {wanted}. {reason}."


# Checks. Each function looks at one section and returns nothing or raises.


def check(config: Config, world_size: int) -> None:
    """Refuses combinations that cannot run on ``world_size`` ranks."""
    for name, value, _ in describe(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} is not a finite number.")
    check_model(config.model)
    check_data(config.data)
    check_train(config.train)
    check_parallel(config, world_size)
    _at_least("checkpoint.every", config.checkpoint.every, 0)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    if not config.out:
        raise ValueError("out is empty: name a folder for checkpoints, metrics and the plot, for example out=runs/first.")
    if config.compare and not Path(config.compare).is_file():
        raise ValueError(
            f"compare={config.compare} is no file. Name the metrics.jsonl of a run that is there, or leave it empty."
        )


def check_model(model: ModelConfig) -> None:
    for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "hidden_dim"):
        _at_least(f"model.{name}", getattr(model, name), 1)
    _one_of("model.dtype", model.dtype, DTYPES)
    if model.heads % model.kv_heads:
        fitting = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        near = min(fitting, key=lambda n: abs(n - model.kv_heads))
        raise ValueError(
            f"{model.heads} query heads cannot share {model.kv_heads} key heads: model.heads must be a multiple of "
            f"model.kv_heads. The nearest that fits is model.kv_heads={near}."
        )
    if model.head_dim == 0 and model.dim % model.heads:
        raise ValueError(
            f"model.dim={model.dim} is not divisible by model.heads={model.heads}. Change one of them, or set model.head_dim."
        )
    if model.head_width % 2 or model.head_width < 2:
        raise ValueError(f"A head is {model.head_width} wide; rotary positions turn pairs, so the width must be even.")
    if model.rope_theta <= 0 or model.norm_eps < 0:
        raise ValueError(
            f"model.rope_theta={model.rope_theta} must be positive and model.norm_eps={model.norm_eps} not negative."
        )


def check_data(data: DataConfig) -> None:
    _at_least("data.sequence_length", data.sequence_length, 2)
    _at_least("data.longest_document", data.longest_document or 2, 2)
    if data.workers not in (0, 1):
        raise ValueError(f"data.workers={data.workers} must be 1, or 0 to prepare sequences in the step that needs them.")
    if not data.path:
        raise ValueError("data.path is empty: name a folder made by prepare, or a new one together with data.source=stdlib.")
    if not 0 <= data.held_out < 1:
        raise ValueError(f"data.held_out={data.held_out} is a part of the documents: 0 or more, and less than 1.")


def check_train(train: TrainConfig) -> None:
    for name in ("steps", "sequences_per_step", "log_every"):
        _at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("warmup_steps", "eval_every", "eval_sequences", "loss_rows", "learning_rate", "weight_decay", "clip_norm"):
        _at_least(f"train.{name}", getattr(train, name), 0)
    _at_least("train.epsilon", train.epsilon, 0)
    _one_of("train.device", train.device, DEVICES)
    if train.warmup_steps > train.steps:
        raise ValueError(
            f"train.warmup_steps={train.warmup_steps} is longer than train.steps={train.steps}: the highest learning rate would "
            f"never be reached. Use train.warmup_steps={max(1, train.steps // 10)} or more steps."
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(train, name) < 1:
            raise ValueError(f"train.{name}={getattr(train, name)} must be at least 0 and less than 1.")
    if not 0 <= train.final_learning_rate <= 1:
        raise ValueError(
            f"train.final_learning_rate={train.final_learning_rate} is a part of train.learning_rate: between 0 and 1."
        )


def check_parallel(config: Config, world_size: int) -> None:
    from distattn.parallel.cluster import load_cluster  # brings torch, which --help does not need
    from distattn.parallel.schedules import checked_strategy

    parallel = config.parallel
    _one_of("parallel.schedule", parallel.schedule, SCHEDULES)
    if parallel.schedule == "auto" and not parallel.cluster:
        raise ValueError(
            "parallel.schedule=auto prices schedules on a described cluster. Set parallel.cluster to a name or to a file that "
            "launch/calibrate.py wrote."
        )
    if parallel.schedule == "auto":
        default = ParallelConfig()
        for name in ("layout", "ulysses", "node_devices", "stages", "in_flight", "rotate", "laps", "hops", *SHARES):
            if getattr(parallel, name) != getattr(default, name):
                raise ValueError(f"parallel.{name}={getattr(parallel, name)} is chosen by parallel.schedule=auto. Leave it out.")
    check_shares(parallel)
    _one_of("parallel.layout", parallel.layout, ("", *LAYOUTS))
    _one_of("parallel.rotate", parallel.rotate, ROTATE)
    _one_of("parallel.keep", parallel.keep, KEEP)
    _at_least("parallel.ulysses", parallel.ulysses, 1)
    check_pool(config)
    _at_least("parallel.smallest", parallel.smallest, 1)
    for name in ("node_devices", "stages", "in_flight", "laps", "hops", "tolerance", "receive_rows"):
        _at_least(f"parallel.{name}", getattr(parallel, name), 0)
    _one_of("parallel.backend", parallel.backend, ("", *BACKENDS))
    _one_of("parallel.checkpointing", parallel.checkpointing, CHECKPOINTING)
    _one_of("parallel.gather_dtype", parallel.gather_dtype, ("", *DTYPES))
    _at_least("parallel.dp", parallel.dp, 1)
    _at_least("parallel.cp", parallel.cp, 0)
    if not 0 < parallel.timeout <= LONGEST_TIMEOUT:
        raise ValueError(
            f"parallel.timeout={parallel.timeout} must be positive and at most {LONGEST_TIMEOUT} (a year): seconds a rank waits "
            "for another."
        )
    if world_size % parallel.dp:
        raise ValueError(f"{world_size} ranks cannot be split into parallel.dp={parallel.dp} groups of one size.")
    cp = context_ranks(config, world_size)
    if cp * parallel.dp != world_size:
        raise ValueError(
            f"parallel.dp={parallel.dp} times parallel.cp={cp} is {parallel.dp * cp}, but the run has {world_size} ranks. "
            f"Use parallel.cp={max(1, world_size // parallel.dp)}, or start {parallel.dp * cp} processes."
        )
    for name, degree in (("ulysses", parallel.ulysses), ("node_devices", parallel.node_devices or 1)):
        if cp % degree:
            raise ValueError(
                f"parallel.{name}={degree} does not divide the {cp} ranks that share a sequence. Use a divisor of {cp}."
            )
    check_speeds(parallel, cp)
    if parallel.schedule == "auto":
        load_cluster(parallel.cluster).check_world(cp)
    else:
        checked_strategy(strategy_of(parallel), cp)
    if parallel.ulysses > config.model.heads:
        raise ValueError(
            f"parallel.ulysses={parallel.ulysses} ranks cannot share model.heads={config.model.heads} query heads. "
            f"Use parallel.ulysses={config.model.heads} or less."
        )
    if config.train.sequences_per_step % parallel.dp:
        raise ValueError(
            f"train.sequences_per_step={config.train.sequences_per_step} is not divisible by parallel.dp={parallel.dp}: every "
            f"group takes the same number of sequences. Use train.sequences_per_step={parallel.dp}."
        )
    check_nano_batches(config)
    if config.data.sequence_length < cp:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length} tokens cannot be spread over {cp} ranks. Use longer sequences."
        )


def check_nano_batches(config: Config) -> None:
    parallel, sequences = config.parallel, config.train.sequences_per_step
    _at_least("parallel.nano_batches", parallel.nano_batches, 1)
    if sequences % (parallel.dp * parallel.nano_batches):
        raise ValueError(
            f"parallel.nano_batches={parallel.nano_batches} sequences take each layer side by side, but a step has "
            f"train.sequences_per_step={sequences} for parallel.dp={parallel.dp} groups. Use a multiple of "
            f"{parallel.dp * parallel.nano_batches} sequences (shorter ones, data.sequence_length, for the same tokens)."
        )


def check_shares(parallel: ParallelConfig) -> None:
    """What only a disaggregation takes is refused elsewhere, and what it does not take there."""
    default, schedule = ParallelConfig(), parallel.schedule
    for name in SHARES:
        if schedule not in (*TAKE_SPEEDS, "auto") and getattr(parallel, name) != getattr(default, name):
            raise ValueError(
                f"parallel.{name}={getattr(parallel, name)} is for {', '.join(TAKE_SPEEDS)}; {schedule} has no use for it. "
                "Leave it out."
            )
    if parallel.cluster and schedule not in (*TAKE_SPEEDS, "auto"):
        raise ValueError(
            f"parallel.cluster={parallel.cluster} is read by {', '.join(TAKE_SPEEDS)} and auto; {schedule} has no use for it. "
            "Leave it out."
        )
    if schedule not in TAKE_SPEEDS:
        return
    if parallel.node_devices:
        raise ValueError(
            f"parallel.node_devices={parallel.node_devices} is not for {schedule}, which takes nodes from a description: set "
            "parallel.cluster to a name or a file."
        )
    if parallel.hops == 3 and not parallel.cluster:
        raise ValueError(
            "parallel.hops=3 brings rows to each node once, but nothing says which ranks share a node. Set parallel.cluster to a "
            "name or a file, or parallel.hops=2."
        )
    if parallel.ulysses > 1 and parallel.speeds != "equal":
        raise ValueError(
            f"parallel.speeds={parallel.speeds} are of single ranks, but with parallel.ulysses={parallel.ulysses} groups of them "
            "share their work. Use parallel.speeds=equal or parallel.ulysses=1."
        )


def check_speeds(parallel: ParallelConfig, cp: int) -> None:
    speeds = parallel.speeds
    if isinstance(speeds, str):
        _one_of("parallel.speeds", speeds, SPEEDS)
        return
    if not isinstance(speeds, list) or not all(type(x) in (int, float) and 0 < x < math.inf for x in speeds):
        raise ValueError(
            f"parallel.speeds={speeds!r} is neither {' nor '.join(SPEEDS)} nor a list of positive numbers like [1, 1, 0.5, 1]."
        )
    if parallel.schedule not in TAKE_SPEEDS:
        raise ValueError(
            f"parallel.speeds={speeds} is of use to {', '.join(TAKE_SPEEDS)} only: {parallel.schedule} gives ranks their work "
            "whatever their speed. Leave it out."
        )
    if len(speeds) != cp:
        raise ValueError(f"parallel.speeds={speeds} has {len(speeds)} numbers for the {cp} ranks that share a sequence.")
    if min(speeds) < SLOWEST * max(speeds):
        raise ValueError(
            f"parallel.speeds={speeds}: a rank of less than 1/{round(1 / SLOWEST)} of the fastest one's speed cannot take part. "
            "Leave that rank out of the run."
        )


def strategy_of(parallel: ParallelConfig) -> Strategy:
    """The strategy that the section names; not for ``schedule=auto``."""
    from distattn.parallel.strategy import Strategy

    return Strategy(
        parallel.schedule,
        parallel.layout or None,
        parallel.ulysses,
        parallel.node_devices or None,
        parallel.stages or None,
        parallel.in_flight or None,
        cast("Rotate", parallel.rotate),
        cast("Keep", parallel.keep),
        parallel.laps or None,
        parallel.hops or None,
    )


def check_pool(config: Config) -> None:
    parallel = config.parallel
    _at_least("parallel.servers", parallel.servers, 0)
    if parallel.pool_store != "auto":
        host, _, port = parallel.pool_store.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(
                f"parallel.pool_store={parallel.pool_store!r} is no address. Write host:port with a port of 0 (any free one) to "
                "65535, or auto."
            )
    if not parallel.servers:
        return
    what = f"parallel.servers={parallel.servers}"
    if parallel.schedule not in POOLED:
        raise ValueError(
            f"{what} needs a schedule that gives work to ranks without tokens, found parallel.schedule={parallel.schedule}. "
            f"Use parallel.schedule={POOLED[0]}, or parallel.servers=0."
        )
    for name, wanted in (("dp", 1), ("ulysses", 1), ("nano_batches", 1), ("speeds", "equal")):
        if getattr(parallel, name) != wanted:
            raise ValueError(
                f"{what} serve one sequence with all of its heads at a time, at one speed: found parallel.{name}="
                f"{getattr(parallel, name)}. Use parallel.{name}={wanted}, or parallel.servers=0."
            )
    if parallel.keep == "all":
        raise ValueError(f"{what} keep nothing between two calls, found parallel.keep=all. Leave it out, or parallel.servers=0.")
    if config.train.device == "cuda":
        raise ValueError(f"{what} are reached over gloo, with tensors on the CPU. Use train.device=cpu, or parallel.servers=0.")


def context_ranks(config: Config, world_size: int) -> int:
    """How many ranks share one sequence."""
    return config.parallel.cp or max(1, world_size // config.parallel.dp)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(repr(c) for c in choices)}.{hint}")
