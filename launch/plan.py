"""Which schedule for which machines: prices every strategy on a described cluster and explains the choice. Needs no GPU.

python launch/plan.py --seq-len 1M --world 512 --cluster h200 --heads 32:8
python launch/plan.py --seq-len 256k --world 64 --cluster h100 --heads 64:8 --lengths lengths.txt --png plan.png --trace plan.json
python launch/plan.py --seq-len 1M --world 64 --cluster h200 --documents heavy_tail --balance --png balance.png

Times are of one attention layer, forward and backward, simulated: they are as good as the description of the cluster, which
launch/calibrate.py measures. A trace opens at ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.parallel.auto import Candidate, Decision
    from distattn.parallel.mask import Mask
    from distattn.parallel.shape import Shape

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--seq-len", type=tokens, required=True, metavar="N", help="tokens of the sequence; 64k, 1M (powers of two)"
    )
    made.add_argument("--world", type=int, required=True, metavar="P", help="ranks that share it")
    made.add_argument("--cluster", required=True, help="a100, h100, h200, l40s, or the path of a description")
    made.add_argument("--heads", default="32:8", metavar="Q:KV", help="query and key heads (default: 32:8)")
    made.add_argument("--head-dim", type=int, default=128, metavar="D", help="head size (default: 128)")
    made.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of queries and keys (default: bf16)")
    made.add_argument("--mask", default="causal", help="causal, full, window:4096, documents:5000,120,... (default: causal)")
    made.add_argument("--lengths", type=Path, metavar="FILE", help="causal documents, a length a line, instead of --mask")
    made.add_argument("--documents", metavar="KIND", help="causal documents of heavy_tail, uniform, bimodal or giant lengths")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of --documents (default: 0)")
    made.add_argument("--balance", action="store_true", help="show what disaggregate makes of the ranks' work, choose nothing")
    made.add_argument("--ulysses", type=int, default=1, metavar="U", help="with --balance: ranks that trade heads (default: 1)")
    made.add_argument("--memory", type=float, metavar="GB", help="for rows of other ranks (default: a quarter of a device)")
    made.add_argument("--keep", choices=("last", "all", "none"), default="last", help="keys that stay for the backward pass")
    made.add_argument("--all", action="store_true", help="simulate every candidate, also what cannot be noticeably faster")
    made.add_argument("--top", type=int, default=20, metavar="K", help="rows of the table (default: 20; 0: all)")
    made.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline of the choice")
    made.add_argument("--trace", type=Path, metavar="FILE", help="write the timeline of the choice as a Chrome trace")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the choice and all candidates")
    return made


def tokens(text: str) -> int:
    """A number of tokens; k and M are 2**10 and 2**20."""
    factor = {"k": 1 << 10, "K": 1 << 10, "m": 1 << 20, "M": 1 << 20}.get(text[-1:], 1)
    number = text[:-1] if factor > 1 else text
    try:
        value = float(number) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens. Write 65536, 64k or 1M.") from None
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is {value:g} tokens. A sequence has a whole number of tokens, 1 or more.")
    return int(value)


def main(words: list[str] | None = None) -> int:
    """The program. 2 where what was asked cannot be."""
    asked = parser().parse_args(words)
    try:
        return plan(asked)
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2


def plan(asked: argparse.Namespace) -> int:
    """Decides, prints the table, writes what was asked for."""
    from rich.console import Console

    from distattn.parallel.auto import NOTICEABLE, decide
    from distattn.parallel.cluster import load_cluster

    cluster, shape, mask = load_cluster(asked.cluster), shape_of(asked), mask_of(asked)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if asked.balance:
        from distattn.launch.plan_balance import show_balance

        show_balance(asked, mask, shape, cluster)
        return 0
    begin = time.perf_counter()
    with console.status("simulating") as status:
        decision = decide(
            mask, asked.world, shape, cluster, asked.memory, asked.keep, None if asked.all else NOTICEABLE, status.update
        )
    seconds = time.perf_counter() - begin
    show(console, decision, asked.top, f"{mask!r} on {asked.world} ranks of {cluster.name}, heads {asked.heads}")
    simulated = sum(c.price is not None for c in decision.candidates)
    best = decision.best
    console.print(
        f"[bold]{best.strategy}[/bold]: {best.seconds * 1e3:.4g} ms a layer, {len(decision.candidates)} candidates, "
        f"{simulated} of them simulated, in {seconds:.2f} s."
    )
    console.print(f"In a configuration: {configuration(decision)}", soft_wrap=True)
    write(asked, decision, mask, shape)
    return 0


def shape_of(asked: argparse.Namespace) -> Shape:
    """The shape of the attention calls."""
    import torch

    from distattn.parallel.shape import Shape

    try:
        heads, kv_heads = (int(part) for part in asked.heads.split(":"))
    except ValueError:
        raise ValueError(f"--heads {asked.heads} is not of the form QUERY:KEY, such as 32:8.") from None
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"--heads {asked.heads}: query heads must be a multiple of key heads, both 1 or more.")
    if asked.head_dim < 1:
        raise ValueError(f"--head-dim {asked.head_dim} must be 1 or more.")
    return Shape(heads, kv_heads, asked.head_dim, asked.head_dim, getattr(torch, DTYPES[asked.dtype]))


def mask_of(asked: argparse.Namespace) -> Mask:
    """The mask, from its text, from a file of document lengths or from a kind of them."""
    from distattn.parallel.mask import documents
    from distattn.parallel.mask_text import parse_mask

    if asked.documents is not None:
        from distattn.document_lengths import document_lengths

        return documents(document_lengths(asked.documents, asked.seq_len, asked.seed).tolist())
    if asked.lengths is None:
        return parse_mask(asked.mask, asked.seq_len)
    try:
        lengths = [int(line) for line in asked.lengths.read_text().split()]
    except ValueError as error:
        raise ValueError(f"{asked.lengths} must hold whole numbers, a document length a line: {error}.") from None
    if sum(lengths) != asked.seq_len:
        raise ValueError(f"{asked.lengths} has documents of {sum(lengths)} tokens in all, --seq-len is {asked.seq_len}.")
    return documents(lengths)


def show(console: object, decision: Decision, top: int, title: str) -> None:
    """The table of candidates."""
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    table = Table(title=title)
    for name in ("schedule", "layout", "u", "parts"):
        table.add_column(name)
    for name in ("forward ms", "backward ms", "exposed ms", "work max/mean", "MB inside", "MB between", "buffers MB"):
        table.add_column(name, justify="right")
    table.add_column("why not")
    shown = decision.candidates[: top or None]
    for candidate in shown:
        table.add_row(*row(candidate), style="bold green" if not candidate.refused else None)
    console.print(table)
    if len(shown) < len(decision.candidates):
        console.print(f"{len(decision.candidates) - len(shown)} more candidates: --top 0 shows all.")


def row(candidate: Candidate) -> list[str]:
    """One row of the table."""
    from distattn.parallel.schedules import SCHEDULES

    s, p = candidate.strategy, candidate.price
    name = [s.schedule, s.layout or SCHEDULES[s.schedule].layout, str(s.ulysses), str(s.stages or "")]
    if p is None:
        return [*name, *[""] * 7, candidate.refused]
    times = (p.forward.seconds, p.backward.seconds, p.exposed)
    sizes = (p.bytes_inside, p.bytes_between, p.buffer_bytes)
    figures = [*(f"{t * 1e3:.2f}" for t in times), f"{p.balance:.3f}", *(f"{b / 1e6:.0f}" for b in sizes)]
    return [*name, *figures, candidate.refused]


def configuration(decision: Decision) -> str:
    """The words for launch/train.py."""
    s = decision.best.strategy
    named = {
        "schedule": s.schedule,
        "layout": s.layout,
        "ulysses": s.ulysses,
        "node_devices": None if s.schedule == "disaggregate" else s.devices,  # which takes nodes from a description
        "stages": s.stages,
        "laps": s.laps,
        "hops": s.hops,
    }
    said = {key: value for key, value in named.items() if value is not None and (key, value) != ("ulysses", 1)}
    return " ".join(f"parallel.{key}={value}" for key, value in said.items())


def write(asked: argparse.Namespace, decision: Decision, mask: Mask, shape: Shape) -> None:
    """The files that were asked for."""
    if asked.json is not None:
        rows = []
        for c in decision.candidates:
            figures = None
            if c.price is not None:
                p = c.price
                figures = {
                    "forward": p.forward.seconds,
                    "backward": p.backward.seconds,
                    "exposed": p.exposed,
                    "balance": p.balance,
                    "bytes_inside": p.bytes_inside,
                    "bytes_between": p.bytes_between,
                    "buffer_bytes": p.buffer_bytes,
                    "ranks_simulated": p.simulated,
                }
            rows.append({"strategy": asdict(c.strategy), "bound": c.bound, "refused": c.refused, "price": figures})
        asked.json.write_text(json.dumps({"best": asdict(decision.best.strategy), "candidates": rows}, indent=1))
    if asked.png is None and asked.trace is None:
        return
    from distattn.launch.timeline_plot import write_png, write_trace
    from distattn.parallel.cluster import load_cluster
    from distattn.parallel.price import price
    from distattn.parallel.simulate import Simulation

    best = price(decision.best.strategy, mask, asked.world, shape, load_cluster(asked.cluster), timeline=True)
    simulation, ranks = Simulation(best.forward, best.backward), best.simulated
    if asked.png is not None:
        write_png(simulation, asked.png, f"{best.strategy}: {mask!r} on {asked.world} ranks", ranks[:16])
    if asked.trace is not None:
        write_trace(simulation, asked.trace, ranks)


if __name__ == "__main__":
    sys.exit(main())
