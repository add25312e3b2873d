"""A channel between the ranks beside the library: for times, digests and a neutral start line."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import adareduce.torch as hvd


def speaks_before_init() -> bool:
    """Whether this process is the launcher's rank 0 or alone: one rank prints, not all."""
    return os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0"


class Ranks:
    """All ranks of the job, on a communicator of their own. Collective; after hvd.init().

    The calls wait in MPI, without a deadline: a rank that raises must call ``abort``.
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
        """Every rank's value, in rank order, on every rank. Collective, blocks."""
        return [value] if self._comm is None else list(self._comm.allgather(value))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value. Collective, blocks."""
        return value if self._comm is None else self._comm.bcast(value)

    def align(self) -> None:
        """Lets the ranks go on together. Collective, blocks."""
        if self._comm is not None:
            self._comm.Barrier()

    def print(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def abort(self) -> None:
        """Ends all ranks at once; for an error that the others may not know of."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._comm is None:
            sys.exit(1)
        self._comm.Abort(1)
