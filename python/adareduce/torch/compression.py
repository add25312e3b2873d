"""What tensors are turned into while they travel."""

from __future__ import annotations

from typing import Any

import torch


class Compressor:
    """Base of the compressions; by itself it changes nothing."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns the tensor to send and what ``decompress`` needs to know."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Undoes ``compress`` after the reduction."""
        return tensor


class Compression:
    """The choices for ``compression=``."""

    none = Compressor
