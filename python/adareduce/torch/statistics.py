"""Reductions that also say what they saw: variance and norm, orthogonality, non-finite elements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from adareduce import _core
from adareduce.ops import CudaPath, ReduceOp
from adareduce.runtime import ProcessSet, global_process_set, rejected_on_all_ranks
from adareduce.torch import streams
from adareduce.torch.allreduce import start_allreduce
from adareduce.torch.dispatch import choose_path
from adareduce.torch.handles import Handle
from adareduce.torch.launching import DeviceStats
from adareduce.torch.tensors import FLOAT_DTYPES, check_tensors, dtype_code


class ReductionStats(NamedTuple):
    """What a reduction of L tensors in K groups found out; the same bits on all ranks.

    On the device of the tensors: on a GPU nothing is read by the host, and ``synchronize`` orders
    streams for these as for the tensors.

    Attributes:
        groups: float64 (K, 4), for Average and Sum: sum over the ranks of |g_i|^2, |mean|^2, and
            the unbiased estimates sigma^2 and mu^2 (NaN on one rank). On CPUs they may be finite
            where a sum has overflowed; ``nonfinite`` tells. None for Adasum.
        orthogonality: float64 (L,), for Adasum: |Adasum|^2 / sum |g_i|^2, between 0 and 1. None
            for the others.
        nonfinite: int64 (L,): how many elements of each result are infinite or not a number.
        cancellation: float64 (L,), for Adasum between GPUs on the peer path: how much its terms
            cancel, the largest sum |c_i c_j G_ij| / c'Gc in the tree. None elsewhere.
    """

    groups: torch.Tensor | None
    orthogonality: torch.Tensor | None
    nonfinite: torch.Tensor
    cancellation: torch.Tensor | None = None


def grouped_allreduce_with_stats_async_(
    tensors: Sequence[torch.Tensor],
    groups: Sequence[int] | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    local_squares: torch.Tensor | None = None,
) -> Handle:
    """As ``grouped_allreduce_async_``; ``synchronize`` returns the tensors and ReductionStats.

    The statistics come out of the reduction itself, without another message or another pass over
    the data. They are those of the tensors after ``prescale_factor`` and before
    ``postscale_factor``; squares are added in float64 and the mean is taken before it is rounded.

    Args:
        tensors: float16, bfloat16, float32 or float64 tensors, as there.
        groups: For each tensor the number of its group, in [0, len(tensors)), equal on all ranks;
            one group by default.
        name: Equal on all ranks; in use until the handle is synchronised.
        op: Average (default), Sum or Adasum.
        prescale_factor: Multiplies every element before the reduction.
        postscale_factor: Multiplies every element of the result.
        process_set: The ranks that take part.
        local_squares: float64 (K,) on the tensors' device, on all ranks or none: this rank's share
            of the first column, where that is not its tensors' squares but a sum over several
            backward passes. The estimates are NaN then. Not for Adasum.

    Raises:
        TypeError: A tensor is not of a float type.
        ValueError: ``groups`` does not fit the tensors, or as for ``grouped_allreduce_async_``.
        HorovodInternalError: The process set is broken.

    Source: arXiv 2007.05105, section 3; arXiv 2006.02924; docs/algorithms.md.
    """
    tensors = list(tensors)
    handle: Handle = _start(tensors, tensors, groups, name, op, prescale_factor, postscale_factor,
                            process_set, local_squares)  # fmt: skip
    return handle


def grouped_allreduce_with_stats_async(
    tensors: Sequence[torch.Tensor],
    groups: Sequence[int] | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    local_squares: torch.Tensor | None = None,
) -> Handle:
    """As ``grouped_allreduce_with_stats_async_``, into new tensors."""
    handle: Handle = _start(list(tensors), None, groups, name, op, prescale_factor,
                            postscale_factor, process_set, local_squares)  # fmt: skip
    return handle


def grouped_allreduce_with_stats_(
    tensors: Sequence[torch.Tensor],
    groups: Sequence[int] | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    local_squares: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], ReductionStats]:
    """As ``grouped_allreduce_with_stats_async_``, but waits."""
    tensors = list(tensors)
    result: tuple[list[torch.Tensor], ReductionStats] = _start(
        tensors, tensors, groups, name, op, prescale_factor, postscale_factor, process_set,
        local_squares, blocking=True,
    )  # fmt: skip
    return result


def grouped_allreduce_with_stats(
    tensors: Sequence[torch.Tensor],
    groups: Sequence[int] | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    local_squares: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], ReductionStats]:
    """As ``grouped_allreduce_with_stats_``, into new tensors. Cannot be differentiated."""
    result: tuple[list[torch.Tensor], ReductionStats] = _start(
        list(tensors), None, groups, name, op, prescale_factor, postscale_factor, process_set,
        local_squares, blocking=True,
    )  # fmt: skip
    return result


def local_adasum(
    workers: Sequence[Sequence[torch.Tensor]],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Adasum of several workers' tensors that all lie on this rank: micro-batches, for example.

    Uses the tree and the kernels of ``allreduce(op=Adasum)``. Not collective, needs no ``init``;
    blocks.

    Args:
        workers: For each worker its tensors: CPU, float16, bfloat16, float32 or float64, of the
            same shapes and dtypes for all workers. They stay as they are.

    Returns:
        The combined tensors, contiguous, and float64 (L,) orthogonality as in ReductionStats.

    Raises:
        TypeError: A tensor is not of a float type.
        ValueError: No workers, or their tensors do not match.

    Source: arXiv 2006.02924; docs/algorithms.md.
    """
    rows = [[tensor.detach().contiguous() for tensor in worker] for worker in workers]
    if not rows:
        raise ValueError("local_adasum: workers must have at least one entry, got none")
    for number, row in enumerate(rows):
        dtypes, _ = check_tensors("local_adasum", row, in_place=False)
        _check_floats("local_adasum", dtypes)
        if row and streams.device_of(row[0]) is not None:
            raise ValueError(f"local_adasum: tensors must be on the cpu, got {row[0].device}")
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in row]
        expected = [(tuple(tensor.shape), tensor.dtype) for tensor in rows[0]]
        if shapes != expected:
            raise ValueError(
                f"local_adasum: worker {number} must have tensors of the shapes and dtypes of"
                f" worker 0, {expected}, got {shapes}"
            )
    results = [torch.empty_like(tensor) for tensor in rows[0]]
    orthogonality = _core.local_adasum(
        len(rows),
        [
            (
                result.numel(),
                dtype_code(result.dtype),
                [row[place].data_ptr() for row in rows],
                result.data_ptr(),
            )
            for place, result in enumerate(results)
        ],
    )
    return results, torch.tensor(orthogonality, dtype=torch.float64, device="cpu")


