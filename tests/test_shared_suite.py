"""Runs the tests of ranks that are threads once more, with ranks that meet in shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
LIMIT_SECONDS = 900.0
# With the number of tests that pass at least: a file that is skipped as a whole proves nothing.
FILES = {
    "test_agreement.py": 90,
    "test_adasum.py": 200,
    "test_allgather.py": 50,
    "test_allreduce.py": 70,
    "test_broadcast.py": 40,
    "test_collectives.py": 600,
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_tests_of_threads_pass_in_shared_memory(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short"]
    result = subprocess.run(
        [*command, "--rootdir", str(TESTS.parent), str(TESTS / file)],
        env=os.environ | {"ADAREDUCE_TEST_SHARED_MEMORY": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) >= FILES[file], result.stdout
