"""Reduce-scatter, all-to-all, other dtypes and statistics as users call them. Oracle: integers."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, integers, of_all_ranks, total

import adareduce.torch as hvd

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NUMBERS = [*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def small(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Between 0 and 5: sums over 5 ranks are exact in all dtypes."""
    numel = torch.Size(shape).numel()
    return ((torch.arange(numel) * (rank + 2) + rank) % 6).reshape(shape).to(dtype)


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_every_dtype_is_reduced_by_every_op(dtype, rank, size):
    values = [small(r, (7, 5), dtype) for r in range(size)]
    wide = torch.stack([value.long() for value in values])
    assert_equal(hvd.allreduce(values[rank], op=hvd.Sum), wide.sum(0).to(dtype))
    assert_equal(hvd.allreduce(values[rank], op=hvd.Min), wide.amin(0).to(dtype))
    assert_equal(hvd.allreduce(values[rank], op=hvd.Max), wide.amax(0).to(dtype))
    ones = values[rank] % 2 + 1  # products up to 32
    expected = (wide % 2 + 1).prod(0).to(dtype)
    assert_equal(hvd.allreduce(ones, op=hvd.Product), expected)
    average = (wide.double().sum(0) / size).to(dtype)  # conversion to integers truncates
    if dtype in (torch.float16, torch.bfloat16):  # which round by way of float32
        average = (wide.double().sum(0) / size).float().to(dtype)
    assert_equal(hvd.allreduce(values[rank]), average)


def test_bool_knows_and_and_or(rank, size):
    mine = torch.tensor([rank == 0, True, False])
    assert hvd.allreduce(mine, op=hvd.Max).tolist() == [True, True, False]
    assert hvd.allreduce(mine, op=hvd.Min).tolist() == [size == 1, True, False]
    with pytest.raises(TypeError, match="dtype must be a number; Max and Min are the logical"):
        hvd.allreduce(mine, op=hvd.Sum)


@pytest.mark.openmpi_round
@pytest.mark.parametrize("shape", [(7, 3), (0, 2), (1,), (64,)], ids=str)
def test_reducescatter_gives_the_rows_of_the_allreduce(shape, rank, size):
    values = of_all_ranks(integers, shape, torch.float32)
    rows = [shape[0] // size + (r < shape[0] % size) for r in range(size)]
    first = sum(rows[:rank])
    expected = total(values)[first : first + rows[rank]]
    assert_equal(hvd.reducescatter(values[rank], op=hvd.Sum), expected)
    assert_equal(hvd.synchronize(hvd.reducescatter_async(values[rank], op=hvd.Sum)), expected)
    group = hvd.grouped_reducescatter([values[rank], values[rank].double() * size])
    assert_equal(group[1], expected.double())


def test_reducescatter_refuses_scalars_and_adasum():
    with pytest.raises(ValueError, match="at least one dimension"):
        hvd.reducescatter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="op must be Average, Sum, Min, Max or Product"):
        hvd.reducescatter(torch.ones(3), op=hvd.Adasum)


def test_the_gradient_of_reducescatter_is_the_allgather_of_gradients(rank, size):
    tensor = torch.ones(2 * size + 1, requires_grad=True)
    rows = hvd.reducescatter(tensor, op=hvd.Sum)
    rows.backward(torch.full_like(rows, float(rank + 1)))
    counts = [2 + (r == 0) for r in range(size)]
    expected = torch.cat([torch.full((n,), float(r + 1)) for r, n in enumerate(counts)])
    assert_equal(tensor.grad, expected)


@pytest.mark.openmpi_round
def test_alltoall_sends_rows_by_their_splits(rank, size):
    splits = torch.tensor([(rank + r) % 3 for r in range(size)])
    rows = [torch.full((int(n), 2), 10 * rank + r) for r, n in enumerate(splits)]
    result, received = hvd.alltoall(torch.cat(rows), splits)
    expected = [torch.full(((r + rank) % 3, 2), 10 * r + rank) for r in range(size)]
    assert_equal(result, torch.cat(expected))
    assert received.tolist() == [(r + rank) % 3 for r in range(size)]
    equal = hvd.alltoall(torch.arange(size) + 100 * rank)
    assert equal.tolist() == [100 * r + rank for r in range(size)]


def test_alltoall_refuses_splits_that_do_not_add_up(rank, size):
    with pytest.raises(ValueError, match="add up to the 3 rows"):
        hvd.alltoall(torch.ones(3), [5] * size)
    with pytest.raises(ValueError, match="at least one dimension"):
        hvd.alltoall(torch.tensor(1.0))


def test_the_gradient_of_alltoall_goes_back(rank, size):
    tensor = torch.zeros(size, requires_grad=True)
    hvd.alltoall(tensor).backward(torch.arange(size) + 10.0 * rank)
    assert_equal(tensor.grad, torch.tensor([10.0 * r + rank for r in range(size)]))


