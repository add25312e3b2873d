"""The noise of one worker's gradient, from those of two steps: AdaScale without replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class ConsecutiveGradients:
    """Keeps the gradients of the last step that counted and compares them with the next ones.

    The two are at different weights, so that what is estimated from them is biased. Not
    collective. Costs the memory of two copies of all gradients.
    """

    def __init__(self) -> None:
        self._newest: list[list[torch.Tensor]] | None = None
        self._previous: list[list[torch.Tensor]] | None = None

    def keep(self, groups: Sequence[Sequence[torch.Tensor]], loss_scale: float) -> None:
        """Copies the gradients of parameter groups, divided by the scale of the loss."""
        self._newest = [
            [
                torch.zeros_like(parameter)
                if parameter.grad is None
                else parameter.grad / loss_scale
                for parameter in parameters
            ]
            for parameters in groups
        ]

    def squares(self, device: torch.device) -> torch.Tensor | None:
        """float64 (K, 2): |a|^2 + |b|^2 and |(a + b) / 2|^2 of the last step's and these gradients.

        None in the first step. Those that were kept are the last step's from now on.
        """
        previous, self._previous = self._previous, self._newest
        if previous is None or self._newest is None:
            return None
        rows = []
        for old, new in zip(previous, self._newest, strict=True):
            row = torch.zeros(2, dtype=torch.float64, device=device)
            for a, b in zip(old, new, strict=True):
                a, b = a.double(), b.double()
                row[0] += a.square().sum() + b.square().sum()
                row[1] += ((a + b) / 2).square().sum()
            rows.append(row)
        return torch.stack(rows)


class DeviceDifferences:
    """As ``ConsecutiveGradients`` where the device decides whether a step counts.

    The first step is compared with zeros; ``DeviceGain`` knows that it does not count.

    Args:
        groups: Parameters, by group.
        device: Where they are.
    """

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]], device: torch.device) -> None:
        self._groups = groups
        self._device = device
        self._newest = [[torch.zeros_like(p) for p in group] for group in groups]
        self._previous = [[torch.zeros_like(p) for p in group] for group in groups]

    def keep(self, loss_scale: float | torch.Tensor, rows: torch.Tensor) -> None:
        """Copies the gradients, divided by the scale of the loss, and writes their squares.

        Args:
            loss_scale: A number, or a tensor ().
            rows: float64 (K, 2) on the device: becomes |a|^2 + |b|^2 and |(a + b) / 2|^2.
        """
        rows.zero_()
        for row, group, newest, previous in zip(
            rows, self._groups, self._newest, self._previous, strict=True
        ):
            for parameter, new, old in zip(group, newest, previous, strict=True):
                if parameter.grad is None:
                    new.zero_()
                else:
                    new.copy_(parameter.grad / loss_scale)
                a, b = old.double(), new.double()
                row[0] += a.square().sum() + b.square().sum()
                row[1] += ((a + b) / 2).square().sum()

    def settle(self, skips: torch.Tensor) -> None:
        """The gradients that were kept are the last step's now, unless it was none; bool ()."""
        for newest, previous in zip(self._newest, self._previous, strict=True):
            for new, old in zip(newest, previous, strict=True):
                torch.where(skips, old, new, out=old)
