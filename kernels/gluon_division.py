"""Cutting items along what they stream, so that every program has an equal share: what a cut costs, and where to cut.

Equal items leave a last wave in which most multiprocessors idle, and a short shard with few heads has fewer items than there
are multiprocessors. A piece of an item leaves its float32 sums in scratch memory, and a second small kernel joins the pieces.
Only what ends after the mean is cut, by the wrap-around rule (McNaughton 1959: fill one program up to the common level, cut,
go on in the next), and only where the counted gain exceeds the counted cost. Everything here counts streamed tiles.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from distattn.kernels.tiles import LEFT, RIGHT, START

OVERHEAD = 1.5  # of an item or a piece beyond its tiles, in tiles: prologue and epilogue
RATE, BANDWIDTH, LAUNCH = 600e12, 3e12, 5e-6  # of a whole H100 or H200: FLOP/s of these kernels, bytes/s, seconds
PROCESSORS = 132  # that share them
GAIN = 0.01  # of the busiest program's time: less is within what such a count is worth

PROGRAM, ITEM, FROM, TO = range(4)  # columns of a division: tiles [FROM, TO) of ITEM are the work of PROGRAM


class Costs(NamedTuple):
    """What cutting costs, in streamed tiles.

    ``write``: a piece's float32 rows; reading them again costs as much, shared by all. ``merge``: a launch and the end of the
    one before it. ``least``: no piece is shorter; at twice its overhead and its rows at most a third of a piece is lost.
    """

    write: float
    merge: float
    least: int
    gain: float = GAIN


def costs_of(tile_flops: int, piece_bytes: int) -> Costs:
    """The price of cutting where a streamed tile costs ``tile_flops`` and a piece leaves ``piece_bytes``.

    All programs write pieces at about the same time, so that each has its share of the bandwidth (of the memory: that much of
    the scratch stays in the second-level cache is left out).
    """
    tile_seconds = tile_flops * PROCESSORS / RATE
    write = piece_bytes * PROCESSORS / BANDWIDTH / tile_seconds
    return Costs(write, LAUNCH / tile_seconds, math.ceil(2 * (OVERHEAD + write)))


def in_turn(prices: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray]:
    """(who, when done) of items that go, in order, to whoever is free first: a heap, and what the hardware does with programs."""
    free = [(0.0, p) for p in range(programs)]
    owner, done = np.empty(len(prices), np.int64), np.empty(len(prices))
    for item, price in enumerate(prices.tolist()):
        load, p = free[0]
        owner[item], done[item] = p, load + price
        heapq.heapreplace(free, (load + price, p))
    return owner, done


def is_piece(division: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Whether each row of a division is less than its item."""
    return division[:, TO] - division[:, FROM] < tiles[division[:, ITEM]]


def busiest_of(division: np.ndarray, tiles: np.ndarray, unit: int, programs: int, stay: bool, write: float) -> float:
    """When the last program ends, in streamed tiles; arguments as for :func:`divide`."""
    prices = (division[:, TO] - division[:, FROM]) * unit + OVERHEAD + write * is_piece(division, tiles)
    return float((np.bincount(division[:, PROGRAM], prices) if stay else in_turn(prices, programs)[1]).max())


