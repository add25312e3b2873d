"""AdaScale's steps on the device, with CPU tensors. Oracle: its steps on the host.

The path is chosen by ``rates``; nothing else in it asks for a device. Float64 rates and shares:
twenty steps agree as with ``adascale_reference``. Torch's fused kernels read float32 rates: each
step is off by 2^-24 of its length, and all steps together are shorter than 4 here.
"""

from __future__ import annotations

import copy
import importlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adascale_reference import (
    WRAPPINGS,
    backward,
    groups_of,
    loss_of,
    make_model,
    state_bits,
    wrap,
)
from no_host_reads import HostReadError, no_host_reads
from torch.optim import lr_scheduler
from training import step_with_scaler

import adareduce.torch as hvd
from adareduce.torch import device_gain, streams
from adareduce.torch.device_step import choose_rates

STEPS = 20
EXACT = {"rtol": 1e-9, "atol": 1e-12}
ROUNDED = {"rtol": 0.0, "atol": 4 * 2.0**-24}

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.05, weight_decay=0.01, **o),
    "momentum": lambda p, **o: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, **o),
    "Adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, eps=1e-3, weight_decay=0.01, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1, **o),
    "RMSprop": lambda p, **o: torch.optim.RMSprop(p, lr=0.01, eps=1e-3, momentum=0.5, **o),
}
# How torch steps, how rates are scaled, and how near that is.
FORMS: dict[str, tuple[dict[str, Any], str, dict[str, float]]] = {
    "fused": ({"fused": True}, "tensor", ROUNDED),
    "capturable": ({"capturable": True, "foreach": True}, "tensor", ROUNDED),
    "capturable loop": ({"capturable": True, "foreach": False}, "tensor", ROUNDED),
    "foreach": ({"foreach": True}, "share", EXACT),
    "loop": ({"foreach": False}, "share", EXACT),
}
CASES = [
    (name, form)
    for name in MAKERS
    for form in FORMS
    if form != "fused" or name != "RMSprop"
    if not form.startswith("capturable") or name in ("Adam", "AdamW")
]
each_case = pytest.mark.parametrize(("name", "form"), CASES)
# One for each way through the code.
each_way = pytest.mark.parametrize(
    ("name", "form"), [("momentum", "fused"), ("AdamW", "capturable"), ("Adam", "foreach")]
)


@pytest.fixture(autouse=True)
def capturable_on_the_cpu(monkeypatch):
    # Only torch's check refuses it there.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cpu"])


def make(name: str, form: str, wrapping: str = "plain", passes: int = 2, **options: Any) -> Any:
    """A model and its AdaScale, stepping on the device."""
    how, rates, _ = FORMS[form]
    model = make_model()
    optimizer = MAKERS[name](groups_of(model), **how)
    return model, wrap(wrapping, optimizer, passes, rates=rates, **options)


def make_expected(name: str, form: str, passes: int = 2, **options: Any) -> Any:
    """The same, stepping on the host."""
    # Capturable ones correct their bias in float32, which no other form does.
    how = FORMS[form][0] if form.startswith("capturable") else {}
    model = make_model()
    optimizer = MAKERS[name](groups_of(model), **how)
    return model, wrap("plain", optimizer, passes, rates="host", **options)


def assert_near(mine: Any, theirs: Any, near: dict[str, float]) -> None:
    (model, optimizer), (expected_model, expected) = mine, theirs
    for parameter, value in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(parameter, value, **near)
    # Gains follow from the weights by ratios of sums of squares of about their own size.
    wide = {"rtol": 1000 * near["atol"], "atol": 0.0} if near["rtol"] == 0.0 else near
    torch.testing.assert_close(optimizer.gains, expected.gains, **wide)
    torch.testing.assert_close(optimizer.tau, expected.tau, **wide)
    assert optimizer.skipped_steps.item() == expected.skipped_steps.item()


def watched_step(optimizer: Any) -> None:
    with no_host_reads(optimizer):
        optimizer.step()


@each_case
def test_twenty_steps_are_the_hosts_and_the_host_reads_nothing(name, form, rank, ranks):
    wrapping = WRAPPINGS[CASES.index((name, form)) % 2]
    mine, theirs = make(name, form, wrapping), make_expected(name, form)
    for step in range(STEPS):
        for model, optimizer in (mine, theirs):
            backward(model, optimizer, step, rank, 2)
        watched_step(mine[1])
        theirs[1].step()
        assert_near(mine, theirs, FORMS[form][2])
    assert mine[1].gain > 1.05, "the test must see a gain"
    assert [group["lr"] for group in mine[1].param_groups] == [
        group["lr"] for group in theirs[1].param_groups
    ]
    everyones = ranks.gather(state_bits(mine[1], mine[0]))
    assert all(bits == everyones[0] for bits in everyones), "the ranks have different bits"


