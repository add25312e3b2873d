"""Data-parallel training written from the formulas, in NumPy float64 on one process.

The oracle of the distributed optimizers: no torch, no autograd, and nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import reference

Weights = list[NDArray]
INPUTS, HIDDEN, OUTPUTS, SAMPLES = 5, 7, 3, 4


def initial_weights(seed: int = 0) -> Weights:
    """A network's weights and biases, in the shapes and order of torch.nn.Linear."""
    rng = np.random.default_rng(seed)
    shapes = [(HIDDEN, INPUTS), (HIDDEN,), (OUTPUTS, HIDDEN), (OUTPUTS,)]
    return [rng.standard_normal(shape) * 0.5 for shape in shapes]


def batch(step: int, micro_batch: int, rank: int) -> tuple[NDArray, NDArray]:
    """Inputs and targets of one backward pass of one rank; the targets differ between ranks."""
    rng = np.random.default_rng([step, micro_batch, rank])
    inputs = rng.standard_normal((SAMPLES, INPUTS))
    targets = np.sin(inputs[:, :OUTPUTS] * (1 + 0.2 * rank)) + 0.1 * rng.standard_normal(
        (SAMPLES, OUTPUTS)
    )
    return inputs, targets


def loss_and_gradients(
    weights: Weights, inputs: NDArray, targets: NDArray
) -> tuple[float, Weights]:
    """Mean squared error of Linear, tanh, Linear, and its derivatives by hand."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(inputs @ w1.T + b1)
    errors = hidden @ w2.T + b2 - targets
    outer = 2 * errors / errors.size
    inner = (outer @ w2) * (1 - hidden**2)
    gradients = [inner.T @ inputs, inner.sum(0), outer.T @ hidden, outer.sum(0)]
    return float(np.mean(errors**2)), gradients


class Rule(Protocol):
    """An optimizer: weights and gradients in, new weights out; it remembers what it needs to."""

    def step(self, weights: Weights, gradients: Sequence[NDArray | None]) -> Weights: ...


@dataclass
class Sgd:
    """v <- m v + (g + d w), v = g + d w at first;  w <- w - rate v."""

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    velocities: dict[int, NDArray] = field(default_factory=dict)

    def step(self, weights: Weights, gradients: Sequence[NDArray | None]) -> Weights:
        result = list(weights)
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if gradient is None:
                continue
            change = gradient + self.decay * weight
            if self.momentum:
                if i in self.velocities:
                    change = self.momentum * self.velocities[i] + change
                self.velocities[i] = change
            result[i] = weight - self.rate * change
        return result


@dataclass
class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    moments: dict[int, tuple[NDArray, NDArray, int]] = field(default_factory=dict)

    def step(self, weights: Weights, gradients: Sequence[NDArray | None]) -> Weights:
        result = list(weights)
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if gradient is None:
                continue
            zero = np.zeros_like(weight)
            first, second, t = self.moments.get(i, (zero, zero, 0))
            first = self.betas[0] * first + (1 - self.betas[0]) * gradient
            second = self.betas[1] * second + (1 - self.betas[1]) * gradient**2
            t += 1
            self.moments[i] = (first, second, t)
            unbiased = first / (1 - self.betas[0] ** t)
            scale = np.sqrt(second / (1 - self.betas[1] ** t)) + self.epsilon
            result[i] = weight - self.rate * unbiased / scale
        return result


@dataclass
class Course:
    """What a training went through: losses[step][rank][pass] and weights after each step."""

    losses: list[list[list[float]]] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)


def train(
    method: str,
    make_rule: Callable[[], Rule],
    *,
    size: int,
    passes: int = 1,
    steps: int = 20,
    clip: float | None = None,
    lost: Collection[int] = (),
) -> Course:
    """Trains on all ranks' batches.

    Args:
        method: "average" or "sum" of the ranks' gradients, then one step; or "adasum": a step on
            each rank, with an optimizer of its own, and Adasum of the ranks' changes per tensor.
        make_rule: Makes an optimizer.
        size: Number of ranks.
        passes: Backward passes per step, whose gradients are added.
        steps: Number of steps.
        clip: Largest norm of all gradients together: of the reduced ones, with "adasum" of each
            rank's.
        lost: Steps that nobody takes, for a gradient somewhere is infinite.
    """
    weights, course = initial_weights(), Course()
    rules = [make_rule() for _ in range(size if method == "adasum" else 1)]
    for step in range(steps):
        losses, totals = [], []
        for rank in range(size):
            results = [loss_and_gradients(weights, *batch(step, p, rank)) for p in range(passes)]
            losses.append([loss for loss, _ in results])
            of_passes = zip(*(gradients for _, gradients in results), strict=True)
            totals.append([np.sum(parts, axis=0) for parts in of_passes])
        if step in lost:
            pass
        elif method == "adasum":
            stepped = [
                rule.step(weights, clipped(total, clip))
                for rule, total in zip(rules, totals, strict=True)
            ]
            weights = [
                start + reference.adasum([after[i] - start for after in stepped]).astype(float)
                for i, start in enumerate(weights)
            ]
        else:
            divisor = size if method == "average" else 1
            reduced = [np.sum(parts, axis=0) / divisor for parts in zip(*totals, strict=True)]
            weights = rules[0].step(weights, clipped(reduced, clip))
        course.losses.append(losses)
        course.weights.append(weights)
    return course


def clipped(gradients: Weights, largest: float | None) -> Weights:
    """Scaled down where their common norm exceeds `largest`, as torch's clip_grad_norm_ does."""
    if largest is None:
        return gradients
    norm = np.sqrt(sum(float(np.sum(gradient**2)) for gradient in gradients))
    factor = min(1.0, largest / (norm + 1e-6))
    return [gradient * factor for gradient in gradients]
