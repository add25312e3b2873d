#!/usr/bin/env python3
"""Compares two installed versions of adareduce on one node, as before and after an upgrade.

    python benchmarks/compare_versions.py --before .venv-old --after .venv --json FILE
    python benchmarks/compare_versions.py --before .venv-old --after .venv --ranks 2 --cases sum-4K

Jobs of both versions take turns: before, after, after, before, ... In a job all calls take turns
(version_job.py). By default with ADAREDUCE_SHARED_MEMORY=off: what those have who do not use it.
Ratios are after / before, of neighbouring jobs: more than 1 means that the upgrade made it slower.
They need five rounds. Versions that were not installed from a checkout do not know their commit.
Nothing else should run meanwhile. Exit status 1: a result was wrong, or a job failed; 2: there is
nothing to measure or to write to.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tables
from compare_peers import (
    Environment,
    append,
    check_amounts,
    find_environment,
    note,
    run_command,
)
from compare_report import Line, interval
from version_cases import MAKERS
from version_job import LIFE

SCRIPT = Path(__file__).resolve().parent / "version_job.py"
CASES = (*MAKERS, *LIFE)
ONE_RANK_CASES = ("sum-4K", "async-4K", "sum-resnet50", "step-average", *LIFE)
_DIFFERENCES = ("idle",)  # a ratio of what is to be nothing says nothing
_SIDES = ("before", "after")
_LIMIT_SECONDS = 120.0
_LIMIT_PER_TURN = 30.0


@dataclass(frozen=True)
class Start:
    """How many ranks a job has, and whether mpirun starts them."""

    ranks: int
    launch: str  # "mpirun" or "alone"

    def command(self, environment: Environment) -> list[str]:
        """Starts them."""
        if self.launch == "alone":
            return [environment.python, str(SCRIPT)]
        return environment.command(self.ranks, SCRIPT)


Run = Callable[[list[str], float, Mapping[str, str]], tuple[list[Line], str]]


def main(arguments: Sequence[str] | None = None, run: Run = run_command) -> int:
    """Measures, prints the table and returns the exit status; `run` stands for ``run_command``."""
    given = _parse(arguments)
    if given.json:
        try:
            given.json.open("a").close()
        except OSError as error:
            print(f"compare_versions.py: --json must be a file that can be written,"
                  f" got {given.json}: {error.strerror}")  # fmt: skip
            return 2
    lines: list[Line] = []
    failures: list[str] = []
    try:
        measure(given, run, lines, failures)
    finally:  # also of what an interrupt has left unfinished
        rows = make_rows(lines)
        append(given.json, rows)
    if rows:
        print(f"\n{tables.versions(rows)}\n{tables.origin(rows)}")
    for row in rows:
        for side, wrong in row["wrong"].items():
            if wrong:
                failures.append(f"{row['case']}, {row['ranks']} ranks ({row['launch']}), {side}:"
                                f" {wrong} elements were wrong")  # fmt: skip
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures or not rows else 0


def measure(given: argparse.Namespace, run: Run, lines: list[Line], failures: list[str]) -> None:
    """All jobs, in turns; adds their lines, and what failed."""
    deadline = time.monotonic() + 60 * given.minutes
    starts = [Start(ranks, "mpirun") for ranks in given.ranks]
    starts += [Start(1, "alone")] if 1 in given.ranks else []
    sides = {"before": given.before, "after": given.after}
    # Each job is to find its own version, and to say its own commit.
    settings = {"PYTHONPATH": "", "ADAREDUCE_BENCH_COMMIT": "", "ADAREDUCE_SHARED_MEMORY": "off"}
    settings |= dict(given.setting)
    limit = _LIMIT_SECONDS + _LIMIT_PER_TURN * given.repeats
    for number in range(given.rounds):
        for start in starts:
            cases = [c for c in given.cases if start.ranks > 1 or c in ONE_RANK_CASES]
            if not cases:
                continue
            if time.monotonic() > deadline:
                note(f"--minutes={given.minutes:g} are over before round {number + 1} with"
                     f" {start.ranks} ranks ({start.launch})")  # fmt: skip
                return
            options = [word for case in cases for word in ("--case", case)]
            options.append(f"--repeats={given.repeats}")
            for side in _SIDES if number % 2 == 0 else reversed(_SIDES):
                begin = time.monotonic()
                found, failure = run([*start.command(sides[side]), *options], limit, settings)
                for line in found:
                    line |= {"round": number, "side": side, "launch": start.launch}
                lines += found
                title = f"round {number + 1}, {start.ranks} ranks ({start.launch}), {side}"
                if failure:
                    failures.append(f"{title}: {failure}")
                note(f"{title}: {time.monotonic() - begin:.0f} s")


def make_rows(lines: Sequence[Line]) -> list[Line]:
    """A row for each case and start that both versions have measured."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Line]]] = {}
    for line in lines:
        key = (line["launch"], line["ranks"], line["case"])
        groups.setdefault(key, {}).setdefault(line["round"], {})[line["side"]] = line
    rows = []
    for rounds in groups.values():
        pairs = [pair for _, pair in sorted(rounds.items()) if len(pair) == len(_SIDES)]
        if pairs:
            rows.append(_row(pairs))
    return rows


