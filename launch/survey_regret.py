"""What a choice by a wrong description costs: links have half or twice the bandwidth that the file says. Simulated."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from distattn.launch.survey import MASKS, Case, described

if TYPE_CHECKING:
    from distattn.parallel.cluster import Cluster

# (links, factor of their bandwidth)
TRUTHS = tuple(product(("inside", "between", "all"), (0.5, 2.0)))


def sample(quick: bool) -> list[Case]:
    """Cases in which communication matters: few tokens a rank, several nodes, slow links."""
    if quick:
        return [Case("l40s", "32:8", "causal", 32 << 10, 16)]
    sizes = ((32 << 10, 8), (64 << 10, 16), (128 << 10, 64))
    made = [Case(c, "32:8", mask, *size) for c, mask, size in product(("h200", "l40s"), MASKS, sizes)]
    return made + [Case("a100", "32:32", mask, *size) for mask, size in product(MASKS, sizes)]


def with_bandwidth(cluster: Cluster, links: str, factor: float) -> Cluster:
    """The cluster with other bandwidths of its links inside nodes, between them, or of all; latencies stay."""
    inside, between = cluster.inside, cluster.between
    if links in ("inside", "all"):
        shared = None if inside.shared_gb_s is None else inside.shared_gb_s * factor
        inside = replace(inside, port_gb_s=inside.port_gb_s * factor, shared_gb_s=shared)
    if between is not None and links in ("between", "all"):
        between = replace(between, nic_gb_s=between.nic_gb_s * factor)
    return replace(cluster, inside=inside, between=between)


def regrets(quick: bool, say: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """For each case and truth: what the description's choice takes in truth over the best choice there, less 1.

    The best is auto's on the true cluster, or the choice itself where that is faster: auto does not look at what cannot be
    more than 2% faster.
    """
    from distattn.parallel.auto import decide
    from distattn.parallel.cluster import load_cluster
    from distattn.parallel.price import price

    found, cases = [], sample(quick)
    for i, case in enumerate(cases):
        cluster, mask, shape = load_cluster(case.cluster), case.make_mask(), case.shape()
        say(i, len(cases), str(case))
        chosen = decide(mask, case.world, shape, cluster).best.strategy
        for links, factor in TRUTHS:
            if links == "between" and case.world <= cluster.devices:
                continue
            truth = with_bandwidth(cluster, links, factor)
            best = decide(mask, case.world, shape, truth).best
            taken = best if best.strategy == chosen else price(chosen, mask, case.world, shape, truth)
            regret = taken.seconds / min(best.seconds, taken.seconds) - 1
            names = {"choice": described(chosen, case.world), "best": described(best.strategy, case.world)}
            found.append({"case": str(case), "simulated": True, "links": links, "factor": factor, "regret": regret, **names})
    say(len(cases), len(cases), "done")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Mean, median and worst by what is off, and the worst case in words; Markdown."""
    lines = ["Simulated regret where bandwidths are off by 2 from the cluster file:", ""]
    lines += ["| links | true bandwidth | cases | same choice | mean | median | worst |", "|---|---|---|---|---|---|---|"]
    for links, factor in [*TRUTHS, ("every row", None)]:
        mine = [f for f in found if factor is None or (f["links"], f["factor"]) == (links, factor)]
        if not mine:
            continue
        values = [f["regret"] for f in mine]
        same = sum(f["choice"] == f["best"] for f in mine)
        times = "" if factor is None else f"{factor:g} x"
        shown = " | ".join(f"{x:.1%}" for x in (statistics.mean(values), statistics.median(values), max(values)))
        lines.append(f"| {links} | {times} | {len(mine)} | {same} | {shown} |")
    worst = max(found, key=lambda f: f["regret"])
    lines += ["", f"Worst: {worst['case']}, {worst['links']} links {worst['factor']:g} x: {worst['choice']} for {worst['best']}."]
    return "\n".join(lines)
