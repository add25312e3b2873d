"""Order on streams, capture in graphs, and that nothing waits on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trace_of_step
from inputs import assert_equal, integers, of_all_ranks, total

import adareduce.torch as hvd

# About half a second of a GPU, by its clock; long beside a launch, and no test measures it.
_LONG = 1_000_000_000


def needs_device_path() -> None:
    if hvd.cuda_path().path.name == "staged":
        pytest.skip("tensors go through the host on this path, which waits for them")


def test_a_call_comes_after_what_its_stream_has_to_do_and_before_what_follows(rank: int) -> None:
    values = of_all_ranks(integers, (10_007,), torch.float32)
    mine = values[rank].cuda()
    for _ in range(2):  # the first call agrees, the second only launches
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        producer.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(producer):
            tensor = torch.full((10_007,), -1.0, device="cuda")
            torch.cuda._sleep(_LONG)
            tensor.copy_(mine)
            handle = hvd.allreduce_async_(tensor, op=hvd.Sum)
        with torch.cuda.stream(consumer):
            result = hvd.synchronize(handle)
            doubled = result * 2
        del tensor, result
        torch.cuda.current_stream().wait_stream(consumer)
        # Memory that came back too early would be given to these.
        noise = [torch.full((10_007,), 77.0, device="cuda") for _ in range(8)]
        assert_equal(doubled.cpu(), 2 * total(values))
        del noise


def test_synchronize_does_not_wait_for_the_gpu() -> None:
    needs_device_path()
    tensor = torch.ones(1000, device="cuda")
    hvd.allreduce_(tensor, op=hvd.Sum)
    torch.cuda.synchronize()
    torch.cuda._sleep(_LONG)
    handle = hvd.allreduce_async_(tensor, op=hvd.Sum)
    assert not hvd.poll(handle)
    hvd.synchronize(handle)
    assert not torch.cuda.current_stream().query(), "the host has waited for the stream"
    torch.cuda.synchronize()
    assert tensor[0].item() == hvd.size() ** 2


def run_sum(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return hvd.grouped_allreduce_(tensors, op=hvd.Sum)


def run_average(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return hvd.grouped_allreduce_(tensors, op=hvd.Average)


def run_adasum(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return hvd.grouped_allreduce_(tensors, op=hvd.Adasum)


def run_average_with_stats(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    results, stats = hvd.grouped_allreduce_with_stats_(tensors, op=hvd.Average)
    assert stats.groups is not None
    return [*results, stats.groups, stats.nonfinite]


def run_broadcast(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [hvd.broadcast_(tensors[0], hvd.size() - 1)]


CALLS = [run_sum, run_average, run_adasum, run_average_with_stats, run_broadcast]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_replays_of_a_captured_call_follow_changed_inputs(
    rank: int, call: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    # Oracle: the same call without a graph, which other tests compare with float64.
    needs_device_path()
    numels = [5, 8, 30_011]

    def inputs(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + rank)
        return [torch.randn(n, generator=generator) for n in numels]

    tensors = [tensor.cuda() for tensor in inputs(0)]
    for _ in range(2):
        call(tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(tensors)
    for seed in (1, 2, 3):
        for tensor, value in zip(tensors, inputs(seed), strict=True):
            tensor.copy_(value)
        graph.replay()
        found = [result.cpu() for result in results]
        expected = call([tensor.cuda() for tensor in inputs(seed)])
        for mine, theirs in zip(found, expected, strict=True):
            # Of NCCL's own sums equal bits are no promise: two roundings per rank.
            torch.testing.assert_close(
                mine, theirs.cpu(), rtol=4 * hvd.size() * 2.0**-24, atol=1e-6, equal_nan=True
            )


class Training:
    """A small model and its optimizer, the same on all ranks."""

    def __init__(self, op: hvd.ReduceOp) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 129), torch.nn.ReLU(), torch.nn.Linear(129, 7)
        ).cuda()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=self.model.named_parameters(), op=op
        )
        self.inputs = torch.zeros(32, 64, device="cuda")

    def feed(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + hvd.rank())
        self.inputs.copy_(torch.randn(32, 64, generator=generator))

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum], ids=lambda op: op.name)
def test_a_whole_optimizer_step_is_captured_and_replays_train(op: hvd.ReduceOp) -> None:
    # Oracle: the same steps without a graph.
    needs_device_path()
    captured, eager = Training(op), Training(op)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(3):
            captured.feed(seed)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed in range(3, 6):
        captured.feed(seed)
        graph.replay()
    for seed in range(6):
        eager.feed(seed)
        eager.step()
    # Six steps of rounding in float32, in a network two layers deep.
    pairs = zip(captured.model.parameters(), eager.model.parameters(), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def trace_of(tmp_path: Path, step: Callable[[], Any]) -> list[str]:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(2):
            with torch.profiler.record_function("adareduce_step"):
                step()
    file = tmp_path / "trace.json"
    profile.export_chrome_trace(str(file))
    return trace_of_step.findings_of(file, "adareduce_step")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_no_call_waits_on_the_host(
    tmp_path: Path, call: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    needs_device_path()
    tensors = [torch.randn(n, device="cuda") for n in (5, 8, 100_003)]
    assert trace_of(tmp_path, lambda: call(tensors)) == []


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum], ids=lambda op: op.name)
def test_no_step_waits_on_the_host(tmp_path: Path, op: hvd.ReduceOp) -> None:
    needs_device_path()
    training = Training(op)
    training.feed(0)
    torch.cuda.synchronize()
    assert trace_of(tmp_path, training.step) == []


def test_a_step_with_adascale_does_not_wait_on_the_host(tmp_path: Path) -> None:
    needs_device_path()
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 33).cuda()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=torch.tensor(0.05, device="cuda"), momentum=0.9, fused=True
    )
    distributed = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    scaled = hvd.AdaScale(distributed)
    inputs = torch.randn(16, 64, device="cuda")

    def step() -> None:
        scaled.zero_grad(set_to_none=False)
        model(inputs).square().mean().backward()
        scaled.step()

    assert trace_of(tmp_path, step) == []