def test_the_guard_sees_what_the_host_reads(rank):
    model, optimizer = make_expected("SGD", "loop")
    for step in range(2):
        backward(model, optimizer, step, rank, 2)
        with pytest.raises(HostReadError), no_host_reads():
            optimizer.step()
        optimizer.zero_grad()
    for read in (
        lambda t: t.item(), bool, float, int, torch.nonzero, np.asarray,
        lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.cpu(),
    ):  # fmt: skip
        with pytest.raises(HostReadError), no_host_reads():
            read(torch.ones(()))


@each_case
@pytest.mark.parametrize("is_first", [True, False])
def test_a_step_that_is_not_finite_on_one_rank_is_none_on_all(is_first, name, form, rank, size):
    # Oracle: the state before, bit for bit, without what the first step makes; then a run that
    # never saw the step.
    mine, theirs = make(name, form), make_expected(name, form)
    model, optimizer = mine
    for step in range(0 if is_first else 3):
        for each in (mine, theirs):
            backward(*each, step, rank, 2)
            each[1].step()
    before = [p.detach().clone() for p in model.parameters()]
    kept = optimizer.state_dict()["adascale"]
    optimizer.zero_grad()
    # Memory that is not initialised must not be finite by luck.
    torch.full((3000,), math.nan, dtype=torch.float64)
    for number in range(2):
        is_bad = rank == size - 1 and number == 1
        (loss_of(model, 9, rank, number) * (math.inf if is_bad else 1.0)).backward()
    watched_step(optimizer)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    now = optimizer.state_dict()["adascale"]
    assert now.pop("skipped_steps").item() == kept.pop("skipped_steps").item() + 1
    assert all(torch.equal(now[key], value) for key, value in kept.items())
    for state in optimizer.state.values():
        for value in state.values():
            assert torch.isfinite(value).all()
            assert not is_first or not value.any()
    theirs[1]._steps._skipped += 1
    for step in range(3, 7):
        for each in (mine, theirs):
            backward(*each, step, rank, 2)
            each[1].step()
        assert_near(mine, theirs, FORMS[form][2])


@each_way
def test_rates_come_from_the_tabulated_schedule(name, form, rank):
    # Oracle: the host, with the scheduler that was tabulated, indexed by tau.
    inner = MAKERS[name](groups_of(make_model()))
    table = hvd.tabulate(lr_scheduler.ExponentialLR(inner, 0.9), 40)
    table = table * torch.tensor([1.0, 0.5], dtype=torch.float64)
    mine, theirs = make(name, form, schedule=table), make_expected(name, form)
    third = make_expected(name, form, schedule=table)
    theirs[1].param_groups[1]["lr"] *= 0.5
    schedule = hvd.AdaScaleSchedule(theirs[1], lr_scheduler.ExponentialLR(theirs[1], 0.9))
    for step in range(12):
        for each in (mine, theirs, third):
            backward(*each, step, rank, 2)
        watched_step(mine[1])
        theirs[1].step()
        schedule.step()
        third[1].step()
        assert_near(mine, theirs, FORMS[form][2])
        assert_near(third, theirs, EXACT)


def test_a_schedule_of_zeros_stands_still_and_goes_on(rank):
    table = torch.tensor([0.05] * 3 + [0.0] * 2, dtype=torch.float64)
    for form in ("fused", "foreach"):
        model, optimizer = make("SGD", form, schedule=table)
        for step in range(6):
            before = [p.detach().clone() for p in model.parameters()]
            is_over = optimizer.tau >= 3.0
            backward(model, optimizer, step, rank, 2)
            optimizer.step()
            is_same = all(
                torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
            )
            assert is_same == is_over


