"""What the jobs on one host have in common: settings, how they end, how ranks begin a call."""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adareduce.bench.ranks import Ranks
from adareduce.torch import HorovodInternalError

# Variables that the libraries read, and those of them that say where this project is and how it is
# tested.
_SETTINGS = ("ADAREDUCE_", "HOROVOD_")
_OTHERS = ("ADAREDUCE_VENV", "ADAREDUCE_TEST_", "ADAREDUCE_BENCH_")
_START_SECONDS, _SHARED_CORE_START_SECONDS = 200e-6, 2e-3


def settings() -> dict[str, str]:
    """What the environment sets of the libraries, for the rows of a result."""
    return {
        name: value
        for name, value in os.environ.items()
        if value and name.startswith(_SETTINGS) and not name.startswith(_OTHERS)
    }


def end_after(seconds: float | None) -> None:
    """Ends this process then, whatever hangs in whichever library: mpirun ends the others."""
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)


def run_on_all(ranks: Ranks, body: Callable[[], None], file: str) -> int:
    """The exit status of a job's `body`; a rank that fails alone ends all. Collective.

    Args:
        ranks: All on one host, else a ValueError ends the job.
        body: What the job does.
        file: The script's, for messages.
    """
    # Ranks.run() does as much, but jobs also run with versions that have none (version_job.py).
    try:
        if len(set(ranks.hosts)) > 1:
            name = Path(file).name
            raise ValueError(f"{name}: all ranks must be on one host, got {set(ranks.hosts)}")
        body()
    except HorovodInternalError:
        raise  # on every rank
    except Exception:
        traceback.print_exc()
        ranks.abort()
        return 1
    faulthandler.cancel_dump_traceback_later()
    return 0


class StartLine:
    """Lets the ranks of one host begin together. Collective.

    They agree on a time of the clock that they share. No barrier of a contender is involved, and
    where ranks share cores nobody spins: they sleep until then, else a rank that waits in MPI would
    keep another from its start.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.shares_cores = ranks.size > len(os.sched_getaffinity(0))
        self._ahead = _SHARED_CORE_START_SECONDS if self.shares_cores else _START_SECONDS

    def wait(self) -> None:
        """Returns at the agreed time."""
        begin = self._ranks.broadcast(time.perf_counter() + self._ahead)
        if self.shares_cores:
            time.sleep(max(0.0, begin - time.perf_counter()))
        while time.perf_counter() < begin:
            pass

    def seconds(self, run: Callable[[], Any], calls: int) -> float:
        """Of so many calls in a row, on this rank."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - begin
