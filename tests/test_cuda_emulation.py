"""The stand-in for the CUDA runtime does what CUDA documents, and sees mistakes.

Its oracle is written in C++: tests/cuda_emulation/self_test, one process for each case, where exact
integers and CUDA's own error codes are expected.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

import cpp_build
from cuda_build import EMULATION, cuda_emulation

__all__ = ["cuda_emulation"]
RUN_LIMIT = 60  # seconds

NAMES = [
    name
    for file in sorted((EMULATION / "self_test").glob("*_cases.cu"))
    for name in re.findall(r'^ *(?:const Case \w+\[\] = \{)?\{"(\w+)",', file.read_text(), re.M)
]
ENVIRONMENT = {
    "streams_belong_to_a_device": {"CUDA_EMULATION_DEVICES": "2"},
    "allocations_fail_by_environment": {"CUDA_EMULATION_FAIL_ALLOCATION": "1"},
}
# What must not happen, how the process ends and what it says.
MISTAKES = {
    "mistake_leave_before_barrier": "63 are in __syncthreads, 0 in a warp operation, 1 have ended",
    "mistake_half_a_warp": "must name the whole warp, ffffffff, got the mask 0000ffff",
    "mistake_one_lane_missing": "0 are in __syncthreads, 31 in a warp operation, 33 have ended",
    "mistake_different_operations": "lanes of a warp are in different warp operations",
    "mistake_destroyed_stream": "a stream is used that was destroyed",
    "mistake_destroyed_event": "an event is used that was destroyed",
    "mistake_write_behind": "written outside of a block of 100 bytes, at byte 100",
    "mistake_write_before": "written outside of a block of 100 bytes, at byte -1",
    "mistake_freed_memory": "",
}
STARTED_BY_ANOTHER_CASE = {"other_process"}


def test_the_executable_has_the_cases_of_its_sources(cuda_emulation: Path) -> None:
    status, output = cpp_build.run([cuda_emulation / "self_test"], RUN_LIMIT)
    assert status == 0
    assert sorted(output.split()) == sorted(NAMES)
    assert {name for name in NAMES if name.startswith("mistake_")} == set(MISTAKES)


@pytest.mark.parametrize(
    "case", [name for name in NAMES if name not in {*MISTAKES, *STARTED_BY_ANOTHER_CASE}]
)
def test_the_emulation_behaves_as_cuda(cuda_emulation: Path, case: str) -> None:
    command: list[str | Path] = [cuda_emulation / "self_test", case]
    status, output = cpp_build.run(command, RUN_LIMIT, ENVIRONMENT.get(case))
    if status != 0 or "all is well" not in output:
        pytest.fail(f"{case} ended with {status}:\n{output}", pytrace=False)


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_ends_the_process_and_is_named(cuda_emulation: Path, mistake: str) -> None:
    status, output = cpp_build.run([cuda_emulation / "self_test", mistake], RUN_LIMIT)
    fault = mistake == "mistake_freed_memory"  # the page is gone
    assert status == -(signal.SIGSEGV if fault else signal.SIGABRT)
    assert MISTAKES[mistake] in output
    assert "all is well" not in output
