"""Asynchronous calls: submission, polling and waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from adareduce import _core
from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import HorovodInternalError, ProcessSet, current_job
from adareduce.torch import streams

_WAIT_SECONDS = 0.2  # between two looks for Ctrl-C; the wait itself costs nothing

_DTYPE_CODES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.bfloat16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bool: 9,
}
# Tensors that the engine may read or write.
_in_flight: list[tuple[_core.Handle, tuple[torch.Tensor | None, ...]]] = []
_in_flight_lock = threading.Lock()

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Request(Protocol):
    """What was submitted: the engine's handle of a CPU call, or a launching.Launch."""

    def is_finished(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    def wait_for(self, seconds: float) -> bool:
        """Waits until it has, or orders the caller's stream after it; False: not yet."""
        ...

    def rethrow(self) -> None:
        """Raises its error, if it has one."""
        ...


class Handle:
    """A call that has been submitted. Its tensors stay alive until it ends, also if this goes."""

    def __init__(
        self,
        request: Request,
        finish: Callable[[Any], Any],
        name: str | None,
        names_in_use: set[str],
    ) -> None:
        self._request: Request | None = request
        self._launch: Request | None = None  # of a GPU; orders every stream that synchronises
        self._finish = finish
        self._name = name
        self._names_in_use = names_in_use
        self._lock = threading.Lock()  # any number of threads may wait
        self._result: Any = None
        self._error: BaseException | None = None

    def poll(self) -> bool:
        """See ``poll``."""
        request = self._request
        return request is None or request.is_finished()

    def synchronize(self) -> Any:
        """See ``synchronize``."""
        request = self._request or self._launch
        failure: HorovodInternalError | None = None
        try:
            while request is not None and not request.wait_for(_WAIT_SECONDS):
                pass
        except HorovodInternalError as error:
            failure = error
        with self._lock:
            if self._request is not None:
                try:
                    if failure is not None:
                        raise failure
                    self._request.rethrow()
                    self._result = self._finish(self._request)
                except Exception as error:
                    self._error = error
                if not isinstance(self._request, _core.Handle):
                    self._launch = self._request
                self._request = None
                self._release_name()
                _forget_finished()
        if self._error is not None or failure is not None:
            raise self._error or failure  # type: ignore[misc]
        return self._result

    def _release_name(self) -> None:
        if self._name is not None:
            self._names_in_use.discard(self._name)
            self._name = None

    def __del__(self) -> None:
        self._release_name()


def poll(handle: Handle) -> bool:
    """Whether a call has ended, well or not. Does not block, is not collective.

    Of CUDA tensors: whether the GPU is done. What a graph captures is: it runs with the graph.
    """
    return handle.poll()


def synchronize(handle: Handle) -> Any:
    """Waits for a call and returns its result. Blocks; Ctrl-C works.

    Of CUDA tensors it does not block: what comes on the caller's current stream from now on comes
    after the call. See docs/gpu.md.

    Raises:
        ValueError: A graph's capture has begun or ended since the call was made.
        HorovodInternalError: The call failed: the ranks disagree, or one is lost.
    """
    return handle.synchronize()


def submit(
    collective: Collective,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor | None],
    *,
    name: str | None,
    process_set: ProcessSet,
    op: ReduceOp = ReduceOp.Sum,
    root: int = 0,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    splits: Sequence[int] = (),
    groups: Sequence[int] | None = None,
    local_squares: Sequence[float] = (),
) -> _core.Handle:
    """Hands dense CPU tensors to the engine's worker and keeps them alive until it has finished.

    ``groups``, one number per tensor, asks for statistics.
    """
    if process_set.process_set_id is None:
        current_job()  # says that init() is missing, where it is
        raise ValueError(f"process_set must be added with add_process_set, got {process_set}")
    request = current_job().engine.submit(
        process_set=process_set.process_set_id,
        collective=collective,
        name=name or "",
        op=op,
        root=root,
        prescale=prescale_factor,
        postscale=postscale_factor,
        tensors=describe_tensors(inputs, outputs, groups),
        splits=splits,
        has_statistics=groups is not None,
        local_squares=local_squares,
    )
    with _in_flight_lock:
        _in_flight.append((request, (*inputs, *outputs)))
    _forget_finished()
    return request


