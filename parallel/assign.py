"""Who computes which piece of core attention: equal work on every rank for few bytes (core-attention disaggregation).

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation". Documents stay where they are. An
over-loaded rank gives away tails of its longest documents, or what its rows do with keys that it would have to receive; every
other rank takes one piece, of a shape that buys the most pairs per row moved. Integer arithmetic and stable sorts: all ranks make
the same assignment without a word.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from distattn.parallel.assignment import Assignment
from distattn.parallel.carve import Piece, Region, Share, Strip, Weights, carve
from distattn.parallel.cells import Cells, Groups
from distattn.parallel.layout import Layout
from distattn.parallel.mask import Mask
from distattn.parallel.shed import WHOLE, RowStrip, Source, amounts, give


@dataclass(frozen=True)
class Cost:
    """What moved rows weigh, in any one unit.

    Args:
        kv_row: a row of keys and values.
        query_row: a query row there and its finished output back.
        partial_row: the same where the output is a float32 state.
    """

    kv_row: int = 1
    query_row: int = 8
    partial_row: int = 12


def assign(
    layout: Layout,
    mask: Mask,
    *,
    cost: Cost = Cost(),
    servers: Sequence[int] | None = None,
    tolerance: float = 0.02,
    receive_rows: int | None = None,
    smallest: int = 128,
    speeds: Sequence[float] | None = None,
) -> Assignment:
    """Pieces for every rank, none above ``(1 + tolerance)`` times its share of the visible pairs.

    Raises:
        ValueError: a limit that nothing can meet; names it.
    """
    _check(layout, mask)
    groups = Groups.of(mask)
    cells = Cells.of(layout, groups)
    load = cells.load(layout.world)
    shares = _shares(load, layout.world, servers, speeds, tolerance)
    weights = Weights(cost.query_row, cost.kv_row, smallest)
    plan = _Planner(layout, groups, cells, load, shares, weights)
    return plan.assignment()


def _check(layout: Layout, mask: Mask) -> None:
    if layout.step != 1 and (layout.seg_count > 1).any():
        raise ValueError(
            f"disaggregate cuts runs of neighbouring positions, but every shard of {layout!r} holds each {layout.step}th. "
            "Use layout contiguous or zigzag; striped shards are balanced as they are."
        )
    if mask.n_tokens != layout.n_valid:
        raise ValueError(f"{mask!r} was asked for on {layout!r}, which holds {layout.n_valid} tokens. Make both for one length.")


def _shares(
    load: np.ndarray, world: int, servers: Sequence[int] | None, speeds: Sequence[float] | None, tolerance: float
) -> np.ndarray:
    """The most pairs that each rank may compute, int64 [world]."""
    speed = np.ones(world) if speeds is None else np.asarray(speeds, dtype=np.float64)
    parts = np.rint(speed / speed.max() * (1 << 20)).astype(np.int64)
    if servers is not None:
        chosen = np.zeros(world, dtype=bool)
        chosen[list(servers)] = True
        parts = np.where(chosen, parts, 0)
    total, whole = int(load.sum()), int(parts.sum())
    grown = int(round((1 + tolerance) * (1 << 20)))
    return np.array([total * int(p) * grown // (whole << 20) for p in parts], dtype=np.int64)


def _finishing(free: list[tuple[int, int]], need: int, allowed: int) -> tuple[list[tuple[int, int]], int]:
    """One or two of ``free`` (rising) that hold all of ``need`` and waste at most ``allowed`` pairs: (they, waste), else none."""
    best: tuple[list[tuple[int, int]], int] = ([], allowed + 1)
    at = bisect_left(free, (need, -1))
    if at < len(free) and free[at][0] - need < best[1]:
        best = ([free[at]], free[at][0] - need)
    for one in range(len(free) - 1, max(-1, len(free) - 33), -1):
        rest = need - free[one][0]
        if rest <= 0:
            continue
        if rest > free[one][0]:
            break
        at = bisect_left(free, (rest, -1), 0, one)
        if at < one and free[at][0] - rest < best[1] // 2:
            best = ([free[one], free[at]], free[at][0] - rest)
    return best if best[0] else ([], 0)


class _Pool:
    """Work of one document (or of several short ones) that is given away."""

    def __init__(self, group: int, by_keys: bool):
        self.group = group
        self.strips: list = []
        self.by_keys = by_keys

    def region(self) -> Region:
        return Region(tuple(self.strips), 0, WHOLE).trimmed()


class _Planner:
    def __init__(self, layout: Layout, groups: Groups, cells: Cells, load: np.ndarray, shares: np.ndarray, weights: Weights):
        self.layout, self.groups, self.cells, self.load, self.shares, self.weights = layout, groups, cells, load, shares, weights
        self.grain = max(1, int(shares.max()) // 512)

    def assignment(self) -> Assignment:
        pools, kept = self._shed()
        spare = np.maximum(self.shares - kept, 0)
        pieces: list[Piece] = []
        self.peeled: list[Piece] = []
        given = [strip for pool in pools for strip in pool.strips]
        for pool, chosen in self._match(pools, spare):
            pieces += carve(pool.region(), chosen, self.weights)
        return self._table(pieces + self.peeled, given)

    def _sources(self) -> list[Source]:
        g, c = self.groups, self.cells
        offset = c.first - g.first[c.group]
        seen = np.minimum(g.keys[c.group], offset + g.lead[c.group])
        before = np.clip(c.first - g.k0[c.group], 0, seen)
        last = g.work_before(c.group, c.stop) - g.work_before(c.group, c.stop - 1)
        seen = offset + g.lead[c.group]
        columns = (np.arange(len(c)), c.group, c.first, c.stop, c.work, g.plain[c.group], seen, g.keys[c.group], before, last)
        return [Source(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _shed(self) -> tuple[list[_Pool], np.ndarray]:
        excess = self.load - self.shares
        over = np.flatnonzero(excess > 0)
        gaps = np.maximum(-excess, 0)
        typical = int(np.sort(gaps)[-max(1, (gaps > 0).sum() // 2 + 1)]) if (gaps > 0).any() else 1
        typical = max(typical, 1)
        wanted = isqrt(typical * self.weights.query_row // self.weights.kv_row)
        sources = self._sources()
        bounds = np.searchsorted(self.cells.rank, np.arange(self.layout.world + 1))
        kept = self.load.copy()
        by_group: dict[int, _Pool] = {}
        for rank in over.tolist():
            mine = sources[bounds[rank] : bounds[rank + 1]]
            for source, amount in zip(mine, amounts(mine, int(excess[rank]), wanted, self.groups), strict=True):
                if amount:
                    strips = give(source, amount, typical, self.weights, self.groups)
                    by_group.setdefault(source.group, _Pool(source.group, source.plain)).strips += strips
                    kept[rank] -= sum(s.below(WHOLE) for s in strips)
        self.held: dict[int, dict[int, int]] = {}
        for source, rank in zip(sources, self.cells.rank.tolist()):
            spare = int(self.shares[rank] - kept[rank])
            if source.group not in by_group or excess[rank] >= 0:
                continue
            held = source.before + source.stop - source.start
            if source.plain and source.before:
                q, kv = self.weights.query_row, self.weights.kv_row
                front = (source.stop - source.start) * source.before
                keep = kv * source.before + min(2 * isqrt(q * kv * spare), q * spare // held)
                if 2 * isqrt(q * kv * (spare + front)) * 11 // 10 < keep:
                    by_group[source.group].strips.append(source.strip(source.start, source.before))
                    kept[rank] -= front
                    continue
            d = self.held.setdefault(source.group, {})
            d[rank] = max(d.get(rank, 0), held)
        for pool in by_group.values():
            pool.strips.sort(key=lambda s: s.start)
        return [by_group[g] for g in sorted(by_group)], kept

    def _match(self, pools: list[_Pool], spare: np.ndarray) -> list[tuple[_Pool, list[Share]]]:
        """Servers for every pool: whole ones as far as the sums allow, longest documents and largest servers first."""
        regions = [pool.region() for pool in pools]
        work = [region.work for region in regions]
        order = sorted(range(len(pools)), key=lambda i: (-regions[i].k_stop, i))
        free = sorted((int(w) - self.grain, s) for s, w in enumerate(spare.tolist()) if w > 2 * self.grain)
        slack = sum(w for w, _ in free) - sum(work)
        matched = []
        for done, i in enumerate(order):
            need, chosen = work[i], []
            self.tiny = 2 * self.grain + self.weights.smallest * min(regions[i].k_stop, regions[i].rows, 4096)
            need = self._affine(pools[i], need, chosen, free, slack)
            while need > 0:
                if not free:
                    raise ValueError("no capacity")
                allowed = max(slack, 0) * 2 // (len(order) - done + 1)
                taken, waste = _finishing(free, need, allowed)
                for w, s in taken:
                    free.remove((w, s))
                    chosen.append(Share(s, w + self.grain))
                    need -= w
                if taken:
                    slack -= waste
                    break
                w, s = free.pop()
                used = min(w, need) if w >= need or need - w >= self.tiny else max(need - self.tiny, 1)
                chosen.append(Share(s, used + self.grain))
                if w - used > self.tiny:
                    insort(free, (w - used - self.grain, s))
                    slack -= self.grain
                need -= used
            matched.append((pools[i], sorted(chosen, key=lambda c: (-c.held, -c.most, c.server))))
        return matched

    def _affine(self, pool: _Pool, need: int, chosen: list[Share], free: list[tuple[int, int]], slack: int) -> int:
        """Servers that have some of the document's keys anyway."""
        if not pool.by_keys or not free or need < 2 * free[-1][0]:
            return need
        held = self.held.get(pool.group, {})
        q, kv = self.weights.query_row, self.weights.kv_row
        for w, s in sorted(free, reverse=True):
            usual = 2 * isqrt(q * kv * w)
            if not held.get(s) or w <= 2 * self.tiny or w + self.tiny > need:
                continue
            if q * w // held[s] < usual * 9 // 10:
                taken, done = self._peel(pool, held[s], w)
                if done + 2 * self.grain > w :
                    pool.strips = taken[1]
                    self.peeled += [Piece(s, strip, 0, strip.reach) for strip in taken[0]]
                    free.remove((w, s))
                    need -= done
                    continue
            if kv * held[s] * 8 > usual:
                free.remove((w, s))
                chosen.append(Share(s, w + self.grain, held[s]))
                need -= w
        return need

    def _peel(self, pool: _Pool, held: int, most: int) -> tuple[tuple[list[Strip], list[Strip]], int]:
        """The last rows that see only ``held`` keys, up to ``most`` pairs: ((taken, rest), pairs)."""
        taken, rest, done = [], [], 0
        for s in sorted(pool.strips, key=lambda s: (-s.reach, -s.start)):
            room, work = most - done, s.below(WHOLE)
            if s.reach > held or room <= 0:
                rest.append(s)
            elif work <= room:
                taken.append(s)
                done += work
            else:
                low, high = s.start, s.stop
                while low < high:
                    middle = (low + high) // 2
                    if s.part(middle, s.stop).below(WHOLE) <= room:
                        high = middle
                    else:
                        low = middle + 1
                if s.stop - low >= self.weights.smallest and low - s.start >= self.weights.smallest:
                    taken.append(s.part(low, s.stop))
                    done += taken[-1].below(WHOLE)
                    s = s.part(s.start, low)
                rest.append(s)
        return (taken, sorted(rest, key=lambda s: s.start)), done

    def _table(self, pieces: list[Piece], given: list[Strip | RowStrip]) -> Assignment:
        """Columns of the pieces and of what stays at home."""
        moved = [self._columns(p.server, p.strip, p.k_first, p.k_stop) for p in pieces]
        # Of a strip that is given away its owner keeps the keys from the cap on, where its rows see any.
        taken = [self._columns(0, s, 0, min(s.cap, s.reach)) for s in given]
        table = np.concatenate([np.array(moved, dtype=np.int64).reshape(-1, 6), self._home(np.array(taken, dtype=np.int64).reshape(-1, 6))])
        table = table[np.lexsort((table[:, 4], table[:, 2], table[:, 1], table[:, 0]))]
        return Assignment(*(np.ascontiguousarray(column) for column in table.T))

    def _columns(self, server: int, strip: Strip | RowStrip, k_first: int, k_stop: int) -> tuple[int, int, int, int, int, int]:
        """A row of the assignment: keys that are all the rows see stand as 0 to n_tokens."""
        c, n = self.cells, self.layout.n_tokens
        group, row = int(c.group[strip.cell]), int(c.row[strip.cell] - c.first[strip.cell]) + strip.start
        k0 = int(self.groups.k0[group])
        if isinstance(strip, RowStrip) or k_stop >= strip.seen_by_last(int(self.groups.keys[group])):
            last = n
        else:
            last = k0 + k_stop
        return server, int(c.rank[strip.cell]), row, row + strip.stop - strip.start, k0 + k_first if k_first else 0, last

    def _home(self, taken: np.ndarray) -> np.ndarray:
        """What the owners keep: rows between those that are given away, and keys from the cap on of rows that are cut by keys."""
        layout, n = self.layout, self.layout.n_tokens
        order = np.lexsort((taken[:, 2], taken[:, 1]))
        owner, start, stop, last = taken[order][:, [1, 2, 3, 5]].T
        ranks = np.flatnonzero(layout.rows_all)
        # Every rank begins one gap; each strip ends the gap before it and begins the next.
        gap_rank = np.concatenate([ranks, owner])
        begin, kind = np.concatenate([np.zeros_like(ranks), stop]), np.concatenate([np.zeros_like(ranks), np.ones_like(owner)])
        by = np.lexsort((begin, kind, gap_rank))
        gap_rank, begin = gap_rank[by], begin[by]
        end_rank, end = np.concatenate([owner, ranks]), np.concatenate([start, layout.rows_all[ranks]])
        by = np.lexsort((end, end_rank))
        gaps = np.stack([gap_rank, gap_rank, begin, end[by], np.zeros_like(begin), np.full_like(begin, n)], 1)
        rest = np.stack([owner, owner, start, stop, last, np.full_like(owner, n)], 1)
        return np.concatenate([gaps[gaps[:, 2] < gaps[:, 3]], rest[last < n]])
