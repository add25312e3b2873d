"""benchmarks/compare_peers.py: jobs in turns, exit status, and whole runs with two ranks.

No test looks at how long anything took.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mpirun
from compare_lines import MPICH, job_line

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_peers  # noqa: E402

needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
LIMIT = 400.0  # some 10 s where nothing else runs


def played(wrong: int = 0, failure: str = "") -> Any:
    """Stands for ``run_job``: a job whose numbers are known."""

    def run(
        environment: object, num_ranks: int, options: Sequence[str], limit: float
    ) -> tuple[list[dict[str, Any]], str]:
        line = job_line("MPICH 5.0.2", MPICH, ranks=num_ranks)
        line["wrong"]["ours adasum ordinary"] = wrong
        return [line], failure

    return run


BRIEF = ["--sizes", "--sets", "resnet50", "--ranks", "2", "--dtypes", "float32"]
BRIEF += ["--environment", f"{sys.executable},{sys.executable}"]


@pytest.mark.parametrize(
    ("wrong", "failure", "status"), [(0, "", 0), (3, "", 1), (0, "ended with 1", 1)]
)
def test_the_exit_status_tells_of_wrong_elements_and_of_failed_jobs(
    wrong: int, failure: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_peers.main([*BRIEF, "--rounds", "2"], run=played(wrong, failure)) == status
    printed = capsys.readouterr().out
    assert ("resnet50 float32, 2 ranks, ours adasum ordinary: 3" in printed) == bool(wrong)
    assert (f"FAILED: round 1, 2 ranks, {sys.executable}: ended with 1" in printed) == bool(failure)


def test_rounds_take_turns_and_the_tables_can_be_made_again_of_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, rows = tmp_path / "raw", tmp_path / "rows"
    options = [*BRIEF, "--rounds", "3", "--raw", str(raw), "--json", str(rows)]
    assert compare_peers.main(options, run=played()) == 0
    first = capsys.readouterr().out
    assert [json.loads(line)["round"] for line in raw.read_text().splitlines()] == [0, 1, 2]
    (row, _) = [json.loads(line) for line in rows.read_text().splitlines()]
    assert (row["rounds"], row["repeats"]) == (3, 33)
    assert compare_peers.main(["--reread", str(raw)]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    "key", ["bert-large/2", "bert-large/0/1", "bert-large/2000/1", "resnet50/2/2", "vgg"]
)
def test_a_set_that_does_not_exist_is_named(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_peers.main(["--sets", key])
    assert f"bert-large/WIDTH/WORDS (divisors), got '{key}'" in capsys.readouterr().err


def test_no_job_begins_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_peers.main([*BRIEF, "--minutes", "1e-9"], run=played()) == 1
    assert "--minutes=1e-09 are over after 0 of 5 jobs" in capsys.readouterr().err


def test_what_does_not_fit_into_memory_is_skipped_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_peers, "available_memory", lambda: 10**9)
    assert compare_peers.main(BRIEF, run=played()) == 1
    assert "resnet50 float32, 2 ranks: skipped, it may need 2.1 GB of 0.8 GB" in (
        capsys.readouterr().err
    )


def compare(*options: str) -> subprocess.CompletedProcess[str]:
    """A real run of one round with two ranks."""
    command = [sys.executable, ROOT / "benchmarks" / "compare_peers.py", "--rounds", "1"]
    return subprocess.run(
        [*command, "--ranks", "2", "--repeats", "5", *options],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip


@needs_mpi
@pytest.mark.openmpi_round
def test_two_ranks_are_compared_with_gloo_and_mpi(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    result = compare("--sizes", "4K", "--sets", "tiny", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    calls = {(r["case"], r["dtype"], f"{r['op']} {r['form']}") for r in rows}
    assert calls >= {
        (case, dtype, f"{op} ordinary")
        for case in ("4K", "tiny2000")
        for dtype in ("float32", "bfloat16")
        for op in ("sum", "adasum")
    }
    flavour = mpirun.flavour()
    for row in rows:
        assert row["wrong"] == 0
        assert row["repeats"] == 5
        assert sum(row["states"].values()) == pytest.approx(1)
        peers = row["peers"]
        assert peers["gloo"]["ratio"]["all"]["low"] <= peers["gloo"]["ratio"]["all"]["high"]
        if row["dtype"] == "float32":
            assert peers[flavour]["ratio"]["all"]["value"] > 0
        if row["case"] == "4K":
            assert peers["gloo"]["difference"]["all"] is not None
    assert f"| {flavour} (ms), / ours |" in result.stdout
    assert "sum, 4 KB: at most 8 us more than mpi4py" in result.stdout


@needs_mpi
def test_whoever_ends_the_comparison_ends_its_job() -> None:
    mark = uuid.uuid4().hex
    command = [sys.executable, ROOT / "benchmarks" / "compare_peers.py", "--sizes", "4K"]
    with subprocess.Popen(
        command, env=os.environ | {mpirun.MARK: mark}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip

        def ranks() -> list[str]:
            found = dict(mpirun._marked(f"{mpirun.MARK}={mark}".encode())).values()
            return [text for text in found if "compare_job.py" in text]

        deadline = time.monotonic() + LIMIT
        while len(ranks()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
        while ranks():  # what mpirun killed needs a moment to be gone
            assert time.monotonic() < deadline
            time.sleep(0.05)


BREAK = """
import sys
if any(word.endswith("compare_job.py") for word in sys.orig_argv):
    import adareduce.torch as hvd
    allreduce = hvd.allreduce_
    def broken(tensor, **options):
        result = allreduce(tensor, **options)
        if options["op"] == hvd.Adasum and hvd.rank() == 1:
            tensor.view(-1)[-1] += 1
        return result
    hvd.allreduce_ = broken
    said = hvd.SharedMemoryChoices(True, "", [("sums", "as the test says", 1)], {})
    hvd.shared_memory_choices = lambda: said
