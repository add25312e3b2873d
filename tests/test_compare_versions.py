"""benchmarks/compare_versions.py: jobs in turns, rows, arguments, and whole runs with two ranks.

No test looks at how long anything took.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import mpirun

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_versions  # noqa: E402
import tables  # noqa: E402

needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
OWN = f"{mpirun.find_mpirun()},{sys.executable}"
LIMIT = 400.0  # some 15 s where nothing else runs


def environment(folder: Path, name: str) -> Path:
    """A virtual environment as far as the arguments' check looks."""
    (folder / name / "bin").mkdir(parents=True)
    for program in ("python", "mpirun"):
        (folder / name / "bin" / program).symlink_to("/bin/true")
    return folder / name


class Played:
    """Stands for ``run_command``: jobs of two versions whose times are known."""

    def __init__(self, wrong: int = 0, failure: str = "", seconds_after: float = 3.0) -> None:
        self._of_after = {"wrong": wrong, "seconds": [seconds_after] * 5}
        self._failure = failure
        self.commands: list[list[str]] = []
        self.settings: list[dict[str, str]] = []

    def __call__(
        self, command: list[str], limit: float, settings: Mapping[str, str]
    ) -> tuple[list[dict[str, Any]], str]:
        assert limit > 0
        self.commands.append(command)
        self.settings.append(dict(settings))
        is_after = any("/after/" in word for word in command)
        if is_after and self._failure:
            return [], self._failure
        ranks = int(command[command.index("-n") + 1]) if "-n" in command else 1
        cases = [command[i + 1] for i, word in enumerate(command) if word == "--case"]
        line = {
            "ranks": ranks, "seconds": [2.0] * 5, "wrong": 0, "calls": 1, "num_bytes": 4096,
            "tensors": 1, "core_round_trip_ns": 80.0, "settings": {}, "shares_cores": False,
            "date": "2000-01-01T00:00:00+00:00", "commit": "after" if is_after else "before",
            "machine": {"cpu": "a CPU", "usable_cores": 2}, "versions": {"torch": "2"},
            **(self._of_after if is_after else {}),
        }  # fmt: skip
        return [{"case": case, **line} for case in cases], ""


@pytest.fixture
def both(tmp_path: Path) -> list[str]:
    """The arguments that name two environments."""
    found = {side: environment(tmp_path, side) for side in ("before", "after")}
    return [f"--{side}={folder}" for side, folder in found.items()]


@pytest.mark.parametrize(
    ("wrong", "failure", "status"), [(0, "", 0), (3, "", 1), (0, "ended with 1", 1)]
)
def test_the_exit_status_tells_of_wrong_elements_and_of_failed_jobs(
    wrong: int, failure: str, status: int, both: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*both, "--ranks", "2", "--cases", "sum-4K", "--rounds", "2"]
    assert compare_versions.main(options, run=Played(wrong, failure)) == status
    printed = capsys.readouterr().out
    found = "FAILED: sum-4K, 2 ranks (mpirun), after: 6 elements were wrong"  # 3 in each round
    assert (found in printed) == bool(wrong)
    assert ("FAILED: round 1, 2 ranks (mpirun), after: ended with 1" in printed) == bool(failure)


def test_jobs_take_turns_and_one_rank_is_started_by_mpirun_and_alone(both: list[str]) -> None:
    played = Played()
    options = [*both, "--ranks", "1", "2", "--cases", "sum-4K", "sum-1M", "--rounds", "2"]
    assert compare_versions.main(options, run=played) == 0

    def told(command: list[str]) -> tuple[str, str, int]:
        side = "after" if any("/after/" in word for word in command) else "before"
        return side, command[2] if "-n" in command else "alone", command.count("--case")

    turns = [("1", 1), ("2", 2), ("alone", 1)]  # one rank has fewer cases
    assert [told(command) for command in played.commands] == [
        (side, ranks, cases)
        for sides in (("before", "after"), ("after", "before"))
        for ranks, cases in turns
        for side in sides
    ]
    assert all(s["ADAREDUCE_SHARED_MEMORY"] == "off" for s in played.settings)