def _start(
    tensors: list[torch.Tensor],
    outputs: list[torch.Tensor] | None,
    groups: Sequence[int] | None,
    name: str | None,
    op: ReduceOp | None,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    local_squares: torch.Tensor | None,
    *,
    blocking: bool = False,
) -> Any:
    function = "grouped_allreduce_with_stats"
    with rejected_on_all_ranks(process_set):
        known = check_tensors(function, tensors, in_place=outputs is not None)
        dtypes, _ = known
        _check_floats(function, dtypes)
        count = len(tensors)
        numbers = [0] * count if groups is None else list(map(int, groups))
        if len(numbers) != count or (numbers and not 0 <= min(numbers) <= max(numbers) < count):
            raise ValueError(
                f"{function}: groups must be a number in [0, {count}) for each of the {count}"
                f" tensors, got {numbers}"
            )
        if op not in (None, ReduceOp.Average, ReduceOp.Sum, ReduceOp.Adasum):
            raise ValueError(f"{function}: op must be Average, Sum or Adasum, got {op!r}")
        _check_squares(function, tensors, local_squares, numbers, op)
        is_adasum = op == ReduceOp.Adasum
        chosen = choose_path(function, tensors, process_set)
        options: dict[str, Any] = {"groups": numbers}
        if chosen is None:
            options["local_squares"] = [] if local_squares is None else local_squares.tolist()
        else:
            num_groups = 0 if is_adasum else max(numbers) + 1
            on_gpu = _make_room(tensors, num_groups, has_cancellation=chosen.path == CudaPath.peer)
            options |= {"statistics": on_gpu, "local_squares": local_squares}

    def finish(
        request: Any, results: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], ReductionStats]:
        if chosen is not None:
            return results, ReductionStats(
                on_gpu.groups, on_gpu.orthogonality, on_gpu.nonfinite, on_gpu.cancellation
            )
        rows, orthogonality, nonfinite = request.statistics()
        return results, ReductionStats(
            None
            if is_adasum
            else torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, 4),
            torch.tensor(orthogonality, dtype=torch.float64, device="cpu") if is_adasum else None,
            torch.tensor(nonfinite, dtype=torch.int64, device="cpu"),
        )

    return start_allreduce(function, tensors, outputs, None, name, op, prescale_factor,
                           postscale_factor, process_set, in_place=outputs is not None,
                           blocking=blocking, finish=finish, known=known, **options)  # fmt: skip


def _make_room(
    tensors: list[torch.Tensor], num_groups: int, *, has_cancellation: bool
) -> DeviceStats:
    """Memory for statistics beside the tensors; no groups: for those of Adasum."""

    def room(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return tensors[0].new_empty(shape, dtype=dtype)

    count, is_adasum = len(tensors), num_groups == 0
    return DeviceStats(
        groups=None if is_adasum else room(num_groups, 4),
        orthogonality=room(count) if is_adasum else None,
        cancellation=room(count) if is_adasum and has_cancellation else None,
        nonfinite=room(count, dtype=torch.int64),
    )


def _check_floats(function: str, dtypes: Iterable[torch.dtype]) -> None:
    for dtype in dtypes:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{function}: dtype must be float16, bfloat16, float32 or float64, got"
                f" {str(dtype).removeprefix('torch.')}"
            )


def _check_squares(
    function: str,
    tensors: list[torch.Tensor],
    squares: torch.Tensor | None,
    groups: list[int],
    op: ReduceOp | None,
) -> None:
    if squares is None:
        return
    expected = (max(groups, default=-1) + 1,)
    if op == ReduceOp.Adasum or squares.dtype != torch.float64 or squares.shape != expected:
        raise ValueError(
            f"{function}: local_squares must be float64 of shape {expected}, one entry per group,"
            f" for Average or Sum, got {squares.dtype} of shape {tuple(squares.shape)} for {op!r}"
        )
    if tensors and streams.device_of(squares) != streams.device_of(tensors[0]):
        raise ValueError(
            f"{function}: local_squares must be on the tensors' device {tensors[0].device}, got"
            f" {squares.device}"
        )
