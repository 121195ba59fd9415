"""Pace: in which stage a rank does what, when some of its work is on rows of others.

First rows travel while ranks work on their own rows; then what is done for others, in parts, each while the next one's rows
travel; then own rows again while results go home.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import INF, K0, K1, Q0, Q1, areas, clip
from distattn.parallel.intervals import Intervals, groups, union

TILE = 128  # rows at multiples of which runs are cut
PART_ROWS = 1024  # of a run in a part, at least: fewer leave a device idle


class Work(NamedTuple):
    """Bands in the rows of whole shards, and who does them: int64 [n, 6] and [n] each."""

    bands: np.ndarray
    server: np.ndarray
    q_owner: np.ndarray
    kv_owner: np.ndarray
    run: np.ndarray  # number of the run of queries: what one server computes of it goes home together

    def take(self, some: np.ndarray) -> Work:
        return Work(*(column[some] for column in self))


class Time(NamedTuple):
    """Stages: ``hops`` in which the first rows of others travel, ``parts`` of work on such rows, ``hops`` for the way home."""

    hops: int
    parts: int

    @property
    def all(self) -> int:
        return 2 * self.hops + self.parts


def _rows_with(wanted: np.ndarray, whole: np.ndarray, half: np.ndarray) -> np.ndarray:
    """The share of its rows, 0 to 1, that have ``wanted`` of a run's ``whole`` pairs, if the first half of them has ``half``.

    Exact where each row sees as many pairs more than the one before it: triangles and rectangles.
    """
    linear, square = 4.0 * half - whole, 2.0 * whole - 4.0 * half
    wanted = np.clip(wanted, 0, whole)
    root = np.sqrt(np.maximum(linear * linear + 4 * square * wanted, 0.0))
    return np.clip(2 * wanted / np.maximum(linear + root, 1e-9), 0, 1)


def in_parts(across: Work, parts: int) -> tuple[Work, np.ndarray]:
    """The bands of every server cut into blocks of rows and keys, worked off along a diagonal: (bands, part of each, from 1).

    Block (i, j) is in part i + j + 1: each part brings some new rows and keys, and is the last for some, so that inputs come and
    results leave a few at a time. Row blocks of a server have about equal areas, key blocks equal numbers of keys.
    """
    by_rows, by_keys = parts // 2 + 1, (parts + 1) // 2
    across, row_block = _in_row_blocks(across, by_rows)
    across, key_block, kept = _in_key_blocks(across, by_keys)
    return across, 1 + row_block[kept] + key_block


def _snapped(at: np.ndarray, low: np.ndarray, high: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Places to cut [low, high) at ``end``, the last cut before it being ``at``: no piece is shorter than ``PART_ROWS``."""
    short = np.minimum(end - at, high - end) < PART_ROWS
    return np.where(short, np.where(2 * end >= at + high, high, at), end)


