"""Registers, stack and spills of every kernel, as ptxas counts them. Needs nvcc, and no GPU.

    python benchmarks/kernel_resources.py                      # compiles csrc/kernels/cuda/*.cu
    python benchmarks/kernel_resources.py --architectures 90
    python benchmarks/kernel_resources.py --log build.log      # of -DADAREDUCE_CUDA_RESOURCES=ON

Exit status 1: a kernel that is bound by memory bandwidth, which is every kernel but those of
_SMALL, spills registers or keeps an array on its stack, which is memory too; or there is no kernel.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100", "120")
# Kernels over segments or groups, not over elements: a spill there costs nothing that shows.
_SMALL = (
    r"finalise",
    r"levels_kernel",
    r"group_stats",
    r"coefficients",
    r"leaf_squares",
    r"gain",
    r"schedule",
)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FUNCTION = re.compile(r"Function properties for (\w+)")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on an architecture. Bytes are per thread, shared ones per block."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        """Whether registers go to memory and back, or an array lies there from the start."""
        return self.stack + self.spill_stores + self.spill_loads > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    given = parse_arguments(arguments)
    if given.log:
        text = Path(given.log).read_text(errors="replace")
    else:
        text = compile_all(given.nvcc, given.files, given.architectures)
    usages = parse(text)
    if not usages:
        print("kernel_resources: no kernel was compiled")
        return 1
    names = readable(sorted({usage.kernel for usage in usages}))
    if given.json:
        with Path(given.json).open("a", encoding="utf-8") as file:
            for usage in usages:
                file.write(json.dumps(asdict(usage) | {"kernel": names[usage.kernel]}) + "\n")
    print(table(usages, names))
    guilty = spilling(usages, names, [*_SMALL, *given.may_spill])
    for usage in guilty:
        print(f"kernel_resources: {names[usage.kernel]} on sm_{usage.architecture}: {usage.stack}"
              f" bytes of stack, {usage.spill_stores} + {usage.spill_loads} spilled")  # fmt: skip
    count = len({usage.kernel for usage in usages})
    print(f"kernel_resources: {count} kernels, {'FAILED' if guilty else 'no spills that count'}")
    return 1 if guilty else 0


def parse(text: str) -> list[Usage]:
    """All entry functions in an output of ptxas -v; of equal ones the last counts.

    Device functions that were not inlined have properties of their own, which are not a kernel's.
    """
    found: dict[tuple[str, str], Usage] = {}
    kernel = architecture = function = ""
    memory = (0, 0, 0)
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            kernel, architecture = match.groups()
            memory = (0, 0, 0)
        elif match := _FUNCTION.search(line):
            function = match[1]
        elif (match := _MEMORY.search(line)) and function == kernel:
            memory = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := _USED.search(line)) and kernel:
            shared = _SHARED.search(line)
            size = int(shared[1]) if shared else 0
            usage = Usage(kernel, architecture, int(match[1]), *memory, size)
            found[kernel, architecture] = usage
            kernel = ""
    return list(found.values())


def spilling(
    usages: Iterable[Usage], names: dict[str, str], may_spill: Sequence[str]
) -> list[Usage]:
    """Those that spill and must not."""
    small = re.compile("|".join(may_spill)) if may_spill else None
    return [
        usage
        for usage in usages
        if usage.spills and not (small and small.search(names[usage.kernel].split("<")[0]))
    ]


def table(usages: Sequence[Usage], names: dict[str, str]) -> str:
    """A line for each kernel, a column for each architecture: registers, and what is amiss."""
    architectures = sorted({usage.architecture for usage in usages}, key=number)
    cells = {(usage.kernel, usage.architecture): cell(usage) for usage in usages}
    kernels = sorted({usage.kernel for usage in usages}, key=lambda kernel: names[kernel])
    width = max(len(names[kernel]) for kernel in kernels)
    lines = [f"{'registers of':<{width}}" + "".join(f" {'sm_' + a:>16}" for a in architectures)]
    for kernel in kernels:
        row = "".join(f" {cells.get((kernel, a), ''):>16}" for a in architectures)
        lines.append(f"{names[kernel]:<{width}}{row}")
    return "\n".join(lines)


def cell(usage: Usage) -> str:
    """Registers; bytes of a stack (arrays that are not in registers); bytes spilled."""
    text = str(usage.registers)
    if usage.spill_stores + usage.spill_loads > 0:
        return f"{text} spill {usage.spill_stores}+{usage.spill_loads}"
    return f"{text} stack {usage.stack}" if usage.stack else text


def readable(kernels: Sequence[str]) -> dict[str, str]:
    """Names as in the source, without namespaces and arguments; mangled ones without c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return {kernel: kernel for kernel in kernels}
    done = subprocess.run(
        [tool], input="\n".join(kernels), capture_output=True, text=True, check=True, timeout=60
    )
    return dict(zip(kernels, map(short, done.stdout.splitlines()), strict=True))


def short(name: str) -> str:
    """Of a demangled function: its name and template arguments."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|adareduce::|cuda::", "", name)
    depth = 0
    for index, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:index]
            break
    return name.removeprefix("void ")


def number(architecture: str) -> int:
    """The digits of "90a"."""
    return int(re.sub(r"\D", "", architecture))


def compile_all(nvcc: str, files: Sequence[Path], architectures: Sequence[str]) -> str:
    """What ptxas says of all files. Raises SystemExit where one does not compile."""
    if shutil.which(nvcc) is None:
        raise SystemExit(f"kernel_resources: --nvcc must be a compiler, got {nvcc!r}")
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            command = [
                nvcc,
                "-std=c++20",
                "-O3",
                "-fmad=false",
                "-Xptxas=-v",
                "-I",
                str(ROOT / "csrc"),
            ]
            for name in architectures:
                command.append(f"-gencode=arch=compute_{name},code=sm_{name}")
            command += ["-c", str(file), "-o", f"{folder}/object"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"kernel_resources: {file.name}:\n{done.stdout}{done.stderr}")
            texts += [done.stdout, done.stderr]
    return "\n".join(texts)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, default=sorted((ROOT / "csrc/kernels/cuda").glob("*.cu")))
    add("--log", metavar="FILE", help="output of a build, instead of compiling")
    add("--architectures", nargs="+", default=ARCHITECTURES, help=" ".join(ARCHITECTURES))
    add("--nvcc", default="nvcc")
    add("--may-spill", nargs="+", default=[], metavar="PATTERN", help="more names of small kernels")
    add("--json", metavar="FILE", help="append one JSON line per kernel and architecture")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
