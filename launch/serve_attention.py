"""An attention server: serve_attention.py --store HOST:PORT

Joins the trainers whose first rank hosts a store at HOST:PORT (parallel.pool_store; it prints the address, and writes it to
OUT/pool_store, which --store takes too) and computes parts of their attention. Holds no tokens and no model; may be started and
ended at any time. SIGTERM or Ctrl-C lets it leave between two calls; a second one at once. CPU and gloo only.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.parallel.pool_board import Address
    from distattn.parallel.pool_server import AttentionServer, Work

TRY_SECONDS = 1.0  # between two attempts to reach a store
SAY_SECONDS = 30.0  # between two lines while nobody is there


def main(arguments: list[str] | None = None) -> int:
    """0: the trainers were done, or this server was asked to leave. 1: nobody came, or they went without a word. 2: a mistake."""
    parser = argparse.ArgumentParser(
        "serve_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="HOST:PORT of the trainers' store, or the file that holds it")
    parser.add_argument("--once", action="store_true", help="end with the first trainers; without it the next ones are awaited")
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for trainers to come (default 600)")
    parser.add_argument("--backend", help="attention kernel: aten or reference; by default the fastest that can")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is torch's own choice")
    asked = parser.parse_args(arguments)
    try:
        return serve(asked.store, asked.once, asked.wait, asked.backend, asked.threads)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def serve(store: str, once: bool, wait: float, backend: str | None, threads: int) -> int:
    """Serves one run of trainers after the other."""
    for name, value in (("--wait", wait), ("--threads", threads)):
        if not value >= 0:
            raise ValueError(f"{name} {value} must be 0 or more.")
    import torch

    from distattn.kernels import RANKING
    from distattn.parallel.pool_server import Ending

    if backend is not None and backend not in RANKING:
        raise ValueError(f"There is no backend {backend!r}. Use one of {', '.join(RANKING)}, or leave --backend out.")
    torch.set_num_threads(threads or torch.get_num_threads())
    stop = Stop()
    while True:
        server = join(store, wait, backend, stop)
        if server is None:
            return 0 if stop.asked else 1
        stop.server = server
        work = server.serve()
        stop.server = None
        tell(server, work)
        if work.ending == Ending.REFUSED:
            return 2
        if once and work.ending != Ending.DROPPED:
            return int(work.ending == Ending.GONE)
        if work.ending == Ending.LEFT or stop.asked:
            return 0


class Stop:
    """SIGTERM and Ctrl-C: the first asks the server to leave, the second ends the process."""

    def __init__(self) -> None:
        self.asked = False
        self.server: AttentionServer | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: object) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if self.server is not None:
            self.server.leave(f"it got {signal.Signals(number).name}")


def join(store: str, wait: float, backend: str | None, stop: Stop) -> AttentionServer | None:
    """A server that has joined; None when nobody came in time, or this process was asked to stop."""
    import distattn
    from distattn.parallel.pool_server import AttentionServer

    started, shown = time.monotonic(), -SAY_SECONDS
    while not stop.asked:
        waited, address = time.monotonic() - started, read_address(store)
        if address is not None and answers(address):
            try:
                server = AttentionServer(address, distattn.__version__, backend, say)
            except RuntimeError:  # it went away in between
                continue
            say(f"server {server.number} ({server.name}) has joined the trainers at {address}")
            return server
        if waited > wait:
            print(f"error: no trainers at {address or store} within {wait:g} s", file=sys.stderr, flush=True)
            return None
        if waited - shown > SAY_SECONDS:
            shown = waited
            say(f"waiting for trainers at {address or store}, {wait - waited:.0f} s more")
        time.sleep(min(TRY_SECONDS, max(0.05, waited)))
    return None


def read_address(store: str) -> Address | None:
    """The address that ``--store`` names; None while its file is not there."""
    from distattn.parallel.pool_board import Address

    path = Path(store)
    if "/" not in store and not path.is_file():
        address = Address.parse(store, "--store")
        if not address.port or store == "auto":
            raise ValueError(f"--store {store} must name a port: that of the trainers, which they print.")
        return address
    if not path.is_file():
        return None
    return Address.parse(path.read_text().strip(), f"the address in {path}")


def answers(address: Address) -> bool:
    """Whether anybody listens there. torch's own attempts print a stack each."""
    import socket

    try:
        socket.create_connection((address.host, address.port), timeout=TRY_SECONDS).close()
    except OSError:
        return False
    return True


def tell(server: AttentionServer, work: Work) -> None:
    why = f" ({work.why})" if work.why else ""
    say(f"server {server.number}: {work.ending.value}{why}; {work.calls} attention calls served")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
