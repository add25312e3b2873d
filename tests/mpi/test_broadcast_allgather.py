"""Broadcast and all-gather. Oracle: every rank computes all ranks' inputs itself."""

from __future__ import annotations

import pytest
import torch
from inputs import ALL_DTYPES, SHAPES, assert_equal, bits, integers, of_all_ranks, total

import adareduce.torch as hvd

BROADCASTS = {
    "broadcast": hvd.broadcast,
    "broadcast_": hvd.broadcast_,
    "broadcast_async": lambda *a, **k: hvd.synchronize(hvd.broadcast_async(*a, **k)),
    "broadcast_async_": lambda *a, **k: hvd.synchronize(hvd.broadcast_async_(*a, **k)),
}
ALLGATHERS = {
    "allgather": hvd.allgather,
    "allgather_async": lambda *a, **k: hvd.synchronize(hvd.allgather_async(*a, **k)),
    "grouped_allgather": lambda tensor: hvd.grouped_allgather([tensor])[0],
}


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("variant", BROADCASTS)
def test_broadcast_gives_every_rank_the_roots_values(variant, dtype, rank, size):
    for root in range(size):
        values = of_all_ranks(integers, (3, 5), dtype, root)
        mine = values[rank].clone()
        result = BROADCASTS[variant](mine, root)
        assert_equal(result, values[root])
        if variant.endswith("_"):
            assert result is mine
        else:
            assert_equal(mine, values[rank])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_broadcast_takes_any_shape(shape, rank, size):
    values = of_all_ranks(integers, shape, torch.float32)
    assert_equal(hvd.broadcast(values[rank], size - 1), values[size - 1])


def test_broadcast_keeps_the_bits_of_nan_and_negative_zero(rank):
    patterns = torch.tensor([0x7FC00001, -0x7FFFFFFF - 1, -0x3FFFFF], dtype=torch.int32)
    mine = patterns.view(torch.float32) if rank == 0 else torch.zeros(3)
    assert bits(hvd.broadcast(mine, 0).view(torch.int32)) == bits(patterns)


def test_the_gradient_of_broadcast_is_the_sum_at_the_root(rank, size):
    root = size - 1
    weights = of_all_ranks(integers, (4,), torch.float64)
    tensor = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (hvd.broadcast(tensor, root) * weights[rank]).sum().backward()
    assert_equal(tensor.grad, total(weights) if rank == root else torch.zeros_like(tensor))


@pytest.mark.parametrize("root", [-1, 1000, None, 0.5])
def test_an_impossible_root_is_refused(root):
    with pytest.raises(ValueError, match="broadcast: root_rank must be one of the ranks"):
        hvd.broadcast(torch.zeros(3), root)


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("variant", ALLGATHERS)
def test_allgather_concatenates_different_numbers_of_rows(variant, dtype, rank, size):
    values = [integers(other, (other + 1, 3), dtype) for other in range(size)]
    assert_equal(ALLGATHERS[variant](values[rank]), torch.cat(values))


@pytest.mark.parametrize("empty", ["all", "first", "last", "all but one"])
def test_allgather_takes_ranks_without_rows(empty, rank, size):
    rows = {
        "all": [0] * size,
        "first": [0] + [2] * (size - 1),
        "last": [3] * (size - 1) + [0],
        "all but one": [0] * (size - 1) + [4],
    }[empty]
    values = [integers(other, (rows[other], 2), torch.int16) for other in range(size)]
    assert_equal(hvd.allgather(values[rank]), torch.cat(values))


def test_allgather_takes_rows_of_no_elements(rank, size):
    result = hvd.allgather(torch.zeros(rank + 1, 0, 3))
    assert result.shape == (size * (size + 1) // 2, 0, 3)


def test_allgather_takes_any_strides(rank, size):
    values = of_all_ranks(integers, (4, 6), torch.float32)
    assert_equal(hvd.allgather(values[rank].t()), torch.cat([value.t() for value in values]))


def test_a_gathered_tensor_outlives_its_handle_and_can_be_written(rank, size):
    result = hvd.synchronize(hvd.allgather_async(torch.full((1000,), float(rank))))
    for _ in range(20):
        hvd.allgather(torch.zeros(1000))  # would reuse the memory if it were free
    result += 1
    assert_equal(result, torch.arange(1.0, size + 1).repeat_interleave(1000))


def test_a_group_of_allgathers_keeps_tensors_apart(rank, size):
    values = [
        [integers(other, (rows(other), columns), torch.float32, i) for other in range(size)]
        for i, (rows, columns) in enumerate(
            [(lambda r: r, 2), (lambda r: 3, 1), (lambda r: size - r, 5)]
        )
    ]
    results = hvd.grouped_allgather([of_ranks[rank] for of_ranks in values])
    for result, of_ranks in zip(results, values, strict=True):
        assert_equal(result, torch.cat(of_ranks))


def test_the_gradient_of_allgather_is_the_sum_for_ones_own_rows(rank, size):
    num_rows = size * (size + 1) // 2
    weights = of_all_ranks(integers, (num_rows, 2), torch.float64)
    tensor = torch.ones(rank + 1, 2, dtype=torch.float64, requires_grad=True)
    (hvd.allgather(tensor) * weights[rank]).sum().backward()
    first = rank * (rank + 1) // 2
    assert_equal(tensor.grad, total(weights)[first : first + rank + 1])


def test_allgather_refuses_scalars():
    with pytest.raises(ValueError, match="at least one dimension, got a scalar"):
        hvd.allgather(torch.tensor(1.0))


def test_a_group_to_gather_may_mix_dtypes(rank, size):
    floats = torch.full((rank + 1, 2), float(rank))
    bools = torch.tensor([rank % 2 == 0])
    gathered = hvd.grouped_allgather([floats, bools])
    assert_equal(gathered[0], torch.cat([torch.full((r + 1, 2), float(r)) for r in range(size)]))
    assert_equal(gathered[1], torch.tensor([r % 2 == 0 for r in range(size)]))
