"""All-reduce as users call it. Oracle: exact integers, unless a test names another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import (
    FLOATS,
    SHAPES,
    arrays,
    assert_equal,
    assert_library_works,
    integers,
    normals,
    of_all_ranks,
    total,
)

import adareduce.torch as hvd
import reference

VARIANTS: dict[str, Callable[..., torch.Tensor]] = {
    "allreduce": hvd.allreduce,
    "allreduce_": hvd.allreduce_,
    "allreduce_async": lambda *a, **k: hvd.synchronize(hvd.allreduce_async(*a, **k)),
    "allreduce_async_": lambda *a, **k: hvd.synchronize(hvd.allreduce_async_(*a, **k)),
}
GROUPED: dict[str, Callable[..., list[torch.Tensor]]] = {
    "grouped_allreduce": hvd.grouped_allreduce,
    "grouped_allreduce_": hvd.grouped_allreduce_,
    "grouped_allreduce_async": lambda *a, **k: hvd.synchronize(
        hvd.grouped_allreduce_async(*a, **k)
    ),
    "grouped_allreduce_async_": lambda *a, **k: hvd.synchronize(
        hvd.grouped_allreduce_async_(*a, **k)
    ),
}
MIXED_GROUP = [((5,), torch.float32), ((8,), torch.float64), ((0,), torch.float32),
               ((), torch.float64), ((33, 7), torch.float32), ((2, 0), torch.float64)]  # fmt: skip


def of_all_ranks_grouped() -> list[list[torch.Tensor]]:
    """Values by tensor and rank."""
    return [
        of_all_ranks(integers, shape, dtype, index)
        for index, (shape, dtype) in enumerate(MIXED_GROUP)
    ]


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_allreduce_sum_of_integers_is_their_sum(variant, shape, dtype, rank):
    values = of_all_ranks(integers, shape, dtype)
    assert_equal(VARIANTS[variant](values[rank].clone(), op=hvd.Sum), total(values))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_allreduce_is_an_average_by_default(variant, dtype, rank, size):
    values = of_all_ranks(integers, (5, 3), dtype)
    average = total(values)
    assert_equal(VARIANTS[variant](values[rank] * size), average)
    assert_equal(VARIANTS[variant](values[rank] * size, op=hvd.Average), average)
    assert_equal(VARIANTS[variant](values[rank] * size, True), average)
    assert_equal(VARIANTS[variant](values[rank] * size, average=False), average * size)


@pytest.mark.openmpi_round
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_allreduce_adds_in_rank_order(dtype, op, rank, size):
    # Oracle: tests/reference.py, bit for bit.
    values = of_all_ranks(normals, (1001,), dtype)
    expected = reference.sum_in_rank_order(arrays(values), size if op == hvd.Average else 1.0)
    assert reference.same_bits(hvd.allreduce(values[rank], op=op).numpy(), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_factors_multiply_before_and_after(variant, rank):
    values = of_all_ranks(integers, (9,), torch.float64)
    result = VARIANTS[variant](
        values[rank].clone(), op=hvd.Sum, prescale_factor=0.5, postscale_factor=8.0
    )
    assert_equal(result, total(values) * 4)


def test_scale_factors_differ_where_the_reduction_is_not_linear(rank, size):
    # Oracle: an identity. Adasum of equal vectors is that vector, so both factors just multiply.
    value = integers(0, (9,), torch.float64)
    result = hvd.allreduce(value, op=hvd.Adasum, prescale_factor=0.5, postscale_factor=4.0)
    assert_equal(result, value * 2)


@pytest.mark.parametrize("variant", ["allreduce_", "allreduce_async_"])
def test_in_place_variants_return_the_tensor_itself(variant, rank):
    values = of_all_ranks(integers, (5,), torch.float32)
    tensor = values[rank].clone()
    version = tensor._version
    assert VARIANTS[variant](tensor, op=hvd.Sum) is tensor
    assert_equal(tensor, total(values))
    assert tensor._version > version  # or autograd would not see a changed saved tensor


@pytest.mark.parametrize("variant", ["allreduce", "allreduce_async"])
def test_out_of_place_variants_leave_the_input_alone(variant, rank):
    values = of_all_ranks(integers, (4, 6), torch.float32)
    tensor = values[rank].clone().t()
    assert not tensor.is_contiguous()
    assert_equal(VARIANTS[variant](tensor, op=hvd.Sum), total(values).t())
    assert_equal(tensor, values[rank].t())


@pytest.mark.openmpi_round
@pytest.mark.parametrize("variant", GROUPED)
def test_a_group_of_several_dtypes_is_reduced_tensor_by_tensor(variant, rank):
    group = of_all_ranks_grouped()
    mine = [of_ranks[rank].clone() for of_ranks in group]
    results = GROUPED[variant](mine, op=hvd.Sum)
    assert len(results) == len(group)
    for result, tensor, of_ranks in zip(results, mine, group, strict=True):
        assert_equal(result, total(of_ranks))
        assert (result is tensor) == variant.endswith("_")


def test_an_empty_group_is_nothing_at_all():
    assert hvd.grouped_allreduce([]) == []
    assert hvd.grouped_allreduce_([]) == []


def test_many_calls_may_be_under_way_at_once(rank):
    values = [of_all_ranks(integers, (i % 7, i), torch.float32, i) for i in range(60)]
    handles = [hvd.allreduce_async(of_ranks[rank], op=hvd.Sum) for of_ranks in values]
    for handle, of_ranks in reversed(list(zip(handles, values, strict=True))):
        assert_equal(hvd.synchronize(handle), total(of_ranks))


def test_a_result_may_be_asked_for_twice(rank):
    values = of_all_ranks(integers, (3,), torch.float32)
    handle = hvd.allreduce_async(values[rank], op=hvd.Sum)
    assert_equal(hvd.synchronize(handle), total(values))
    assert_equal(hvd.synchronize(handle), total(values))
    assert hvd.poll(handle)


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
def test_the_gradient_of_allreduce_is_the_same_allreduce_of_gradients(op, rank, size):
    # Oracle: the reduction is linear and symmetric; exact integers.
    values = of_all_ranks(integers, (6,), torch.float64)
    weights = [value * size for value in of_all_ranks(integers, (6,), torch.float64, 1)]
    tensor = values[rank].clone().requires_grad_()
    result = hvd.allreduce(tensor, op=op, prescale_factor=2.0, postscale_factor=4.0)
    (result * weights[rank]).sum().backward()
    assert_equal(tensor.grad, total(weights) * 8 / (size if op == hvd.Average else 1))


def test_a_group_has_gradients_too(rank):
    tensors = [torch.ones(3, requires_grad=True), torch.ones(2, 2, dtype=torch.float64)]
    first, second = hvd.grouped_allreduce(tensors, op=hvd.Sum)
    assert not second.requires_grad or second.grad_fn is not None
    weights = of_all_ranks(integers, (3,), torch.float32)
    (first * weights[rank]).sum().backward()
    assert_equal(tensors[0].grad, total(weights))


def test_the_gradient_of_adasum_is_refused():
    tensor = torch.ones(3, requires_grad=True)
    result = hvd.allreduce(tensor, op=hvd.Adasum)
    with pytest.raises(ValueError, match="got Adasum, which has no gradient"):
        result.sum().backward()
    assert_library_works()


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        (torch.int32, hvd.Adasum),
        (torch.bool, hvd.Adasum),
        (torch.bool, hvd.Sum),
        (torch.complex64, hvd.Sum),
    ],
    ids=str,
)
def test_dtypes_without_the_operation_are_refused_by_name(dtype, op):
    with pytest.raises(TypeError, match=f"allreduce: .*got {str(dtype).removeprefix('torch.')}"):
        hvd.allreduce(torch.zeros(3, dtype=dtype), op=op)


def test_wrong_arguments_are_refused_with_rule_and_value():
    with pytest.raises(ValueError, match=r"allreduce: only one of average and op"):
        hvd.allreduce(torch.zeros(3), average=True, op=hvd.Sum)
    with pytest.raises(
        ValueError, match=r"op must be one of Average, Sum, Adasum, Min, Max, Product, got 17"
    ):
        hvd.allreduce(torch.zeros(3), op=17)
    with pytest.raises(TypeError, match=r"allreduce: tensor must be a torch.Tensor, got list"):
        hvd.allreduce([1.0, 2.0])
    with pytest.raises(ValueError, match=r"got strides \(4, 2\) for shape \(3, 2\)"):
        hvd.allreduce_(torch.zeros(3, 4)[:, ::2])
    with pytest.raises(ValueError, match="must be dense"):
        hvd.allreduce(torch.zeros(3).to_sparse())
    with pytest.raises(ValueError, match="tensor 1 of 2 must be dense"):
        hvd.grouped_allreduce_([torch.zeros(2), torch.zeros(3, 4)[:, ::2]])
