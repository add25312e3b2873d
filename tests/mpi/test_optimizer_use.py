"""What scripts do with a distributed optimizer: accumulate, clip, schedule, save, resume.

Oracle: reference_training.py, a training on one process in float64; or exact small integers.
"""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from inputs import assert_equal, assert_library_works
from training import (
    ADAM,
    MOMENTUM,
    assert_course,
    assert_equal_on_all_ranks,
    assert_weights,
    integer_parameters,
    loss_of,
    make_model,
    plain_sgd,
)

import adareduce.torch as hvd
import reference_training as expected


def test_the_number_of_passes_can_change_between_steps(size):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05))
    course = expected.train("average", lambda: expected.Sgd(0.05), size=size, passes=3, steps=3)
    optimizer.set_backward_passes_per_step(3)
    assert_course(model, optimizer, course, passes=3)


def test_a_step_before_all_passes_takes_what_there_is(rank, size):
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p], backward_passes_per_step=4)
    for passes in (2, 4, 1):
        optimizer.zero_grad()
        for _ in range(passes):
            (p.sum() * (rank + 1)).backward()
        optimizer.step()
    assert_equal(p.detach(), torch.full_like(p, -7 * size * (size + 1) / 2).detach())


def test_clipping_after_synchronize_sees_the_gradients_of_all_ranks(size):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(MOMENTUM[0](model.parameters()))
    course = expected.train("average", MOMENTUM[1], size=size, clip=0.05)

    def clip_and_step():
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with warnings.catch_warnings(), optimizer.skip_synchronize():
            warnings.simplefilter("error")
            optimizer.step()

    assert_course(model, optimizer, course, take_step=clip_and_step)


def test_a_step_after_synchronize_warns(rank):
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p], op=hvd.Average)
    p.sum().backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()
    assert_equal(p.detach(), -torch.ones_like(p))
    optimizer.zero_grad()
    p.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_gradients_of_a_closure_are_reduced(size):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(ADAM[0](model.parameters()))
    course = expected.train("average", ADAM[1], size=size, steps=5)
    for step, weights in enumerate(course.weights):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() == pytest.approx(course.losses[step][hvd.rank()][0])
        assert_weights(model, weights)


def test_lbfgs_takes_the_same_decisions_on_all_ranks(rank, size, ranks):
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    centres = torch.arange(4 * size, dtype=torch.float64).view(size, 4) ** 2
    arguments = {"lr": 0.5, "max_iter": 8, "line_search_fn": "strong_wolfe"}
    optimizer = hvd.DistributedOptimizer(torch.optim.LBFGS([w], **arguments))

    def closure():
        optimizer.zero_grad()
        loss = (w - centres[rank]).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_equal_on_all_ranks(torch.nn.ParameterList([w]), ranks)

    other = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    single = torch.optim.LBFGS([other], **arguments)

    def closure_of_all():
        single.zero_grad()
        loss = (other - centres).square().sum() / (2 * size)
        loss.backward()
        return loss

    single.step(closure_of_all)
    torch.testing.assert_close(w.detach(), other.detach(), rtol=1e-9, atol=1e-9)
    assert optimizer.state[w]["func_evals"] == single.state[other]["func_evals"]


@pytest.mark.parametrize("scheduler_comes_first", [True, False])
def test_learning_rate_schedulers_work(scheduler_comes_first, size):
    (p,) = integer_parameters(1)
    inner = torch.optim.SGD([p], lr=1.0)

    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    scheduler = halve(inner) if scheduler_comes_first else None
    optimizer = hvd.DistributedOptimizer(inner, op=hvd.Sum)
    scheduler = scheduler or halve(optimizer)
    with warnings.catch_warnings():
        # A scheduler that was made for the inner optimizer does not see the outer one's steps.
        warnings.filterwarnings("ignore", "Detected call of")
        for _ in range(3):
            optimizer.zero_grad()
            p.sum().backward()
            optimizer.step()
            scheduler.step()
    assert p.item() == -size * (1 + 0.5 + 0.25)


def test_it_is_one_of_its_class_and_shares_state_and_groups():
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(inner)
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer).__name__ == "SGD"
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults["momentum"] == 0.9
    loss_of(model, 0).backward()
    optimizer.step()
    assert inner.state is optimizer.state
    assert len(inner.state) == 4
    inner.param_groups[0]["lr"] = 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.load_state_dict(optimizer.state_dict())
    assert inner.state is optimizer.state
    assert inner.param_groups is optimizer.param_groups


def test_state_dict_resumes_a_training(size):
    course = expected.train("average", ADAM[1], size=size, steps=6)
    model = make_model()
    first = hvd.DistributedOptimizer(ADAM[0](model.parameters()))
    half = expected.Course(course.losses[:3], course.weights[:3])
    assert_course(model, first, half)
    second = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=7.0))
    first.reducer.close()
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second.zero_grad()
        loss_of(model, step).backward()
        second.step()
        assert_weights(model, course.weights[step])


def test_step_hooks_run_once():
    (p,) = integer_parameters(1)
    optimizer = plain_sgd([p])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())  # torch patches classes here
    p.sum().backward()
    optimizer.step()
    assert seen == ["before", "after"]


def test_parameters_can_be_added(rank, size):
    p, q = integer_parameters(2, 3)
    optimizer = plain_sgd([p])
    p.sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 2.0})
    optimizer.zero_grad()
    ((p.sum() + q.sum()) * (rank + 1)).backward()
    optimizer.step()
    assert_equal(p.detach(), torch.full_like(p, -size - size * (size + 1) / 2).detach())
    assert_equal(q.detach(), torch.full_like(q, -size * (size + 1)).detach())


def test_gradients_that_are_not_accumulated_do_not_count(rank, size):
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p])
    (p.sum() * (rank + 1)).backward()
    torch.autograd.grad((p * p).sum(), [p])
    optimizer.step()
    assert_equal(p.detach(), torch.full_like(p, -size * (size + 1) / 2).detach())


def test_an_optimizer_that_is_gone_reduces_nothing(rank):
    (p,) = integer_parameters(2)
    optimizer = plain_sgd([p])
    del optimizer
    gc.collect()
    for _ in range(3):
        (p.sum() * rank).backward()
    assert_equal(p.grad, torch.full_like(p.grad, 3.0 * rank))
    assert_library_works()
