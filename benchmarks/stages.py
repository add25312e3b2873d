"""Runs stages one after the other: each with a time limit and a log, whatever the others did.

Standard library only: this is there before anything is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MARK = "ADAREDUCE_STAGE"
_RESERVE_SECONDS = 8.0  # for killing, and for the table
_LEAST_SECONDS = 3.0
_LONGEST_NOTE = 100


@dataclass(frozen=True)
class Stage:
    """One thing to do.

    Attributes:
        name: For --stages, the table and the log's name.
        command: Program and arguments.
        limit: Seconds.
        variables: Added to the environment.
        needs: Stages that must not have failed, if they ran.
        note: A word that marks the lines of the output from which the table quotes the last.
    """

    name: str
    command: Sequence[str]
    limit: float
    variables: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a stage went: passed, failed, timed out, or skipped."""

    stage: str
    status: str
    seconds: float
    note: str
    command: str
    log: str


class Runner:
    """Runs stages until the time is used up.

    Args:
        out: Folder of stages.jsonl and of the logs.
        seconds: For all stages together.
        origin: What each line of stages.jsonl says of the machine.
        one_log: All output goes into one file, for a place that gives few files back.
    """

    def __init__(
        self, out: Path, seconds: float, origin: Mapping[str, Any], *, one_log: bool = False
    ) -> None:
        self.out = out
        self.origin = origin
        self.outcomes: list[Outcome] = []
        self._one_log = one_log
        self._end = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)

    def run(self, stage: Stage) -> Outcome:
        """Runs a stage, unless its needs or the time forbid it. Blocks; kills what it leaves."""
        failed = [
            outcome.stage
            for outcome in self.outcomes
            if outcome.stage in stage.needs and outcome.status in ("failed", "timed out")
        ]
        left = self._end - time.monotonic() - _RESERVE_SECONDS
        if failed:
            return self._record(stage, "skipped", 0.0, f"needs {', '.join(failed)}")
        if left < _LEAST_SECONDS:
            return self._record(stage, "skipped", 0.0, "no time left")
        print(f"=== {stage.name} (at most {min(stage.limit, left):.0f} s)", flush=True)
        status, seconds, output = self._execute(stage, min(stage.limit, left))
        return self._record(stage, status, seconds, quoted(output, stage.note, status))

    def _execute(self, stage: Stage, limit: float) -> tuple[str, float, str]:
        mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = mark.partition("=")
        log = self._log(stage)
        begin = time.monotonic()
        with log.open("ab") as file:
            file.write(f"=== {stage.name}: {shlex.join(stage.command)}\n".encode())
            file.flush()
            position = file.tell()
            try:
                process = subprocess.Popen(
                    list(stage.command),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **stage.variables, name: value},
                    start_new_session=True,
                )
            except OSError as error:
                file.write(f"{error}\n".encode())
                status = "failed"
            else:
                try:
                    status = "failed" if process.wait(limit) else "passed"
                except subprocess.TimeoutExpired:
                    status = "timed out"
                kill_marked(mark.encode())
                process.wait()
        seconds = time.monotonic() - begin
        with log.open("rb") as file:
            file.seek(position)
            return status, seconds, file.read().decode(errors="replace")

    def _log(self, stage: Stage) -> Path:
        if self._one_log:
            return self.out / "stages.log"
        folder = self.out / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{len(self.outcomes):02d}-{stage.name}.log"

    def _record(self, stage: Stage, status: str, seconds: float, note: str) -> Outcome:
        log = self._log(stage).relative_to(self.out)
        outcome = Outcome(
            stage.name, status, round(seconds, 1), note, shlex.join(stage.command), str(log)
        )
        self.outcomes.append(outcome)
        with (self.out / "stages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**dataclasses.asdict(outcome), **self.origin}) + "\n")
        print(line_of(outcome), flush=True)
        return outcome

    def table(self) -> str:
        """One line per stage."""
        return "\n".join(map(line_of, self.outcomes))

    def succeeded(self) -> bool:
        """Whether something passed and nothing failed."""
        statuses = {outcome.status for outcome in self.outcomes}
        return "passed" in statuses and not statuses & {"failed", "timed out"}


def line_of(outcome: Outcome) -> str:
    """A stage in one line."""
    return f"{outcome.stage:<22} {outcome.status:<9} {outcome.seconds:>6.1f} s  {outcome.note}"


def quoted(output: str, word: str, status: str) -> str:
    """The last line with `word`; of a failure the last line at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marked = [line for line in lines if word and word in line]
    if status != "passed":
        marked = marked or lines
    return marked[-1][-_LONGEST_NOTE:] if marked else ""


def kill_marked(entry: bytes) -> None:
    """Ends every process with `entry` in its environment, also in another session."""
    while found := list(_marked(entry)):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # until the kernel has taken them away


def _marked(entry: bytes) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                # A zombie has no environment any more.
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)
