"""Starts jobs of several ranks and looks after them: outputs by rank, time limit, nothing left.

A job's processes are found by an environment variable that only they have, so a launcher that puts
ranks into process groups or sessions of their own hides nothing, and nobody else's process is hit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adareduce import mpi_library

MARK = "ADAREDUCE_TEST_JOB"
_POLL_SECONDS = 0.02
# Marks of an mpirun around this process, which would confuse the one that is started.
_LAUNCHER_VARIABLES = (
    "PMI_",
    "PMIX_",
    "OMPI_COMM_",
    "PRTE_LAUNCHED",
    "MPI_LOCAL",
    "HYDI_",
    "HYDRA_",
)
# The rank's shell leaves its process id and becomes the program, so both have one id.
_RANK_SHELL = """
rank=${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}
echo $$ > "$ADAREDUCE_TEST_FOLDER/new-pid.$rank"
mv "$ADAREDUCE_TEST_FOLDER/new-pid.$rank" "$ADAREDUCE_TEST_FOLDER/pid.$rank"
exec "$@" > "$ADAREDUCE_TEST_FOLDER/out.$rank" 2> "$ADAREDUCE_TEST_FOLDER/err.$rank"
"""


def flavour() -> str | None:
    """The MPI that adareduce was built for: "MPICH" (or what behaves alike), "Open MPI", None."""
    library = mpi_library.expected()
    if library is None:
        return None
    return "Open MPI" if library.vendor == "Open MPI" else "MPICH"


def find_mpirun() -> str | None:
    """The mpirun that belongs to the libmpi in use, else that of PATH."""
    library = mpi_library.expected()
    if library is not None and library.path is not None:
        for prefix in library.path.parents[:3]:
            if (prefix / "bin" / "mpirun").exists():
                return str(prefix / "bin" / "mpirun")
    return shutil.which("mpirun")


@dataclass(frozen=True)
class Result:
    """How a job ended.

    Attributes:
        returncode: mpirun's; negative where a signal ended it.
        timed_out: It was still running at its limit and was killed.
        seconds: From start to end.
        out: What each rank wrote to stdout.
        err: What each rank wrote to stderr.
        launcher: What mpirun itself wrote.
        left_behind: Processes of the job that outlived mpirun, and were killed.
    """

    returncode: int
    timed_out: bool
    seconds: float
    out: list[str]
    err: list[str]
    launcher: str
    left_behind: list[str]

    def __str__(self) -> str:
        """Everything, for the message of an assertion."""
        how = "killed at its time limit" if self.timed_out else f"ended with {self.returncode}"
        parts = [f"the job was {how} after {self.seconds:.1f} s"]
        if self.left_behind:
            parts.append("left behind: " + ", ".join(self.left_behind))
        texts = {"mpirun": self.launcher}
        for rank, (out, err) in enumerate(zip(self.out, self.err, strict=True)):
            texts |= {f"rank {rank} stdout": out, f"rank {rank} stderr": err}
        parts += [
            f"--- {title} ---\n{text.rstrip()}" for title, text in texts.items() if text.strip()
        ]
        return "\n".join(parts)


class Job:
    """A running job. Use as a context manager: at the end nothing of it is left.

    Args:
        num_ranks: Number of ranks; 0 runs the program without a launcher.
        command: Program and arguments.
        variables: Added to the environment.
        survive: Flags that make the launcher spare the ranks that outlive a dead one.
    """

    def __init__(
        self,
        num_ranks: int,
        command: Sequence[str],
        *,
        variables: Mapping[str, str] | None = None,
        survive: bool = False,
    ) -> None:
        self.num_ranks = max(1, num_ranks)
        self.mark = uuid.uuid4().hex
        # Short, because Open MPI puts sockets there whose names may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ada"))
        self._log = (self.folder / "mpirun").open("wb")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_LAUNCHER_VARIABLES)
        }
        environment |= {
            MARK: self.mark,
            "ADAREDUCE_TEST_FOLDER": str(self.folder),
            "ADAREDUCE_WARN_AFTER_SECONDS": "10",
            "ADAREDUCE_FAIL_AFTER_SECONDS": "20",
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_osc": "^ucx",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.folder),
        }
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*launcher_command(num_ranks, survive), "sh", "-c", _RANK_SHELL, "sh", *command],
            env=environment | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self, limit: float) -> Result:
        """Waits for mpirun; kills what runs after `limit` seconds."""
        timed_out = False
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        seconds = time.monotonic() - self._started
        # A process that mpirun killed needs a moment to be gone.
        self.wait_until(lambda: timed_out or not self.processes(), 2.0)
        left_behind = [] if timed_out else list(self.processes().values())
        self.kill()
        return Result(
            returncode=self._process.returncode,
            timed_out=timed_out,
            seconds=seconds,
            out=[self.output("out", rank) for rank in range(self.num_ranks)],
            err=[self.output("err", rank) for rank in range(self.num_ranks)],
            launcher=(self.folder / "mpirun").read_text(errors="replace"),
            left_behind=left_behind,
        )

    def pid(self, rank: int) -> int:
        """Process id of a rank; waits until it has started."""
        file = self.folder / f"pid.{rank}"
        if not self.wait_until(file.exists, 60.0):
            raise TimeoutError(f"rank {rank} did not start:\n{self.wait(0)}")
        return int(file.read_text())

    def send_signal(self, rank: int, signum: signal.Signals) -> None:
        """Sends a signal to one rank."""
        os.kill(self.pid(rank), signum)

    def wait_for_file(self, name: str, limit: float = 60.0) -> None:
        """Waits until a rank has made `name` in ADAREDUCE_TEST_FOLDER."""
        if not self.wait_until((self.folder / name).exists, limit):
            raise TimeoutError(f"no rank made the file {name}:\n{self.wait(0)}")

    def wait_until(self, condition: Callable[[], bool], limit: float) -> bool:
        """Looks at `condition` until it is true, `limit` has passed, or mpirun has long ended."""
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def output(self, stream: str, rank: int) -> str:
        """What a rank has written so far; stream is "out" or "err"."""
        file = self.folder / f"{stream}.{rank}"
        return file.read_text(errors="replace") if file.exists() else ""

    def processes(self) -> dict[int, str]:
        """Living processes of this job, mpirun's helpers included: id and command."""
        return dict(_marked(f"{MARK}={self.mark}".encode()))

    def kill(self) -> None:
        """Ends every process of this job."""
        while self.processes():
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        self._process.wait()


