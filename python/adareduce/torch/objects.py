"""Broadcasts of whole models, broadcasts and all-gathers of Python objects."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from adareduce.runtime import ProcessSet, global_process_set, rank, rejected_on_all_ranks
from adareduce.torch import streams
from adareduce.torch.allgather import grouped_allgather_async
from adareduce.torch.broadcast import broadcast_, start_broadcast
from adareduce.torch.handles import synchronize
from adareduce.torch.tensors import check_tensors


def broadcast_parameters(
    params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Copies the root's parameters and buffers into every rank's. Collective; blocks.

    Args:
        params: ``model.state_dict()`` or ``model.named_parameters()``: the same names, shapes and
            dtypes in the same order on all ranks. Any strides, any dtype; one request for those on
            the CPU and one for those on a GPU.
        root_rank: Global rank whose values count.
        process_set: The ranks that take part.

    Raises:
        TypeError: ``params`` holds something that is no tensor.
        ValueError: As ``broadcast_async_``.
        HorovodInternalError: The ranks disagree, or one is lost.
    """
    with rejected_on_all_ranks(process_set):
        named = list(params.items()) if isinstance(params, Mapping) else list(params)
        for entry in named:
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise ValueError(
                    "broadcast_parameters: params must be a dict or pairs of name and tensor, got"
                    f" an entry {entry!r:.80}"
                )
        tensors = [tensor for _, tensor in named]
        check_tensors("broadcast_parameters", tensors, in_place=False, one_device=False)

    # Engine and tensors agree on contiguous memory; other layouts take a detour.
    dense = [tensor.detach().contiguous() for tensor in tensors]
    broadcast_by_device(dense, root_rank, process_set)
    for target, values in zip(tensors, dense, strict=True):
        if not target.is_contiguous():
            target.detach().copy_(values)


def broadcast_by_device(
    tensors: Sequence[torch.Tensor], root_rank: int, process_set: ProcessSet
) -> None:
    """Contiguous tensors in place: a request for those on the CPU, then one for each GPU.

    Collective; blocks. No tensors are a request, too.
    """
    by_device: dict[int | None, list[torch.Tensor]] = {None: []}
    for tensor in tensors:
        by_device.setdefault(streams.device_of(tensor), []).append(tensor)
    for device, group in by_device.items():
        if group or device is None:
            start_broadcast(group, root_rank, None, process_set, in_place=True, is_grouped=True,
                            blocking=True)  # fmt: skip


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Returns the root's object on every rank. Collective; blocks.

    Args:
        obj: Anything that pickle takes; ignored on the other ranks.
        root_rank: Global rank whose object counts.
        name: Equal on all ranks.
        process_set: The ranks that take part.

    Raises:
        ValueError: As ``broadcast_async_``.
        HorovodInternalError: The ranks disagree, one is lost, or the root could not pickle.
    """
    name = name or "broadcast_object"
    payload = torch.empty(0, dtype=torch.uint8, device="cpu")
    if rank() == root_rank:
        with rejected_on_all_ranks(process_set):
            payload = _pickle("broadcast_object", obj)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device="cpu")
    broadcast_(length, root_rank, f"{name}.length", process_set)
    if rank() != root_rank:
        payload = torch.empty(int(length), dtype=torch.uint8, device="cpu")
    broadcast_(payload, root_rank, f"{name}.content", process_set)
    return pickle.loads(payload.numpy().tobytes()) if rank() != root_rank else obj


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Returns every rank's object, in rank order, on every rank. Collective; blocks.

    Args:
        obj: Anything that pickle takes; each rank's own, of any size.
        name: Equal on all ranks.
        process_set: The ranks that take part.

    Raises:
        TypeError: This rank could not pickle; HorovodInternalError on the others.
        ValueError: The name is in use.
        HorovodInternalError: The ranks disagree, or one is lost.
    """
    with rejected_on_all_ranks(process_set):
        payload = _pickle("allgather_object", obj)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device="cpu")
    handle = grouped_allgather_async([length, payload], name or "allgather_object", process_set)
    lengths, contents = synchronize(handle)
    return [pickle.loads(content.numpy().tobytes()) for content in contents.split(lengths.tolist())]


def _pickle(function: str, obj: Any) -> torch.Tensor:
    try:
        content = pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise TypeError(
            f"{function}: obj must be something that pickle takes, got"
            f" {type(obj).__name__}: {error}"
        ) from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
