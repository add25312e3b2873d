"""What this machine's memory allows collectives between the ranks of one node.

    mpirun -n 2 python benchmarks/memory_traffic.py --json benchmarks/results/memory_traffic.jsonl
    mpirun -n 2 python benchmarks/memory_traffic.py --cases 1M 256M

All ranks work at the same time, in turns with the calls that they are a limit for, on one tensor or
on ResNet-50's gradients, which each has just read or written: they lie in its cache if they fit.
Three turns come before any is measured, and 30 of each of our calls before those. A turn moves
16 MiB at least: a work on a smaller tensor is done several times in a row, and its time is the
mean. "scale in place" reads and writes a rank's tensors once; "read" reads them once, and "read
again" once more, block by block, when a block has just been read and lies in a cache.

"pack", "combine" and "unpack" are what a sum of ordinary tensors moves at least, by NumPy's copyto
and add, which take less time to start than torch's functions, in blocks that fit a cache, and
without the time in which ranks wait for each other. With N bytes on each of P ranks, each copies
N (P - 1) / P into memory that all map, adds up its share of everybody's, writes N / P of results
into its tensors and into that memory, and copies the others' results out of it. Every line of that
memory moves from the core that wrote it to those that read it. Tensors in shared memory are read
and written where they are. Adasum moves what a sum moves, and reads everything again, because its
coefficients are known only when all of a tensor has been read. So its limit is the time of scaling
in place and of reading again; of ordinary tensors, of our own sum and of reading again. Of one
tensor that no cache holds that is less than it can take. "sum by MPI" is what Allreduce of mpi4py
takes for as many bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_cases import size_bytes

import adareduce.torch as hvd
from adareduce.bench import machine, presets
from adareduce.bench.ranks import Ranks
from adareduce.bench.timing import LEAST_REPEATS, ratio_of_medians, summarise

_BLOCK_BYTES = 256 << 10  # of a rank's share
_TURN_BYTES = 16 << 20  # a smaller tensor is moved several times in a row
_LAYER_BYTES = 4 << 20  # what is read again; most of ResNet-50's bytes are in layers of 4 to 9 MB
_WARMUPS = 3  # turns
_WARMUP_CALLS = 30  # of each of ours, which learns from them how to go through memory
_LEAST_BYTES = 128 << 10
_MOVES = ("pack", "combine", "unpack")
# The works whose times add up to a limit.
_LIMITS = {
    "sum, ordinary": list(_MOVES),
    "Adasum, ordinary": ["sum, ordinary", "read again"],
    "sum, shared": ["scale in place"],
    "Adasum, shared": ["scale in place", "read again"],
}


class Moves:
    """What a sum of `flat` on all ranks moves, through memory that all of them map."""

    def __init__(self, ranks: Ranks, flat: torch.Tensor) -> None:
        self._ranks = ranks
        num_blocks = -(-flat.numel() // (ranks.size * _BLOCK_BYTES // 4))
        share = flat.numel() // (ranks.size * num_blocks)  # elements of a block
        covered = num_blocks * ranks.size * share
        blocks = flat[:covered].view(num_blocks, ranks.size, share).numpy()
        self._scale = flat.numel() / covered
        # A file of memory, whose name is gone as soon as all ranks have mapped it.
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            name = ranks.broadcast(file.name)
            numel = ranks.size * ranks.size * share
            if ranks.rank == 0:
                file.truncate(4 * numel)
            ranks.align()
            memory = torch.from_file(name, shared=True, size=numel, dtype=torch.float32)
            ranks.align()
        # Of each rank what it has of each rank's share; in its own place its results.
        slots = memory.view(ranks.size, ranks.size, share).numpy()
        me = ranks.rank
        mine, others = slots[me], [rank for rank in range(ranks.size) if rank != me]
        self._works = [
            {
                "pack": [partial(np.copyto, mine[r], block[r]) for r in others],
                "combine": [
                    *(partial(np.add, block[me], slots[r, me], block[me]) for r in others),
                    partial(np.copyto, mine[me], block[me]),
                ],
                "unpack": [partial(np.copyto, block[r], slots[r, r]) for r in others],
            }
            for block in blocks
        ]

    def seconds(self) -> dict[str, float]:
        """Of all blocks, on this rank. Collective."""
        found = dict.fromkeys(_MOVES, 0.0)
        for moves in self._works:
            for name, works in moves.items():
                self._ranks.align()
                begin = time.perf_counter()
                for work in works:
                    work()
                found[name] += time.perf_counter() - begin
        return {name: seconds * self._scale for name, seconds in found.items()}


def read_again(flat: torch.Tensor) -> float:
    """Seconds in which all blocks are read, each when it has just been read."""
    found = 0.0
    for block in flat.split(_LAYER_BYTES // 4):
        torch.dot(block, block)
        found += timed(partial(torch.dot, block, block))
    return found


def slowest(ranks: Ranks, mine: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of each repeat the slowest rank's seconds."""
    everybody = ranks.gather(mine)
    return {name: torch.stack([theirs[name] for theirs in everybody]).amax(dim=0) for name in mine}


