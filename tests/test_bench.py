"""The benchmark and the check of the installation: what they print, and that they notice errors.

No test looks at how long anything took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import mpirun

needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
LIMIT = 120.0
BENCH = [sys.executable, "-m", "adareduce.bench"]
CHECK = [sys.executable, "-m", "adareduce.check"]
NUMBER_OF_COLUMNS = 5 + 2 * 4  # what is measured; two forms of time, algbw, busbw, #wrong


def rows_of(output: str) -> list[list[str]]:
    """The fields of each row of the table."""
    return [line.split() for line in output.splitlines() if line and not line.startswith("#")]


def wrong_of(output: str) -> list[str]:
    """Both #wrong of the only row."""
    (row,) = rows_of(output)
    return [row[8], row[12]]


def run_bench(num_ranks: int, options: str, **variables: str) -> mpirun.Result:
    result = mpirun.run(num_ranks, [*BENCH, *options.split()], limit=LIMIT, variables=variables)
    assert not result.timed_out, str(result)
    assert result.left_behind == []
    return result


def run_script(num_ranks: int, text: str) -> mpirun.Result:
    """Runs a program that has changed something before it calls main()."""
    result = mpirun.run(num_ranks, mpirun.script(text), limit=LIMIT)
    assert not result.timed_out, str(result)
    assert result.left_behind == []
    return result


@needs_mpi
@pytest.mark.openmpi_round
def test_the_table_has_the_columns_of_nccl_tests(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    options = f"allreduce --op adasum -b 4K -e 16K -f 4 -n 5 -w 1 --peers --json {file}"
    result = run_bench(2, options)
    assert result.returncode == 0, str(result)
    assert result.out[1] == "", "only rank 0 prints"
    titles = [line for line in result.out[0].splitlines() if "#wrong" in line and "algbw" in line]
    form = ["time", "algbw", "busbw", "#wrong"]
    expected = ["#", "size", "count", "type", "redop", "root", *form, *form]
    assert titles[0].split()[: len(expected)] == expected
    rows = rows_of(result.out[0])
    assert [row[:5] for row in rows] == [
        ["4096", "1024", "float", "adasum", "-1"],
        ["16384", "4096", "float", "adasum", "-1"],
    ]
    for row in rows:
        assert float(row[5]) > 0
        assert row[8] == row[12] == "0", str(result)
        # gloo and mpi: time, ratio, interval
        assert len(row) == NUMBER_OF_COLUMNS + 2 * 3
        assert float(row[-1].strip("[]").split(",")[0]) <= float(row[-2])
    assert "# Out of bounds values : 0 OK" in result.out[0]
    assert "# Avg bus bandwidth    : " in result.out[0]

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["bytes"] for line in lines] == [4096, 16384]
    for line in lines:
        assert line["ranks"] == 2
        assert line["out_of_place"]["wrong"] == line["in_place"]["wrong"] == 0
        times = line["in_place"]
        assert times["min_us"] <= times["median_us"] == times["p50_us"]
        assert times["p99_us"] is None
        assert line["core_round_trip_ns"] is None or line["core_round_trip_ns"] > 0
        assert times["algbw_gbps"] == pytest.approx(line["bytes"] / times["median_us"] / 1e3)
        assert times["busbw_gbps"] == pytest.approx(times["algbw_gbps"])  # 2 (2 - 1) / 2
        for peer in ("gloo", "mpi"):
            ratio = line["compared"][peer]["ratio"]
            assert ratio["low"] <= ratio["value"] <= ratio["high"]
            medians = line["compared"][peer]["median_us"], times["median_us"]
            assert ratio["value"] == pytest.approx(medians[0] / medians[1])
        assert line["settings"]["iters"] == 5
        assert {"commit", "date", "machine", "versions"} <= set(line)


@needs_mpi
def test_every_collective_and_op_is_right_on_3_ranks() -> None:
    result = run_script(3, """
from adareduce.bench.__main__ import main
hvd.init()
commands = [f"allreduce -b 10K -o {op}" for op in ("sum", "prod", "min", "max", "avg", "adasum")]
commands += [f"allreduce -b 1K -o {op} -d int16" for op in ("sum", "prod", "min", "max", "avg")]
commands += [f"allreduce -b 10K -o {op} -d bfloat16 --layers 3" for op in ("sum", "adasum")]
commands += [f"reducescatter -b 10K -o {op} -d half" for op in ("sum", "avg", "max")]
commands += [f"{name} -b 10K -d bool" for name in ("allgather", "alltoall", "broadcast -r 2")]
commands += ["reducescatter -b 10K --layers 5", "allgather -b 10K --layers 5", "barrier"]
commands += [f"allreduce -b 10K --layers 3 --stats -n 5 -o {op}" for op in ("avg", "adasum")]
for command in commands:
    status = main(["-n", "1", "-w", "0", *command.split()])
    assert status == 0, command
""")  # fmt: skip
    assert result.returncode == 0, str(result)
    rows = rows_of(result.out[0])
    assert len(rows) == 24
    assert {row[8] for row in rows} == {"0"}
    assert {row[12] for row in rows} == {"0", "N/A"}


