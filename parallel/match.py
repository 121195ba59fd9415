"""Matching: which servers share the work of which pool, so that all are full and few are split between pools."""

from __future__ import annotations

from bisect import bisect_left, insort
from math import isqrt

from distattn.parallel.carve import Piece, Share, Weights
from distattn.parallel.shed import Pool, Shed
from distattn.parallel.strips import WHOLE, RowStrip, Strip

NEAR = 64  # how many of the largest servers are looked at for one of the pool's own node
PAIRS = 32  # how many of the largest servers are tried as one of two that hold what is left of a pool


class Full(Exception):
    """The servers cannot hold the work with the room that rounding needs."""


class Matching:
    """Servers for pools, longest documents and largest servers first: a large piece is worth a long document's keys.

    Every part of a server is kept ``grain`` pairs short of what it may hold: cuts fall on whole rows and keys.

    Args:
        room: pairs that each rank has room for, by rank.
        devices: ranks of a node, to prefer servers of the pool's own; 0: all are of one.
    """

    def __init__(self, work: Shed, room: list[int], weights: Weights, grain: int, cell_rank: list[int], devices: int):
        self.work, self.weights, self.grain, self.devices, self.cell_rank = work, weights, grain, devices, cell_rank
        self.free = sorted((pairs - grain, server) for server, pairs in enumerate(room) if pairs > 2 * grain)
        self.slack = sum(pairs for pairs, _ in self.free) - sum(pool.work for pool in work.pools)
        self.slack -= sum(s.work for s in work.short)
        self.pieces = list(work.visits)  # that need no carving
        self.shares: list[tuple[Pool, list[Share]]] = []
        if self.slack < 0:
            raise Full
        order = sorted(work.pools, key=lambda pool: -pool.region().k_stop)
        for done, pool in enumerate(order):
            self._fill(pool, len(order) - done + bool(work.short))
        self._hand_out(work.short)

    def _fill(self, pool: Pool, pools_left: int) -> None:
        need, region = pool.work, pool.region()
        # About the smallest piece: of rows that may be cut by keys too, or of whole ones.
        piece = min(region.k_stop, region.rows, 4096) if pool.by_keys else need * 5 // 4 // max(region.rows, 1)
        least = 2 * self.grain + self.weights.smallest * piece
        chosen: list[Share] = []
        if pool.by_keys and self.free and need >= 2 * self.free[-1][0]:
            need = self._holders(pool, need, least, chosen)
        node = self._node(pool)
        while need > 0:
            if not self.free:
                raise Full
            taken, waste = self._finishing(need, 2 * self.slack // (pools_left + 1), least)
            if taken:
                for pairs, server in taken:
                    self.free.remove((pairs, server))
                    chosen.append(Share(server, pairs + self.grain))
                self.slack -= waste
                break
            pairs, server = self._largest(node)
            # Neither a part too small to cut off nor one to go on with may be left.
            used = min(pairs, need) if pairs >= need or need - pairs >= least else max(need - least, 1)
            chosen.append(Share(server, used + self.grain))
            if pairs - used > least:
                insort(self.free, (pairs - used - self.grain, server))
                self.slack -= self.grain
            else:
                self.slack -= pairs - used
            need -= used
        if chosen:
            self.shares.append((pool, sorted(chosen, key=lambda share: (-share.held, -share.most, share.server))))

    def _finishing(self, need: int, allowed: int, least: int) -> tuple[list[tuple[int, int]], int]:
        """One or two servers that hold all of ``need`` and waste at most ``allowed`` pairs: (they, waste), or none."""
        free = self.free
        best: list[tuple[int, int]] = []
        waste = max(allowed, 0) + 1
        at = bisect_left(free, (need, -1))
        if at < len(free) and free[at][0] - need < waste:
            best, waste = [free[at]], free[at][0] - need
        for one in range(len(free) - 1, max(-1, len(free) - 1 - PAIRS), -1):
            rest = need - free[one][0]
            if rest > free[one][0]:
                break
            if rest < least:
                continue
            at = bisect_left(free, (rest, -1), 0, one)
            # A second piece costs more than a little waste.
            if at < one and free[at][0] - rest < waste // 2:
                best, waste = [free[one], free[at]], free[at][0] - rest
        return best, waste if best else 0

    def _node(self, pool: Pool) -> int:
        return self.cell_rank[pool.strips[0].cell] // self.devices if self.devices and pool.strips else -1

    def _largest(self, node: int) -> tuple[int, int]:
        if node >= 0:
            for at in range(len(self.free) - 1, max(-1, len(self.free) - 1 - NEAR), -1):
                pairs, server = self.free[at]
                if 2 * pairs < self.free[-1][0]:
                    break
                if server // self.devices == node:
                    return self.free.pop(at)
        return self.free.pop()

    def _holders(self, pool: Pool, need: int, least: int, chosen: list[Share]) -> int:
        """Gives work to servers that have the document's first keys anyway; the pairs still needed."""
        held = self.work.held.get(pool.group, {})
        q, kv = self.weights.query_row, self.weights.kv_row
        for pairs, server in sorted((f for f in self.free if f[1] in held), reverse=True):
            usual = 2 * isqrt(q * kv * pairs)
            if pairs <= 2 * least or pairs + least > need:
                continue
            if 10 * q * pairs < 9 * usual * held[server]:
                taken, rest, done = self._whole_rows(pool, held[server], pairs)
                if done + 2 * self.grain > pairs and 10 * q * sum(t.stop - t.start for t in taken) < 9 * usual:
                    pool.strips = rest
                    self.pieces += [Piece(server, strip, 0, strip.reach) for strip in taken]
                    self.free.remove((pairs, server))
                    self.slack -= pairs - done
                    need -= done
                    continue
            if 8 * kv * held[server] > usual:
                self.free.remove((pairs, server))
                chosen.append(Share(server, pairs + self.grain, held[server]))
                need -= pairs
        return need

    def _whole_rows(self, pool: Pool, held: int, most: int) -> tuple[list[Strip], list[Strip | RowStrip], int]:
        """The last rows that see only ``held`` keys, up to ``most`` pairs: (taken, rest, pairs taken)."""
        taken: list[Strip] = []
        rest: list[Strip | RowStrip] = []
        done, smallest = 0, self.weights.smallest
        for s in sorted(pool.strips, key=lambda s: (-s.reach, -s.start)):
            room = most - done
            if isinstance(s, RowStrip) or s.reach > held or room <= 0:
                rest.append(s)
                continue
            at = s.start if s.below(WHOLE) <= room else s.last_rows(room)
            if at > s.start and (s.stop - at < smallest or at - s.start < smallest):
                rest.append(s)
                continue
            taken.append(s.part(at, s.stop))
            done += taken[-1].below(WHOLE)
            if at > s.start:
                rest.append(s.part(s.start, at))
        return taken, sorted(rest, key=lambda s: s.start), done

    def _hand_out(self, strips: list[RowStrip]) -> None:
        """Runs of neighbouring short documents to one server after the other, each cut where the next begins."""
        smallest, left = self.weights.smallest, strips[::-1]
        while left:
            if not self.free:
                raise Full
            room, server = self.free.pop()
            room += self.grain
            while left and room > 0:
                s = left.pop()
                if s.work > room:
                    at = self._fitting(s, room)
                    if at - s.start >= smallest and s.stop - at >= smallest:
                        self.pieces.append(Piece(server, s.part(s.start, at), 0, 1))
                        s = s.part(at, s.stop)
                    left.append(s)
                    break
                self.pieces.append(Piece(server, s, 0, 1))
                room -= s.work

    def _fitting(self, s: RowStrip, room: int) -> int:
        """Up to where the first rows of ``s`` fit, if the rest is not too small."""
        low, high = s.start, max(s.start, s.stop - self.weights.smallest)
        while low < high:
            middle = (low + high + 1) // 2
            if s.part(s.start, middle).work <= room:
                low = middle
            else:
                high = middle - 1
        return low
