"""Adasum between MPI ranks. Oracle: the long double tree of tests/reference.py and its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import FLOATS, arrays, assert_equal, bits, norm, normals, of_all_ranks, total

import adareduce.torch as hvd
import reference

GROUPS = {
    "five-and-eight": [(5,), (8,)],
    "odd": [(1,), (3,), (7, 5), (31,), (33,), (1001,)],
    "with-empty": [(0,), (5,), (2, 0), (0,), (17,), (0,)],
    "scalars": [(), (), (2,)],
    "nothing": [(0,), (0, 3)],
    "large": [(20_011,), (64, 129), (3,)],
}


def assert_adasum(result: torch.Tensor, values: list[torch.Tensor]) -> None:
    expected, bound = reference.adasum_with_bound(arrays(values))
    distance = norm(result.numpy().astype(np.longdouble) - expected)
    assert distance <= bound, f"{distance} from the tree, allowed are {bound}"


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_adasum_agrees_with_the_tree_tensor_by_tensor(group, dtype, rank, ranks):
    values = [of_all_ranks(normals, s, dtype, i) for i, s in enumerate(GROUPS[group])]
    results = hvd.grouped_allreduce([of_ranks[rank] for of_ranks in values], op=hvd.Adasum)
    for result, of_ranks in zip(results, values, strict=True):
        assert result.dtype == dtype
        assert_adasum(result, of_ranks)
    everyones = ranks.gather([bits(result) for result in results])
    assert all(theirs == everyones[0] for theirs in everyones), "the ranks have different bits"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adasum_has_the_same_bits_from_run_to_run(dtype, rank):
    # Oracle: the first run.
    values = [normals(rank, shape, dtype) for shape in GROUPS["large"]]
    runs = [
        [bits(result) for result in hvd.grouped_allreduce(values, op=hvd.Adasum)] for _ in range(5)
    ]
    assert all(run == runs[0] for run in runs)


def test_adasum_of_dtypes_in_one_group_keeps_them_apart(rank):
    shapes = [((5,), torch.float32), ((8,), torch.float64), ((9,), torch.float32)]
    values = [of_all_ranks(normals, s, d, i) for i, (s, d) in enumerate(shapes)]
    results = hvd.grouped_allreduce_([v[rank].clone() for v in values], op=hvd.Adasum)
    for result, of_ranks in zip(results, values, strict=True):
        assert_adasum(result, of_ranks)


def test_adasum_of_orthogonal_vectors_is_their_sum(rank, size):
    # Oracle: an identity, exact because every dot product is 0.
    values = [torch.zeros(3 * size) for _ in range(size)]
    for index, value in enumerate(values):
        value[3 * index : 3 * index + 3] = torch.tensor([1.5, -2.0, index + 0.25])
    assert_equal(hvd.allreduce(values[rank], op=hvd.Adasum), total(values))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adasum_of_equal_vectors_is_that_vector(dtype):
    # Oracle: an identity, exact because shares are 1/2.
    value = normals(0, (1234,), dtype)
    assert_equal(hvd.allreduce(value, op=hvd.Adasum), value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adasum_of_parallel_vectors_weighs_them_by_their_depth(dtype, rank, size):
    # Oracle: 2^-depth of each rank in the tree; powers of two are exact.
    weights = reference.weights(reference.adasum_tree(size))
    value = torch.tensor([1.0, -2.0, 4.0], dtype=dtype)
    result = hvd.allreduce(value * 2.0**rank, op=hvd.Adasum)
    expected = sum(weights[other] * 2.0**other for other in range(size))
    torch.testing.assert_close(result, value * expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_a_rank_without_gradient_changes_nothing(rank, size):
    # Oracle: Adasum of a and 0 is a.
    value = normals(7, (100,), torch.float32)
    mine = value if rank == size - 1 else torch.zeros(100)
    assert_equal(hvd.allreduce(mine, op=hvd.Adasum), value)


@pytest.mark.parametrize("exponent", [-140, -70, 60, 120])
def test_adasum_neither_overflows_nor_underflows(exponent, rank):
    values = [value * 2.0**exponent for value in of_all_ranks(normals, (65,), torch.float32)]
    result = hvd.allreduce(values[rank], op=hvd.Adasum)
    assert torch.isfinite(result).all()
    assert_adasum(result, values)
