#!/usr/bin/env python3
"""Builds, tests, sanitises and benchmarks adareduce on a machine with GPUs, in one command.

    python benchmarks/gpu.py --out results               # one GPU, shared by 1, 2, 4 and 8 ranks
    python benchmarks/gpu.py --ranks 8 --mpirun          # a GPU for each of 8 ranks
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --stages build kernels

Needs Python with torch (CUDA), pybind11, scikit-build-core, pytest, mpi4py and an MPI, nvcc, cmake,
ninja; no network. Stages run in the order of their value until --minutes are used up; one that
fails stops nobody. OUT gets stages.jsonl, gpu_*.jsonl and the logs; a short table comes last.
Exit status 1: a stage failed or timed out. adareduce (and --wheels) are installed into the Python
that runs this.
Status: written without a GPU; of the stages only build, info and resources have been run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]
from stages import Runner, Stage  # noqa: E402
from ways import EACH_RANK, WAYS  # noqa: E402

KERNELS, COLLECTIVES = "gpu_kernels.jsonl", "gpu_collectives.jsonl"  # as in benchmarks/results
_BUILD = ("build",)
_SHARES_FROM = (2, 30, 3)  # NCCL that takes several ranks of one GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse(arguments)
    origin = describe(given.commit)
    stages = chosen(all_stages(given, origin), given.stages)
    if given.list:
        for stage in stages:
            print(f"{stage.name:<22} {stage.limit:>4.0f} s  {' '.join(stage.command)}")
        return 0
    if not stages:
        print(f"gpu.py: --stages must name stages of --list, got {given.stages}")
        return 2
    print(f"# {json.dumps(origin)}")
    os.chdir(ROOT)
    os.environ.update(environment())
    if origin["commit"]:
        os.environ["ADAREDUCE_BENCH_COMMIT"] = origin["commit"]
    runner = Runner(given.out, 60 * given.minutes, origin, one_log=given.one_log)
    for stage in stages:
        runner.run(stage)
    print(f"\n{summary(given.out)}\n{runner.table()}")
    return 0 if runner.succeeded() else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="for everything (9)")
    add("--out", type=Path, default=ROOT / "build" / "gpu-results", help="folder of logs, results")
    add("--stages", nargs="+", metavar="NAME", help="only these; a name's beginning is enough")
    add("--ranks", type=int, nargs="+", help="numbers of ranks (1 2 4 8; --mpirun: all GPUs)")
    add("--mpirun", action="store_true", help="a GPU for each rank, instead of ranks that share")
    add("--wheels", type=Path, metavar="DIR", help="wheels to install first, such as mpich")
    add("--architecture", help="to build for (the GPU's, e.g. 90)")
    add("--commit", help="of the sources, where git cannot tell")
    add("--one-log", action="store_true", help="all logs in one file")
    add("--list", action="store_true", help="print the stages and end")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be above 0, got {given.minutes}")
    if given.ranks and min(given.ranks) < 1:
        parser.error(f"--ranks must be at least 1, got {min(given.ranks)}")
    if given.wheels and not sorted(given.wheels.glob("*.whl")):
        parser.error(f"--wheels must be a folder with *.whl, got {given.wheels}")
    given.out = given.out.absolute()
    return given


def all_stages(given: argparse.Namespace, origin: dict[str, Any]) -> list[Stage]:
    """Everything that this command line could do, the most valuable first."""
    gpus = origin["machine"]["gpus"]
    architecture = given.architecture or (gpus[0]["capability"].replace(".", "") if gpus else "90")
    stages = preparation(given, architecture)
    if given.mpirun:
        return stages + stages_of_many(given, given.ranks or [max(1, len(gpus))])
    return stages + stages_of_one(given, given.ranks or [1, 2, 4, 8], nccl_way(origin))


def preparation(given: argparse.Namespace, architecture: str) -> list[Stage]:
    """What the others need."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    pip += ["--disable-pip-version-check"]
    stages: list[Stage] = []
    needs_wheels: tuple[str, ...] = ()
    if given.wheels:
        files = [str(file) for file in sorted(given.wheels.absolute().glob("*.whl"))]
        stages.append(Stage("wheels", [*pip, *files], 60))
        needs_wheels = ("wheels",)
    build = [*pip, "-v", "--no-build-isolation", "-C", f"build-dir={ROOT}/build/gpu"]
    build += ["-C", "cmake.define.ADAREDUCE_CUDA_RESOURCES=ON", "--force-reinstall", str(ROOT)]
    variables = {
        "ADAREDUCE_CUDA": "on",
        "CUDAARCHS": architecture,
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
    }
    info = [sys.executable, "-m", "adareduce.info"]
    logs = f"{given.out}/logs/*-build.log {given.out}/stages.log"
    # A build that goes on from an earlier one compiles, and reports, only what has changed.
    kept = ROOT / "build" / "gpu-ptxas.log"
    resources = (
        f"cat $(ls {logs} 2>/dev/null | head -n 1) >> {kept};"
        f" exec {sys.executable} {ROOT}/benchmarks/kernel_resources.py --log {kept}"
    )
    return [
        *stages,
        Stage("build", build, 300, variables, needs=needs_wheels, note="Successfully installed"),
        Stage("info", info, 60, needs=_BUILD, note="nccl"),
        Stage("resources", ["sh", "-c", resources], 20, needs=_BUILD, note="kernel_resources:"),
    ]


