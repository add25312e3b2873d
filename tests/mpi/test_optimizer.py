"""DistributedOptimizer with Average and Sum.

Oracle: reference_training.py, a training on one process in float64; or exact small integers.
"""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, bits
from training import (
    ADAM,
    MOMENTUM,
    OPTIMIZERS,
    assert_course,
    assert_equal_on_all_ranks,
    assert_weights,
    integer_parameters,
    loss_of,
    make_model,
    plain_sgd,
    weights_of,
)

import adareduce.torch as hvd
import reference_training as expected

OPS = {"average": hvd.Average, "sum": hvd.Sum}


@pytest.fixture
def single(monkeypatch):
    """Every parameter has a bucket of its own."""
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", "0")


# ---- the method ---------------------------------------------------------------------------------


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("op", OPS)
def test_losses_and_weights_are_those_of_one_process(op, rule, passes, dtype, size, ranks):
    make_optimizer, make_rule = OPTIMIZERS[rule]
    model = make_model(dtype)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(model.parameters()),
        model.named_parameters(),
        op=OPS[op],
        backward_passes_per_step=passes,
    )
    course = expected.train(op, make_rule, size=size, passes=passes)
    assert_course(model, optimizer, course, passes)
    assert_equal_on_all_ranks(model, ranks)


@pytest.mark.parametrize("arguments", [{"groups": 2}, {"groups": 100}, {"groups": "lists"}])
@pytest.mark.parametrize("threshold", ["0", "100", "100000"])
def test_cutting_buckets_otherwise_changes_no_bit(arguments, threshold, monkeypatch):
    def train(**more):
        model = make_model(torch.float32)
        parameters = list(model.parameters())
        if more.get("groups") == "lists":
            more["groups"] = [[parameters[2], parameters[0]]]
        optimizer = hvd.DistributedOptimizer(ADAM[0](parameters), **more)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        return weights_of(model)

    usual = train()
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", threshold)
    for other in (train(), train(**arguments)):
        assert [bits(w) for w in other] == [bits(w) for w in usual]


def test_a_bucket_is_reduced_while_backward_still_runs(single):
    first, last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    model = torch.nn.Sequential(first, last)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    reduced_meanwhile = []

    def wait_for_the_last_layer(_):
        # Backward comes here after the last layer and before the first. Without overlap its
        # reduction begins only when backward has returned, and this waits for ever.
        handle = optimizer.reducer._buckets[0].handle
        while not hvd.poll(handle):
            pass
        reduced_meanwhile.append(first.weight.grad is None)

    first.weight.register_hook(wait_for_the_last_layer)
    model(torch.ones(2, 3)).sum().backward()
    assert reduced_meanwhile == [True]
    optimizer.step()


def test_every_dtype_travels_in_a_request_of_its_own(rank, size):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    optimizer = plain_sgd(parameters)
    assert optimizer.reducer.num_buckets == 4
    sum((rank + 1) * k * p.double().sum() for k, p in enumerate(parameters)).backward()
    optimizer.step()
    for k, p in enumerate(parameters):
        assert_equal(p.detach(), torch.full_like(p, -k * size * (size + 1) / 2).detach())


def test_predividing_and_compression_leave_the_mean(rank, size):
    class Single(hvd.Compression.none):
        @staticmethod
        def compress(tensor):
            return tensor.float(), tensor.dtype

        @staticmethod
        def decompress(tensor, ctx):
            return tensor.to(ctx)

    course = expected.train("average", MOMENTUM[1], size=size)
    for arguments, tolerance in (
        ({"gradient_predivide_factor": 3.0}, None),
        ({"compression": Single}, 60 * 2.0**-24),
    ):
        model = make_model()
        optimizer = hvd.DistributedOptimizer(MOMENTUM[0](model.parameters()), **arguments)
        assert_course(model, optimizer, course, tolerance=tolerance)
        if tolerance is not None:  # it was really shorter on the way
            error = (weights_of(model)[0] - torch.tensor(course.weights[-1][0])).abs().max()
            assert error > 2.0**-40


