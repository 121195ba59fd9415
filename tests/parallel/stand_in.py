"""A schedule for pools until the product has one: runs of queries go to the servers in turn, keys follow them."""

from __future__ import annotations

from dataclasses import replace

from distattn import config
from distattn.kernels.bands import K0, K1
from distattn.parallel import schedule, schedules
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan, What
from distattn.parallel.strategy import Strategy
from tests.parallel.plans import _Builder, _fetch

GRAIN = 7


def with_servers(layout: Layout, servers: int) -> Layout:
    columns = layout.seg_rank, layout.seg_start, layout.seg_count
    return Layout(layout.name, layout.n_tokens, layout.n_valid, layout.world + servers, layout.step, *columns)


def disaggregate(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    build = _Builder(layout, mask)
    trainers = layout.world - strategy.servers
    arrived: dict[tuple[int, int], list[tuple[int, int]]] = {}
    runs = [(o, a, min(a + GRAIN, layout.rows(o))) for o in range(trainers) for a in range(0, layout.rows(o), GRAIN)]
    servers = strategy.servers
    jobs = [(1 + n % 2, trainers + n % (servers + 1) if n % (servers + 1) < servers else q[0], q) for n, q in enumerate(runs)]
    for stage, rank_of, q in sorted(jobs):
        served = False
        for other in range(trainers):
            table = build.pieces(q, (other, 0, layout.rows(other)))
            if not len(table):
                continue
            kv = (other, int(table[:, K0].min()), int(table[:, K1].max()))
            served = build.task(stage, rank_of, q, kv) or served
            if other != rank_of:
                _fetch(build, arrived.setdefault((rank_of, other), []), rank_of, kv, stage)
        if served and rank_of != q[0]:
            build.send(q[0], rank_of, q, What.Q, stage - 1, stage)
            build.send(rank_of, q[0], q, What.OUT, stage + 1, stage + 2, lane=2)
    return build.plan("disaggregate", 4)


def install() -> None:
    if "disaggregate" in schedules.SCHEDULES:
        return
    schedules.SCHEDULES["disaggregate"] = schedules.Named("contiguous", disaggregate, "stand-in")
    make = schedules.make_layout

    def make_layout(strategy, mask, world, pad_to_equal=False):
        layout, inner = make(replace(strategy, servers=0), mask, world - strategy.servers, pad_to_equal)
        return with_servers(layout, strategy.servers), with_servers(inner, strategy.servers)

    schedules.make_layout = schedule.make_layout = make_layout
    config.SCHEDULES = (*config.SCHEDULES, "disaggregate")
