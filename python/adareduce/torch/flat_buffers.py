"""Flat buffers that tensors lie in side by side, so that nobody has to pack them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adareduce.runtime import ProcessSet
from adareduce.torch import streams
from adareduce.torch.shared_tensors import empty_shared

# In elements; as kShardAlignment in csrc/collectives/shards.h.
ALIGNMENT = 16


def allocate(
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    process_set: ProcessSet,
) -> torch.Tensor:
    """A flat buffer of zeros, shared between the ranks of a node. Collective."""
    if device.type == "cpu" and streams.device_of(torch.empty(0, device=device)) is None:
        return empty_shared(numel, dtype=dtype, process_set=process_set)
    return torch.zeros(numel, dtype=dtype, device=device)


class Place:
    """Room for one tensor in a flat buffer.

    Args:
        flat: The buffer.
        begin: Its first element that belongs to the tensor.
        like: Of the tensor's shape and strides, which leave no gaps.

    Attributes:
        tensor: Lies there. No view in autograd's sense: writing to a neighbour is not writing to
            it, and its version says so.
    """

    def __init__(self, flat: torch.Tensor, begin: int, like: torch.Tensor) -> None:
        self._flat = flat
        self._begin = begin
        self._like = like
        self.tensor = self._make()
        self._address = self.tensor.data_ptr()

    def _make(self) -> torch.Tensor:
        begin = self._flat.storage_offset() + self._begin
        tensor = torch.empty(0, dtype=self._flat.dtype, device=self._flat.device)
        storage = self._flat.untyped_storage()
        return tensor.set_(storage, begin, self._like.shape, self._like.stride())

    def take(self, tensor: torch.Tensor) -> bool:
        """Makes ``self.tensor`` hold the values of a tensor; whether they had to be copied."""
        mine = self.tensor
        if tensor is mine and mine.data_ptr() == self._address:
            return False
        if mine.data_ptr() != self._address:  # somebody has assigned to its .data
            self.tensor = mine = self._make()
        if tensor.data_ptr() == self._address and tensor.stride() == mine.stride():
            return False
        if tensor.untyped_storage().data_ptr() == self._flat.untyped_storage().data_ptr():
            tensor = tensor.clone()  # overlaps, maybe
        mine.copy_(tensor)
        return True


def lay_out(tensors: Sequence[torch.Tensor], process_set: ProcessSet) -> list[Place]:
    """A place for each tensor, with its shape, dtype, device and dense strides.

    One flat buffer per dtype and device, in this order; each tensor begins at a multiple of
    ``ALIGNMENT`` elements. Nothing is copied. Collective as ``allocate``.
    """
    likes = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    numels: dict[tuple[torch.dtype, torch.device], int] = {}
    begins = []
    for like, kind in zip(likes, kinds, strict=True):
        begins.append(numels.get(kind, 0))
        numels[kind] = begins[-1] + -(-like.numel() // ALIGNMENT) * ALIGNMENT
    flats = {  # never of nothing, which has no address
        kind: allocate(max(numel, ALIGNMENT), *kind, process_set) for kind, numel in numels.items()
    }
    return [
        Place(flats[kind], begin, like)
        for kind, begin, like in zip(kinds, begins, likes, strict=True)
    ]
