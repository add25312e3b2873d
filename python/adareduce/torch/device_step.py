"""A step of an optimizer at rates that only the device knows, or no step at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from adareduce.torch.device_gain import DeviceGain
from adareduce.torch.loss_scaling import (
    clear_first_momentum,
    parameters_without_momentum,
    unscale,
)

RATES = ("auto", "host", "tensor", "share")
# Their step is the rate times something that does not depend on it, and so is their state.
# ASGD and Adafactor are not; a momentum that the rate was multiplied into would not be, either.
_LINEAR = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop")


def choose_rates(rates: str, optimizer: torch.optim.Optimizer, is_on_device: bool) -> str:
    """How an optimizer gets its scaled rates: "host", "tensor" or "share".

    "tensor": SGD, Adam and AdamW with fused=True, Adam and AdamW with capturable=True read a rate
    that lies on the device. "share": others whose step is linear in the rate step at the largest
    rate there may be, and a share of that step is taken. "auto" is the first of the two that is
    possible where parameters are on a GPU, and "host" elsewhere.

    Raises:
        ValueError: ``rates`` is none of these, or not possible for this optimizer.
    """
    if rates not in RATES:
        raise ValueError(f"AdaScale: rates must be one of {RATES}, got {rates!r}")
    if rates == "host" or (rates == "auto" and not is_on_device):
        return "host"
    reads_tensors = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW)
    reads_tensors = reads_tensors and all(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    if reads_tensors and rates != "share":
        return "tensor"
    if rates == "tensor":
        raise ValueError(
            "AdaScale: optimizer must be SGD, Adam or AdamW with fused=True, or Adam or AdamW with"
            f" capturable=True, where rates='tensor', got {type(optimizer).__name__} without"
        )
    known = tuple(getattr(torch.optim, name) for name in _LINEAR)
    if not isinstance(optimizer, known):
        raise ValueError(
            f"AdaScale: optimizer must be one of {', '.join(_LINEAR)}, whose steps are linear in"
            f" the rate, where the host does not read the gain, got {type(optimizer).__name__};"
            " rates='host' reads it and waits for the GPU in every step"
        )
    return "share"


class DeviceStep:
    """Lets an optimizer step at the rates of a ``DeviceGain``, or skip the step, on the device.

    A fused optimizer skips by itself. For others parameters and state are copied before the step
    and put back: that costs as much memory as both. State that torch keeps on the host (the number
    of steps of Adam without capturable) counts a skipped step.

    Args:
        optimizer: The one that is stepped; its groups' ``lr`` are restored.
        rates: "tensor" or "share".
        gain: Where rates, shares and the decision lie.
        scale: S, the largest gain.
        peaks: The largest rate of each group's schedule, or None: then ``lr`` counts.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rates: str,
        gain: DeviceGain,
        scale: float,
        peaks: Sequence[float] | None,
    ) -> None:
        self._optimizer = optimizer
        self._gain = gain
        self._peaks = peaks
        self._takes_share = rates == "share"
        self._skips_itself = not self._takes_share and all(
            group.get("fused") for group in optimizer.param_groups
        )
        groups = optimizer.param_groups
        wide = [_is_wide(group) for group in groups]
        # What torch's fused kernels read is float32, whatever the parameters are.
        self._rates = [
            (gain.rates if w and not group.get("fused") else gain.rates_f32)[number]
            for number, (w, group) in enumerate(zip(wide, groups, strict=True))
        ]
        self._shares = [
            (gain.shares if w else gain.shares_f32)[number] for number, w in enumerate(wide)
        ]
        self._copies = _Copies(optimizer, gain.skips)
        self.set_scale(scale)

    def set_scale(self, scale: float) -> None:
        """Changes S."""
        self._scale = scale
        self._known_rates: list[float | None] = [None] * len(self._optimizer.param_groups)
        for number, peak in enumerate(self._peaks or []):
            self._know(number, peak)

    def push_rates(self) -> None:
        """Tells the device the groups' ``lr``, where they have changed. Before the gain's step."""
        if self._peaks is not None:
            return
        for number, group in enumerate(self._optimizer.param_groups):
            rate = group["lr"]
            if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
                if self._takes_share:
                    raise ValueError(
                        "AdaScale.step: lr must be a number where the optimizer is not fused or"
                        f" capturable, got a tensor on {rate.device} in group {number}"
                    )
                self._gain.base_rates[number].copy_(rate.reshape(()))
                continue
            self._know(number, float(rate))

    @contextlib.contextmanager
    def scaled(self, grad_scale: torch.Tensor | None) -> Iterator[None]:
        """Within this, the optimizer's ``step`` is the scaled one, or none.

        Args:
            grad_scale: What gradients are still multiplied by, or None.
        """
        optimizer: Any = self._optimizer
        groups = optimizer.param_groups
        before = [group["lr"] for group in groups]
        fresh: list[torch.Tensor] = []
        if self._skips_itself:
            fresh = parameters_without_momentum(optimizer)
            optimizer.grad_scale, optimizer.found_inf = grad_scale, self._gain.skips_f32
        else:
            self._copies.keep()
            if grad_scale is not None:
                unscale(groups, grad_scale)
        try:
            for number, group in enumerate(groups):
                group["lr"] = self._whole(number) if self._takes_share else self._rates[number]
            yield
        except BaseException:
            if not self._skips_itself:
                self._copies.put_weights_back()
            raise
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate
            if self._skips_itself:
                del optimizer.grad_scale, optimizer.found_inf
        if self._skips_itself:
            clear_first_momentum(optimizer, fresh, self._gain.skips)
        else:
            self._copies.settle(self._shares if self._takes_share else None)

    def _know(self, number: int, rate: float) -> None:
        if rate == self._known_rates[number]:
            return
        self._known_rates[number] = rate
        self._gain.base_rates[number].fill_(rate)
        self._gain.step_rates[number].fill_(self._whole(number))

    def _whole(self, number: int) -> float:
        """The rate of which shares are taken: none is above 1, so that no rounding is enlarged."""
        return (self._known_rates[number] or 0.0) * self._scale