def divide(tiles: np.ndarray, unit: int, programs: int, stay: bool, costs: Costs | None) -> np.ndarray:
    """Who does what, int64 [n, 4]: every item whole, or all of its pieces.

    Args:
        tiles: of every item, in the order in which they are begun. An item is cut between two of them.
        unit: what one of them costs (a query tile is streamed once a head of the group).
        programs: that run at the same time.
        stay: programs work through their rows one by one. Otherwise every row is a program of its own, and the hardware
            starts them in order: pieces come last, long ones first, which is best where nobody gets more than two.
        costs: None cuts nothing.
    """
    prices = tiles * unit + OVERHEAD
    mean = prices.sum() / programs
    items = np.arange(len(tiles))
    whole = np.stack([items, items, np.zeros_like(items), tiles], 1)
    # whoever ends last began before the mean, so no order loses more than the longest item
    if not stay and (costs is None or prices.max() <= costs.gain * mean):
        return whole
    owner, done = in_turn(prices, programs)
    if stay:
        whole[:, PROGRAM] = owner
    busiest = done.max()
    if costs is None or busiest - mean <= max(costs.merge, costs.gain * busiest):
        return whole
    first = int(np.argmax(done > mean))
    loads = np.zeros(programs)
    np.maximum.at(loads, owner[:first], done[:first])
    cuts = [np.concatenate([whole[:first], _fill(tiles, first, loads, unit, costs)])]
    if len(tiles) < programs:
        cuts.append(_one_each(tiles, programs, -(-costs.least // unit)))
    best, least = whole, (1 - costs.gain) * busiest
    for cut in cuts:
        cut = cut if stay else _long_pieces_last(cut, tiles)
        time = costs.merge + busiest_of(cut, tiles, unit, programs, stay, costs.write)
        time += costs.write * np.count_nonzero(is_piece(cut, tiles)) / programs
        if time < least:
            best, least = cut, time
    return best


def _fill(tiles: np.ndarray, first: int, loads: np.ndarray, unit: int, costs: Costs) -> np.ndarray:
    """The items from ``first`` on: one program after the other, the busiest first, gets what brings it to the level of all."""
    least = -(-costs.least // unit)
    piece = OVERHEAD + costs.write
    work, given = float((tiles[first:] * unit + OVERHEAD).sum()), float(loads.sum())
    item, done, made = first, 0, []
    order = np.argsort(-loads, kind="stable").tolist()
    for left, p in zip(range(len(order), 0, -1), order, strict=True):
        # every program but the last ends with a cut: one piece more, and what was whole before leaves its rows too
        cuts = piece * (left - 1) + costs.write * min(left - 1, len(tiles) - item)
        room = (work + given + cuts) / left - loads[p] if left > 1 else math.inf
        given -= loads[p]
        while item < len(tiles):
            rest = int(tiles[item]) - done
            price = OVERHEAD + (costs.write if done else 0.0)
            take = rest
            if rest * unit + price > room + costs.least / 2:
                take = min(int(max(0.0, room - piece) // unit), rest - least)
                if take < least:
                    break
                price = piece
            made.append((p, item, done, done + take))
            room -= take * unit + price
            work -= take * unit + (OVERHEAD if take == rest else 0.0)
            item, done = (item + 1, 0) if take == rest else (item, done + take)
    return np.array(made, np.int64).reshape(-1, 4)


def _one_each(tiles: np.ndarray, programs: int, least: int) -> np.ndarray:
    """Every item in equal pieces, one a program: as short as there are programs for, and not below ``least``."""
    longest = max(least, math.ceil(tiles.sum() / programs))
    while (counts := np.minimum(-(-tiles // longest), np.maximum(1, tiles // least))).sum() > programs:
        longest += 1
    made: list[tuple[int, int, int, int]] = []
    for item, (n, count) in enumerate(zip(tiles.tolist(), counts.tolist(), strict=True)):
        made += [(len(made) + i, item, n * i // count, n * (i + 1) // count) for i in range(count)]
    return np.array(made, np.int64)


def _long_pieces_last(division: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Whole items in order, then pieces by length; each a program."""
    length, piece = division[:, TO] - division[:, FROM], is_piece(division, tiles)
    division = division[np.lexsort((np.where(piece, -length, 0), piece))]
    division[:, PROGRAM] = np.arange(len(division))
    return division


def entries_of_piece(entries: np.ndarray, first: int, last: int, block: int) -> np.ndarray:
    """The entries of tiles [first, last) of an item, in order of position; streamed tiles have ``block`` rows.

    Args:
        entries: all of the item, rows of :class:`distattn.kernels.tiles.TileTable`.
    """
    edges = np.concatenate([np.zeros((len(entries), 1), np.int64), np.cumsum(entries[:, LEFT : RIGHT + 1], 1)], 1)
    begin = np.cumsum(edges[:, -1]) - edges[:, -1]
    a, b = (np.clip(at - begin, 0, edges[:, -1])[:, None] for at in (first, last))
    made = entries.copy()
    made[:, START] += a[:, 0] * block
    made[:, LEFT : RIGHT + 1] = np.diff(np.clip(edges, a, b), axis=1)
    return made[(b > a)[:, 0]]
