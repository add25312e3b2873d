"""Where a result comes from: commit, machine and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import adareduce
import adareduce.torch as hvd


def describe() -> dict[str, Any]:
    """All that a JSON line says about its origin. Not collective."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that takes part. After hvd.init()."""
    return {
        "adareduce": _version("adareduce"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mpi": mpi_library(),
        "mpi4py": _version("mpi4py"),
    }


def versions_line() -> str:
    """The versions in one line."""
    found = versions()
    return (
        f"adareduce {found['adareduce']}, torch {found['torch']}, Python {found['python']},"
        f" {found['mpi']}, mpi4py {found['mpi4py']}"
    )


def mpi_library() -> str:
    """Name and version of the MPI in use, in one line; "no MPI" without."""
    if not hvd.mpi_enabled():
        return "no MPI"
    from mpi4py import MPI

    words = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(",")[0].split()
    return " ".join(words).replace("MPICH Version:", "MPICH").replace("Open MPI v", "Open MPI ")


def cpu_model() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Of the checkout that runs, with "-dirty" if files were changed; None if it is none.

    An installed copy does not know: ADAREDUCE_BENCH_COMMIT says it.
    """
    told = os.environ.get("ADAREDUCE_BENCH_COMMIT")
    if told:
        return told
    root = Path(adareduce.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
