"""A channel between the ranks beside the library: for times, digests and a neutral start line."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import adareduce.torch as hvd
from adareduce import _core

_PROBE_SECONDS = 0.01


def speaks_before_init() -> bool:
    """Whether this process is the launcher's rank 0 or alone: one rank prints, not all."""
    return os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0"


class OtherRankError(Exception):
    """A rank could not go on, for a reason. All ranks know."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.reason = reason


class Ranks:
    """All ranks of the job, on a communicator of their own. Collective; after hvd.init().

    The calls wait in MPI, without a deadline: a rank that raises must call ``announce`` or
    ``abort``.
    """

    def __init__(self) -> None:
        self.rank = hvd.rank()
        self.size = hvd.size()
        self._comm: Any = None
        if hvd.mpi_enabled():
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD.Dup()
        self.hosts: list[str] = self.gather(socket.gethostname())

    @property
    def comm(self) -> Any:
        """The private mpi4py communicator; None in a job of one rank without MPI."""
        return self._comm

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective, blocks.

        Raises:
            OtherRankError: A rank has called ``announce`` instead.
        """
        return self._exchange(value, None)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value. Otherwise as ``gather``."""
        return self.gather(value if self.rank == 0 else None)[0]

    def align(self) -> None:
        """Lets the ranks go on together. Otherwise as ``gather``."""
        self.gather(None)
        if self._comm is not None:
            self._comm.Barrier()  # they leave it closer together

    def core_round_trip_ns(self) -> float | None:
        """Between the first two cores that rank 0 may use, while the others sleep. Collective.

        None where there is only one. Blocks for some 20 ms.
        """
        self.align()
        found = None
        cores = sorted(os.sched_getaffinity(0))[:2]
        if self.rank == 0 and len(cores) > 1:
            found = float(_core.testing.core_round_trip_ns(*cores, _PROBE_SECONDS))
        elif self.rank > 0:
            time.sleep(2 * _PROBE_SECONDS)  # waiting in MPI would keep a core busy
        result: float | None = self.broadcast(found)
        return result

    def announce(self, reason: str) -> None:
        """Tells the others, wherever they wait in a call of this object, that this rank cannot.

        Raises:
            OtherRankError: Always, on all ranks.
        """
        self._exchange(None, reason)

    def _exchange(self, value: Any, reason: str | None) -> list[Any]:
        mine = (value, reason)
        everybody = [mine] if self._comm is None else self._comm.allgather(mine)
        for rank, (_, text) in enumerate(everybody):
            if text is not None:
                raise OtherRankError(rank, text)
        return [entry for entry, _ in everybody]

    def print(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def run(self, body: Callable[[], int]) -> int:
        """The exit status that `body` returns; a rank that fails alone ends all. Collective."""
        try:
            return body()
        except hvd.HorovodInternalError:
            raise  # on every rank
        except Exception:
            # The others may wait for this rank in MPI, which would not tell them.
            traceback.print_exc()
            self.abort()
            return 1

    def abort(self) -> None:
        """Ends all ranks at once; for an error that the others may not know of."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._comm is None:
            sys.exit(1)
        self._comm.Abort(1)
