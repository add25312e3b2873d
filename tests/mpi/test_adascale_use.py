"""AdaScale with scaled losses, clipping, closures, groups, passes; on one rank; refusals."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from adascale_reference import (
    OPTIMIZERS,
    WRAPPINGS,
    Reference,
    assert_same,
    backward,
    groups_of,
    loss_of,
    make_model,
    wrap,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import step_with_scaler

import adareduce.torch as hvd

# Not an attribute of the package, which has the function of this name.
allreduce_module = importlib.import_module("adareduce.torch.allreduce")


@pytest.mark.parametrize("kind", ["number", "function", "scaler"])
def test_statistics_do_not_see_the_scale_of_the_loss(kind, rank, size):
    # Oracle: the same run with a loss that is not scaled; powers of two change no bits.
    factor = 1024.0
    sources: dict[str, Any] = {
        "number": factor,
        "function": lambda: factor,
        "scaler": torch.amp.GradScaler("cpu", init_scale=factor),
    }
    plain, scaled = make_model(), make_model()
    options = {"averaging": "debiased", "absolute_floor": 1e-6}
    first = wrap("plain", torch.optim.SGD(groups_of(plain), lr=0.05), 2, **options)
    second = wrap(
        "plain", torch.optim.SGD(groups_of(scaled), lr=0.05), 2, loss_scale=sources[kind], **options
    )
    if kind == "scaler":
        sources[kind].scale(torch.ones(()))  # it makes its scale when it is first used
    for step in range(4):
        backward(plain, first, step, rank, 2)
        first.step()
        second.zero_grad()
        for number in range(2):
            (factor * loss_of(scaled, step, rank, number) / 2).backward()
        second.synchronize()
        for parameter in scaled.parameters():
            parameter.grad /= factor
        with second.skip_synchronize():
            second.step()
        assert torch.equal(second.variance, first.variance)
        assert torch.equal(second.gains, first.gains)
    for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("clips", [False, True])
def test_a_grad_scaler_decides_alike_on_all_ranks(clips, wrapping, rank, size, ranks):
    # Oracle: a run without a scaler, which never saw the step that overflows on rank 0 alone.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    plain, scaled = make_model(), make_model()
    first = wrap("plain", torch.optim.SGD(groups_of(plain), lr=0.05), 2)
    second = wrap(wrapping, torch.optim.SGD(groups_of(scaled), lr=0.05), 2, loss_scale=scaler)
    for step in range(6):
        overflows = step == 3
        second.zero_grad()
        for number in range(2):
            loss = loss_of(scaled, step, rank, number) / 2
            scaler.scale(loss * (math.inf if overflows and rank == 0 else 1.0)).backward()
        step_with_scaler(scaler, second, clips, max_norm=1e6)
        scaler.update()
        if not overflows:
            backward(plain, first, step, rank, 2)
            first.step()
        assert scaler.get_scale() == (2.0**9 if step >= 3 else 2.0**10)
        assert torch.equal(second.gains, first.gains)
        assert torch.equal(second.tau, first.tau)
    for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert len(set(ranks.gather(scaler.get_scale()))) == 1


def test_gradients_may_be_clipped_between_synchronize_and_step(rank, size):
    # Oracle: statistics of what was reduced, a step of what was clipped.
    model, reference = make_model(), Reference("SGD", size, 2)
    optimizer = wrap("plain", OPTIMIZERS["SGD"](groups_of(model)), 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, optimizer, 0, rank, 2)
    optimizer.synchronize()
    for parameter in model.parameters():
        parameter.grad.zero_()
    with optimizer.skip_synchronize():
        optimizer.step()
    reference.step(0)
    np.testing.assert_allclose(optimizer.variance, reference.average[2, 0], rtol=1e-9)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_averaging_twice_is_refused(rank):
    model = make_model()
    optimizer = hvd.AdaScale(torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, optimizer, 0, rank, 1)
    with (
        pytest.raises(RuntimeError, match=r"synchronize\(\) must come first"),
        optimizer.skip_synchronize(),
    ):
        pass
    optimizer.synchronize()
    with pytest.raises(RuntimeError, match="must be called in skip_synchronize"):
        optimizer.step()
    with optimizer.skip_synchronize():
        optimizer.step()


def test_parameter_groups_that_came_later_are_refused():
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer = hvd.AdaScale(inner)
    inner.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(
        RuntimeError, match="must be those it was made for, got 2 where there were 1"
    ):
        optimizer.step()


def test_a_closure_is_called_before_the_reduction(rank, size):
    model, reference = make_model(), Reference("SGD", size, 1)
    optimizer = wrap("plain", OPTIMIZERS["SGD"](groups_of(model)))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        return loss

    for step in range(3):
        expected = loss_of(model, step, rank).item()
        assert optimizer.step(closure).item() == expected
        reference.step(step)
    assert_same(optimizer, model, reference)


def test_all_groups_may_have_the_total_gain(rank, size):
    model, each = make_model(), make_model()
    total = wrap("plain", OPTIMIZERS["SGD"](groups_of(model)), 2, per_group=False)
    single = wrap("plain", OPTIMIZERS["SGD"](list(each.parameters())), 2)
    for step in range(5):
        for net, optimizer in ((model, total), (each, single)):
            backward(net, optimizer, step, rank, 2)
            optimizer.step()
    assert total.gains.shape == (2,)
    np.testing.assert_allclose(total.gains, [single.gain.item()] * 2, rtol=1e-12)
    for mine, theirs in zip(model.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_more_passes_make_the_scale_larger_and_keep_the_averages(rank, size):
    model, reference = make_model(), Reference("SGD", size, 2)
    optimizer = wrap("plain", OPTIMIZERS["SGD"](groups_of(model)), 2)
    assert optimizer.scale == 2 * size
    for step in range(4):
        backward(model, optimizer, step, rank, 2)
        optimizer.step()
        reference.step(step)
    variance = optimizer.variance.item()
    optimizer.set_backward_passes_per_step(6)
    assert optimizer.scale == 6 * size
    assert optimizer.variance.item() == variance
    reference.workers = [(r, number) for r in range(size) for number in range(6)]
    reference.scale = 6.0 * size
    for step in range(4, 8):
        backward(model, optimizer, step, rank, 6)
        optimizer.step()
        reference.step(step)
    assert_same(optimizer, model, reference)


def differences() -> Iterator[tuple[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for step in range(6):
        yield step, 1.0 + torch.randn(4, generator=generator, dtype=torch.float64)


def test_one_rank_without_accumulation_compares_consecutive_gradients(rank, size):
    # Oracle: mu^2 = <g', g>, sigma^2 = S |g' - g|^2 / 2 of consecutive gradients, plain means.
    if size > 1:
        pytest.skip("only of one rank")
    weights = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = hvd.AdaScale(torch.optim.SGD([weights], lr=0.0), scale=8.0)
    at_one = hvd.AdaScale(torch.optim.SGD([weights], lr=0.0))
    samples, previous = [], None
    for _, gradient in differences():
        for each in (optimizer, at_one):
            weights.grad = gradient.clone()
            each.step()
        if previous is not None:
            apart = gradient - previous
            samples.append([4.0 * (apart @ apart).item(), (gradient @ previous).item()])
        previous = gradient
    variance, squared_norm = np.mean(samples, axis=0)
    np.testing.assert_allclose(optimizer.variance, variance, rtol=1e-9)
    np.testing.assert_allclose(optimizer.squared_norm, squared_norm, rtol=1e-9)
    expected = (variance + squared_norm) / (variance / 8.0 + squared_norm)
    np.testing.assert_allclose(optimizer.gain, expected, rtol=1e-9)
    assert optimizer.is_biased.item()
    assert at_one.gain.item() == 1.0
    assert at_one.tau.item() == 6.0


def test_arguments_that_do_not_fit_are_refused_with_rule_and_value():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    sgd = torch.optim.SGD(parameters, lr=0.1)
    for options, message in (
        ({"scale": 0.5}, "scale must be finite and at least 1, got 0.5"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step must be at least 1, got 0"),
        ({"clip": "never"}, "clip must be one of .* got 'never'"),
        ({"named_parameters": []}, "named_parameters must name all parameters, got none for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            hvd.AdaScale(sgd, **options)
    optimizer = hvd.AdaScale(sgd)
    with pytest.raises(ValueError, match="groups must be added before AdaScale is made"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(ValueError, match="state_dict must be AdaScale's, got"):
        optimizer.load_state_dict(sgd.state_dict())


def test_a_distributed_optimizer_must_average_and_has_been_told_the_rest():
    model = make_model()
    for op in (hvd.Sum, hvd.Adasum):
        wrapped = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), op=op)
        with pytest.raises(ValueError, match=f"must have op=Average, got op={op.name}"):
            hvd.AdaScale(wrapped)
    wrapped = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="backward_passes_per_step must be given to the Distr"):
        hvd.AdaScale(wrapped, backward_passes_per_step=2)


class Work(TorchDispatchMode):
    """Counts torch's operations on large tensors; small ones are AdaScale's own arithmetic."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(tensor.numel() >= LARGE for tensor in tensors):
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


LARGE = 1000


def test_adascale_adds_no_collective_and_no_pass_over_the_gradients(rank, size, monkeypatch):
    # Oracle: the same step with plain averaging.
    requests = []
    submit = allreduce_module.submit_named

    def counted(function, collective, inputs, *arguments, **options):
        requests.append((collective, [tuple(tensor.shape) for tensor in inputs]))
        return submit(function, collective, inputs, *arguments, **options)

    monkeypatch.setattr(allreduce_module, "submit_named", counted)

    def work_of_a_step(wraps):
        torch.manual_seed(5)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        if wraps:
            optimizer = hvd.AdaScale(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            loss = model(torch.full((4, 64), 1.0 + rank + step)).square().mean()
            requests.clear()
            with Work() as work:
                loss.backward()
                optimizer.step()
        if wraps and size > 1:
            assert optimizer.gain > 1.0, "the step must have a gain"
        return list(requests), work.operations

    assert work_of_a_step(True) == work_of_a_step(False)
