"""No silent end: a thread beside the doctor's work that turns a failed, dead or stuck rank into a verdict and an exit code."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from distattn.parallel.watch import open_store

TICK = 0.3
LAST_WORDS = 10.0  # seconds that rank 0 has after SIGTERM (torchrun sends it when another rank died) to find out why


class Vigil:
    """Ends the process with 1 when any rank has failed, rank 0 with the verdict.

    Args:
        patience: seconds that one activity may last.
        conclude: what rank 0 does with the sentence that says what happened, before the end.
    """

    def __init__(self, rank: int, patience: float, conclude: Callable[[str], None]):
        self.rank, self.patience, self._conclude = rank, patience, conclude
        self.activity, self._since = "its start", time.monotonic()
        self._store: dist.Store = open_store("doctor")
        self._lock = threading.Lock()  # one connection, two threads
        self._done = threading.Event()
        self._ended, wake = os.pipe()
        os.set_blocking(wake, False)
        # SIGTERM must be seen while the main thread is inside of a wait, where no Python handler runs.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="doctor's vigil", daemon=True)
        self._thread.start()

    def at(self, activity: str) -> None:
        """Says what is going on, for the verdict."""
        self.activity, self._since = activity, time.monotonic()

    def fail(self, text: str) -> None:
        """Publishes a failure; the first of all ranks is the verdict. Does not come back."""
        self._publish(text)
        self._thread.join()
        os._exit(1)

    def close(self) -> None:
        """All is done."""
        self._done.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _publish(self, text: str) -> None:
        with self._lock, suppress(RuntimeError):  # a store that is gone: the ranks end by their own timeouts
            if self._store.add("failures", 1) == 1:
                self._store.set("first", text)

    def _first(self) -> str | None:
        with self._lock, suppress(RuntimeError):
            if self._store.check(["first"]):
                return self._store.get("first").decode()
        return None

    def _watch(self) -> None:
        ended: float | None = None
        while not self._done.is_set():
            if select.select([self._ended], [], [], TICK)[0]:
                os.read(self._ended, 64)
                ended = ended or time.monotonic()
            text = self._first()
            if text is None and ended is not None and time.monotonic() - ended > LAST_WORDS:
                text = (
                    f"rank {self.rank} was ended from outside during {self.activity}; another rank has died, or somebody did it"
                )
            if text is None and time.monotonic() - self._since > self.patience:
                text = f"rank {self.rank} has been stuck in {self.activity} for {self.patience:.0f} s"
                self._publish(text)
            if text is not None and not self._done.is_set():
                if self.rank == 0:
                    self._conclude(text)
                else:
                    time.sleep(LAST_WORDS)  # torchrun would end rank 0 before it has spoken
                os._exit(1)
