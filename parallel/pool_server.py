"""A server of a pool: joins trainers through their store, and computes what their plans give it. No tokens, no model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from distattn.kernels import choose
from distattn.kernels.contract import Backend, Scores
from distattn.parallel.comm import PeerError
from distattn.parallel.pool_board import Address, Beat, Beside, Board, Event, StoreGone, this_host
from distattn.parallel.pool_call import Call, PlanInputs
from distattn.parallel.pool_epoch import Epoch, PoolCommunicator
from distattn.parallel.program import Program
from distattn.parallel.rank_plan import PlanMismatch
from distattn.parallel.shape import Shape

LINGER = 30.0  # seconds that a server which wants to go stays for trainers that do not let it
IDLE = 0.01  # seconds, the longest between two looks at the board
EARNEST = 0.1  # of the time waited so far: the next look. Short waits cost little time, long ones little work


class Ending(Enum):
    """Why :meth:`AttentionServer.serve` has returned."""

    FINISHED = "the trainers are done"
    LEFT = "this server was asked to leave"
    GONE = "the trainers are gone without a word: their store does not answer"
    DROPPED = "the trainers go on without this server"
    REFUSED = "the trainers do not take this server"


@dataclass(frozen=True)
class Work:
    """What a server has done for one run of trainers."""

    ending: Ending
    calls: int
    why: str


class AttentionServer:
    """One membership, from joining to the end.

    Args:
        address: of the store.
        version: of this program; the trainers must have the same.
        backend: a kernel by name; None takes the fastest that can.
        say: for lines on what happens.

    Raises:
        RuntimeError: there is no store at ``address``.
    """

    def __init__(
        self, address: Address, version: str, backend: str | None = None, say: Callable[[str], None] = print, wait: float = 10.0
    ) -> None:
        self.board = Board(address, timeout=wait)
        self.name = f"{this_host()}:{os.getpid()}"
        self.backend, self.say = backend, say
        self.number = self.board.join(self.name, version)
        self._leaving = ""
        self._leave_at: float | None = None
        self._beats = self._position = 0
        self._kernels: dict[tuple[Shape, Scores], Backend] = {}
        self._epoch: Epoch | None = None
        self._counted_on = False  # it has answered a roll call, so others wait for it until an epoch comes without it
        self._dropped: dict[str, object] | None = None
        self._calls = 0
        self._lookout = self.board.connect()
        self._beside = Beside(f"distattn server {self.number}", self._look)

    def leave(self, why: str = "asked to") -> None:
        """Asks the trainers to go on without this server; :meth:`serve` returns when they do. For a signal handler, too."""
        self._leaving = why
        self._leave_at = time.monotonic() + LINGER

    def serve(self) -> Work:
        """Computes until the trainers are done or gone, or go on without this server."""
        try:
            ending, why = self._serve()
        except StoreGone as error:
            ending, why = Ending.GONE, (str(error).splitlines() or [""])[0]
        finally:
            self._beside.stop()
            self._close_epoch()
            for board in (self._lookout, self.board):
                board.close()
        return Work(ending, self._calls, why)

    def _serve(self) -> tuple[Ending, str]:
        invited = self._await(lambda: self.board.invitation(self.number))
        if invited is None:
            return self._reason_to_stop()
        if "refused" in invited:
            return Ending.REFUSED, str(invited["refused"])
        position = int(invited["event"])
        while True:
            self._position = position
            event = self._await(lambda number=position: self.board.event(number))  # type: ignore[misc]
            if event is None:
                return self._reason_to_stop()
            position += 1
            if event["kind"] == "end":
                self.board.beat(self.number, Beat(self._beats + 1, position, ""))
                return Ending.FINISHED, ""
            if event["kind"] == "roll":
                self._close_epoch()
                if self.number in event["asked"]:
                    self.board.answer(event["epoch"], self.number)
                    self._counted_on = True
            elif event["kind"] == "epoch" and self.number in event["servers"]:
                self._enter(event)
            elif event["kind"] == "epoch" and self._leaving:
                return Ending.LEFT, self._leaving
            elif event["kind"] == "call" and self._epoch is not None and self._epoch.number == event["epoch"]:
                self._compute(Call.of_words(event["call"]))

    def _await(self, look: Callable[[], Event | None]) -> Event | None:
        """What ``look`` finds as soon as it finds something; None when there is a reason to stop."""
        started = time.monotonic()
        while (found := look()) is None:
            if self._dropped or self._beside.lost:
                return None
            if self._leave_at is not None and (not self._counted_on or time.monotonic() > self._leave_at):
                return None
            time.sleep(min(IDLE, EARNEST * (time.monotonic() - started)))
        return found

    def _reason_to_stop(self) -> tuple[Ending, str]:
        if self._dropped:
            return Ending.REFUSED if self._dropped["for_good"] else Ending.DROPPED, str(self._dropped["why"])
        if self._beside.lost:
            return Ending.GONE, self._beside.lost
        return Ending.LEFT, self._leaving

    def _enter(self, event: Event) -> None:
        """Forms the groups of an epoch with its other members."""
        trainers, servers = event["trainers"], event["servers"]
        rank = trainers + servers.index(self.number)
        size = (rank, trainers + len(servers), event["lanes"], event["timeout"])
        try:
            communicator = PoolCommunicator(self.board, event["epoch"], *size)
        except PeerError as error:
            self.board.break_epoch(event["epoch"], f"server {self.number}: {error}")
            return
        self._epoch = Epoch(event["epoch"], servers, trainers, communicator)
        self.say(f"epoch {event['epoch']}: rank {rank} of {trainers} trainers and {len(servers)} servers")

    def _compute(self, call: Call) -> None:
        """This server's part of a call. A call that fails ends the epoch; the trainers decide how to go on."""
        epoch = self._epoch
        assert epoch is not None
        try:
            program = epoch.program(call, lambda: PlanInputs.decode(self.board.get_plan(call.plan)))
            self._run(epoch, program, call)
            self._calls += 1
        except PeerError as error:
            self._abandon(call, error)
        except (ValueError, PlanMismatch) as error:  # the trainers have it too, and say it where their user reads
            self.say(f"{call} cannot be planned: {error}")
            self._abandon(call, error)
        except Exception as error:  # of this server alone (memory, say): it would come again
            self.say(f"{call} failed: {type(error).__name__}: {error}")
            self._abandon(call, error)
            self.leave(f"{call} failed on it: {type(error).__name__}: {error}")

    def _run(self, epoch: Epoch, program: Program, call: Call) -> None:
        """One pass of a rank that holds no rows."""
        q, k, v, dout, lse = empty_rows(call.shape)
        kernel = self._kernels.get((call.shape, call.scores))
        if kernel is None:
            kernel = self._kernels[call.shape, call.scores] = choose(q, k, v, call.scores, self.backend).backend
        if call.direction == "forward":
            epoch.executor.forward(program, kernel, q, k, v, call.scores)
        else:
            kept = torch.empty(0, dtype=torch.uint8)
            epoch.executor.backward(program, kernel, dout, q, k, v, lse, lse, kept, call.scores)

    def _abandon(self, call: Call, error: Exception) -> None:
        assert self._epoch is not None
        self.say(f"epoch {self._epoch.number} is over in {call}: {(str(error).splitlines() or [''])[0]}")
        self._epoch.give_up(error)
        self._close_epoch()

    def _close_epoch(self) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            epoch.close()

    def _look(self) -> None:
        """For the thread beside: shows that this server lives, and ends its waits in a call that cannot end well."""
        self._beats += 1
        self._lookout.beat(self.number, Beat(self._beats, self._position, self._leaving))
        self._dropped = self._lookout.dropped(self.number)
        epoch = self._epoch
        if epoch is not None:
            epoch.cut_if_broken(self._lookout)


def empty_rows(shape: Shape) -> tuple[torch.Tensor, ...]:
    """(q, k, v, dout, lse) of no rows."""
    tails = ((shape.heads, shape.d), (shape.kv_heads, shape.d), (shape.kv_heads, shape.d_v), (shape.heads, shape.d_v))
    q, k, v, dout = (torch.empty(0, *tail, dtype=shape.dtype) for tail in tails)
    return q, k, v, dout, torch.empty(0, shape.heads, dtype=shape.accumulate)
