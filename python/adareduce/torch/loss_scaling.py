"""What torch's GradScaler asks of an optimizer, and what its fused ones leave undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class LossScale:
    """What the loss was multiplied by when gradients are reduced.

    Args:
        source: A number, a function without arguments, or a GradScaler.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def on_host(self) -> float:
        """Its value. Waits for a GPU on which a GradScaler keeps it."""
        source = self._source
        if hasattr(source, "get_scale"):
            return float(source.get_scale())
        return float(source() if callable(source) else source)

    def on(self, device: torch.device) -> float | torch.Tensor:
        """The same for work on ``device``: GradScaler's own float32 () tensor is not read."""
        scale = getattr(self._source, "_scale", None)  # None before its first use: then it is known
        if isinstance(scale, torch.Tensor):
            return scale.to(device, torch.float32, non_blocking=True)
        return self.on_host()


def unscale(groups: Sequence[dict[str, Any]], grad_scale: torch.Tensor) -> None:
    """Divides the gradients of parameter groups by GradScaler's scale, as it does itself."""
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    dense = [g if g.layout == torch.strided else g._values() for g in gradients]
    if dense:
        torch._foreach_mul_(dense, grad_scale.double().reciprocal().float())


def parameters_without_momentum(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters for which a fused SGD makes a momentum buffer in its next step."""
    if not isinstance(optimizer, torch.optim.SGD):
        return []
    return [
        parameter
        for group in optimizer.param_groups
        if group["momentum"] != 0 and group.get("fused")
        for parameter in group["params"]
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is None
    ]


def clear_first_momentum(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], skips: torch.Tensor
) -> None:
    """Sets the buffers of ``parameters`` to zero where ``skips``, bool (); the host reads nothing.

    Torch's fused SGD makes them in its first step and leaves them uninitialised where ``found_inf``
    makes it skip that step; it goes on with them in the next.
    """
    for parameter in parameters:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffer.masked_fill_(skips, 0)
