"""All-reduce: tensors of all ranks become one, which every rank gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import (
    HorovodInternalError,
    ProcessSet,
    current_job,
    global_process_set,
    reject_call,
    rejected_on_all_ranks,
)
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.dispatch import submit_named
from adareduce.torch.handles import Handle, hand_over, in_submission, keep_alive
from adareduce.torch.tensors import (
    Known,
    check_op,
    check_scales,
    check_tensors,
    describe_plain,
    mark_written,
)

# Members of an enum take a while to look up.
_AVERAGE, _ALLREDUCE = ReduceOp.Average, Collective.allreduce


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
    handle: Handle = start_allreduce(
        "grouped_allreduce", tensors, tensors, average, name, op, prescale_factor,
        postscale_factor, process_set, in_place=True,
    )  # fmt: skip
    return handle


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
    handle: Handle = start_allreduce(
        "grouped_allreduce", list(tensors), None, average, name, op, prescale_factor,
        postscale_factor, process_set, in_place=False,
    )  # fmt: skip
    return handle


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
    tensors = list(tensors)
    result: list[torch.Tensor] = start_allreduce(
        "grouped_allreduce", tensors, tensors, average, name, op, prescale_factor,
        postscale_factor, process_set, in_place=True, blocking=True,
    )  # fmt: skip
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
    tensors = [tensor]
    handle: Handle = start_allreduce(
        "allreduce", tensors, tensors, average, name, op, prescale_factor, postscale_factor,
        process_set, in_place=True,
    )  # fmt: skip
    return handle


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
    handle: Handle = start_allreduce(
        "allreduce", [tensor], None, average, name, op, prescale_factor, postscale_factor,
        process_set, in_place=False,
    )  # fmt: skip
    return handle


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
    is_plain = average is None and name is None and prescale_factor == postscale_factor == 1.0
    if is_plain and _reduce_at_once(tensor, op, process_set):
        return tensor
    tensors = [tensor]
    result: torch.Tensor = start_allreduce(
        "allreduce", tensors, tensors, average, name, op, prescale_factor, postscale_factor,
        process_set, in_place=True, blocking=True,
    )  # fmt: skip
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
        results = start_allreduce(
            function, list(tensors), None, average, name, op, prescale_factor, postscale_factor,
            process_set, in_place=False, blocking=True,
        )  # fmt: skip
        ctx.arguments = (prescale_factor, postscale_factor, process_set, function)
        ctx.op = choose_op(function, average, op)
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


def _reduce_at_once(tensor: torch.Tensor, op: ReduceOp | None, process_set: ProcessSet) -> bool:
    """Reduces a contiguous tensor of floats in place, with next to no overhead; False: does not.

    What is refused here is looked at by ``start_allreduce``, which says what is wrong.
    """
    chosen_op = _AVERAGE if op is None else op
    number = process_set.process_set_id
    if number is None or type(chosen_op) is not ReduceOp:
        return False
    plain = describe_plain(tensor)
    if plain is None:
        return False
    shape, code, address = plain
    engine = current_job().engine
    kept = (tensor,)
    in_submission[id(kept)] = kept
    try:
        handle = engine.allreduce_at_once(number, chosen_op, shape, code, address, address)
        if handle is not None:
            keep_alive(handle, kept)
    except Exception:
        in_submission.pop(id(kept), None)
        raise
    del in_submission[id(kept)]  # not after Ctrl-C: see submit
    if handle is not None:
        hand_over(handle, lambda _: None, None, process_set, blocking=True)
    mark_written((tensor,))
    return True


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
    if average is None and op is None:
        return _AVERAGE
    if average is None and type(op) is ReduceOp:
        return op
    if average is not None and op is not None:
        raise ValueError(
            f"{function}: only one of average and op must be given, got average={average!r} and"
            f" op={op!r}"
        )
    if average is not None:
        return ReduceOp.Average if average else ReduceOp.Sum
    try:
        return ReduceOp(op)  # type: ignore[arg-type]
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
    blocking: bool = False,
    finish: Callable[[Any, list[torch.Tensor]], Any] | None = None,
    known: Known | None = None,
    **options: Any,
) -> Any:
    """What all forms have in common: the handle or, where it blocks, the result.

    ``finish`` makes the result of the outputs. ``known`` is what ``check_tensors`` has said of
    ``tensors`` and ``in_place``, where it has been asked. ``options`` are further ones of
    ``submit_named``, for statistics.
    """
    try:  # rejected_on_all_ranks, which would cost a tenth of all that happens here
        chosen_op = choose_op(function, average, op)
        if known is None:
            known = check_tensors(function, tensors, in_place=in_place)
        dtypes, _ = known
        check_op(function, chosen_op, dtypes)
        check_scales(function, dtypes, prescale_factor, postscale_factor)
        inputs = tensors if in_place else [tensor.detach().contiguous() for tensor in tensors]
        final_outputs = (
            [torch.empty_like(tensor) for tensor in inputs] if outputs is None else outputs
        )
        request = submit_named(
            function,
            _ALLREDUCE,
            inputs,
            final_outputs,
            name=name,
            process_set=process_set,
            op=chosen_op,
            prescale_factor=float(prescale_factor),
            postscale_factor=float(postscale_factor),
            blocking=blocking,
            known=known if in_place else None,
            **options,
        )
    except HorovodInternalError:
        raise
    except Exception as error:
        reject_call(process_set, error)
        raise

    def result_of(request: Any) -> Any:
        if in_place:
            mark_written(final_outputs)
        if finish is not None:
            return finish(request, final_outputs)
        return final_outputs if function == "grouped_allreduce" else final_outputs[0]

    return hand_over(request, result_of, name, process_set, blocking=blocking)
