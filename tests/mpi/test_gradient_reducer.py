"""GradientReducer by itself: statistics per parameter group, infinities, its life.

Oracle: squares and means of small integers, exact in float64 whatever the order.
"""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, assert_library_works, bits, integers

import adareduce.torch as hvd

EXTENTS = (3, 40, 1, 17, 9)
GROUPS = ((0, 3), (1,), (2, 4))  # which parameters are in which group


def make(dtype=torch.float64, **arguments):
    parameters = [torch.nn.Parameter(torch.zeros(extent, dtype=dtype)) for extent in EXTENTS]
    groups = [[parameters[k] for k in group] for group in GROUPS]
    return parameters, hvd.GradientReducer(groups, with_statistics=True, **arguments)


def gradient(k, rank, micro_batch, dtype=torch.float64):
    return integers(rank, (EXTENTS[k],), dtype, seed=10 * k + micro_batch)


def backward(parameters, rank, micro_batch, unused=()):
    used = [
        (p * gradient(k, rank, micro_batch, p.dtype)).sum()
        for k, p in enumerate(parameters)
        if k not in unused
    ]
    sum(used).backward()


def expected_statistics(size, passes, unused=lambda k, rank: False):
    """By the definition, one rank and pass after the other."""
    rows = torch.zeros(len(GROUPS), 2, dtype=torch.float64)
    for number, group in enumerate(GROUPS):
        for k in group:
            mean = torch.zeros(EXTENTS[k], dtype=torch.float64)
            for rank in range(size):
                for micro_batch in range(passes):
                    if not unused(k, rank):
                        g = gradient(k, rank, micro_batch)
                        rows[number, 0] += g.square().sum()
                        mean += g / size
            rows[number, 1] += mean.square().sum()
    return rows


def assert_statistics(reducer, wanted, ranks):
    torch.testing.assert_close(reducer.statistics, wanted, rtol=1e-12, atol=0)
    assert len(set(ranks.gather(bits(reducer.statistics)))) == 1


@pytest.mark.openmpi_round
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("bucket_bytes", [0, 200, 10**6])
def test_statistics_are_those_of_each_group_over_ranks_and_passes(
    bucket_bytes, passes, rank, size, ranks
):
    parameters, reducer = make(bucket_bytes=bucket_bytes, passes_per_step=passes)
    for _ in range(2):  # nothing of the first step is left in the second
        for micro_batch in range(passes):
            backward(parameters, rank, micro_batch)
        reducer.reduce()
        assert_statistics(reducer, expected_statistics(size, passes), ranks)
        for k, p in enumerate(parameters):
            every = [gradient(k, r, m) for r in range(size) for m in range(passes)]
            torch.testing.assert_close(p.grad, sum(every) / size)
            p.grad = None


@pytest.mark.parametrize("passes", [1, 2])
def test_statistics_are_those_before_the_scale_factors(passes, rank, size, ranks):
    parameters, reducer = make(
        passes_per_step=passes, prescale_factor=0.25, postscale_factor=8.0, op=hvd.Sum
    )
    for micro_batch in range(passes):
        backward(parameters, rank, micro_batch)
    reducer.reduce()
    assert_statistics(reducer, expected_statistics(size, passes), ranks)
    every = [gradient(1, r, m) for r in range(size) for m in range(passes)]
    assert_equal(parameters[1].grad, 2 * sum(every))


@pytest.mark.parametrize("passes", [1, 2])
def test_unused_parameters_count_as_zero(passes, rank, size, ranks):
    def unused(k, r):
        return k == 3 or (k == 1 and r > 0)

    parameters, reducer = make(passes_per_step=passes, bucket_bytes=200)
    for micro_batch in range(passes):
        backward(parameters, rank, micro_batch, [k for k in range(5) if unused(k, rank)])
    reducer.reduce()
    assert_statistics(reducer, expected_statistics(size, passes, unused), ranks)
    assert parameters[3].grad is None


def test_a_gradient_that_is_not_accumulated_leaves_no_square(rank, size, ranks):
    parameters, reducer = make(passes_per_step=2)
    for micro_batch in range(2):
        torch.autograd.grad(sum((p * 7).sum() for p in parameters), parameters)
        backward(parameters, rank, micro_batch)
    reducer.reduce()
    assert_statistics(reducer, expected_statistics(size, 2), ranks)


def test_forgotten_passes_leave_no_square(rank, size, ranks):
    parameters, reducer = make(passes_per_step=2)
    backward(parameters, rank, 5)
    reducer.reset()
    for p in parameters:
        p.grad = None
    for micro_batch in range(2):
        backward(parameters, rank, micro_batch)
    reducer.reduce()
    assert_statistics(reducer, expected_statistics(size, 2), ranks)


def test_the_number_of_passes_can_change(rank, size, ranks):
    parameters, reducer = make()
    for passes in (1, 3, 1):
        reducer.passes_per_step = passes
        assert reducer.passes_per_step == passes
        for micro_batch in range(passes):
            backward(parameters, rank, micro_batch)
        reducer.reduce()
        assert_statistics(reducer, expected_statistics(size, passes), ranks)
        for p in parameters:
            p.grad = None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinity_on_one_rank_is_known_on_all(value, rank, size):
    parameters, reducer = make()
    backward(parameters, rank, 0)
    reducer.reduce()
    assert not reducer.nonfinite
    for p in parameters:
        p.grad = None
    ((parameters[2] * (value if rank == size - 1 else 1.0)).sum() + parameters[0].sum()).backward()
    reducer.reduce()
    assert reducer.nonfinite


def test_a_closed_reducer_launches_nothing(rank, size):
    parameters, reducer = make(passes_per_step=2)
    reducer.close()
    for _ in range(5):
        backward(parameters, rank, 0)
    assert not reducer.is_outstanding
    assert_equal(parameters[1].grad, 5 * gradient(1, rank, 0))
    assert_library_works()


def test_arguments_of_the_wrong_form_are_refused():
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    with pytest.raises(ValueError, match="op must be Average or Sum"):
        hvd.GradientReducer([[p]], op=hvd.Adasum)
    for buckets in ([[p]], [[p, q], [q]]):
        with pytest.raises(ValueError, match="every parameter that requires a gradient once"):
            hvd.GradientReducer([[p, q]], buckets=buckets)


def test_frozen_parameters_are_left_out(rank, size):
    p, q = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    q.requires_grad_(False)
    reducer = hvd.GradientReducer([[p, q]])
    ((p + q).sum() * (rank + 1)).backward()
    reducer.reduce()
    assert q.grad is None
    assert_equal(p.grad, torch.full_like(p.grad, (size + 1) / 2))


@pytest.mark.parametrize("with_statistics", [False, True])
def test_infinities_are_counted_with_and_without_statistics(rank, size, with_statistics):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    reducer = hvd.GradientReducer([parameters])
    reducer.with_statistics = with_statistics
    for last in (1.0, float("inf") if rank == size - 1 else 1.0):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[1].grad[1] = last
        reducer.reduce()
        everywhere = hvd.allgather_object((reducer.nonfinite, bool(last != 1.0)))
        assert {found for found, _ in everywhere} == {any(mine for _, mine in everywhere)}
    assert (reducer.statistics is not None) == with_statistics
    reducer.close()