def describe_tensors(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor | None],
    groups: Sequence[int] | None,
) -> list[tuple[Sequence[int], int, int, int, Sequence[int], int]]:
    """Tensors as the engine takes them: shape, dtype, addresses, strides, group of statistics."""
    return [
        (
            tuple(i.shape),
            dtype_code(i.dtype),
            i.data_ptr(),
            0 if o is None else o.data_ptr(),
            () if i.is_contiguous() else dense_strides(i) or (),
            group,
        )
        for i, o, group in zip(inputs, outputs, groups or [0] * len(inputs), strict=True)
    ]


def dtype_code(dtype: torch.dtype) -> int:
    """The number that stands for a dtype in the compiled module."""
    return _DTYPE_CODES[dtype]


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of a tensor that fills its memory without gaps or overlap; None for others.

    0 where the extent is 1, since such a stride means nothing.
    """
    strides = tuple(
        0 if extent == 1 else stride
        for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    expected = 1
    for stride, extent in sorted(zip(strides, tensor.shape, strict=True)):
        if extent == 1:
            continue
        if stride != expected:
            return None
        expected *= extent
    return strides


def _forget_finished() -> None:
    with _in_flight_lock:
        _in_flight[:] = [entry for entry in _in_flight if not entry[0].is_finished()]


def take_name(function: str, name: str | None, process_set: ProcessSet) -> None:
    """Reserves a name, if there is one, until its handle is synchronised.

    Raises:
        ValueError: The name is in use.
    """
    if name is None:
        return
    if name in process_set.names_in_use:
        raise ValueError(
            f"{function}: name must not be in use by a call that was not synchronised, got {name!r}"
        )
    process_set.names_in_use.add(name)


def check_tensors(
    function: str,
    tensors: Sequence[torch.Tensor],
    *,
    in_place: bool,
    one_device: bool = True,
) -> None:
    """Refuses what the engine cannot take.

    Raises:
        TypeError: Something is not a tensor, or its dtype is not known.
        ValueError: A tensor is sparse, on another device than the others or on one that is neither
            the CPU nor a GPU, or not contiguous where that is needed.
    """
    count = len(tensors)
    for index, tensor in enumerate(tensors):
        which = "tensor" if count == 1 else f"tensor {index} of {count}"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{function}: {which} must be a torch.Tensor, got {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"{function}: {which} must be dense, got layout {tensor.layout}")
        device = streams.device_of(tensor)
        if device is None and tensor.device.type != "cpu":
            raise ValueError(
                f"{function}: {which} must be on the cpu or a CUDA device, got device"
                f" {tensor.device}"
            )
        if one_device and index > 0 and device != streams.device_of(tensors[0]):
            raise ValueError(
                f"{function}: all tensors must be on one device, got {tensors[0].device} for tensor"
                f" 0 and {tensor.device} for {which}"
            )
        if tensor.dtype not in _DTYPE_CODES:
            raise TypeError(
                f"{function}: {which} must have one of the dtypes"
                f" {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPE_CODES)},"
                f" got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if in_place and not tensor.is_contiguous() and dense_strides(tensor) is None:
            raise ValueError(
                f"{function}: {which} must be dense (contiguous, channels_last and the like), got"
                f" strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
            )


def check_op(function: str, op: ReduceOp, tensors: Sequence[torch.Tensor]) -> None:
    """Refuses a reduction that means nothing for a dtype.

    Raises:
        TypeError: Adasum of something else than float types, Average or Sum of bool.
    """
    for tensor in tensors:
        if op == ReduceOp.Adasum and tensor.dtype not in FLOAT_DTYPES:
            rule = "float16, bfloat16, float32 or float64"
        elif op in (ReduceOp.Average, ReduceOp.Sum) and tensor.dtype == torch.bool:
            rule = "a number; Max and Min are the logical or and and"
        else:
            continue
        raise TypeError(
            f"{function}: dtype must be {rule} for op={op.name}, got"
            f" {str(tensor.dtype).removeprefix('torch.')}"
        )


def check_scales(
    function: str, tensors: Sequence[torch.Tensor], prescale_factor: float, postscale_factor: float
) -> None:
    """Refuses factors where there is nothing to multiply.

    Raises:
        TypeError: A factor other than 1 for a bool tensor.
    """
    has_bool = any(tensor.dtype == torch.bool for tensor in tensors)
    if has_bool and (prescale_factor, postscale_factor) != (1.0, 1.0):
        raise TypeError(
            f"{function}: prescale_factor and postscale_factor must be 1 for bool tensors, got"
            f" {prescale_factor} and {postscale_factor}"
        )


def mark_written(tensors: Sequence[torch.Tensor]) -> None:
    """Lets autograd know that the engine wrote into these, as an in-place operation would."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
