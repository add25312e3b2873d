"""The ways to make one step out of many workers' gradients, and the training loop around them.

A rank computes for several workers, one after the other. Who computes makes no difference: sums,
Adasum's tree and AdaScale's statistics are those of all workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from digits_data import Sampler, Settings, accuracy, load_data, make_model

import adareduce.torch as hvd

MicroBatches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Result:
    """What came of a training; the same on every rank but for the times."""

    steps: int = 0
    accuracy: float = 0.0
    train_loss: float = 0.0
    diverged: bool = False
    seconds: float = 0.0
    communication: float = 0.0
    losses: list[float] = field(default_factory=list)  # of rank 0's first worker, by step
    gains: list[float] = field(default_factory=list)  # adascale, by step
    orthogonality: list[list[float]] = field(default_factory=list)  # adasum, by step and tensor


class GradientMethod:
    """Average, sum and Adasum: one gradient of all, then a plain step of SGD."""

    def __init__(self, model: torch.nn.Module, settings: Settings, num_samples: int) -> None:
        self.parameters = list(model.parameters())
        self.settings = settings
        self.optimizer = torch.optim.SGD(self.parameters, lr=settings.rate)
        self.steps = settings.epochs * num_samples // (settings.workers * settings.batch)
        # Linear warm-up over the first tenth, then linear decay to zero.
        warm_up = max(1, self.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(
                (step + 1) / warm_up, (self.steps - step) / (self.steps - warm_up + 1)
            ),
        )
        self.combine = {"average": self.average, "sum": self.sum, "adasum": self.adasum}[
            settings.method
        ]

    def is_finished(self, result: Result) -> bool:
        return result.steps >= self.steps

    def progress(self, result: Result) -> float:
        return result.steps / self.steps

    def step(self, model: torch.nn.Module, batches: MicroBatches, result: Result) -> float:
        losses = [loss_of(model, batch) for batch in batches]
        workers = [torch.autograd.grad(loss, self.parameters) for loss in losses]
        begin = time.perf_counter()
        gradients = [torch.stack(same).sum(dim=0) for same in zip(*workers, strict=True)]
        if self.settings.workers > 1:
            gradients = self.combine(workers, gradients, result)
        result.communication += time.perf_counter() - begin
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.schedule.step()
        return losses[0].item()

    def sum(self, workers: list, sums: list[torch.Tensor], result: Result) -> list[torch.Tensor]:
        return hvd.grouped_allreduce_(sums, name="gradients", op=hvd.Sum)

    def average(self, workers: list, sums: list[torch.Tensor], result: Result) -> list:
        return hvd.grouped_allreduce_(
            sums, name="gradients", op=hvd.Average, prescale_factor=1.0 / len(workers)
        )

    def adasum(self, workers: list, sums: list[torch.Tensor], result: Result) -> list:
        """The tree over this rank's workers, then the tree over ranks."""
        mine, _ = hvd.local_adasum(workers)
        # |Adasum|^2 / sum |g|^2 over all workers: the ranks' ratio is over the ranks' results only.
        squares = torch.stack([_squares(mine), *map(_squares, workers)])
        squares = hvd.allreduce(torch.stack([squares[0], squares[1:].sum(dim=0)]), op=hvd.Sum)
        gradients, stats = hvd.grouped_allreduce_with_stats_(mine, name="adasum", op=hvd.Adasum)
        orthogonality = stats.orthogonality * squares[0] / squares[1]
        result.orthogonality.append(orthogonality.tolist())
        return gradients