def stages_of_one(given: argparse.Namespace, ranks: list[int], nccl: str) -> list[Stage]:
    """One GPU, shared."""
    several = [number for number in ranks if number > 1]
    sanitize = str(ROOT / "tests" / "gpu" / "sanitize.py")
    json_file = str(given.out / KERNELS)
    kernels = [sys.executable, str(ROOT / "benchmarks" / "gpu_kernels.py"), "--json", json_file]
    stages = [
        tests("kernels", 90, "test_gpu_kernels.py", "test_reductions.py"),
        tests("peer_ranks", 90, "test_peer_ranks.py"),
        *(suite("auto", number, 90) for number in ranks if number == 1),
        *(suite("peer", number, 120) for number in several[:1]),
        Stage("bench_kernels", kernels, 90, needs=_BUILD, note="worst"),
        *(stage for number in several[:1] for stage in benches(given, number, "peer")),
        sanitizer("memcheck", 60, sanitize, "--no-peers"),
        sanitizer("racecheck", 60, sanitize, "--no-peers"),
    ]
    for number in several[1:2]:
        stages += [suite("peer", number, 120), *benches(given, number, "peer")]
    for number in several[:1]:
        stages += [suite(nccl, number, 120), *benches(given, number, nccl)]
    stages.append(sanitizer("memcheck", 60, sanitize, name="memcheck_peers"))
    for number in several[1:]:
        stages.append(suite(nccl, number, 120))
    for number in several[2:]:
        stages += [suite("peer", number, 180), *benches(given, number, "peer")]
    for number in several[:1]:
        stages.append(suite("staged", number, 120))
    return stages


def stages_of_many(given: argparse.Namespace, ranks: list[int]) -> list[Stage]:
    """A GPU for each rank. Was never run: there was no such machine."""
    stages = [tests("kernels", 90, "test_gpu_kernels.py", "test_reductions.py")]
    for number in ranks:
        for way in ("auto", "peer"):
            stages += [suite(way, number, 180), *benches(given, number, way, largest="1G")]
    return stages


