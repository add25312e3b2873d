"""One job of compare_peers.py: measures its cases in one round, on the ranks of one mpirun.

    mpirun -n 2 python benchmarks/compare_job.py --case 4K float32 --out FILE

In each repeat every contender has one turn: its tensors are filled, the ranks start at an agreed
time, the call (of small cases: several in a row) is timed on every rank, the slowest counts, and
the result is checked. Between repeats the round trip between two cores is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_cases import DTYPES, Case, Contents, make_case, most_calls
from compare_contenders import Buffers, Contender, Library, attempt, connected
from one_host import StartLine, end_after, run_on_all, settings

import adareduce.torch as hvd
from adareduce.bench import machine
from adareduce.bench.ranks import Ranks
from adareduce.bench.verification import count_wrong

_MOST_WARMUP_SECONDS = 2.0
# A sample of a small case is several calls in a row. Ranks that share a core come to the start line
# some 50 us apart, which a longer sample hides.
_SAMPLE_SECONDS, _SHARED_CORE_SAMPLE_SECONDS = 200e-6, 2e-3


class Turn:
    """A contender in one case, and what was measured.

    Attributes:
        contender: The call.
        library: Whose it is.
        calls: Calls in a row that are one sample.
        seconds: Of a call, one entry per repeat, on this rank.
        wrong: Elements that were wrong on this rank.
    """

    def __init__(self, contender: Contender, library: Library) -> None:
        self.contender = contender
        self.library = library
        self.calls = 1
        self.seconds: list[float] = []
        self.wrong = 0


class CaseRun:
    """Measures one case. Collective.

    Args:
        case: The tensors.
        ranks: The channel between the ranks.
        libraries: All that this job holds.
    """

    def __init__(self, case: Case, ranks: Ranks, libraries: Sequence[Library]) -> None:
        self._case = case
        self._ranks = ranks
        self._line = StartLine(ranks)
        self._contents = Contents(case, ranks.rank, ranks.size)
        self._buffers = Buffers(case)
        self.unavailable: dict[str, str] = {}
        self._turns: list[list[Turn]] = []
        for library in libraries:
            library.enter()
            turns = [
                turn
                for name, make in library.makers(self._buffers).items()
                if (turn := self._prepared(name, make, library)) is not None
            ]
            library.leave()
            if turns:
                self._turns.append(turns)

    def measure(self, repeats: int) -> dict[str, Any]:
        """Seconds of a call of every contender, repeat by repeat, and what was wrong."""
        round_trips = [self._ranks.core_round_trip_ns()]
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            for repeat in range(repeats):
                for position in range(len(self._turns)):
                    self._take(self._turns[(position + repeat) % len(self._turns)], repeat)
                round_trips.append(self._ranks.core_round_trip_ns())
        finally:
            if was_enabled:
                gc.enable()
        turns = [turn for group in self._turns for turn in group]
        everybody = self._ranks.gather([(turn.seconds, turn.wrong) for turn in turns])
        seconds, wrong = {}, {}
        for index, turn in enumerate(turns):
            name = turn.contender.name
            of_ranks = torch.tensor([found[index][0] for found in everybody], dtype=torch.float64)
            seconds[name] = of_ranks.amax(dim=0).tolist()
            wrong[name] = sum(found[index][1] for found in everybody)
        return {
            "seconds": seconds,
            "calls": {turn.contender.name: turn.calls for turn in turns},
            "wrong": wrong,
            "round_trips_ns": round_trips,
            "unavailable": self.unavailable,
        }

    def _prepared(self, name: str, make: Callable[[], Contender], library: Library) -> Turn | None:
        """The contender's turn, tried and checked; None where there is no such call."""
        turn, reason = attempt(self._ranks, lambda: self._warmed_up(make(), library))
        if turn is None:
            self.unavailable[name] = reason
            return None
        if library.name == "ours":
            turn.wrong += self._disagreements(turn.contender)
        return turn

    def _warmed_up(self, contender: Contender, library: Library) -> Turn:
        turn = Turn(contender, library)
        seconds: list[float] = []  # of the slowest rank, so that all ranks stop at the same time
        while len(seconds) < library.warmups and sum(seconds) < _MOST_WARMUP_SECONDS:
            self._contents.fill(contender.tensors)
            seconds.append(max(self._ranks.gather(self._line.seconds(contender.run, 1))))
        turn.wrong += self._contents.count_wrong(contender.op, 1, contender.tensors)
        sample = _SHARED_CORE_SAMPLE_SECONDS if self._line.shares_cores else _SAMPLE_SECONDS
        wanted = math.ceil(sample / min(seconds))
        turn.calls = max(1, min(wanted, most_calls(self._ranks.size, self._case.dtype)))
        return turn

    def _disagreements(self, contender: Contender) -> int:
        """Elements whose bits differ between two calls or between ranks; counted on rank 0."""
        results = []
        for _ in range(2):
            self._contents.fill(contender.tensors)
            contender.run()
            results.append([tensor.clone() for tensor in contender.tensors])
        first, second = results
        expected = self._contents.expected(contender.op)
        wrong = count_wrong(
            self._ranks, first, second, expected, self._case.dtype, ranks_agree=True
        )
        return wrong if self._ranks.rank == 0 else 0

    def _take(self, turns: list[Turn], repeat: int) -> None:
        """One sample of every contender of a library."""
        library = turns[0].library
        is_cold = library.enter()
        for position in range(len(turns)):
            turn = turns[(position + repeat) % len(turns)]
            contender = turn.contender
            for _ in range(library.warmups if is_cold else 0):
                self._contents.fill(contender.tensors)
                contender.run()
            self._contents.fill(contender.tensors)
            elapsed = self._line.seconds(contender.run, turn.calls)
            turn.seconds.append(elapsed / turn.calls)
            turn.wrong += self._contents.count_wrong(contender.op, turn.calls, contender.tensors)
        library.leave()


