"""Asynchronous calls: submission, polling and waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from adareduce import _core
from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import HorovodInternalError, ProcessSet, current_job
from adareduce.torch.tensors import Known, describe_tensors

_WAIT_SECONDS = 0.2  # between two looks for Ctrl-C; the wait itself costs nothing

# Where the engine can work on the caller's thread. The arguments are those of submit().
_run: Callable[..., _core.Handle] | None = getattr(_core.Engine, "run", None)

# Tensors that the engine may read or write, kept alive by request. Each step on it is atomic.
_in_flight: dict[_core.Handle, tuple[Any, ...]] = {}
# The same of calls that are being submitted, by the id of the tuple.
in_submission: dict[int, tuple[Any, ...]] = {}
_FEWEST_TO_LOOK_FOR = 4
_most_in_flight = _FEWEST_TO_LOOK_FOR


def keep_alive(request: _core.Handle, *tensors: Any) -> None:
    """Holds what the engine may read or write until the request has ended."""
    global _most_in_flight
    _in_flight[request] = tensors
    if len(_in_flight) > _most_in_flight:  # some may have lost their handles
        for other in list(_in_flight):
            if other.is_finished():
                _in_flight.pop(other, None)
        _most_in_flight = 2 * len(_in_flight) + _FEWEST_TO_LOOK_FOR


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
                if isinstance(self._request, _core.Handle):
                    _in_flight.pop(self._request, None)
                else:
                    self._launch = self._request
                self._request = None
                self._release_name()
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


def hand_over(
    request: Request,
    finish: Callable[[Any], Any],
    name: str | None,
    process_set: ProcessSet,
    *,
    blocking: bool,
) -> Any:
    """What a call returns: a handle of its request or, where it blocks, the result.

    Args:
        request: That was submitted.
        finish: Makes the result of it, when it has ended well.
        name: That it holds until then.
        process_set: Where.
        blocking: As for ``synchronize``, with its errors.
    """
    if not blocking:
        return Handle(request, finish, name, process_set.names_in_use)
    try:
        while not request.wait_for(_WAIT_SECONDS):
            pass
        if isinstance(request, _core.Handle):
            _in_flight.pop(request, None)
        request.rethrow()
        return finish(request)
    finally:
        if name is not None:
            process_set.names_in_use.discard(name)


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
    blocking: bool = False,
    known: Known | None = None,
) -> _core.Handle:
    """Hands dense CPU tensors to the engine and keeps them alive until it has finished.

    ``groups``, one number per tensor, asks for statistics. ``blocking``: the caller would wait
    anyway, so that the engine may do it on this thread. ``known``: of ``inputs``.
    """
    engine = current_job().engine  # says that init() is missing, where it is
    if process_set.process_set_id is None:
        raise ValueError(f"process_set must be added with add_process_set, got {process_set}")
    start = engine.submit if _run is None or not blocking else partial(_run, engine)
    tensors = describe_tensors(inputs, outputs, groups, known)
    kept = (inputs, outputs)
    in_submission[id(kept)] = kept
    try:
        request = start(
            process_set=process_set.process_set_id,
            collective=collective,
            name=name or "",
            op=op,
            root=root,
            prescale=prescale_factor,
            postscale=postscale_factor,
            tensors=tensors,
            splits=splits,
            has_statistics=groups is not None,
            local_squares=local_squares,
        )
        if not blocking or not request.is_finished():
            keep_alive(request, *kept)
    except Exception:  # nothing was submitted
        in_submission.pop(id(kept), None)
        raise
    # Not after Ctrl-C, which may come right behind the submission: the engine has the tensors then
    # and nobody has the request, so that they stay for ever.
    in_submission.pop(id(kept), None)
    return request


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
