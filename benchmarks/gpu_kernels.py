"""CUDA kernels as a share of a device-to-device copy of the same run, beside torch's own.

    python benchmarks/gpu_kernels.py --json results.jsonl

Every contender is captured in a graph, once for each of several sets of buffers that together
exceed the L2 cache (but for tiny2000, which fits); graphs are replayed in turns, between two
events, and medians count. GB/s count every array once for each time that a kernel must read or
write it. A share is GB/s / GB/s of the copy (tensor.copy_, which reads and writes). What torch
does beside it does the same work, or a little less where gpu_contenders.py says so; its ratio is
torch's time / ours. Before anything is timed, results are compared with torch's in float64, on
random data. Exit status 1: one was wrong.
Status: was never run on a GPU; --sets smoke was, on the emulation, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import adareduce.torch as hvd
from adareduce.bench import machine as origin_of
from adareduce.bench.timing import LEAST_REPEATS, Ratio, ratio_of_medians, summarise

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
from device import Machine
from gpu_contenders import OURS, THEIRS, YARDSTICK, Buffers, Contender, numels_of, wrong

_CACHES = 4  # the sets together exceed the L2 so many times
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
           "float64": torch.float64}  # fmt: skip


@dataclass
class Measured:
    """Seconds of every repeat, by contender."""

    seconds: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # of torch's, and why


def measure(sets: list[Buffers], ours: Sequence[Contender], repeats: int) -> Measured:
    """All contenders in turns, each turn on the next set."""
    machine = sets[0].machine
    found = Measured()
    replays: dict[str, list[Callable[[], Any]]] = {}
    for contender in [YARDSTICK, *ours, *THEIRS]:
        try:
            replays[contender.name] = [captured(contender, buffers) for buffers in sets]
        except (RuntimeError, AttributeError, TypeError) as error:
            if not contender.beside:
                raise
            found.missing[contender.name] = str(error).splitlines()[0]
    times = {name: torch.zeros(repeats, dtype=torch.float64) for name in replays}
    for repeat in range(-3, repeats):
        for name, calls in replays.items():
            elapsed = seconds_of(machine, calls[repeat % len(calls)])
            if repeat >= 0:
                times[name][repeat] = elapsed
    found.seconds = times
    return found


def captured(contender: Contender, buffers: Buffers) -> Callable[[], Any]:
    """What replays a call."""
    contender.run(buffers)
    buffers.machine.wait()
    if buffers.machine.is_emulated:
        return lambda: contender.run(buffers)
    side: Any = torch.cuda.Stream
    stream = side()
    with torch.cuda.stream(stream):
        contender.run(buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        contender.run(buffers)
    return graph.replay


def seconds_of(machine: Machine, call: Callable[[], Any]) -> float:
    """Of one replay."""
    if machine.is_emulated:  # says nothing of a GPU
        begin = time.perf_counter()
        call()
        machine.wait()
        return time.perf_counter() - begin
    event: Any = torch.cuda.Event
    begin_event, end_event = event(enable_timing=True), event(enable_timing=True)
    begin_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1e3


def rows_of(name: str, sets: list[Buffers], ours: Sequence[Contender], found: Measured,
            guilty: Sequence[str]) -> list[dict[str, Any]]:  # fmt: skip
    """A JSON line for each of our kernels. Times in seconds, bandwidths in GB/s (10^9)."""
    num_bytes = sum(t.numel() for t in sets[0].tensors) * sets[0].dtype.itemsize
    medians = {key: summarise(value).median for key, value in found.seconds.items()}
    rows = []
    for kernel in ours:
        inverse = ratio_of_medians(found.seconds["copy"], found.seconds[kernel.name])
        share = Ratio(*(value * kernel.touches / YARDSTICK.touches for value in inverse))
        beside = {
            other.name: {
                "median_seconds": medians[other.name],
                "ratio": ratio_of_medians(found.seconds[other.name], found.seconds[kernel.name])
                ._asdict(),
            }
            for other in THEIRS
            if other.beside == kernel.name and other.name in medians
        }  # fmt: skip
        rows.append({
            "kernel": kernel.name, "dtype": str(sets[0].dtype).removeprefix("torch."), "set": name,
            "tensors": len(sets[0].tensors), "bytes": num_bytes, "buffer_sets": len(sets),
            "repeats": len(found.seconds["copy"]), "median_seconds": medians[kernel.name],
            "gbps": kernel.touches * num_bytes / medians[kernel.name] / 1e9,
            "copy_gbps": YARDSTICK.touches * num_bytes / medians["copy"] / 1e9,
            "share": share._asdict(), "beside": beside, "unavailable": found.missing,
            "wrong": int(kernel.name in guilty),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints a table, appends JSON lines; returns the exit status."""
    given = parse(arguments)
    machine = Machine()
    if not (machine.is_emulated or torch.cuda.is_available()):
        print("gpu_kernels: torch sees no GPU here")
        return 1
    origin = describe(machine)
    print(f"# {origin['gpu']['name']}, torch {origin['versions']['torch']}, commit"
          f" {origin['commit']}")  # fmt: skip
    accumulators = machine.testing.accumulators()
    ours = [kernel for kernel in OURS if kernel.name != "pair_stats_f32" or "f32" in accumulators]
    rows = []
    for name in given.sets:
        for dtype in (_DTYPES[word] for word in given.dtypes):
            numels = numels_of(name, dtype)
            size = sum(numels) * dtype.itemsize
            count = max(2, math.ceil(_CACHES * origin["gpu"]["l2_bytes"] / size))
            sets = [Buffers(machine, numels, dtype) for _ in range(min(count, given.most_sets))]
            guilty = wrong(sets[0])
            for row in rows_of(name, sets, ours, measure(sets, ours, given.repeats), guilty):
                rows.append(row)
                report(row)
                if given.json:
                    with Path(given.json).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row | origin) + "\n")
            del sets
    print(f"worst shares of a copy: {'; '.join(worst_of(rows, name) for name in given.sets)}")
    return 1 if any(row["wrong"] for row in rows) else 0


