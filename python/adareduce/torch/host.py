"""All-gathers of small things in host memory, which some calls with CUDA tensors need first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adareduce import _core
from adareduce.ops import Collective
from adareduce.runtime import ProcessSet
from adareduce.torch.handles import hand_over, submit


def to_tensor(memory: _core.Memory, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor over memory that the engine allocated."""
    # The tensor keeps the memory alive; frombuffer refuses memory of no bytes.
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def gather_numbers(
    numbers: Sequence[int], name: str | None, process_set: ProcessSet
) -> list[list[int]]:
    """Every rank's numbers, equally many, in rank order. Collective over the set; blocks."""
    mine = torch.tensor([list(numbers)], dtype=torch.int64, device="cpu")
    table: list[list[int]] = _gather(mine, name, process_set).tolist()
    return table


def gather_texts(text: str, name: str | None, process_set: ProcessSet) -> list[str]:
    """Every rank's text, in rank order. Collective over the set; blocks."""
    content = text.encode() + b"\0"
    mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    everyones = bytes(_gather(mine, name, process_set).tolist())
    return [part.decode() for part in everyones.split(b"\0")[:-1]]


def _gather(mine: torch.Tensor, name: str | None, process_set: ProcessSet) -> torch.Tensor:
    request = submit(
        Collective.allgather, [mine], [None], name=name, process_set=process_set, blocking=True
    )
    hand_over(request, lambda _: None, None, process_set, blocking=True)
    ((memory, shape, _),) = request.gathered()
    return to_tensor(memory, shape, mine.dtype)