class AdaScaleMethod:
    """SGD with momentum at one worker's rate; AdaScale multiplies it by the gain."""

    def __init__(self, model: torch.nn.Module, settings: Settings, num_samples: int) -> None:
        self.settings = settings
        optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.rate, momentum=settings.momentum
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay(settings))
        # A worker is a backward pass: several of them on a rank are gradient accumulation.
        self.optimizer = hvd.AdaScale(
            optimizer, backward_passes_per_step=settings.workers // hvd.size()
        )
        self.schedule = hvd.AdaScaleSchedule(self.optimizer, schedule)

    def is_finished(self, result: Result) -> bool:
        tau = self.optimizer.tau.item()
        # The gain is at least 1, so that only skipped steps can make it so many.
        return max(tau, result.steps) >= self.settings.reference_steps

    def progress(self, result: Result) -> float:
        return self.optimizer.tau.item() / self.settings.reference_steps

    def step(self, model: torch.nn.Module, batches: MicroBatches, result: Result) -> float:
        self.optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss = loss_of(model, batch)
            (loss / len(batches)).backward()
            losses.append(loss.item())
        begin = time.perf_counter()
        self.optimizer.synchronize()
        result.communication += time.perf_counter() - begin
        with self.optimizer.skip_synchronize():
            self.optimizer.step()
        self.schedule.step()
        result.gains.append(self.optimizer.gain.item())
        return losses[0]


class ScheduledMethod:
    """SGD with momentum on the average: one worker alone, or linear scaling with warm-up."""

    def __init__(self, model: torch.nn.Module, settings: Settings, num_samples: int) -> None:
        self.parameters = list(model.parameters())
        self.settings = settings
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=settings.rate, momentum=settings.momentum
        )
        self.schedule = hvd.LinearScalingWarmup(
            self.optimizer,
            scale=settings.workers,
            reference_steps=settings.reference_steps,
            schedule=decay(settings),
            num_steps=settings.num_steps,
        )

    def is_finished(self, result: Result) -> bool:
        return result.steps >= self.schedule.num_steps

    def progress(self, result: Result) -> float:
        return result.steps / self.schedule.num_steps

    def step(self, model: torch.nn.Module, batches: MicroBatches, result: Result) -> float:
        self.optimizer.zero_grad()
        losses = [loss_of(model, batch) for batch in batches]
        torch.stack(losses).mean().backward()
        begin = time.perf_counter()
        if self.settings.workers > 1:
            hvd.grouped_allreduce_([p.grad for p in self.parameters], name="gradients")
        result.communication += time.perf_counter() - begin
        self.optimizer.step()
        self.schedule.step()
        return losses[0].item()


def train(settings: Settings, on_step: Callable[[float, Result], None]) -> Result:
    """One training from the start. Collective if there are several workers; blocks.

    Args:
        settings: With workers = 1 or a multiple of the number of ranks.
        on_step: Called after each step with the share that is done and what there is so far.
    """
    images, labels, test_images, test_labels = load_data(settings.raw_pixels)
    model = make_model(settings)
    if settings.workers > 1:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    kind = {"adascale": AdaScaleMethod, "lsw": ScheduledMethod}.get(settings.method, GradientMethod)
    if settings.workers == 1 and kind is AdaScaleMethod:
        kind = ScheduledMethod  # the gain is 1
    method = kind(model, settings, len(labels))
    sampler = Sampler(len(labels), settings)
    per_rank = max(1, settings.workers // hvd.size())
    first = hvd.rank() * per_rank if settings.workers > 1 else 0

    result = Result()
    begin = time.perf_counter()
    while not method.is_finished(result):
        mine = sampler.draw()[first : first + per_rank]
        batches = [(images[places], labels[places]) for places in mine]
        result.losses.append(method.step(model, batches, result))
        result.steps += 1
        on_step(method.progress(result), result)
    result.seconds = time.perf_counter() - begin
    result.accuracy = accuracy(model, test_images, test_labels)
    with torch.no_grad():
        result.train_loss = loss_of(model, (images, labels)).item()
    result.diverged = not math.isfinite(result.train_loss)
    return result


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return torch.nn.functional.cross_entropy(model(images), labels)


def decay(settings: Settings) -> Callable[[int], float]:
    """Factor on the rate: exponentially from 1 to final_rate / rate over the reference steps."""
    ratio = settings.final_rate / settings.rate
    return lambda step: ratio ** min(step / settings.reference_steps, 1.0)


def _squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors])
