"""What is asked of torch.cuda, and nothing else asks it. Tests without a GPU replace these."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch

_IS_CPU = operator.attrgetter("is_cpu")


def device_of(tensor: torch.Tensor) -> int | None:
    """CUDA's index of the GPU that holds the tensor; None where none does."""
    return tensor.device.index if tensor.is_cuda else None


def are_on_cpu(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors lie on the CPU."""
    return tensors[0].is_cpu if len(tensors) == 1 else all(map(_IS_CPU, tensors))


def current_device() -> int:
    """The GPU that torch allocates on, on this thread."""
    return torch.cuda.current_device()


def uuid_of(device: int) -> str:
    """What tells a GPU from all others; empty where torch does not know."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def current(device: int) -> int:
    """``cudaStream_t`` of this thread's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def is_capturing(device: int | None = None) -> bool:
    """Whether this thread's current stream, on ``device``, is being captured into a graph."""
    # Builds without CUDA cannot be asked.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    if device is None:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def record(tensor: torch.Tensor, device: int) -> None:
    """Keeps the tensor's memory until this thread's current stream is done with it.

    The stream is torch's own object: torch makes another stream of the number of the default one.
    """
    tensor.record_stream(torch.cuda.current_stream(device))


def on(device: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one inside."""
    return torch.cuda.device(device)


def empty_pinned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Host memory that a GPU copies from and to by itself; torch keeps it while it does."""
    return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=True)


class Mark(Protocol):
    """A point on a stream."""

    def is_passed(self) -> bool:
        """Whether all work before it is done."""
        ...

    def wait(self) -> None:
        """Blocks until it is."""
        ...

    def order(self) -> None:
        """What comes on the current stream from now on comes after it."""
        ...

    def stream(self) -> int:
        """``cudaStream_t`` that it lies on."""
        ...


class CopyStream:
    """A stream of its own for copies between the host and one GPU."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow_current(self) -> None:
        """Copies from now on come after what is on the current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy; the memory on the GPU must outlive it."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """The point behind the last copy."""
        return _EventMark(self._stream, self._device)


class _EventMark:
    def __init__(self, stream: torch.cuda.Stream, device: int) -> None:
        self._device = device
        self._stream = stream
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def is_passed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def stream(self) -> int:
        return int(self._stream.cuda_stream)
