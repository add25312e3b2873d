"""CUDA tensors between ranks, without a GPU: see tests/emulated_gpu.py for what plays it.

The rest of this folder is repeated for emulated GPUs as well (tests/test_mpi_suite.py); here is
what only they have. Oracle: the same call with CPU tensors, unless a test names another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import assert_equal, assert_library_works, integers, normals, of_all_ranks, total

import adareduce.torch as hvd
from adareduce import runtime
from adareduce.ops import Collective, CudaPath
from adareduce.torch import launching, staging
from emulated_gpu import (
    EMULATED_CUDA,
    MODES,
    WHY_NOT_EMULATED,
    EmulatedRuntime,
    Gpu,
    emulate,
)

SHAPES = [(5,), (8,), (0,), (33, 7), (), (301,)]


def gpu_modes(*modes: str) -> Any:
    """Runs a test on the emulated GPUs of these modes."""
    no_module = pytest.mark.skipif(not EMULATED_CUDA, reason=WHY_NOT_EMULATED)
    return pytest.mark.parametrize(
        "gpu",
        [pytest.param(mode, marks=[no_module] if mode == "emulated" else []) for mode in modes],
        indirect=True,
    )


def is_over_nccl() -> bool:
    """Whether NCCL adds, which rounds otherwise than the CPU's kernels."""
    return hvd.cuda_path().path == CudaPath.nccl


every_gpu = gpu_modes(*MODES)
no_host_wait = gpu_modes("stand-in", "emulated")


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if request.param == "staged":
        monkeypatch.setattr(staging, "PIECE_BYTES", 256)  # so that there are many
    with emulate(request.param) as gpu:
        yield gpu


