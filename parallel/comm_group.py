"""Every n-th rank of a communicator as a world of its own: the ranks that run one plan, when others run the same beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distattn.parallel.comm import Awaited, Communicator, Pending


class GroupView:
    """The ranks ``part, part + parts, part + 2 * parts, ...`` of ``parent``, where ``part`` is its rank modulo ``parts``.

    Messages travel on the lanes of the parent: ranks of different groups share no pair (sender, receiver), so their messages
    cannot meet. Errors name ranks of the parent; what a plan says of its own ranks is marked as such. Gathers of bytes are
    collectives of all the parent's ranks: all groups must come to them equally often.

    Args:
        parent: of all ranks.
        parts: groups; divides the parent's world.
    """

    def __init__(self, parent: Communicator, parts: int) -> None:
        assert parent.world % parts == 0, f"{parts} groups of {parent.world} ranks"
        self.parent, self.parts = parent, parts
        self.part = parent.rank % parts
        self.rank, self.world = parent.rank // parts, parent.world // parts
        self.lanes, self.timeout = parent.lanes, parent.timeout
        self._told: dict[str, str] = {}

    def post(self, lane: int, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], awaited: Awaited) -> Pending:
        outer = [[(self._outer(peer), tensor) for peer, tensor in side] for side in (sends, receives)]
        if awaited.detail not in self._told:
            said = f"{awaited.detail}; counted among the ranks that share heads: its rank r is rank {self.parts} r + {self.part}"
            self._told[awaited.detail] = said if awaited.detail else ""
        return self.parent.post(lane, outer[0], outer[1], awaited._replace(detail=self._told[awaited.detail]))

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        return self.parent.all_gather_bytes(payload)[self.part :: self.parts]

    def all_gather_rows(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        assert len(rows) == self.world and rows[self.rank] == x.shape[0], f"rows {list(rows)}, tensor {list(x.shape)}"
        given = x.detach().contiguous()
        size = x.element_size() * math.prod(x.shape[1:])
        parts = [torch.empty(n, *x.shape[1:], dtype=x.dtype, device=x.device) for n in rows]
        parts[self.rank].copy_(given)
        peers = [(self.rank + step) % self.world for step in range(1, self.world)]
        sends = [(peer, _bytes(given)) for peer in peers if x.shape[0] * size]
        receives = [(peer, _bytes(parts[peer])) for peer in reversed(peers) if rows[peer] * size]
        self.post(0, sends, receives, Awaited("all_gather_rows", 0, 0)).wait()
        return parts

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        total, *others = self.all_gather_rows(x.reshape(1, -1), [1] * self.world)
        for part in others:
            total += part
        return total.reshape(x.shape)

    def report(self, where: Awaited | str) -> None:
        self.parent.report(where)

    def fail(self, error: BaseException) -> None:
        self.parent.fail(error)

    def scrub(self, released: Tensor) -> None:
        self.parent.scrub(released)

    def close(self) -> None:
        """Nothing: the parent is closed by whoever made it."""

    def _outer(self, peer: int) -> int:
        return peer * self.parts + self.part


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