def worst_of(rows: Sequence[dict[str, Any]], name: str) -> str:
    """The smallest share of a set, and whose it is."""
    row = min((r for r in rows if r["set"] == name), key=lambda r: float(r["share"]["value"]))
    return f"{name} {row['share']['value']:.2f} ({row['kernel']} {row['dtype']})"


def describe(machine: Machine) -> dict[str, Any]:
    """Where a row comes from."""
    hvd.init()  # for the versions of what takes part
    found: dict[str, Any] = origin_of.describe()
    found["gpu"] = {"name": "emulated", "l2_bytes": 2**20, "memory_bytes": 0}
    if not machine.is_emulated:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {"name": properties.name, "l2_bytes": properties.L2_cache_size,
                        "memory_bytes": properties.total_memory}  # fmt: skip
        found["gpu_versions"] = {"cuda": torch.version.cuda}
    return found


def report(row: dict[str, Any]) -> None:
    """One line of the table."""
    share, verdict = row["share"], "  WRONG" if row["wrong"] else ""
    beside = [f"{name} {entry['ratio']['value']:.2f}" for name, entry in row["beside"].items()]
    print(
        f"{row['kernel']:<22} {row['dtype']:>9} {row['set']:<10} {row['gbps']:>8.1f} GB/s"
        f" {share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}] of"
        f" {row['copy_gbps']:.1f}{verdict}  torch / ours: {', '.join(beside) or '-'}",
        flush=True,
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sets",
        nargs="+",
        choices=("large200", "small2000", "tiny2000", "smoke"),
        default=["large200", "small2000", "tiny2000"],
        help="of tensors; large200 is 1 GiB",
    )
    add("--dtypes", nargs="+", choices=_DTYPES, default=["bfloat16", "float32"])
    add("--repeats", type=int, default=30, help="of every contender in turn (30)")
    add("--most-sets", type=int, default=16, help="of buffers (16)")
    add("--json", metavar="FILE", help="append one JSON line per kernel")
    given = parser.parse_args(arguments)
    if given.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}, got {given.repeats}")
    if given.most_sets < 1:
        parser.error(f"--most-sets must be at least 1, got {given.most_sets}")
    return given


if __name__ == "__main__":
    sys.exit(main())
