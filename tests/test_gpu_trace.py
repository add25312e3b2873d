"""The reader of profiler traces notices what it must, on traces that are made up here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
import trace_of_step as trace


def event(name: str, cat: str, ts: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": 1.0, "tid": 7, "args": arguments}


STEP = {"ph": "X", "name": "step", "cat": "user_annotation", "ts": 100.0, "dur": 50.0, "args": {}}
LAUNCH = event("cudaLaunchKernel", "cuda_runtime", 110, correlation=1)
KERNEL = event("gemm", "kernel", 300, correlation=1, stream=7)


def findings(*events: dict[str, Any]) -> list[str]:
    return trace.findings({"traceEvents": [STEP, LAUNCH, KERNEL, *events]}, "step")


def test_a_step_of_kernels_has_no_findings() -> None:
    assert findings() == []


@pytest.mark.parametrize(
    "name", ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"]
)
def test_a_wait_of_the_host_is_found_within_the_step_and_not_behind_it(name: str) -> None:
    assert findings(event(name, "cuda_runtime", 120, correlation=2)) == [f"{name} on thread 7"]
    assert findings(event(name, "cuda_runtime", 160, correlation=2)) == []


def test_a_copy_to_the_host_is_found_where_kernels_run_and_nowhere_else() -> None:
    call = event("cudaMemcpyAsync", "cuda_runtime", 120, correlation=2)
    copy = "Memcpy DtoH (Device -> Pageable)"
    assert findings(call, event(copy, "gpu_memcpy", 400, correlation=2, stream=7)) == [
        f"{copy} on stream 7, where kernels run"
    ]
    assert findings(call, event(copy, "gpu_memcpy", 400, correlation=2, stream=13)) == []
    inwards = "Memcpy HtoD (Pinned -> Device)"
    assert findings(call, event(inwards, "gpu_memcpy", 400, correlation=2, stream=7)) == []


def test_a_trace_that_shows_nothing_proves_nothing() -> None:
    with pytest.raises(ValueError, match="must have a range 'step'"):
        trace.findings({"traceEvents": [LAUNCH, KERNEL]}, "step")
    with pytest.raises(ValueError, match="must have launched a kernel"):
        trace.findings({"traceEvents": [STEP, LAUNCH]}, "step")
