"""benchmarks/compare_peers.py: its sets, its statistics, its verdicts, and that it notices errors.

No test looks at how long anything took.
"""

from __future__ import annotations

import json
import math
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
import torch

import mpirun
from adareduce.bench.oracles import adasum

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_cases  # noqa: E402
import compare_peers  # noqa: E402
import compare_report  # noqa: E402
import compare_targets  # noqa: E402
import tables  # noqa: E402

needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
LIMIT = 240.0
FLOAT = torch.float32


# ---- cases --------------------------------------------------------------------------------------


def test_resnet50_is_161_tensors_with_25_557_032_parameters() -> None:
    case = compare_cases.make_case("resnet50", FLOAT)
    assert len(case.shapes) == 161
    assert sum(case.numels) == 25_557_032
    assert case.num_bytes == 4 * 25_557_032
    assert case.shapes[0] == (64, 3, 7, 7)


def test_bert_large_has_398_tensors_and_whole_it_has_335_million_parameters() -> None:
    whole = compare_cases.make_case("bert-large/1/1", FLOAT)
    assert len(whole.shapes) == 398
    # Embeddings, 24 layers, pooler, heads, from the paper's sizes: L = 24, H = 1024, A = 16.
    hidden, inner, words = 1024, 4096, 30522
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    embeddings = (words + 512 + 2) * hidden + 2 * hidden
    square = hidden * hidden + hidden
    heads = square + (square + 2 * hidden + words) + 2 * hidden + 2
    assert sum(whole.numels) == embeddings + 24 * layer + heads


