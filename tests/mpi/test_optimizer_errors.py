"""Mistakes in the use of a distributed optimizer: nobody hangs, and the next step works.

Oracle: the message, and exact integers afterwards.
"""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, assert_library_works
from training import integer_parameters, make_model, plain_sgd

import adareduce.torch as hvd


def make_sgd(model, **arguments):
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), **arguments)


def assert_next_step_works(optimizer, parameters):
    """All ranks are in line again: one more exact step."""
    for p in parameters:
        torch.nn.init.zeros_(p)
    optimizer.zero_grad()
    sum(p.sum() * (hvd.rank() + 1) for p in parameters).backward()
    optimizer.step()
    for p in parameters:
        total = hvd.size() * (hvd.size() + 1) / 2
        assert_equal(p.detach(), torch.full_like(p, -total).detach())
    assert_library_works()


# ---- arguments ----------------------------------------------------------------------------------


def names(model):
    return [(name, p) for name, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: {"named_parameters": [p for _, p in names(m)]}, "must be pairs of name and"),
        (lambda m: {"named_parameters": [("x", p) for _, p in names(m)]}, "unique names, got x"),
        (lambda m: {"named_parameters": names(m)[:3]}, r"none for 1 of 4, with the shapes \(3,\)"),
        (lambda m: {"gradient_predivide_factor": 2.0, "op": hvd.Sum}, r"op is not Average, got 2"),
        (lambda m: {"gradient_predivide_factor": 2.0, "op": hvd.Adasum}, "op=Adasum"),
        (lambda m: {"gradient_predivide_factor": 0.0}, "must be above 0, got 0.0"),
        (lambda m: {"backward_passes_per_step": 0}, "must be at least 1, got 0"),
        (lambda m: {"backward_passes_per_step": 0, "op": hvd.Adasum}, "must be at least 1, got 0"),
        (lambda m: {"op": hvd.Max}, "op must be Average, Sum or Adasum"),
        (lambda m: {"groups": 0}, "groups must be at least 1, got 0"),
        (lambda m: {"groups": "all"}, "a number or a list of lists"),
        (lambda m: {"groups": [[m[0].weight, "x"]]}, "another str in group 0"),
        (lambda m: {"groups": [[torch.zeros(1)]]}, "another Tensor in group 0"),
        (lambda m: {"groups": [[m[0].weight], [m[0].weight]]}, "one of group 1 twice"),
    ],
)
def test_arguments_of_the_wrong_form_are_refused(make, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        make_sgd(model, **make(model))


def test_only_optimizers_that_are_not_distributed_are_taken():
    model = make_model()
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Sequential"):
        hvd.DistributedOptimizer(model)
    with pytest.raises(ValueError, match="got one that is distributed"):
        hvd.DistributedOptimizer(make_sgd(model))
    with pytest.raises(TypeError, match=r"must be one of hvd.Compression, got 'fp16'"):
        make_sgd(model, compression="fp16")


def test_num_groups_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use groups"):
        optimizer = make_sgd(make_model(), num_groups=3)
    assert optimizer.reducer.num_buckets == 3


@pytest.mark.parametrize("name", ["ADAREDUCE_FUSION_THRESHOLD", "HOROVOD_FUSION_THRESHOLD"])
def test_the_fusion_threshold_is_a_number_of_bytes(name, monkeypatch):
    monkeypatch.setenv(name, "64 MB")
    with pytest.raises(ValueError, match=f"{name} must be a number of bytes, 0 or more, got '64"):
        make_sgd(make_model())
    monkeypatch.setenv(name, str(8 * (7 + 3 + 3 * 7)))  # all but the first weight
    assert make_sgd(make_model()).reducer.num_buckets == 2


# ---- gradients that somebody touches ------------------------------------------------------------


def test_a_pass_too_many_raises():
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p], named_parameters=[("fc.bias", p)], backward_passes_per_step=2)
    p.sum().backward()
    p.sum().backward()
    with pytest.raises(RuntimeError, match=r"'fc.bias' must be computed at most 2 times"):
        p.sum().backward()
    assert_next_step_works_with(optimizer, [p], 2)


def assert_next_step_works_with(optimizer, parameters, passes):
    optimizer.zero_grad()
    optimizer.set_backward_passes_per_step(1)
    assert_next_step_works(optimizer, parameters)
    optimizer.set_backward_passes_per_step(passes)


