"""Epoch: trainers and servers of a pool between two changes of membership, with groups, plans and memory of their own.

A rank of an epoch is a trainer (the first ones, in the order of their own group) or a server. All of its members run the same
calls in the same order, so plans that are kept for later are the same ones on all. When a call fails on one of them the epoch is
over: it says so on the board, and cuts its connections so that nobody goes on waiting for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from distattn.parallel.comm import Awaited, Communicator, PeerError
from distattn.parallel.comm_gloo import GlooCommunicator
from distattn.parallel.executor import Executor
from distattn.parallel.pool_board import Board, StoreGone
from distattn.parallel.pool_call import Call, PlanInputs
from distattn.parallel.program import Program
from distattn.parallel.rank_plan import RankPlan, make_rank_plan

FORM_SECONDS = 20.0  # members have just answered a roll call, so all come at once
PLANS = 32  # that an epoch keeps


class Epoch:
    """One rank's part in an epoch.

    Args:
        servers: numbers of its servers, in the order of their ranks.
        trainers: how many ranks come before them.
        communicator: of all its members.
    """

    def __init__(self, number: int, servers: Sequence[int], trainers: int, communicator: Communicator) -> None:
        self.number, self.servers, self.trainers = number, list(servers), trainers
        self.communicator, self.executor = communicator, Executor(communicator)
        self._plans: OrderedDict[int, RankPlan] = OrderedDict()

    def program(self, call: Call, inputs: Callable[[], PlanInputs]) -> Program:
        """What this rank runs of a call. The first time all members of the epoch plan and compare.

        Raises:
            ValueError: there is no such plan for so many servers.
            PlanMismatch: members run different versions.
        """
        if call.plan not in self._plans:
            given = inputs()
            strategy = replace(given.strategy, servers=len(self.servers))
            made = make_rank_plan(self.communicator, given.mask, strategy, given.pad_to_equal, given.version)
            self._plans[call.plan] = made
            while len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(call.plan)
        both = self._plans[call.plan].programs(call.shape, call.scores, call.sinks, self.communicator)
        self.executor.calls = call.number - 1
        return both[call.direction == "backward"]

    def server_of(self, rank: int | None) -> int | None:
        """The number of the server that a rank is, None for a trainer."""
        return self.servers[rank - self.trainers] if rank is not None and rank >= self.trainers else None

    def give_up(self, error: BaseException) -> None:
        """This rank cannot go on: the others are told, and what they wait for from it fails at once."""
        if isinstance(self.communicator, PoolCommunicator):
            self.communicator.fail(error)
            self.communicator.cut()

    def cut_if_broken(self, board: Board) -> None:
        """For a thread beside the one that computes: ends its waits when somebody has given up."""
        if isinstance(self.communicator, PoolCommunicator):
            self.communicator.cut_if_broken(board)

    def close(self) -> None:
        """Ends the groups of this rank. A communicator that the trainers brought themselves stays."""
        self._plans.clear()
        if isinstance(self.communicator, PoolCommunicator):
            self.communicator.close()


class PoolCommunicator(GlooCommunicator):
    """Gloo groups of one epoch; collective of its members."""

    def __init__(self, board: Board, epoch: int, rank: int, world: int, lanes: int, timeout: float) -> None:
        self.witness = EpochWitness(board, epoch, rank)
        store = board.groups(epoch)
        super().__init__(store, rank, world, self.witness, lanes, timeout, FORM_SECONDS)

    def cut_if_broken(self, board: Board) -> None:
        why = None if self.witness.failure else board.broken(self.witness.epoch)
        if why is not None:
            self.witness.failure = PeerError(f"rank {self.rank}: epoch {self.witness.epoch} is over: {why}", self.rank)
            self.cut()

    def close(self) -> None:
        self.cut()
        super().close()
        self._control = None  # groups hold their store, and plans that are held for long hold this


class EpochWitness:
    """Says no more than what happened: who is dead is found out by a roll call, for all at once."""

    def __init__(self, board: Board, epoch: int, rank: int) -> None:
        self.epoch = epoch
        self.failure: PeerError | None = None
        self.waiting_for: tuple[int, ...] = ()
        self._board, self._rank = board, rank

    def report(self, place: Awaited | str) -> None:
        pass

    def explain(self, awaited: Awaited, peers: Sequence[int], what: str, cause: str) -> PeerError:
        if self.failure is not None:  # cut by this rank itself, so that the carrier's word says nothing
            return self.failure
        return PeerError(f"rank {self._rank}: {awaited}: {what}. {cause}", self._rank, peers[0], awaited, peers)

    def publish_failure(self, text: str) -> str:
        try:
            self._board.break_epoch(self.epoch, text)
        except StoreGone as error:  # the first error counts, not this one
            return str(error)
        return ""

    def close(self) -> None:
        pass