@needs_mpi
def test_a_wrong_element_on_one_rank_is_counted_and_ends_with_status_1() -> None:
    result = run_script(2, """
import sys
from adareduce.bench.__main__ import main
original = hvd.allreduce
def broken(*arguments, **keywords):
    output = original(*arguments, **keywords)
    if hvd.rank() == 1:
        output[3] += 0.25
    return output
hvd.allreduce = broken
sys.exit(main("allreduce -b 4K -n 1 -w 0".split()))
""")  # fmt: skip
    assert result.returncode == 1, str(result)
    assert wrong_of(result.out[0]) == ["1", "0"], str(result)
    assert "# Out of bounds values : 1 FAILED" in result.out[0]


@needs_mpi
def test_elements_that_are_never_written_are_counted() -> None:
    # Minima of bools are nearly all False, which fresh memory holds by itself.
    result = run_script(2, """
import sys
from adareduce.bench.__main__ import main
original = hvd.allreduce
def forgetful(tensor, op):
    result = original(tensor, op=op)
    lost = torch.empty_like(result)
    lost[1000:] = result[1000:]
    return lost
hvd.allreduce = forgetful
sys.exit(main("allreduce -o min -d bool -b 8M -n 1 -w 0".split()))
""")  # fmt: skip
    assert result.returncode == 1, str(result)
    out_of_place, in_place = wrong_of(result.out[0])
    assert in_place == "0"
    assert int(out_of_place) > 1200, "poison is True, three quarters of the minima are not"


@needs_mpi
def test_wrong_statistics_are_counted() -> None:
    result = run_script(2, """
import sys
from adareduce.bench.__main__ import main
original = hvd.grouped_allreduce_with_stats_
def broken(*arguments, **keywords):
    results, stats = original(*arguments, **keywords)
    if stats.groups is not None:
        stats.groups[0, 3] *= 1.001
    else:
        stats.orthogonality[-1] += 0.01
    return results, stats
hvd.grouped_allreduce_with_stats_ = broken
for op in ("avg", "adasum"):
    status = main(f"allreduce -o {op} -b 40K --layers 3 --stats -n 5 -w 0".split())
    assert status == 1, op
""")  # fmt: skip
    assert result.returncode == 0, str(result)
    assert [(row[8], row[12]) for row in rows_of(result.out[0])] == [("0", "2")] * 2, str(result)


@needs_mpi
@pytest.mark.openmpi_round
def test_four_ranks_agree() -> None:
    for options in ("allreduce --op adasum --layers 3", "reducescatter --op avg", "alltoall"):
        result = run_bench(4, f"{options} -b 4K -e 64K -f 16 -n 1 -w 0")
        assert result.returncode == 0, str(result)
        assert {row[8] for row in rows_of(result.out[0])} == {"0"}


@needs_mpi
def test_a_peer_that_fails_on_one_rank_is_missing_on_all() -> None:
    result = run_script(2, """
import sys
from adareduce.bench import peers
from adareduce.bench.__main__ import main
hvd.init()
def no_socket(*arguments, **keywords):
    raise OSError("no socket is left")
if hvd.rank() == 0:
    peers._tcp_store = no_socket
sys.exit(main("allreduce -b 4K -n 5 -w 0 --peers".split()))
""")  # fmt: skip
    assert result.returncode == 0, str(result)
    assert "# gloo: n/a: no socket is left" in result.out[0]
    (row,) = rows_of(result.out[0])
    assert row.count("n/a") == 3


@needs_mpi
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("broadcast -r 2", "--root must be below the 2 ranks, got 2"),
        ("alltoall -b 4 -d float", "--minbytes must be enough for an element per rank, got 4"),
        ("allreduce -b 4K --json /nowhere/x", "--json must be a file that can be written"),
    ],
)
def test_what_so_many_ranks_cannot_do_is_said_before_anything_runs(
    options: str, message: str
) -> None:
    result = run_bench(2, options)
    assert result.returncode == 2, str(result)
    assert message in result.out[0]
    assert "Traceback" not in str(result)


