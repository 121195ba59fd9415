"""Relays: rows that several ranks need leave their owner once, and these ranks share them out among themselves.

The owner of a long document would send its keys to every server that works on it, and get a partial result of its queries from
each: its links bind while those of others idle. So the servers that need the same rows get a part of them each and pass it on to
the others (a scatter, then an all-gather). On the way home each merges what the others made of its part and sends that on (a
reduce-scatter, then a gather). No rank receives more rows than straight from the owners: only who sends them changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.parallel.intervals import Intervals, cut, expand, groups, union
from distattn.parallel.plan import HOME_LANE

PASSED_ON, FROM_OWNER = 0, 1  # lanes: what others pass on or merge waits for nothing that is needed later
LEAST = 512  # rows of a part: smaller messages cost more than they save
MOST = 128  # transfers of rows that the same servers need: where these are many, others lead the next rows
STRAIGHT, SHARED, IN_NODES = 1, 2, 3  # hops


def input_lane(src: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The lane on which ``src`` sends rows of ``owner``."""
    return np.where(src == owner, FROM_OWNER, PASSED_ON)


def home_lane(dst: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The lane on which results and gradients of rows of ``owner`` travel to ``dst``, who merges them if it is another."""
    return np.where(dst == owner, HOME_LANE, PASSED_ON)


class Needs(NamedTuple):
    """Rows [start, stop) of ``owner`` that ``server`` needs from stage ``use`` on; int64 [n], none twice."""

    server: np.ndarray
    owner: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    use: np.ndarray

    def take(self, some: np.ndarray) -> Needs:
        return Needs(*(column[some] for column in self))


class Hops(NamedTuple):
    """Rows [start, stop) of ``owner`` from ``src`` to ``dst``, posted and awaited at boundaries; int64 [n]."""

    src: np.ndarray
    dst: np.ndarray
    owner: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    post: np.ndarray
    need: np.ndarray

    def mirrored(self, stages: int) -> Hops:
        """The same hops in the other direction, in time too."""
        return Hops(self.dst, self.src, *self[2:5], stages - self.need, stages - self.post)


def relayed(needs: Needs, hops: int, devices: int = 0) -> Hops:
    """The hops that bring every server what it needs.

    Args:
        needs: each ``use`` at least ``hops``.
        hops: 1: straight from the owner. 2: rows that several servers need are shared out among them. 3: they reach each other
            node once, and are shared out in it with the last hop; in the owner's own node they come straight.
        devices: ranks of a node, for 3 hops.
    """
    assert (needs.use >= hops).all() and (hops < IN_NODES or devices > 1)
    if hops == IN_NODES:
        near = needs.server // devices == needs.owner // devices
        ways = _straight(needs.take(near)), _shared(needs.take(~near), hops, devices)
        return Hops(*(np.concatenate(columns) for columns in zip(*ways, strict=True)))
    return _straight(needs) if hops == STRAIGHT else _shared(needs, hops, devices)


def _straight(needs: Needs) -> Hops:
    zero = np.zeros_like(needs.use)
    return _joined(Hops(needs.owner, needs.server, needs.owner, needs.start, needs.stop, zero, needs.use))


def _shared(needs: Needs, hops: int, devices: int) -> Hops:
    """Of 2 hops, and of 3 for servers in other nodes than the owner."""
    if not len(needs.server):
        return _straight(needs)
    same, one = groups(needs.server, needs.owner, needs.use)
    whole = union(Intervals(same, needs.start, needs.stop))
    server, owner, use = (column[one][whole.key] for column in (needs.server, needs.owner, needs.use))
    [(run, low, high)] = cut(Intervals(owner, whole.start, whole.stop))
    server, owner, use = server[run], owner[run], use[run]
    cell, _ = groups(owner, low)
    order = np.lexsort((server, cell))
    server, owner, use, low, high, cell = (x[order] for x in (server, owner, use, low, high, cell))
    begin = np.searchsorted(cell, np.arange(int(cell.max()) + 1))  # the pieces of a cell stand together
    count = np.diff(np.append(begin, len(cell)))
    parts = np.clip((high - low)[begin] // LEAST, 1, np.minimum(np.maximum(MOST // count, 1), count))
    # Each part of a cell is led by one of its servers, in turns; every server of the cell needs every part.
    piece, part = expand(np.zeros_like(cell), parts[cell])
    at = cell[piece]
    first = low[piece] + (high - low)[piece] * part // parts[at]
    last = low[piece] + (high - low)[piece] * (part + 1) // parts[at]
    leader = begin[at] + (at * parts[at] + part) % count[at]
    soonest = np.minimum.reduceat(use, begin)[at]
    lead = np.minimum(use[leader], soonest - hops + 1)
    lead = np.where(count[at] == 1, use[leader], lead)  # nobody to pass it on to
    src, need, held = server[leader], use[piece], lead
    if hops == IN_NODES:
        src, need, held = _in_nodes(server, use, cell, piece, part, leader, lead, soonest, devices)
    leads = leader == piece
    src = np.where(leads, owner[piece], src)
    # What is passed on leaves as soon as its source has it, but two boundaries before it is needed: the lane is first in, first
    # out, and what leaves later may then not be needed earlier.
    post, need = np.where(leads, 0, np.maximum(held, need - 2)), np.where(leads, lead, need)
    return _joined(Hops(src, server[piece], owner[piece], first, last, post, need))


def _in_nodes(
    server: np.ndarray,
    use: np.ndarray,
    cell: np.ndarray,
    piece: np.ndarray,
    part: np.ndarray,
    leader: np.ndarray,
    lead: np.ndarray,
    soonest: np.ndarray,
    devices: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, need, when the source has it) of every part at every server but its leader: one a node has it from the leader."""
    number, first = groups(cell, server // devices)  # servers are sorted in a cell, so those of a node stand together
    count = np.bincount(number)
    node, home = number[piece], number[leader]
    chief = np.where(node == home, leader, first[node] + part % count[node])
    passes_on = (piece == chief) & (count[node] > 1)
    src = server[np.where(piece == chief, leader, chief)]
    return src, np.where(passes_on, soonest - 1, use[piece]), np.where(piece == chief, lead, soonest - 1)


def _joined(hops: Hops) -> Hops:
    """Neighbouring rows that travel together, as one run."""
    number, first = groups(hops.src, hops.dst, hops.owner, hops.post, hops.need)
    runs = union(Intervals(number, hops.start, hops.stop))
    of = first[runs.key]
    return Hops(hops.src[of], hops.dst[of], hops.owner[of], runs.start, runs.stop, hops.post[of], hops.need[of])
