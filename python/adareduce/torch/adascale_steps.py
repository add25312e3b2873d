"""The two ways in which AdaScale takes a step: with the gain on the host, or on the device."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from typing_extensions import override

from adareduce.torch.device_gain import DeviceGain, Progress
from adareduce.torch.device_step import DeviceStep
from adareduce.torch.differences import ConsecutiveGradients, DeviceDifferences
from adareduce.torch.gain import GainEstimator
from adareduce.torch.gradients import GradientReducer
from adareduce.torch.loss_scaling import LossScale, unscale


@dataclass
class Parts:
    """What a step of AdaScale works with."""

    optimizer: torch.optim.Optimizer
    reducer: GradientReducer
    estimator: GainEstimator
    per_group: bool
    loss_scale: LossScale
    schedule: torch.Tensor | None  # float64 (T, K), rates
    device: torch.device

    @property
    def is_differenced(self) -> bool:
        """Whether consecutive gradients are compared, since there are no others."""
        return self.estimator.count == 1 and self.estimator.scale > 1.0

    @property
    def gradients_of(self) -> list[list[torch.Tensor]]:
        """The parameters, by group."""
        return [group["params"] for group in self.optimizer.param_groups]


class Steps(abc.ABC):
    """State of AdaScale beside the averages, and how a step is taken."""

    @property
    @abc.abstractmethod
    def tau(self) -> torch.Tensor:
        """float64 (): scale-invariant steps."""

    @property
    @abc.abstractmethod
    def skipped(self) -> torch.Tensor:
        """int64 (): steps that were none."""

    @property
    @abc.abstractmethod
    def gain(self) -> torch.Tensor:
        """float64 (): the total gain."""

    @property
    @abc.abstractmethod
    def gains(self) -> torch.Tensor:
        """float64 (K,): what the groups' rates are multiplied by."""

    @abc.abstractmethod
    def keep_statistics(self) -> None:
        """Remembers what a reduction has found; gradients may be changed afterwards."""

    @abc.abstractmethod
    def take(
        self,
        step: Callable[[], None],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Calls ``step`` at the scaled rates and advances tau, or skips.

        Args:
            step: The wrapped optimizer's.
            grad_scale: What gradients are still multiplied by.
            found_inf: Above 0 where GradScaler has found an infinity.
        """

    @abc.abstractmethod
    def progress(self) -> Progress:
        """What the host knows."""

    @abc.abstractmethod
    def follow_estimator(self) -> None:
        """The estimator's count and scale have changed."""

    @abc.abstractmethod
    def follow_optimizer(self, rates: str) -> None:
        """The optimizer has other groups, and maybe another form: ``choose_rates``."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from ``state_dict()``."""


class HostSteps(Steps):
    """The host reads the gain and multiplies the rates. What the CPU does; a GPU is waited for."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tau = torch.zeros((), dtype=torch.float64, device=parts.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=parts.device)
        self._schedule = None if parts.schedule is None else parts.schedule.tolist()
        self._sample: torch.Tensor | None = None  # statistics of the gradients that are reduced
        self._differences = ConsecutiveGradients()

    @property
    @override
    def tau(self) -> torch.Tensor:
        return self._tau

    @property
    @override
    def skipped(self) -> torch.Tensor:
        return self._skipped

    @property
    @override
    def gain(self) -> torch.Tensor:
        return self._parts.estimator.gain

    @property
    @override
    def gains(self) -> torch.Tensor:
        gains = self._parts.estimator.gains
        return gains if self._parts.per_group else self.gain.expand_as(gains)

    @override
    def keep_statistics(self) -> None:
        parts = self._parts
        statistics = parts.reducer.statistics
        assert statistics is not None
        loss_scale = parts.loss_scale.on_host()
        # Passes are added, so each one's gradient is that of the loss divided by their number.
        micro_batch = statistics.new_tensor([parts.reducer.passes_per_step**2, 1.0])
        self._sample = (statistics * micro_batch / loss_scale**2).to(parts.device)
        if parts.is_differenced:
            # Kept now: what take() finds in .grad may have been clipped or unscaled.
            self._differences.keep(parts.gradients_of, loss_scale)

    @override
    def take(
        self,
        step: Callable[[], None],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        if self._parts.reducer.nonfinite or (found_inf is not None and bool(found_inf > 0)):
            self._skipped = self._skipped + 1
            return
        self._observe()
        if grad_scale is not None:
            unscale(self._parts.optimizer.param_groups, grad_scale)
        with self._scaled_rates():
            step()
        self._tau = self._tau + self.gain

    @override
    def progress(self) -> Progress:
        return Progress(self.tau.item(), self.gain.item(), int(self.skipped.item()))

    @override
    def follow_estimator(self) -> None:
        """Every step reads it."""

    @override
    def follow_optimizer(self, rates: str) -> None:
        """Every step multiplies the rates that it finds."""

    @override
    def state_dict(self) -> dict[str, torch.Tensor]:
        mine = {"tau": self.tau, "skipped_steps": self.skipped}
        return mine | self._parts.estimator.state_dict()

    @override
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._parts.estimator.load_state_dict(state)
        self._tau = state["tau"].to(self.tau.device, torch.float64, copy=True)
        self._skipped = state["skipped_steps"].to(self.tau.device, torch.int64, copy=True)
        self._differences = ConsecutiveGradients()

    def _observe(self) -> None:
        """Takes the statistics of a step that counts into the averages."""
        estimator = self._parts.estimator
        if estimator.count > 1:
            assert self._sample is not None
            estimator.update(self._sample)
        elif estimator.scale > 1.0:
            squares = self._differences.squares(self.tau.device)
            if squares is not None:
                estimator.update(squares, differenced=True)

    @contextlib.contextmanager
    def _scaled_rates(self) -> Iterator[None]:
        groups = self._parts.optimizer.param_groups
        before = [group["lr"] for group in groups]
        rates = before
        if self._schedule is not None:
            rates = self._schedule[min(int(self.tau.item()), len(self._schedule) - 1)]
        try:
            for group, rate, gain in zip(groups, rates, self.gains.unbind(), strict=True):
                if isinstance(rate, torch.Tensor):
                    group["lr"] = rate * gain.to(rate)
                else:
                    group["lr"] = rate * float(gain)
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate


class DeviceSteps(Steps):
    """Everything is computed where the parameters are; the host reads nothing and never waits."""

    def __init__(self, parts: Parts, rates: str) -> None:
        self._parts = parts
        self._rates = rates
        self._build()

    def _build(self) -> None:
        parts, schedule, groups = self._parts, self._parts.schedule, self._parts.gradients_of
        self._differences: DeviceDifferences | None = None
        row_groups, row_width = parts.reducer.found.row_groups, 4
        if parts.is_differenced:
            self._differences = DeviceDifferences(groups, parts.device)
            row_groups, row_width = list(range(len(groups))), 2
        num_counts = parts.reducer.found.num_tensors
        self._gain = DeviceGain(
            parts.estimator, parts.per_group, row_groups, row_width, num_counts, schedule,
            parts.device,
        )  # fmt: skip
        self._peaks = None if schedule is None else schedule.amax(0).tolist()
        self.follow_optimizer(self._rates)

    @property
    @override
    def tau(self) -> torch.Tensor:
        return self._gain.tau.clone()

    @property
    @override
    def skipped(self) -> torch.Tensor:
        return self._gain.skipped.clone()

    @property
    @override
    def gain(self) -> torch.Tensor:
        return self._gain.gain.clone()

    @property
    @override
    def gains(self) -> torch.Tensor:
        gains = self._gain.gains.clone()
        return gains if self._parts.per_group else self.gain.expand_as(gains)

    @override
    def keep_statistics(self) -> None:
        rows, counts = self._parts.reducer.found.rows, self._parts.reducer.found.counts
        if counts:
            torch.cat(counts, out=self._gain.nonfinite)
        if self._differences is not None:
            self._differences.keep(self._loss_scale(), self._gain.rows)
        elif rows:
            torch.cat(rows, out=self._gain.rows)

    @override
    def take(
        self,
        step: Callable[[], None],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        reducer, estimator = self._parts.reducer, self._parts.estimator
        is_differenced, passes = self._differences is not None, reducer.passes_per_step
        self._step.push_rates()
        self._gain.step(
            divisors=(1.0, 1.0) if is_differenced else reducer.found.divisors(passes),
            factors=(1.0 if is_differenced else float(passes**2), 1.0),
            loss_scale=1.0 if is_differenced else self._loss_scale(),
            found_inf=found_inf,
            has_rows=is_differenced or estimator.count > 1,
            is_differenced=is_differenced,
        )
        if self._differences is not None:
            self._differences.settle(self._gain.skips)
        with self._step.scaled(grad_scale):
            step()

    @override
    def progress(self) -> Progress:
        return self._gain.progress()

    @override
    def follow_estimator(self) -> None:
        if self._parts.is_differenced != (self._differences is not None):
            state = self.state_dict()
            self._build()
            self.load_state_dict(state)
        self._step.set_scale(self._parts.estimator.scale)

    @override
    def follow_optimizer(self, rates: str) -> None:
        self._rates = rates
        parts = self._parts
        self._step = DeviceStep(
            parts.optimizer, rates, self._gain, parts.estimator.scale, self._peaks
        )

    @override
    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._gain.state_dict()

    @override
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._gain.load_state_dict(state)

    def _loss_scale(self) -> float | torch.Tensor:
        return self._parts.loss_scale.on(self._parts.device)
