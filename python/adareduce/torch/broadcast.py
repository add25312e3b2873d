"""Broadcast: every rank gets the root's tensor."""

from __future__ import annotations

from typing import Any

import torch

from adareduce.ops import Collective
from adareduce.runtime import ProcessSet, global_process_set, rank, rejected_on_all_ranks
from adareduce.torch.allreduce import sum_gradients
from adareduce.torch.dispatch import submit_named
from adareduce.torch.handles import Handle, hand_over
from adareduce.torch.tensors import check_tensors, mark_written


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Starts to copy the root's tensor into every rank's, in place.

    Collective over the process set; does not block. The tensor must not be touched before
    ``synchronize(handle)``, which returns it.

    Args:
        tensor: Dense tensor of any dtype and shape, the same on all ranks, on the CPU or a GPU.
        root_rank: Global rank (also in a smaller process set) whose values count.
        name: Equal on all ranks; in use until the handle is synchronised.
        process_set: The ranks that take part.

    Raises:
        TypeError: Not a tensor, or of a dtype that is not known.
        ValueError: ``root_rank`` is not in the set, the tensor is not dense or on no device that
            can be used, or ``name`` is in use.
        HorovodInternalError: The process set is broken.
    """
    handle: Handle = start_broadcast(
        [tensor], root_rank, name, process_set, in_place=True, is_grouped=False
    )
    return handle


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """As ``broadcast_async_``, into a new tensor."""
    handle: Handle = start_broadcast(
        [tensor], root_rank, name, process_set, in_place=False, is_grouped=False
    )
    return handle


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """As ``broadcast_async_``, but waits. Returns the tensor."""
    result: torch.Tensor = start_broadcast(
        [tensor], root_rank, name, process_set, in_place=True, is_grouped=False, blocking=True
    )
    return result


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """As ``broadcast_async_``, into a new tensor, waits, and can be differentiated.

    The root's gradient is the sum of all ranks' gradients; the others' is zero.
    """
    result: torch.Tensor = _Broadcast.apply(tensor, root_rank, name, process_set)  # type: ignore[no-untyped-call]
    return result


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet
    ) -> torch.Tensor:
        ctx.root_rank = root_rank
        ctx.process_set = process_set
        result: torch.Tensor = start_broadcast(
            [tensor], root_rank, name, process_set, in_place=False, is_grouped=False, blocking=True
        )
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (total,) = sum_gradients(gradients, ctx.process_set)
        return (total if rank() == ctx.root_rank else torch.zeros_like(total)), None, None, None


def start_broadcast(
    tensors: list[torch.Tensor],
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    *,
    in_place: bool,
    is_grouped: bool,
    blocking: bool = False,
) -> Any:
    """One request for all tensors: its handle or, where it blocks, its result."""
    with rejected_on_all_ranks(process_set):
        check_tensors("broadcast", tensors, in_place=in_place)
        if root_rank not in process_set.ranks:
            rank()  # says that init() is missing, where it is
            raise ValueError(
                f"broadcast: root_rank must be one of the ranks {process_set.ranks} of the process"
                f" set, got {root_rank!r}"
            )
        inputs = tensors if in_place else [tensor.detach().contiguous() for tensor in tensors]
        outputs = inputs if in_place else [torch.empty_like(tensor) for tensor in inputs]
        request = submit_named(
            "broadcast",
            Collective.broadcast,
            inputs,
            outputs,
            name=name,
            process_set=process_set,
            blocking=blocking,
            root=process_set.ranks.index(root_rank),
        )

    def finish(_: Any) -> torch.Tensor | list[torch.Tensor]:
        if in_place:
            mark_written(outputs)
        return outputs if is_grouped else outputs[0]

    return hand_over(request, finish, name, process_set, blocking=blocking)
