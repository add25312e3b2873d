"""AdaScale's arithmetic. Oracle: NumPy float64 on the gradients themselves, unless one is named.

Tolerance 1e-9 relative: sums of squares of a few thousand doubles, differences of which lose less
than five digits in these inputs.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adareduce.torch.gain import GainEstimator

CLOSE = {"rtol": 1e-9, "atol": 0.0}


def draw(rng: np.random.Generator, count: int, groups: int = 1, noise: float = 1.0) -> NDArray:
    """Gradients (count, groups, 50): a mean of its own for each group, plus noise."""
    means = rng.normal(size=(1, groups, 50)) * 0.2
    return means + noise * rng.normal(size=(count, groups, 50))


def squares(gradients: NDArray) -> torch.Tensor:
    """What a reduction hands over: (groups, 2), sum |g|^2 and |mean|^2."""
    mean = gradients.mean(axis=0)
    return torch.tensor(np.stack([(gradients**2).sum(axis=(0, 2)), (mean**2).sum(axis=1)], axis=1))


def moments(gradients: NDArray, scale: float) -> tuple[NDArray, NDArray]:
    """Each group's sigma^2 and mu^2, from variances of elements; scale 1 is n / S gradients."""
    count = len(gradients)
    variance = gradients.var(axis=0, ddof=1).sum(axis=1)
    squared_norm = (gradients.mean(axis=0) ** 2).sum(axis=1) - variance / count
    return variance * scale / count, squared_norm


def gain_of(variance: Any, squared_norm: Any, scale: float) -> Any:
    variance, squared_norm = np.maximum(variance, 0.0), np.maximum(squared_norm, 0.0)
    return np.clip((variance + squared_norm) / (variance / scale + squared_norm), 1.0, scale)


@pytest.mark.parametrize("scale_per_count", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 3, 5, 64])
def test_gains_of_one_step_are_those_of_the_elements_variances(
    count: int, scale_per_count: float, rng: np.random.Generator
) -> None:
    scale = max(1.0, count * scale_per_count)
    gradients = draw(rng, count, groups=3)
    estimator = GainEstimator(3, count, scale, averaging="debiased")
    estimator.update(squares(gradients))
    variance, squared_norm = moments(gradients, scale)
    np.testing.assert_allclose(estimator.variances, np.maximum(variance, 0), **CLOSE)
    np.testing.assert_allclose(estimator.squared_norms, np.maximum(squared_norm, 0), **CLOSE)
    np.testing.assert_allclose(estimator.gains, gain_of(variance, squared_norm, scale), **CLOSE)
    total = gain_of(variance.sum(), squared_norm.sum(), scale)
    np.testing.assert_allclose(estimator.gain, total, **CLOSE)
    assert estimator.gain.dtype == torch.float64


@pytest.mark.parametrize("count", [2, 5, 16])
def test_gain_of_a_step_follows_from_the_gram_matrix(count: int, rng: np.random.Generator) -> None:
    # Oracle: raw gain = P tr G / 1'G1, the form of the one-shot Adasum; no clipping is needed here.
    gradients = draw(rng, count, noise=0.3)[:, 0]
    gram = gradients @ gradients.T
    estimator = GainEstimator(1, count, averaging="debiased")
    estimator.update(squares(gradients[:, None]))
    np.testing.assert_allclose(estimator.gain, count * np.trace(gram) / gram.sum(), **CLOSE)


def test_twelve_micro_batches_are_the_same_on_one_rank_and_on_twelve(
    rng: np.random.Generator,
) -> None:
    # Oracle: an identity. Only the number of micro-batches counts, and S where it is given.
    gradients = draw(rng, 12)
    results = []
    for scale in (12.0, 3.0):
        estimator = GainEstimator(1, 12, scale, averaging="debiased")
        estimator.update(squares(gradients))
        results.append((float(estimator.variance), float(estimator.squared_norm)))
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(4.0 * results[1][0], rel=1e-12)


@pytest.mark.parametrize("clip", ["before", "after"])
@pytest.mark.parametrize("averaging", ["paper", "debiased"])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.8])
def test_averages_over_steps_follow_their_rule(
    averaging: str, clip: str, smoothing: float | None, rng: np.random.Generator
) -> None:
    count, scale, floor = 4, 4.0, 1e-6
    estimator = GainEstimator(2, count, averaging=averaging, clip=clip, smoothing=smoothing)
    theta = 1.0 - scale / 1000 if smoothing is None else smoothing
    history: list[NDArray] = []
    biased = np.zeros((2, 2))
    for step in range(30):
        gradients = draw(rng, count, groups=2, noise=3.0)
        estimator.update(squares(gradients))
        sample = np.stack(moments(gradients, scale))
        if clip == "before":
            lowest = floor * (gradients**2).sum(axis=2).mean(axis=0)
            sample = np.stack([np.maximum(sample[0], lowest), np.maximum(sample[1], 0.0)])
        history.append(sample)
        if averaging == "debiased":
            biased = theta * biased + (1 - theta) * sample
            average = biased / (1 - theta ** (step + 1))
        elif step + 1 <= 1 / (1 - theta):
            average = np.mean(history, axis=0)
        else:
            average = theta * average + (1 - theta) * sample
        expected = gain_of(average[0], average[1], scale)
        if averaging == "paper" and step == 0:
            expected = np.ones(2)
        np.testing.assert_allclose(estimator.gains, expected, **CLOSE)


