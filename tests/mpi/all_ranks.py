"""A channel between the ranks of a test run that does not depend on what is tested."""

from __future__ import annotations

import pickle
import sys
import time
from types import ModuleType
from typing import Any

_PAUSE_SECONDS = 0.0005


class AllRanks:
    """All-gather of Python objects over a private MPI communicator, with a time limit.

    Args:
        mpi: mpi4py.MPI, initialised. Collective: the communicator is duplicated.
    """

    def __init__(self, mpi: ModuleType) -> None:
        self._comm = mpi.COMM_WORLD.Dup()
        self._mpi = mpi
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def gather(self, value: Any, limit: float = 60.0) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Ends the job if one does not come."""
        values: list[Any] = [None] * self.size
        values[self.rank] = value
        awaited = set(range(self.size)) - {self.rank}
        content = pickle.dumps(value)
        sends = [self._comm.Isend([content, self._mpi.BYTE], dest=peer) for peer in awaited]
        deadline = time.monotonic() + limit
        while awaited or any(not send.Test() for send in sends):
            for peer in list(awaited):
                message = self._comm.Improbe(source=peer, status=(status := self._mpi.Status()))
                if message is None:
                    continue
                received = bytearray(status.Get_count(self._mpi.BYTE))
                message.Recv([received, self._mpi.BYTE])
                values[peer] = pickle.loads(received)
                awaited.remove(peer)
            if time.monotonic() > deadline:
                self.end_job(f"rank {self.rank}: no outcome from ranks {sorted(awaited)}")
            time.sleep(_PAUSE_SECONDS)
        return values

    def end_job(self, why: str) -> None:
        """Ends every rank, for a run that cannot go on."""
        print(f"\nending the job: {why} (stacks are in the ranks' stderr)", file=sys.__stderr__)
        sys.__stderr__.flush()
        self._mpi.COMM_WORLD.Abort(70)
