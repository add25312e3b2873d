"""The emulated CUDA runtime, built once for all tests that run kernels without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import cpp_build

EMULATION = cpp_build.ROOT / "tests/cuda_emulation"


@pytest.fixture(scope="session")
def cuda_emulation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with libcuda_emulation.so and the executable self_test."""
    return cpp_build.build(request, tmp_path_factory, "cuda-emulation", EMULATION, [EMULATION])
