"""AdaScale between MPI ranks. Oracle: one process that computes everybody's gradients."""

from __future__ import annotations

import io
import math
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
    state_bits,
    wrap,
)

import adareduce.torch as hvd

STEPS = 20


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_twenty_steps_are_those_of_one_process(wrapping, name, passes, rank, size, ranks):
    model, reference = make_model(), Reference(name, size, passes)
    optimizer = wrap(wrapping, OPTIMIZERS[name](groups_of(model)), passes)
    for step in range(STEPS):
        backward(model, optimizer, step, rank, passes)
        optimizer.step()
        reference.step(step)
        assert_same(optimizer, model, reference)
    assert size * passes == 1 or reference.gains[2] > 1.05, "the test must see a gain"
    everyones = ranks.gather(state_bits(optimizer, model))
    assert all(theirs == everyones[0] for theirs in everyones), "the ranks have different bits"


@pytest.mark.parametrize("scale_per_count", [0.5, 2.0])
def test_scale_may_differ_from_the_number_of_micro_batches(scale_per_count, rank, size):
    scale = max(1.0, 2 * size * scale_per_count)
    model, reference = make_model(), Reference("momentum", size, 2, scale)
    optimizer = wrap("plain", OPTIMIZERS["momentum"](groups_of(model)), 2, scale=scale)
    for step in range(STEPS):
        backward(model, optimizer, step, rank, 2)
        optimizer.step()
        reference.step(step)
    assert_same(optimizer, model, reference)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(wrapping, rank, size):
    # Oracle: the state before, bit for bit; afterwards a process that never saw that step.
    model, reference = make_model(), Reference("momentum", size, 2)
    optimizer = wrap(wrapping, OPTIMIZERS["momentum"](groups_of(model)), 2)
    for step in range(8):
        backward(model, optimizer, step, rank, 2)
        optimizer.step()
        reference.step(step)
        before = state_bits(optimizer, model)
        optimizer.zero_grad()
        for number in range(2):
            is_bad = rank == size - 1 and number == step % 2
            (loss_of(model, step, rank, number) * (math.inf if is_bad else 1.0)).backward()
        optimizer.step()
        assert optimizer.skipped_steps.item() == step + 1
        assert state_bits(optimizer, model) == before
    assert_same(optimizer, model, reference)


@pytest.mark.parametrize("raises", [False, True])
def test_the_scaled_rate_is_there_during_the_step_only(raises, rank, size):
    class Watched(torch.optim.SGD):
        seen: list[float] = []  # noqa: RUF012

        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            self.seen.append(self.param_groups[0]["lr"])
            if raises:
                raise ZeroDivisionError
            return super().step(closure)

    Watched.seen.clear()
    model = make_model()
    inner = Watched(model.parameters(), lr=0.05)
    optimizer = hvd.AdaScale(inner, averaging="debiased", scale=2.0 * size)
    for step in range(3):
        backward(model, optimizer, step, rank, 1)
        tau = optimizer.tau.item()
        if raises:
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            assert optimizer.tau.item() == tau
        else:
            optimizer.step()
            assert optimizer.tau.item() == tau + optimizer.gain.item()
        assert inner.param_groups[0]["lr"] == 0.05
        assert Watched.seen[-1] == 0.05 * optimizer.gains[0].item()
    assert Watched.seen[-1] > 0.05, "the test must see a gain"


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_state_from_a_file_goes_on_where_it_stopped(wrapping, rank):
    # Oracle: the run that was not interrupted, bit for bit.
    def make() -> tuple[Any, Any]:
        model = make_model()
        return model, wrap(wrapping, OPTIMIZERS["Adam"](groups_of(model)), 2)

    def run(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            backward(model, optimizer, step, rank, 2)
            optimizer.step()

    whole, first, second = make(), make(), make()
    run(*whole, range(9))
    run(*first, range(5))
    file = io.BytesIO()
    torch.save([first[0].state_dict(), first[1].state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)
    assert all(isinstance(value, torch.Tensor) for value in state["adascale"].values())
    run(*second, range(5, 9))
    assert state_bits(second[1], second[0]) == state_bits(whole[1], whole[0])


def test_frozen_and_unused_parameters_stay_and_change_no_gain(rank, size):
    # Oracle: the model without them.
    model, reference = make_model(), Reference("SGD", size, 2)
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    unused = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    groups = groups_of(model)
    groups[0]["params"].append(frozen)
    groups[1]["params"].append(unused)
    groups.append({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    optimizer = wrap("plain", OPTIMIZERS["SGD"](groups), 2)
    for step in range(6):
        backward(model, optimizer, step, rank, 2)
        optimizer.step()
        reference.step(step)
    np.testing.assert_allclose(optimizer.gains, [*reference.gains[:2], 1.0], rtol=1e-9)
    np.testing.assert_allclose(optimizer.gain, reference.gains[2], rtol=1e-9)
    for parameter in (frozen, unused, groups[2]["params"][0]):
        assert (parameter == 1.0).all()


def test_a_parameter_that_only_one_rank_uses_counts_as_zero_elsewhere(rank, size):
    # Oracle: NumPy on the ranks' vectors.
    value = torch.arange(1.0, 4.0, dtype=torch.float64)
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    always = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = hvd.AdaScale(torch.optim.SGD([weights, always], lr=1.0), averaging="debiased")
    optimizer.zero_grad()
    (always.sum() + ((weights @ value) if rank == 0 else 0.0)).backward()
    optimizer.step()
    rows = np.zeros((size, 4))
    rows[:, 3] = 1.0
    rows[0, :3] = value
    if size > 1:
        expected = rows.var(axis=0, ddof=1).sum()
        np.testing.assert_allclose(optimizer.variance, expected, rtol=1e-12)
    moved = -optimizer.gain * value / size
    torch.testing.assert_close(weights.detach(), moved, rtol=1e-12, atol=0)
