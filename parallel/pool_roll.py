"""Roll: the servers of a pool as the first trainer knows them. Who came, who lives, who wants to go.

A thread reads their heartbeats; they go on while a server computes, and stop with its process. It also removes from the board
what all servers have read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distattn.parallel.pool_board import Beat, Board


@dataclass
class Known:
    """A server: ``name`` is host:pid, ``heard`` when its heartbeat last changed, by the clock of this process."""

    number: int
    name: str
    beat: Beat
    heard: float
    member: bool = False  # it has been asked to take part, and reads events

    @property
    def silence(self) -> float:
        """Seconds."""
        return time.monotonic() - self.heard

    def __str__(self) -> str:
        return f"server {self.number} ({self.name})"


class Roll:
    """See above.

    Args:
        version: servers of another one are refused.
        patience: seconds without a heartbeat after which a server is dead.
        say: for what happens to servers that never got in.
    """

    def __init__(self, board: Board, version: str, patience: float, say: Callable[[str], None]) -> None:
        self.patience = patience
        self.board, self._version, self._say = board, version, say
        self._servers: dict[int, Known] = {}
        self._unread: list[int] = []  # numbers of servers that have not yet said who they are
        self._newest = 0
        self._litter: list[tuple[int, str]] = []
        self._lock = threading.Lock()

    def look(self) -> None:
        """Reads the board; for the thread."""
        newest = self.board.newest_server()
        self._unread += range(self._newest + 1, newest + 1)
        self._newest = newest
        for number in list(self._unread):
            words = self.board.describe(number)
            if words is None:
                continue
            self._unread.remove(number)
            if words["version"] != self._version:
                why = f"it runs version {words['version']} of distattn, the trainers {self._version}. Install the same on all"
                self.board.refuse(number, why)
                self._say(f"server {number} ({words['name']}) is refused: {why}")
                continue
            with self._lock:
                self._servers[number] = Known(number, words["name"], Beat(-1, 0, ""), time.monotonic())
        with self._lock:
            numbers = list(self._servers)
        beats = self.board.beats(numbers)
        with self._lock:
            for number, beat in beats.items():
                known = self._servers.get(number)
                if known is not None and known.beat.count != beat.count:
                    known.beat, known.heard = beat, time.monotonic()
        self._clean()

    def alive(self) -> list[Known]:
        """Those whose heart beats and who do not want to go, by number."""
        with self._lock:
            here = [known for known in self._servers.values() if known.silence <= self.patience and not known.beat.leaving]
        return sorted(here, key=lambda known: known.number)

    def silent(self, numbers: Iterable[int]) -> list[Known]:
        """Those of ``numbers`` that are dead."""
        with self._lock:
            asked = [self._servers[number] for number in numbers if number in self._servers]
        return [known for known in asked if known.silence > self.patience]

    def __getitem__(self, number: int) -> Known:
        return self._servers[number]

    def enrol(self, numbers: Iterable[int]) -> None:
        """From here on their place among the events counts."""
        for number in numbers:
            self._servers[number].member = True

    def strike_off(self, number: int) -> None:
        with self._lock:
            del self._servers[number]

    def litter(self, event: int, key: str) -> None:
        """``key`` may go when every member has read past ``event``."""
        with self._lock:
            self._litter.append((event, key))

    def read_by_all(self, event: int) -> bool:
        """Whether every member that lives has read past ``event``."""
        with self._lock:
            return all(k.beat.position > event for k in self._servers.values() if k.member and k.silence <= self.patience)

    def _clean(self) -> None:
        with self._lock:
            position = min((known.beat.position for known in self._servers.values() if known.member), default=1 << 62)
            done = [key for event, key in self._litter if event < position]
            self._litter = [(event, key) for event, key in self._litter if event >= position]
        for key in done:
            self.board.forget(key)
