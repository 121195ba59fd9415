"""Schedules: functions ``(layout, mask, ...) -> Plan``, one idea a file; and the names that users call them by."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from distattn.parallel import layout as layouts
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.plan import Plan
from distattn.parallel.relays import IN_NODES
from distattn.parallel.schedules.disaggregate import balanced, check_step, disaggregate
from distattn.parallel.schedules.double_ring import double_ring
from distattn.parallel.schedules.gather import PAIRS_A_ROW, PAIRS_A_ROW_FAR, gather
from distattn.parallel.schedules.ring import query_ring, ring
from distattn.parallel.schedules.tree import tree
from distattn.parallel.strategy import Balance, Rotate, Strategy
from distattn.parallel.transpose import Keep


def _contiguous(mask: Mask, world: int, pad: int) -> Layout:
    return layouts.contiguous(mask.n_tokens, world, pad)


def _zigzag(mask: Mask, world: int, pad: int) -> Layout:
    if mask.lengths is not None:
        return layouts.document_zigzag(mask.lengths, world, pad)
    return layouts.zigzag(mask.n_tokens, world, pad)


def _striped(mask: Mask, world: int, pad: int) -> Layout:
    if mask.lengths is not None:
        return layouts.document_striped(mask.lengths, world, pad)
    return layouts.striped(mask.n_tokens, world, pad)


LAYOUTS: dict[str, Callable[[Mask, int, int], Layout]] = {"contiguous": _contiguous, "zigzag": _zigzag, "striped": _striped}

Build = Callable[[Layout, Mask, Strategy, "int | None"], Plan]


@dataclass(frozen=True)
class Named:
    """A schedule by name: its own layout, the forward plan, and what it is for.

    ``turned`` is a forward plan that moves the query side instead, ``for_backward`` one whose transposition is the backward plan
    where that has work of its own.
    """

    layout: str
    build: Build
    about: str
    turned: Build | None = None
    for_backward: Build | None = None


def _ring(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    return ring(layout, mask, rank, laps=strategy.laps or 1)


def _query_ring(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    return query_ring(layout, mask, rank, laps=strategy.laps or 1)


def _double_ring(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    return double_ring(layout, mask, _inner_devices(layout, strategy), rank)


def _gather(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    far = strategy.devices is not None and strategy.devices < layout.world * strategy.ulysses
    return gather(layout, mask, strategy.stages, rank, PAIRS_A_ROW_FAR if far else PAIRS_A_ROW)


def _tree(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    return tree(layout, mask, _inner_devices(layout, strategy), strategy.in_flight, rank)


def _disaggregate(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None, backward: bool = False) -> Plan:
    check_step(layout)
    balance = strategy.balance or Balance()
    assignment = balanced(layout, mask, balance, backward, strategy.hops)
    cost = balance.backward if backward else balance.forward
    return disaggregate(layout, mask, assignment, strategy.stages, strategy.hops, cost)


def _disaggregate_backward(layout: Layout, mask: Mask, strategy: Strategy, rank: int | None) -> Plan:
    return _disaggregate(layout, mask, strategy, rank, backward=True)


def _inner_devices(layout: Layout, strategy: Strategy) -> int:
    """Ranks a node among those that share heads; with whole nodes exchanging heads every one is in a node of its own."""
    if strategy.devices is None:
        return layout.world
    return max(1, strategy.devices // strategy.ulysses)


SCHEDULES: dict[str, Named] = {
    "ring": Named("contiguous", _ring, "full masks and windows: keys hop from neighbour to neighbour", _query_ring),
    "zigzag": Named("zigzag", _ring, "causal masks: a ring with two chunks a rank, balanced exactly", _query_ring),
    "striped": Named("striped", _ring, "causal masks and windows: a ring with every P-th token a rank", _query_ring),
    "double_ring": Named(
        "zigzag", _double_ring, "many nodes: a ring in each, and one over all network links that hides behind it"
    ),
    "gather": Named(
        "contiguous", _gather, "packed documents and windows: only the keys that are needed, straight from their owners"
    ),
    "tree": Named(
        "zigzag", _tree, "few queries on many keys: queries travel down a tree, partial results are merged on the way up"
    ),
    "disaggregate": Named(
        "contiguous",
        _disaggregate,
        "packed documents of any lengths: tokens stay, pieces of attention go where there is time",
        for_backward=_disaggregate_backward,
    ),
}


POOLED = ("disaggregate",)  # schedules that give work to ranks without tokens


def checked_strategy(strategy: Strategy | str, world: int) -> Strategy:
    """The strategy if it can be built for ``world`` ranks.

    Raises:
        ValueError: for an unknown name or option, or degrees that do not multiply to the world.
    """
    s = Strategy(strategy) if isinstance(strategy, str) else strategy
    if not isinstance(s, Strategy):
        raise ValueError(f"A schedule is named by a text or a Strategy. Found {s!r}. Schedules are {', '.join(SCHEDULES)}.")
    _check_name("schedule", s.schedule, SCHEDULES)
    if s.layout is not None:
        _check_name("layout", s.layout, LAYOUTS)
    for name, known in (("rotate", get_args(Rotate)), ("keep", get_args(Keep))):
        if getattr(s, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}. Found {getattr(s, name)!r}.")
    for name in ("ulysses", "devices", "stages", "in_flight", "laps", "hops"):
        value = getattr(s, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of 1 or more. Found {value!r}.")
    if s.hops is not None and s.hops > IN_NODES:
        raise ValueError(f"hops must be 1 (straight), 2 (relays) or {IN_NODES} (relays by nodes). Found {s.hops}.")
    _check_servers(s, world)
    rings, shared = ("ring", "zigzag", "striped"), ("disaggregate",)
    takers_of = {"stages": ("gather", *shared), "in_flight": ("tree",), "laps": rings, "hops": shared, "balance": shared}
    for name, takers in takers_of.items():
        if getattr(s, name) is not None and s.schedule not in takers:
            raise ValueError(f"{name} is an option of {', '.join(takers)}; {s.schedule} has none. Leave it out.")
    if s.layout is not None and s.schedule in LAYOUTS and s.layout != s.schedule:
        raise ValueError(f"{s.schedule} is a ring on the {s.schedule} layout. For a ring on {s.layout}, ask for schedule 'ring'.")
    if world % s.ulysses:
        raise ValueError(
            f"ulysses={s.ulysses} does not divide the {world} ranks of the group. Use one of {_divisors(world)}: "
            "the schedule runs in each of `ulysses` groups of world / ulysses ranks."
        )
    if s.devices is not None and (world % s.devices or (s.devices % s.ulysses and s.ulysses % s.devices)):
        raise ValueError(
            f"devices={s.devices} a node does not fit {world} ranks with ulysses={s.ulysses}. Nodes must divide the group, "
            f"and one of the two degrees the other: devices of {_divisors(world)}."
        )
    if s.rotate == "q" and SCHEDULES[s.schedule].turned is None:
        turned = ", ".join(name for name, entry in SCHEDULES.items() if entry.turned)
        raise ValueError(f"rotate='q' is for {turned}; {s.schedule} moves its rows its own way. Leave rotate at 'auto'.")
    return s


def make_layout(strategy: Strategy, mask: Mask, world: int, pad_to_equal: bool = False) -> tuple[Layout, Layout]:
    """(layout of the tokens over all ranks, layout of the plan over ``world / ulysses`` groups that share their tokens)."""
    name = strategy.layout or SCHEDULES[strategy.schedule].layout
    holders = world // strategy.ulysses - strategy.servers
    inner = layouts.with_idle_ranks(LAYOUTS[name](mask, holders, strategy.ulysses if pad_to_equal else 0), strategy.servers)
    return layouts.subdivided(inner, strategy.ulysses), inner


def make_plan(
    strategy: Strategy | str, mask: Mask, world: int, pad_to_equal: bool = False, rank: int | None = None, turned: bool = False
) -> Plan:
    """The forward plan of a strategy on the layout that goes with it; with ``ulysses``, that of the groups of ranks.

    Args:
        rank: of the plan's world; only its tasks get their bands. None: for all ranks.
        turned: the plan that moves the query side, which a backward plan may be made from.

    Raises:
        ValueError: for a name that no schedule has, with the nearest one, and for options that do not fit.
    """
    strategy = checked_strategy(strategy, world)
    _, layout = make_layout(strategy, mask, world, pad_to_equal)
    return build_plan(strategy, layout, mask, rank, turned)


def build_plan(strategy: Strategy, layout: Layout, mask: Mask, rank: int | None = None, turned: bool = False) -> Plan:
    """As :func:`make_plan`, on a layout that is there."""
    named = SCHEDULES[strategy.schedule]
    build = named.turned if turned else named.build
    assert build is not None
    return build(layout, mask, strategy, rank)


def _check_servers(s: Strategy, world: int) -> None:
    if not isinstance(s.servers, int) or isinstance(s.servers, bool) or s.servers < 0:
        raise ValueError(f"servers must be a whole number of 0 or more. Found {s.servers!r}.")
    if not s.servers:
        return
    if s.schedule != "disaggregate":
        raise ValueError(f"servers without tokens are for disaggregate; {s.schedule} has none. Leave servers at 0.")
    if s.ulysses > 1:
        raise ValueError(f"servers={s.servers} hold no rows to exchange heads for, but ulysses={s.ulysses}. Use one of the two.")
    if s.servers >= world:
        raise ValueError(
            f"servers={s.servers} of {world} ranks leave none that holds tokens. Use at most servers={world - 1}, or more ranks."
        )


def _check_name(kind: str, found: Any, known: Any) -> None:
    if found not in known:
        near = difflib.get_close_matches(str(found), known, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no {kind} {found!r}. Use one of {', '.join(known)}.{hint}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
