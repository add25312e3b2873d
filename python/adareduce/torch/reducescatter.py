"""Reduce-scatter: tensors of all ranks become one, of which every rank gets its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import ProcessSet, global_process_set, rejected_on_all_ranks
from adareduce.torch.allgather import grouped_allgather
from adareduce.torch.allreduce import choose_op, compress_all
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.dispatch import submit_named
from adareduce.torch.handles import Handle, hand_over
from adareduce.torch.tensors import check_op, check_scales, check_tensors


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: ReduceOp = ReduceOp.Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Starts to reduce tensors over all ranks; each rank gets its part of their first dimension.

    Collective over the process set; does not block. ``synchronize(handle)`` returns new tensors.
    The rows are shared out in rank order and equally; the first ranks get one more where they
    cannot be.

    Args:
        tensors: With at least one dimension, of the same shapes on all ranks, all on the CPU or on
            one GPU.
        name: Equal on all ranks; in use until the handle is synchronised.
        op: Average, Sum, Min, Max or Product, as for ``grouped_allreduce_async_``.
        process_set: The ranks that take part.
        prescale_factor: Multiplies every element before the reduction.
        postscale_factor: Multiplies every element of the result.

    Raises:
        TypeError: ``op`` means nothing for a tensor's dtype.
        ValueError: ``op`` is Adasum, a tensor is a scalar or on another device than the others, or
            ``name`` is in use.
        HorovodInternalError: The process set is broken.
    """
    handle: Handle = _start("grouped_reducescatter", list(tensors), name, op, process_set,
                            prescale_factor, postscale_factor)  # fmt: skip
    return handle


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp = ReduceOp.Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """As ``grouped_reducescatter_async``, waits, and can be differentiated (Average and Sum).

    The gradient is the all-gather of the ranks' gradients, divided by their number for Average.
    """
    return _run("grouped_reducescatter", list(tensors), name, compression, op, process_set,
                prescale_factor, postscale_factor)  # fmt: skip


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp = ReduceOp.Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """As ``grouped_reducescatter_async`` for one tensor; the handle's result is its rows."""
    handle: Handle = _start("reducescatter", [tensor], name, op, process_set, prescale_factor,
                            postscale_factor)  # fmt: skip
    return handle


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp = ReduceOp.Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """As ``grouped_reducescatter`` for one tensor."""
    (rows,) = _run("reducescatter", [tensor], name, compression, op, process_set, prescale_factor,
                   postscale_factor)  # fmt: skip
    return rows


def rows_of(rows: int, rank: int, size: int) -> int:
    """How many of ``rows`` rows belong to a rank."""
    return rows // size + (1 if rank < rows % size else 0)


def _run(
    function: str,
    tensors: list[torch.Tensor],
    name: str | None,
    compression: type[Compressor],
    op: ReduceOp,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
) -> list[torch.Tensor]:
    compressed, contexts = compress_all(function, tensors, compression, process_set)
    results = _Reducescatter.apply(  # type: ignore[no-untyped-call]
        function, name, op, process_set, prescale_factor, postscale_factor, *compressed
    )
    return [
        compression.decompress(result, context)
        for result, context in zip(results, contexts, strict=True)
    ]


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: str,
        name: str | None,
        op: ReduceOp,
        process_set: ProcessSet,
        prescale_factor: float,
        postscale_factor: float,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        results = _start(function, list(tensors), name, op, process_set, prescale_factor,
                         postscale_factor, blocking=True)  # fmt: skip
        ctx.op, ctx.process_set, ctx.function = choose_op(function, None, op), process_set, function
        ctx.factor = prescale_factor * postscale_factor
        return tuple(results) if function == "grouped_reducescatter" else (results,)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        with rejected_on_all_ranks(ctx.process_set):
            if ctx.op not in (ReduceOp.Average, ReduceOp.Sum):
                raise ValueError(
                    f"{ctx.function}: op must be Average or Sum where backward is called, got"
                    f" {ctx.op.name}, which has no gradient"
                )
        factor = ctx.factor / (ctx.process_set.size() if ctx.op == ReduceOp.Average else 1)
        gathered = grouped_allgather(gradients, process_set=ctx.process_set)
        return (None,) * 6 + tuple(gradient * factor for gradient in gathered)


def _start(
    function: str,
    tensors: list[torch.Tensor],
    name: str | None,
    op: ReduceOp,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
    *,
    blocking: bool = False,
) -> Any:
    with rejected_on_all_ranks(process_set):
        chosen_op = choose_op(function, None, op)
        if chosen_op == ReduceOp.Adasum:
            raise ValueError(
                f"{function}: op must be Average, Sum, Min, Max or Product, got Adasum"
            )
        dtypes, _ = check_tensors(function, tensors, in_place=False)
        check_op(function, chosen_op, dtypes)
        check_scales(function, dtypes, prescale_factor, postscale_factor)
        for tensor in tensors:
            if tensor.dim() == 0:
                raise ValueError(
                    f"{function}: tensor must have at least one dimension, got a scalar"
                )
        inputs = [tensor.detach().contiguous() for tensor in tensors]
        rank, size = process_set.rank(), process_set.size()
        outputs = [
            torch.empty(
                (rows_of(tensor.shape[0], rank, size), *tensor.shape[1:]),
                dtype=tensor.dtype,
                device=tensor.device,
            )
            for tensor in inputs
        ]
        request = submit_named(
            function,
            Collective.reducescatter,
            inputs,
            outputs,
            name=name,
            process_set=process_set,
            op=chosen_op,
            prescale_factor=float(prescale_factor),
            postscale_factor=float(postscale_factor),
            blocking=blocking,
        )

    def finish(_: Any) -> torch.Tensor | list[torch.Tensor]:
        return outputs if function == "grouped_reducescatter" else outputs[0]

    return hand_over(request, finish, name, process_set, blocking=blocking)
