"""The network of reference_training.py in torch, and its training with a distributed optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import adareduce.torch as hvd
import reference_training as expected

# The relative error of one sum or product, times a generous number of them per weight in 20 steps;
# weights are of the order of 1.
TOLERANCES = {torch.float64: 500 * 2.0**-53, torch.float32: 60 * 2.0**-24}

SGD = (lambda p: torch.optim.SGD(p, lr=0.05), lambda: expected.Sgd(0.05))


def make_sgd(parameters: Any, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01, **arguments)


MOMENTUM = (make_sgd, lambda: expected.Sgd(0.02, 0.9, 0.01))

# The first steps of Adam with a tiny epsilon are +rate or -rate everywhere. Where those of two
# ranks nearly cancel, Adasum goes on with the direction of what is left: rounding errors.
EPSILON = 0.01


def make_adam(parameters: Any, **arguments: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.01, eps=EPSILON, **arguments)


ADAM = (make_adam, lambda: expected.Adam(0.01, epsilon=EPSILON))
OPTIMIZERS = {"SGD": SGD, "momentum": MOMENTUM, "Adam": ADAM}


def make_model(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    """Equal on all ranks."""
    model = torch.nn.Sequential(
        torch.nn.Linear(expected.INPUTS, expected.HIDDEN),
        torch.nn.Tanh(),
        torch.nn.Linear(expected.HIDDEN, expected.OUTPUTS),
    ).to(dtype)
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), expected.initial_weights(), strict=True):
            parameter.copy_(torch.tensor(values))
    return model


def integer_parameters(
    *extents: int, dtype: torch.dtype = torch.float64
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(extent, dtype=dtype)) for extent in extents]


def plain_sgd(parameters: Any, **arguments: Any) -> Any:
    """W <- w - sum of the gradients: exact with integers."""
    arguments = {"op": hvd.Sum} | arguments
    return hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), **arguments)


def loss_of(model: torch.nn.Module, step: int, micro_batch: int = 0) -> torch.Tensor:
    """This rank's loss."""
    dtype = next(model.parameters()).dtype
    inputs, targets = (
        torch.tensor(values).to(dtype) for values in expected.batch(step, micro_batch, hvd.rank())
    )
    return torch.nn.functional.mse_loss(model(inputs), targets)


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_weights(
    model: torch.nn.Module, values: Sequence[Any], tolerance: float | None = None
) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        allowed = TOLERANCES[parameter.dtype] if tolerance is None else tolerance
        torch.testing.assert_close(
            parameter.detach().double(), torch.as_tensor(value).double(), rtol=allowed, atol=allowed
        )


def assert_course(
    model: torch.nn.Module,
    optimizer: Any,
    course: expected.Course,
    passes: int = 1,
    take_step: Callable[[], Any] | None = None,
    tolerance: float | None = None,
) -> None:
    """Trains as long as `course`, and compares all losses and weights with it."""
    for step, (losses, weights) in enumerate(zip(course.losses, course.weights, strict=True)):
        optimizer.zero_grad()
        for micro_batch in range(passes):
            loss = loss_of(model, step, micro_batch)
            loss.backward()
            allowed = TOLERANCES[loss.dtype] if tolerance is None else tolerance
            torch.testing.assert_close(
                loss.item(), losses[hvd.rank()][micro_batch], rtol=allowed, atol=allowed
            )
        optimizer.step() if take_step is None else take_step()
        assert_weights(model, weights, tolerance)


def assert_equal_on_all_ranks(model: torch.nn.Module, ranks: Any) -> None:
    """The same bits everywhere."""
    bits = [
        parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for parameter in model.parameters()
    ]
    assert len(set(map(tuple, ranks.gather(bits)))) == 1


def step_with_scaler(
    scaler: torch.amp.GradScaler, optimizer: Any, clips: bool, max_norm: float = math.inf
) -> None:
    """A step as the documents of GradScaler have it: alone, or with clipping in between."""
    if not clips:
        scaler.step(optimizer)
        return
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    if max_norm < math.inf:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
