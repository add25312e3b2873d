"""As tests/mpi: every rank runs the same tests, outcomes are gathered. Each rank uses a GPU.

With fewer GPUs than ranks they share: rank r uses GPU r modulo their number.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

_MPI = Path(__file__).resolve().parents[2] / "mpi"
# Their inputs.py and all_ranks.py; our trace_of_step.py.
sys.path += [str(_MPI), str(Path(__file__).resolve().parents[1])]

_spec = importlib.util.spec_from_file_location("adareduce_tests_mpi_conftest", _MPI / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_gathering = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_gathering)

ranks, rank, size = _gathering.ranks, _gathering.rank, _gathering.size
if not _gathering.is_under_mpirun:
    collect_ignore_glob = ["test_*.py"]  # tests/gpu/test_ranks.py starts them


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    _gathering.pytest_configure(config)
    if _gathering.is_under_mpirun and torch.cuda.is_available():
        import adareduce.torch as hvd

        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
