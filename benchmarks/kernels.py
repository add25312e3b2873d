"""How fast the CPU kernels are, as a share of what the memory allows on the same cores.

    python benchmarks/kernels.py --json benchmarks/results/kernels.jsonl

Every kernel takes turns with its yardstick: a sum that only reads, memcpy, or y = a x + b y in
place. GB/s count each array once per time that the kernel reads or writes it. The share is the
ratio of the medians, with a bootstrap interval of 95 %. Cores that share a cache or not give
different results in the same machine, so the round trip between two of them is measured along.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import adareduce.torch as hvd
from adareduce import _core
from adareduce.bench import machine
from adareduce.bench.arguments import DTYPES, dtype_name, parse_size
from adareduce.bench.timing import LEAST_REPEATS, Ratio, ratio_of_medians, summarise
from adareduce.torch.tensors import dtype_code

# Round trips above this are called far: caches share lines in 40 to 150 ns, and cores that have
# none in common in 300 ns and more, on the machines that were seen.
FAR_NS = 200.0
_DTYPES = ["float32", "float16", "bfloat16", "float64"]
_LEAST_BYTES_PER_SAMPLE = 16 << 20


@dataclass(frozen=True)
class Kernel:
    """What is timed: how often it touches an array, and what it is compared with."""

    name: str
    buffers: int
    touches: int
    yardstick: str
    entry: str = ""  # in time_kernel(), where it is not the name


YARDSTICKS = [Kernel("read", 2, 2, ""), Kernel("memcpy", 2, 2, ""), Kernel("axpby", 2, 3, "")]
KERNELS = [
    Kernel("pair_stats", 2, 2, "read"),
    Kernel("pair_combine", 2, 3, "axpby"),
    Kernel("pack", 2, 2, "memcpy"),
    Kernel("pack_by_streams", 2, 2, "memcpy"),
    Kernel("unpack", 2, 2, "memcpy"),
    Kernel("unpack_and_count", 2, 2, "memcpy"),
    Kernel("reduce", 3, 3, "axpby"),
    Kernel("average", 3, 3, "axpby"),
    Kernel("average_and_squares", 3, 3, "axpby"),
    *[Kernel(f"gram_{n}", n, n, "read", "gram") for n in (2, 4, 8)],
    *[Kernel(f"weighted_sum_{n}", n + 1, n + 1, "axpby", "weighted_sum") for n in (2, 4, 8)],
]


class Arrays:
    """Arrays of one size for one thread: random numbers, valid in every type that they are."""

    def __init__(self, num_bytes: int, dtype: torch.dtype, kernels: list[Kernel]) -> None:
        self.num_bytes, self.dtype = num_bytes, dtype
        self._typed = [
            torch.rand(num_bytes // dtype.itemsize, dtype=torch.float32).to(dtype)
            for _ in range(max(kernel.buffers for kernel in kernels))
        ]
        self._floats = [torch.rand(num_bytes // 4) for _ in range(2)]

    def seconds(self, kernel: Kernel, isa: str) -> float:
        """Of one call, the mean of as many as make a sample that a clock can measure."""
        # The yardsticks read floats: denormal or infinite ones would take another time.
        is_yardstick = not kernel.yardstick
        tensors = (self._floats if is_yardstick else self._typed)[: kernel.buffers]
        dtype = tensors[0].dtype
        calls = max(1, _LEAST_BYTES_PER_SAMPLE // self.num_bytes)
        views = [tensor.view(torch.uint8).numpy() for tensor in tensors]
        elapsed: float = _core.testing.time_kernel(
            kernel.entry or kernel.name, dtype_code(dtype), tensors[0].numel(), views, calls, isa
        )
        return elapsed


def main(arguments: list[str] | None = None) -> int:
    """Prints a table, appends JSON lines; returns the exit status."""
    given = parse(arguments)
    hvd.init()  # for the versions of what takes part
    origin = machine.describe()
    print(f"# {origin['machine']['cpu']}, {origin['machine']['usable_cores']} cores, {given.isa},"
          f" {given.threads} thread(s), commit {origin['commit']}")  # fmt: skip
    print(f"# {'kernel':<20} {'dtype':>9} {'bytes':>10} {'GB/s':>7} {'share':>6} "
          f"{'[low, high]':>13} of {'yardstick':>9} {'GB/s':>7}  round trip (ns), far")  # fmt: skip
    for num_bytes in given.sizes:
        for dtype in given.dtypes:
            for row in measure(num_bytes, DTYPES[dtype], given):
                report(row)
                if given.json:
                    with Path(given.json).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row | origin) + "\n")
    return 0


def measure(
    num_bytes: int, dtype: torch.dtype, given: argparse.Namespace
) -> list[dict[str, object]]:
    """One row per kernel, all in turns; with several threads, each has its own arrays."""
    kernels = [kernel for kernel in KERNELS if kernel.name in given.kernels]
    threads = [Arrays(num_bytes, dtype, kernels) for _ in range(given.threads)]
    everything = [*YARDSTICKS, *kernels]
    seconds = {
        kernel.name: torch.zeros(given.repeats, dtype=torch.float64) for kernel in everything
    }
    round_trips = []
    with concurrent.futures.ThreadPoolExecutor(given.threads) as pool:
        for repeat in range(-1, given.repeats):
            for kernel in everything:
                found = list(pool.map(lambda a, k=kernel: a.seconds(k, given.isa), threads))
                if repeat >= 0:
                    seconds[kernel.name][repeat] = max(found)
            round_trips.append(round_trip())
    return [row_of(kernel, num_bytes, dtype, seconds, round_trips, given) for kernel in kernels]


def row_of(
    kernel: Kernel,
    num_bytes: int,
    dtype: torch.dtype,
    seconds: dict[str, torch.Tensor],
    round_trips: list[float | None],
    given: argparse.Namespace,
) -> dict[str, object]:
    """The JSON line of a kernel. Times in seconds, bandwidths in GB/s (10^9), all threads."""
    (yardstick,) = (entry for entry in YARDSTICKS if entry.name == kernel.yardstick)

    def gbps(entry: Kernel) -> float:
        total = entry.touches * num_bytes * given.threads
        return total / summarise(seconds[entry.name]).median / 1e9

    inverse = ratio_of_medians(seconds[yardstick.name], seconds[kernel.name])
    share = Ratio(*(value * kernel.touches / yardstick.touches for value in inverse))
    known = [trip for trip in round_trips if trip is not None]
    return {
        "kernel": kernel.name,
        "dtype": dtype_name(dtype),
        "bytes": num_bytes,
        "isa": given.isa,
        "threads": given.threads,
        "repeats": given.repeats,
        "median_seconds": summarise(seconds[kernel.name]).median,
        "gbps": gbps(kernel),
        "yardstick": yardstick.name,
        "yardstick_gbps": gbps(yardstick),
        "share": share._asdict(),
        "core_round_trip_ns": float(torch.tensor(known).median()) if known else None,
        "far_share": sum(trip > FAR_NS for trip in known) / len(known) if known else None,
    }


def round_trip() -> float | None:
    """Nanoseconds between the first two cores; None where there is one."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    return _core.testing.core_round_trip_ns(*cores) if len(cores) == 2 else None


