"""AdaScale's step as one function, on the host. Oracle: GainEstimator, and tau by hand.

Equal formulas in float64, but sums over groups may be taken in another order by torch, and
sigma^2 = (A - n B) / (n - 1) enlarges that: in these inputs A - n B is above A / 50. Tolerance:
50 times (K + 10) roundings of 2^-53 a step, which averages do not add up.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from adareduce._core import testing
from adareduce.torch.device_gain import DeviceGain
from adareduce.torch.gain import GainEstimator

CPU = torch.device("cpu")
AS_THEY_ARE: dict[str, Any] = {
    "divisors": (1.0, 1.0),
    "factors": (1.0, 1.0),
    "loss_scale": 1.0,
    "found_inf": None,
    "has_rows": True,
    "is_differenced": False,
}


def close(groups: int) -> dict[str, Any]:
    return {"rtol": 50 * (groups + 10) * 2.0**-53, "atol": 0.0}


class Pair:
    """The function and what it is compared with, side by side."""

    def __init__(
        self,
        groups: int,
        count: int,
        scale: float | None = None,
        *,
        row_groups: list[int] | None = None,
        schedule: torch.Tensor | None = None,
        per_group: bool = True,
        rates: list[float] | None = None,
        **options: Any,
    ) -> None:
        self.groups, self.per_group, self.schedule = groups, per_group, schedule
        rates = [0.1 * (k + 1) for k in range(groups)] if rates is None else rates
        self.rates = torch.tensor(rates, dtype=torch.float64)
        self.row_groups = list(range(groups)) if row_groups is None else row_groups
        self.expected = GainEstimator(groups, count, scale, **options)
        self.estimator = GainEstimator(groups, count, scale, **options)
        self.kernel = DeviceGain(self.estimator, per_group, self.row_groups, 4, 5, schedule, CPU)
        self.kernel.base_rates.copy_(self.rates)
        self.kernel.step_rates.copy_(self.rates * self.expected.scale)
        self.tau = 0.0
        self.skipped = 0

    def step(self, rows: np.ndarray, nonfinite: int = 0, **changes: Any) -> None:
        """``rows`` (R, 2); the function gets two columns more, which are noise."""
        options = AS_THEY_ARE | changes
        rows = np.asarray(rows, dtype=np.float64)
        self.kernel.rows[:, :2] = torch.from_numpy(rows)
        self.kernel.rows[:, 2:] = math.nan
        self.kernel.nonfinite.zero_()
        self.kernel.nonfinite[3] = nonfinite
        self.kernel.step(**options)

        total = torch.zeros(self.groups, 2, dtype=torch.float64)
        for group, row in zip(self.row_groups, rows, strict=True):
            total[group] += torch.from_numpy(row)
        total = total / torch.tensor(options["divisors"], dtype=torch.float64)
        total = total * torch.tensor(options["factors"], dtype=torch.float64)
        total = total / float(options["loss_scale"]) ** 2
        found_inf = options["found_inf"]
        if nonfinite or (found_inf is not None and found_inf.item() > 0):
            self.skipped += 1
            return
        if options["has_rows"]:
            self.expected.update(total, differenced=options["is_differenced"])
        self.expected_rates = self.rates
        if self.schedule is not None:
            entry = min(math.floor(self.tau), len(self.schedule) - 1)
            self.expected_rates = self.schedule[entry]
        gains = self.expected.gains if self.per_group else self.expected.gain
        self.expected_rates = self.expected_rates * gains
        self.tau += self.expected.gain.item()

    def compare(self) -> None:
        kernel, expected, near = self.kernel, self.expected, close(self.groups)
        mine, theirs = self.estimator.state_dict(), expected.state_dict()
        assert torch.equal(mine["num_samples"], theirs["num_samples"])
        assert torch.equal(mine["is_biased"], theirs["is_biased"])
        largest = theirs["averages"].abs().amax(1, keepdim=True)  # mu^2 may cancel to nothing
        assert ((mine["averages"] - theirs["averages"]).abs() <= near["rtol"] * largest).all()
        torch.testing.assert_close(kernel.gains, expected.gains, **near)
        torch.testing.assert_close(kernel.gain, expected.gain, **near)
        np.testing.assert_allclose(kernel.tau.item(), self.tau, rtol=near["rtol"])
        assert kernel.skipped.item() == self.skipped
        torch.testing.assert_close(kernel.rates, self.expected_rates, **near)
        assert torch.equal(kernel.rates_f32, kernel.rates.float())
        torch.testing.assert_close(kernel.shares * kernel.step_rates, kernel.rates, **near)
        assert torch.equal(kernel.shares_f32, kernel.shares.float())
        progress = kernel.progress()
        assert progress == (kernel.tau.item(), kernel.gain.item(), self.skipped)


def squares(rng: np.random.Generator, rows: int, count: int, noise: float = 1.0) -> np.ndarray:
    """(rows, 2): sum |g|^2 and |mean|^2 of drawn gradients of 40 elements each."""
    gradients = rng.normal(size=(1, rows, 40)) * 0.3 + noise * rng.normal(size=(count, rows, 40))
    return np.stack(
        [(gradients**2).sum(axis=(0, 2)), (gradients.mean(axis=0) ** 2).sum(axis=1)], axis=1
    )


@pytest.mark.parametrize("smoothing", [None, 0.0, 0.7])
@pytest.mark.parametrize("absolute_floor", [None, 1e-6, 20.0])
@pytest.mark.parametrize("clip", ["before", "after"])
@pytest.mark.parametrize("averaging", ["paper", "debiased"])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_random_sequences_are_those_of_the_estimator(
    groups: int,
    averaging: str,
    clip: str,
    absolute_floor: float | None,
    smoothing: float | None,
    rng: np.random.Generator,
) -> None:
    pair = Pair(
        groups, 4, averaging=averaging, clip=clip, absolute_floor=absolute_floor,
        smoothing=smoothing,
    )  # fmt: skip
    for step in range(12):
        pair.step(squares(rng, groups, 4), nonfinite=int(step in (3, 7)))
        pair.compare()
    assert pair.expected.gain > 1.0, "the test must see a gain"


@pytest.mark.parametrize("groups", [1, 2])
def test_gains_are_within_a_few_roundings_where_no_sum_has_another_order(
    groups: int, rng: np.random.Generator
) -> None:
    # A sum of two has one order. Torch's lerp may fuse a multiply and an add: a rounding per step
    # and average, which later steps do not enlarge; four averages make a gain. The first step has
    # no rounding of this kind: the same bits.
    pair = Pair(groups, 3, averaging="debiased")
    few: dict[str, Any] = {"rtol": 16 * 2.0**-53, "atol": 0.0}
    for step in range(20):
        pair.step(squares(rng, groups, 3))
        torch.testing.assert_close(pair.kernel.gains, pair.expected.gains, **few)
        torch.testing.assert_close(pair.kernel.gain, pair.expected.gain, **few)
        torch.testing.assert_close(pair.kernel.rates, pair.expected_rates, **few)
        if step == 0:
            assert torch.equal(pair.kernel.gains, pair.expected.gains)
            assert torch.equal(pair.kernel.rates, pair.expected_rates)
            assert pair.kernel.tau.item() == pair.tau


@pytest.mark.parametrize("num_lanes", [2, 3, 32])
@pytest.mark.parametrize("groups", [1, 2, 33])
def test_lanes_that_work_together_give_the_bits_of_one(
    groups: int, num_lanes: int, rng: np.random.Generator
) -> None:
    schedule = torch.from_numpy(rng.uniform(0.0, 1.0, size=(9, groups)))
    one, several = (Pair(groups, 4, schedule=schedule, averaging="debiased") for _ in range(2))
    several.kernel._launch = functools.partial(testing.gain_step, num_lanes=num_lanes)
    for step in range(6):
        sample = squares(rng, groups, 4)
        sample[-1, 0] = math.inf if step == 4 else sample[-1, 0]
        for pair in (one, several):
            pair.step(sample, nonfinite=int(step == 2))
        for name, tensor in several.kernel.state_dict().items():
            assert torch.equal(tensor, one.kernel.state_dict()[name]), name
        assert torch.equal(several.kernel.gains, one.kernel.gains)
        assert torch.equal(several.kernel.rates_f32, one.kernel.rates_f32)
        assert torch.equal(several.kernel.shares, one.kernel.shares)
        assert several.kernel.progress() == one.kernel.progress()
    assert several.kernel.gain > 1.0


@pytest.mark.parametrize("scale", [1.0, 2.5, 32.0, 2000.0])
def test_any_scale_is_the_estimators(scale: float, rng: np.random.Generator) -> None:
    pair = Pair(2, 8, scale)
    for _ in range(6):
        pair.step(squares(rng, 2, 8))
        pair.compare()
    assert (pair.kernel.gain.item() == 1.0) == (scale == 1.0)


def test_rows_of_several_buckets_are_added_by_group(rng: np.random.Generator) -> None:
    pair = Pair(3, 4, row_groups=[2, 0, 1, 0, 2, 0], averaging="debiased")
    for _ in range(5):
        pair.step(squares(rng, 6, 4))
        pair.compare()


def test_scale_factors_passes_and_loss_scales_are_undone(rng: np.random.Generator) -> None:
    # Oracle: powers of two change no bits, so the run without them.
    plain = Pair(2, 6, averaging="debiased", absolute_floor=1e-6)
    scaled = Pair(2, 6, averaging="debiased", absolute_floor=1e-6)
    on_device = Pair(2, 6, averaging="debiased", absolute_floor=1e-6)
    for _ in range(5):
        sample = squares(rng, 2, 6)
        plain.step(sample)
        seen = sample * 2.0**20 * [1 / 4, 1] * [16, 64]
        options: dict[str, Any] = {"divisors": (16.0, 64.0), "factors": (4.0, 1.0)}
        scaled.step(seen, **options, loss_scale=1024.0)
        on_device.step(seen, **options, loss_scale=torch.tensor(1024.0))
        for other in (scaled, on_device):
            other.compare()
            assert torch.equal(other.kernel.gains, plain.kernel.gains)
            assert torch.equal(other.estimator.variance, plain.estimator.variance)


@pytest.mark.parametrize("how", ["an element", "found_inf", "found_inf is not a number"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(
    how: str, rng: np.random.Generator
) -> None:
    # Oracle: everything else bit for bit.
    pair = Pair(2, 4, schedule=torch.rand(50, 2, dtype=torch.float64))
    for _ in range(4):
        pair.step(squares(rng, 2, 4))
    before = pair.kernel.state_dict()
    gains = pair.kernel.gains.clone()
    assert not pair.kernel.skips
    assert pair.kernel.skips_f32.item() == 0.0
    sample = squares(rng, 2, 4)
    sample[1] = math.inf
    pair.kernel.rows[:, :2] = torch.from_numpy(sample)
    pair.kernel.nonfinite[4] = int(how == "an element")
    found_inf = {"found_inf": 1.0, "found_inf is not a number": math.nan}.get(how, 0.0)
    pair.kernel.step(**AS_THEY_ARE | {"found_inf": torch.tensor(found_inf)})
    after = pair.kernel.state_dict()
    assert after.pop("skipped_steps").item() == before.pop("skipped_steps").item() + 1
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(pair.kernel.gains, gains)
    assert pair.kernel.skips
    assert pair.kernel.skips_f32.item() == 1.0
    assert pair.kernel.progress().skipped_steps == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e308])
def test_squares_that_overflow_leave_the_averages_and_tau_goes_on(
    bad: float, rng: np.random.Generator
) -> None:
    pair = Pair(2, 4)
    for _ in range(3):
        pair.step(squares(rng, 2, 4))
    averages = pair.estimator.state_dict()["averages"].clone()
    sample = squares(rng, 2, 4)
    sample[:, 0] = bad
    pair.step(sample)
    pair.compare()
    assert torch.equal(pair.estimator.state_dict()["averages"], averages)


def test_gradients_that_are_zero_have_gain_1(rng: np.random.Generator) -> None:
    pair = Pair(2, 4, averaging="debiased")
    for _ in range(2):
        sample = squares(rng, 2, 4)
        sample[1] = 0.0
        pair.step(sample)
        pair.compare()
    assert pair.kernel.gains[1].item() == 1.0
    empty = Pair(2, 4)
    for _ in range(3):
        empty.step(np.zeros((2, 2)))
        empty.compare()
    assert empty.kernel.tau.item() == 3.0


def test_all_groups_may_have_the_total_gain(rng: np.random.Generator) -> None:
    pair = Pair(3, 4, per_group=False, averaging="debiased")
    pair.step(squares(rng, 3, 4))
    pair.compare()
    assert len(set((pair.kernel.rates / pair.rates).tolist())) <= 2  # one rounding
    assert pair.kernel.gain > 1.0


def test_without_statistics_gains_are_1_and_tau_counts_steps() -> None:
    pair = Pair(2, 1, 1.0)
    for _ in range(4):
        pair.step(np.full((2, 2), math.nan), has_rows=False)
        pair.compare()
    assert pair.kernel.tau.item() == 4.0


def test_differences_begin_with_the_second_step_that_counts(rng: np.random.Generator) -> None:
    pair = Pair(2, 1, 8.0)
    for step in range(8):
        is_skipped, has_previous = step in (0, 4), step > 1
        sample = squares(rng, 2, 2)
        pair.kernel.rows[:, :2] = torch.from_numpy(sample)
        pair.kernel.nonfinite[0] = int(is_skipped)
        pair.kernel.step(**AS_THEY_ARE | {"is_differenced": True})
        assert pair.kernel.has_previous.item() == (step > 0)
        if is_skipped:
            continue
        if has_previous:
            pair.expected.update(torch.from_numpy(sample), differenced=True)
        torch.testing.assert_close(pair.kernel.gains, pair.expected.gains, **close(2))
    assert pair.estimator.is_biased.item()
    assert pair.kernel.gain > 1.0


def test_averages_of_differences_are_forgotten_when_there_are_replicas(
    rng: np.random.Generator,
) -> None:
    biased = Pair(1, 1, 4.0)
    for _ in range(4):
        biased.step(squares(rng, 1, 2), is_differenced=True)
    pair = Pair(1, 4)
    pair.kernel.load_state_dict(biased.kernel.state_dict())
    pair.tau = biased.kernel.tau.item()
    for _ in range(3):
        pair.step(squares(rng, 1, 4))
        pair.compare()
    assert not pair.estimator.is_biased.item()


@pytest.mark.parametrize("length", [1, 4, 30])
def test_rates_are_those_of_the_schedule_at_the_whole_part_of_tau(
    length: int, rng: np.random.Generator
) -> None:
    schedule = torch.from_numpy(rng.uniform(0.0, 1.0, size=(length, 2)))
    schedule[-1, 1] = 0.0
    pair = Pair(2, 4, schedule=schedule, averaging="debiased")
    for _ in range(9):
        pair.step(squares(rng, 2, 4))
        pair.compare()
    assert pair.tau > 10.0, "the test must pass entries by"


def test_a_rate_of_zero_has_a_share_of_zero(rng: np.random.Generator) -> None:
    pair = Pair(2, 4, rates=[0.0, 0.5])
    pair.step(squares(rng, 2, 4))
    assert pair.kernel.rates[0].item() == 0.0
    assert pair.kernel.shares[0].item() == 0.0
    assert 0.0 < pair.kernel.shares[1].item() <= 1.0


def test_the_state_is_tensors_of_the_estimators_names_and_goes_on_in_place(
    rng: np.random.Generator,
) -> None:
    # Oracle: the run that was not interrupted.
    first, second = Pair(2, 4), Pair(2, 4)
    for _ in range(4):
        first.step(squares(rng, 2, 4))
    address = second.estimator.state_dict()["averages"].data_ptr()
    state = first.kernel.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    second.kernel.load_state_dict(state)
    assert second.estimator.state_dict()["averages"].data_ptr() == address
    assert torch.equal(second.kernel.gains, first.kernel.gains)
    assert second.kernel.progress() == first.kernel.progress()
    sample = squares(rng, 2, 4)
    first.step(sample)
    second.kernel.rows.copy_(first.kernel.rows)
    second.kernel.step(**AS_THEY_ARE)
    assert torch.equal(second.kernel.gains, first.kernel.gains)
    assert torch.equal(second.kernel.tau, first.kernel.tau)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    with pytest.raises(ValueError, match="state must be of 2 groups, got 1"):
        second.kernel.load_state_dict(Pair(1, 4).kernel.state_dict())
