"""benchmarks/training_step.py: what it calls hidden, and that it runs. Nothing looks at times."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import mpirun
from adareduce.bench import presets

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402
import training_step  # noqa: E402

needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")


def steps(alone: float, overlapped: float, not_overlapped: float) -> dict[str, torch.Tensor]:
    """Iterations that all took as long."""
    seconds = {"alone": alone, "overlapped": overlapped, "not overlapped": not_overlapped}
    return {name: torch.full((9,), value).double() for name, value in seconds.items()}


@pytest.mark.parametrize(("overlapped", "share"), [(1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (2.5, -0.5)])
def test_hidden_is_the_share_of_the_added_time_that_overlap_takes_away(
    overlapped: float, share: float
) -> None:
    found = training_step.hidden_share(steps(1.0, overlapped, 2.0))
    assert found == (share, share, share)


def test_the_interval_of_noisy_steps_covers_the_share() -> None:
    generator = torch.Generator().manual_seed(5)
    noise = 0.1 * torch.rand(3, 100, generator=generator, dtype=torch.float64)
    seconds = dict(zip(("alone", "overlapped", "not overlapped"), noise, strict=True))
    seconds["overlapped"] += 0.3
    seconds["not overlapped"] += 1.0
    found = training_step.hidden_share(seconds)
    assert found.low < 0.7 < found.high
    assert found.high - found.low < 0.2


def test_the_network_has_the_gradients_of_resnet50() -> None:
    parameters = list(training_step.resnet50().parameters())
    assert len(parameters) == 161
    shapes = sorted(tuple(p.shape) for p in parameters)
    assert shapes == sorted(presets.resnet50())


@needs_mpi
def test_two_ranks_train_and_reduce_the_same_requests_in_each_way(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    script = str(ROOT / "benchmarks" / "training_step.py")
    options = ["--batch", "2", "--pixels", "32", "--iters", "5", "--json", str(file)]
    result = mpirun.run(2, [sys.executable, script, *options], limit=240.0)
    assert result.returncode == 0, str(result)
    assert result.left_behind == []
    row = json.loads(file.read_text())
    medians = row["median_seconds"]
    assert set(medians) >= {
        "alone", "overlapped", "not overlapped", "adascale", "adasum", "communication",
    }  # fmt: skip
    assert all(map(math.isfinite, medians.values()))
    added = medians["not overlapped"] - medians["alone"]
    saved = medians["not overlapped"] - medians["overlapped"]
    assert math.isclose(row["hidden"] * added, saved, rel_tol=1e-9, abs_tol=1e-12)
    assert 0 <= row["reduced_during_backward"] <= 1
    assert "communication hidden" in result.out[0]
    assert result.out[1] == ""
    last = tables.steps([row]).splitlines()[-1]
    assert f"| {1e3 * medians['communication']:.0f} |" in last