def launcher_command(num_ranks: int, survive: bool = False) -> list[str]:
    """Mpirun with what this MPI needs to run as root on fewer cores than ranks."""
    if num_ranks == 0:
        return []
    mpirun = find_mpirun()
    assert mpirun is not None, "there is no mpirun"
    command = [mpirun, "-n", str(num_ranks)]
    if flavour() == "Open MPI":
        command += ["--oversubscribe", "--bind-to", "none"]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command += ["--with-ft", "ulfm"] if survive else []
    elif survive:
        # Hydra kills the other ranks of a dead one's proxy even without its cleanup: a proxy each.
        hosts = ",".join(f"rank{rank}" for rank in range(num_ranks))
        command += ["-launcher", "fork", "-hosts", hosts, "-ppn", "1", "-disable-auto-cleanup"]
    return command


def run(
    num_ranks: int,
    command: Sequence[str],
    *,
    limit: float,
    variables: Mapping[str, str] | None = None,
    survive: bool = False,
) -> Result:
    """Starts a job and waits for its end."""
    with Job(num_ranks, command, variables=variables, survive=survive) as job:
        return job.wait(limit)


def script(text: str) -> list[str]:
    """A command that runs Python code, with `hvd`, `torch`, `os`, `sys` and two helpers at hand.

    mark(name) makes a file that Job.wait_for_file sees; say(text) prints a line.
    """
    return [sys.executable, "-c", _PRELUDE + text]


_PRELUDE = """
import os, signal, sys, time
import torch
import adareduce.torch as hvd
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def mark(name):
    open(os.path.join(os.environ["ADAREDUCE_TEST_FOLDER"], name), "w").close()
def say(*words):
    print(*words, flush=True)
"""


def _marked(entry: bytes) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if entry not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        command = b" ".join(words[:4]).decode(errors="replace")
        yield int(folder.name), f"{folder.name} ({command:.120})"
