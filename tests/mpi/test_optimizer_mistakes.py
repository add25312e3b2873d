"""What users do wrong with optimizers must not make the ranks' weights drift apart in silence."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_library_works

import adareduce.torch as hvd


def model_of(num_elements=3):
    return [torch.nn.Parameter(torch.ones(num_elements)), torch.nn.Parameter(torch.ones(2))]


def backward(parameters):
    sum(parameter.sum() for parameter in parameters).backward()


@pytest.mark.parametrize("kind", ["plain average", "adascale", "adascale of a distributed one"])
def test_an_optimizer_that_fails_on_one_rank_raises_on_all_at_their_next_call(kind, rank, size):
    parameters = model_of()
    inner = torch.optim.SGD(parameters, lr=0.5)

    def fail(*_):
        raise ArithmeticError("only one rank fails")

    if rank == size - 1:
        inner.register_step_pre_hook(fail)
    optimizer = inner
    if kind != "adascale":
        optimizer = hvd.DistributedOptimizer(optimizer)
    if kind != "plain average":
        optimizer = hvd.AdaScale(optimizer)
    backward(parameters)
    if rank == size - 1:
        with pytest.raises(ArithmeticError):
            optimizer.step()
    else:
        optimizer.step()
        with pytest.raises(hvd.HorovodInternalError, match="only one rank fails"):
            hvd.allreduce(torch.ones(1))
    assert_library_works()


def test_a_step_without_reduction_is_refused(rank):
    parameters = model_of()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.5))
    backward(parameters)
    with (
        optimizer.skip_synchronize(),
        pytest.raises(RuntimeError, match=r"synchronize\(\) must come"),
    ):
        optimizer.step()
    assert parameters[0].tolist() == [1.0] * 3
    optimizer.step()
    assert parameters[0].tolist() == [0.5] * 3


def test_a_new_optimizer_takes_the_parameters_over(size):
    parameters = model_of()
    inner = torch.optim.SGD(parameters, lr=1.0)
    former = hvd.DistributedOptimizer(inner, op=hvd.Sum)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), op=hvd.Sum)
    for step in range(2):
        optimizer.zero_grad()
        backward(parameters)
        optimizer.step()
        assert parameters[0].tolist() == [1.0 - size * (step + 1.0)] * 3
    assert former.reducer is not optimizer.reducer


def test_adascale_refuses_a_step_before_all_passes(rank):
    parameters = model_of()
    optimizer = hvd.AdaScale(torch.optim.SGD(parameters, lr=0.5), backward_passes_per_step=3)
    backward(parameters)
    with pytest.raises(RuntimeError, match="all 3 backward passes must come before"):
        optimizer.step()
    optimizer.zero_grad()
    for _ in range(3):
        backward(parameters)
    optimizer.step()
    assert parameters[0].tolist() == pytest.approx([-0.5] * 3, rel=1e-5)
    assert_library_works()


def test_a_closure_that_fails_on_one_rank_of_adascale_raises_on_all(rank, size):
    parameters = model_of()
    optimizer = hvd.AdaScale(torch.optim.SGD(parameters, lr=0.5))

    def closure():
        if rank == size - 1:
            raise ArithmeticError("no loss here")
        backward(parameters)
        return 1.0

    expected = ArithmeticError if rank == size - 1 else hvd.HorovodInternalError
    with pytest.raises(expected, match="no loss here"):
        optimizer.step(closure)
    optimizer.zero_grad()
    assert_library_works()


def test_passes_changed_behind_adascales_back_are_noticed():
    parameters = model_of()
    inner = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.5))
    optimizer = hvd.AdaScale(inner)
    inner.set_backward_passes_per_step(2)
    for _ in range(2):
        backward(parameters)
    with pytest.raises(RuntimeError, match="AdaScale's own set_backward_passes_per_step"):
        optimizer.step()


def test_a_grad_scaler_and_adascale_count_skipped_steps_alike(rank, size):
    parameters = model_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = hvd.AdaScale(torch.optim.SGD(parameters, lr=0.5), loss_scale=scaler)
    for step in range(4):
        optimizer.zero_grad()
        is_bad = step == 1 and rank == size - 1
        loss = sum(p.sum() for p in parameters) * (float("inf") if is_bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_steps.item() == 1
    # Three steps at a gain of 1, since all gradients are equal; AdaScale's floor is 1e-6.
    assert parameters[0].tolist() == pytest.approx([-0.5] * 3, rel=1e-5)
    assert scaler.get_scale() == 2.0


def test_unscaling_before_adascale_has_averaged_is_noticed():
    parameters = model_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = hvd.AdaScale(torch.optim.SGD(parameters, lr=0.5), loss_scale=scaler)
    scaler.scale(sum(p.sum() for p in parameters)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"must not be|synchronize\(\) must come before"):
        scaler.step(optimizer)
    optimizer.zero_grad()


def test_the_state_of_adascale_is_broadcast(rank, size):
    parameters = model_of()
    optimizer = hvd.AdaScale(torch.optim.SGD(parameters, lr=0.5, momentum=0.9), scale=4.0)
    if rank == 0:
        state = optimizer.state_dict()
        state["adascale"]["tau"] = torch.tensor(7.0, dtype=torch.float64)
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.25
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.tau.item() == 7.0
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_schedulers_made_first_and_chained_ones_follow_tau(recwarn):
    parameters = model_of()
    inner = torch.optim.SGD(parameters, lr=1.0)
    chained = torch.optim.lr_scheduler.ChainedScheduler([
        torch.optim.lr_scheduler.ExponentialLR(inner, 0.5),
        torch.optim.lr_scheduler.ConstantLR(inner, 1.0),
    ])  # fmt: skip
    optimizer = hvd.AdaScale(hvd.DistributedOptimizer(inner))
    schedule = hvd.AdaScaleSchedule(optimizer, chained)
    for _ in range(3):
        optimizer.zero_grad()
        backward(parameters)
        optimizer.step()
        schedule.step()
    assert optimizer.tau.item() == pytest.approx(3.0, rel=1e-5)  # equal gradients: a gain of 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**3)
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
