"""GradScaler with both forms of the distributed optimizer; one rank's gradient is infinite.

Oracle: reference_training.py, in which the step is lost for all ranks. The scale is a power of 2,
so that scaling and unscaling are exact.
"""

from __future__ import annotations

import pytest
import torch
from inputs import bits
from training import (
    ADAM,
    MOMENTUM,
    assert_equal_on_all_ranks,
    assert_weights,
    loss_of,
    make_adam,
    make_model,
)

import adareduce.torch as hvd
import reference_training as expected

LOST = 3  # the step in which a gradient is infinite
STEPS = 6
SCALE = 2.0**12
RULES = {
    "momentum": MOMENTUM,
    "Adam": ADAM,
    "foreach": (lambda p: make_adam(p, foreach=True), ADAM[1]),
    "fused": (lambda p: make_adam(p, fused=True), ADAM[1]),
}


def state_bits(optimizer):
    return [
        bits(torch.as_tensor(value))
        for state in optimizer.state.values()
        for value in state.values()
        if value is not None
    ]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["average", "adasum"])
def test_all_ranks_skip_the_step_when_one_has_an_infinity(method, rule, clip, rank, size, ranks):
    model = make_model(torch.float32)
    op = hvd.Adasum if method == "adasum" else hvd.Average
    make_optimizer, make_rule = RULES[rule]
    optimizer = hvd.DistributedOptimizer(make_optimizer(model.parameters()), op=op)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    course = expected.train(method, make_rule, size=size, steps=STEPS, clip=clip, lost=[LOST])
    for step, weights in enumerate(course.weights):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step == LOST and rank == size - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = state_bits(optimizer)
        if clip is None:
            scaler.step(optimizer)
        else:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        scaler.update()
        assert_weights(model, weights)
        assert (state_bits(optimizer) == before) == (step == LOST)
    assert_equal_on_all_ranks(model, ranks)
    halved = SCALE / 2 if method == "average" or rank == size - 1 else SCALE
    assert scaler.get_scale() == halved
    assert not hasattr(optimizer, "found_inf")


def test_a_disabled_scaler_changes_nothing(size):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    course = expected.train("average", lambda: expected.Sgd(0.05), size=size, steps=3)
    for step, weights in enumerate(course.weights):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_weights(model, weights)


def test_unscaling_gradients_that_are_being_reduced_is_noticed():
    model = make_model(torch.float32)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"call synchronize\(\) before"):
        scaler.step(optimizer)
    optimizer.zero_grad()


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_a_rank_without_any_gradient_takes_part(op, rank, size, ranks):
    model = make_model(torch.float32)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), op=op)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(model, step))
        if rank == 0:
            loss.backward()
        scaler.step(optimizer)
        if rank == 0 or op == hvd.Average:
            scaler.update()
        else:  # torch refuses to update a scaler that has seen no gradient
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    assert_equal_on_all_ranks(model, ranks)
    alone = make_model(torch.float32)
    single = torch.optim.SGD(alone.parameters(), lr=0.05 / (size if op == hvd.Average else 1))
    for step in range(3):
        single.zero_grad()
        inputs, targets = (torch.tensor(v).float() for v in expected.batch(step, 0, 0))
        torch.nn.functional.mse_loss(alone(inputs), targets).backward()
        single.step()
    assert_weights(model, [p.detach() for p in alone.parameters()])
