"""AdaScale's gain from the statistics of a reduction: arithmetic only, no communication."""

from __future__ import annotations

import math

import torch

AVERAGINGS = ("paper", "debiased")
CLIPS = ("before", "after")
_VARIANCE, _SQUARED_NORM, _MEAN_SQUARE = range(3)


class GainEstimator:
    """Gain r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2) per group and in total, from squares.

    sigma^2 is the trace of the covariance of a gradient at scale 1, mu^2 the squared norm of the
    true gradient. All is float64 on the device of the statistics; nothing is read by the host.

    Args:
        num_groups: Number K of parameter groups.
        count: Number n of micro-batches in a step: ranks times passes.
        scale: S, how many times the batch of a step is the batch that the unscaled rate and
            schedule were made for; ``count`` by default. With S = 1 the gain is 1.
        smoothing: Weight theta of the past in the averages; max(1 - S/1000, 0) by default.
        averaging: "paper": the plain mean of the first 1 / (1 - theta) steps, then an exponential
            average; the first gain is 1. "debiased": as Adam's averages, from the first step on.
        clip: "after": sigma^2 and mu^2 are averaged as they are and the averages are clipped,
            so that noise cancels. "before" is the paper's: each sample is clipped, which lifts
            the average of mu^2 and lowers the gain where mu^2 is small beside sigma^2 / S.
        floor: Smallest sigma^2, relative to the mean of |g_i|^2. Rounding of float32 gradients is
            about 1e-6 of it, the default. The gain does not change with the scale of the loss.
        absolute_floor: Instead, in units of the squared gradient; the paper's is 1e-6.
        device: Where the averages are kept.

    Raises:
        ValueError: An argument is out of range.

    Source: Johnson et al., arXiv 2007.05105, section 3; docs/algorithms.md, "AdaScale".
    """

    def __init__(
        self,
        num_groups: int,
        count: int,
        scale: float | None = None,
        *,
        smoothing: float | None = None,
        averaging: str = "paper",
        clip: str = "after",
        floor: float = 1e-6,
        absolute_floor: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        scale = float(count if scale is None else scale)
        self._has_own_smoothing = smoothing is not None
        smoothing = _smoothing_of(scale) if smoothing is None else float(smoothing)
        _require("num_groups", "at least 1", num_groups, num_groups >= 1)
        _require("count", "at least 1", count, count >= 1)
        _require("scale", "finite and at least 1", scale, 1.0 <= scale < math.inf)
        _require("smoothing", "in [0, 1)", smoothing, 0.0 <= smoothing < 1.0)
        _require("averaging", f"one of {AVERAGINGS}", averaging, averaging in AVERAGINGS)
        _require("clip", f"one of {CLIPS}", clip, clip in CLIPS)
        _require("floor", "in [0, 1)", floor, 0.0 <= floor < 1.0)
        if absolute_floor is not None:
            is_good = 0.0 <= absolute_floor < math.inf
            _require("absolute_floor", "finite and not negative", absolute_floor, is_good)
        self.num_groups = num_groups
        self.count = count
        self.scale = scale
        self.smoothing = smoothing
        self.averaging = averaging
        self.clip = clip
        self.floor = floor
        self.absolute_floor = absolute_floor
        self._device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forgets all samples; the gain is 1 again."""
        wide = {"dtype": torch.float64, "device": self._device}
        self._num_samples = torch.zeros((), **wide)  # type: ignore[call-overload]
        # Rows: the groups, then all together. Columns: sigma^2, mu^2, mean |g_i|^2.
        self._averages = torch.zeros(self.num_groups + 1, 3, **wide)  # type: ignore[call-overload]
        self._is_biased = torch.zeros((), dtype=torch.bool, device=self._device)

    def set_count(self, count: int) -> None:
        """Changes ``count``, and S in proportion, since the batch of scale 1 is the same.

        Raises:
            ValueError: ``count`` is not positive, or so small that S would be below 1.
        """
        _require("count", "at least 1", count, count >= 1)
        scale = self.scale * count / self.count
        _require("scale", "at least 1 for the new count", scale, scale >= 1.0)
        self.count, self.scale = count, scale
        if not self._has_own_smoothing:
            self.smoothing = _smoothing_of(scale)

    def update(self, squares: torch.Tensor, *, differenced: bool = False) -> None:
        """Takes one step's statistics into the averages; leaves them if one is not finite.

        Args:
            squares: float64 (K, 2): for each group the sum over ranks and passes of |g|^2, and
                |mean of the same g|^2. Where the loss was divided by the number of passes, or
                multiplied by a loss scale, that must have been undone.
            differenced: ``count`` is 1 and the two samples are this step's gradient and that of
                the step before, at other weights: biased. Averages of the other kind are forgotten.

        Raises:
            ValueError: ``squares`` has another shape, or there is one sample only.
        """
        samples = 2 if differenced else self.count
        if tuple(squares.shape) != (self.num_groups, 2):
            raise ValueError(
                f"GainEstimator.update: squares must have shape ({self.num_groups}, 2), got"
                f" {tuple(squares.shape)}"
            )
        if samples < 2:
            raise ValueError("GainEstimator.update: count must be at least 2, got 1")
        squares = squares.to(self._device, torch.float64)
        sample = self._moments(torch.cat([squares, squares.sum(0, keepdim=True)]), samples)
        if self.clip == "before":
            sample = self._clipped(sample)

        is_new_kind = self._is_biased != differenced
        seen = torch.where(is_new_kind, 0.0, self._num_samples) + 1.0
        averages = torch.lerp(self._averages, sample, self._weight(seen))  # of a first sample: 1
        is_finite = torch.isfinite(sample).all()
        self._averages = torch.where(is_finite, averages, self._averages)
        self._num_samples = torch.where(is_finite, seen, self._num_samples)
        self._is_biased = torch.where(is_finite, differenced, self._is_biased)

    @property
    def gains(self) -> torch.Tensor:
        """float64 (K,): the gain of each group, in [1, S]."""
        return self._all_gains()[:-1]

    @property
    def gain(self) -> torch.Tensor:
        """float64 (): the gain of all groups together, from the sums of their statistics."""
        return self._all_gains()[-1]

    @property
    def variances(self) -> torch.Tensor:
        """float64 (K,): averaged sigma^2 of each group, not below the floor."""
        return self._clipped(self._averages)[:-1, _VARIANCE]

    @property
    def variance(self) -> torch.Tensor:
        """float64 (): averaged sigma^2 of all groups together."""
        return self._clipped(self._averages)[-1, _VARIANCE]

    @property
    def squared_norms(self) -> torch.Tensor:
        """float64 (K,): averaged mu^2 of each group, not negative."""
        return self._clipped(self._averages)[:-1, _SQUARED_NORM]

    @property
    def squared_norm(self) -> torch.Tensor:
        """float64 (): averaged mu^2 of all groups together."""
        return self._clipped(self._averages)[-1, _SQUARED_NORM]

    @property
    def is_biased(self) -> torch.Tensor:
        """Whether the averages come from differences of consecutive gradients; bool ()."""
        return self._is_biased

    def noise_scale(self, micro_batch_size: int) -> torch.Tensor:
        """float64 (): B_simple = tr(covariance of one example's gradient) / |gradient|^2.

        Args:
            micro_batch_size: Examples per rank and pass, b; then the trace is b sigma^2 n / S.

        Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, section 2.
        """
        per_micro_batch = self.variance * (self.count / self.scale)
        return micro_batch_size * per_micro_batch / self.squared_norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages, as tensors only."""
        return {
            "num_samples": self._num_samples,
            "averages": self._averages,
            "is_biased": self._is_biased,
        }

    def load_state_dict(self, state: dict[str, torch.Tensor], *, in_place: bool = False) -> None:
        """Continues from ``state_dict()``, also with another scale or number of ranks.

        Args:
            state: It stays as it is.
            in_place: Into the memory that there is, which something else may know.

        Raises:
            ValueError: The state is of another number of groups.
        """
        averages = state["averages"]
        if averages.shape != self._averages.shape:
            raise ValueError(
                f"GainEstimator.load_state_dict: state must be of {self.num_groups} groups, got"
                f" {averages.shape[0] - 1}"
            )
        if in_place:
            for name, tensor in self.state_dict().items():
                tensor.copy_(state[name])
            return
        self._averages = averages.to(self._device, torch.float64, copy=True)
        self._num_samples = state["num_samples"].to(self._device, torch.float64, copy=True)
        self._is_biased = state["is_biased"].to(self._device, torch.bool, copy=True)

    def _moments(self, squares: torch.Tensor, samples: int) -> torch.Tensor:
        """Unbiased sigma^2 and mu^2, and mean |g|^2, of rows (sum |g|^2, |mean|^2)."""
        total, squared_mean = squares.unbind(1)
        # Of one micro-batch; S of n micro-batches' share is what scale 1 would have computed on.
        variance = (total - samples * squared_mean) / (samples - 1)
        return torch.stack(
            [
                variance * (self.scale / self.count),
                squared_mean - variance / samples,
                total / samples,
            ],
            dim=1,
        )

    def _clipped(self, moments: torch.Tensor) -> torch.Tensor:
        variance, squared_norm, mean_square = moments.unbind(1)
        if self.absolute_floor is None:
            lowest = self.floor * mean_square
        else:
            lowest = torch.full_like(variance, self.absolute_floor)
        return torch.stack(
            [torch.maximum(variance, lowest), squared_norm.clamp(min=0.0), mean_square], dim=1
        )

    def _weight(self, seen: torch.Tensor) -> torch.Tensor:
        """Of the newest of ``seen`` samples."""
        if self.averaging == "paper":
            return torch.clamp(1.0 / seen, min=1.0 - self.smoothing)
        return (1.0 - self.smoothing) / (1.0 - self.smoothing**seen)

    def _all_gains(self) -> torch.Tensor:
        variance, squared_norm, _ = self._clipped(self._averages).unbind(1)
        noise = variance / self.scale + squared_norm
        # Where nothing was seen, or all gradients are zero, no gain can be told.
        gains = torch.where(noise > 0.0, (variance + squared_norm) / noise, 1.0)
        needed = 2.0 if self.averaging == "paper" else 1.0
        return torch.where(self._num_samples < needed, 1.0, gains.clamp(1.0, self.scale))


def _smoothing_of(scale: float) -> float:
    return max(1.0 - scale / 1000.0, 0.0)


def _require(name: str, rule: str, value: object, is_good: bool) -> None:
    if not is_good:
        raise ValueError(f"GainEstimator: {name} must be {rule}, got {value!r}")
