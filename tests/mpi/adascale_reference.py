"""AdaScale in one process, in float64: what tests compare the ranks with.

Gains are NumPy on stacked gradients, steps those of the plain optimizer with the rate set by hand.
Weights agree to 1e-9: twenty steps, of which each rounds at 1e-16 times a few hundred additions
and passes errors on by at most the rate times the gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import adareduce.torch as hvd

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
}
WRAPPINGS = ["plain", "distributed"]


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()


def groups_of(model: torch.nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]


def micro_batch(step: int, rank: int, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + number)
    inputs = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.sin(2.0 * inputs[:, :3]) + inputs[:, 3:]


def loss_of(model: torch.nn.Module, step: int, rank: int, number: int = 0) -> torch.Tensor:
    inputs, targets = micro_batch(step, rank, number)
    return (model(inputs) - targets).square().mean()


def wrap(wrapping: str, optimizer: torch.optim.Optimizer, passes: int = 1, **options: Any) -> Any:
    if wrapping == "plain":
        return hvd.AdaScale(optimizer, backward_passes_per_step=passes, **options)
    distributed = hvd.DistributedOptimizer(optimizer, backward_passes_per_step=passes)
    return hvd.AdaScale(distributed, **options)


def backward(model: torch.nn.Module, optimizer: Any, step: int, rank: int, passes: int) -> None:
    optimizer.zero_grad()
    for number in range(passes):
        (loss_of(model, step, rank, number) / passes).backward()


class Reference:
    """AdaScale in one process: the paper's averaging, clipped afterwards."""

    def __init__(self, optimizer: str, size: int, passes: int, scale: float | None = None) -> None:
        self.model = make_model()
        self.groups = groups_of(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.workers = [(rank, number) for rank in range(size) for number in range(passes)]
        self.scale = float(len(self.workers) if scale is None else scale)
        self.average = np.zeros((3, 2))
        self.tau = 0.0
        self.seen = 0
        self.gains = np.ones(3)

    def step(self, step: int) -> None:
        count, flat = len(self.workers), []
        for rank, number in self.workers:
            loss = loss_of(self.model, step, rank, number)
            flat.append(torch.autograd.grad(loss, list(self.model.parameters())))
        sample = []
        for places in ((0, 1), (2, 3), (0, 1, 2, 3)):
            rows = np.stack(
                [np.concatenate([worker[p].numpy().ravel() for p in places]) for worker in flat]
            )
            mean = rows.mean(axis=0)
            variance = rows.var(axis=0, ddof=1).sum() if count > 1 else math.nan
            sample.append([self.scale / count * variance, mean @ mean - variance / count])
        if count > 1:
            self.observe(np.array(sample))
        for parameter, *gradients in zip(self.model.parameters(), *flat, strict=True):
            parameter.grad = torch.stack(gradients).mean(dim=0)
        for group, rate, gain in zip(
            self.optimizer.param_groups, self.rates, self.gains, strict=False
        ):
            group["lr"] = rate * gain
        self.optimizer.step()
        self.tau += self.gains[2]

    def observe(self, sample: np.ndarray) -> None:
        self.seen += 1
        weight = max(1.0 / self.seen, min(self.scale / 1000, 1.0))
        self.average += weight * (sample - self.average)
        variance, squared_norm = np.maximum(self.average, 0.0).T
        gains = (variance + squared_norm) / (variance / self.scale + squared_norm)
        self.gains = np.ones(3) if self.seen == 1 else np.clip(gains, 1.0, self.scale)


def assert_same(optimizer: Any, model: torch.nn.Module, reference: Reference) -> None:
    for mine, theirs in zip(model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(optimizer.gains, reference.gains[:2], rtol=1e-9)
    np.testing.assert_allclose(optimizer.gain, reference.gains[2], rtol=1e-9)
    np.testing.assert_allclose(optimizer.tau, reference.tau, rtol=1e-9)


def state_bits(optimizer: Any, model: torch.nn.Module) -> list[bytes]:
    """All that training depends on."""
    mine = optimizer.state_dict()["adascale"]
    inner = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    own = [mine[name] for name in sorted(mine) if name != "skipped_steps"]
    tensors = [*model.parameters(), *inner, *own]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]
