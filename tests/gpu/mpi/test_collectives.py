"""The Python API on CUDA tensors. Oracles: exact integers, the float64 tree of bench.oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import ALL_DTYPES, assert_equal, assert_library_works, integers, of_all_ranks, total

import adareduce.torch as hvd
from adareduce.bench import oracles
from adareduce.bench.inputs import Source
from adareduce.bench.verification import differs

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NUMELS = [5, 8, 0, 1, 40_003, 4097]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same_on_all_ranks(ranks: Any, tensors: list[torch.Tensor]) -> None:
    mine = [bits(tensor) for tensor in tensors]
    for theirs in ranks.gather(mine):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_path_is_named_and_is_the_same_on_all_ranks(ranks: Any) -> None:
    chosen = hvd.cuda_path()
    assert len(set(ranks.gather((chosen.path.name, chosen.why)))) == 1
    assert chosen.path.name in ("nccl", "peer", "staged", "single")
    assert chosen.why


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sums_of_integers_are_exact(dtype: torch.dtype) -> None:
    if dtype == torch.bool:
        pytest.skip("bool has no sum")
    for shape in ((), (5,), (0,), (17, 33), (40_003,)):
        values = of_all_ranks(integers, shape, dtype)
        mine = values[hvd.rank()].cuda()
        found = hvd.allreduce(mine, op=hvd.Sum)
        assert found.is_cuda
        assert_equal(found.cpu(), total(values))
        assert_equal(mine.cpu(), values[hvd.rank()])  # out of place


@pytest.mark.parametrize("op", [hvd.Min, hvd.Max, hvd.Product], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_minimum_maximum_and_product_are_exact(op: hvd.ReduceOp, dtype: torch.dtype) -> None:
    values = [1 + value.abs() % 2 for value in of_all_ranks(integers, (999,), dtype)]
    table = torch.stack([value.double() for value in values])
    expected = {"Min": table.amin(0), "Max": table.amax(0), "Product": table.prod(0)}[op.name]
    assert_equal(hvd.allreduce(values[hvd.rank()].cuda(), op=op).cpu(), expected.to(dtype))


@pytest.mark.parametrize("op", ["sum", "avg", "adasum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grouped_reductions_are_right_equal_on_all_ranks_and_repeat(
    ranks: Any, dtype: torch.dtype, op: str
) -> None:
    size, rank = hvd.size(), hvd.rank()
    code = {"sum": hvd.Sum, "avg": hvd.Average, "adasum": hvd.Adasum}[op]
    source = Source(dtype, op, size)
    found = []
    for _ in range(2):
        tensors = [source.tensor(rank, i, n).cuda() for i, n in enumerate(NUMELS)]
        hvd.grouped_allreduce_(tensors, op=code)
        found.append(tensors)
    for index, numel in enumerate(NUMELS):
        if numel == 0:
            continue
        periods = [source.period(r, index, numel) for r in range(size)]
        expected = oracles.reduced(op, periods, 0, numel, numel)
        assert not differs(found[0][index].cpu(), [expected]).any(), f"tensor {index}"
    assert_same_on_all_ranks(ranks, found[0])
    for first, second in zip(*found, strict=True):
        assert torch.equal(bits(first), bits(second))


def test_5_and_8_floats_in_one_buffer_keep_coefficients_of_their_own() -> None:
    size, rank = hvd.size(), hvd.rank()
    if size > 8:
        pytest.skip("at most 8 ranks have a place of their own")
    equal = torch.full((5,), 3.0, device="cuda")
    orthogonal = torch.zeros(8, device="cuda")
    orthogonal[rank] = 2.0
    hvd.grouped_allreduce_([equal, orthogonal], op=hvd.Adasum)
    assert_equal(equal.cpu(), torch.full((5,), 3.0))
    expected = torch.zeros(8)
    expected[:size] = 2.0
    assert_equal(orthogonal.cpu(), expected)


@pytest.mark.parametrize("scale", [1e-22, 1e17])
def test_adasum_of_tiny_and_huge_gradients_scales_with_them(scale: float) -> None:
    size, rank = hvd.size(), hvd.rank()
    source = Source(torch.float32, "adasum", size)
    periods = [source.period(r, 0, 5000) * scale for r in range(size)]
    found = hvd.allreduce(periods[rank].cuda(), op=hvd.Adasum)
    assert not differs(found.cpu(), [oracles.reduced("adasum", periods, 0, 5000, 5000)]).any()


def test_statistics_of_an_average_are_those_of_float64(ranks: Any) -> None:
    size, rank = hvd.size(), hvd.rank()
    source = Source(torch.float32, "avg", size)
    tensors = [source.tensor(rank, i, n).cuda() for i, n in enumerate(NUMELS)]
    _, stats = hvd.grouped_allreduce_with_stats_(tensors, op=hvd.Average)
    assert stats.groups is not None
    row = stats.groups[0].tolist()
    everything = [
        torch.stack([source.tensor(r, i, n).double() for r in range(size)])
        for i, n in enumerate(NUMELS)
    ]
    squares = sum(float(table.square().sum()) for table in everything)
    of_mean = sum(float(table.mean(0).square().sum()) for table in everything)
    # float32 sums are rounded before they are squared; docs/algorithms.md, "Variance and norm".
    allowed = 1e-6 * squares / size
    assert abs(row[0] - squares) <= allowed * size
    assert abs(row[1] - of_mean) <= allowed
    if size > 1:
        variance = (squares - size * of_mean) / (size - 1)
        assert abs(row[2] - variance) <= 2 * allowed
        assert abs(row[3] - (of_mean - variance / size)) <= 2 * allowed
    assert stats.nonfinite.tolist() == [0] * len(NUMELS)
    assert_same_on_all_ranks(ranks, [stats.groups])


def test_data_arrive_unchanged(rank: int, size: int) -> None:
    shape = (rank + 1, 3)
    mine = integers(rank, shape, torch.float32).cuda()
    expected = torch.cat([integers(r, (r + 1, 3), torch.float32) for r in range(size)])
    assert_equal(hvd.allgather(mine).cpu(), expected)

    sent = integers(size - 1, (1001,), torch.bfloat16)
    tensor = sent.cuda() if rank == size - 1 else torch.full((1001,), 99.0).bfloat16().cuda()
    assert_equal(hvd.broadcast_(tensor, size - 1).cpu(), sent)

    whole = of_all_ranks(integers, (2 * size + 1, 4), torch.float32)
    part = hvd.reducescatter(whole[rank].cuda(), op=hvd.Sum)
    rows = [(2 * size + 1) // size + (r < (2 * size + 1) % size) for r in range(size)]
    begin = sum(rows[:rank])
    assert_equal(part.cpu(), total(whole)[begin : begin + rows[rank]])

    table = [integers(r, (2 * size,), torch.float32) for r in range(size)]
    found = hvd.alltoall(table[rank].cuda())
    expected = torch.cat([row[2 * rank : 2 * rank + 2] for row in table])
    assert isinstance(found, torch.Tensor)
    assert_equal(found.cpu(), expected)


@pytest.mark.min_ranks(2)
def test_a_disagreement_raises_on_every_rank(rank: int) -> None:
    # A signature that is new is agreed before anything is launched.
    tensor = torch.ones(3 + rank % 2, device="cuda")
    with pytest.raises(hvd.HorovodInternalError, match="rank"):
        hvd.allreduce_(tensor, op=hvd.Sum, name="uneven")
    assert bool((tensor == 1).all())
    assert hvd.allreduce(torch.ones(1, device="cuda"), op=hvd.Sum).item() == hvd.size()
    assert_library_works()


def test_a_tensor_of_2_gib_is_summed_to_its_end(rank: int, size: int) -> None:
    numel = 2**29 + 3  # float32
    free, _ = torch.cuda.mem_get_info()
    if min(free, torch.cuda.get_device_properties().total_memory) < size * 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory per rank")
    tensor = torch.full((numel,), float(rank + 1), device="cuda")
    tensor[-1] = -5.0
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert tensor[-1].item() == -5.0 * size
    expected = size * (size + 1) / 2
    assert bool((tensor[:-1] == expected).all())
