"""What a trace of torch.profiler says about waiting: findings, none where all is well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize",
          "cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize")  # fmt: skip
Event = dict[str, Any]


def findings(trace: dict[str, Any], step: str) -> list[str]:
    """Waits of the host, and copies to the host that the step's own streams make.

    Args:
        trace: A Chrome trace of torch.profiler.
        step: Name of the record_function ranges that count. Whatever the host calls within them, on
            any thread, and whatever the device does because of it. The profiler itself waits
            outside of them.

    Raises:
        ValueError: The trace has no such range, or no kernel in it: nothing was seen.
    """
    events = [event for event in trace["traceEvents"] if "ts" in event and "dur" in event]
    spans = [
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("name") == step and event.get("cat") == "user_annotation"
    ]
    if not spans:
        raise ValueError(f"findings: trace must have a range {step!r}, got none")
    calls = [event for event in events if _is_call(event) and _is_within(event, spans)]
    caused = {event["args"]["correlation"] for event in calls if "correlation" in event["args"]}
    on_device = [
        event
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        and event.get("args", {}).get("correlation") in caused
    ]
    streams = {event["args"].get("stream") for event in on_device if event["cat"] == "kernel"}
    if not streams:
        raise ValueError(f"findings: the range {step!r} must have launched a kernel, got none")
    found = [f"{event['name']} on thread {event.get('tid')}" for event in calls
             if event["name"].startswith(_WAITS)]  # fmt: skip
    found += [
        f"{event['name']} on stream {event['args'].get('stream')}, where kernels run"
        for event in on_device
        if event["cat"] == "gpu_memcpy"
        and "DtoH" in event["name"]
        and event["args"].get("stream") in streams
    ]
    return found


def findings_of(file: Path, step: str) -> list[str]:
    """The same for a file that ``profile.export_chrome_trace`` has written."""
    return findings(json.loads(file.read_text()), step)


def _is_call(event: Event) -> bool:
    return event.get("cat") in ("cuda_runtime", "cuda_driver") and "args" in event


def _is_within(event: Event, spans: Sequence[tuple[float, float]]) -> bool:
    return any(begin <= float(event["ts"]) <= end for begin, end in spans)
