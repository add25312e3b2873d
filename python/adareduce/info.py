"""``python -m adareduce.info``: what this installation is made of. Initialises nothing.

Works without torch, mpi4py, an MPI or a GPU, since it is what one runs when something is missing.
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

from adareduce import cuda_library, mpi_library

_PREFIXES = ("ADAREDUCE_", "HOROVOD_", "MPI4PY_", "NCCL_", "CUDA_VISIBLE_DEVICES")
_ELSEWHERE = ("mpi_reason", "cuda", "cuda_reason", "cuda_architectures")  # of BUILD


def collect() -> dict[str, Any]:
    """All findings as plain values, in the order of the table."""
    return {
        "adareduce": _version("adareduce") or "not installed",
        "build": _build(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "torch": _version("torch") or "not installed",
        "mpi4py": _version("mpi4py") or "not installed",
        "modules": {name: _module(name) for name in ("_core", "_mpi", "_cuda")},
        "mpi": _mpi(),
        "cuda": _cuda(),
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
    return {name: text for name, text in BUILD.items() if name not in _ELSEWHERE}


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


def _cuda() -> dict[str, str]:
    try:
        from adareduce._build_info import BUILD
    except ImportError:
        return {}
    reason = BUILD.get("cuda_reason") or "a build that did not look for it"
    if not cuda_library.is_built():
        return {"built for": f"none ({reason})", "enabled": "nothing: the module was not built"}
    facts = {
        "built for": f"{BUILD.get('cuda') or 'unknown'} ({reason})",
        "architectures": BUILD.get("cuda_architectures") or "unknown",
    }
    try:
        found = cuda_library.load().describe()
    except ImportError as error:
        return facts | {"enabled": f"nothing: {error}"}
    driver, nccl = found["cuda_driver"], found["nccl_version"]
    facts["runtime"] = cuda_library.cuda_version(found["cuda_runtime"])
    facts["driver"] = f"serves CUDA {cuda_library.cuda_version(driver)}" if driver else "none"
    for index, gpu in enumerate(found["gpus"]):
        facts[f"gpu {index}"] = (
            f"{gpu['name']}, sm_{gpu['capability']}, {gpu['multiprocessors']} SMs,"
            f" {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['uuid']}"
        )
    facts["nccl"] = (
        f"{cuda_library.nccl_version(nccl)}, {found['nccl_path']}"
        if nccl
        else f"none ({found['nccl_why_not']})"
    )
    wanted = os.environ.get("ADAREDUCE_CUDA_PATH") or "auto"
    paths = (
        "NCCL, peer memory in a node, staging through the host"
        if nccl
        else ("peer memory in a node, staging through the host")
    )
    facts["enabled"] = (
        f"{paths}; ADAREDUCE_CUDA_PATH is {wanted}, hvd.cuda_path() tells which is taken"
        if found["gpus"]
        else f"nothing: {found['problem'] or 'CUDA sees no GPU'}"
    )
    return facts


if __name__ == "__main__":
    main()