class _Copies:
    """Parameters and state of an optimizer as they were before its step."""

    def __init__(self, optimizer: torch.optim.Optimizer, skips: torch.Tensor) -> None:
        self._optimizer = optimizer
        self._skips = skips
        self._starts: list[list[torch.Tensor]] | None = None
        self._states: dict[tuple[int, Any], torch.Tensor] = {}

    def keep(self) -> None:
        groups = self._parameters()
        if self._starts is None:
            self._starts = [[torch.empty_like(p) for p in group] for group in groups]
        for starts, parameters in zip(self._starts, groups, strict=True):
            if parameters:
                torch._foreach_copy_(starts, parameters)
        pairs = list(self._state())
        if pairs:
            for key, tensor in pairs:
                if key not in self._states:
                    self._states[key] = torch.empty_like(tensor)
            torch._foreach_copy_([self._states[key] for key, _ in pairs], [t for _, t in pairs])

    def put_weights_back(self) -> None:
        for starts, parameters in zip(self._starts or [], self._parameters(), strict=True):
            if parameters:
                torch._foreach_copy_(parameters, starts)

    def settle(self, shares: Sequence[torch.Tensor] | None) -> None:
        """Takes shares of the steps, if there are any, or none of a step that is skipped."""
        for number, (starts, parameters) in enumerate(
            zip(self._starts or [], self._parameters(), strict=True)
        ):
            if shares is not None and parameters:
                torch._foreach_sub_(parameters, starts)
                torch._foreach_mul_(parameters, shares[number])
                torch._foreach_add_(parameters, starts)
            for start, parameter in zip(starts, parameters, strict=True):
                torch.where(self._skips, start, parameter, out=parameter)
        for key, tensor in self._state():
            if key in self._states:
                torch.where(self._skips, self._states[key], tensor, out=tensor)
            else:  # made by this step
                tensor.masked_fill_(self._skips, 0)

    def _parameters(self) -> list[list[torch.Tensor]]:
        return [[p.detach() for p in group["params"]] for group in self._optimizer.param_groups]

    def _state(self) -> Iterator[tuple[tuple[int, Any], torch.Tensor]]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor) and value.device == parameter.device:
                        yield (id(parameter), name), value


def _is_wide(group: dict[str, Any]) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in group["params"])
