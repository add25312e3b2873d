"""Breaks the library on purpose and demands that the tests notice.

Every *.patch in this folder is applied to a copy of the sources, whose _core is built anew; then
the tests that its line "tests:" names must fail, by failing assertions and not by a broken build.
Two copies take turns with the patches, since a patch needs one core: to compile a file, to test.
First the same tests must pass on the unpatched copy. Tests in tests/mpi run on three ranks, with
the _mpi that is installed.
"""

from __future__ import annotations

import argparse
import importlib.resources
import os
import queue
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
PARTS = ("CMakeLists.txt", "cmake", "csrc", "python", "tests", "pyproject.toml")
TESTS_FAILED = 1  # pytest's exit status
PYTEST_DID_NOT_RUN = (2, 3, 4, 5)
NUM_RANKS = "3"
LIMIT_SECONDS = 300
NUM_COPIES = 2


class Copy:
    """A copy of the sources with a build and an environment of its own."""

    def __init__(self, scratch: Path) -> None:
        self.tree = scratch / "tree"
        self.build = scratch / "build"
        self.environment = scratch / "environment"
        self.tree.mkdir(parents=True)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, self.tree / part)
        venv.create(self.environment, with_pip=False)
        self.packages = next(self.environment.glob("lib/python*/site-packages"))
        # A plain path: installed packages are found, an editable adareduce among them is not, since
        # the import hook of its own .pth file does not run.
        (self.packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pybind11 = run([sys.executable, "-m", "pybind11", "--cmakedir"], capture=True).strip()
        run(
            [
                "cmake", "-S", self.tree, "-B", self.build, "-G", "Ninja",
                "-DADAREDUCE_MPI=OFF", "-DADAREDUCE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug",
                "-DCMAKE_CXX_FLAGS=-O1 -g0",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}",
                "-DSKBUILD_PROJECT_VERSION=0", f"-DCMAKE_INSTALL_PREFIX={self.packages}",
            ],
            capture=True,
        )  # fmt: skip

    def install(self) -> None:
        run(["cmake", "--build", self.build], capture=True)
        run(["cmake", "--install", self.build], capture=True)
        shutil.copytree(
            self.tree / "python" / "adareduce", self.packages / "adareduce", dirs_exist_ok=True
        )
        for installed in importlib.resources.files("adareduce").iterdir():
            name = installed.name
            if name == "_build_info.py" or (name.startswith("_mpi.") and name.endswith(".so")):
                shutil.copy2(str(installed), self.packages / "adareduce")

    def apply(self, patch: Path, *options: str) -> None:
        run(["git", "apply", "--whitespace=nowarn", *options, patch], cwd=self.tree)

    def test(self, tests: list[str], limit: float) -> tuple[int, str]:
        """Pytest's exit status and output; a hang counts as a failed test."""
        on_ranks = [test for test in tests if test.startswith("tests/mpi/")]
        status, output = self._pytest([], [test for test in tests if test not in on_ranks], limit)
        if status == 0 and on_ranks:
            status, output = self._pytest(["mpirun", "-n", NUM_RANKS], on_ranks, limit)
        return status, output

    def _pytest(self, launcher: list[str], tests: list[str], limit: float) -> tuple[int, str]:
        if not tests:
            return 0, ""
        python = self.environment / "bin" / "python"
        command = [*launcher, python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            result = subprocess.run(
                command, cwd=self.tree, env=environment, timeout=limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as expired:
            return TESTS_FAILED, f"{expired.output!r}\nhangs"
        return result.returncode, result.stdout


def run(command: list[object], *, capture: bool = False, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        print(result.stdout or "")
        raise SystemExit(f"mutants: {' '.join(str(part) for part in command)} failed")
    return result.stdout or ""


def tests_of(patch: Path) -> list[str]:
    for line in patch.read_text().splitlines():
        if line.startswith("tests:"):
            return line.removeprefix("tests:").split()
    raise SystemExit(f"mutants: {patch.name} has no line 'tests:'")


def part(text: str) -> tuple[int, int]:
    index, count = (int(number) for number in text.split("/"))
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text!r}")
    return index, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="patches without .patch")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N",
                        help="part I = 0 ... N - 1 of N (0/1: all)")  # fmt: skip
    given = parser.parse_args()
    only, (index, count) = given.only, given.part
    patches = [p for p in sorted(FOLDER.glob("*.patch")) if only is None or p.stem in only]
    patches = patches[index::count]
    if not patches:
        raise SystemExit(f"mutants: no patch of {only}")

    copies: queue.Queue[Copy] = queue.Queue()

    def survives(patch: Path) -> bool:
        copy = copies.get()
        try:
            begin = time.monotonic()
            copy.apply(patch)
            copy.install()
            status, output = copy.test(tests_of(patch), LIMIT_SECONDS)
            copy.apply(patch, "--reverse")
        finally:
            copies.put(copy)
        # A test run that is ended by a signal has noticed as well.
        is_caught = status != 0 and status not in PYTEST_DID_NOT_RUN
        verdict = "caught" if is_caught else "SURVIVED"
        print(f"{verdict:9} {patch.stem}  ({time.monotonic() - begin:.0f} s)", flush=True)
        if not is_caught:
            print(output)
        return not is_caught

    with tempfile.TemporaryDirectory(prefix="adareduce-mutants-") as scratch:
        for number in range(min(NUM_COPIES, len(patches))):
            copy = Copy(Path(scratch) / str(number))
            copy.install()
            copies.put(copy)
        baseline = sorted({test for patch in patches for test in tests_of(patch)})
        status, output = copy.test(baseline, 4 * LIMIT_SECONDS)
        if status != 0:
            print(output)
            raise SystemExit("mutants: the tests fail without any patch")
        with ThreadPoolExecutor(NUM_COPIES) as pool:
            is_survivor = list(pool.map(survives, patches))
    survivors = [patch.stem for patch, survived in zip(patches, is_survivor, strict=True)
                 if survived]  # fmt: skip
    if survivors:
        raise SystemExit(f"mutants: no test notices {', '.join(survivors)}")
    print(f"all {len(patches)} mutants were caught")


if __name__ == "__main__":
    main()
