"""Board: the store in which trainers and servers of a pool write what the others must know.

The first trainer hosts it. It alone writes events, one after the other under rising numbers: calls, roll calls, new epochs, the
end. Servers read them in order. Everybody writes under keys of his own: servers who they are, a heartbeat, their answer to a
roll call; whoever gives up first, that an epoch is broken.
"""

from __future__ import annotations

import atexit
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

STORE_SECONDS = 10.0  # how long an operation on the store may take before its host counts as gone
BEAT = 0.2  # seconds between two heartbeats

StoreGone = dist.DistError

Event = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """``host:port`` of a store; port 0 at its host means any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, name: str) -> Address:
        """Reads ``host:port``, or ``auto`` for this host and a free port. ValueError, with ``name``, for anything else."""
        if text == "auto":
            return cls(this_host(), 0)
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"{name}={text!r} is no address. Write HOST:PORT with a port of 0 (any free one) to 65535, or auto.")
        return cls(host, int(port))


def this_host() -> str:
    """A name of this machine under which it finds itself."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return "127.0.0.1"
    return name


@dataclass(frozen=True)
class Beat:
    """A server's heartbeat: how many there were, the event that it reads next, and why it wants to go (nothing: it stays)."""

    count: int
    position: int
    leaving: str


class Board:
    """One connection. Threads need one each: a slow answer to one would hold up the other."""

    def __init__(self, address: Address, host: bool = False, timeout: float = STORE_SECONDS) -> None:
        patience = timedelta(seconds=timeout)
        store = dist.TCPStore(address.host, address.port, is_master=host, wait_for_workers=False, timeout=patience)
        self.address = Address(address.host, store.port)
        self._kept_open = store
        self._store = dist.PrefixStore("distattn/pool", store)
        self._events = 0  # written by this connection

    def connect(self) -> Board:
        """One more connection."""
        return Board(self.address)

    def close(self) -> None:
        """Lets go of the store; its port is free when the host's last connection and the last group that met in it are gone."""
        del self._kept_open, self._store

    def groups(self, epoch: int) -> dist.Store:
        """Where the groups of an epoch meet."""
        return dist.PrefixStore(f"groups/{epoch}", self._store)

    # What the first trainer writes.

    def publish(self, kind: str, **words: Any) -> int:
        """The next event. Returns its number."""
        self._events += 1
        self._store.set(f"event/{self._events}", json.dumps({"kind": kind, **words}))
        return self._events

    def forget(self, key: str) -> None:
        self._store.delete_key(key)

    def put_plan(self, number: int, inputs: str) -> str:
        self._store.set(f"plan/{number}", inputs)
        return f"plan/{number}"

    def admit(self, server: int, first_event: int) -> None:
        self._store.set(f"begin/{server}", json.dumps({"event": first_event}))

    def refuse(self, server: int, why: str) -> None:
        self._store.set(f"begin/{server}", json.dumps({"refused": why}))

    def drop(self, server: int, why: str, for_good: bool) -> None:
        self._store.set(f"dropped/{server}", json.dumps({"why": why, "for_good": for_good}))

    def newest_server(self) -> int:
        """Servers have the numbers 1 to this."""
        return self._store.add("servers", 0)

    def describe(self, server: int) -> dict[str, str] | None:
        """What a server said of itself, once it has."""
        return self._read(f"server/{server}")

    def beats(self, servers: list[int]) -> dict[int, Beat]:
        """The last heartbeat of each."""
        if not servers:
            return {}
        texts = self._store.multi_get([f"beat/{server}" for server in servers])
        return {server: Beat(*json.loads(text)) for server, text in zip(servers, texts, strict=True)}

    def answered(self, epoch: int, server: int) -> bool:
        return self._store.check([f"answer/{epoch}/{server}"])

    # What a server writes and reads.

    def join(self, name: str, version: str) -> int:
        """Announces a server. Returns its number, which nobody else has or had."""
        number = self._store.add("servers", 1)
        self.beat(number, Beat(0, 0, ""))
        self._store.set(f"server/{number}", json.dumps({"name": name, "version": version}))
        return number

    def invitation(self, server: int) -> dict[str, Any] | None:
        """The first event that is for this server, or why it is refused; None while nobody has decided."""
        return self._read(f"begin/{server}")

    def beat(self, server: int, beat: Beat) -> None:
        self._store.set(f"beat/{server}", json.dumps([beat.count, beat.position, beat.leaving]))

    def dropped(self, server: int) -> dict[str, Any] | None:
        """Why the trainers go on without this server, and whether it may come back."""
        return self._read(f"dropped/{server}")

    def event(self, number: int) -> Event | None:
        return self._read(f"event/{number}")

    def answer(self, epoch: int, server: int) -> None:
        self._store.set(f"answer/{epoch}/{server}", "here")

    def get_plan(self, number: int) -> str:
        return self._store.get(f"plan/{number}").decode()

    # What anybody writes and reads.

    def break_epoch(self, epoch: int, why: str) -> None:
        self._store.set(f"broken/{epoch}", why)

    def broken(self, epoch: int) -> str | None:
        """Why somebody gave up on an epoch; None where nobody has."""
        key = f"broken/{epoch}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


class Beside(threading.Thread):
    """Calls ``duty`` every ``BEAT`` seconds in a thread of its own, until stopped or until the store is gone."""

    def __init__(self, name: str, duty: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.lost = ""  # why the store counts as gone
        self._duty, self._stopped = duty, threading.Event()
        self.start()
        # A daemon thread that is inside the store while the interpreter goes away aborts the process.
        atexit.register(self.stop)

    def run(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                self._duty()
            except StoreGone as error:
                self.lost = (str(error).splitlines() or [type(error).__name__])[0]
                return

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self:
            self.join(STORE_SECONDS)
        atexit.unregister(self.stop)
