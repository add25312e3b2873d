"""Tables and summaries of GPU results, from rows that are made up here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402

import gpu  # noqa: E402

RATIO = {"value": 0.93, "low": 0.91, "high": 0.94}
ORIGIN = {
    "date": "2000-01-01T00:00:00+00:00", "commit": "0123456789abcdef",
    "machine": {"cpu": "a CPU", "usable_cores": 16},
    "versions": {"torch": "2.11.0", "mpi": "MPICH 5"},
    "gpu": {"name": "A GPU", "l2_bytes": 1, "memory_bytes": 1},
    "gpu_versions": {"cuda": "13.0", "nccl": "2.28.9"},
}  # fmt: skip
KERNEL: dict[str, Any] = {
    "kernel": "pair_stats", "dtype": "bfloat16", "set": "large200", "tensors": 200,
    "bytes": 2**30, "gbps": 3901.25, "copy_gbps": 4195.0, "share": RATIO, "wrong": 0,
    "beside": {"foreach_norm": {"median_seconds": 1.0, "ratio": RATIO}}, **ORIGIN,
}  # fmt: skip
TIMES = {"median_us": 1234.5, "busbw_gbps": 321.5, "wrong": 0}
COLLECTIVE: dict[str, Any] = {
    "collective": "allreduce", "redop": "adasum", "ranks": 4, "path": "peer", "dtype": "float32",
    "tensors": 1, "bytes": 2**20, "in_place": TIMES, "out_of_place": TIMES,
    "compared": {"nccl": {"ratio": RATIO}}, "settings": {"stats": False, "graph": True}, **ORIGIN,
}  # fmt: skip


def test_kernels_show_their_share_of_a_copy_and_torch_beside_them() -> None:
    last = tables.gpu_kernels([KERNEL]).splitlines()[-1]
    assert last == (
        "| pair_stats | bfloat16 | 200 | 1 GiB | 3901.2 (0.93 [0.91, 0.94])"
        " | foreach_norm 0.93 [0.91, 0.94] | 0 |"
    )


def test_collectives_show_the_path_and_nccl_beside_them() -> None:
    last = tables.gpu_collectives([COLLECTIVE]).splitlines()[-1]
    assert last == (
        "| allreduce adasum | 4 | peer | float32 | 1 | 1 MiB | 1234 | 321.50 | 0"
        " | 0.93 [0.91, 0.94] (its sum) |  |"
    )


def test_a_document_says_where_its_numbers_come_from_and_that_there_are_none(
    tmp_path: Path,
) -> None:
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "tables.py", tmp_path / "benchmarks")
    document = tmp_path / "docs" / "performance.md"
    document.write_text(
        "<!-- table gpu_kernels benchmarks/results/gpu_kernels.jsonl -->\nold\n"
        "<!-- end of table -->\n"
    )

    def rewritten() -> str:
        command = [sys.executable, tmp_path / "benchmarks" / "tables.py"]
        subprocess.run(command, check=True, capture_output=True)
        return document.read_text()

    assert "**Not measured yet.**" in rewritten()
    older = KERNEL | {"gbps": 17.0}
    results = tmp_path / "benchmarks" / "results" / "gpu_kernels.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in (older, KERNEL)))
    text = rewritten()
    assert "3901.2" in text
    assert "17.0" not in text, "of equal measurements the last counts"
    assert "A GPU, CUDA 13.0, torch 2.11.0, commit 012345678, 2000-01-01" in text


def test_the_script_ends_with_a_line_for_each_result(tmp_path: Path) -> None:
    assert gpu.summary(tmp_path) == "no results"
    (tmp_path / gpu.KERNELS).write_text(json.dumps(KERNEL) + "\n")
    (tmp_path / gpu.COLLECTIVES).write_text(json.dumps(COLLECTIVE) + "\n")
    first, second = gpu.summary(tmp_path).splitlines()
    assert first.split()[:5] == ["pair_stats", "bfloat16", "large200", "3901", "GB/s,"]
    assert second.split() == [
        "allreduce",
        "adasum",
        "float32",
        "4",
        "ranks",
        "1048576",
        "B",
        "1234.5",
        "us",
        "321.50",
        "GB/s",
        "wrong",
        "0",
        "peer",
        "nccl",
        "0.93",
    ]


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert gpu.main(["--list", *options]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_stages_are_listed_by_value_and_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = listed(capsys)
    assert names[0] == "build"
    assert names.index("kernels") < names.index("bench_kernels") < names.index("memcheck")
    assert {"auto_1", "peer_2", "peer_4", "peer_8", "racecheck", "staged_2"} <= set(names)
    assert listed(capsys, "--stages", "build", "peer_4") == ["build", "peer_4"]
    assert listed(capsys, "--stages", "bench_kern") == ["bench_kernels"]
    assert len(names) == len(set(names)), "each has a log of its own"


def test_ranks_with_a_gpu_each_have_stages_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    names = listed(capsys, "--mpirun", "--ranks", "8")
    assert {"build", "auto_8", "peer_8", "bench_adasum_auto_8"} <= set(names)
    assert not [name for name in names if name.startswith(("nccl", "staged", "memcheck"))]


@pytest.mark.parametrize(
    ("version", "way"),
    [("2.28.9", "nccl_hostid"), ("2.30.3", "nccl_shared"), ("", "nccl_hostid")],
)
def test_ranks_share_a_gpu_as_nccls_version_lets_them(version: str, way: str) -> None:
    assert gpu.nccl_way({"versions": {"nccl": version}}) == way


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--wheels", "/nowhere"], "--wheels must be a folder with"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(options)
    assert text in capsys.readouterr().err