def test_a_row_has_after_over_before_and_both_commits_and_the_table_shows_it(
    both: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows"
    options = [*both, "--ranks", "2", "--cases", "sum-4K", "idle", "--rounds", "5"]
    options += ["--json", str(file), "--setting", "ADAREDUCE_WORKERS=1"]
    played = Played()
    assert compare_versions.main(options, run=played) == 0
    assert played.settings[0]["ADAREDUCE_SHARED_MEMORY"] == "off"
    assert played.settings[0]["ADAREDUCE_WORKERS"] == "1"
    ratio, difference = [json.loads(line) for line in file.read_text().splitlines()]
    assert ratio["compared"] == {"value": 1.5, "low": 1.5, "high": 1.5}
    assert difference["compared"]["value"] == 1.0  # idle: seconds more, since 0 is wanted
    assert ratio["median_seconds"] == {"before": 2.0, "after": 3.0}
    assert (ratio["before"]["commit"], ratio["commit"]) == ("before", "after")
    assert (ratio["rounds"], ratio["repeats"]) == (5, 25)
    table = tables.versions([ratio, difference])
    assert "| sum-4K | 2 | mpirun | 25 | 0 | 2000 | 3000 | 1.50 [1.50, 1.50] |" in table
    assert "| +1e+03 ms [+1e+03, +1e+03] |" in table
    assert table in (printed := capsys.readouterr().out)
    assert "commit before -> after" in printed


def test_what_was_measured_before_an_interrupt_is_kept(both: list[str], tmp_path: Path) -> None:
    played, file = Played(), tmp_path / "rows.jsonl"

    def interrupted(*job: Any) -> Any:
        if len(played.commands) == 5:
            raise KeyboardInterrupt
        return played(*job)

    options = [*both, "--ranks", "2", "--cases", "sum-4K", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        compare_versions.main(options, run=interrupted)
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["rounds"] == 2  # of both versions


def test_four_rounds_give_no_ratio(both: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [*both, "--ranks", "2", "--cases", "sum-4K", "--rounds", "4"]
    assert compare_versions.main(options, run=Played()) == 0
    assert f"| {tables.NO_RATIO} |" in capsys.readouterr().out


def test_no_job_begins_when_the_time_is_over(
    both: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    played = Played()
    assert compare_versions.main([*both, "--minutes", "1e-9"], run=played) == 1
    assert not played.commands
    assert "--minutes=1e-09 are over before round 1 with 1 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--repeats", "-1"], "--repeats must be positive, got -1"),
        (["--minutes", "0"], "--minutes must be positive, got 0.0"),
        (["--ranks", "2", "0"], "--ranks must be at least 1, got 0"),
        (["--cases", "sum-3K"], "argument --cases: invalid choice: 'sum-3K'"),
        (["--ranks", "1", "--cases", "sum-1M"], "for one rank, got sum-1M"),
        (["--setting", "WORKERS=1"], "must be ADAREDUCE_NAME=VALUE, got 'WORKERS=1'"),
        (["--after", "/no/such"], "a virtual environment with bin/python, got '/no/such'"),
    ],
)
def test_arguments_that_cannot_be_used_are_named_with_their_rule_and_value(
    options: list[str], message: str, both: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare_versions.main([*both, *options], run=Played())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    both: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played = Played()
    assert compare_versions.main([*both, "--json", str(tmp_path / "no" / "f")], run=played) == 2
    assert not played.commands
    assert "--json must be a file that can be written" in capsys.readouterr().out


def compare(*options: str) -> subprocess.CompletedProcess[str]:
    """A real run of one round with two ranks, of this version before."""
    command = [sys.executable, ROOT / "benchmarks" / "compare_versions.py", "--rounds", "1"]
    return subprocess.run(
        [*command, "--before", OWN, "--ranks", "2", *options],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip


@needs_mpi
def test_two_ranks_of_one_version_are_compared_with_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAREDUCE_VENV", "where this was set up")  # of no interest in a row
    file = tmp_path / "rows.jsonl"
    cases = ["sum-4K", "async-4K", "sum-tiny2000", "adasum-1M", "allgather-1M", "broadcast-16M",
             "step-average", "step-adasum", "idle", "restart"]  # fmt: skip
    result = compare("--after", OWN, "--repeats", "3", "--json", str(file),
                     "--cases", *cases)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["case"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == cases
    for row in rows.values():
        assert row["wrong"] == {"before": 0, "after": 0}
        assert row["ranks"] == 2
        assert row["commit"] == row["before"]["commit"]
        assert row["settings"] == {"ADAREDUCE_SHARED_MEMORY": "off"}
        assert row["compared"] is None  # of one round
        assert min(row["median_seconds"].values()) > 0


BREAK = """
import sys
if any(word.endswith("version_job.py") for word in sys.orig_argv):
    import adareduce.torch as hvd
    broadcast, allgather = hvd.broadcast_, hvd.allgather
    def broken(tensor, root_rank):
        broadcast(tensor, root_rank)
        if hvd.rank() == 1:
            tensor.view(-1)[-1] += 1
    hvd.broadcast_ = broken
    hvd.allgather = lambda tensor: allgather(tensor)[:-1]
    hvd.Average = hvd.Sum  # an optimizer that adds
"""


@needs_mpi
def test_wrong_results_are_found_and_the_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    python = tmp_path / "python"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    result = compare("--after", f"{mpirun.find_mpirun()},{python}", "--repeats", "1",
                     "--cases", "sum-4K", "broadcast-16M", "allgather-1M", "step-average",
                     "step-adasum")  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    # One element on one rank: in two turns to warm up and in the one that is measured.
    assert "FAILED: broadcast-16M, 2 ranks (mpirun), after: 3 elements" in result.stdout
    for case in ("allgather-1M", "step-average"):
        assert f"FAILED: {case}, 2 ranks (mpirun), after: " in result.stdout
    for words in ("before: ", "sum-4K, ", "step-adasum, "):
        assert words not in result.stdout