def test_bert_large_is_scaled_to_the_memory_at_hand() -> None:
    def numel(available: int) -> int:
        return sum(compare_cases.make_case(compare_cases.bert_key(2, available), FLOAT).numels)

    sizes = [numel(gigabytes * 10**9) for gigabytes in (1000, 20, 5, 2, 0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 330e6 > sizes[1] > sizes[-1]


def test_a_size_is_one_tensor_of_so_many_bytes() -> None:
    for key, num_bytes in (("4K", 4096), ("256M", 2**28), ("1G", 2**30)):
        for dtype in compare_cases.DTYPES.values():
            case = compare_cases.make_case(key, dtype)
            assert case.num_bytes == num_bytes
            assert not case.is_set


@pytest.mark.parametrize("text", ["", "4", "K", "0K", "-4K", "4T", "4.5K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size must be like 4K or 64M, got "):
        compare_cases.size_bytes(text)


# ---- contents and what must come out ------------------------------------------------------------


def filled(case: compare_cases.Case, size: int) -> list[list[torch.Tensor]]:
    """Each rank's tensors before a call."""
    result = []
    for rank in range(size):
        tensors = [torch.full((numel,), math.nan, dtype=case.dtype) for numel in case.numels]
        compare_cases.Contents(case, rank, size).fill(tensors)
        result.append(tensors)
    return result


MIXED = ((3, 5), (1,), (70_000,), (65_521,), (2, 65_521))  # around and beyond a period


@pytest.mark.parametrize("dtype", compare_cases.DTYPES.values(), ids=compare_cases.DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_sums_in_a_row_are_exact_up_to_the_most_calls(size: int, dtype: torch.dtype) -> None:
    case = compare_cases.Case("mixed", dtype, MIXED)
    contents = compare_cases.Contents(case, 0, size)
    most = compare_cases.most_calls(size, dtype)
    assert most >= (50 if size in (2, 4) else 2)
    ranks = filled(case, size)
    sums = [torch.stack(tensors).double().sum(dim=0) for tensors in zip(*ranks, strict=True)]
    for calls in (1, most):
        # float64 has the room for the powers of two; for others the numbers stay whole and small.
        results = [total * float(size) ** (calls - 1) for total in sums]
        assert all(torch.equal(r.to(dtype).double(), r) for r in results), "representable"
        given = [result.to(dtype) for result in results]
        assert contents.count_wrong("sum", calls, given) == 0
        given[2][66_000] += given[2][66_000] / 2 + 1
        assert contents.count_wrong("sum", calls, given) == 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_adasum_is_compared_with_float64_element_by_element(size: int) -> None:
    case = compare_cases.Case("mixed", FLOAT, MIXED)
    contents = compare_cases.Contents(case, 0, size)
    ranks = filled(case, size)
    # Of whole tensors, while the contents know periods and how often they repeat.
    results = [adasum(tensors, tensors[0].numel())[0] for tensors in zip(*ranks, strict=True)]
    given = [result.float() for result in results]
    for calls in (1, 7):
        assert contents.count_wrong("adasum", calls, given) == 0
    given[3][65_520] = 1.001 * given[3][65_520] + 1e-3
    assert contents.count_wrong("adasum", 1, given) == 1
    average = [sum(tensors) / size for tensors in zip(*ranks, strict=True)]
    assert contents.count_wrong("average", 1, average) == 0
    assert contents.count_wrong("adasum", 1, average) > 0


def test_an_untouched_input_a_swapped_tensor_and_a_shifted_block_are_wrong() -> None:
    case = compare_cases.Case("two", FLOAT, ((40_000,), (40_000,)))
    contents = compare_cases.Contents(case, 0, 2)
    mine, theirs = filled(case, 2)
    assert contents.count_wrong("sum", 1, mine) > 40_000
    sums = [a + b for a, b in zip(mine, theirs, strict=True)]
    assert contents.count_wrong("sum", 1, sums) == 0
    assert contents.count_wrong("sum", 1, sums[::-1]) > 40_000
    assert contents.count_wrong("sum", 1, [t.roll(4096) for t in sums]) > 40_000


def test_short_vectors_of_two_ranks_are_never_opposite() -> None:
    """Adasum computes what cancels by another, slower way, which gradients hardly ever take."""
    case = compare_cases.make_case("tiny2000", FLOAT)
    for mine, theirs in zip(*filled(case, 2), strict=True):
        if mine.numel() < 16:
            assert float(torch.dot(mine, theirs)) > 0


# ---- statistics ---------------------------------------------------------------------------------


def test_a_ratio_is_the_median_over_the_rounds_of_each_rounds_ratio_of_medians() -> None:
    ours = [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    theirs = [[3.0, 3.0, 3.0], [8.0, 8.0, 8.0], [9.0, 9.0, 9.0]]
    ratio = compare_report.interval(ours, theirs, torch.div)
    assert ratio is not None
    assert ratio.value == 4.0  # of 3, 4 and 9
    assert ratio.low >= 3.0 / 9.0
    assert ratio.high == 9.0
    difference = compare_report.interval(ours, theirs, torch.sub)
    assert difference is not None
    assert difference.value == 6.0


def test_an_interval_covers_the_truth_and_shrinks_with_more_rounds() -> None:
    generator = torch.Generator().manual_seed(3)

    def noisy(mean: float, rounds: int) -> list[list[float]]:
        noise = torch.rand(rounds, 5, generator=generator, dtype=torch.float64)
        return (mean + 0.2 * (noise - 0.5)).tolist()

    widths = []
    for rounds in (5, 25):
        ratio = compare_report.interval(noisy(1.0, rounds), noisy(3.0, rounds), torch.div)
        assert ratio is not None
        assert ratio.low < 3.0 < ratio.high
        assert ratio.low <= ratio.value <= ratio.high
        widths.append(ratio.high - ratio.low)
    assert widths[1] < 0.7 * widths[0]


def test_what_disturbs_both_contenders_of_a_round_does_not_widen_their_ratio() -> None:
    ours = [[factor * (1 + 0.1 * i) for i in range(5)] for factor in (1.0, 3.0, 10.0)]
    theirs = [[2 * seconds for seconds in times] for times in ours]
    assert compare_report.interval(ours, theirs, torch.div) == pytest.approx((2.0, 2.0, 2.0))


def test_fewer_than_5_repeats_in_all_give_no_ratio() -> None:
    assert compare_report.interval([[1.0] * 2] * 2, [[1.0] * 2] * 2, torch.div) is None
    assert compare_report.interval([[1.0] * 5, []], [[1.0] * 5, []], torch.div) is not None


def test_a_repeat_is_near_or_far_if_both_round_trips_around_it_say_so() -> None:
    trips = [80.0, 90.0, 400.0, 450.0, 90_000.0, None, 100.0]
    assert compare_report.states(trips) == [
        "near", "unsteady", "far", "unsteady", "unsteady", "unsteady",
    ]  # fmt: skip


# ---- rows and targets ---------------------------------------------------------------------------


def job_line(mpi: str, seconds: dict[str, float], **changed: Any) -> dict[str, Any]:
    """What a job says of a case: every repeat took as long; 5 were near and 5 far."""
    return {
        "case": "resnet50", "dtype": "float32", "bytes": 102_228_128, "tensors": 161, "ranks": 2,
        "seconds": {name: [time] * 11 for name, time in seconds.items()},
        "calls": dict.fromkeys(seconds, 1), "wrong": dict.fromkeys(seconds, 0),
        "round_trips_ns": [80.0] * 6 + [400.0] * 6, "unavailable": {}, "choices": None,
        "missing": {"horovod": "not installed"}, "settings": {}, "shares_cores": False,
        "date": "2000-01-01T00:00:00+00:00", "commit": "0123456789abcdef",
        "machine": {"cpu": "a CPU", "usable_cores": 2}, "versions": {"torch": "2", "mpi": mpi},
        **changed,
    }  # fmt: skip


OURS = {"ours sum ordinary": 0.011, "ours adasum ordinary": 0.0165}
MPICH = {**OURS, "gloo sum flat": 0.1, "gloo sum packed": 0.15, "mpi sum flat": 0.055,
         "mpi sum packed": 0.08}  # fmt: skip
OPENMPI = {**OURS, "gloo sum flat": 0.1, "mpi sum flat": 0.022}


def test_a_row_has_the_best_form_of_each_peer_and_each_mpi_by_its_own_jobs() -> None:
    lines = [job_line("MPICH 5.0.2", MPICH), job_line("Open MPI 5.0.11", OPENMPI)]
    row, adasum_row = compare_report.make_rows(lines)
    assert (row["op"], row["form"], row["rounds"], row["repeats"]) == ("sum", "ordinary", 2, 22)
    assert row["states"] == {"near": 10 / 22, "far": 10 / 22, "unsteady": 2 / 22}
    ratios = {name: p["ratio"]["all"]["value"] for name, p in row["peers"].items() if "ratio" in p}
    assert ratios == pytest.approx({"gloo": 0.1 / 0.011, "MPICH": 5.0, "Open MPI": 2.0})
    assert row["peers"]["gloo"]["contender"] == "gloo sum flat"
    assert row["peers"]["horovod"] == {"unavailable": "not installed"}
    own = adasum_row["own"]["ours sum ordinary"]["ratio"]["near"]["value"]
    assert own == pytest.approx(1.5)
    assert row["versions"]["mpi"] == "MPICH 5.0.2, Open MPI 5.0.11"


def verdicts(row: dict[str, Any]) -> dict[tuple[str, str], tuple[str | None, str]]:
    """By limit and state: against whom, and the verdict."""
    return {
        (entry["target"], entry["state"]): (entry["against"], entry["verdict"])
        for entry in row["targets"]
    }


def test_targets_take_the_best_peer_and_near_and_far_repeats_by_themselves() -> None:
    mpich, openmpi = job_line("MPICH 5.0.2", MPICH), job_line("Open MPI 5.0.11", OPENMPI)
    for line in (mpich, openmpi):  # Adasum is slower where the cores are far
        line["seconds"]["ours adasum ordinary"] = [0.008] * 5 + [0.01] + [0.012] * 5
    sums, adasums = (verdicts(row) for row in compare_report.make_rows([mpich, openmpi]))
    (text,) = {text for text, _ in sums}
    assert text.startswith("sum, 64 MB and up")
    assert set(sums.values()) == {("Open MPI", "missed")}, "2 of 3 times"
    of_mpi = {s: v for (text, s), v in adasums.items() if "MPI's sum" in text}
    # Near: 22 / 8 is more than 2.5; far: 22 / 12 is less than 2.
    assert of_mpi == {"near": ("Open MPI", "met"), "far": ("Open MPI", "missed")}
    of_horovod = {v for (text, _), v in adasums.items() if "Horovod" in text}
    assert of_horovod == {(None, "not measured")}


def test_a_target_without_near_repeats_is_not_measured_there() -> None:
    line = job_line("MPICH 5.0.2", MPICH, round_trips_ns=[400.0] * 12)
    (row, _) = compare_report.make_rows([line])
    found = {state: verdict for (_, state), (_, verdict) in verdicts(row).items()}
    assert found == {"near": "not measured", "far": "met"}


def test_other_ranks_and_types_have_ratios_but_no_targets() -> None:
    for change in ({"ranks": 4}, {"dtype": "bfloat16"}, {"case": "4M", "ranks": 4}):
        for row in compare_report.make_rows([job_line("MPICH 5.0.2", MPICH, **change)]):
            assert row["targets"] == []
            assert row["peers"]["MPICH"]["ratio"]["all"] is not None


def test_the_latency_target_is_a_difference_in_seconds_to_the_faster_mpi() -> None:
    seconds = {"ours sum ordinary": 9e-6, "gloo sum flat": 6e-4}
    lines = [
        job_line(name, {**seconds, "mpi sum flat": theirs}, case="4K", bytes=4096, tensors=1)
        for name, theirs in (("MPICH 5.0.2", 4e-6), ("Open MPI 5.0.11", 2e-6))
    ]
    (row,) = compare_report.make_rows(lines)
    near = next(entry for entry in row["targets"] if entry["state"] == "near")
    assert near["against"] == "Open MPI"
    assert near["found"]["value"] == pytest.approx(7e-6)
    assert near["verdict"] == "met"
    assert "at most 8 us" in tables.targets([row])
    assert "+7.0 us [+7.0, +7.0]" in tables.peers([row])


@pytest.mark.parametrize(
    ("low", "value", "high", "is_least", "expected"),
    [
        (2.1, 2.5, 3.0, True, "met"),
        (1.9, 2.5, 3.0, True, "perhaps met"),
        (1.5, 1.9, 2.1, True, "perhaps missed"),
        (1.5, 1.7, 1.9, True, "missed"),
        (1.5, 1.7, 1.9, False, "met"),
        (1.9, 2.1, 2.2, False, "perhaps missed"),
        (2.1, 2.2, 2.3, False, "missed"),
    ],
)
def test_a_verdict_tells_what_is_sure(
    low: float, value: float, high: float, is_least: bool, expected: str
) -> None:
    found = {"low": low, "value": value, "high": high}
    assert compare_targets.verdict(found, 2.0, is_least) == expected


def test_a_table_names_form_ratio_interval_share_of_near_and_what_is_missing() -> None:
    line = job_line("MPICH 5.0.2", MPICH, unavailable={"mpi sum flat": "no"})
    titles, _, first, second = tables.peers(compare_report.make_rows([line])).splitlines()
    assert titles.split(" | ")[9:] == [
        "ours (ms)", "gloo (ms), / ours", "MPICH (ms), / ours", "horovod (ms), / ours",
        "/ our own |",
    ]  # fmt: skip
    assert first == (
        "| resnet50 | 161 | 102 MB | 2 | float32 | sum ordinary | 11 | 45 % (far 45 %) | 0 | 11"
        " | 100, 9.09 [9.09, 9.09] flat; packed 150 | 55, 5.00 [5.00, 5.00] flat; packed 80"
        " | not installed |  |"
    )
    assert second.endswith("| 1.50 [1.50, 1.50] sum ordinary |")


# ---- whole runs ---------------------------------------------------------------------------------


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
    import torch
    if not hasattr(hvd, "empty_shared"):
        hvd.empty_shared = lambda shape, dtype: torch.empty(shape, dtype=dtype)
    hvd.shared_memory_choices = lambda: {"stores": "as the test says"}
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
    (tmp_path / "horovod" / "__init__.py").write_text("")
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
    assert '{"stores": "as the test says"}' in result.stdout
    rows = {(r["op"], r["form"]): r for r in map(json.loads, file.read_text().splitlines())}
    for form in ("ordinary", "shared"):
        assert f"4K float32, 2 ranks, ours adasum {form}: " in result.stdout
        assert f"ours sum {form}: " not in result.stdout
        assert rows["adasum", form]["wrong"] > 0 == rows["sum", form]["wrong"]
    for (op, _), row in rows.items():
        assert row["choices"] == {"stores": "as the test says"}
        assert row["peers"]["horovod"]["contender"] == f"horovod {op} each"
        assert row["peers"]["horovod"]["ratio"]["all"]["value"] > 0
        assert row["peers"]["horovod"]["wrong"] == 0
