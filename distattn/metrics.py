"""What a run tells: a line on the terminal, a line in metrics.jsonl, a plot at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

COLUMNS = {"train": "loss", "held out": "eval_loss"}


class Metrics:
    """Writes ``metrics.jsonl`` in a folder, one step a line (and TensorBoard files). Used by rank 0 only."""

    def __init__(self, folder: str | Path, resumed_step: int, tensorboard: bool = False) -> None:
        """Lines of steps after ``resumed_step`` are dropped: a run that died went further than its last checkpoint."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= resumed_step] if self.path.exists() else []
        with open(self.path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        self._board = _tensorboard(folder) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, list):  # one number a rank
                    continue
                self._board.add_scalar(name, value, step)
            self._board.flush()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut short by a crash is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("train.tensorboard=true needs the package tensorboard: pip install tensorboard.") from None
    return SummaryWriter(str(folder))


class Pace:
    """How long steps take; evaluation and saving do not count."""

    def __init__(self, step: int) -> None:
        self.seconds_a_step = 0.0
        self._since, self._step = time.perf_counter(), step

    def lap(self, step: int) -> tuple[int, float]:
        """(steps, seconds) since the last lap."""
        now = time.perf_counter()
        steps, seconds = step - self._step, max(now - self._since, 1e-9)
        # Leans on the last steps: the first are slow (buffers, plans, compilation).
        mean = seconds / steps
        self.seconds_a_step = 0.9 * self.seconds_a_step + 0.1 * mean if self.seconds_a_step else mean
        self._since, self._step = now, step
        return steps, seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has had: of GPU memory on a GPU, of main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def progress_line(step: int, steps: int, values: dict[str, Any], seconds_left: float, plan: str = "") -> str:
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {values['loss']:.4f}  rate {values['learning_rate']:.1e}  "
        f"gradient {values['gradient_norm']:.2f}  {values['tokens_per_second']:>7,.0f} tokens/s  "
        f"{values['memory_bytes'] / 2**30:.2f} GiB  {plan and plan + '  '}ETA {duration(seconds_left)}"
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plot(runs: Mapping[str, str | Path], path: Path, unit: str) -> Path:
    """Draws the losses of runs, name -> metrics.jsonl, training as a line and held-out as points, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, source in runs.items():
        rows, color = read(source), None
        for label, column in COLUMNS.items():
            points = [(row["step"], row[column]) for row in rows if column in row]
            if points:
                style = "-" if column == "loss" else "o"
                (line,) = axes.plot(*zip(*points, strict=True), style, color=color, label=f"{name}, {label}", linewidth=1)
                color = line.get_color()
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats a {unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
