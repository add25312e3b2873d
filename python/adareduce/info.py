"""``python -m adareduce.info``: what this installation is made of. Initialises nothing.

Works without torch, mpi4py or an MPI, since it is what one runs when something is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

from adareduce import mpi_library

_PREFIXES = ("ADAREDUCE_", "HOROVOD_", "MPI4PY_")


def collect() -> dict[str, Any]:
    """All findings as plain values, in the order of the table."""
    return {
        "adareduce": _version("adareduce") or "not installed",
        "build": _build(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "torch": _version("torch") or "not installed",
        "mpi4py": _version("mpi4py") or "not installed",
        "modules": {name: _module(name) for name in ("_core", "_mpi")},
        "mpi": _mpi(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, or JSON with --json."""
    parser = argparse.ArgumentParser(prog="python -m adareduce.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(found, indent=2))
        return
    for title, value in found.items():
        if not isinstance(value, dict):
            print(f"{title:<16}{value}")
            continue
        print(f"{title:<16}{'' if value else 'none'}".rstrip())
        for name, text in value.items():
            print(f"  {name:<13} {text}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build() -> dict[str, str]:
    try:
        from adareduce._build_info import BUILD
    except ImportError:
        return {}
    return {name: text for name, text in BUILD.items() if name != "mpi_reason"}


def _module(name: str) -> str:
    # _mpi is looked for only: its import maps libmpi, and which one is init()'s business.
    if importlib.util.find_spec(f"adareduce.{name}") is None:
        return "not built"
    if name == "_mpi":
        return "built"
    try:
        importlib.import_module(f"adareduce.{name}")
    except ImportError as error:
        return f"does not load: {error}"
    return "loads"


def _mpi() -> dict[str, str]:
    try:
        from adareduce._build_info import BUILD, MPI
    except ImportError:
        return {}
    library = mpi_library.expected()
    if MPI is None or library is None:
        return {"built for": f"none ({BUILD['mpi_reason']})" if BUILD["mpi_reason"] else "none"}
    found = str(library.path or f"nowhere ({', '.join(map(str, library.searched))})")
    launched = mpi_library.launcher()
    return {
        "built for": f"{library.vendor} {library.version}, {library.soname}",
        "because": BUILD["mpi_reason"],
        "mpicc": MPI["mpicc"] or "was there for the build only",
        "found at": found,
        "loaded now": ", ".join(map(str, mpi_library.loaded())) or "none",
        "started by": f"{launched.family}'s mpirun ({launched.sign})" if launched else "no mpirun",
    }


if __name__ == "__main__":
    main()
