"""Skips what needs a GPU where there is none; see README.md."""

from __future__ import annotations

import os
from pathlib import Path

# Ranks of one process wait for each other on the device: each needs a queue of its own, and a
# kernel that is loaded at its first launch would wait for those that wait for it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import device
import pytest

_HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = device.why_not()
    if reason is not None and os.environ.get("ADAREDUCE_TEST_NEEDS_GPU"):
        pytest.exit(reason, returncode=1)  # where all skipped would look like all well
    if reason is not None:
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu() -> device.Machine:
    return device.Machine()


@pytest.fixture
def real_gpu(gpu: device.Machine) -> device.Machine:
    if gpu.is_emulated:
        pytest.skip("needs a real GPU")
    return gpu