class Warnings(logging.Handler):
    """What the library warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("adareduce"), Warnings()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


CALLS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "sum": lambda t: hvd.grouped_allreduce(t, op=hvd.Sum),
    "average in place": lambda t: hvd.grouped_allreduce_(t),
    "min": lambda t: hvd.grouped_allreduce(t, op=hvd.Min, prescale_factor=2.0),
    "broadcast": lambda t: [hvd.broadcast(tensor, hvd.size() - 1) for tensor in t],
    "allgather": lambda t: hvd.grouped_allgather([tensor.reshape(-1) for tensor in t]),
    "reducescatter": lambda t: hvd.grouped_reducescatter([x.reshape(-1) for x in t], op=hvd.Sum),
    "alltoall": lambda t: [hvd.alltoall(x.reshape(-1).repeat(hvd.size())) for x in t],
}


@every_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_gives_what_it_gives_on_the_cpu(gpu, call, dtype, rank, size):
    # Small integers, whose sums are exact in every type and order.
    mine = [integers(rank, shape, dtype, i) for i, shape in enumerate(SHAPES)]
    with gpu.host():
        expected = CALLS[call]([tensor.clone() for tensor in mine])
    # NCCL multiplies by 1 / size before it adds: an error of half a unit for each rank and one sum.
    is_inexact = call.startswith("average") and is_over_nccl() and dtype.is_floating_point
    # Sums may cancel, so it is absolute; the integers are at most 16.
    atol = 16 * size * torch.finfo(dtype).eps if is_inexact else 0.0
    for result, oracle in zip(CALLS[call](mine), expected, strict=True):
        torch.testing.assert_close(result, oracle, rtol=0.0, atol=atol)


@every_gpu
def test_adasum_is_that_of_the_cpu_to_rounding(gpu, rank, size):
    values = [normals(rank, shape, torch.float64, i) for i, shape in enumerate(SHAPES)]
    with gpu.host():
        expected = hvd.grouped_allreduce(values, op=hvd.Adasum)
    results, stats = hvd.grouped_allreduce_with_stats(values, op=hvd.Adasum)
    for result, oracle in zip(results, expected, strict=True):
        # Both are within the bound of tests/reference.py, which is far below this at these sizes.
        torch.testing.assert_close(result, oracle, rtol=1e-12, atol=1e-12)
    assert stats.groups is None
    assert stats.orthogonality.shape == stats.nonfinite.shape == (len(SHAPES),)
    assert (stats.cancellation is not None) == (hvd.cuda_path().path == CudaPath.peer)


@every_gpu
@pytest.mark.parametrize("with_squares", [False, True])
def test_statistics_are_those_of_the_cpu(gpu, with_squares, rank, size):
    groups = [2, 0, 1, 2, 0, 2]
    values = [integers(rank, shape, torch.float32, i) for i, shape in enumerate(SHAPES)]
    values[3][0, 0] = float("inf")
    squares = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * (rank + 1)
    shares = {"local_squares": squares} if with_squares else {}
    with gpu.host():
        _, expected = hvd.grouped_allreduce_with_stats(values, groups, **shares)
    results, stats = hvd.grouped_allreduce_with_stats_(values, groups, **shares)
    assert all(result is value for result, value in zip(results, values, strict=True))
    # Sums of squares of means are rounded: 300 terms, each to 2^-53. NCCL's means are rounded
    # before they are squared, and the estimates are differences.
    rtol = 20 * size * torch.finfo(torch.float32).eps if is_over_nccl() else 1e-13
    torch.testing.assert_close(stats.groups, expected.groups, rtol=rtol, atol=0, equal_nan=True)
    assert_equal(stats.nonfinite, expected.nonfinite)
    assert stats.orthogonality is None
    assert stats.cancellation is None


@every_gpu
def test_a_staged_tensor_may_be_larger_than_a_piece(gpu, rank, size):
    values = of_all_ranks(integers, (1000, 3), torch.float32)
    assert_equal(hvd.allreduce(values[rank], op=hvd.Sum), total(values))
    assert_equal(hvd.broadcast_(values[rank].clone(), size - 1), values[size - 1])
    rows = [integers(other, (97 * other + 3, 5), torch.int64) for other in range(size)]
    assert_equal(hvd.allgather(rows[rank]), torch.cat(rows))


@no_host_wait
def test_a_handle_is_finished_without_synchronize(gpu, rank, size):
    values = of_all_ranks(integers, (100,), torch.float32)
    hvd.allreduce(values[rank], op=hvd.Sum)  # agreed
    handle = hvd.allreduce_async(values[rank], op=hvd.Sum)
    while not hvd.poll(handle):  # the watchdog ends this if it is wrong
        pass
    assert_equal(hvd.synchronize(handle), total(values))


@every_gpu
def test_many_calls_may_be_under_way_and_dropped(gpu, rank, size):
    values = [of_all_ranks(integers, (i, 7), torch.float32, i) for i in range(20)]
    handles = [hvd.allreduce_async(of_ranks[rank], op=hvd.Sum) for of_ranks in values]
    for handle, of_ranks in reversed(list(zip(handles, values, strict=True))[10:]):
        assert_equal(hvd.synchronize(handle), total(of_ranks))
    del handles, handle
    assert_library_works()


@every_gpu
def test_gradients_flow_through_every_differentiable_call(gpu, rank, size):
    # Oracle: the identities of the calls on ones, exact.
    weights = torch.full((size,), float(rank + 1))
    ranks = sum(range(1, size + 1))
    for call, expected in (
        (lambda t: hvd.allreduce(t, op=hvd.Sum) * weights, [float(ranks)] * size),
        (lambda t: hvd.allgather(t)[rank * size : (rank + 1) * size], [1.0] * size),
        (lambda t: hvd.broadcast(t, 0), [float(size) if rank == 0 else 0.0] * size),
        (lambda t: hvd.reducescatter(t, op=hvd.Sum) * (rank + 1), list(range(1, size + 1))),
        (lambda t: hvd.alltoall(t) * weights, list(range(1, size + 1))),
    ):
        tensor = torch.ones(size, requires_grad=True)
        call(tensor).sum().backward()
        assert tensor.grad.tolist() == expected


# ---- what is handed to the engine ----------------------------------------------------------------


@gpu_modes("stand-in")
def test_a_launch_says_stream_device_and_rows(gpu, rank, size):
    gpu.device, gpu.stream = 3, 17
    hvd.grouped_allgather([torch.ones(rank + 1, 2), torch.ones(2)])
    hvd.alltoall(torch.ones(size * (size + 1) // 2), list(range(1, size + 1)))
    gathering, exchanging = gpu.launches
    assert (gathering["device"], gathering["stream"]) == (3, 17)
    assert gathering["collective"] == Collective.allgather
    assert gathering["rows"] == [*range(1, size + 1), *[2] * size]
    assert exchanging["rows"] == [*range(1, size + 1)] * size
    assert all(tensor[3] != 0 for tensor in gathering["tensors"]), "outputs are allocated before"


@gpu_modes("stand-in")
def test_a_launch_says_whether_a_graph_is_captured(gpu, rank, size):
    tensor = torch.ones(3)
    hvd.allreduce_(tensor, op=hvd.Sum)
    gpu.is_capturing = True
    hvd.allreduce_(tensor, op=hvd.Sum)
    hvd.broadcast_(tensor, 0)
    hvd.grouped_allreduce_with_stats_([tensor])
    gpu.is_capturing = False
    assert [launch["is_capturing"] for launch in gpu.launches] == [False, True, True, True]
    assert tensor.tolist() == [float(size * size)] * 3
    assert len(launching._in_flight) == 0, "a graph's tensors belong to its pool"


@gpu_modes("stand-in")
def test_a_set_must_be_used_before_a_capture(gpu, rank, size):
    gpu.is_capturing = True
    with pytest.raises(ValueError, match="must have been used with CUDA tensors before a graph"):
        hvd.allreduce_(torch.ones(3))
    gpu.is_capturing = False
    assert_library_works()


@gpu_modes("staged")
def test_the_staged_path_refuses_a_capture_on_all_ranks(gpu, rank, size):
    hvd.allreduce(torch.ones(3))
    gpu.is_capturing = rank == 0
    error = ValueError if rank == 0 else hvd.HorovodInternalError
    with pytest.raises(error, match="stream must not be captured"):
        hvd.allreduce(torch.ones(3))
    gpu.is_capturing = False
    assert_library_works()


# ---- graphs --------------------------------------------------------------------------------------


@gpu_modes("emulated")
def test_replays_of_a_graph_follow_changed_inputs(gpu, rank, size):
    def calls(tensors: list[torch.Tensor]) -> hvd.ReductionStats:
        hvd.allreduce_(tensors[0], op=hvd.Sum)
        hvd.grouped_allreduce_(tensors[1:3], op=hvd.Sum, prescale_factor=0.5)
        hvd.allreduce_(tensors[3], op=hvd.Adasum)
        hvd.broadcast_(tensors[4], size - 1)
        _, stats = hvd.grouped_allreduce_with_stats_(tensors[5:], [0, 1], op=hvd.Sum)
        return stats

    if hvd.cuda_path().path == CudaPath.staged:
        pytest.skip("the staged path cannot be captured")
    shapes = [(5,), (33, 7), (8,), (301,), (17,), (64, 3), ()]
    tensors = [integers(rank, shape, torch.float64, 1) for shape in shapes]
    calls(tensors)
    runtime_of_gpu = EmulatedRuntime(gpu)
    with runtime_of_gpu.capture() as graph:
        stats = calls(tensors)
    for seed in range(3):
        values = [integers(rank, shape, torch.float64, seed) for shape in shapes]
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        runtime_of_gpu.replay(graph)
        with gpu.host():
            expected = calls(values)
        for place, (tensor, oracle) in enumerate(zip(tensors, values, strict=True)):
            bound = 1e-12 if place == 3 else 0.0  # Adasum's roundings, as above
            torch.testing.assert_close(tensor, oracle, rtol=bound, atol=bound)
        bound = 1e-13 * expected.groups.abs().nan_to_num().amax().item()  # as above
        torch.testing.assert_close(
            stats.groups, expected.groups, rtol=0, atol=bound, equal_nan=True
        )
        assert_equal(stats.nonfinite, expected.nonfinite)
    hvd.allreduce(torch.ones(3))  # the set works on, and its errors would be raised here


# ---- paths ---------------------------------------------------------------------------------------


@every_gpu
def test_the_path_and_its_reason_can_be_asked_for_before_any_call(gpu, rank, size, ranks):
    chosen = hvd.cuda_path()
    assert chosen.device == 0
    assert chosen.why
    assert len(set(ranks.gather((chosen.path, chosen.why)))) == 1
    assert hvd.cuda_path() is chosen


@gpu_modes("staged")
def test_the_staged_path_is_warned_of_once_per_set(gpu, rank, size, warnings):
    for _ in range(3):
        hvd.allreduce(torch.ones(3))
    assert len(warnings) == (rank == 0)
    assert all("a test asks for it" in text and "many times slower" in text for text in warnings)


@gpu_modes("stand-in")
def test_ranks_that_share_a_gpu_are_warned_of(gpu, rank, size, warnings):
    gpu.uuid = f"GPU-{rank // 2}"
    hvd.allreduce(torch.ones(3))
    assert len(warnings) == (rank == 0 and size > 1)
    assert all("ranks 0, 1 have GPU-0" in text for text in warnings)


@every_gpu
def test_a_set_serves_one_gpu(gpu, rank, size):
    hvd.allreduce(torch.ones(3))
    gpu.device = 1
    with pytest.raises(
        ValueError, match=r"serves one GPU per rank, and ProcessSet\(.*\) has cuda:0 since its"
    ):
        hvd.allreduce(torch.ones(3))
    gpu.device = 0
    assert_library_works()


# ---- mistakes ------------------------------------------------------------------------------------


@every_gpu
@pytest.mark.min_ranks(2)
def test_a_mistake_at_the_first_call_leaves_the_set_without_a_path_everywhere(gpu, rank, size):
    tensor = torch.ones(3, dtype=torch.complex64 if rank == 1 else torch.float32)
    with pytest.raises(TypeError if rank == 1 else hvd.HorovodInternalError, match="complex64"):
        hvd.allreduce(tensor)
    assert hvd.global_process_set.cuda is None
    assert_library_works()


@every_gpu
@pytest.mark.min_ranks(2)
def test_tensors_on_two_devices_on_one_rank_raise_on_all(gpu, rank, size):
    hvd.allreduce(torch.ones(3))
    tensors = [torch.ones(3), torch.ones(3)]
    if rank == 1:
        gpu.lies_here = lambda tensor: tensor is not tensors[1]
    error = ValueError if rank == 1 else hvd.HorovodInternalError
    with pytest.raises(error, match="all tensors must be on one device"):
        hvd.grouped_allreduce(tensors)
    gpu.lies_here = lambda tensor: True
    assert_library_works()


@gpu_modes("staged")
@pytest.mark.min_ranks(2)
def test_ranks_that_cut_into_different_numbers_of_pieces_raise_before_data_moves(gpu, rank, size):
    tensor = torch.full((1000 if rank == 0 else 10,), float(rank))
    kept = tensor.clone()
    with pytest.raises(hvd.HorovodInternalError, match="disagree on"):
        hvd.allreduce_(tensor, op=hvd.Sum)
    assert_equal(tensor, kept)
    assert_library_works()


# ---- models --------------------------------------------------------------------------------------


@every_gpu
def test_parameters_on_two_devices_are_broadcast_together(gpu, rank, size):
    # As a model with a counter on the CPU.
    gpu.lies_here = lambda tensor: tensor.dtype == torch.float32
    state = {"weight": torch.full((4, 3), float(rank)), "steps": torch.tensor(rank)}
    hvd.broadcast_parameters(state, size - 1)
    assert_equal(state["weight"], torch.full((4, 3), float(size - 1)))
    assert state["steps"].item() == size - 1


@every_gpu
def test_an_optimizers_state_on_two_devices_is_broadcast(gpu, rank, size):
    # Adam counts its steps on the CPU.
    gpu.lies_here = lambda tensor: tensor.dim() > 0
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.full_like(parameter, rank + 1.0)
    for _ in range(rank + 1):
        optimizer.step()
    hvd.broadcast_optimizer_state(optimizer, size - 1)
    state = optimizer.state[model.weight]
    assert float(state["step"]) == size
    # Oracle: Adam's recursion for a constant gradient g: (1 - 0.9^t) g.
    expected = torch.full((2, 3), (1 - 0.9**size) * size)
    torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-6, atol=0)


@every_gpu
def test_a_subset_of_the_ranks_has_a_path_of_its_own(gpu, rank, size):
    pair = hvd.add_process_set([0, size - 1]) if size > 2 else hvd.global_process_set
    if rank in pair.ranks:
        result = hvd.allreduce(torch.ones(3), op=hvd.Sum, process_set=pair)
        assert result.tolist() == [float(len(pair.ranks))] * 3
        assert pair.cuda is not None
    if size > 2:
        assert runtime.global_process_set.cuda is None
    assert_library_works()
