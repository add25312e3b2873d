"""AdaScale on a quadratic whose stationary loss is known in closed form.

F(w) = |w|^2 / 2, gradients w + N(0, V/d I), rate eta: the stationary loss of one worker is
Delta = eta V / (2 (2 - eta)), and with AdaScale it is Delta for every S. Linear scaling makes it
Delta (2 - eta) / (2 - S eta), and diverges from S eta = 2 on. Losses are averaged over the second
half of the run, weighted by the gain, since a step at gain r stands for r steps of one worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from adareduce.torch.gain import GainEstimator

ETA, V, DIMENSION, STEPS = 0.1, 1.0, 200, 3000
DELTA = ETA * V / (2.0 * (2.0 - ETA))
Gain = Callable[[torch.Tensor, torch.Tensor], float]


def stationary_loss(scale: int, gain_of: Gain) -> float:
    """gain_of gets the workers' gradients (S, d) and their mean."""
    generator = torch.Generator().manual_seed(scale)
    weights = torch.full((DIMENSION,), 0.05, dtype=torch.float64)
    weighted = total = 0.0
    for step in range(STEPS):
        noise = torch.randn(scale, DIMENSION, generator=generator, dtype=torch.float64)
        gradients = weights + math.sqrt(V / DIMENSION) * noise
        mean = gradients.mean(dim=0)
        gain = gain_of(gradients, mean)
        if step >= STEPS // 2:
            weighted += gain * 0.5 * weights.square().sum().item()
            total += gain
        weights = weights - ETA * gain * mean
    return weighted / total


def adascale(scale: int, averaging: str, clip: str) -> Gain:
    estimator = GainEstimator(1, scale, averaging=averaging, clip=clip)

    def gain_of(gradients: torch.Tensor, mean: torch.Tensor) -> float:
        estimator.update(torch.stack([gradients.square().sum(), mean.square().sum()])[None])
        return estimator.gain.item()

    return gain_of


@pytest.mark.parametrize(("averaging", "clip"), [("paper", "after"), ("debiased", "before")])
@pytest.mark.parametrize("scale", [4, 16, 64])
def test_the_noise_floor_under_adascale_is_that_of_one_worker(
    scale: int, averaging: str, clip: str
) -> None:
    # Oracle: Delta = 0.0263. The run is long enough for 6 %: 1500 steps with a memory of
    # 1 / (2 r eta) steps in 200 dimensions wander by 2 % at most.
    loss = stationary_loss(scale, adascale(scale, averaging, clip))
    assert loss == pytest.approx(DELTA, rel=0.06)


def test_linear_scaling_raises_the_noise_floor_as_theory_says() -> None:
    # Oracle: Delta (2 - eta) / (2 - S eta) = 0.125 at S = 16; this is what the gain avoids.
    expected = DELTA * (2.0 - ETA) / (2.0 - 16 * ETA)
    assert stationary_loss(16, lambda *_: 16.0) == pytest.approx(expected, rel=0.06)
