"""AdaScale's arithmetic of a whole step as one kernel, on memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from adareduce import _core, cuda_library
from adareduce.torch import streams
from adareduce.torch.gain import GainEstimator

_STATE = ("num_samples", "averages", "is_biased")  # the estimator's


class Progress(NamedTuple):
    """How far a training with AdaScale has come, as far as the host knows.

    Attributes:
        tau: Scale-invariant steps.
        gain: The total gain of the newest of these steps.
        skipped_steps: Steps that were not finite.
    """

    tau: float
    gain: float
    skipped_steps: int


class DeviceGain:
    """Averages, gains, tau, schedule and scaled rates of AdaScale, without a read by the host.

    The formulas are ``GainEstimator``'s. All memory is made here and never moves, so that a CUDA
    graph that was captured goes on reading and writing it.

    Args:
        estimator: Its settings count, and its averages: they are updated in place.
        is_per_group: Each group's rate has its own gain; else all have the total one.
        row_groups: The parameter group of each row of statistics.
        row_width: Columns of a row, of which the first two count.
        num_counts: Numbers of elements that are not finite.
        schedule: float64 (T, K) rates, or None: ``base_rates``.
        device: Where the parameters are.
    """

    def __init__(
        self,
        estimator: GainEstimator,
        is_per_group: bool,
        row_groups: Sequence[int],
        row_width: int,
        num_counts: int,
        schedule: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        self._estimator = estimator
        self._is_per_group = is_per_group
        self._device = device
        groups, entries = estimator.num_groups, len(row_groups)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows = zeros(entries, row_width)
        self.nonfinite = zeros(num_counts, dtype=torch.int64)
        self.tau = zeros()
        self.skipped = zeros(dtype=torch.int64)
        self.base_rates = zeros(groups)
        self.step_rates = zeros(groups)  # what the optimizer steps with where it reads no tensor
        self.rates = zeros(groups)
        self.rates_f32 = zeros(groups, dtype=torch.float32)
        self.shares = zeros(groups)  # rates / step_rates
        self.shares_f32 = zeros(groups, dtype=torch.float32)
        self.skips = zeros(dtype=torch.bool)
        self.skips_f32 = zeros(dtype=torch.float32)
        self.has_previous = zeros(dtype=torch.bool)
        self._report = zeros(3)
        self._report[1] = 1.0
        self._gains = torch.ones(groups + 1, dtype=torch.float64, device=device)
        self._schedule = schedule
        self._memory: dict[str, torch.Tensor | None] = {
            **{name: estimator.state_dict()[name] for name in _STATE},
            "tau": self.tau,
            "skipped": self.skipped,
            "has_previous": None,
            "rows": self.rows,
            "group_of": torch.tensor(row_groups, dtype=torch.int32, device=device),
            "nonfinite": self.nonfinite,
            "base_rates": self.base_rates,
            "schedule": schedule,
            "step_rates": self.step_rates,
            "work": zeros(groups + 1, 2),
            "gains": self._gains,
            "rates": self.rates,
            "rates_f32": self.rates_f32,
            "shares": self.shares,
            "shares_f32": self.shares_f32,
            "skips": self.skips,
            "skips_f32": self.skips_f32,
            "report": self._report,
        }
        gpu = streams.device_of(self.tau)
        self._launch = _launch_on(gpu)
        self._copies = None if gpu is None else streams.CopyStream(gpu)
        self._reporter = Reporter(self._report, self._copies)

    def step(
        self,
        *,
        divisors: tuple[float, float],
        factors: tuple[float, float],
        loss_scale: float | torch.Tensor,
        found_inf: torch.Tensor | None,
        has_rows: bool,
        is_differenced: bool,
    ) -> None:
        """Takes ``rows`` and ``nonfinite`` into everything else. On the current stream.

        Args:
            divisors: Of the two columns of the rows.
            factors: Of the columns, then.
            loss_scale: A number or a float32 () tensor; its square divides both columns.
            found_inf: float32 (); the step is skipped where it is above 0.
            has_rows: There are statistics; else gains stay as they are.
            is_differenced: They are of consecutive gradients; ``GainEstimator.update``.
        """
        rule = self._estimator
        floor = rule.floor if rule.absolute_floor is None else rule.absolute_floor
        scale_here = loss_scale if isinstance(loss_scale, torch.Tensor) else None
        numbers: dict[str, float] = {
            "count": float(rule.count),
            "scale": rule.scale,
            "smoothing": rule.smoothing,
            "is_papers": rule.averaging == "paper",
            "clips_before": rule.clip == "before",
            "floor": floor,
            "is_floor_absolute": rule.absolute_floor is not None,
            "is_per_group": self._is_per_group,
            "is_differenced": is_differenced,
            "num_groups": rule.num_groups,
            "stride": self.rows.shape[1],
            "num_rows": self.rows.shape[0],
            "divisor_of_sum": divisors[0],
            "divisor_of_mean": divisors[1],
            "factor_of_sum": factors[0],
            "factor_of_mean": factors[1],
            "loss_scale": 1.0 if isinstance(loss_scale, torch.Tensor) else loss_scale,
            "num_counts": self.nonfinite.shape[0],
            "num_entries": 0 if self._schedule is None else self._schedule.shape[0],
        }
        memory = self._memory | {
            "rows": self.rows if has_rows else None,
            "has_previous": self.has_previous if is_differenced else None,
            "device_loss_scale": scale_here,
            "found_inf": found_inf,
        }
        self._launch(numbers, {k: 0 if t is None else t.data_ptr() for k, t in memory.items()})

    @property
    def gains(self) -> torch.Tensor:
        """float64 (K,): the gain of each group."""
        return self._gains[:-1]

    @property
    def gain(self) -> torch.Tensor:
        """float64 (): the total gain."""
        return self._gains[-1]

    def progress(self) -> Progress:
        """What has reached the host; see ``AdaScale.progress``."""
        return self._reporter.progress()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies: what is here is changed in place."""
        state = {"tau": self.tau, "skipped_steps": self.skipped, **self._estimator.state_dict()}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from ``state_dict()``, in the same memory. Blocks.

        Raises:
            ValueError: The state is of another number of groups.
        """
        self._estimator.load_state_dict(state, in_place=True)
        self.tau.copy_(state["tau"])
        self.skipped.copy_(state["skipped_steps"])
        self.has_previous.fill_(False)
        self._gains[:-1].copy_(self._estimator.gains)
        self._gains[-1:].copy_(self._estimator.gain)
        self._report.copy_(torch.stack([self.tau, self.gain, self.skipped.double()]))
        self._reporter = Reporter(self._report, self._copies)


def _launch_on(gpu: int | None) -> Callable[[Mapping[str, float], Mapping[str, int]], None]:
    """``gain_step`` of the module that knows the device; None is the CPU."""
    if gpu is None:
        return _core.gain_step
    module = cuda_library.load()

    def launch(numbers: Mapping[str, float], memory: Mapping[str, int]) -> None:
        with streams.on(gpu):  # a kernel runs on the current GPU, whatever the stream is
            module.gain_step(numbers, memory, streams.current(gpu))

    return launch


class Reporter:
    """Brings a few numbers to the host without making it wait.

    Args:
        report: float64 (3,): what ``Progress`` has. Read now, which blocks.
        stream: Where it is copied from a GPU; None where it is on the host.
    """

    def __init__(self, report: torch.Tensor, stream: streams.CopyStream | None) -> None:
        self._report = report
        self._stream = stream
        self._known = _progress_of(report)
        self._mark: streams.Mark | None = None
        if stream is not None:
            self._snapshot = torch.empty_like(report)
            self._landing = streams.empty_pinned(report.numel(), report.dtype)

    def progress(self) -> Progress:
        """The newest numbers that have arrived; asks for newer ones."""
        if self._stream is None:
            return _progress_of(self._report)
        if streams.is_capturing():
            return self._known
        if self._mark is not None and self._mark.is_passed():
            self._known, self._mark = _progress_of(self._landing), None
        if self._mark is None:
            self._snapshot.copy_(self._report)  # the next step may come before the copy
            self._stream.follow_current()
            self._stream.copy(self._landing, self._snapshot)
            self._mark = self._stream.mark()
        return self._known


def _progress_of(report: torch.Tensor) -> Progress:
    tau, gain, skipped = report.tolist()
    return Progress(tau, gain, int(skipped))