"""
# What compare_contenders.py calls of Horovod; it must be called between init and shutdown.
HOROVOD = """
import adareduce.torch as hvd
Sum, Adasum, is_on, handles = hvd.Sum, hvd.Adasum, False, {}
original = hvd.allreduce_async_
def mpi_built(): return True
def size(): return hvd.size()
def init():
    global is_on
    assert not is_on, "init() twice"
    is_on = True
def shutdown():
    global is_on
    assert is_on, "shutdown() without init()"
    is_on = False
def allreduce_async_(tensor, name, op):
    assert is_on, "not between init() and shutdown()"
    return original(tensor, name=name, op=op)
def synchronize(handle):
    return hvd.synchronize(handle)
"""


@needs_mpi
def test_one_wrong_element_on_one_rank_is_found_and_horovod_is_compared_where_it_is(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text('__version__ = "as the test says"')
    (tmp_path / "horovod" / "torch.py").write_text(HOROVOD)
    python = tmp_path / "python"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = f"{mpirun.find_mpirun()},{python}"
    file = tmp_path / "rows.jsonl"
    result = compare("--sizes", "4K", "--sets", "--dtypes", "float32", "--json", str(file),
                     "--environment", environment)  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED: elements were wrong:" in result.stdout
    assert '["sums", "as the test says", 1]' in result.stdout
    rows = {(r["op"], r["form"]): r for r in map(json.loads, file.read_text().splitlines())}
    for form in ("ordinary", "shared"):
        assert f"4K float32, 2 ranks, ours adasum {form}: " in result.stdout
        assert f"ours sum {form}: " not in result.stdout
        assert rows["adasum", form]["wrong"] > 0 == rows["sum", form]["wrong"]
    for (op, _), row in rows.items():
        assert row["choices"]["choices"] == [["sums", "as the test says", 1]]
        assert row["peers"]["horovod"]["contender"] == f"horovod {op} each"
        assert row["peers"]["horovod"]["ratio"]["all"]["value"] > 0
        assert row["peers"]["horovod"]["wrong"] == 0
        assert row["versions"]["horovod"] == "as the test says"
