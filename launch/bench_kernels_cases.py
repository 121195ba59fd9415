"""What the kernel benchmark measures: masks, shapes and directions, and how many operations each one is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.bands import INF, Band, Bands
from distattn.kernels.contract import Scores
from distattn.kernels.gluon_plans import Shape

DOCUMENT_MEAN, DOCUMENT_SIGMA = 4096, 1.0  # log-normal lengths, cut off at the end, as in launch/survey.py
WINDOW = 4096
SHORT = 128  # rows of a short shard: below that nothing is cut


@dataclass(frozen=True)
class Case:
    """One measurement. ``state`` goes on from a float32 state and leaves one, as a ring's step does; backward adds into sums.

    ``tokens`` keys, and as many queries unless ``rows`` says how many.
    """

    group: str
    mask: str
    tokens: int
    heads: int
    kv_heads: int
    d: int
    d_v: int
    direction: str = "forward"
    state: bool = False
    rows: int | None = None

    @property
    def queries(self) -> int:
        """Rows of q."""
        return self.tokens if self.rows is None else self.rows

    @property
    def shape(self) -> Shape:
        """As the Hopper kernels' plans take it."""
        return Shape(self.queries, self.tokens, self.heads, self.kv_heads, self.d, self.d_v)

    @property
    def name(self) -> str:
        """For people: what is measured."""
        size = f"D{self.d}" if self.d == self.d_v else f"D{self.d}:{self.d_v}"
        length = _thousands(self.tokens) if self.rows is None else f"{_thousands(self.rows)} x {_thousands(self.tokens)}"
        state = ", state in and out" if self.state else ""
        return f"{self.direction} {self.mask} {length} {size} {self.heads}:{self.kv_heads}{state}"

    @cached_property
    def bands(self) -> Bands:
        """The mask over all queries and keys."""
        n = self.tokens
        if self.mask == "documents":
            return _diagonal(_document_lengths(n))
        if self.mask.startswith("short"):  # many shards of 128 rows that attend to themselves and the 896 keys before
            return Bands([Band(a, a + SHORT, max(0, a - 7 * SHORT), a + SHORT) for a in range(0, n, SHORT)])
        if self.mask.startswith("long"):  # the same keys a row in shards of 2,048 rows
            return Bands([Band(a, min(a + 2048, n), max(0, a - 1024), min(n, max(1024, a))) for a in range(0, n, 2048)])
        if self.rows is not None:
            return Bands([Band(0, self.rows, 0, n)])
        limits = {"full": (-INF, INF), "causal": (-INF, 0), "window": (-WINDOW + 1, 0)}[self.mask]
        return Bands([Band(0, n, 0, n, *limits)])

    @property
    def flops(self) -> int:
        """Operations of the unmasked pairs: two products forward, five backward."""
        products = 2 * (self.d + self.d_v) if self.direction == "forward" else 6 * self.d + 4 * self.d_v
        return products * self.bands.area * self.heads

    @property
    def scores(self) -> Scores:
        return Scores(self.d**-0.5)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case, token-major, of order one."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The same numbers for the same case on the same device."""
    generator = torch.Generator(device).manual_seed(case.tokens + case.d)
    n_q, n_k = case.queries, case.tokens
    sizes = [
        (n_q, case.heads, case.d), (n_k, case.kv_heads, case.d), (n_k, case.kv_heads, case.d_v), (n_q, case.heads, case.d_v)
    ]  # fmt: skip
    return Inputs(*(torch.randn(*size, generator=generator, device=device).to(dtype) for size in sizes))


def _thousands(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n}"


def _document_lengths(tokens: int) -> np.ndarray:
    drawn = np.random.default_rng(tokens)
    mu, count = np.log(DOCUMENT_MEAN) - DOCUMENT_SIGMA**2 / 2, 16 + 4 * tokens // DOCUMENT_MEAN
    ends = np.cumsum(np.ceil(drawn.lognormal(mu, DOCUMENT_SIGMA, count)).astype(np.int64))
    return np.diff(np.append(ends[ends < tokens], tokens), prepend=0)


def _diagonal(lengths: np.ndarray) -> Bands:
    """Causal documents one after the other."""
    ends = np.cumsum(lengths)
    return Bands([Band(int(b - n), int(b), int(b - n), int(b), -INF, 0) for n, b in zip(lengths, ends, strict=True)])


def both(case: Case) -> list[Case]:
    """Forward and backward of it."""
    return [case, replace(case, direction="backward")]


GROUPS = ("dense", "gqa", "state", "documents", "window", "short", "few", "heads")


def all_cases(small: bool = False) -> list[Case]:
    """Every case, by group; ``small`` is for a smoke test on a CPU: its times mean nothing."""
    lengths, long, heads = ((256, 320), 512, 2) if small else ((16384, 32768), 65536, 16)
    found = []
    for n in lengths:
        for mask in ("causal", "full"):
            found += both(Case("dense", mask, n, heads, heads, 128, 128))
            found += both(Case("dense", mask, n, 2 * heads, 2 * heads, 64, 64))
    for mask in ("causal", "full"):
        found += both(Case("gqa", mask, lengths[0], 2 * heads, max(1, heads // 2), 128, 128))
    found += [
        Case("state", "full", n, heads, heads, 128, 128, state=state)
        for n in (lengths[0] // 2, *lengths)
        for state in (False, True)
    ]
    for group, mask in (("documents", "documents"), ("window", "window"), ("short", "short"), ("short", "long")):
        found += both(Case(group, mask, long, heads, heads, 128, 128))
    few, many = (128, lengths[0]) if small else (1024, 131072)
    for heads_of_shard in (1, 4):  # a short shard of queries forward, of keys backward, whose items are fewer than processors
        shard = Case("few", "full", many, heads_of_shard, heads_of_shard, 128, 128, rows=few)
        found += [*both(shard), replace(shard, tokens=few, rows=many, direction="backward")]
    for d, d_v in ((96, 96), (192, 128), (256, 256)):
        found += both(Case("heads", "causal", lengths[0], heads, heads, d, d_v))
    return found
