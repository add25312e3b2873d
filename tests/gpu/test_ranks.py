"""Runs tests/gpu/mpi under mpirun: ranks that share a GPU or have one each.

ADAREDUCE_TEST_RANKS (default "2 4") says how many, ADAREDUCE_TEST_WAYS which of ways.WAYS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import device
import pytest
import ways

import mpirun

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_SECONDS = float(os.environ.get("ADAREDUCE_TEST_LIMIT_SECONDS", "300"))
_RANKS = [int(word) for word in os.environ.get("ADAREDUCE_TEST_RANKS", "2 4").split()]

_WANTED = os.environ.get("ADAREDUCE_TEST_WAYS", "auto peer").split()


@pytest.mark.slow
@pytest.mark.skipif(
    mpirun.flavour() is None and not os.environ.get("ADAREDUCE_TEST_NEEDS_GPU"),
    reason="this build has no MPI",
)
@pytest.mark.parametrize("way", _WANTED)
@pytest.mark.parametrize("num_ranks", _RANKS)
def test_the_suite_passes_on_ranks(num_ranks: int, way: str) -> None:
    if device.is_emulated():
        pytest.skip("torch has no CUDA tensors here")
    command = [*ways.EACH_RANK, sys.executable, "-m", "pytest"]
    command += ["-p", "no:cacheprovider", "-q", "--tb=short", "--rootdir", str(ROOT)]
    result = mpirun.run(
        num_ranks,
        [*command, str(ROOT / "tests" / "gpu" / "mpi")],
        limit=_LIMIT_SECONDS,
        variables={"CUDA_DEVICE_MAX_CONNECTIONS": "32", **ways.WAYS[way]},
    )
    print(result)
    assert result.returncode == 0, str(result)
    assert result.left_behind == []
    assert " passed" in result.out[0], str(result)