@pytest.mark.min_ranks(2)
def test_a_smaller_process_set_trains_by_itself(rank, size):
    members = hvd.add_process_set([*range(size - 1)])
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), process_set=members
    )
    if members.included():
        course = expected.train("average", lambda: expected.Sgd(0.05), size=size - 1)
        assert_course(model, optimizer, course)
    else:  # steps alone
        before = weights_of(model)
        loss_of(model, 0).backward()
        own = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert_weights(model, [w - 0.05 * g for w, g in zip(before, own, strict=True)])


# ---- gradients that are missing, or of another kind ---------------------------------------------


def test_parameters_without_gradient_on_some_ranks_count_as_zero(single, rank, size):
    parameters = integer_parameters(3, 3, 3)
    optimizer = plain_sgd(parameters)
    for _ in range(2):
        optimizer.zero_grad()
        # Parameter k has a gradient on the ranks up to k.
        used = [p.sum() * (rank + 1) for k, p in enumerate(parameters) if rank <= k]
        if used:
            sum(used).backward()
        optimizer.step()
    for k, p in enumerate(parameters):
        total = sum(r + 1 for r in range(size) if r <= k)
        assert_equal(p.detach(), torch.full_like(p, -2 * total).detach())


@pytest.mark.parametrize("make_optimizer", [MOMENTUM[0], ADAM[0]])
def test_a_parameter_without_gradient_on_any_rank_is_left_alone(make_optimizer):
    # On one process an optimizer does not see it: no decay, no momentum, no state.
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = hvd.DistributedOptimizer(make_optimizer([used, unused]))
    for _ in range(3):
        optimizer.zero_grad()
        used.sum().backward()
        optimizer.step()
    assert unused.grad is None
    assert unused not in optimizer.state
    assert_equal(unused.detach(), torch.ones(2))
    assert not torch.equal(used.detach(), torch.ones(2))


def test_zeroed_gradients_are_kept_where_nothing_is_set_to_none(rank, size):
    used, unused = integer_parameters(2, 2)
    optimizer = plain_sgd([used, unused])
    (used.sum() + unused.sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert_equal(unused.grad, torch.zeros_like(unused))
    (used.sum() * (rank + 1)).backward()
    optimizer.step()
    assert_equal(unused.grad, torch.zeros_like(unused))
    assert_equal(used.grad, torch.full_like(used.grad, size * (size + 1) / 2))


def test_sparse_gradients_are_made_dense_on_demand(rank, size):
    table = torch.nn.Embedding(6, 2, sparse=True, dtype=torch.float64)
    torch.nn.init.zeros_(table.weight)
    optimizer = plain_sgd(table.parameters(), sparse_as_dense=True)
    table(torch.tensor([rank, rank, 5])).sum().backward()
    optimizer.step()
    rows = torch.zeros(6, 2, dtype=torch.float64)
    for r in range(size):
        for row in (r, r, 5):
            rows[row] -= 1
    assert_equal(table.weight.detach(), rows)


def test_gradients_keep_the_strides_of_channels_last(rank, size):
    convolution = torch.nn.Conv2d(2, 3, 2).double().to(memory_format=torch.channels_last)
    optimizer = plain_sgd(convolution.parameters(), op=hvd.Average)
    before = convolution.weight.detach().clone()
    if rank == 0:  # the others have no gradient, or one of other strides
        convolution(torch.ones(1, 2, 2, 2, dtype=torch.float64)).sum().backward()
    if rank == 1:
        convolution.weight.grad = torch.ones(3, 2, 2, 2, dtype=torch.float64)
    optimizer.step()
    mean = min(size, 2) / size
    assert_weights(torch.nn.ParameterList([convolution.weight]), [before - mean])
    assert convolution.weight.grad.stride() == convolution.weight.stride()
