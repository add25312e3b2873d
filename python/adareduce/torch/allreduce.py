"""All-reduce: tensors of all ranks become one, which every rank gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import ProcessSet, global_process_set, rejected_on_all_ranks
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.dispatch import submit_named
from adareduce.torch.handles import (
    Handle,
    check_op,
    check_scales,
    check_tensors,
    mark_written,
    synchronize,
)


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Starts to reduce tensors over all ranks, in place; all or none are written.

    Collective over the process set; does not block. The tensors must not be touched before
    ``synchronize(handle)``, which returns them. Of CUDA tensors it orders streams: docs/gpu.md.

    Args:
        tensors: Of any shapes and dtypes, the same on all ranks, all on the CPU or on one GPU.
            Their strides must be equal on all ranks and leave no gaps: contiguous, channels_last
            and so on.
        average: Deprecated: use ``op``.
        name: Equal on all ranks; in use until the handle is synchronised.
        op: Average (default), Sum, Min, Max, Product, or Adasum, which is computed for each tensor
            by itself. Average of integers divides in float64 and truncates; half types are added
            in float32. bool has Min, Max and Product.
        prescale_factor: Multiplies every element before the reduction.
        postscale_factor: Multiplies every element of the result.
        process_set: The ranks that take part.

    Raises:
        TypeError: ``op`` means nothing for a tensor's dtype (Adasum of integers, Sum of bool).
        ValueError: A tensor is not dense or on another device than the others, or ``name`` is in
            use. Raised here on the rank that made the mistake, and as HorovodInternalError on the
            others.
        HorovodInternalError: The process set is broken.

    Source: Adasum: arXiv 2006.02924; docs/algorithms.md.
    """
    tensors = list(tensors)
    return start_allreduce("grouped_allreduce", tensors, tensors, average, name, op,
                           prescale_factor, postscale_factor, process_set,
                           in_place=True)  # fmt: skip


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """As ``grouped_allreduce_async_``, into new tensors. Any strides will do."""
    tensors = list(tensors)
    return start_allreduce("grouped_allreduce", tensors, None, average, name, op, prescale_factor,
                  postscale_factor, process_set, in_place=False)  # fmt: skip


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """As ``grouped_allreduce_async_``, but waits. Returns the tensors."""
    handle = grouped_allreduce_async_(
        tensors, average, name, op, prescale_factor, postscale_factor, process_set
    )
    result: list[torch.Tensor] = synchronize(handle)
    return result


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """As ``grouped_allreduce_async_``, into new tensors, waits, and can be differentiated.

    The gradient of Average and Sum is the same reduction of the gradients; the others have none,
    and ``backward`` raises.
    """
    compressed, contexts = compress_all("grouped_allreduce", tensors, compression, process_set)
    results = _Allreduce.apply(  # type: ignore[no-untyped-call]
        average, name, op, prescale_factor, postscale_factor, process_set, "grouped_allreduce",
        *compressed,
    )  # fmt: skip
    return [
        compression.decompress(result, context)
        for result, context in zip(results, contexts, strict=True)
    ]


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """As ``grouped_allreduce_async_`` for one tensor; the handle's result is the tensor."""
    return start_allreduce("allreduce", [tensor], [tensor], average, name, op, prescale_factor,
                  postscale_factor, process_set, in_place=True)  # fmt: skip


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """As ``grouped_allreduce_async`` for one tensor; the handle's result is the new tensor."""
    return start_allreduce("allreduce", [tensor], None, average, name, op, prescale_factor,
                  postscale_factor, process_set, in_place=False)  # fmt: skip


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """As ``allreduce_async_``, but waits. Returns the tensor."""
    handle = allreduce_async_(
        tensor, average, name, op, prescale_factor, postscale_factor, process_set
    )
    result: torch.Tensor = synchronize(handle)
    return result


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """As ``grouped_allreduce`` for one tensor."""
    compressed, contexts = compress_all("allreduce", [tensor], compression, process_set)
    result: torch.Tensor
    (result,) = _Allreduce.apply(  # type: ignore[no-untyped-call]
        average, name, op, prescale_factor, postscale_factor, process_set, "allreduce", *compressed
    )
    return compression.decompress(result, contexts[0])


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        average: bool | None,
        name: str | None,
        op: ReduceOp | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: ProcessSet,
        function: str,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        handle = start_allreduce(
            function, list(tensors), None, average, name, op, prescale_factor, postscale_factor,
            process_set, in_place=False,
        )  # fmt: skip
        ctx.arguments = (prescale_factor, postscale_factor, process_set, function)
        ctx.op = choose_op(function, average, op)
        results = synchronize(handle)
        return tuple(results) if function == "grouped_allreduce" else (results,)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        prescale_factor, postscale_factor, process_set, function = ctx.arguments
        with rejected_on_all_ranks(process_set):
            if ctx.op not in (ReduceOp.Average, ReduceOp.Sum):
                raise ValueError(
                    f"{function}: op must be Average or Sum where backward is called, got"
                    f" {ctx.op.name}, which has no gradient"
                )
        reduced = _Allreduce.apply(  # type: ignore[no-untyped-call]
            None, None, ctx.op, prescale_factor, postscale_factor, process_set, "grouped_allreduce",
            *gradients,
        )  # fmt: skip
        return (None,) * 7 + tuple(reduced)


