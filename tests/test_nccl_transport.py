"""NcclCommunicator on the emulated CUDA runtime, over the fake NCCL of tests/cuda_emulation/nccl.

Each test runs a program of nccl_programs.py in a process of its own, because NCCL is searched for
once per process. Oracle: NumPy on exact integers, where the program says nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cpp_build

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
PROGRAMS = ROOT / "tests" / "nccl_programs.py"
SIZES = [1, 2, 3, 4, 5]
LIMIT = 120.0  # seconds for a program that takes one


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled libraries."""
    sources = [EMULATION, ROOT / "csrc" / "transports", ROOT / "csrc" / "base"]
    project = EMULATION / "nccl" / "testing"
    return cpp_build.build(request, tmp_path_factory, "nccl-testing", project, sources)


class Programs:
    """Starts programs, with the variables that were set."""

    def __init__(self, built: Path) -> None:
        self.fake = built / "fake_nccl" / "libnccl.so.2"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("NCCL_")
        } | {
            "NCCL_TESTING": str(built),
            "ADAREDUCE_NCCL_SO": str(self.fake),
            "CUDA_EMULATION_DEVICES": "8",
        }

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(PROGRAMS), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def run(self, *arguments: object) -> tuple[str, str]:
        """What it wrote to stdout and stderr; fails unless it ended well."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"{arguments} hangs:\n{out}\n{err}", pytrace=False)
        if process.returncode != 0:
            pytest.fail(f"{arguments}: status {process.returncode}\n{out}\n{err}", pytrace=False)
        return out, err

    def status(self, *arguments: object) -> tuple[int, str, str]:
        version, path, why_not = self.run(*arguments)[0].split("\n")[:3]
        return int(version), path, why_not


@pytest.fixture
def programs(built: Path) -> Programs:
    return Programs(built)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("program", ["reductions", "moves", "exchanges", "halving", "groups"])
def test_results_are_those_of_numpy(programs, program, size):
    _, err = programs.run(program, size)
    assert "fake NCCL" not in err


@pytest.mark.parametrize("size", [2, 3, 5])
def test_wrong_arguments_are_refused_and_the_communicator_works_on(programs, size):
    programs.run("mistakes", size)


def test_a_refusal_of_nccl_names_rank_call_words_and_line(programs):
    programs.run("refused_by_nccl")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["count", "op", "call", "root", "bytes"])
def test_ranks_that_differ_are_found_out_by_the_fake(programs, kind, size):
    _, err = programs.run("mismatch", size, kind)
    assert "fake NCCL: rank" in err


@pytest.mark.parametrize("size", [2, 3])
def test_an_abort_ends_a_launch_that_waits_for_a_peer(programs, size):
    programs.run("abort_of_a_launch", size)


def test_an_abort_ends_a_call_that_waits_for_a_peer(programs):
    programs.run("abort_of_a_call")


def test_an_abort_drops_an_open_group(programs):
    programs.run("abort_in_a_group")


def test_a_rank_that_has_given_up_waits_for_nobody(programs):
    _, err = programs.run("abandoned")
    assert "fake NCCL" not in err


@pytest.mark.parametrize("how", ["destroy", "abort"])
def test_a_graph_that_stays_is_not_waited_for(programs, how):
    programs.environment["FAKE_NCCL_GRAPHS_STAY"] = "1"
    programs.run("graphs_stay", 2, how)


def test_an_asynchronous_error_is_reported_in_words(programs):
    programs.run("asynchronous_error")


def test_a_capture_of_another_thread_goes_on(programs):
    programs.run("capture_elsewhere")


@pytest.mark.parametrize(
    ("version", "setting", "part"),
    [
        (22809, "1", "NCCL 2.28.9 refuses: give every rank a GPU of its own, or use the peer path"),
        (23007, "0", "2.30.7 refuses unless NCCL_MULTI_RANK_GPU_ENABLE=1 is set"),
        (23007, "1", "works"),
    ],
)
def test_several_ranks_on_one_gpu_get_a_sentence(programs, version, setting, part):
    programs.environment |= {
        "FAKE_NCCL_VERSION": str(version),
        "NCCL_MULTI_RANK_GPU_ENABLE": setting,
    }
    programs.run("one_gpu", part)


def start_job(programs: Programs, size: int) -> list[subprocess.Popen[str]]:
    """Processes that have all done an all-reduce together."""
    ranks = [programs.start("rank_of_a_job", 0, size, "")]
    assert ranks[0].stdout is not None
    unique_id = ranks[0].stdout.readline().strip()
    ranks += [programs.start("rank_of_a_job", rank, size, unique_id) for rank in range(1, size)]
    for rank in ranks:
        assert rank.stdout is not None
        line = rank.stdout.readline()
        if line != "ready\n":
            rank.kill()
            pytest.fail(f"{line}{rank.communicate()}", pytrace=False)
    return ranks


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_can_be_processes(programs, size):
    ranks = start_job(programs, size)
    answers = []
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    for rank in ranks:
        out, err = rank.communicate(timeout=LIMIT)
        answers.append((rank.returncode, out, err))
    assert answers == [(0, "\n", "")] * size


def test_a_killed_peer_is_an_asynchronous_error_and_nobody_waits_for_it(programs):
    survivor, victim, other = start_job(programs, 3)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=LIMIT)
    out, err = survivor.communicate("go\n", timeout=LIMIT)
    assert survivor.returncode == 0, err
    assert "rank 0 of 3: remote error: rank 1 is gone" in out
    out, err = other.communicate("go\n", timeout=LIMIT)
    assert other.returncode == 0, err
    assert "remote error" in out


def test_the_library_is_the_one_that_the_variable_names(programs):
    version, path, why_not = programs.status("status")
    assert (version, path, why_not) == (23007, str(programs.fake.resolve()), "")


def test_the_library_that_is_loaded_already_comes_before_all_others(programs, tmp_path):
    del programs.environment["ADAREDUCE_NCCL_SO"]
    shutil.copy(programs.fake, tmp_path / "libnccl.so.2")
    version, path, _ = programs.status("status_with_loaded", tmp_path / "libnccl.so.2")
    assert (version, path) == (23007, str(tmp_path / "libnccl.so.2"))


def test_the_search_path_leads_to_the_library_of_a_wheel(programs, tmp_path):
    del programs.environment["ADAREDUCE_NCCL_SO"]
    shutil.copy(programs.fake, tmp_path / "libnccl.so.2")
    version, path, _ = programs.status("status_with_search_path", tmp_path)
    assert (version, path) == (23007, str(tmp_path / "libnccl.so.2"))


def test_without_nccl_the_status_says_why_not(programs):
    del programs.environment["ADAREDUCE_NCCL_SO"]
    version, path, why_not = programs.status("status")
    if version:
        pytest.skip(f"this machine has an NCCL: {path}")
    assert path == ""
    assert "no NCCL was found" in why_not
    assert "nvidia-nccl-cu12" in why_not
    assert "ADAREDUCE_NCCL_SO" in why_not
    programs.run("make_without_nccl")


def test_a_missing_library_that_the_variable_names_is_not_replaced(programs, tmp_path):
    programs.environment["ADAREDUCE_NCCL_SO"] = str(tmp_path / "none.so")
    version, _, why_not = programs.status("status_with_search_path", programs.fake.parent)
    assert version == 0
    assert f"ADAREDUCE_NCCL_SO is {tmp_path / 'none.so'}: " in why_not


def test_another_library_than_nccl_is_refused(programs, built):
    other = next(built.glob("emulation/libcuda_emulation.so"))
    programs.environment["ADAREDUCE_NCCL_SO"] = str(other)
    version, _, why_not = programs.status("status")
    assert version == 0
    assert "it lacks ncclGetVersion" in why_not


def test_an_old_library_is_refused(programs):
    programs.environment["FAKE_NCCL_VERSION"] = "21701"
    version, path, why_not = programs.status("status")
    assert version == 0
    assert path == str(programs.fake.resolve())
    assert why_not == f"{path}: it is NCCL 2.17.1, and 2.18.0 or later is needed"


def test_two_libraries_in_one_process_are_refused(programs, tmp_path):
    del programs.environment["ADAREDUCE_NCCL_SO"]
    copies = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        copies.append(tmp_path / folder / "libnccl.so.2")
        shutil.copy(programs.fake, copies[-1])
    version, _, why_not = programs.status("status_with_loaded", *copies)
    assert version == 0
    assert "there are 2 NCCL libraries in this process" in why_not
    assert all(str(copy) in why_not for copy in copies)


def test_a_second_library_is_not_loaded_beside_the_first(programs, tmp_path):
    shutil.copy(programs.fake, tmp_path / "libnccl.so.2")
    version, _, why_not = programs.status("status_with_loaded", tmp_path / "libnccl.so.2")
    assert version == 0
    assert f"but {tmp_path / 'libnccl.so.2'} is in this process already" in why_not


def test_parts_of_the_search_that_need_no_library(programs):
    programs.run("pure_parts")