def report(row: dict) -> None:
    """One line of the table."""
    share, trip = row["share"], row["core_round_trip_ns"]
    interval = f"[{share['low']:.2f}, {share['high']:.2f}]"
    probe = "one core" if trip is None else f"{trip:.0f}, {100 * row['far_share']:.0f} %"
    print(f"  {row['kernel']:<20} {row['dtype']:>9} {row['bytes']:>10} {row['gbps']:>7.1f}"
          f" {share['value']:>6.2f} {interval:>13} of {row['yardstick']:>9}"
          f" {row['yardstick_gbps']:>7.1f}  {probe}", flush=True)  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    isas = _core.testing.isas()
    floats = [name for name, dtype in DTYPES.items() if dtype.is_floating_point]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=["128K", "4M", "64M"],
                        help="bytes of an array (128K 4M 64M)")  # fmt: skip
    parser.add_argument("--dtypes", choices=floats, nargs="+", default=_DTYPES,
                        help="of the elements")  # fmt: skip
    parser.add_argument("--isa", choices=isas, default=isas[-1], help=f"({isas[-1]})")
    names = [kernel.name for kernel in KERNELS]
    parser.add_argument("--kernels", choices=names, nargs="+", default=names, metavar="NAME",
                        help="(all) " + ", ".join(names))  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="at the same time (1)")
    parser.add_argument("--repeats", type=int, default=15, help="of every kernel in turn (15)")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per kernel")
    given = parser.parse_args(arguments)
    given.sizes = [parse_size(s) if isinstance(s, str) else s for s in given.sizes]
    if given.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}, got {given.repeats}")
    if given.threads < 1:
        parser.error(f"--threads must be at least 1, got {given.threads}")
    return given


if __name__ == "__main__":
    sys.exit(main())
