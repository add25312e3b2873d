"""Schedules for large batches. Oracle: the formula, or the same torch scheduler stepped by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from adareduce.torch.adascale import AdaScale
from adareduce.torch.schedules import AdaScaleSchedule, LinearScalingWarmup, tabulate

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 4, 11], gamma=0.1),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=31),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
}
GAINS = [1.0, 0.0, 2.5, 0.4, 0.2, 7.9, 1.0, 1.0, 5.0, 4.0, 6.5]


def sgd(rate: float = 0.5) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=rate, momentum=0.9)


class Driven(AdaScale):
    """An AdaScale whose tau is what a test says; needs no ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.__setstate__({})
        self._tau = torch.zeros((), dtype=torch.float64)

    @property
    def tau(self) -> torch.Tensor:
        return self._tau

    def advance(self, gain: float) -> None:
        self.next_gain = gain
        self.step()

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self._tau = self._tau + self.next_gain


def by_hand(make: Callable[..., Any], step: int) -> float:
    """The rate of a step, from a scheduler that makes one step after the other."""
    optimizer = sgd()
    scheduler = make(optimizer)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return float(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("error")
# SequentialLR itself calls step() of its schedulers in the way that torch deprecates.
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("over", ["AdaScale", "the wrapped optimizer"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_is_indexed_by_the_whole_part_of_tau(name: str, over: str) -> None:
    inner = sgd()
    optimizer = Driven(inner)
    scheduler = SCHEDULERS[name](optimizer if over == "AdaScale" else inner)
    schedule = AdaScaleSchedule(optimizer, scheduler)
    tau = 0.0
    assert inner.param_groups[0]["lr"] == by_hand(SCHEDULERS[name], 0)
    for gain in GAINS:
        optimizer.advance(gain)
        tau += gain
        schedule.step()
        expected = by_hand(SCHEDULERS[name], math.floor(tau))
        assert inner.param_groups[0]["lr"] == expected
        assert schedule.get_last_lr() == [expected]


def test_a_schedule_that_ends_stays_at_its_last_rate() -> None:
    optimizer = Driven(sgd())
    schedule = AdaScaleSchedule(
        optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    )
    for _ in range(4):
        optimizer.advance(6.0)
        schedule.step()
    last = by_hand(lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=10), 9)
    assert schedule.get_last_lr() == [last]


def test_the_state_of_a_schedule_is_its_schedulers() -> None:
    # Oracle: the schedule that was not interrupted.
    first, second = Driven(sgd()), Driven(sgd())
    schedules = [AdaScaleSchedule(o, SCHEDULERS["CosineAnnealingLR"](o)) for o in (first, second)]
    for gain in GAINS[:6]:
        first.advance(gain)
        schedules[0].step()
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second._tau = first._tau
    schedules[1].load_state_dict(schedules[0].state_dict())
    for gain in GAINS[6:]:
        for optimizer, schedule in zip((first, second), schedules, strict=True):
            optimizer.advance(gain)
            schedule.step()
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()


def test_what_cannot_be_indexed_is_refused() -> None:
    optimizer = Driven(sgd())
    with pytest.raises(TypeError, match="optimizer must be an AdaScale, got SGD"):
        AdaScaleSchedule(sgd(), lr_scheduler.ConstantLR(sgd()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="counts steps, got ReduceLROnPlateau"):
        AdaScaleSchedule(optimizer, lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="must be made for the AdaScale or the optimizer"):
        AdaScaleSchedule(optimizer, lr_scheduler.ConstantLR(sgd()))


# ---- linear scaling with warm-up -----------------------------------------------------------------


def rates(schedule: LinearScalingWarmup) -> list[float]:
    result = []
    for _ in range(schedule.num_steps):
        result.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return result


@pytest.mark.filterwarnings("error")
def test_linear_scaling_warms_up_from_1_to_s_and_then_follows_the_schedule() -> None:
    # Oracle: the formula, S = 10 and T_1 = 1999, so T = 200, of which 11 warm up.
    def decay(step: int) -> float:
        return 0.999**step

    schedule = LinearScalingWarmup(sgd(0.5), 10.0, 1999, decay)
    assert schedule.num_steps == 200
    seen = rates(schedule)
    for step, rate in enumerate(seen):
        factor = 1.0 + 9.0 * min(1.0, step / 11.0)
        assert rate == pytest.approx(0.5 * factor * decay(step * 1999 // 200), rel=1e-12)
    assert seen[0] == 0.5
    assert seen[11] == pytest.approx(5.0 * decay(109), rel=1e-12)


def test_the_stretched_form_goes_through_the_same_schedule_in_more_steps() -> None:
    # Oracle: the formula; its indices end where those of scale 1 end.
    asked: list[int] = []

    def constant(step: int) -> float:
        asked.append(step)
        return 1.0

    schedule = LinearScalingWarmup(sgd(), 8.0, 1000, constant, num_steps=400)
    seen = rates(schedule)
    assert asked[:400] == [int(step * 2.5) for step in range(400)]
    assert seen[22:] == [4.0] * 378
    assert max(asked) <= 999


def test_scale_1_is_the_schedule_itself() -> None:
    schedule = LinearScalingWarmup(sgd(), 1.0, 50, lambda step: 0.9**step)
    assert rates(schedule) == pytest.approx([0.5 * 0.9**step for step in range(50)], rel=1e-12)


def test_linear_scaling_goes_on_from_a_state() -> None:
    whole, first, second = (
        LinearScalingWarmup(sgd(), 8.0, 100, lambda step: 1 / (step + 1)) for _ in range(3)
    )
    expected = rates(whole)
    for _ in range(5):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    seen = []
    for _ in range(5, 13):
        seen.append(second.optimizer.param_groups[0]["lr"])
        second.optimizer.step()
        second.step()
    assert seen == expected[5:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.5}, "scale must be finite and at least 1, got 0.5"),
        ({"scale": math.nan}, "scale must be finite and at least 1, got nan"),
        ({"reference_steps": 0}, "reference_steps must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"warmup": 1.5}, r"warmup must be in \[0, 1\], got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LinearScalingWarmup: {message}"):
        LinearScalingWarmup(sgd(), **({"scale": 4.0, "reference_steps": 10} | arguments))


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "OneCycleLR"])
def test_a_table_holds_the_rates_of_every_step_and_changes_nothing(name: str) -> None:
    inner = sgd()
    scheduler = SCHEDULERS[name](inner)
    for _ in range(3):
        inner.step()
        scheduler.step()
    table = tabulate(scheduler, 20)
    assert table.dtype == torch.float64
    assert table.tolist() == [[by_hand(SCHEDULERS[name], 3 + step)] for step in range(20)]
    for step in range(3, 12):
        assert scheduler.get_last_lr() == [by_hand(SCHEDULERS[name], step)]
        assert inner.param_groups[0]["lr"] == by_hand(SCHEDULERS[name], step)
        inner.step()
        scheduler.step()


def test_a_table_has_a_column_for_each_group_and_leaves_tensors_of_rates_where_they_are() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    inner = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate},
            {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.25},
        ]
    )
    table = tabulate(lr_scheduler.ExponentialLR(inner, 0.5), 3)
    assert table.tolist() == [[0.5, 0.25], [0.25, 0.125], [0.125, 0.0625]]
    assert inner.param_groups[0]["lr"].item() == 0.5
    assert [group["lr"] is rate for group in inner.param_groups] == [True, False]


def test_what_cannot_be_tabulated_is_refused_and_left_as_it_was() -> None:
    inner = sgd()
    with pytest.raises(TypeError, match="counts steps, got ReduceLROnPlateau"):
        tabulate(lr_scheduler.ReduceLROnPlateau(inner), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        tabulate(lr_scheduler.ConstantLR(inner), 0)
    cycle = lr_scheduler.OneCycleLR(sgd(), max_lr=1.0, total_steps=10)
    momentum = cycle.optimizer.param_groups[0]["momentum"]
    with pytest.raises(ValueError, match=r"must change lr alone, got one .* \['lr', 'momentum'\]"):
        tabulate(cycle, 10)
    assert cycle.optimizer.param_groups[0]["momentum"] == momentum
    assert cycle.last_epoch == 0
    steady = lr_scheduler.OneCycleLR(sgd(), max_lr=1.0, total_steps=10, cycle_momentum=False)
    assert tabulate(steady, 10).shape == (10, 1)
