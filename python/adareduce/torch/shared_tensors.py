"""Tensors in memory that the ranks of a node share, which are reduced without being copied."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from adareduce.runtime import (
    ProcessSet,
    current_job,
    global_process_set,
    rejected_on_all_ranks,
)
from adareduce.torch.tensors import DTYPES

_MOST_BYTES = 2**63 - 1  # that the engine can count


_ROUTES = ("board", "slots", "in place", "messages")


def empty_shared(
    *size: int | Sequence[int],
    dtype: torch.dtype | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """A CPU tensor that every rank of the process set can address. Collective; blocks.

    An all-reduce in place whose tensors all lie in such memory, at the same places on every rank,
    with ``prescale_factor`` 1, packs and unpacks nothing. The tensor may outlive ``shutdown()``.
    Where the ranks share no memory (several nodes, ADAREDUCE_SHARED_MEMORY=off) it is an ordinary
    tensor.

    Args:
        size: Shape, as of ``torch.empty``; the same bytes on all ranks.
        dtype: torch's default dtype if not given.
        process_set: The ranks that share it.

    Returns:
        A contiguous tensor of zeros.

    Raises:
        TypeError: A dtype that no collective takes.
        ValueError: A negative extent, or more bytes than can be counted.
        HorovodInternalError: The ranks disagree, one is lost, or there is not enough memory.
    """
    with rejected_on_all_ranks(process_set, is_barrier=True):
        extents = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        shape = tuple(operator.index(extent) for extent in extents)  # type: ignore[arg-type]
        if any(extent < 0 for extent in shape):
            raise ValueError(f"empty_shared: size must not be negative, got {shape}")
        chosen = torch.get_default_dtype() if dtype is None else dtype
        if chosen not in DTYPES:
            known = ", ".join(str(known) for known in DTYPES)
            raise TypeError(f"empty_shared: dtype must be one of {known}, got {chosen}")
        numel = math.prod(shape)
        if numel * chosen.itemsize > _MOST_BYTES:
            raise ValueError(f"empty_shared: size must be below {_MOST_BYTES} bytes, got {shape}")
    if process_set.process_set_id is None:
        current_job()  # says that init() is missing, where it is
        raise ValueError(f"process_set must be added with add_process_set, got {process_set}")
    # Whole lines, never nothing: an address for everybody.
    memory = current_job().engine.empty_shared(
        process_set=process_set.process_set_id, bytes=max(numel * chosen.itemsize, 64)
    )
    if memory is None:
        return torch.zeros(shape, dtype=chosen)
    return (
        torch.frombuffer(memory, dtype=torch.uint8)[: numel * chosen.itemsize]
        .view(chosen)
        .view(shape)
    )


class SharedMemoryChoices(NamedTuple):
    """How the ranks of a process set share memory.

    Attributes:
        used: Whether CPU tensors go through it.
        why_not: The reason where they do not; else empty.
        choices: On the set's first rank, which makes them: (kind and size of calls, what was found
            best for them by measuring, number of calls).
        requests: Of this rank: how many went with the board, through slots, in place, as messages.
        workers: Of this rank: threads that share the work of a large call; ADAREDUCE_WORKERS.
    """

    used: bool
    why_not: str
    choices: list[tuple[str, str, int]]
    requests: dict[str, int]
    workers: int = 1


def shared_memory_choices(process_set: ProcessSet = global_process_set) -> SharedMemoryChoices:
    """How CPU tensors of a process set travel inside the node, and why. Not collective.

    Raises:
        ValueError: The set was not added, or init() is missing.
    """
    number = process_set.process_set_id
    if number is None:
        current_job()
        raise ValueError(f"process_set must be added with add_process_set, got {process_set}")
    facts = current_job().engine.shared_memory(number)
    requests = dict(zip(_ROUTES, facts.requests, strict=True))
    return SharedMemoryChoices(facts.is_used, facts.why_not, facts.choices, requests, facts.workers)
