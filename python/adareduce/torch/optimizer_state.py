"""The state of an optimizer, from one rank to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from adareduce.runtime import ProcessSet, global_process_set, rank, rejected_on_all_ranks
from adareduce.torch.objects import broadcast_by_device, broadcast_object
from adareduce.torch.tensors import check_tensors


class _Place(NamedTuple):
    """Stands for a tensor while everything else travels as a Python object."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Gives every rank the root's optimizer state and options. Collective; blocks.

    State that only the root has (after loading a checkpoint there) is made on the others; what
    only they have is dropped. Numbers, tensors, the learning rate and what schedulers keep in the
    parameter groups travel alike, for every optimizer, also one that is distributed.

    Args:
        optimizer: With the same parameters on all ranks; it is not stepped.
        root_rank: Global rank whose state counts.
        process_set: The ranks that take part.

    Raises:
        TypeError: The root's options hold something that pickle does not take.
        ValueError: The root's parameter groups are of other sizes than this rank's, or as
            ``broadcast_async_``.
        HorovodInternalError: The ranks disagree, one is lost, or one raised the above.
    """
    is_root = rank() == root_rank
    tensors: list[torch.Tensor] = []
    mine = [len(group["params"]) for group in optimizer.param_groups]
    skeleton = _replace(optimizer.state_dict(), torch.Tensor, _put_into(tensors)) if is_root else {}
    skeleton, theirs = broadcast_object(
        (skeleton, mine), root_rank, "broadcast_optimizer_state", process_set
    )
    if not is_root:
        _replace(skeleton, _Place, lambda place: tensors.append(_make(place)))
    with rejected_on_all_ranks(process_set):
        if theirs != mine:
            raise ValueError(
                "broadcast_optimizer_state: optimizer must have parameter groups of the root's"
                f" sizes {theirs}, got {mine}"
            )
        check_tensors("broadcast_optimizer_state", tensors, in_place=False, one_device=False)
    broadcast_by_device(tensors, root_rank, process_set)
    if not is_root:
        state = _replace(skeleton, _Place, lambda place: tensors[place.number])
        optimizer.load_state_dict(state)


def _put_into(tensors: list[torch.Tensor]) -> Callable[[torch.Tensor], _Place]:
    def put(tensor: torch.Tensor) -> _Place:
        tensors.append(tensor.detach().contiguous())
        return _Place(len(tensors) - 1, tuple(tensor.shape), tensor.dtype, tensor.device.type)

    return put


def _make(place: _Place) -> torch.Tensor:
    return torch.empty(place.shape, dtype=place.dtype, device=place.device)


def _replace(value: Any, kind: type, replacement: Callable[[Any], Any]) -> Any:
    """A copy of nested dicts, lists and tuples in which all objects of one kind are replaced."""
    if isinstance(value, kind):
        return replacement(value)
    if isinstance(value, dict):
        return {key: _replace(entry, kind, replacement) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replace(entry, kind, replacement) for entry in value)
    return value
