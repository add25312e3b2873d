"""Whole calls of the engine on a device, ranks as threads of one process: launches and graphs.

Oracle: exact integers, and float64 references of tests/reference.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference
from thread_ranks import COLLECTIVES, DTYPES, OPS, ThreadRank, run_ranks

NUMELS = (5, 8, 0, 300, 1)
PEER, NCCL = 2, 1


@pytest.fixture(params=[PEER, NCCL], ids=["peer", "nccl"])
def path(request: pytest.FixtureRequest, gpu: Any) -> int:
    """How data move. NCCL takes several ranks of a GPU only where it is told to."""
    if request.param == NCCL:
        found = gpu.module.describe()
        if not found["nccl_version"]:
            pytest.skip(found["nccl_why_not"])
        if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
            pytest.skip("NCCL_MULTI_RANK_GPU_ENABLE is not 1")
    return int(request.param)


class GpuRank:
    """A rank as a thread, with tensors on the device under test and a stream of its own."""

    def __init__(self, rank: ThreadRank, gpu: Any, path: int) -> None:
        self.on_cpu, self.gpu = rank, gpu
        self.rank, self.size, self.engine = rank.rank, rank.size, rank.engine
        self.engine.attach_cuda(gpu.module.plugin(), path)
        self.stream = gpu.module.testing.make_stream()

    def launch(self, tensors: list[torch.Tensor], collective: str = "allreduce", *,
               op: str = "sum", root: int = 0, is_capturing: bool = False,
               groups: list[int] | None = None, **pointers: int) -> None:  # fmt: skip
        handle = self.engine.launch(
            process_set=0, device=0, stream=self.stream, is_capturing=is_capturing,
            collective=COLLECTIVES[collective], name="x", op=OPS[op], root=root, prescale=1.0,
            postscale=1.0,
            tensors=[
                (tuple(t.shape), DTYPES[str(t.dtype).removeprefix("torch.")], t.data_ptr(),
                 t.data_ptr(), (), group)
                for t, group in zip(tensors, groups or [0] * len(tensors), strict=True)
            ],
            rows=(), has_statistics=groups is not None, **pointers,
        )  # fmt: skip
        handle.order(self.stream)

    def captured(self, enqueue: Callable[[], None]) -> int:
        self.gpu.module.testing.begin_capture(self.stream)
        enqueue()
        return int(self.gpu.module.testing.end_capture(self.stream))

    def replay(self, graph: int) -> None:
        self.gpu.module.testing.launch_graph(graph, self.stream)
        self.wait()

    def wait(self) -> None:
        self.gpu.module.testing.synchronize_stream(self.stream)

    def tensors(self, step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """Small integers, whose sums are exact."""
        return [
            ((torch.arange(numel) + self.rank * (i + 1) + step) % 7 - 3).to(dtype)
            for i, numel in enumerate(NUMELS)
        ]  # fmt: skip


def on_device(gpu: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(gpu.device) for tensor in tensors]


def all_inputs(rank: GpuRank, step: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    mine = rank.rank
    try:
        values = []
        for other in range(rank.size):
            rank.rank = other
            values.append(rank.tensors(step, dtype))
        return values
    finally:
        rank.rank = mine


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("op", ["sum", "average", "max", "adasum", "broadcast"])
def test_a_captured_call_follows_its_inputs(gpu, path, op, size):
    def body(on_cpu: ThreadRank) -> None:
        rank = GpuRank(on_cpu, gpu, path)
        dtype = torch.float64
        buffers = on_device(gpu, rank.tensors(0, dtype))

        def call(is_capturing: bool) -> None:
            if op == "broadcast":
                rank.launch(buffers, "broadcast", root=size - 1, is_capturing=is_capturing)
            else:
                rank.launch(buffers, op=op, is_capturing=is_capturing)

        call(False)  # prepares
        rank.wait()
        graph = rank.captured(lambda: call(True))
        for step in range(1, 4):
            for buffer, value in zip(buffers, rank.tensors(step, dtype), strict=True):
                buffer.copy_(value)
            if gpu.device.type == "cuda":
                torch.cuda.synchronize()
            rank.replay(graph)
            inputs = all_inputs(rank, step, dtype)
            for place, buffer in enumerate(buffers):
                stacked = torch.stack([row[place] for row in inputs])
                if op == "adasum":
                    combined = reference.adasum([row[place].numpy() for row in inputs])
                    expected = torch.from_numpy(combined.astype("float64"))
                    # Rounding of a tree of at most two levels, far below this at these sizes.
                    torch.testing.assert_close(buffer.cpu(), expected, rtol=1e-12, atol=1e-12)
                    continue
                expected = {
                    "sum": lambda x: x.sum(0),
                    "average": lambda x: x.sum(0) / size,
                    "max": lambda x: x.max(0).values,
                    "broadcast": lambda x: x[size - 1],
                }[op](stacked)
                # NCCL multiplies by 1 / size before it adds.
                rtol = size * 2.0**-53 if op == "average" and path == NCCL else 0.0
                atol = size * 2.0**-50 if op == "average" and path == NCCL else 0.0
                torch.testing.assert_close(buffer.cpu(), expected, rtol=rtol, atol=atol)

    run_ranks(size, body)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_captured_statistics_follow_their_inputs(gpu, path, size):
    def body(on_cpu: ThreadRank) -> None:
        rank = GpuRank(on_cpu, gpu, path)
        buffers = on_device(gpu, rank.tensors(0))
        groups = [1, 0, 0, 1, 0]
        out = torch.full((2, 4), -1.0, dtype=torch.float64, device=gpu.device)
        counts = torch.full((len(NUMELS),), -1, dtype=torch.int64, device=gpu.device)

        def call(is_capturing: bool) -> None:
            rank.launch(buffers, op="average", groups=groups, is_capturing=is_capturing,
                        group_stats=out.data_ptr(), nonfinite=counts.data_ptr())  # fmt: skip

        call(False)
        rank.wait()
        graph = rank.captured(lambda: call(True))
        for step in range(1, 4):
            for buffer, value in zip(buffers, rank.tensors(step), strict=True):
                buffer.copy_(value)
            if gpu.device.type == "cuda":
                torch.cuda.synchronize()
            rank.replay(graph)
            inputs = all_inputs(rank, step, torch.float64)
            for group in range(2):
                places = [p for p, g in enumerate(groups) if g == group]
                squares = sum(row[p].square().sum().item() for row in inputs for p in places)
                means = sum(
                    (sum(row[p] for row in inputs) / size).square().sum().item() for p in places
                )
                assert out[group, 0].item() == squares
                # Means of integers in float32 or wider, 300 of them, added in float64.
                assert out[group, 1].item() == pytest.approx(means, rel=1e-6)
            assert counts.tolist() == [0] * len(NUMELS)

    run_ranks(size, body)