def main(arguments: Sequence[str] | None = None) -> int:
    """Appends a JSON line for each case; returns the exit status. Collective."""
    given = _parse(arguments)
    end_after(given.limit)
    hvd.init()
    torch.set_num_threads(1)
    ranks = Ranks()
    return run_on_all(ranks, lambda: _run(given, ranks), __file__)


def _run(given: argparse.Namespace, ranks: Ranks) -> None:
    begin = time.monotonic()
    libraries, missing = connected(ranks)
    origin = machine.describe() if ranks.rank == 0 else {}
    if origin:
        origin["versions"] |= {lib.name: lib.version for lib in libraries if lib.version}
    for key, dtype in given.case:
        if ranks.broadcast(given.seconds is not None and time.monotonic() - begin > given.seconds):
            break  # the driver sees which cases are missing
        case = make_case(key, DTYPES[dtype])
        run = CaseRun(case, ranks, libraries)
        measured = run.measure(given.repeats)
        line = {
            "case": key,
            "dtype": dtype,
            "bytes": case.num_bytes,
            "tensors": len(case.shapes),
            "ranks": ranks.size,
            **measured,
            "missing": missing,
            "choices": _choices(),
            "settings": settings(),
            "shares_cores": ranks.size > len(os.sched_getaffinity(0)),
            **origin,
        }
        if ranks.rank == 0:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
        del run
        gc.collect()  # the next case needs the memory
    for library in libraries:
        library.close()


def _choices() -> Any:
    """What the library says of its shared memory: whether it is used, chunks, stores."""
    return hvd.shared_memory_choices()._asdict()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", nargs=2, action="append", required=True, metavar=("KEY", "DTYPE"))
    add("--repeats", type=int, default=5, help="samples of each contender (5)")
    add("--seconds", type=float, help="no case begins after so many")
    add("--limit", type=float, help="ends a job that runs longer, seconds")
    add("--out", type=Path, required=True, metavar="FILE", help="gets a JSON line for each case")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
