"""Handwritten digits (1,797 images of 8 x 8 pixels, shipped with scikit-learn) and a small network.

Settings are those of one training; nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits

TEST_SAMPLES = 360
METHODS = ("average", "sum", "adasum", "adascale", "lsw")
# The methods that count AdaScale's scale-invariant steps, not epochs.
BY_STEPS = ("adascale", "lsw")


@dataclass(frozen=True)
class Settings:
    """Of one training.

    Attributes:
        method: One of METHODS.
        workers: Over all ranks. One worker trains alone: no rank communicates.
        batch: Samples of one worker in one step.
        rate: Learning rate of one worker; only sum and lsw make more of it.
        epochs: Of average, sum and adasum: warm-up over 10 % of the steps, then linear decay to 0.
        reference_steps: Of adascale and lsw: steps that one worker takes (T_SI). The rate decays
            exponentially to ``final_rate`` meanwhile.
        final_rate: See there.
        momentum: Of adascale and lsw.
        num_steps: Of lsw: stretches it to so many steps; None: reference_steps / workers.
        hidden: Width of the hidden layer.
        activation: Of the hidden layer: "relu" or "tanh".
        raw_pixels: Leaves pixels between 0 and 1; else each one's training mean is subtracted.
        seed: Of weights and batches. The split into training and test set is always the same.
    """

    method: str
    workers: int
    batch: int = 8
    rate: float = 0.5
    epochs: int = 10
    reference_steps: int = 3600
    final_rate: float = 0.002
    momentum: float = 0.9
    num_steps: int | None = None
    hidden: int = 64
    activation: str = "relu"
    raw_pixels: bool = False
    seed: int = 0


def load_data(raw_pixels: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, test images and labels; the same split on every rank."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    if not raw_pixels:
        images = images - images[train].mean(dim=0)
    return images[train], labels[train], images[test], labels[test]


def make_model(settings: Settings) -> torch.nn.Sequential:
    torch.manual_seed(settings.seed)
    # He's initialisation, for both activations, so that these differ in nothing else.
    layers = torch.nn.Linear(64, settings.hidden), torch.nn.Linear(settings.hidden, 10)
    for layer in layers:
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
    activation = torch.nn.Tanh() if settings.activation == "tanh" else torch.nn.ReLU()
    return torch.nn.Sequential(layers[0], activation, layers[1])


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


class Sampler:
    """The samples of each step, the same on every rank: (workers, batch) places in the data."""

    def __init__(self, num_samples: int, settings: Settings) -> None:
        self._num_samples = num_samples
        self._shape = (settings.workers, settings.batch)
        self._generator = torch.Generator().manual_seed(settings.seed + 1_000)
        # AdaScale's formulas are for independent samples. Drawn without replacement, 512 of 1437
        # would make the variance of the mean look smaller than it is.
        self._is_independent = settings.method in BY_STEPS
        self._rest = torch.empty(0, dtype=torch.int64)

    def draw(self) -> torch.Tensor:
        count = self._shape[0] * self._shape[1]
        if self._is_independent:
            places = torch.randint(self._num_samples, (count,), generator=self._generator)
            return places.view(self._shape)
        while len(self._rest) < count:  # epochs follow each other without a gap
            epoch = torch.randperm(self._num_samples, generator=self._generator)
            self._rest = torch.cat([self._rest, epoch])
        places, self._rest = self._rest[:count], self._rest[count:]
        return places.view(self._shape)