def timed(run: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call, the mean of so many in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


@dataclass(frozen=True)
class Memory:
    """A rank's tensors, and the flat buffers that they are parts of."""

    flat: torch.Tensor
    buffer: torch.Tensor  # all ranks map it
    array: np.ndarray  # MPI's
    numels: list[int]

    @classmethod
    def of(cls, numels: list[int]) -> Memory:
        """New ones. Collective."""
        flat, buffer = torch.ones(sum(numels)), hvd.empty_shared(sum(numels))
        return cls(flat, buffer.zero_(), np.zeros(sum(numels), np.float32), numels)

    def look_at(self, name: str) -> None:
        """Reads what the work or call `name` is going to: it lies in a cache then if it fits."""
        if name.endswith("MPI"):
            memory = torch.from_numpy(self.array)
        else:
            memory = self.buffer if name.endswith("shared") else self.flat
        torch.dot(memory, memory)


def calls(memory: Memory, comm: Any) -> dict[str, Callable[[], object]]:
    """The works on all of a rank's memory, the calls that the limits are for, and a peer's."""
    from mpi4py import MPI  # not before hvd.init()

    flat = memory.flat
    ordinary, shared = list(flat.split(memory.numels)), list(memory.buffer.split(memory.numels))
    return {
        "scale in place": lambda: flat.mul_(-1.0),
        "read": lambda: torch.dot(flat, flat),
        # Averages, since sums of sums would overflow: what they cost is the same.
        "sum, ordinary": lambda: hvd.grouped_allreduce_(ordinary, op=hvd.Average),
        "Adasum, ordinary": lambda: hvd.grouped_allreduce_(ordinary, op=hvd.Adasum),
        "sum, shared": lambda: hvd.grouped_allreduce_(shared, op=hvd.Average),
        "Adasum, shared": lambda: hvd.grouped_allreduce_(shared, op=hvd.Adasum),
        "sum by MPI": lambda: comm.Allreduce(MPI.IN_PLACE, memory.array),
    }


def main() -> int:
    """Prints a table per case, appends JSON lines; returns the exit status. Collective."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", type=_case, default=["1M", "16M", "resnet50"], metavar="CASE",
        help="bytes of one float32 tensor (K, M, G: 1024 each) or resnet50 (1M 16M resnet50)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=20, help="turns of each work (20)")
    parser.add_argument("--json", metavar="FILE", help="append JSON lines")
    given = parser.parse_args()
    if given.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}, got {given.repeats}")
    hvd.init()
    torch.set_num_threads(1)
    ranks = Ranks()
    if len(set(ranks.hosts)) > 1 or ranks.size < 2:
        raise SystemExit("memory_traffic.py: it must have 2 or more ranks, all on one host")
    if given.json:
        try:
            Path(given.json).open("a").close()  # all ranks, so that none waits for one that cannot
        except OSError as error:
            raise SystemExit(f"memory_traffic.py: --json must be a file that can be written,"
                             f" got {given.json}: {error.strerror}") from error  # fmt: skip
    for case in given.cases:
        row = measure(ranks, case, given.repeats)
        if ranks.rank == 0:
            report(row)
            if given.json:
                with Path(given.json).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


def make_numels(case: str) -> list[int]:
    """Elements of a case's tensors; ValueError where there is no such case."""
    if case == "resnet50":
        return [torch.Size(shape).numel() for shape in presets.resnet50()]
    if size_bytes(case) < _LEAST_BYTES:
        raise ValueError(f"a size must be at least 128K, since less goes another way, got {case!r}")
    return [size_bytes(case) // 4]


def measure(ranks: Ranks, case: str, repeats: int) -> dict[str, Any]:
    """One case; its row. Collective."""
    memory = Memory.of(make_numels(case))
    num_bytes = 4 * sum(memory.numels)
    in_a_row = -(-_TURN_BYTES // num_bytes)
    works = calls(memory, ranks.comm)
    moves = Moves(ranks, memory.flat)
    found: dict[str, list[float]] = {name: [] for name in (*works, *_MOVES, "read again")}
    round_trips = []
    requests = dict(hvd.shared_memory_choices().requests)
    for name in _LIMITS:
        for _ in range(_WARMUP_CALLS):
            works[name]()
    for repeat in range(-_WARMUPS, repeats):
        round_trip = ranks.core_round_trip_ns()
        memory.flat.zero_()  # sums of sums of anything else would overflow
        several = [moves.seconds() for _ in range(in_a_row)]
        once = {name: statistics.fmean(one[name] for one in several) for name in _MOVES}
        memory.flat.fill_(1.0)
        for name, run in works.items():
            memory.look_at(name)
            ranks.align()
            once[name] = timed(run, in_a_row)
        ranks.align()
        once["read again"] = statistics.fmean(read_again(memory.flat) for _ in range(in_a_row))
        if repeat >= 0:
            round_trips.append(round_trip)
            for name, seconds in once.items():
                found[name].append(seconds)
    mine = {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in found.items()}
    sums = {name: sum(mine[work] for work in works) for name, works in _LIMITS.items()}
    seconds_of, limits = slowest(ranks, mine), slowest(ranks, sums)
    choices = hvd.shared_memory_choices()
    if not choices.used or choices.requests["in place"] - requests["in place"] < 2 * repeats:
        raise SystemExit(f"memory_traffic.py: ranks must share memory, got {choices}")
    return {
        "case": case,
        "ranks": ranks.size,
        "bytes": num_bytes,
        "median_seconds": {name: summarise(s).median for name, s in seconds_of.items()},
        "limit_seconds": {name: summarise(s).median for name, s in limits.items()},
        "ratios": {
            name: ratio_of_medians(seconds_of[name], limit)._asdict()
            for name, limit in limits.items()
        },
        "core_round_trip_ns": _median(round_trips),
        "settings": {
            "repeats": repeats,
            "calls_in_a_row": in_a_row,
            "moves": f"NumPy {np.__version__}",
            "block_bytes": _BLOCK_BYTES,
            "layer_bytes": _LAYER_BYTES,
        },
        "choices_so_far": choices._asdict(),
        **machine.describe(),
    }


def report(row: dict) -> None:
    """Prints the row."""
    print(f"{row['case']}: {row['ranks']} ranks, {row['bytes'] / 1e6:.1f} MB each")
    for name, seconds in row["median_seconds"].items():
        line = f"{name:<20} {1e3 * seconds:8.2f} ms"
        if name in row["ratios"]:
            ratio = row["ratios"][name]
            line += (
                f"  limit {1e3 * row['limit_seconds'][name]:8.2f} ms,"
                f" ratio {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            )
        print(line)


def _case(text: str) -> str:
    try:
        make_numels(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or resnet50") from None
    return text


def _median(values: list[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


if __name__ == "__main__":
    sys.exit(main())
