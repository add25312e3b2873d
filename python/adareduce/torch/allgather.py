"""All-gather: every rank gets the tensors of all ranks, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adareduce.ops import Collective
from adareduce.runtime import ProcessSet, global_process_set, rejected_on_all_ranks
from adareduce.torch.allreduce import sum_gradients
from adareduce.torch.dispatch import choose_path, submit_named
from adareduce.torch.handles import Handle, hand_over
from adareduce.torch.host import gather_numbers, to_tensor
from adareduce.torch.tensors import check_tensors


def allgather_async(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Starts to concatenate the ranks' tensors along their first dimension, in rank order.

    Collective over the process set; does not block, except that with CUDA tensors the host waits
    for all ranks' numbers of rows. ``synchronize(handle)`` returns a new tensor.

    Args:
        tensor: Of any dtype, on the CPU or a GPU, with at least one dimension. The first may
            differ between ranks and may be 0; the others are the same on all ranks.
        name: Equal on all ranks; in use until the handle is synchronised.
        process_set: The ranks that take part.

    Raises:
        TypeError: Not a tensor, or of a dtype that is not known.
        ValueError: The tensor is a scalar or on no device that can be used, or ``name`` is in use.
        HorovodInternalError: The process set is broken.
    """
    handle: Handle = _start("allgather", [tensor], name, process_set)
    return handle


def allgather(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """As ``allgather_async``, but waits, and can be differentiated.

    The gradient is the sum of all ranks' gradients for this rank's rows.
    """
    result: torch.Tensor
    (result,) = _Allgather.apply(  # type: ignore[no-untyped-call]
        name, process_set, "allgather", tensor
    )
    return result


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """As ``allgather_async`` for several tensors in one request."""
    handle: Handle = _start("grouped_allgather", list(tensors), name, process_set)
    return handle


def grouped_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """As ``grouped_allgather_async``, but waits, and can be differentiated like ``allgather``."""
    return list(
        _Allgather.apply(  # type: ignore[no-untyped-call]
            name, process_set, "grouped_allgather", *tensors
        )
    )


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: ProcessSet, function: str, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        results = _start(function, list(tensors), name, process_set, blocking=True)
        ctx.process_set = process_set
        ctx.num_rows = [tensor.shape[0] for tensor in tensors]
        return tuple(results) if function == "grouped_allgather" else (results,)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        totals = sum_gradients(gradients, ctx.process_set)
        with rejected_on_all_ranks(ctx.process_set):
            of_ranks = gather_numbers(ctx.num_rows, None, ctx.process_set)
        before = of_ranks[: ctx.process_set.rank()]
        firsts = [sum(rows[place] for rows in before) for place in range(len(ctx.num_rows))]
        parts = [
            total.narrow(0, first, rows)
            for total, first, rows in zip(totals, firsts, ctx.num_rows, strict=True)
        ]
        return (None, None, None, *parts)


def _start(
    function: str,
    tensors: list[torch.Tensor],
    name: str | None,
    process_set: ProcessSet,
    *,
    blocking: bool = False,
) -> Any:
    with rejected_on_all_ranks(process_set):
        check_tensors(function, tensors, in_place=False)
        for tensor in tensors:
            if tensor.dim() == 0:
                raise ValueError(
                    f"{function}: tensor must have at least one dimension, got a scalar"
                )
        inputs = [tensor.detach().contiguous() for tensor in tensors]
        outputs: list[torch.Tensor] | None = None
        options: dict[str, Any] = {}
        if choose_path(function, inputs, process_set) is not None:
            mine = [tensor.shape[0] for tensor in inputs]
            of_ranks = gather_numbers(mine, f"{name or function}, rows", process_set)
            rows = [list(of_tensor) for of_tensor in zip(*of_ranks, strict=True)]
            outputs = [
                tensor.new_empty((sum(of_tensor), *tensor.shape[1:]))
                for tensor, of_tensor in zip(inputs, rows, strict=True)
            ]
            options["rows"] = [count for of_tensor in rows for count in of_tensor]
        request = submit_named(
            function,
            Collective.allgather,
            inputs,
            outputs or [None] * len(inputs),
            name=name,
            process_set=process_set,
            blocking=blocking,
            **options,
        )

    def finish(request: Any) -> torch.Tensor | list[torch.Tensor]:
        results = outputs or [
            to_tensor(memory, shape, tensor.dtype)
            for (memory, shape, _), tensor in zip(request.gathered(), inputs, strict=True)
        ]
        return results if function == "grouped_allgather" else results[0]

    return hand_over(request, finish, name, process_set, blocking=blocking)
