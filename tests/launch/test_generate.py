from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distattn.attention import ContextParallel
from distattn.config import ModelConfig
from distattn.generation import Sampling, find_checkpoint, generate, load_model
from distattn.kv_cache import KVCache
from distattn.launch.generate import main, say_bytes
from distattn.model import Decoder, build
from distattn.parallel.comm_threads import run_ranks
from distattn.parallel.mask import causal
from distattn.parallel.strategy import Strategy
from distattn.parallelize import attend_with, make_world
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens

ROOT = Path(__file__).parents[2]
PROMPT, COUNT = list(b"once upon a time"), 12


def lively(seed: int = 1, **changes: Any) -> Decoder:
    """A model whose next token is never a matter of rounding: weights much larger than those that training begins with."""
    options: dict[str, Any] = {"vocab_size": 256, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "hidden_dim": 48} | changes
    model = build(ModelConfig(**options), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


@torch.no_grad()
def assert_greedy(model: Decoder, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the likeliest after those before it, by one pass of the whole sequence without a cache."""
    cp, whole = ContextParallel(), torch.tensor(prompt + tokens[:-1])
    logits = model(whole, torch.arange(len(whole)), attend_with(cp, cp.plan(causal(len(whole)))))[len(prompt) - 1 :]
    assert logits.argmax(1).tolist() == tokens
    first, second = logits.topk(2, 1).values.T
    assert (first - second).min() > 1e-4, "which token is the likeliest must not be a matter of rounding"


def on_ranks(
    communicator: Any, schedule: str, prompt: list[int], sampling: Sampling, block: int = 4, count: int = COUNT
) -> list[int]:
    cp = ContextParallel(schedule=schedule, communicator=communicator)
    return list(generate(lively(), cp, torch.tensor(prompt), count, sampling, block=block))


@pytest.mark.parametrize("schedule", ["zigzag", "striped", "ring"])
def test_a_sharded_cache_generates_what_the_whole_sequence_does(schedule: str) -> None:
    want = list(generate(lively(), ContextParallel(), torch.tensor(PROMPT), COUNT))
    assert len(want) == COUNT and len(set(want)) > 6
    assert_greedy(lively(), PROMPT, want)
    for world in (2, 5):
        assert run_ranks(world, lambda c: on_ranks(c, schedule, PROMPT, Sampling())) == [want] * world


def test_heads_may_be_exchanged_in_the_prefill() -> None:
    want = list(generate(lively(), ContextParallel(), torch.tensor(PROMPT), COUNT))
    strategy = Strategy("zigzag", ulysses=2)
    assert run_ranks(4, lambda c: on_ranks(c, strategy, PROMPT, Sampling()), lanes=4) == [want] * 4


def test_a_prompt_may_be_shorter_than_the_ranks() -> None:
    want = list(generate(lively(), ContextParallel(), torch.tensor([7, 200]), COUNT))
    assert_greedy(lively(), [7, 200], want)
    assert run_ranks(5, lambda c: on_ranks(c, "zigzag", [7, 200], Sampling())) == [want] * 5


def test_samples_are_those_of_one_device() -> None:
    sampling = Sampling(temperature=0.9, top_k=5, seed=3)
    want = list(generate(lively(), ContextParallel(), torch.tensor(PROMPT), COUNT, sampling))
    assert want != list(generate(lively(), ContextParallel(), torch.tensor(PROMPT), COUNT))
    assert run_ranks(3, lambda c: on_ranks(c, "zigzag", PROMPT, sampling)) == [want] * 3


def test_tokens_are_taken_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    chances = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000

    def share(sampling: Sampling) -> list[float]:
        taken = torch.tensor([sampling.choose(logits, float(c)) for c in chances])
        return (torch.bincount(taken, minlength=4) / len(chances)).tolist()

    assert share(Sampling(1.0)) == pytest.approx([0.1, 0.5, 0.25, 0.15], abs=1e-3)
    assert share(Sampling(1.0, top_k=2)) == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=1e-3)
    assert share(Sampling(0.5)) == pytest.approx([x / 0.345 for x in (0.01, 0.25, 0.0625, 0.0225)], abs=1e-3)
    assert share(Sampling(0.0)) == [0, 1, 0, 0] and share(Sampling(2.0, top_k=1)) == [0, 1, 0, 0]
    assert Sampling(1.0, top_k=2).choose(logits, 1.0 - 2.0**-53) == 2  # the last of those that can be taken
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}):
        with pytest.raises(ValueError, match=r"must be 0 \("):
            Sampling(**bad)  # type: ignore[arg-type]


def test_only_the_last_rows_have_logits() -> None:
    model, cp = lively(), ContextParallel()
    plan = cp.plan(causal(9))
    arguments = torch.arange(9), torch.arange(9), attend_with(cp, plan)
    # Not bit by bit: a product of two rows may be summed in another order than the same rows of a product of nine.
    torch.testing.assert_close(model(*arguments, rows=slice(7, 9)), model(*arguments)[7:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, with its head tied so that loading has to tie it again."""
    folder = tmp_path_factory.mktemp("trained")
    small_tokens(folder / "tokens")
    config = small_config(folder, train__steps=12, checkpoint__every=6, model__tie_head=True)
    Trainer(config, make_world(config, torch.device("cpu"))).train()
    return folder / "run"


def on_gloo(rank: int, world: int, run: str | None) -> tuple[list[int], int]:
    """(tokens, rows of this rank's cache at the end)"""
    caches: list[KVCache] = []
    original = KVCache.__init__

    def remember(self: KVCache, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        caches.append(self)

    KVCache.__init__ = remember  # type: ignore[method-assign]
    try:
        import torch.distributed as dist

        model = lively() if run is None else load_model(find_checkpoint(Path(run)), torch.device("cpu"))
        cp = ContextParallel(dist.group.WORLD, timeout=60)
        tokens = list(generate(model, cp, torch.tensor(PROMPT), COUNT, block=4))
        cp.close()
    finally:
        KVCache.__init__ = original  # type: ignore[method-assign]
    return tokens, caches[0].rows_here


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_generate_what_one_device_does(world: int, trained: Path, gloo: Any) -> None:
    """Token by token, greedy: a lively model, and a checkpoint. Nobody holds more than a share and a block of the context."""
    for run in (None, str(trained)):
        model = lively() if run is None else load_model(find_checkpoint(trained), torch.device("cpu"))
        want = list(generate(model, ContextParallel(), torch.tensor(PROMPT), COUNT))
        assert_greedy(model, PROMPT, want)
        found = gloo(world).run(on_gloo, run)
        assert [tokens for tokens, _ in found] == [want] * world
        rows = [held for _, held in found]
        assert sum(rows) == len(PROMPT) + COUNT - 1 and max(rows) <= sum(rows) / world + 4


def test_the_model_is_the_trainers(trained: Path) -> None:
    config = small_config(trained.parent, train__steps=12, model__tie_head=True)
    trainer = Trainer(config, make_world(config, torch.device("cpu")))
    loaded = load_model(find_checkpoint(trained), torch.device("cpu"))
    theirs = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert trainer.step == 12 and loaded.head.weight is loaded.embedding.weight
    ours: dict[str, Tensor] = dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_is_found_or_refused(trained: Path, tmp_path: Path) -> None:
    last = trained / "checkpoints" / "step_000012"
    assert find_checkpoint(trained) == find_checkpoint(trained / "checkpoints") == find_checkpoint(last) == last
    assert find_checkpoint(trained / "checkpoints" / "step_000006").name == "step_000006"
    with pytest.raises(ValueError, match="There is no whole checkpoint in"):
        find_checkpoint(tmp_path)
    copy = tmp_path / "step_000001"
    copy.mkdir()
    for file in last.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert find_checkpoint(copy) == copy
    (copy / "random_0.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged: random_0.pt has \d+ bytes in manifest.json, found 0"):
        find_checkpoint(copy)
    with pytest.raises(ValueError, match="no whole checkpoint.*step_000001 is damaged and was passed over"):
        find_checkpoint(tmp_path)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json is missing"):
        find_checkpoint(copy)


def test_text_is_printed_as_it_comes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("abc")
    words = ["--checkpoint", str(trained), "--device", "cpu", "--tokens", "9"]
    said = []
    for more in (["--prompt", "abc", "--greedy"], ["--prompt-file", str(tmp_path / "prompt.txt"), "--temperature", "0"]):
        assert main(words + more) == 0
        out, err = capsys.readouterr()
        assert "prompt of 3 tokens on 1 ranks" in err and "then 9 tokens" in err
        said.append(out)
    assert said[0] == said[1] and said[0].startswith("abc") and said[0].endswith("\n") and len(said[0]) > 4


def test_characters_wait_for_their_last_byte() -> None:
    say = say_bytes()
    assert [say(token) for token in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert say("é".encode()[0]) == "" and say(-1) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "a", "--tokens", "0"], "--tokens 0 was asked for"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1 must be 0"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k -1 must be 0"),
        (["--prompt", "a", "--timeout", "0"], "no time to wait"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt", "a", "--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--prompt", "a", "--tokenizer", "nowhere.json"], "No tokenizer 'nowhere.json'"),
        (["--prompt", "a", "--schedule", "spiral"], "There is no schedule 'spiral'"),
    ],
)
def test_mistakes_are_printed_and_end_with_2(
    words: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(trained), "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_another_vocabulary_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, words, message in (
        (300, [], "has a vocabulary of 300 tokens, not of bytes. Name its tokenizer"),
        (200, ["--tokenizer", "byte"], "has a vocabulary of 200 tokens, the tokenizer 'byte' makes 256"),
    ):
        folder = tmp_path / str(size)
        small_tokens(folder / "tokens")
        config = small_config(folder, train__steps=1, train__warmup_steps=0, train__eval_sequences=0, model__vocab_size=size)
        if size < 256:
            monkey = pytest.MonkeyPatch()
            monkey.setattr("distattn.data.TokenFile.check_vocabulary", lambda *_: None)  # the letters of this text are below 200
        Trainer(config, make_world(config, torch.device("cpu"))).train()
        assert main(["--checkpoint", str(folder / "run"), "--device", "cpu", "--prompt", "a", *words]) == 2
        assert message in capsys.readouterr().err
    monkey.undo()
    cp = ContextParallel()
    with pytest.raises(ValueError, match="tokens from 3 to 256, the model knows 0 to 255"):
        generate(lively(), cp, torch.tensor([3, 256]), 1)
    with pytest.raises(ValueError, match="at least one token"):
        generate(lively(), cp, torch.tensor([], dtype=torch.int64), 1)


def test_arguments_are_refused_before_torch_is_loaded() -> None:
    code = "import sys, distattn.launch.generate as g; g.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["--checkpoint", "/nowhere", "--prompt", "a"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "no such folder" in done.stderr, done.stderr


@pytest.mark.slow
def test_torchrun_prints_what_one_process_does(trained: Path) -> None:
    words = [
        str(ROOT / "launch" / "generate.py"),
        "--checkpoint",
        str(trained),
        "--device",
        "cpu",
        "--prompt",
        "abc",
        "--tokens",
        "40",
    ]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = [
        subprocess.run(start + words, capture_output=True, text=True, timeout=200, check=True).stdout
        for start in ([sys.executable], run)
    ]
    assert said[0] == said[1] and said[0].startswith("abc")
