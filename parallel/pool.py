"""Pool: attention by servers that hold no tokens and no model, which come, leave and die while their trainers train.

Every trainer enters every call. The first one tells the servers of it on the board; each member of the epoch makes its own
part of the plan, and runs it. At the end the trainers vote: all well, or the call runs again from its inputs, in a new epoch
without those that do not answer; without any server the trainers attend themselves, in place. Servers keep nothing between
calls, so a call that runs again gives what it would have given at once. Carried by gloo, for tensors on the CPU.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from distattn.kernels.contract import Scores
from distattn.parallel.comm import Awaited, Communicator, PeerError
from distattn.parallel.executor import Executor
from distattn.parallel.pool_board import BEAT, Address, Beside, Board
from distattn.parallel.pool_call import Call, Direction, PlanInputs
from distattn.parallel.pool_epoch import PLANS, Epoch, PoolCommunicator
from distattn.parallel.pool_roll import Roll
from distattn.parallel.program import Program
from distattn.parallel.shape import Shape

logger = logging.getLogger(__name__)
T = TypeVar("T")

SILENCE = 3.0  # seconds without a heartbeat after which a server is dead
STRIKES = 3  # times that a server which lives may fail in one call
ANSWER_SECONDS = 20.0  # that a server which lives may take to answer a roll call: it may be inside of a kernel
ATTEMPTS = 8  # of one call
PROGRESS_SECONDS = 10.0  # between two lines while servers are awaited
WELL, CHANGE = 1, 2  # bits of a vote


@dataclass(frozen=True)
class Ticket:
    """A plan by its number, for :meth:`Pool.attend`."""

    number: int
    inputs: PlanInputs


class Pool:
    """A trainer's side. Creating one is a collective of all trainers, and waits for ``servers`` servers.

    Args:
        home: of the trainers.
        store: ``host:port`` at which the first trainer hosts the store that servers join through; port 0 is any free one,
            "auto" this host and a free port.
        version: of the program; servers must have the same.
        silence: seconds without a heartbeat after which a server is dead; None is ``SILENCE``.
        announce: told the address of the store, on the first trainer.

    Raises:
        ValueError: a wrong address, a port that is taken, servers that do not come within the timeout of ``home``.
    """

    def __init__(
        self,
        home: Communicator,
        servers: int,
        store: str = "auto",
        version: str = "",
        silence: float | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        if servers < 0:
            raise ValueError(f"A pool was asked for with {servers} servers. Ask for the number to begin with, 0 or more.")
        self.home, self.version = home, version
        self._calls = self._tickets = self._epochs = 0
        self._closed = False
        self._epoch = Epoch(0, [], home.world, home)
        self._published: OrderedDict[int, str] = OrderedDict()
        self._ballots = torch.zeros(home.world, 1, dtype=torch.uint8)
        self._voting = Awaited("vote at the end of an attention call", 0, 0)
        self.board = self._open_board(store)
        self._roll: Roll | None = None
        if home.rank == 0:
            say = announce or (lambda text: logger.warning("attention servers join through %s", text))
            say(str(self.board.address))
            self._roll = Roll(self.board.connect(), version, silence or SILENCE, logger.warning)
        self._lookout = self.board.connect()
        self._beside = Beside("distattn pool", self._look)
        self._await_servers(servers)

    @property
    def servers(self) -> int:
        """How many servers the current epoch has."""
        return len(self._epoch.servers)

    def ticket(self, inputs: PlanInputs) -> Ticket:
        """Names a plan. All trainers ask in the same order."""
        self._tickets += 1
        return Ticket(self._tickets, inputs)

    def attend(
        self,
        ticket: Ticket,
        direction: Direction,
        shape: Shape,
        scores: Scores,
        sinks: bool,
        work: Callable[[Executor, Program], T],
    ) -> T:
        """Runs one pass, again and again until it has gone well on all trainers; all of them call this.

        Args:
            work: runs this trainer's program; from its inputs, which it must not change.

        Raises:
            PeerError: a trainer is gone or late, or the pass went wrong ``ATTEMPTS`` times.
        """
        self._calls += 1
        call = Call(self._calls, ticket.number, direction, shape, scores, sinks)
        strikes: Counter[int] = Counter()
        for _ in range(ATTEMPTS):
            epoch, failure = self._epoch, None
            try:
                self._publish(call, ticket)
                result = work(epoch.executor, epoch.program(call, lambda: ticket.inputs))
            except PeerError as error:
                if not epoch.servers:
                    raise
                failure = error
                epoch.give_up(error)
            except BaseException as error:
                epoch.give_up(error)
                raise
            well, change = self._vote(failure is None)
            if well:
                if change:
                    self._renew([], "")
                return result
            strikes.update(self._blamed(failure))
            self._renew([server for server, times in strikes.items() if times >= STRIKES], f"{call} runs again")
        raise PeerError(f"{call} went wrong {ATTEMPTS} times, the last time with {failure}", self.home.rank) from failure

    def close(self) -> None:
        """Sends the servers home, and frees the port of the store. Needs no answer from any peer."""
        if self._closed:
            return
        self._closed = True
        if self._roll is not None and self._beside.is_alive():
            event = self.board.publish("end")
            deadline = time.monotonic() + 10 * BEAT
            while not self._roll.read_by_all(event) and time.monotonic() < deadline:
                time.sleep(BEAT / 4)
        self._beside.stop()
        self._epoch.close()
        for board in (self._lookout, self._roll.board if self._roll else None, self.board):
            if board is not None:
                board.close()

    def _open_board(self, store: str) -> Board:
        """Every trainer's connection to a store that the first one hosts; an error of one is raised by all."""
        board, wrong = None, ""
        if self.home.rank == 0:
            try:
                board = Board(Address.parse(store, "pool_store"), host=True)
            except (ValueError, RuntimeError) as error:
                wrong = _reason(f"The store of the pool cannot be opened at {store}", error)
        words = self._from_first({"address": vars(board.address) if board else None, "wrong": wrong})
        if board is None and words["address"]:
            try:
                board = Board(Address(**words["address"]))
            except RuntimeError as error:
                wrong = _reason(f"Trainer {self.home.rank} cannot reach the store of the pool at {words['address']}", error)
        for text in self.home.all_gather_bytes(wrong.encode()):
            if text:
                raise ValueError(f"{text.decode()} Set a host and a free port that all trainers and servers reach.")
        assert board is not None
        return board

    def _await_servers(self, servers: int) -> None:
        """Until as many as asked for are here."""
        started, shown = time.monotonic(), 0.0
        while True:
            came = len(self._roll.alive()) if self._roll else 0
            waited = time.monotonic() - started
            words = self._from_first({"came": came, "late": waited > self.home.timeout})
            if words["came"] >= servers:
                break
            who, store = f"{words['came']} of {servers} attention servers", self.board.address
            if words["late"]:
                self.close()
                raise ValueError(
                    f"Only {who} came to {store} within the timeout of {self.home.timeout:g} s. Start them with "
                    f"distattn-serve-attention --store {store}, ask for fewer, or wait longer (parallel.timeout)."
                )
            if self._roll and waited - shown > PROGRESS_SECONDS:
                shown = waited
                logger.warning("%s are here after %.0f s; they join through %s", who, waited, store)
            time.sleep(BEAT / 2)
        if servers:
            self._renew([], "")

    def _look(self) -> None:
        """For the thread beside: reads heartbeats, and ends the waits of a call that cannot end well."""
        epoch = self._epoch
        if self._roll is not None:
            self._roll.look()
            for known in self._roll.silent(epoch.servers):
                if self._lookout.broken(epoch.number) is None:
                    self._lookout.break_epoch(epoch.number, f"{known} does not answer since {known.silence:.1f} s")
        epoch.cut_if_broken(self._lookout)

    def _publish(self, call: Call, ticket: Ticket) -> None:
        """Tells the servers of a call, and of its plan where they may not know it."""
        if self._roll is None or not self._epoch.servers:
            return
        if ticket.number not in self._published:
            self._published[ticket.number] = self.board.put_plan(ticket.number, ticket.inputs.encode())
        self._published.move_to_end(ticket.number)
        event = self.board.publish("call", epoch=self._epoch.number, call=call.as_words())
        self._roll.litter(event, f"event/{event}")
        while len(self._published) > 2 * PLANS:
            self._roll.litter(event, self._published.popitem(last=False)[1])

    def _vote(self, well: bool) -> tuple[bool, bool]:
        """(all went well, the first trainer wants an epoch with other members). One small message to every trainer."""
        mine = self._ballots[self.home.rank]
        mine.fill_(WELL * well + CHANGE * (self._roll is not None and self._wants_change()))
        peers = [peer for peer in range(self.home.world) if peer != self.home.rank]
        received = [(peer, self._ballots[peer]) for peer in peers]
        self.home.post(0, [(peer, mine) for peer in peers], received, self._voting).wait()
        votes = self._ballots[:, 0].tolist()
        return all(vote & WELL for vote in votes), bool(votes[0] & CHANGE)

    def _wants_change(self) -> bool:
        assert self._roll is not None
        return [known.number for known in self._roll.alive()] != self._epoch.servers

    def _blamed(self, failure: PeerError | None) -> list[int]:
        """The servers that trainers waited for in vain."""
        mine = self._epoch.server_of(failure.peer) if failure else None
        said = [json.loads(text) for text in self.home.all_gather_bytes(json.dumps(mine).encode())]
        return sorted({server for server in said if server is not None})

    def _renew(self, failing: Iterable[int], consequence: str) -> None:
        """The next epoch, formed on all trainers. ``failing``: servers to leave out although they live."""
        while True:
            words = self._from_first(self._call_roll(set(failing), consequence) if self._roll else {})
            self._epoch.close()
            number, servers, error = words["epoch"], words["servers"], None
            try:
                self._epoch = self._form(number, servers)
            except PeerError as problem:
                error = problem
                self.board.break_epoch(number, str(problem))
                self._epoch = Epoch(number, servers, self.home.world, self.home)  # to be left at once
            if self._vote(error is None)[0]:
                return

    def _form(self, number: int, servers: list[int]) -> Epoch:
        home = self.home
        if not servers:
            return Epoch(number, [], home.world, home)
        world = home.world + len(servers)
        return Epoch(
            number,
            servers,
            home.world,
            PoolCommunicator(self.board, number, home.rank, world, home.lanes, home.timeout),
        )

    def _call_roll(self, failing: set[int], consequence: str) -> dict[str, Any]:
        """On the first trainer: who answers is in the next epoch, who does not is dropped; said to the log and the servers."""
        roll, board, before = self._roll, self.board, self._epoch.servers
        assert roll is not None
        cause = board.broken(self._epoch.number)
        self._epochs += 1
        number = self._epochs
        asked = [known.number for known in roll.alive() if known.number not in failing]
        event = board.publish("roll", epoch=number, asked=asked)
        for server in asked:
            if not roll[server].member:
                board.admit(server, event)
        roll.enrol(asked)
        silent = self._await_answers(number, asked)
        servers = [server for server in asked if server not in silent]
        lines = []
        for server in [*before, *(server for server in silent if server not in before)]:
            if server not in servers:
                lines.append(self._strike_off(server, server in failing))
        lines += [f"{roll[server]} joins" for server in servers if server not in before]
        now = f"{len(servers)} server{'' if len(servers) == 1 else 's'}, epoch {number}"
        now += "" if servers or not before else ": the trainers attend themselves, in place"
        end = f"; {consequence}" if consequence else ""
        end += f" ({cause})" if cause and consequence else ""
        logger.warning("%s", "; ".join([*lines, now]) + end)
        event = board.publish(
            "epoch",
            epoch=number,
            servers=servers,
            trainers=self.home.world,
            lanes=self.home.lanes,
            timeout=self.home.timeout,
        )
        roll.litter(event, f"event/{event - 1}")
        roll.litter(event, f"event/{event}")
        return {"epoch": number, "servers": servers}

    def _await_answers(self, number: int, asked: list[int]) -> list[int]:
        """Those that are dead, or too late, among the servers that were asked."""
        roll, deadline = self._roll, time.monotonic() + ANSWER_SECONDS
        assert roll is not None
        silent: list[int] = []
        waiting = list(asked)
        while waiting := [server for server in waiting if not self.board.answered(number, server)]:
            gone = [known.number for known in roll.silent(waiting)]
            silent += waiting if time.monotonic() > deadline else gone
            waiting = [server for server in waiting if server not in silent]
            time.sleep(0.002)
        return silent

    def _strike_off(self, server: int, fails: bool) -> str:
        """A server that is not in the next epoch. Returns what is to be said of it."""
        assert self._roll is not None
        known = self._roll[server]
        self._roll.strike_off(server)
        if known.beat.leaving:
            return f"{known} leaves: {known.beat.leaving}"
        why = f"does not answer since {known.silence:.1f} s"
        if fails:
            why = f"failed {STRIKES} times in one call"
        elif known.silence <= self._roll.patience:
            why = f"lives, but did not answer a roll call within {ANSWER_SECONDS:g} s"
        self.board.drop(server, why, for_good=fails)
        return f"{known} {why}: dropped"

    def _from_first(self, words: dict[str, Any]) -> dict[str, Any]:
        """What the first trainer says, on all."""
        return json.loads(self.home.all_gather_bytes(json.dumps(words).encode())[0])


def _reason(what: str, error: Exception) -> str:
    return f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}."
