"""Calls whose work is enqueued on a GPU, by the thread that makes them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import ProcessSet, current_job
from adareduce.torch import streams
from adareduce.torch.tensors import describe_tensors


class Work(Protocol):
    """What was enqueued: the engine's handle, or the copies of the staged path."""

    def is_finished(self) -> bool:
        """Whether the GPU has worked it off."""
        ...

    def order(self, stream: int) -> None:
        """What is enqueued on ``stream`` from now on comes after it."""
        ...

    def stream(self) -> int:
        """``cudaStream_t`` on which it runs."""
        ...


class DeviceStats(NamedTuple):
    """Where statistics go, on the GPU; see ReductionStats. ``None``: not wanted."""

    groups: torch.Tensor | None
    orthogonality: torch.Tensor | None
    cancellation: torch.Tensor | None
    nonfinite: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """Those that are wanted."""
        return [tensor for tensor in self if tensor is not None]


class Launch:
    """A call that was enqueued, in the place of the engine's handle of a CPU call.

    Its tensors stay alive until the GPU is done with them, also where nobody synchronises; until
    a stream comes after it, where somebody does. Nothing is asked of CUDA during a capture.
    """

    def __init__(
        self,
        work: Work,
        device: int,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        self._work = work
        self._device = device
        self._stream = streams.current(device)
        self._is_captured = streams.is_capturing(device)
        self._inputs = list(inputs)
        self._outputs = list(outputs)
        self._lock = threading.Lock()
        if not self._is_captured:
            _forget_finished()
            with _in_flight_lock:
                _in_flight.append(self)

    def is_finished(self) -> bool:
        """Whether the GPU is done. A captured call is: it runs when the graph does."""
        return self._is_captured or self._work.is_finished()

    def wait_for(self, _seconds: float) -> bool:
        """Puts the caller's current stream after this call; the host goes on at once.

        Raises:
            ValueError: A capture has begun or ended since the call.
        """
        if streams.is_capturing(self._device) != self._is_captured:
            when = "during" if self._is_captured else "before"
            raise ValueError(
                f"synchronize: handle must be synchronised on the same side of a graph's capture"
                f" where its call was made, got one made {when} a capture"
            )
        here = streams.current(self._device)
        self._work.order(here)
        with self._lock:
            inputs, self._inputs = self._inputs, []
        if here != self._stream:
            # Their memory goes back to the stream that it came from, which may be behind. This one
            # comes after the work, so that it stands for the group's stream, too.
            for tensor in (*inputs, *self._outputs):
                streams.record(tensor, self._device)
        with _in_flight_lock:
            if self in _in_flight:
                _in_flight.remove(self)
        return True

    def rethrow(self) -> None:
        """Nothing: what goes wrong is raised where it is enqueued, or at the next call."""


# Calls whose tensors a GPU may read or write, oldest first.
_in_flight: collections.deque[Launch] = collections.deque()
_in_flight_lock = threading.Lock()


def launch(
    collective: Collective,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    *,
    device: int,
    name: str | None,
    process_set: ProcessSet,
    op: ReduceOp = ReduceOp.Sum,
    root: int = 0,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    rows: Sequence[int] = (),
    groups: Sequence[int] | None = None,
    local_squares: torch.Tensor | None = None,
    statistics: DeviceStats | None = None,
) -> Launch:
    """Enqueues a call behind the caller's current stream. Blocks at a new signature only.

    Args:
        collective: What to do.
        inputs: CUDA tensors, dense.
        outputs: One for each, on the same GPU.
        device: That GPU.
        name: Of the call.
        process_set: The ranks, all of which launch the same.
        op: Of reductions.
        root: Of broadcasts, in the process set.
        prescale_factor: Before a reduction.
        postscale_factor: After it.
        rows: Of allgather [tensors][size], of alltoall [size][size].
        groups: One number per tensor, of its statistics.
        local_squares: float64 [groups] on the GPU.
        statistics: Where they go.
    """
    stats_at = [_address(tensor) for tensor in statistics or (None,) * len(DeviceStats._fields)]
    work = current_job().engine.launch(
        process_set=_id_of(process_set),
        device=device,
        stream=streams.current(device),
        is_capturing=streams.is_capturing(device),
        collective=collective,
        name=name or "",
        op=op,
        root=root,
        prescale=prescale_factor,
        postscale=postscale_factor,
        tensors=describe_tensors(inputs, outputs, groups),
        rows=rows,
        has_statistics=statistics is not None,
        local_squares=_address(local_squares),
        group_stats=stats_at[0],
        orthogonality=stats_at[1],
        cancellation=stats_at[2],
        nonfinite=stats_at[3],
    )
    read = [*inputs] if local_squares is None else [*inputs, local_squares]
    written = [*outputs] if statistics is None else [*outputs, *statistics.tensors()]
    return Launch(work, device, read, written)


def _id_of(process_set: ProcessSet) -> int:
    assert process_set.process_set_id is not None  # its path was chosen
    return process_set.process_set_id


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forget_finished() -> None:
    # In order of submission, and only as far as the first that runs: one question per call.
    with _in_flight_lock:
        while _in_flight and _in_flight[0].is_finished():
            _in_flight.popleft()