@pytest.mark.min_ranks(2)
def test_a_pass_too_many_on_one_rank_raises_on_all(rank, size, monkeypatch):
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", "0")
    p, q = integer_parameters(2, 2)
    optimizer = plain_sgd([p, q])
    q.sum().backward()  # q's bucket is the first: it is launched
    if rank == size - 1:
        with pytest.raises(RuntimeError, match="computed at most 1 times"):
            q.sum().backward()
        with pytest.raises(RuntimeError, match="computed at most 1 times"):
            optimizer.step()
    else:
        p.sum().backward()
        with pytest.raises(hvd.HorovodInternalError, match="computed at most 1 times"):
            optimizer.step()
    assert_next_step_works(optimizer, [p, q])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_during_a_reduction_raises(set_to_none):
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p])
    p.sum().backward()
    with pytest.raises(RuntimeError, match="must not be touched while they are being reduced"):
        optimizer.zero_grad(set_to_none=set_to_none)
    with pytest.raises(RuntimeError, match="must not be touched"):
        optimizer.set_backward_passes_per_step(2)
    optimizer.step()
    assert_next_step_works(optimizer, [p])


@pytest.mark.parametrize("touch", ["change", "replace", "remove"])
def test_gradients_touched_during_a_reduction_are_noticed(touch):
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p], named_parameters=[("fc.bias", p)])
    p.sum().backward()
    if touch == "change":
        torch.nn.utils.clip_grad_norm_([p], 0.5)
    else:
        p.grad = None if touch == "remove" else torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'fc.bias' must not be touched .* synchronize\(\)"):
        optimizer.step()
    assert_next_step_works(optimizer, [p])


# ---- mistakes of one rank -----------------------------------------------------------------------


@pytest.mark.min_ranks(2)
@pytest.mark.parametrize("threshold", ["0", "1000000"])
def test_a_gradient_that_cannot_be_reduced_raises_everywhere(threshold, rank, monkeypatch):
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", threshold)
    first, second, last = integer_parameters(2, 2, 2)
    table = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
    optimizer = plain_sgd([first, second, table, last])
    index = torch.tensor([1, 2])
    rows = torch.nn.functional.embedding(index, table, sparse=rank == 1)
    loss = rows.sum() + first.sum() + second.sum() + last.sum()
    if rank == 1:  # raised by the hook
        with pytest.raises(ValueError, match=r"must be dense, got layout torch.sparse_coo"):
            loss.backward()
    else:
        loss.backward()
        with pytest.raises(hvd.HorovodInternalError, match="must be dense, got layout"):
            optimizer.step()
    assert_next_step_works(optimizer, [first, second, table, last])


@pytest.mark.min_ranks(2)
def test_a_closure_that_fails_on_one_rank_raises_everywhere(rank):
    p, q = integer_parameters(2, 2)
    optimizer = plain_sgd([p, q])

    def closure():
        optimizer.zero_grad()
        if rank == 1:
            raise ArithmeticError("no loss today")
        (p.sum() + q.sum()).backward()

    error = ArithmeticError if rank == 1 else hvd.HorovodInternalError
    with pytest.raises(error, match="no loss today"):
        optimizer.step(closure)
    assert_next_step_works(optimizer, [p, q])


@pytest.mark.min_ranks(2)
def test_ranks_with_other_models_learn_the_parameters_name(rank):
    extent = 3 if rank == 1 else 2
    (p,) = integer_parameters(extent)
    optimizer = plain_sgd([p], named_parameters=[("fc.bias", p)])
    p.sum().backward()
    with pytest.raises(hvd.HorovodInternalError, match=r"fc\.bias.*shape .*\(3,\)"):
        optimizer.step()
    assert_library_works()


@pytest.mark.min_ranks(2)
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Adasum])
def test_a_parameter_that_is_unfrozen_later_raises_everywhere(op, rank):
    p, q = integer_parameters(2, 2)
    q.requires_grad_(False)
    optimizer = plain_sgd([p, q], op=op)
    p.sum().backward()
    q.requires_grad_(rank == 1)
    error = ValueError if rank == 1 else hvd.HorovodInternalError
    message = r"'parameter 1 of group 0', which began to later"
    if rank == 1 or op == hvd.Adasum:
        with pytest.raises(error, match=message):
            optimizer.step()
    else:
        optimizer.step()  # the only bucket had been launched before
    q.requires_grad_(False)
    optimizer.zero_grad()
    assert_library_works()


def test_a_group_added_behind_its_back_is_noticed():
    p, q = integer_parameters(2, 2)
    inner = torch.optim.SGD([p], lr=1.0)
    optimizer = hvd.DistributedOptimizer(inner)
    inner.add_param_group({"params": [q]})
    p.sum().backward()
    with pytest.raises(RuntimeError, match="must be added to the distributed optimizer"):
        optimizer.step()
    optimizer.synchronize()
