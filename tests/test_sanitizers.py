"""The C++ executables of tests/cpp under sanitizers, which find what results cannot show.

AddressSanitizer and UndefinedBehaviorSanitizer see reads beyond a tensor, memory used after its
end and undefined arithmetic; ThreadSanitizer sees data races between callers, workers and ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import cpp_build
from cpp_build import ROOT

SANITIZERS = ["address,undefined", "thread"]
RUN_LIMIT = 300  # seconds
ENVIRONMENT = {
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "second_deadlock_stack=1",
}


@pytest.fixture(scope="module", params=SANITIZERS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of one sanitizer."""
    sanitizer: str = request.param
    return cpp_build.build(
        request,
        tmp_path_factory,
        "sanitizers-" + sanitizer.replace(",", "-"),
        ROOT,
        [ROOT / "CMakeLists.txt", ROOT / "csrc", ROOT / "tests/cpp"],
        "-DADAREDUCE_PYTHON=OFF",
        "-DADAREDUCE_CPP_TESTS=ON",
        "-DADAREDUCE_CUDA=OFF",
        f"-DADAREDUCE_SANITIZE={sanitizer}",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "kernels_check",
        "engine_stress",
        "engine_stress shared",
        "engine_stress shared workers",
        "device_stress",
        "shared_memory_stress",
    ],
)
def test_sanitizers_find_nothing(build: Path, command: str) -> None:
    executable, *arguments = command.split()
    run = [build / executable, *arguments]
    status, output = cpp_build.run(run, RUN_LIMIT, ENVIRONMENT)
    if "unexpected memory mapping" in output:
        # Older ThreadSanitizers cannot live with addresses as random as newer kernels make them.
        status, output = cpp_build.run(["setarch", "-R", *run], RUN_LIMIT, ENVIRONMENT)
    if status != 0 or "all is well" not in output:
        pytest.fail(f"{command} ended with {status}:\n{output}", pytrace=False)