def mean_gain(clip: str, rng: np.random.Generator) -> float:
    """Of 3000 steps at S = 4 with sigma^2 = 1, mu^2 = 0.01: the truth is 1.01 / 0.26."""
    dimension, count = 200, 4
    true = np.full(dimension, math.sqrt(0.01 / dimension))
    estimator = GainEstimator(1, count, smoothing=1 - 1 / 3000, clip=clip)
    for _ in range(3000):
        noise = rng.normal(size=(count, 1, dimension)) / math.sqrt(dimension)
        estimator.update(squares(true + noise))
    return float(estimator.gain)


def test_clipping_after_averaging_keeps_the_gain_that_clipping_before_lowers(
    rng: np.random.Generator,
) -> None:
    # Oracle: the gain of the distribution that was drawn from. Of 3000 steps the mean of mu^2 is
    # within 3 sqrt(2 / 200 / 16 / 3000) = 0.0014 of 0.01, so the gain within 0.55 %.
    truth = 1.01 / 0.26
    assert mean_gain("after", rng) == pytest.approx(truth, rel=5.5e-3)
    assert mean_gain("before", rng) < 0.985 * truth


def test_the_relative_floor_makes_gains_independent_of_the_scale_of_the_loss(
    rng: np.random.Generator,
) -> None:
    gradients = draw(rng, 2, noise=0.2)
    gains = {}
    for factor in (1.0, 1e-6, 1e9):
        for floor in (None, 1e-6):
            estimator = GainEstimator(1, 2, averaging="debiased", absolute_floor=floor)
            estimator.update(squares(gradients * factor))
            gains[factor, floor] = float(estimator.gain)
    truth = gain_of(*moments(gradients, 2.0), 2.0)[0]
    assert 1.05 < truth < 1.95
    for factor in (1.0, 1e-6, 1e9):
        assert gains[factor, None] == pytest.approx(truth, rel=1e-9)
    # The paper's floor is right at scale 1 and decides everything at 1e-6.
    assert gains[1.0, 1e-6] == pytest.approx(truth, rel=1e-9)
    assert gains[1e-6, 1e-6] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("passes", [2, 3])
def test_a_loss_divided_by_the_passes_changes_no_gain(
    passes: int, rng: np.random.Generator
) -> None:
    # Oracle: an identity. Sums and mean then are both smaller by passes^2.
    gradients = draw(rng, 4 * passes, groups=2)
    pair = [GainEstimator(2, 4 * passes, 4.0, averaging="debiased") for _ in range(2)]
    pair[0].update(squares(gradients))
    pair[1].update(squares(gradients / passes))
    torch.testing.assert_close(pair[0].gains, pair[1].gains, rtol=1e-12, atol=0)
    torch.testing.assert_close(pair[0].variance, pair[1].variance * passes**2, rtol=1e-12, atol=0)


def test_equal_gradients_have_gain_1_and_opposite_ones_the_largest() -> None:
    for sign, gain in ((1.0, 1.0), (-1.0, 2.0)):
        gradients = np.ones((2, 1, 4))
        gradients[1] *= sign
        estimator = GainEstimator(1, 2, averaging="debiased")
        estimator.update(squares(gradients))
        assert float(estimator.gain) == pytest.approx(gain, rel=1e-5)  # the floor is 1e-6


def test_gains_are_1_at_scale_1_before_the_first_step_and_for_the_papers_first(
    rng: np.random.Generator,
) -> None:
    at_one = GainEstimator(1, 4, 1.0, averaging="debiased")
    at_one.update(squares(draw(rng, 4)))
    assert at_one.gain.item() == 1.0
    for averaging in ("paper", "debiased"):
        estimator = GainEstimator(1, 4, averaging=averaging, absolute_floor=1e-6)
        assert estimator.gain.item() == 1.0
        estimator.update(squares(draw(rng, 4)))
        assert (estimator.gain.item() == 1.0) == (averaging == "paper")
        estimator.update(squares(draw(rng, 4)))
        assert 1.0 < estimator.gain.item() <= 4.0