@needs_mpi
def test_a_rank_that_fails_alone_ends_the_job() -> None:
    result = run_script(2, """
import sys
from adareduce.bench import cases
from adareduce.bench.__main__ import main
def no_memory(self, index):
    raise MemoryError("only rank 1 has none")
hvd.init()
if hvd.rank() == 1:
    cases.Case.periods = no_memory
sys.exit(main("allreduce -b 4K -n 1 -w 0".split()))
""")  # fmt: skip
    assert result.returncode != 0, str(result)
    assert "only rank 1 has none" in result.err[1], str(result)


@needs_mpi
def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "busbw.png"
    result = run_bench(0, f"allreduce -b 1K -e 4K -f 2 -n 5 -w 0 --peers --plot {picture}")
    assert result.returncode == 0, str(result)
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_mpi
@pytest.mark.parametrize("num_ranks", [0, pytest.param(2, marks=pytest.mark.openmpi_round), 3])
def test_check_says_that_this_installation_works(num_ranks: int) -> None:
    result = mpirun.run(num_ranks, CHECK, limit=LIMIT)
    assert result.returncode == 0, str(result)
    lines = result.out[0].splitlines()
    plural = "1 rank" if num_ranks == 0 else f"{num_ranks} ranks"
    assert lines[-1] == f"adareduce works on {plural}.", str(result)
    assert "FAILED" not in result.out[0]
    assert ("Only one rank was tested" in result.out[0]) == (num_ranks == 0)
    assert any(line.startswith("disagreement") for line in lines) == (num_ranks > 1)
    assert all(out == "" for out in result.out[1:]), "only rank 0 prints"


@needs_mpi
def test_check_says_what_does_not_work_and_goes_on() -> None:
    result = run_script(2, """
import sys
from adareduce import check
from adareduce.bench import checks
checks._CHECKS = [entry for entry in checks._CHECKS if entry[0] in ("broadcast", "allgather")]
original = hvd.broadcast
def broken(tensor, root, *rest, **keywords):
    if hvd.rank() == 0:
        return original(tensor, root, *rest, **keywords)
    return original(tensor, root, *rest, **keywords).roll(1)
hvd.broadcast = broken
sys.exit(check.main([]))
""")  # fmt: skip
    assert result.returncode == 1, str(result)
    lines = result.out[0].splitlines()
    assert lines[-1] == "adareduce does NOT work here: failed: broadcast."
    (failed,) = [line for line in lines if line.startswith("broadcast")]
    assert "FAILED" in failed
    assert "elements are wrong" in failed
    assert any(line.split()[:2] == ["allgather", "ok"] for line in lines), str(result)


@needs_mpi
@pytest.mark.parametrize("place", ["before", "within"])
def test_check_ends_with_a_verdict_where_one_rank_fails_alone(place: str) -> None:
    result = run_script(3, f"""
import sys
from adareduce import check
from adareduce.bench import cases, checks
checks._CHECKS = [entry for entry in checks._CHECKS if entry[0] in ("broadcast", "allgather")]
def no_memory(self, index):
    raise MemoryError("only rank 1 has none")
def busy(ranks):
    ranks.gather(0)
    if hvd.rank() == 1:
        raise checks.Failure("this rank is busy")
    return str(max(ranks.gather(1)))
hvd.init()
if "{place}" == "before" and hvd.rank() == 1:
    cases.Case.periods = no_memory
if "{place}" == "within":
    checks._CHECKS.insert(0, ("busy", busy, 1))
sys.exit(check.main([]))
""")  # fmt: skip
    assert result.returncode == 1, str(result)
    lines = result.out[0].splitlines()
    if place == "before":
        assert lines[-1] == "adareduce does NOT work here: failed: allgather."
        assert "rank 1: MemoryError: only rank 1 has none" in result.out[0]
    else:
        assert lines[-1] == "adareduce does NOT work here: failed: busy."
        assert "rank 1: this rank is busy" in result.out[0]


@needs_mpi
def test_check_says_so_where_init_fails() -> None:
    variables = {"ADAREDUCE_FAIL_AFTER_SECONDS": "soon"}
    result = mpirun.run(2, CHECK, limit=LIMIT, variables=variables)
    assert result.returncode == 1, str(result)
    assert result.out[0].startswith("adareduce does NOT work here: "), str(result)
    assert "soon" in result.out[0]
    assert result.out[1] == ""
