"""The training loop: which sequences, one optimizer step, what is written down and when."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distattn.attention import AttentionPlan, ContextParallel
from distattn.checkpoint import Checkpoints, read_progress
from distattn.config import TAKE_SPEEDS, Config, TrainConfig
from distattn.data import make_packers
from distattn.metrics import Metrics, Pace, peak_memory, plot, progress_line
from distattn.model import Decoder, NanoBatch
from distattn.parallel.mask import documents
from distattn.parallelize import World, attend_with, attention_call, begin_with, context_parallel, parallelize
from distattn.prefetch import Job, Prefetch, Prepared, Source, Spent
from distattn.speeds import UNIT, Speeds, gather, given


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    loss: float | None
    """held-out, nats a token; None where nothing is held out"""
    plot: Path
    checkpoint: Path
    metrics: Path


class Trainer:
    """One run. Every rank makes one and calls :meth:`train`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.out = Path(config.out)
        self.step, self.next_sequence = 0, 0
        self.cp = context_parallel(config, world)
        self.source = make_source(config, world, self.cp)
        self.packer, self.held_out = self.source.packers
        self.model = parallelize(config, world)
        self.optimizer = make_optimizer(self.model, config.train)
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.checkpoint.keep)
        self.saved = self._resume()
        workers = config.data.workers if self.step < config.train.steps else 0
        self.prefetch = Prefetch(self.source, workers, config.parallel.timeout)
        self.speeds = Speeds(self.cp.world) if config.parallel.speeds == "measure" else None
        if isinstance(config.parallel.speeds, list):
            self.prefetch.speeds = given(config.parallel.speeds)
        self.ahead: Iterator[Job] = iter(())
        self.metrics = Metrics(self.out, self.step, config.train.tensorboard) if world.rank == 0 else None
        self.pace = Pace(self.step)

    def train(self) -> Result:
        """Takes the steps that are left, then evaluates, saves and draws."""
        with contextlib.closing(self.prefetch):
            return self._train()

    def _train(self) -> Result:
        train, every = self.config.train, self.config.checkpoint.every
        if self.step >= train.steps:
            self.say(f"{self.out} already holds a run of {self.step} steps. Set another out= to train a new one.")
        self.begin()
        held_out_loss = None
        while self.step < train.steps:
            loss, norm = self.take_step()
            last = self.step == train.steps
            if last or self.step % train.log_every == 0:
                self._report(loss, norm)
            with self.pace.paused():
                if self._evaluates_after(self.step):
                    held_out_loss = self._report_evaluation()
                if last or (every and self.step % every == 0):
                    self._refuse_not_finite(loss, norm)  # checkpoints of a run that is lost would displace those from before
                    self._save()
        return self._finish(held_out_loss)

    def begin(self) -> None:
        """Asks for the sequences of the first step; each step asks for those of the next."""
        self.ahead = self._jobs()
        self._ask_next()

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step, after :meth:`begin`.

        Returns the loss (mean over all labels of the step) and the norm of the gradient.
        """
        train, world = self.config.train, self.world
        job = self._training_job(self.next_sequence)
        labels, sequences = self._open(job)
        labels = max(1, labels)
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        together = self.config.parallel.nano_batches
        while batch := list(itertools.islice(sequences, together)):
            loss = self.loss_sum(*batch)
            # FSDP averages gradients over all ranks; what is wanted is their sum.
            (loss * (world.size / labels)).backward()
            total += loss.detach()
        norm = clip(self.model, train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, train)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.next_sequence = self.step + 1, job.numbers.stop
        if self.speeds is not None:
            self._measure(self.speeds)
        return world.sum(total) / labels, norm

    def loss_sum(self, *sequences: Prepared) -> Tensor:
        """Sum of the cross entropies of this rank's rows of packed sequences, several of which take each layer side by side.
        All ranks call this at the same time."""
        opened = [self._rows(sequence) for sequence in sequences]
        with self._autocast():
            if len(opened) == 1:
                [(tokens, positions, labels, plan)] = opened
                return self.model(tokens, positions, attend_with(self.cp, plan), labels)
            batches = [
                NanoBatch(tokens, positions, labels, begin_with(self.cp, plan, slot))
                for slot, (tokens, positions, labels, plan) in enumerate(opened)
            ]
            return self.model.together(batches)

    def _rows(self, sequence: Prepared) -> tuple[Tensor, Tensor, Tensor, AttentionPlan]:
        """Tokens, positions and labels of this rank's rows of a sequence, and the plan of its documents."""
        started = time.perf_counter()
        plan = self.cp.adopt(sequence.plan)
        self.prefetch.spent.agreed += time.perf_counter() - started
        tokens, labels, positions = (part.to(self.world.device) for part in sequence.rows)
        return tokens, positions, labels, plan

    def _measure(self, speeds: Speeds) -> None:
        """Speeds after this step, for what is asked for from now on: at the same point of the run on all ranks."""
        changed = speeds.add(gather(self.cp))
        if changed and self.cp.rank == 0:  # every group of ranks that share a sequence says its own
            print(f"step {self.step}  {speeds.text(self.world.rank)}", flush=True)
        if self.config.parallel.schedule in TAKE_SPEEDS:
            self.prefetch.speeds = speeds.current

    def _jobs(self) -> Iterator[Job]:
        """What is left of the run, in order."""
        step, first = self.step, self.next_sequence
        while step < self.config.train.steps:
            yield self._training_job(first)
            step, first = step + 1, first + self.config.train.sequences_per_step
            if self._evaluates_after(step) and (job := self._evaluation_job()):
                yield job

    def _open(self, job: Job) -> tuple[int, Iterator[Prepared]]:
        """Begins a job, and asks for the one after it: while this one is computed the next is made ready."""
        opened = self.prefetch.open(job)
        self._ask_next()
        return opened

    def _ask_next(self) -> None:
        job = next(self.ahead, None)
        if job is not None:
            self.prefetch.ask(job)

    def _training_job(self, first: int) -> Job:
        numbers = range(first, first + self.config.train.sequences_per_step)
        return Job(False, numbers, tuple(numbers[self.world.dp_rank :: self.world.dp]))

    def _evaluation_job(self) -> Job | None:
        """The held-out sequences of every evaluation; None where nothing is held out."""
        world = self.world
        if self.held_out is None or self.config.train.eval_sequences == 0:
            return None
        numbers = range(min(self.config.train.eval_sequences, self.held_out.epoch_sequences))
        places = range(world.dp_rank, -(-len(numbers) // world.dp) * world.dp, world.dp)
        # A group that has none left takes one more, uncounted: FSDP's collectives need every rank.
        return Job(True, numbers, tuple(numbers[min(place, len(numbers) - 1)] for place in places))

    def _evaluates_after(self, step: int) -> bool:
        train = self.config.train
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss over held-out sequences, the same ones every time; None where nothing is held out."""
        world, job = self.world, self._evaluation_job()
        if job is None:
            return None
        labels, sequences = self._open(job)
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for place, sequence in enumerate(sequences):
            loss = self.loss_sum(sequence)
            total += loss if place * world.dp + world.dp_rank < len(job.numbers) else 0
        return world.sum(total).item() / max(1, labels)

    def say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)

    def _resume(self) -> Path | None:
        path, passed = self.checkpoints.newest()
        for line in passed:
            self.say(line)
        if path is None and not passed:
            return None
        if not self.config.checkpoint.resume:
            raise ValueError(
                f"{self.out} holds checkpoints of another run. Set another out=, or checkpoint.resume=true to go on."
            )
        if path is None:
            raise ValueError(
                f"No checkpoint in {self.checkpoints.folder} is whole. Set another out= to start from the beginning."
            )
        progress = read_progress(path)
        refuse_other_run(path, "model", progress["model"], asdict(self.config.model))
        refuse_other_run(path, "data", progress["data"], self.packer.identity())
        self.checkpoints.load(path, self.model, self.optimizer)
        set_options(self.optimizer, self.config.train)  # the checkpoint brings those of the run before
        self.step, self.next_sequence = progress["step"], progress["next_sequence"]
        self.say(f"resumed at step {self.step} from {path}")
        return path

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.world.device.type == "cuda" and self.config.train.autocast:
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def _report(self, loss: Tensor, norm: Tensor) -> None:
        self._refuse_not_finite(loss, norm)
        value, train = loss.item(), self.config.train
        steps, seconds = self.pace.lap(self.step)
        spent, self.prefetch.spent = self.prefetch.spent, Spent()
        values: dict[str, Any] = {
            "loss": value,
            "gradient_norm": norm.item(),
            "learning_rate": learning_rate(self.step - 1, train),
            "tokens_per_second": steps * train.sequences_per_step * self.config.data.sequence_length / seconds,
            "memory_bytes": peak_memory(self.world.device),
            "seconds": seconds,
            "plan_seconds": spent.made / steps,
            "plan_hidden": spent.hidden,
            "plan_agreement_seconds": spent.agreed / steps,
        }
        if self.speeds is not None:
            values["speeds"] = [speed / UNIT for speed in self.speeds.current]
        seconds_left = self.pace.seconds_a_step * (train.steps - self.step)
        self.say(progress_line(self.step, train.steps, values, seconds_left, spent.text(steps, seconds)))
        if self.metrics:
            self.metrics.write(self.step, values)

    def _refuse_not_finite(self, loss: Tensor, norm: Tensor) -> None:
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"The loss of step {self.step} is {loss.item()} and its gradient {norm.item()} long. "
                "Lower train.learning_rate or train.clip_norm."
            )

    def _report_evaluation(self) -> float | None:
        spent = self.prefetch.spent
        self.prefetch.spent = Spent()  # evaluations do not count, as in the pace
        loss = self.evaluate()
        self.prefetch.spent = spent
        if loss is not None:
            self.say(f"step {self.step}/{self.config.train.steps}  held-out loss {loss:.4f} nats a {self.packer.file.unit}")
            if self.metrics:
                self.metrics.write(self.step, {"eval_loss": loss})
        return loss

    def _save(self) -> None:
        progress = {
            "step": self.step,
            "next_sequence": self.next_sequence,
            "data": self.packer.identity(),
            "model": asdict(self.config.model),
        }
        self.saved = self.checkpoints.save(self.model, self.optimizer, progress)

    def _finish(self, held_out_loss: float | None) -> Result:
        assert self.saved is not None, "a run without steps has resumed from a checkpoint, any other has just saved one"
        result = Result(held_out_loss, self.out / "loss.png", self.saved, self.out / "metrics.jsonl")
        if self.world.rank == 0:
            runs: dict[str, str | Path] = {self.out.name: result.metrics}
            if self.config.compare:
                runs[Path(self.config.compare).parent.name] = self.config.compare
            plot(runs, result.plot, self.packer.file.unit)
        self.say(f"plot        {result.plot}\nmetrics     {result.metrics}\ncheckpoint  {result.checkpoint}")
        return result


def make_source(config: Config, world: World, cp: ContextParallel) -> Source:
    """What makes this rank's sequences ready."""
    training, _ = make_packers(config)
    # schedule=auto chooses by the first sequence of the stream, also where a run goes on further down.
    return Source(config, cp.recipe(documents(training.sequence(0).lengths.tolist())), (attention_call(config, world),))


def make_optimizer(model: Decoder, train: TrainConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=train.learning_rate)
    set_options(optimizer, train)
    return optimizer


def set_options(optimizer: torch.optim.Optimizer, train: TrainConfig) -> None:
    """What AdamW takes from the configuration; only the first group, the matrices, decays."""
    for group, decay in zip(optimizer.param_groups, (train.weight_decay, 0.0), strict=True):
        group.update(weight_decay=decay, betas=(train.beta1, train.beta2), eps=train.epsilon)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Of the step that comes after ``step`` steps: a line up, then half a cosine down."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    low = train.final_learning_rate
    return train.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def clip(model: Decoder, longest: float) -> Tensor:
    """Shortens the gradient of the whole model to ``longest`` (0: leaves it). Returns its norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), longest or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def refuse_other_run(path: Path, what: str, saved: dict[str, Any], found: dict[str, Any]) -> None:
    """A checkpoint goes on with the model and the data that it was made with."""
    for name in saved.keys() | found.keys():
        if saved.get(name) != found.get(name):
            raise ValueError(
                f"{path} was made with {what}: {name}={saved.get(name)}, this run has {found.get(name)}. "
                "Set it back, or set another out= to start a new run."
            )