@pytest.mark.openmpi_round
def test_channels_last_is_reduced_as_it_lies(rank):
    values = of_all_ranks(integers, (2, 3, 4, 5), torch.float32)
    tensor = values[rank].clone().to(memory_format=torch.channels_last)
    strides = tensor.stride()
    assert hvd.allreduce_(tensor, op=hvd.Sum) is tensor
    assert_equal(tensor, total(values))
    assert tensor.stride() == strides
    tensor = values[rank].clone().to(memory_format=torch.channels_last)
    assert_equal(hvd.broadcast_(tensor, 0), values[0])


def test_strides_that_differ_between_ranks_are_an_error_on_every_rank(rank, size):
    if size == 1:
        return
    tensor = torch.ones(2, 3, 4, 5)
    if rank == 1:
        tensor = tensor.to(memory_format=torch.channels_last)
    with pytest.raises(hvd.HorovodInternalError, match="strides"):
        hvd.allreduce_(tensor)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_statistics_of_integers_are_exact(dtype, rank, size):
    values = [[small(r, (40,), dtype), small(r + 1, (9, 3), dtype)] for r in range(size)]
    results, stats = hvd.grouped_allreduce_with_stats(values[rank], [1, 0])
    for place, group in enumerate([1, 0]):
        vectors = [values[r][place].double() for r in range(size)]
        mean = sum(vectors) / size
        squares = sum(float((v * v).sum()) for v in vectors)
        is_half = dtype in (torch.float16, torch.bfloat16)  # which round by way of float32
        assert_equal(results[place], (mean.float() if is_half else mean).to(dtype))
        assert float(stats.groups[group, 0]) == squares
        assert float(stats.groups[group, 1]) == pytest.approx(float((mean**2).sum()), rel=1e-14)
        if size > 1:
            variance = sum(float(((v - mean) ** 2).sum()) for v in vectors) / (size - 1)
            assert float(stats.groups[group, 2]) == pytest.approx(variance, rel=1e-12)
    assert stats.orthogonality is None
    assert stats.nonfinite.tolist() == [0, 0]


def test_squares_of_several_passes_are_added_in_place_of_the_tensors_own(rank, size):
    # Oracle: exact sums of small integers. Two dtypes: two parts, and yet each share counts once.
    tensors = [torch.full((5,), 2.0), torch.full((7,), 1.0, dtype=torch.float64)]
    shares = torch.tensor([10.0 + rank, 100.0 * rank], dtype=torch.float64)
    (ones, _), stats = hvd.grouped_allreduce_with_stats(tensors, [0, 1], local_squares=shares)
    ranks = sum(range(size))
    assert ones.tolist() == [2.0] * 5
    assert stats.groups[:, 0].tolist() == [10.0 * size + ranks, 100.0 * ranks]
    assert stats.groups[:, 1].tolist() == [20.0, 7.0]
    assert stats.groups[:, 2:].isnan().all(), "of how many gradients is not known"


def test_squares_on_some_ranks_only_are_an_error_on_every_rank(rank, size):
    if size == 1:
        return
    shares = torch.ones(1, dtype=torch.float64) if rank == 0 else None
    with pytest.raises(hvd.HorovodInternalError, match="local_squares"):
        hvd.grouped_allreduce_with_stats([torch.ones(3)], local_squares=shares)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_squares_that_do_not_fit_are_refused(op):
    shares = torch.ones(2 if op == hvd.Average else 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"local_squares must be float64 of shape \(1,\)"):
        hvd.grouped_allreduce_with_stats([torch.ones(3)], op=op, local_squares=shares)


def test_statistics_of_adasum_are_orthogonality(rank, size):
    basis = torch.zeros(8)
    basis[rank] = 1.0
    mine = [basis, torch.ones(3)]
    (spread, same), stats = hvd.grouped_allreduce_with_stats_(mine, op=hvd.Adasum)
    assert spread.tolist() == [1.0] * size + [0.0] * (8 - size)
    assert same.tolist() == [1.0] * 3
    assert stats.groups is None
    assert stats.orthogonality.tolist() == pytest.approx([1.0, 1.0 / size])


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"groups must be a number in \[0, 1\)"):
        hvd.grouped_allreduce_with_stats([torch.ones(3)], [1])
    with pytest.raises(TypeError, match="got int64"):
        hvd.grouped_allreduce_with_stats([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="op must be Average, Sum or Adasum"):
        hvd.grouped_allreduce_with_stats([torch.ones(3)], op=hvd.Max)


def test_tensors_with_gaps_are_refused_in_place_and_copied_else(size):
    every_other = torch.ones(6)[::2]
    with pytest.raises(ValueError, match="must be dense"):
        hvd.grouped_allreduce_with_stats_([torch.ones(2), every_other])
    (_, mean), stats = hvd.grouped_allreduce_with_stats([torch.ones(2), every_other])
    assert mean.tolist() == [1.0] * 3
    assert stats.groups[0, :2].tolist() == [5.0 * size, 5.0]
