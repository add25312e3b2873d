"""benchmarks/compare_report.py and compare_targets.py: ratios, intervals, rows and verdicts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compare_lines import MPICH, OPENMPI, job_line

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_report  # noqa: E402
import compare_targets  # noqa: E402
import tables  # noqa: E402

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
    trips = [80.0, 90.0, 400.0, 450.0, 90_000.0, None, 100.0, 50.0, 51.0]
    assert compare_report.states(trips) == [
        "near", "unsteady", "far", "unsteady", "unsteady", "unsteady", "unsteady", "one core",
    ]  # fmt: skip


# ---- rows and targets ---------------------------------------------------------------------------


def test_a_row_has_the_best_form_of_each_peer_and_each_mpi_by_its_own_jobs() -> None:
    lines = [job_line("MPICH 5.0.2", MPICH), job_line("Open MPI 5.0.11", OPENMPI)]
    row, adasum_row = compare_report.make_rows(lines)
    assert (row["op"], row["form"], row["rounds"], row["repeats"]) == ("sum", "ordinary", 2, 22)
    assert row["states"] == {
        "near": 10 / 22,
        "far": 10 / 22,
        "one core": 0,
        "unsteady": 2 / 22,
    }
    ratios = {name: p["ratio"]["all"]["value"] for name, p in row["peers"].items() if "ratio" in p}
    assert ratios == pytest.approx({"gloo": 0.1 / 0.011, "MPICH": 5.0, "Open MPI": 2.0})
    assert row["peers"]["gloo"]["contender"] == "gloo sum flat"
    assert row["peers"]["horovod"] == {"unavailable": "not installed"}
    own = adasum_row["own"]["ours sum ordinary"]["ratio"]["near"]["value"]
    assert own == pytest.approx(1.5)
    assert row["versions"]["mpi"] == "MPICH 5.0.2, Open MPI 5.0.11"


def test_a_job_that_had_a_library_tells_why_it_was_not_measured() -> None:
    of_mpich = job_line("MPICH 5.0.2", MPICH, missing={"horovod": "not installed"})
    of_openmpi = job_line(
        "Open MPI 5.0.11", OPENMPI, missing={}, unavailable={"horovod sum each": "no such type"}
    )
    for lines in ([of_mpich, of_openmpi], [of_openmpi, of_mpich]):
        row, _ = compare_report.make_rows(lines)
        assert row["peers"]["horovod"] == {"unavailable": "no such type"}


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


def test_too_few_repeats_show_times_and_no_ratio() -> None:
    line = job_line("MPICH 5.0.2", MPICH, round_trips_ns=[80.0] * 3)
    line["seconds"] = {name: times[:2] for name, times in line["seconds"].items()}
    (row, _) = compare_report.make_rows([line])
    assert "| 100, no ratio flat; packed 150 |" in tables.peers([row])
    assert {entry["verdict"] for entry in row["targets"]} == {"not measured"}


def test_each_processor_has_a_table_of_its_own() -> None:
    other = {"cpu": "another CPU", "usable_cores": 2}
    (row, _), (row_of_other, _) = (
        compare_report.make_rows([job_line("MPICH 5.0.2", MPICH, **changed)])
        for changed in ({}, {"machine": other})
    )
    table = tables.TABLES["peers"]([row, row_of_other])
    first, second = table.split("**another CPU, 2 cores**")
    assert first.startswith("**a CPU, 2 cores**")
    assert first.count("| resnet50 |") == second.count("| resnet50 |") == 1
    assert tables.TABLES["peers"]([row]) == tables.peers([row])  # nobody to be told from
    keys = {tables.field(r, "processor") for r in (row, row_of_other)}
    assert keys == {"a CPU, 2 cores", "another CPU, 2 cores"}


def test_no_target_is_met_while_a_peer_of_the_row_has_too_few_repeats_of_that_state() -> None:
    far = [400.0] * 12
    of_mpich = job_line("MPICH 5.0.2", MPICH)
    of_openmpi = job_line("Open MPI 5.0.11", OPENMPI, round_trips_ns=far)
    fast = {**of_mpich["seconds"], "mpi sum flat": [0.9] * 11}
    row, _ = compare_report.make_rows([{**of_mpich, "seconds": fast}, of_openmpi])
    found = {(t["target"][:3], t["state"]): t["verdict"] for t in row["targets"]}
    assert found["sum", "near"] == "not measured"  # Open MPI was never near
    assert found["sum", "far"] == "missed"  # by Open MPI
