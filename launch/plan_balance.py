"""What disaggregation makes of each rank's work: before and after, as figures and as bars. Part of plan.py."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distattn.parallel.cells import Cells, Groups
from distattn.parallel.cluster import Cluster
from distattn.parallel.mask import Mask
from distattn.parallel.plan import DST, START, STOP, WHAT, Plan, What
from distattn.parallel.price import Price, price, slices_of
from distattn.parallel.schedule import make_schedule
from distattn.parallel.shape import Shape
from distattn.parallel.statistics import work
from distattn.parallel.strategy import Balance, Strategy

ROUNDS = 3  # of planning


@dataclass(frozen=True)
class Moved:
    """What each inner rank does and receives in the forward pass; int64 [P].

    Attributes:
        before, after: visible pairs of its own queries, and of all that it computes.
        queries, keys: rows that it receives.
        plan_ms: median time of the assignment and of its plan.
    """

    before: np.ndarray
    after: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    plan_ms: float
    price: Price

    @property
    def busiest(self) -> float:
        """Rows that the busiest receiver gets over the mean; 1 where nothing moves."""
        rows = self.queries + self.keys
        return float(rows.max() / rows.mean()) if rows.any() else 1.0


def peak(values: np.ndarray) -> float:
    """The largest over the mean; 1 of nothing."""
    return float(values.max() / values.mean()) if values.any() else 1.0


def measure(mask: Mask, world: int, ulysses: int, shape: Shape, cluster: Cluster) -> Moved:
    """Plans and prices a disaggregation.

    Raises:
        ValueError: ranks that do not fit the cluster or the degree, and limits that nothing meets.
    """
    cluster.check_world(world)
    devices = min(world, cluster.devices)
    balance = Balance.of(slices_of(shape, ulysses)[0], cluster, max(1, devices // ulysses))
    strategy = Strategy("disaggregate", ulysses=ulysses, balance=balance)
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        schedule = make_schedule(strategy, mask, world)
        times.append(time.perf_counter() - begin)
    plan = schedule.forward
    cells = Cells.of(schedule.inner, Groups.of(mask))
    before = cells.load(plan.world, cells.work)
    priced = price(strategy, mask, world, shape, cluster)
    queries, keys = (_received(plan, what) for what in (What.Q, What.KV))
    return Moved(before, work(plan), queries, keys, 1e3 * statistics.median(times), priced)


def _received(plan: Plan, what: What) -> np.ndarray:
    t = plan.transfers[plan.transfers[:, WHAT] == what]
    return np.bincount(t[:, DST], weights=t[:, STOP] - t[:, START], minlength=plan.world).astype(np.int64)


def figures(m: Moved, shape: Shape, tokens: int) -> dict[str, Any]:
    """What is printed and written."""
    unit = shape.heads // shape.kv_heads
    return {
        "ranks": len(m.after),
        "before_max_over_mean": peak(m.before),
        "after_max_over_mean": peak(m.after),
        "traffic_units_a_token": float(m.keys.sum() + unit * m.queries.sum()) / tokens,
        "query_rows": int(m.queries.sum()),
        "key_rows": int(m.keys.sum()),
        "busiest_receiver_over_mean": m.busiest,
        "busiest_receiver_rows": int((m.queries + m.keys).max(initial=0)),
        "most_bytes_inside": m.price.bytes_inside,
        "most_bytes_between": m.price.bytes_between,
        "plan_ms": m.plan_ms,
        "forward_ms": 1e3 * m.price.forward.seconds,
        "backward_ms": 1e3 * m.price.backward.seconds,
        "kernels_ms": 1e3 * float(m.price.forward.compute.max() + m.price.backward.compute.max()),
        "exposed_ms": 1e3 * m.price.exposed,
    }


def show_balance(asked: argparse.Namespace, mask: Mask, shape: Shape, cluster: Cluster) -> None:
    """Prints the figures, and writes the files that were asked for."""
    if asked.trace is not None or asked.all:
        raise ValueError("--balance chooses nothing: leave --trace and --all out, or leave --balance out.")
    m = measure(mask, asked.world, asked.ulysses, shape, cluster)
    f = figures(m, shape, mask.n_tokens)
    inner = f" ({len(m.after)} groups of {asked.ulysses} that trade heads)" if asked.ulysses > 1 else ""
    print(f"disaggregate: {mask!r} on {asked.world} ranks{inner} of {cluster.name}, heads {asked.heads}")
    print(f"work, largest over mean: {f['before_max_over_mean']:.3f} where it is, {f['after_max_over_mean']:.3f} disaggregated")
    print(
        f"traffic, forward: {f['traffic_units_a_token']:.2f} rows of keys a token ({f['query_rows']} query and "
        f"{f['key_rows']} key rows); busiest receiver {f['busiest_receiver_rows']} rows, "
        f"{f['busiest_receiver_over_mean']:.2f} of the mean"
    )
    print(f"planning: {f['plan_ms']:.1f} ms for the forward pass, median of {ROUNDS}")
    print(
        f"simulated: forward {f['forward_ms']:.2f} ms, backward {f['backward_ms']:.2f} ms a layer; kernels of the busiest rank "
        f"{f['kernels_ms']:.2f} ms, exposed {f['exposed_ms']:.2f} ms; a rank sends at most {f['most_bytes_inside'] / 1e6:.0f} MB "
        f"inside of its node and {f['most_bytes_between'] / 1e6:.0f} MB out of it"
    )
    if asked.json is not None:
        columns = {name: getattr(m, name).tolist() for name in ("before", "after", "queries", "keys")}
        asked.json.write_text(json.dumps({**f, "by_rank": columns}, indent=1) + "\n")
    if asked.png is not None:
        draw(m, asked.png, f"{mask!r} on {asked.world} ranks{inner}")


def draw(m: Moved, path: Path, title: str) -> None:
    """Bars of each rank: its work where it is and disaggregated over the mean, and the rows that it receives."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks, mean = np.arange(len(m.after)), max(1.0, float(m.after.mean()))
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below, rows = figure.subplots(3, 1, sharex=True)
    top = 1.05 * max(peak(m.before), peak(m.after))
    for axes, values, name in ((above, m.before, "own queries"), (below, m.after, "disaggregated")):
        axes.bar(ranks, values / mean, width=1.0, color="#4c72b0")
        axes.axhline(1.0, color="#c44e52", linewidth=0.8)
        axes.set(ylabel="pairs over mean", ylim=(0, top), title=f"{name}: largest over mean {peak(values):.3f}")
    rows.bar(ranks, m.keys / 1e3, width=1.0, color="#55a868", label="keys")
    rows.bar(ranks, m.queries / 1e3, width=1.0, bottom=m.keys / 1e3, color="#dd8452", label="queries")
    rows.set(xlabel="rank", ylabel="1,000 rows", title=f"received: busiest over mean {m.busiest:.2f}")
    rows.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
