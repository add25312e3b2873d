"""The C++ executables of tests/cpp under sanitizers, which find what results cannot show.

AddressSanitizer and UndefinedBehaviorSanitizer see reads beyond a tensor, memory used after its
end and undefined arithmetic; ThreadSanitizer sees data races between callers, workers and ranks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ["address,undefined", "thread"]
BUILD_LIMIT, RUN_LIMIT = 900, 300  # seconds

# cmake and ninja may have come as wheels into an environment that is not activated.
ENVIRONMENT = os.environ | {
    "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath),
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "second_deadlock_stack=1",
}


def run(command: list[str | Path], limit: float) -> tuple[int, str]:
    """Exit status and output; a command that takes too long is killed and has failed."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            env=ENVIRONMENT,
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


def content() -> str:
    """A digest of everything that the executables are built from."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*"), *(ROOT / "tests/cpp").rglob("*")]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.fixture(scope="module", params=SANITIZERS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of one sanitizer, kept in pytest's cache until a source changes."""
    sanitizer: str = request.param
    name = "sanitizers-" + sanitizer.replace(",", "-")
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir(name)) if cache else tmp_path_factory.mktemp(name)
    stamp, wanted = folder / "content", content()
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    stamp.unlink(missing_ok=True)
    if (folder / "CMakeCache.txt").exists() and f"={ROOT}\n" not in (
        folder / "CMakeCache.txt"
    ).read_text():
        shutil.rmtree(folder)  # of a tree that has been moved
    run_or_fail(
        [
            "cmake",
            *("-S", ROOT, "-B", folder, "-G", "Ninja"),
            "-DADAREDUCE_PYTHON=OFF",
            "-DADAREDUCE_CPP_TESTS=ON",
            f"-DADAREDUCE_SANITIZE={sanitizer}",
        ],
        BUILD_LIMIT,
    )
    run_or_fail(["cmake", "--build", folder], BUILD_LIMIT)
    stamp.write_text(wanted)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("executable", ["kernels_check", "engine_stress", "device_stress"])
def test_sanitizers_find_nothing(build: Path, executable: str) -> None:
    status, output = run([build / executable], RUN_LIMIT)
    if "unexpected memory mapping" in output:
        # Older ThreadSanitizers cannot live with addresses as random as newer kernels make them.
        status, output = run(["setarch", "-R", build / executable], RUN_LIMIT)
    if status != 0 or "all is well" not in output:
        pytest.fail(f"{executable} ended with {status}:\n{output}", pytrace=False)
