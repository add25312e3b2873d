"""benchmarks/memory_traffic.py: that it runs and what its limits add up. Nothing looks at times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import mpirun

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402

pytestmark = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")


def run(ranks: int, file: Path, *cases: str) -> mpirun.Result:
    script = str(ROOT / "benchmarks" / "memory_traffic.py")
    return mpirun.run(
        ranks, [sys.executable, script, "--repeats", "5", "--json", str(file), *cases], limit=240.0
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_limits_are_made_of_works_that_were_measured(tmp_path: Path, ranks: int) -> None:
    file = tmp_path / "rows.jsonl"
    result = run(ranks, file, "--cases", "1M", "resnet50")
    assert result.returncode == 0, str(result)
    assert result.left_behind == []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["case"], row["bytes"]) for row in rows] == [
        ("1M", 1 << 20),
        ("resnet50", 4 * 25_557_032),
    ]
    assert [row["settings"]["calls_in_a_row"] for row in rows] == [16, 1]
    names = {"sum, ordinary", "Adasum, ordinary", "sum, shared", "Adasum, shared"}
    works = names | {"scale in place", "read", "pack", "combine", "unpack", "sum by MPI"}
    works |= {"read again"}
    for row in rows:
        assert row["ranks"] == ranks
        assert set(row["limit_seconds"]) == set(row["ratios"]) == names
        medians = row["median_seconds"]
        assert set(medians) == works
        # Tensors that lie where all ranks see them need one pass, and nothing else.
        limits = row["limit_seconds"]
        assert limits["sum, shared"] == medians["scale in place"]
        # Repeat by repeat Adasum's is the sum of two times, and no less than either.
        for limit, works_of_it in {
            "Adasum, shared": ("scale in place", "read again"),
            "Adasum, ordinary": ("sum, ordinary", "read again"),
        }.items():
            assert limits[limit] >= max(medians[work] for work in works_of_it)
    assert tables.traffic(rows).count("\n") == 1 + 2 * len(works)
    assert all(name in result.out[0] for name in names)
    assert result.out[1:] == [""] * (ranks - 1)


def test_one_rank_has_nobody_to_share_with(tmp_path: Path) -> None:
    result = run(1, tmp_path / "rows.jsonl")
    assert result.returncode != 0
    assert "must have 2 or more ranks" in result.err[0]
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    result = run(2, tmp_path / "no" / "rows.jsonl")
    assert result.returncode != 0
    assert "--json must be a file that can be written" in result.err[0]


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        ("resnet51", "a size must be like 4K or 64M, got 'resnet51', or resnet50"),
        ("64K", "a size must be at least 128K, since less goes another way, got '64K'"),
    ],
)
def test_a_case_that_cannot_be_is_named(tmp_path: Path, case: str, rule: str) -> None:
    result = run(2, tmp_path / "rows.jsonl", "--cases", case)
    assert result.returncode != 0
    assert rule in result.err[0]
    assert not (tmp_path / "rows.jsonl").exists()
