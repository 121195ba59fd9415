"""What other programs take of a machine's cores while ranks are timed: such a round is none, whatever it says."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.parallel.comm import Communicator

STAT = Path("/proc/stat")
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: proc(5); guest time is in user already


class OtherLoad:
    """Counts from the moment it is made; all ranks must be on one node. Where there is no Linux nothing is seen."""

    def __init__(self, communicator: Communicator):
        self.communicator = communicator
        self.begun = self._now()

    def share(self) -> float:
        """Part of the cores that programs other than the ranks took since the last call; the same on all ranks."""
        before, self.begun = self.begun, self._now()
        ours, busy, wall = (after - begun for begun, after in zip(before, self.begun, strict=True))
        seen = [json.loads(answer) for answer in self.communicator.all_gather_bytes(json.dumps([ours, busy, wall]).encode())]
        _, busy, wall = seen[0]
        return max(0.0, busy - sum(own for own, _, _ in seen)) / (wall * (os.cpu_count() or 1))

    def _now(self) -> tuple[float, float, float]:
        """(processor seconds of this process, of all programs, the clock)."""
        busy = 0.0
        if STAT.is_file():
            ticks = STAT.read_text().split("\n", 1)[0].split()[1:]
            busy = sum(int(ticks[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
        return time.process_time(), busy, time.perf_counter()