@pytest.mark.parametrize("lr_is_tensor", [False, True])
@pytest.mark.parametrize("form", ["fused", "foreach"])
def test_a_rate_that_a_script_changes_counts_from_the_next_step_on(form, lr_is_tensor, rank):
    mine, theirs = make("momentum", form), make_expected("momentum", form)
    for step in range(6):
        for each in (mine, theirs):
            for group in each[1].param_groups:
                rate = 0.02 / (1 + step // 2)
                group["lr"] = torch.tensor(rate, dtype=torch.float64) if lr_is_tensor else rate
            backward(*each, step, rank, 2)
            each[1].step()
        assert_near(mine, theirs, FORMS[form][2])


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@each_way
def test_a_grad_scaler_costs_no_read_and_decides_alike(name, form, wrapping, clips, rank):
    # Oracle: the host's steps without a scaler, which never saw the step that overflows on rank 0
    # alone. Powers of two change no bits.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    mine, theirs = make(name, form, wrapping, loss_scale=scaler), make_expected(name, form)
    model, optimizer = mine
    for step in range(6):
        overflows = step in (0, 3)
        optimizer.zero_grad()
        for number in range(2):
            loss = loss_of(model, step, rank, number) / 2
            scaler.scale(loss * (math.inf if overflows and rank == 0 else 1.0)).backward()
        with no_host_reads(optimizer):
            step_with_scaler(scaler, optimizer, clips)
        scaler.update()
        if overflows:
            theirs[1]._steps._skipped += 1
        else:
            backward(*theirs, step, rank, 2)
            theirs[1].step()
        assert_near(mine, theirs, FORMS[form][2])
    assert scaler.get_scale() == 2.0**8


@pytest.mark.parametrize("form", ["fused", "foreach"])
def test_states_go_between_host_and_device(form, rank):
    # Oracle: the run that was not interrupted.
    whole, first, second = make("Adam", form), make("Adam", form), make("Adam", form)
    on_host = make_expected("Adam", form)

    def run(each: Any, steps: range) -> None:
        for step in steps:
            backward(*each, step, rank, 2)
            each[1].step()

    run(whole, range(9))
    run(first, range(5))
    file = io.BytesIO()
    torch.save([first[0].state_dict(), first[1].state_dict()], file)
    for other in (second, on_host):
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        how = other[1].state_dict()["optimizer"]["param_groups"]
        for group, own in zip(state["optimizer"]["param_groups"], how, strict=True):
            group.update({key: own[key] for key in ("fused", "foreach")})
        other[0].load_state_dict(weights)
        other[1].load_state_dict(state)
        assert other[1].progress() == first[1].progress()
        run(other, range(5, 9))
    assert state_bits(second[1], second[0]) == state_bits(whole[1], whole[0])
    assert_near(whole, on_host, FORMS[form][2])


def test_a_state_brings_the_form_of_its_optimizer_as_in_torch(rank):
    # Oracle: the run that was not interrupted and took shares.
    whole, fused, share = make("Adam", "foreach"), make("Adam", "fused"), make("Adam", "loop")
    for step in range(8):
        if step == 4:
            state = copy.deepcopy(whole[1].state_dict())  # torch shares its tensors
            with pytest.raises(ValueError, match=r"with fused=True, .* got Adam without"):
                fused[1].load_state_dict(state)
            share[0].load_state_dict(whole[0].state_dict())
            share[1].load_state_dict(state)
        for each in (whole, share)[: 1 + (step >= 4)]:
            backward(*each, step, rank, 2)
            each[1].step()
    assert_near(share, whole, EXACT)


def test_more_passes_make_the_scale_larger_also_from_one_worker_on(rank, size):
    mine, theirs = make("SGD", "foreach", passes=1), make_expected("SGD", "loop", passes=1)
    for step in range(8):
        passes = 1 if step < 4 else 3
        for model, optimizer in (mine, theirs):
            if step == 4:
                optimizer.set_backward_passes_per_step(3)
            backward(model, optimizer, step, rank, passes)
            optimizer.step()
        assert_near(mine, theirs, EXACT)
    assert mine[1].scale == 3 * size


@pytest.mark.parametrize("form", ["fused", "foreach"])
def test_one_worker_compares_consecutive_gradients_on_the_device(form, rank, size):
    if size > 1:
        pytest.skip("only of one rank")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    mine = make("SGD", form, passes=1, scale=8.0, loss_scale=scaler)
    theirs = make_expected("SGD", form, passes=1, scale=8.0)
    for step in range(10):
        is_bad = step in (0, 4)
        mine[1].zero_grad()
        scaler.scale(loss_of(mine[0], step, rank) * (math.inf if is_bad else 1.0)).backward()
        with no_host_reads():
            scaler.step(mine[1])
        scaler.update(4.0)
        theirs[1].zero_grad()
        (loss_of(theirs[0], step, rank) * (math.inf if is_bad else 1.0)).backward()
        theirs[1].step()
        assert_near(mine, theirs, FORMS[form][2])
    assert mine[1].is_biased.item()
    assert mine[1].gain > 1.05


@pytest.mark.parametrize("form", ["fused", "foreach"])
def test_an_optimizer_that_raises_leaves_weights_rates_and_attributes(form, rank):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            super().step(closure)
            raise ZeroDivisionError

    how, rates, _ = FORMS[form]
    model = make_model()
    inner = Failing(model.parameters(), lr=0.05, **how)
    optimizer = hvd.AdaScale(inner, rates=rates)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, optimizer, 0, rank, 1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert inner.param_groups[0]["lr"] == 0.05
    assert not hasattr(inner, "found_inf")
    if form == "foreach":  # a fused step is what it was: done
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class _StandIn:
    """A copy stream whose copies arrive when the test says so."""

    def __init__(self):
        self.pending = None
        self.has_passed = False

    def follow_current(self):
        pass

    def copy(self, target, source):
        self.pending = (target, source)

    def mark(self):
        return self

    def is_passed(self):
        if self.has_passed:
            target, source = self.pending
            target.copy_(source)
        return self.has_passed


def test_progress_is_what_has_arrived_and_never_waits(monkeypatch):
    report = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    monkeypatch.setattr(streams, "is_capturing", lambda: is_capturing)
    monkeypatch.setattr(
        streams, "empty_pinned", lambda numel, dtype: torch.empty(numel, dtype=dtype)
    )
    stream, is_capturing = _StandIn(), False
    reporter = device_gain.Reporter(report, stream)
    assert reporter.progress() == (0.0, 1.0, 0)  # asks
    report.copy_(torch.tensor([2.5, 1.5, 1.0]))
    assert reporter.progress() == (0.0, 1.0, 0)  # the copy is under way
    stream.has_passed, is_capturing = True, True
    assert reporter.progress() == (0.0, 1.0, 0)  # a query would end the capture
    is_capturing = False
    assert reporter.progress() == (0.0, 1.0, 0)  # what was there when it asked; asks again
    report.copy_(torch.tensor([4.0, 1.5, 1.0]))
    assert reporter.progress() == (2.5, 1.5, 1)
    assert reporter.progress() == (4.0, 1.5, 1)


def sgd(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, **options)


def test_how_rates_are_scaled_is_chosen_by_the_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    asgd = torch.optim.ASGD(parameters, lr=0.1)
    capturable = torch.optim.Adam(parameters, capturable=True)
    for optimizer, rates, is_on_gpu, expected in (
        (sgd(), "auto", False, "host"),
        (asgd, "auto", False, "host"),
        (sgd(), "auto", True, "share"),
        (sgd(fused=True), "auto", True, "tensor"),
        (sgd(fused=True), "share", True, "share"),
        (capturable, "auto", True, "tensor"),
        (torch.optim.AdamW(parameters, fused=True), "auto", True, "tensor"),
        (torch.optim.Adam(parameters), "auto", True, "share"),
        (torch.optim.RMSprop(parameters, capturable=True), "auto", True, "share"),
        (asgd, "host", True, "host"),
    ):
        assert choose_rates(rates, optimizer, is_on_gpu) == expected
    with pytest.raises(ValueError, match=r"rates must be one of .* got 'fast'"):
        choose_rates("fast", sgd(), False)
    with pytest.raises(ValueError, match=r"fused=True, or Adam or AdamW .* got SGD without"):
        choose_rates("tensor", sgd(), True)
    with pytest.raises(ValueError, match=r"linear in the rate.* got ASGD; rates='host' reads"):
        choose_rates("auto", asgd, True)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (torch.ones(3, 2), r"shape \(T,\) or \(T, 1\) with T at least 1, got \(3, 2\)"),
        (torch.ones(0), r"with T at least 1, got \(0,\)"),
        (torch.tensor([1.0, math.nan]), "must be finite and not negative"),
        (torch.tensor([-1.0]), "must be finite and not negative"),
    ],
)
def test_a_schedule_that_is_no_table_of_rates_is_refused(schedule, message):
    with pytest.raises(ValueError, match=f"AdaScale: schedule .*{message}"):
        hvd.AdaScale(sgd(), schedule=schedule)
