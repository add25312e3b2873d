"""Builds C++ for tests with CMake, into pytest's cache: once, until a source changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_LIMIT = 900  # seconds

# cmake and ninja may have come as wheels into an environment that is not activated.
PATHS = {
    "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath),
}


def run(
    command: list[str | Path], limit: float, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and output; a command that takes too long is killed and has failed."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            env={**os.environ, **PATHS, **(environment or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        text = output if isinstance(output, str) else output.decode(errors="replace")
        return -1, f"{text}\nnot finished after {limit} s"
    return done.returncode, done.stdout


def run_or_fail(command: list[str | Path], limit: float) -> None:
    status, output = run(command, limit)
    if status != 0:
        pytest.fail(f"{' '.join(map(str, command))} ended with {status}:\n{output}", pytrace=False)


def digest(sources: Iterable[Path]) -> str:
    """Of the contents of files and folders."""
    result = hashlib.sha256()
    files = [f for s in sources for f in ([s] if s.is_file() else s.rglob("*")) if f.is_file()]
    for file in sorted(files):
        result.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return result.hexdigest()


def build(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    source: Path,
    sources: Iterable[Path],
    *options: str,
) -> Path:
    """The build folder `name` of the CMake project `source`, made from `sources`.

    It lies in pytest's cache and is built again when a source or an option has changed.
    """
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir(name)) if cache else tmp_path_factory.mktemp(name)
    stamp, wanted = folder / "content", f"{digest(sources)} {options}"
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    stamp.unlink(missing_ok=True)
    settings = folder / "CMakeCache.txt"
    if settings.exists() and f"={source}\n" not in settings.read_text():
        shutil.rmtree(folder)  # of a tree that has been moved
    run_or_fail(["cmake", "-S", source, "-B", folder, "-G", "Ninja", *options], BUILD_LIMIT)
    run_or_fail(["cmake", "--build", folder], BUILD_LIMIT)
    stamp.write_text(wanted)
    return folder