def _in_row_blocks(across: Work, blocks: int) -> tuple[Work, np.ndarray]:
    number, first = groups(across.server, across.q_owner, across.run)
    n, bands = len(first), across.bands
    low, high = np.full(n, np.iinfo(np.int64).max), np.zeros(n, dtype=np.int64)
    np.minimum.at(low, number, bands[:, Q0])
    np.maximum.at(high, number, bands[:, Q1])
    first_half = clip(bands, 0, ((low + high) // 2)[number], 0, INF)
    area, half = (np.bincount(number, weights=areas(some), minlength=n) for some in (bands, first_half))
    server = across.server[first]
    before = np.cumsum(area) - area
    begin = np.searchsorted(server, server, side="left")  # groups are sorted by server
    total = np.bincount(server, weights=area)[server] if n else area
    before -= before[begin] if n else 0
    ends, at = [], low
    for i in range(1, blocks):
        share = _rows_with(total * i / blocks - before, area, half)
        at = _snapped(at, low, high, low + np.rint((high - low) * share / TILE).astype(np.int64) * TILE)
        ends.append(at[number])
    return _cut(across, ends, by_keys=False)[:2]


def _in_key_blocks(across: Work, blocks: int) -> tuple[Work, np.ndarray, np.ndarray]:
    pair, first = groups(across.server, across.kv_owner)
    runs = union(Intervals(pair, across.bands[:, K0], across.bands[:, K1]))
    server = across.server[first][runs.key]
    before = np.cumsum(runs.rows) - runs.rows
    before -= before[np.searchsorted(server, server, side="left")] if len(server) else 0
    total = np.bincount(server, weights=runs.rows)[server] if len(server) else before
    span = int(across.bands[:, K1].max(initial=0)) + 1
    of_band = np.searchsorted(runs.key * span + runs.start, pair * span + across.bands[:, K0], side="right") - 1
    ends, at = [], runs.start
    for j in range(1, blocks):
        end = runs.start + np.clip((total * j / blocks - before) // TILE * TILE, 0, runs.rows).astype(np.int64)
        at = _snapped(at, runs.start, runs.stop, end)
        ends.append(at[of_band])
    return _cut(across, ends, by_keys=True)


def _cut(work: Work, ends: list[np.ndarray], by_keys: bool) -> tuple[Work, np.ndarray, np.ndarray]:
    """Bands cut at rising rows or keys [bands] each: (pieces, number of the piece, band that it is of)."""
    far = np.full(len(work.run), INF)
    pieces = []
    for low, high in pairwise([np.zeros_like(far), *ends, far]):
        pieces.append(clip(work.bands, 0, INF, low, high) if by_keys else clip(work.bands, low, high, 0, INF))
    kept = [np.flatnonzero(p[:, Q0] < p[:, Q1]) for p in pieces]
    of = np.concatenate(kept)
    bands = np.concatenate([p[some] for p, some in zip(pieces, kept, strict=True)])
    return work.take(of)._replace(bands=bands), np.repeat(np.arange(len(kept)), [len(some) for some in kept]), of


def in_slices(inside: Work, across: Work, world: int, time: Time, most: int | None) -> tuple[Work, np.ndarray]:
    """Bands of own rows cut up for all stages, so that these last about as long on every rank: (bands, their stages).

    What is passed on waits for the stage before it to end, at both ends. With relays a rank's own work therefore fills the stages
    in which nobody works on rows of others up to ``most`` pairs or the mean of all stages, and what is left goes evenly into the
    others; straight, all of it goes into the first and the last.
    """
    order = np.lexsort((inside.bands[:, Q0], inside.server))
    inside = inside.take(order)
    if not time.hops:
        return inside, np.zeros(len(order), dtype=np.int64)
    area = areas(inside.bands)
    done = np.cumsum(area)
    end_of = np.searchsorted(inside.server, np.arange(world), side="right")
    ends = np.concatenate([[0], done])[end_of]
    begins = np.concatenate([[0], ends[:-1]])
    own = ends - begins
    mean = int(own.sum() + areas(across.bands).sum()) // (world * time.all)
    outer = own // (2 * time.hops)
    if time.hops > 1:
        outer = np.minimum(outer, mean if most is None else min(mean, most))
    inner = (own - 2 * time.hops * outer) // time.parts
    height = inside.bands[:, Q1] - inside.bands[:, Q0]
    half = areas(clip(inside.bands, 0, inside.bands[:, Q0] + height // 2, 0, INF))
    at, limit, pieces = inside.bands[:, Q0], begins, []
    for stage in range(time.all):
        limit = limit + (inner if time.hops <= stage < time.hops + time.parts else outer)
        share = _rows_with(limit[inside.server] - (done - area), area, half)
        end = inside.bands[:, Q0] + np.rint(height * share).astype(np.int64) if stage < time.all - 1 else inside.bands[:, Q1]
        pieces.append(clip(inside.bands, at, end, 0, INF))
        at = end
    kept = [np.flatnonzero(p[:, Q0] < p[:, Q1]) for p in pieces]
    columns = [np.concatenate([column[some] for some in kept]) for column in inside[1:]]
    bands = np.concatenate([p[some] for p, some in zip(pieces, kept, strict=True)])
    return Work(bands, *columns), np.repeat(np.arange(time.all), [len(some) for some in kept])
