"""Learning-rate schedules for large batches: indexed by AdaScale's tau, or scaled linearly."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adareduce.torch.adascale import AdaScale


class AdaScaleSchedule:
    """Indexes any torch scheduler by tau, AdaScale's scale-invariant steps, instead of by steps.

    Call ``step()`` after each step of AdaScale: it advances the scheduler to step floor(tau), which
    may be no step, one, or up to S. So a schedule that was made for one worker is used as it is.
    Reads tau on the host, which on a GPU waits for it: there use ``AdaScale(schedule=tabulate(...
    ))`` instead. Not collective.

    Args:
        optimizer: The AdaScale whose tau counts.
        scheduler: A torch ``LRScheduler`` over AdaScale or the optimizer that it wraps: LambdaLR,
            MultiStepLR, OneCycleLR, SequentialLR and so on. One that ends after ``total_steps``
            (OneCycleLR) stays at its last rate.

    Raises:
        TypeError: ``optimizer`` is no AdaScale, or ``scheduler`` does not count steps.
        ValueError: ``scheduler`` is for another optimizer.

    Source: arXiv 2007.05105, algorithm 1.
    """

    def __init__(self, optimizer: AdaScale, scheduler: LRScheduler) -> None:
        if not isinstance(optimizer, AdaScale):
            raise TypeError(
                f"AdaScaleSchedule: optimizer must be an AdaScale, got {type(optimizer).__name__}"
            )
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "AdaScaleSchedule: scheduler must be an LRScheduler that counts steps, got"
                f" {type(scheduler).__name__}"
            )
        wrapped = optimizer.optimizer
        innermost = getattr(wrapped, "_optimizer", wrapped)  # of a distributed one
        if getattr(scheduler, "optimizer", None) not in (optimizer, wrapped, innermost):
            raise ValueError(
                "AdaScaleSchedule: scheduler must be made for the AdaScale or the optimizer that it"
                " wraps, got one for another"
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._num_steps = int(getattr(scheduler, "last_epoch", 0))  # ChainedScheduler has none

    def step(self) -> None:
        """Advances the scheduler to floor(tau)."""
        target = math.floor(self.optimizer.tau.item())
        if hasattr(self.scheduler, "total_steps"):
            target = min(target, int(self.scheduler.total_steps) - 1)
        while self._num_steps < target:
            self.scheduler.step()
            self._num_steps += 1

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The unscaled rates of the groups."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's, and how often it was stepped; tau is in the state of AdaScale."""
        return {"scheduler": self.scheduler.state_dict(), "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict()``."""
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self._num_steps = int(state_dict["num_steps"])


def tabulate(scheduler: LRScheduler, num_steps: int) -> torch.Tensor:
    """The rates of a scheduler's next steps, for ``AdaScale(schedule=...)``. Not collective.

    A GPU then follows the schedule by itself, also in a CUDA graph. Make the table before the
    optimizer is wrapped, and do not step the scheduler any more.

    Args:
        scheduler: Any that counts steps. It and its optimizer are left as they were.
        num_steps: T, how many: those of one worker's training.

    Returns:
        float64 (T, groups) on the CPU; row t is the rate t steps from now.

    Raises:
        TypeError: ``scheduler`` does not count steps.
        ValueError: ``num_steps`` is not positive, or the scheduler changes more than ``lr``
            (OneCycleLR cycles momentum, too, unless told not to).
    """
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "tabulate: scheduler must be an LRScheduler that counts steps, got"
            f" {type(scheduler).__name__}"
        )
    if num_steps < 1:
        raise ValueError(f"tabulate: num_steps must be at least 1, got {num_steps}")
    groups = scheduler.optimizer.param_groups
    state = copy.deepcopy(scheduler.state_dict())
    kept = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in groups]
    rows: list[list[float]] = []
    changed: set[str] = set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer steps in between, on purpose
            for step in range(num_steps):
                rows.append([float(group["lr"]) for group in groups])
                if step + 1 < num_steps:
                    scheduler.step()
                for group, old in zip(groups, kept, strict=True):
                    changed |= {name for name in old if group[name] != old[name]}
    finally:
        for group, old in zip(groups, kept, strict=True):
            for name, value in old.items():
                if isinstance(group[name], torch.Tensor):
                    group[name].copy_(value)  # whoever else has it
                else:
                    group[name] = value
        scheduler.load_state_dict(state)
    if changed - {"lr"}:
        raise ValueError(
            f"tabulate: scheduler must change lr alone, got one that changes {sorted(changed)}"
        )
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


class LinearScalingWarmup(LRScheduler):
    """Linear scaling with gradual warm-up: the rule that AdaScale is compared with.

    In step t of T the rate is f(t) * lr * schedule(t * T_1 / T), where T_1 steps are those of
    scale 1, T = ceil(T_1 / S), and the factor f grows linearly from 1 to S over the first
    ``warmup`` of the steps. With ``num_steps`` T is another number: the form that is stretched to
    as many steps as AdaScale has taken.

    Args:
        optimizer: Its ``lr`` is that of scale 1.
        scale: S, how many times the batch is that of scale 1.
        reference_steps: T_1.
        schedule: Factor on ``lr`` in a step of scale 1, from 0 to T_1 - 1 (a LambdaLR's function);
            constant by default. Its argument is an int.
        num_steps: T; ceil(T_1 / S) by default.
        warmup: Share of the steps; 5.5 % by default.
        last_epoch: As for torch's schedulers.

    Raises:
        ValueError: An argument is out of range.

    Source: Goyal et al., arXiv 1706.02677, section 2.2; arXiv 2007.05105, section 4.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scale: float,
        reference_steps: int,
        schedule: Callable[[int], float] | None = None,
        *,
        num_steps: int | None = None,
        warmup: float = 0.055,
        last_epoch: int = -1,
    ) -> None:
        if not 1.0 <= scale < math.inf:
            raise ValueError(
                f"LinearScalingWarmup: scale must be finite and at least 1, got {scale}"
            )
        if reference_steps < 1:
            raise ValueError(
                f"LinearScalingWarmup: reference_steps must be at least 1, got {reference_steps}"
            )
        if num_steps is None:
            num_steps = math.ceil(reference_steps / scale)
        if num_steps < 1:
            raise ValueError(f"LinearScalingWarmup: num_steps must be at least 1, got {num_steps}")
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"LinearScalingWarmup: warmup must be in [0, 1], got {warmup}")
        self.scale = float(scale)
        self.reference_steps = int(reference_steps)
        self.num_steps = int(num_steps)
        self.warmup = float(warmup)
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The groups' rates in step ``last_epoch``."""
        factor = self.factor(self.last_epoch)
        if self.schedule is not None:
            factor *= self.schedule(self.reference_step(self.last_epoch))
        return [rate * factor for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """Between 1 and S: by how much the rate of a step is larger than at scale 1."""
        ramp = self.warmup * self.num_steps
        share = 1.0 if step >= ramp else step / ramp
        return 1.0 + (self.scale - 1.0) * share

    def reference_step(self, step: int) -> int:
        """The step of scale 1 that a step stands for."""
        return min(step * self.reference_steps // self.num_steps, self.reference_steps - 1)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the schedule, which is code."""
        return {k: v for k, v in self.__dict__.items() if k not in ("optimizer", "schedule")}
