"""All-to-all: every rank sends some of its rows to each rank."""

from __future__ import annotations

from typing import Any

import torch

from adareduce.ops import Collective
from adareduce.runtime import ProcessSet, global_process_set, rejected_on_all_ranks
from adareduce.torch.dispatch import choose_path, submit_named
from adareduce.torch.handles import Handle, hand_over
from adareduce.torch.host import gather_numbers, to_tensor
from adareduce.torch.tensors import check_tensors


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | list[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Starts to send rows of ``tensor`` to every rank, and to receive theirs, in rank order.

    Collective over the process set; does not block, except that with CUDA tensors the host waits
    for all ranks' splits. ``synchronize(handle)`` returns a new tensor, or with ``splits`` that
    tensor and the number of rows received from each rank (int32, on the CPU).

    Args:
        tensor: Of any dtype, on the CPU or a GPU, with at least one dimension. The first may
            differ between ranks, the others are the same on all.
        splits: How many rows go to each rank, one-dimensional, adding up to all rows. Without it
            every rank gets as many, and the first dimension must be a multiple of their number.
            On a GPU it is read, so that the host waits for it.
        name: Equal on all ranks; in use until the handle is synchronised.
        process_set: The ranks that take part.

    Raises:
        TypeError: Not a tensor, or of a dtype that is not known.
        ValueError: The tensor is a scalar or on no device that can be used, ``splits`` does not
            add up, or ``name`` is in use.
        HorovodInternalError: The process set is broken.
    """
    handle: Handle = _start(tensor, splits, name, process_set)
    return handle


def alltoall(
    tensor: torch.Tensor,
    splits: torch.Tensor | list[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As ``alltoall_async``, but waits, and can be differentiated.

    The gradient is the all-to-all that sends every row's gradient back.
    """
    result: torch.Tensor
    result, received = _Alltoall.apply(  # type: ignore[no-untyped-call]
        tensor, splits, name, process_set
    )
    return result if splits is None else (result, received)


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        splits: torch.Tensor | list[int] | None,
        name: str | None,
        process_set: ProcessSet,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result, received = _start(
            tensor, splits, name, process_set, always_received=True, blocking=True
        )
        ctx.process_set, ctx.received = process_set, received
        ctx.mark_non_differentiable(received)
        return result, received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
        sent_back, _received = alltoall(gradient, ctx.received, process_set=ctx.process_set)
        return sent_back, None, None, None


def _start(
    tensor: torch.Tensor,
    splits: torch.Tensor | list[int] | None,
    name: str | None,
    process_set: ProcessSet,
    *,
    always_received: bool = False,
    blocking: bool = False,
) -> Any:
    with rejected_on_all_ranks(process_set):
        check_tensors("alltoall", [tensor], in_place=False)
        if tensor.dim() == 0:
            raise ValueError("alltoall: tensor must have at least one dimension, got a scalar")
        rows_for = _check_splits(tensor, splits, process_set.size())
        inputs = [tensor.detach().contiguous()]
        output: torch.Tensor | None = None
        received: list[int] = []
        options: dict[str, Any] = {"splits": rows_for}
        if choose_path("alltoall", inputs, process_set) is not None:
            table = gather_numbers(rows_for, f"{name or 'alltoall'}, splits", process_set)
            received = [rows[process_set.rank()] for rows in table]
            output = inputs[0].new_empty((sum(received), *tensor.shape[1:]))
            options = {"rows": [count for rows in table for count in rows]}
        request = submit_named(
            "alltoall",
            Collective.alltoall,
            inputs,
            [output],
            name=name,
            process_set=process_set,
            blocking=blocking,
            **options,
        )

    def finish(request: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        result, rows_from = output, received
        if result is None:
            ((memory, shape, rows_from),) = request.gathered()
            result = to_tensor(memory, shape, inputs[0].dtype)
        if splits is None and not always_received:
            return result
        return result, torch.tensor(rows_from, dtype=torch.int32, device="cpu")

    return hand_over(request, finish, name, process_set, blocking=blocking)


def _check_splits(
    tensor: torch.Tensor, splits: torch.Tensor | list[int] | None, size: int
) -> list[int]:
    rows = tensor.shape[0]
    if splits is None:
        if rows % size != 0:
            raise ValueError(
                f"alltoall: the first dimension must be a multiple of the {size} ranks where"
                f" splits is not given, got {rows}"
            )
        return [rows // size] * size
    if isinstance(splits, torch.Tensor):
        if splits.dim() != 1 or splits.is_floating_point() or splits.dtype == torch.bool:
            raise ValueError(
                "alltoall: splits must be a one-dimensional tensor of integers, got"
                f" {str(splits.dtype).removeprefix('torch.')} of shape {tuple(splits.shape)}"
            )
        splits = splits.tolist()
    if len(splits) != size or any(count < 0 for count in splits) or sum(splits) != rows:
        raise ValueError(
            f"alltoall: splits must be {size} numbers that are not negative and add up to the"
            f" {rows} rows of the tensor, got {list(splits)}"
        )
    return [int(count) for count in splits]
