"""The command line: what is measured, how often, and what is written where."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adareduce.bench import presets
from adareduce.bench.ranks import speaks_before_init
from adareduce.bench.timing import LEAST_REPEATS

DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
    "double": torch.float64,
    "float64": torch.float64,
    "bool": torch.bool,
}
OPS = ("sum", "prod", "min", "max", "avg", "adasum")
COLLECTIVES = ("allreduce", "reducescatter", "allgather", "alltoall", "broadcast", "barrier")
_REDUCTIONS = ("allreduce", "reducescatter")
_GROUPED = ("allreduce", "reducescatter", "allgather")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

_DESCRIPTION = """\
Measures a collective over a range of sizes and checks its results. Start it under mpirun; rank 0
prints a table with the columns of nccl-tests. Exit status 1: a result was wrong.

  mpirun -n 2 python -m adareduce.bench allreduce --op adasum -b 4K -e 64M -f 4
"""


@dataclass(frozen=True)
class Settings:
    """One run, as the command line asks for it. Sizes are in bytes."""

    collective: str
    op: str
    dtype: torch.dtype
    minbytes: int
    maxbytes: int
    stepbytes: int
    stepfactor: int
    iters: int
    warmup_iters: int
    root: int
    check: bool
    layers: int | str
    stats: bool
    percentiles: bool
    peers: bool
    json: str | None
    plot: str | None
    device: str = "cpu"
    graph: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether tensors lie on a GPU."""
        return self.device == "cuda"

    @property
    def is_reduction(self) -> bool:
        """Whether the collective does arithmetic."""
        return self.collective in _REDUCTIONS

    def sizes(self) -> list[int]:
        """Bytes of every row; one row for a barrier and for a preset."""
        if self.collective == "barrier" or isinstance(self.layers, str):
            return [0]
        sizes = [self.minbytes]
        while True:
            grown = sizes[-1] * self.stepfactor if self.stepfactor > 1 else None
            size = sizes[-1] + self.stepbytes if grown is None else grown
            if size > self.maxbytes:
                return sizes
            sizes.append(size)

    def for_json(self) -> dict[str, object]:
        """All settings as plain values."""
        return {**vars(self), "dtype": dtype_name(self.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it: "float32"."""
    return str(dtype).removeprefix("torch.")


def parse_size(text: str) -> int:
    """Bytes: "512", "4K", "64M", "1G" (powers of 1024).

    Raises:
        argparse.ArgumentTypeError: The text is not of this form.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive size such as 4K or 64M, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the command line; ends the process where it makes no sense. Not collective."""
    parser = _make_parser()
    given = parser.parse_args(arguments)
    maxbytes = given.minbytes if given.maxbytes is None else given.maxbytes
    _check(parser, given, maxbytes)
    return Settings(
        collective=given.collective,
        op=given.op,
        dtype=DTYPES[given.datatype],
        minbytes=given.minbytes,
        maxbytes=maxbytes,
        stepbytes=given.stepbytes,
        stepfactor=given.stepfactor,
        iters=given.iters,
        warmup_iters=given.warmup_iters,
        root=given.root,
        check=bool(given.check),
        layers=given.layers,
        stats=given.stats,
        percentiles=given.percentiles,
        peers=given.peers,
        json=given.json,
        plot=given.plot,
        device=given.device,
        graph=bool(given.cudagraph),
    )


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        # Every rank reads the same command line: one of them speaks.
        if speaks_before_init():
            super()._print_message(message, file)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m adareduce.bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("collective", choices=COLLECTIVES)
    add("-b", "--minbytes", type=parse_size, default="32M", help="smallest size (32M)")
    add("-e", "--maxbytes", type=parse_size, help="largest size (as --minbytes)")
    add("-i", "--stepbytes", type=parse_size, default="1M", help="from size to size (1M)")
    add("-f", "--stepfactor", type=int, default=1, help="factor from size to size, not --stepbytes")
    add("-n", "--iters", type=int, default=20, help="measured iterations (20)")
    add("-w", "--warmup_iters", type=int, default=5, help="iterations before them (5)")
    add("-o", "--op", choices=OPS, default="sum", help="of reductions (sum)")
    add("-d", "--datatype", "--dtype", choices=DTYPES, default="float", help="of elements (float)")
    add("-r", "--root", type=int, default=0, help="of broadcast (0)")
    add("-c", "--check", type=int, choices=(0, 1), default=1, help="check results (1)")
    add(
        "--layers",
        type=_parse_layers,
        default=1,
        metavar="N|PRESET",
        help="N: cut every size into N tensors, for one grouped call. A preset: the gradients of a"
        f" model, in one row (allreduce). {presets.HELP}",
    )
    add("--stats", action="store_true", help="also with AdaScale statistics, interleaved")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors lie (cpu)")
    add("-G", "--cudagraph", type=int, choices=(0, 1), default=0,
        help="1: time a graph's replays, without Python (0)")  # fmt: skip
    add(
        "--peers",
        action="store_true",
        help="also gloo and MPI, on --device cuda NCCL, interleaved",
    )
    add(
        "--percentiles",
        action="store_true",
        help="columns for p50 and p99 (p99: with 100 or more iterations)",
    )
    add("--json", metavar="FILE", help="append one JSON line per row")
    add("--plot", metavar="FILE.png", help="draw busbw against size (needs matplotlib)")
    return parser


def _parse_layers(text: str) -> int | str:
    if text in presets.PRESETS:
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    names = ", ".join(presets.PRESETS)
    raise argparse.ArgumentTypeError(f"must be a positive number or one of {names}, got {text!r}")


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace, maxbytes: int) -> None:
    dtype, collective = DTYPES[given.datatype], given.collective
    reduces = collective in _REDUCTIONS
    rules = [
        (
            given.minbytes <= maxbytes,
            f"--maxbytes must be at least --minbytes={given.minbytes}, got {maxbytes}",
        ),
        (given.stepfactor >= 1, f"--stepfactor must be at least 1, got {given.stepfactor}"),
        (given.iters >= 1, f"--iters must be at least 1, got {given.iters}"),
        (given.warmup_iters >= 0, f"--warmup_iters must be at least 0, got {given.warmup_iters}"),
        (given.root >= 0, f"--root must be at least 0, got {given.root}"),
        (
            not (given.peers or given.stats) or given.iters >= LEAST_REPEATS,
            f"--iters must be at least {LEAST_REPEATS} for an interval of a ratio, got"
            f" {given.iters}",
        ),
        (
            not reduces or given.op != "adasum" or dtype.is_floating_point,
            f"--datatype must be a floating point type for --op adasum, got {given.datatype}",
        ),
        (
            not reduces or dtype != torch.bool or given.op in ("min", "max", "prod"),
            f"--op must be min, max or prod for --datatype bool, got {given.op}",
        ),
        (
            collective != "reducescatter" or given.op != "adasum",
            "--op must not be adasum for reducescatter",
        ),
        (
            given.layers == 1 or collective in _GROUPED,
            f"--layers must be left out for {collective}, which has no grouped call",
        ),
        (
            isinstance(given.layers, int) or collective == "allreduce",
            f"--layers must be a number for {collective}, got {given.layers}",
        ),
        (
            not given.stats
            or (
                collective == "allreduce"
                and dtype.is_floating_point
                and given.op in ("sum", "avg", "adasum")
            ),
            "--stats must go with an allreduce of op sum, avg or adasum and a floating point type",
        ),
        (
            given.device == "cpu" or collective != "barrier",
            "--device must be cpu for barrier, which the host does",
        ),
        (
            given.device == "cpu" or torch.cuda.is_available(),
            "--device must be cpu: torch sees no GPU here",
        ),
        (
            not given.cudagraph or given.device == "cuda",
            f"--cudagraph must be 0 without --device cuda, got {given.cudagraph}",
        ),
        (
            not given.plot or collective != "barrier",
            "--plot must be left out for barrier, which has no sizes",
        ),
        (
            not given.plot or importlib.util.find_spec("matplotlib") is not None,
            "--plot needs matplotlib; pip install 'adareduce[bench]'",
        ),
        (
            not given.peers or importlib.util.find_spec("numpy") is not None,
            "--peers needs numpy; pip install 'adareduce[bench]'",
        ),
    ]
    for is_kept, text in rules:
        if not is_kept:
            parser.error(text)