def _row(pairs: list[dict[str, Line]]) -> Line:
    """Of the pairs of jobs of one case and start, round by round."""
    seconds = {side: [pair[side]["seconds"] for pair in pairs] for side in _SIDES}
    before, after = pairs[0]["before"], pairs[0]["after"]
    is_difference = after["case"] in _DIFFERENCES
    trips = [p[s]["core_round_trip_ns"] for p in pairs for s in _SIDES]
    known = [trip for trip in trips if trip is not None]
    medians = {side: [statistics.median(s) for s in seconds[side]] for side in _SIDES}
    # Jobs are what is drawn: nothing pairs a turn of one with a turn of another.
    before_each, after_each = ([[median] for median in medians[side]] for side in _SIDES)
    found = interval(before_each, after_each, torch.sub if is_difference else torch.div)
    taken = ("case", "num_bytes", "tensors", "ranks", "launch", "calls", "settings", "shares_cores",
             "date", "commit", "machine", "versions")  # fmt: skip
    return {
        **{key: after[key] for key in taken},
        "before": {key: before[key] for key in ("date", "commit", "versions")},
        "rounds": len(pairs),
        "repeats": sum(len(of_round) for of_round in seconds["after"]),
        "median_seconds": {
            side: statistics.median(s for of_round in seconds[side] for s in of_round)
            for side in _SIDES
        },
        "round_medians": medians,
        "kind": "difference" if is_difference else "ratio",
        "compared": None if found is None else found._asdict(),
        "wrong": {side: sum(pair[side]["wrong"] for pair in pairs) for side in _SIDES},
        "core_round_trip_ns": statistics.median(known) if known else None,
    }


def find_version(text: str) -> Environment:
    """Of "MPIRUN,PYTHON", or a virtual environment or its Python: mpirun beside it, or in PATH.

    Raises:
        argparse.ArgumentTypeError: A file is missing.
    """
    if "," in text:
        return find_environment(text)
    path = Path(text)
    python = shutil.which(str(path / "bin" / "python") if path.is_dir() else text)
    if python is None:
        raise argparse.ArgumentTypeError(
            f"must be a Python or a virtual environment with bin/python, got {text!r}"
        )
    # Not resolved: a virtual environment's Python is a link out of it.
    mpirun = shutil.which(str(Path(python).absolute().parent / "mpirun")) or shutil.which("mpirun")
    if mpirun is None:
        raise argparse.ArgumentTypeError(
            f"must have mpirun beside its Python or in PATH, got {text!r} without"
        )
    return Environment(mpirun, str(Path(python).absolute()))


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("ADAREDUCE_"):
        raise argparse.ArgumentTypeError(f"must be ADAREDUCE_NAME=VALUE, got {text!r}")
    return name, value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for side in _SIDES:
        add(f"--{side}", type=find_version, required=True, metavar="VENV|PYTHON|MPIRUN,PYTHON",
            help="where that version is installed")  # fmt: skip
    add("--ranks", nargs="+", type=int, default=[1, 2, 3],
        help="1 is measured with mpirun and without (1 2 3)")  # fmt: skip
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"of {', '.join(CASES)} (all)")  # fmt: skip
    add("--rounds", type=int, default=8, help="jobs of each version and number of ranks (8)")
    add("--repeats", type=int, default=3, help="turns of each call in a job (3)")
    add("--minutes", type=float, default=60, help="no pair of jobs begins after so many (60)")
    add("--setting", type=_setting, nargs="*", default=[], metavar="NAME=VALUE",
        help="of the jobs, beside ADAREDUCE_SHARED_MEMORY=off")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="append a JSON line for each row")
    given = parser.parse_args(arguments)
    check_amounts(parser, given, 1)
    if max(given.ranks) == 1 and not set(given.cases) & set(ONE_RANK_CASES):
        parser.error(
            f"--cases must have one of {', '.join(ONE_RANK_CASES)} for one rank, got"
            f" {', '.join(given.cases)}"
        )
    for option in ("ranks", "cases"):
        setattr(given, option, list(dict.fromkeys(getattr(given, option))))
    return given


if __name__ == "__main__":
    # Whoever ends this process ends the job that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