def tests(name: str, limit: float, *files: str) -> Stage:
    """Files of tests/gpu in one process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [str(ROOT / "tests" / "gpu" / file) for file in files]
    return Stage(name, command, limit, {"ADAREDUCE_TEST_NEEDS_GPU": "1"}, _BUILD, " in ")


def suite(way: str, ranks: int, limit: float) -> Stage:
    """tests/gpu/mpi on some ranks."""
    stage = tests(f"{way}_{ranks}", limit, "test_ranks.py")
    variables = {
        **stage.variables,
        "ADAREDUCE_TEST_WAYS": way,
        "ADAREDUCE_TEST_RANKS": str(ranks),
        "ADAREDUCE_TEST_LIMIT_SECONDS": str(limit - 10),
    }
    # -s: the report of rank 0 is in the log also where all is well.
    return Stage(stage.name, [*stage.command, "-s"], limit, variables, _BUILD, " in ")


def benches(given: argparse.Namespace, ranks: int, way: str, largest: str = "256M") -> list[Stage]:
    """Collectives by size, and AdaScale's statistics over a model's gradients."""
    start = ["mpirun", "-n", str(ranks), *EACH_RANK, sys.executable, "-m", "adareduce.bench"]
    common = ["--device", "cuda", "--json", str(given.out / COLLECTIVES)]
    # Ranks that share a GPU take turns, milliseconds each.
    fewer = [] if given.mpirun else ["-n", "10", "-w", "3"]
    peers = [] if way == "peer" and not given.mpirun else ["--peers"]
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", **WAYS[way]}
    commands = {
        "adasum": ["allreduce", "--op", "adasum", "-b", "1M", "-e", largest, "-f", "16", *peers],
        "adascale": ["allreduce", "--op", "avg", "--stats", "--layers", "resnet50", *peers],
        "bf16": ["allreduce", "--op", "adasum", "-d", "bfloat16", "--layers", "resnet50", *peers],
    }
    return [
        Stage(
            f"bench_{name}_{way}_{ranks}", [*start, *command, *common, *fewer], 60, variables,
            _BUILD, "bus bandwidth",
        )
        for name, command in commands.items()
    ]  # fmt: skip


def sanitizer(tool: str, limit: float, *command: str, name: str = "") -> Stage:
    """compute-sanitizer over tests/gpu/sanitize.py."""
    found = shutil.which("compute-sanitizer", path=environment()["PATH"]) or "compute-sanitizer"
    run = [found, "--tool", tool, "--error-exitcode", "1", sys.executable, *command]
    return Stage(name or tool, run, limit, needs=_BUILD, note="ERROR SUMMARY")


def nccl_way(origin: dict[str, Any]) -> str:
    """How NCCL of this version lets ranks share a GPU."""
    version = tuple(int(word) for word in re.findall(r"\d+", origin["versions"]["nccl"]))
    return "nccl_shared" if version >= _SHARES_FROM else "nccl_hostid"


def chosen(stages: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    """Those whose name begins with one of the names; all without names."""
    return [s for s in stages if names is None or s.name.startswith(tuple(names))]


def environment() -> dict[str, str]:
    """For all stages."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return {
        "PATH": os.pathsep.join([*folders, "/usr/local/cuda/bin"]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def describe(commit: str | None) -> dict[str, Any]:
    """Where the results come from, as in benchmarks/results."""
    query = "name,memory.total,compute_cap,driver_version"
    lines = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    rows = [[word.strip() for word in line.split(",")] for line in lines if line.count(",") == 3]
    release = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    torch = (
        "import torch; print(torch.__version__)\n"
        "if torch.cuda.is_available(): print('.'.join(map(str, torch.cuda.nccl.version())))"
    )
    found = output_of(sys.executable, "-c", torch).splitlines()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty",
                            "--abbrev=40", "--exclude=*") or None,
        "machine": {
            "cores": os.cpu_count(),
            "gpus": [{"name": row[0], "memory": row[1], "capability": row[2]} for row in rows],
            "driver": rows[0][3] if rows else "",
        },
        "versions": {
            "python": platform.python_version(),
            "cuda": release[1] if release else "",
            "torch": found[0] if found else "",
            "nccl": found[1] if len(found) > 1 else "",
        },
    }  # fmt: skip


def output_of(*command: str) -> str:
    """What a command prints; empty where it does not work."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env={**os.environ, "PATH": environment()["PATH"]},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def summary(folder: Path) -> str:
    """A line for each result."""
    files = [folder / name for name in (KERNELS, COLLECTIVES)]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return "\n".join(line_of(json.loads(line)) for line in lines) or "no results"


def line_of(row: dict[str, Any]) -> str:
    """A row of gpu_kernels.py or of adareduce.bench, in short."""
    if "kernel" in row:
        share = row["share"]
        return (
            f"{row['kernel']:<26} {row['dtype']:>9} {row['set']:<12} {row['gbps']:>8.0f} GB/s,"
            f" {share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}] of a copy"
        )
    ours = row["in_place"] or row["out_of_place"]
    ratios = [f"{name} {entry['ratio']['value']:.2f}" for name, entry in row["compared"].items()]
    what = f"{row['collective']} {row['redop']}"
    return (
        f"{what:<26} {row['dtype']:>9} {row['ranks']} ranks {row['bytes']:>11} B"
        f" {ours['median_us']:>9.1f} us {ours['busbw_gbps']:>7.2f} GB/s wrong {ours['wrong']}"
        f" {row.get('path', '')} {', '.join(ratios)}"
    )


if __name__ == "__main__":
    sys.exit(main())
