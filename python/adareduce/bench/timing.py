"""Times: contenders take turns, iteration by iteration, and the slowest rank counts."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from adareduce.bench.ranks import Ranks

LEAST_REPEATS = 5
_LEAST_FOR_P99 = 100  # of fewer it is the maximum, more or less
_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Contender:
    """Something to be measured.

    Attributes:
        name: Unique within a row.
        run: The call that is measured; collective, blocks.
        prepare: Runs before each iteration and is not measured.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Summary:
    """Seconds of an iteration, over the iterations."""

    median: float
    p50: float
    p99: float | None  # of 100 iterations or more
    min: float
    mean: float


class Ratio(NamedTuple):
    """A ratio of medians with its interval of 95 % confidence."""

    value: float
    low: float
    high: float


class HostClock:
    """Times calls that are over when they return."""

    def settle(self) -> None:
        """Before the ranks meet at the start line."""

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one call; freeing its result is not measured."""
        begin = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - begin
        del result
        return elapsed


def measure(
    contenders: Sequence[Contender],
    ranks: Ranks,
    warmup_iters: int,
    iters: int,
    clock: HostClock | None = None,
) -> dict[str, torch.Tensor]:
    """Seconds of every iteration of every contender, the slowest rank's. Collective, blocks.

    The contenders take turns, another one first in each round. Before each call the ranks meet in a
    barrier of MPI. Freeing a result is not measured.
    """
    clock = clock or HostClock()
    seconds = torch.zeros(len(contenders), iters, dtype=torch.float64)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for iteration in range(-warmup_iters, iters):
            for turn in range(len(contenders)):
                index = (turn + iteration) % len(contenders)
                contender = contenders[index]
                contender.prepare()
                clock.settle()
                ranks.align()
                elapsed = clock.seconds(contender.run)
                if iteration >= 0:
                    seconds[index, iteration] = elapsed
    finally:
        if was_enabled:
            gc.enable()
    slowest = torch.stack(ranks.gather(seconds)).amax(dim=0)
    return {contender.name: slowest[index] for index, contender in enumerate(contenders)}


def summarise(seconds: torch.Tensor) -> Summary:
    """Median, percentiles (linearly interpolated), minimum and mean of iterations."""
    p50, p99 = torch.quantile(seconds, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    has_p99 = seconds.numel() >= _LEAST_FOR_P99
    return Summary(p50, p50, p99 if has_p99 else None, float(seconds.min()), float(seconds.mean()))


def ratio_of_medians(numerator: torch.Tensor, denominator: torch.Tensor) -> Ratio:
    """Ratio of the medians of interleaved repeats, with a bootstrap percentile interval.

    Repeats are drawn with their neighbour: what disturbs an iteration disturbs both contenders.

    Source: Efron, Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    count = numerator.numel()
    if count < LEAST_REPEATS or denominator.numel() != count:
        raise ValueError(
            f"ratio_of_medians: both must have the same number of at least {LEAST_REPEATS} repeats,"
            f" got {count} and {denominator.numel()}"
        )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (_RESAMPLES, count), generator=generator)
    ratios = _medians(numerator[drawn]) / _medians(denominator[drawn])
    tail = (1 - _CONFIDENCE) / 2
    ends = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=ratios.dtype))
    value = _medians(numerator[None]) / _medians(denominator[None])
    return Ratio(float(value), float(ends[0]), float(ends[1]))


def _medians(rows: torch.Tensor) -> torch.Tensor:
    return torch.quantile(rows, 0.5, dim=1)  # torch.median takes the lower of two middle ones
