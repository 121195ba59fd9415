"""Pace: in which stage a rank does what, when some of its work is on rows of others.

First rows travel while ranks work on their own rows; then what is done for others, in parts, each while the next one's rows
travel; then own rows again while results go home.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distattn.kernels.bands import Q0, Q1, areas, clip
from distattn.parallel.intervals import groups

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


def in_parts(across: Work, stages: int) -> tuple[Work, np.ndarray]:
    """The bands cut into ``stages`` parts of about equal areas on every server: (bands, part of each, from 1).

    Runs are cut by rows, so that a row is in one part and no part of a run has less than ``PART_ROWS`` rows.
    """
    number, first = groups(across.server, across.q_owner, across.run)
    n, rows = len(first), across.bands
    low, high = np.full(n, np.iinfo(np.int64).max), np.zeros(n, dtype=np.int64)
    np.minimum.at(low, number, rows[:, Q0])
    np.maximum.at(high, number, rows[:, Q1])
    first_half = clip(rows, 0, ((low + high) // 2)[number], 0, 1 << 60)
    area, half = (np.bincount(number, weights=areas(bands), minlength=n) for bands in (rows, first_half))
    server = across.server[first]
    before = np.cumsum(area) - area
    begin = np.searchsorted(server, server, side="left")  # groups are sorted by server
    total = np.bincount(server, weights=area)[server] if n else area
    before -= before[begin] if n else 0
    kept, part, at = [], [], low
    for i in range(1, stages + 1):
        share = _rows_with(total * i / stages - before, area, half)
        end = low + np.rint((high - low) * share / TILE).astype(np.int64) * TILE
        whole = np.minimum(end - at, high - end) < PART_ROWS
        end = np.where(whole, np.where(2 * end >= at + high, high, at), end) if i < stages else high
        piece = clip(rows, at[number], end[number], 0, 1 << 60)
        some = np.flatnonzero(piece[:, Q0] < piece[:, Q1])
        kept.append(across.take(some)._replace(bands=piece[some]))
        part.append(np.full(len(some), i))
        at = end
    return Work(*(np.concatenate(columns) for columns in zip(*kept, strict=True))), np.concatenate(part)


def in_slices(inside: Work, across: Work, world: int, time: Time, most: int | None) -> tuple[Work, np.ndarray]:
    """Bands of own rows cut up for all stages, so that these last about as long on every rank: (bands, their stages).

    What is passed on waits for the stage before it to end, at both ends. So a rank's own work fills the stages in which nobody
    works on rows of others up to the mean of all stages, and what is left goes evenly into the others.
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
    half = areas(clip(inside.bands, 0, inside.bands[:, Q0] + height // 2, 0, 1 << 60))
    at, limit, pieces = inside.bands[:, Q0], begins, []
    for stage in range(time.all):
        limit = limit + (inner if time.hops <= stage < time.hops + time.parts else outer)
        share = _rows_with(limit[inside.server] - (done - area), area, half)
        end = inside.bands[:, Q0] + np.rint(height * share).astype(np.int64) if stage < time.all - 1 else inside.bands[:, Q1]
        pieces.append(clip(inside.bands, at, end, 0, 1 << 60))
        at = end
    kept = [np.flatnonzero(p[:, Q0] < p[:, Q1]) for p in pieces]
    columns = [np.concatenate([column[some] for some in kept]) for column in inside[1:]]
    bands = np.concatenate([p[some] for p, some in zip(pieces, kept, strict=True)])
    return Work(bands, *columns), np.repeat(np.arange(time.all), [len(some) for some in kept])