def test_a_group_without_gradients_has_gain_1_and_does_not_disturb_the_total(
    rng: np.random.Generator,
) -> None:
    gradients = draw(rng, 4, groups=2)
    gradients[:, 1] = 0.0
    both, alone = (GainEstimator(k, 4, averaging="debiased") for k in (2, 1))
    both.update(squares(gradients))
    alone.update(squares(gradients[:, :1]))
    assert both.gains[1].item() == 1.0
    assert both.gain.item() == both.gains[0].item() == alone.gain.item()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_that_are_not_finite_leave_the_averages_alone(
    bad: float, rng: np.random.Generator
) -> None:
    # Oracle: the state before, bit for bit.
    estimator = GainEstimator(2, 4)
    for _ in range(3):
        estimator.update(squares(draw(rng, 4, groups=2)))
    before = {name: value.clone() for name, value in estimator.state_dict().items()}
    poisoned = squares(draw(rng, 4, groups=2))
    poisoned[1, 0] = bad
    estimator.update(poisoned)
    for name, value in estimator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_differences_of_two_gradients_estimate_what_algorithms_md_says(
    rng: np.random.Generator,
) -> None:
    # Oracle: mu^2 = <a, b> and sigma^2 = S |a - b|^2 / 2, from the vectors.
    a, b = draw(rng, 2, noise=0.2)[:, 0]
    estimator = GainEstimator(1, 1, 8.0, averaging="debiased")
    estimator.update(squares(np.stack([a, b])[:, None]), differenced=True)
    np.testing.assert_allclose(estimator.squared_norm, a @ b, **CLOSE)
    np.testing.assert_allclose(estimator.variance, 8.0 * ((a - b) @ (a - b)) / 2, **CLOSE)
    assert estimator.is_biased.item()


def test_averages_of_differences_are_forgotten_when_there_are_replicas(
    rng: np.random.Generator,
) -> None:
    # Oracle: an estimator that never saw differences.
    biased = GainEstimator(1, 1, 4.0)
    for _ in range(5):
        biased.update(squares(draw(rng, 2)), differenced=True)
    fresh, loaded = GainEstimator(1, 4), GainEstimator(1, 4)
    loaded.load_state_dict(biased.state_dict())
    for _ in range(3):
        sample = squares(draw(rng, 4))
        fresh.update(sample)
        loaded.update(sample)
        assert not loaded.is_biased.item()
        assert loaded.gain.item() == fresh.gain.item()


def test_the_state_goes_through_a_file_that_holds_tensors_only(rng: np.random.Generator) -> None:
    # Oracle: the estimator that was not interrupted.
    first, second = GainEstimator(2, 4), GainEstimator(2, 4)
    for _ in range(4):
        first.update(squares(draw(rng, 4, groups=2)))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    sample = squares(draw(rng, 4, groups=2))
    first.update(sample)
    second.update(sample)
    assert torch.equal(first.gains, second.gains)
    assert torch.equal(first.gain, second.gain)


def test_averages_are_of_scale_1_and_carry_over_to_more_ranks(rng: np.random.Generator) -> None:
    # Oracle: sigma^2 and mu^2 of the same micro-batches do not depend on how many there are.
    small, large = GainEstimator(1, 4), GainEstimator(1, 16)
    for _ in range(40):
        small.update(squares(draw(rng, 4)))
    large.load_state_dict(small.state_dict())
    assert large.variance.item() == small.variance.item()
    assert large.squared_norm.item() == small.squared_norm.item()


@pytest.mark.parametrize("scale_per_count", [1.0, 0.25])
def test_noise_scale_counts_examples_whatever_the_scale(
    scale_per_count: float, rng: np.random.Generator
) -> None:
    # Oracle: trace of the covariance of micro-batches times their size, over mu^2.
    count = 8
    gradients = draw(rng, count, noise=0.3)
    estimator = GainEstimator(1, count, count * scale_per_count)
    estimator.update(squares(gradients))
    variance, squared_norm = moments(gradients, float(count))
    expected = 32 * variance[0] / squared_norm[0]
    np.testing.assert_allclose(estimator.noise_scale(32), expected, **CLOSE)


@pytest.mark.parametrize("averaging", ["paper", "debiased"])
@pytest.mark.parametrize("clip", ["before", "after"])
def test_no_value_is_read_by_the_host(averaging: str, clip: str) -> None:
    # Oracle: meta tensors have no values, so that reading one raises.
    estimator = GainEstimator(3, 4, averaging=averaging, clip=clip, device="meta")
    for differenced in (False, True, False):
        estimator.update(
            torch.ones(3, 2, dtype=torch.float64, device="meta"), differenced=differenced
        )
    assert estimator.gains.shape == (3,)
    assert estimator.noise_scale(8).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"scale": 0.5}, "scale must be finite and at least 1, got 0.5"),
        ({"scale": math.inf}, "scale must be finite and at least 1, got inf"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"averaging": "adam"}, "averaging must be one of .* got 'adam'"),
        ({"clip": True}, "clip must be one of .* got True"),
        ({"floor": -1e-6}, "floor must be in .* got -1e-06"),
        ({"absolute_floor": math.nan}, "absolute_floor must be finite and not negative, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused_with_rule_and_value(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"GainEstimator: {message}"):
        GainEstimator(**({"num_groups": 1, "count": 4} | arguments))


def test_statistics_of_another_shape_or_of_one_sample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"squares must have shape \(2, 2\), got \(1, 2\)"):
        GainEstimator(2, 4).update(torch.ones(1, 2))
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        GainEstimator(1, 1, 4.0).update(torch.ones(1, 2))
    with pytest.raises(ValueError, match="state must be of 2 groups, got 1"):
        GainEstimator(2, 4).load_state_dict(GainEstimator(1, 4).state_dict())
