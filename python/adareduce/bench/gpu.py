"""Tensors on a GPU: their clock, captured calls, and what a result says of the device.

Was written without a GPU at hand; docs/performance.md says what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import adareduce.torch as hvd
from adareduce.bench.timing import Contender, HostClock

_WARM_UPS = 2  # of a call before its capture: the first agrees, allocates and loads kernels


def select() -> None:
    """Makes this rank's GPU torch's current one; ranks share where there are fewer GPUs."""
    torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())


class DeviceClock(HostClock):
    """Times what a call has the GPU do, by events on the current stream around it.

    Before each call the cache of the GPU is overwritten: whatever is read comes from memory. What
    Python needs to enqueue the call counts, where the GPU has to wait for it; with a captured call
    it does not.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        self._value = 0
        event: Any = torch.cuda.Event
        self._begin = event(enable_timing=True)
        self._end = event(enable_timing=True)

    def settle(self) -> None:
        """Overwrites the cache and waits until the GPU is idle."""
        self._value = (self._value + 1) % 256
        self._flush.fill_(self._value)
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one call, on the device."""
        self._begin.record()
        result = run()
        self._end.record()
        self._end.synchronize()
        del result
        return float(self._begin.elapsed_time(self._end)) / 1e3


def captured(contender: Contender) -> Contender:
    """A contender whose call is a graph's replay. Collective, blocks."""
    make_stream: Any = torch.cuda.Stream
    side = make_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            contender.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.run()  # what it allocates belongs to the graph's own pool
    return replace(contender, run=graph.replay)


def placement() -> str:
    """This rank's GPU in the header's line of the rank."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} [{properties.name}, {getattr(properties, 'uuid', '?')}]"


def describe() -> dict[str, Any]:
    """GPU, versions and path, for the header and every JSON line. Collective."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    chosen = hvd.cuda_path()
    return {
        "gpu": {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        },
        "gpu_versions": {"cuda": torch.version.cuda, "nccl": nccl_text(hvd.nccl_built())},
        "path": chosen.path.name,
        "path_why": chosen.why,
    }


def nccl_text(code: int) -> str:
    """Of NCCL's version code: 22809 is 2.28.9, and 2708 was 2.7.8."""
    if code == 0:
        return "none"
    base = 1000 if code < 10_000 else 10_000
    return f"{code // base}.{code % base // 100}.{code % 100}"


def header(found: dict[str, Any]) -> list[str]:
    """The lines that say on what and by which path."""
    gpu, versions = found["gpu"], found["gpu_versions"]
    return [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, L2 {gpu['l2_bytes'] / 2**20:.0f}"
        f" MiB, CUDA {versions['cuda']}, NCCL {versions['nccl']}",
        f"path: {found['path']}: {found['path_why']}",
        "time: by events on the device; the L2 cache is overwritten before each call",
    ]