def sum_gradients(gradients: Sequence[torch.Tensor], process_set: ProcessSet) -> list[torch.Tensor]:
    """Sum over the ranks of what arrives in a backward pass."""
    return grouped_allreduce(gradients, op=ReduceOp.Sum, process_set=process_set)


def compress_all(
    function: str,
    tensors: Sequence[torch.Tensor],
    compression: type[Compressor],
    process_set: ProcessSet,
) -> tuple[list[torch.Tensor], list[Any]]:
    """Compressed tensors, and what undoes it."""
    with rejected_on_all_ranks(process_set):
        if not hasattr(compression, "compress"):
            raise TypeError(
                f"{function}: compression must be one of hvd.Compression, got {compression!r}"
            )
        pairs = [compression.compress(tensor) for tensor in tensors]
    return [tensor for tensor, _ in pairs], [context for _, context in pairs]


def choose_op(function: str, average: bool | None, op: ReduceOp | None) -> ReduceOp:
    """The reduction that two arguments ask for; raises ValueError where they contradict."""
    if average is not None and op is not None:
        raise ValueError(
            f"{function}: only one of average and op must be given, got average={average!r} and"
            f" op={op!r}"
        )
    if average is not None:
        return ReduceOp.Average if average else ReduceOp.Sum
    if op is None:
        return ReduceOp.Average
    try:
        return ReduceOp(op)
    except ValueError:
        names = ", ".join(choice.name for choice in ReduceOp)
        raise ValueError(f"{function}: op must be one of {names}, got {op!r}") from None


def start_allreduce(
    function: str,
    tensors: list[torch.Tensor],
    outputs: list[torch.Tensor] | None,
    average: bool | None,
    name: str | None,
    op: ReduceOp | None,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    *,
    in_place: bool,
    finish: Callable[[Any, list[torch.Tensor]], Any] | None = None,
    **options: Any,
) -> Handle:
    """What all forms have in common. ``finish`` makes the handle's result of the outputs.

    ``options`` are further ones of ``submit_named``, for statistics.
    """
    with rejected_on_all_ranks(process_set):
        chosen_op = choose_op(function, average, op)
        check_tensors(function, tensors, in_place=in_place)
        check_op(function, chosen_op, tensors)
        check_scales(function, tensors, prescale_factor, postscale_factor)
        inputs = [
            tensor.detach() if in_place else tensor.detach().contiguous() for tensor in tensors
        ]
        final_outputs = outputs or [torch.empty_like(tensor) for tensor in inputs]
        request = submit_named(
            function,
            Collective.allreduce,
            inputs,
            final_outputs,
            name=name,
            process_set=process_set,
            op=chosen_op,
            prescale_factor=float(prescale_factor),
            postscale_factor=float(postscale_factor),
            **options,
        )

    def result_of(request: Any) -> Any:
        if in_place:
            mark_written(final_outputs)
        if finish is not None:
            return finish(request, final_outputs)
        return final_outputs if function == "grouped_allreduce" else final_outputs[0]

    return Handle(request, result_of, name, process_set.names_in_use)
