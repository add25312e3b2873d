"""Runs tests/mpi on 1 ... 5 ranks: one job for each number, since starting one costs seconds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import mpirun
from emulated_gpu import EMULATED_CUDA, WHY_NOT_EMULATED

ROOT = Path(__file__).resolve().parent.parent
needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
_LIMIT_SECONDS = 480.0
_NO_TESTS = 5  # pytest's status when everything was deselected


MPI_TESTS = ROOT / "tests" / "mpi"
# Where the device of a tensor makes a difference.
_FILES_FOR_GPUS = ("allreduce", "adasum", "broadcast_allgather", "more_collectives", "objects",
                   "disagreements", "process_sets")  # fmt: skip
# But for what overlaps on purpose: the first call of a process set with CUDA tensors blocks.
_OVERLAPPING = "test_overlapping_sets_may_interleave_differently_on_their_ranks"
# NCCL multiplies by 1 / size before it adds, in an order of its own: bits differ where that rounds.
# tests/mpi/test_cuda_collectives.py has the bounds.
_OF_OUR_SUMS = (
    "test_allreduce_adds_in_rank_order",
    "test_every_dtype_is_reduced_by_every_op",
    "test_statistics_of_integers_are_exact",
)


def run_suite(
    num_ranks: int,
    *arguments: str,
    files: Sequence[Path] = (MPI_TESTS,),
    variables: Mapping[str, str] | None = None,
) -> None:
    pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short"]
    with mpirun.Job(
        num_ranks,
        [*pytest_command, "--rootdir", str(ROOT), *arguments, *map(str, files)],
        variables=variables,
    ) as job:
        result = job.wait(_LIMIT_SECONDS)
    assert result.returncode == 0, str(result)
    assert result.left_behind == []
    assert " passed" in result.out[0], str(result)
    assert all(out == "" for out in result.out[1:]), "only rank 0 prints the report"
    print(result.out[0])


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(mpirun.flavour() == "Open MPI", reason="Open MPI runs the short round")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_the_suite_passes_on_ranks(num_ranks: int) -> None:
    run_suite(num_ranks)


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(mpirun.flavour() == "Open MPI", reason="Open MPI runs the short round")
def test_collectives_pass_on_ranks_without_shared_memory() -> None:
    # What several nodes have: everything travels by message.
    names = [*_FILES_FOR_GPUS, "adascale", "bucket_views", "handles", "large_messages",
             "life_cycle", "shared_tensors"]  # fmt: skip
    files = [MPI_TESTS / f"test_{name}.py" for name in names]
    run_suite(3, files=files, variables={"ADAREDUCE_SHARED_MEMORY": "off"})


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(mpirun.flavour() == "Open MPI", reason="Open MPI runs the short round")
def test_collectives_pass_on_ranks_with_two_workers() -> None:
    names = ("adasum", "adascale", "allreduce", "broadcast_allgather", "large_messages",
             "process_sets", "shared_tensors")  # fmt: skip
    files = [MPI_TESTS / f"test_{name}.py" for name in names]
    run_suite(2, files=files, variables={"ADAREDUCE_WORKERS": "2"})


@needs_mpi
@pytest.mark.slow
@pytest.mark.openmpi_round
@pytest.mark.skipif(mpirun.flavour() != "Open MPI", reason="the whole suite runs with MPICH")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_short_round_passes_on_ranks(num_ranks: int) -> None:
    run_suite(num_ranks, "-m", "openmpi_round")


def run_on_gpus(
    num_ranks: int, mode: str, names: Sequence[str] = _FILES_FOR_GPUS, **variables: str
) -> None:
    """The tests of collectives with tensors that count as a GPU's: tests/emulated_gpu.py."""
    files = [MPI_TESTS / f"test_{name}.py" for name in names]
    variables["ADAREDUCE_TEST_DEVICE"] = mode
    rounds = variables.get("ADAREDUCE_CUDA_PATH") == "nccl" and num_ranks not in (1, 2, 4)
    without = [_OVERLAPPING, *(_OF_OUR_SUMS if rounds else ())]
    run_suite(num_ranks, "-k", f"not ({' or '.join(without)})", files=files, variables=variables)


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(mpirun.flavour() == "Open MPI", reason="Open MPI runs the short round")
@pytest.mark.parametrize("mode", ["staged", "stand-in"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_collectives_pass_on_ranks_with_gpus(num_ranks: int, mode: str) -> None:
    run_on_gpus(num_ranks, mode)


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(not EMULATED_CUDA, reason=WHY_NOT_EMULATED)
@pytest.mark.parametrize(
    ("num_ranks", "path"),
    [(1, "auto"), (2, "auto"), (2, "peer"), (3, "peer"), (5, "peer"), (2, "nccl"), (3, "nccl"),
     (5, "nccl"), (2, "staged")],
)  # fmt: skip
def test_collectives_pass_on_ranks_with_emulated_kernels(num_ranks: int, path: str) -> None:
    # What was agreed before is launched at once and breaks the process set where ranks disagree:
    # test_device_calls.py is about that.
    names = [name for name in _FILES_FOR_GPUS if name != "disagreements"]
    nccl = Path(EMULATED_CUDA).parent / "tests/cuda_emulation/nccl/libnccl.so.2"
    variables = {
        "ADAREDUCE_CUDA_PATH": path,
        "ADAREDUCE_NCCL_SO": str(nccl),
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    }
    run_on_gpus(num_ranks, "emulated", names, **variables)
    files = [MPI_TESTS / "test_cuda_collectives.py"]
    if path != "staged":
        run_suite(num_ranks, "-k", "emulated", files=files, variables=variables)


_SAMPLE = """
import os, pytest, torch
import adareduce.torch as hvd

def test_first(rank):
    print("printed by rank", rank)
    assert rank != 1, "only rank 1 fails"
    hvd.allreduce(torch.ones(3))  # waits for rank 1, which will not come

def test_second(rank, size):
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size

def test_third(rank):
    if rank == 0:
        pytest.skip("only on rank 0")
"""


@pytest.fixture
def sample_suite(tmp_path: Path) -> Path:
    folder = tmp_path / "mpi"
    folder.mkdir()
    for file in ("conftest.py", "all_ranks.py"):
        (folder / file).symlink_to(ROOT / "tests" / "mpi" / file)
    return folder


def run_sample(folder: Path, code: str, **variables: str) -> mpirun.Result:
    (folder / "test_sample.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v"]
    command += ["--rootdir", str(folder), str(folder)]
    return mpirun.run(3, command, limit=120.0, variables=variables)


@needs_mpi
@pytest.mark.openmpi_round
def test_a_failure_of_one_rank_fails_the_test_everywhere_and_spares_the_next(
    sample_suite: Path,
) -> None:
    result = run_sample(sample_suite, _SAMPLE)
    report = result.out[0]
    assert result.returncode != 0, str(result)
    assert "test_first FAILED" in report, str(result)
    assert "test_second PASSED" in report, str(result)
    assert "test_third FAILED" in report, str(result)
    assert "rank 1 of 3: failed" in report, str(result)
    assert "only rank 1 fails" in report, str(result)
    assert "printed by rank 1" in report, str(result)
    assert "rank 0 of 3: failed" in report, str(result)
    assert "must all skip a test or none" in report, str(result)
    assert result.out[1:] == ["", ""]


@needs_mpi
def test_a_rank_that_hangs_shows_its_stack_and_ends_the_job(sample_suite: Path) -> None:
    code = "import time\ndef test_hangs(rank):\n    while rank == 2: time.sleep(0.1)\n"
    result = run_sample(sample_suite, code, ADAREDUCE_TEST_STACKS_AFTER_SECONDS="3")
    assert not result.timed_out, str(result)
    assert result.returncode != 0
    assert "test_hangs" in result.err[2], str(result)
    assert "Thread 0x" in result.err[2], str(result)
    assert result.left_behind == []
