"""One job of compare_versions.py: measures calls of the adareduce that its Python has.

    mpirun -n 2 python benchmarks/version_job.py --case sum-4K --case idle --out FILE

The calls take turns. In each turn the inputs are written, the ranks begin at an agreed time, one or
several calls in a row are timed on every rank, the slowest counts, and the result is checked.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from one_host import StartLine, end_after, run_on_all, settings
from version_cases import MAKERS, Call, Memory

import adareduce.torch as hvd
from adareduce.bench import machine
from adareduce.bench.ranks import Ranks

_WARMUPS = 2
_RESTARTS = 5
_SETTLE_SECONDS = 0.25  # an engine that looks around every half second does it twice in any second
_IDLE_SECONDS = 1.0
LIFE = ("init", "restart", "idle")  # what is no call with tensors


@dataclass
class Found:
    """What was measured of a case, on this rank; of all ranks after ``joined``."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    calls: int = 1
    num_bytes: int = 0
    tensors: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Appends a JSON line for each case; returns the exit status. Collective."""
    given = _parse(arguments)
    end_after(given.limit)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    hvd.init()
    first_init = time.perf_counter() - begin
    ranks = Ranks()
    return run_on_all(ranks, lambda: _run(given, ranks, first_init), __file__)


def _run(given: argparse.Namespace, ranks: Ranks, first_init: float) -> None:
    origin = machine.describe()
    line = StartLine(ranks)
    round_trip = ranks.core_round_trip_ns()
    memory = Memory(ranks.rank, ranks.size)
    calls = {name: MAKERS[name](memory) for name in given.case if name not in LIFE}
    found = joined(measure(calls, line, given.repeats), ranks)
    if "idle" in given.case:
        found |= joined({"idle": idle(ranks)}, ranks)
    if "init" in given.case:
        # The last rank to come waits for nobody, while the others' time is that of its start.
        found["init"] = Found([min(ranks.gather(first_init))])
    if "restart" in given.case:
        found |= joined({"restart": restart(line)}, ranks)
    if ranks.rank == 0:
        with given.out.open("a", encoding="utf-8") as file:
            for name in given.case:
                of_case = {
                    "case": name,
                    "ranks": ranks.size,
                    **vars(found[name]),
                    "core_round_trip_ns": round_trip,
                    "settings": settings(),
                    "shares_cores": line.shares_cores,
                    **origin,
                }
                file.write(json.dumps(of_case) + "\n")


def measure(calls: dict[str, Call], line: StartLine, repeats: int) -> dict[str, Found]:
    """This rank's seconds of each call, in so many turns. Collective."""
    found = {
        name: Found([], 0, call.calls, call.case.num_bytes, len(call.case.shapes))
        for name, call in calls.items()
    }
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(-_WARMUPS, repeats):
            names = list(calls)
            for position in range(len(names)):
                name = names[(position + repeat) % len(names)]
                call, entry = calls[name], found[name]
                for _ in range(call.samples if repeat >= 0 else 1):
                    call.prepare()
                    seconds = line.seconds(call.run, call.calls) / call.calls
                    entry.wrong += call.count_wrong()
                    if repeat >= 0:
                        entry.seconds.append(seconds)
    finally:
        if was_enabled:
            gc.enable()
    return found


def idle(ranks: Ranks) -> Found:
    """Seconds that all threads of this rank compute in one second without a call. Collective."""
    tensor = torch.ones(1)
    hvd.allreduce_(tensor, op=hvd.Sum)  # the engine has worked right before
    ranks.align()
    time.sleep(_SETTLE_SECONDS)
    begin = time.process_time()
    time.sleep(_IDLE_SECONDS)
    seconds = (time.process_time() - begin) / _IDLE_SECONDS
    return Found([seconds], int(tensor.item() != ranks.size))


def restart(line: StartLine) -> Found:
    """Seconds of init and shutdown, again and again; leaves the library shut down. Collective."""
    found = Found()
    size = hvd.size()
    hvd.shutdown()
    for _ in range(_RESTARTS):
        seconds = line.seconds(hvd.init, 1)
        tensor = torch.ones(1)
        hvd.allreduce_(tensor, op=hvd.Sum)
        found.wrong += int(tensor.item() != size)
        found.seconds.append(seconds + line.seconds(hvd.shutdown, 1))
    return found


def joined(found: dict[str, Found], ranks: Ranks) -> dict[str, Found]:
    """The slowest rank's seconds, and what was wrong on all. Collective."""
    everybody = ranks.gather({name: (of.seconds, of.wrong) for name, of in found.items()})
    for name, of in found.items():
        of.seconds = [max(times) for times in zip(*(e[name][0] for e in everybody), strict=True)]
        of.wrong = sum(e[name][1] for e in everybody)
    return found


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", required=True, choices=[*MAKERS, *LIFE])
    add("--repeats", type=int, default=5, help="turns of each call (5)")
    add("--limit", type=float, help="ends a job that runs longer, seconds")
    add("--out", type=Path, required=True, metavar="FILE", help="gets a JSON line for each case")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
