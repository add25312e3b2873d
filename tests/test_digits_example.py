"""The digits example: what it prints and writes, and that methods differ as they should."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

import mpirun

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = [sys.executable, str(ROOT / "examples" / "train_digits.py")]
RESULTS = ROOT / "benchmarks" / "results" / "digits.jsonl"
needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")


def run(num_ranks: int, *command: str) -> str:
    """What rank 0 prints; the others print nothing."""
    result = mpirun.run(num_ranks, command, limit=180.0)
    assert result.returncode == 0, str(result)
    assert all(out == "" for out in result.out[1:]), str(result)
    return result.out[0]


def records_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# One job for many trainings: starting one costs seconds.
_TRAININGS = """
import json, sys
sys.path.insert(0, {folder!r})
from digits_data import METHODS, Settings
from digits_methods import train
hvd.init()
torch.set_num_threads(1)
small = {{method: Settings(method, 4, epochs=1, reference_steps=200) for method in METHODS}}
large = {{f"{{method}} at 64": Settings(method, 64) for method in ("sum", "average", "adasum")}}
found = {{
    name: train(settings, lambda *_: None).accuracy for name, settings in (small | large).items()
}}
if hvd.rank() == 0:
    say(json.dumps(found))
"""


@pytest.fixture(scope="module")
def accuracies() -> dict[str, float]:
    folder = str(ROOT / "examples")
    result: dict[str, float] = json.loads(run(2, *mpirun.script(_TRAININGS.format(folder=folder))))
    return result


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "sum", "adasum", "adascale", "lsw"])
def test_each_method_trains_on_two_ranks(method: str, accuracies: dict[str, float]) -> None:
    # Oracle: guessing one of ten digits is right in 10 % of the cases.
    assert accuracies[method] > 0.6


@needs_mpi
@pytest.mark.slow
def test_at_64_workers_adasum_keeps_the_rate_of_one_and_the_others_cannot(
    accuracies: dict[str, float],
) -> None:
    # Oracle: docs/large_batch.md. The gaps are far wider than the spread between seeds.
    assert accuracies["adasum at 64"] > 0.95
    assert 0.6 < accuracies["average at 64"] < 0.9
    assert accuracies["sum at 64"] < 0.6


@needs_mpi
@pytest.mark.slow
def test_a_single_training_says_its_settings_and_its_accuracy() -> None:
    text = run(2, *EXAMPLE, "--reduce", "adascale", "--steps", "100", "--workers-per-rank", "3")
    assert "2 ranks x 3 workers, Settings(method='adascale', workers=6, batch=8, rate=0.2" in text
    assert "gain" in text
    accuracy = float(text.split("test accuracy ")[1].split("%")[0])
    assert 50.0 < accuracy <= 100.0, text


@needs_mpi
@pytest.mark.slow
def test_workers_give_the_same_training_on_one_rank_as_on_two(tmp_path: Path) -> None:
    # Oracle: the other number of ranks. Sums are added in another order, so not bit for bit; Adasum
    # of a power of two of workers has the same tree.
    files = [tmp_path / f"{ranks}.jsonl" for ranks in (1, 2)]
    for ranks, file in zip((1, 2), files, strict=True):
        text = run(ranks, *EXAMPLE, "--quick", "--workers", "16", "--json", str(file))
        assert "mean +- standard deviation" in text
    for one, two in zip(*map(records_of, files), strict=True):
        assert (one["method"], one["workers"]) == (two["method"], two["workers"])
        assert (one["ranks"], two["ranks"]) == (1, 2)
        assert two["steps"] == pytest.approx(one["steps"], abs=1)
        assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.02)
        assert two["gains"][:10] == pytest.approx(one["gains"][:10], rel=1e-3)
        assert len(two["orthogonality"]) == len(one["orthogonality"])
        for mine, theirs in zip(two["orthogonality"][:3], one["orthogonality"][:3], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)


def rows() -> dict[tuple[str, int, float, bool], list[float]]:
    """Accuracies of the committed results, by method, workers, rate and whether stretched."""
    result: dict[tuple[str, int, float, bool], list[float]] = {}
    for record in records_of(RESULTS):
        key = (
            record["method"],
            record["workers"],
            record["rate"],
            record["num_steps"] is not None,
        )
        result.setdefault(key, []).append(100 * record["accuracy"])
    return result


def test_the_committed_results_are_of_three_seeds_and_in_the_order_that_is_claimed() -> None:
    # Oracle: what docs/large_batch.md says in words, the admission included.
    found = {key: statistics.mean(values) for key, values in rows().items()}
    assert all(len(values) >= 3 for values in rows().values())
    assert found["adasum", 64, 0.5, False] > found["average", 64, 0.5, False] + 10
    assert found["average", 64, 0.5, False] > found["sum", 64, 0.5, False] + 10
    assert found["adascale", 64, 0.2, False] > found["lsw", 64, 0.2, False] + 5
    assert found["adascale", 64, 0.2, False] > found["lsw", 64, 0.2, True] + 5
    assert found["sum", 64, 0.1, False] > found["adasum", 64, 0.1, False] + 1


def test_tables_in_documents_are_those_of_the_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Oracle: the JSON lines.
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    digits_table = importlib.import_module("digits_table")
    text = (ROOT / "docs" / "large_batch.md").read_text()
    for name in ("digits.jsonl", "digits_tanh.jsonl", "digits_raw_pixels.jsonl"):
        records = records_of(RESULTS.parent / name)
        assert digits_table.as_markdown(digits_table.summarise(records)) in text
