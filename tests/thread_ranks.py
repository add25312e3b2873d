"""Runs the ranks of a job as threads of this process, each with an engine of its own.

    sums = run_ranks(3, lambda rank: rank.allreduce(np.ones(5, np.float32)))

Every wait is bounded: when the ranks have not ended after HANG_LIMIT, the test fails and shows
what every thread was doing.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adareduce import _core

HANG_LIMIT = 40.0

COLLECTIVES = {
    "allreduce": 0,
    "broadcast": 1,
    "allgather": 2,
    "barrier": 3,
    "reducescatter": 5,
    "alltoall": 6,
}
OPS = {"average": 0, "sum": 1, "adasum": 2, "min": 3, "max": 4, "product": 5}
DTYPES = {
    "uint8": 0,
    "int8": 1,
    "int16": 2,
    "int32": 3,
    "int64": 4,
    "float16": 5,
    "bfloat16": 6,
    "float32": 7,
    "float64": 8,
    "bool": 9,
}
# NumPy has no bfloat16: two bytes that are only moved stand for it.
STORAGE = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in DTYPES}


# The ranks meet in shared memory instead of exchanging messages: tests/test_shared_suite.py.
USES_SHARED_MEMORY = os.environ.get("ADAREDUCE_TEST_SHARED_MEMORY") == "1"
# Of tests that mean messages and what goes with them only.
over_messages = pytest.mark.skipif(USES_SHARED_MEMORY, reason="about messages")


def settings(
    warn_after: float = 10.0,
    fail_after: float = 20.0,
    shared_memory: bool = USES_SHARED_MEMORY,
    shared_choice: int | None = None,
    workers: int = 1,
) -> _core.Settings:
    return _core.Settings(
        warn_after=warn_after,
        fail_after=fail_after,
        shared_memory=shared_memory,
        shared_choice=shared_choice,
        workers=workers,
    )


class Pending:
    """A request under way. Keeps its arrays alive."""

    def __init__(
        self, rank: ThreadRank, handle: _core.Handle, inputs: list[NDArray], outputs: list[NDArray]
    ) -> None:
        self.rank, self.handle, self.inputs, self.outputs = rank, handle, inputs, outputs

    def is_finished(self) -> bool:
        return self.handle.is_finished()

    def wait(self) -> list[NDArray]:
        """The results, or the request's error."""
        self.rank.wait_for(self.handle)
        self.handle.rethrow()
        return self.outputs

    def gathered(self) -> list[NDArray]:
        self.wait()
        return [
            np.array(memory, copy=True).view(array.dtype).reshape(shape)
            for array, (memory, shape, _) in zip(self.inputs, self.handle.gathered(), strict=True)
        ]


class ThreadRank:
    """One rank: its engine, with arrays in place of pointers."""

    def __init__(self, job: Job, engine: _core.Engine) -> None:
        self.job, self.engine = job, engine
        self.rank, self.size = engine.rank, engine.size
        self.is_stopped = False

    def submit(
        self,
        collective: str,
        arrays: Sequence[NDArray] = (),
        *,
        outputs: Sequence[NDArray] | None = None,
        name: str = "x",
        dtype: str | Sequence[str] | None = None,
        op: str = "sum",
        root: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
        process_set: int = 0,
        splits: Sequence[int] = (),
        groups: Sequence[int] | None = None,
        local_squares: Sequence[float] = (),
        drives: bool = False,
    ) -> Pending:
        inputs = list(arrays)
        results = [np.zeros_like(array) for array in inputs] if outputs is None else list(outputs)
        assert all(array.flags.c_contiguous for array in [*inputs, *results])
        if dtype is None:
            dtype = [array.dtype.name for array in inputs]
        dtypes = [dtype] * len(inputs) if isinstance(dtype, str) else dtype
        enqueue = self.engine.run if drives else self.engine.submit
        handle = enqueue(
            process_set=process_set,
            collective=COLLECTIVES[collective],
            name=name,
            op=OPS[op],
            root=root,
            prescale=prescale,
            postscale=postscale,
            tensors=[
                (list(a.shape), DTYPES[kind], a.ctypes.data, b.ctypes.data, (), group)
                for a, b, kind, group in zip(
                    inputs, results, dtypes, groups or [0] * len(inputs), strict=True
                )
            ],
            splits=splits,
            has_statistics=groups is not None,
            local_squares=local_squares,
        )
        return Pending(self, handle, inputs, results)

    def grouped_allreduce(self, arrays: Sequence[NDArray], **options: Any) -> list[NDArray]:
        return self.submit("allreduce", arrays, **options).wait()

    def allreduce(self, array: NDArray, **options: Any) -> NDArray:
        return self.grouped_allreduce([array], **options)[0]

    def broadcast(self, array: NDArray, root: int, **options: Any) -> NDArray:
        return self.submit("broadcast", [array], root=root, **options).wait()[0]

    def allgather(self, array: NDArray, **options: Any) -> NDArray:
        return self.submit("allgather", [array], **options).gathered()[0]

    def barrier(self, process_set: int = 0) -> None:
        self.submit("barrier", process_set=process_set).wait()

    def reject(self, reason: str, *, is_barrier: bool = False) -> None:
        self.engine.reject(process_set=0, is_barrier=is_barrier, reason=reason)

    def leave(self, reason: str, *, is_orderly: bool = True) -> None:
        """Waits until every rank has taken note: with `is_orderly`, until all have left."""
        for handle in self.engine.leave(reason=reason, is_orderly=is_orderly):
            self.wait_for(handle)

    def give_up(self, error: BaseException) -> None:
        """Lets the others know why, as far as they listen."""
        if self.is_stopped:
            return
        reason = f"{type(error).__name__}: {error}"
        for handle in self.engine.leave(reason=reason, is_orderly=False):
            handle.wait_for(1.0)

    def stop(self) -> None:
        self.is_stopped = True
        self.engine.stop()

    def events(self) -> list[tuple[str, str]]:
        found = []
        while (event := self.engine.next_event(0.0)) is not None:
            found.append(event)
        return found

    def wait_for(self, handle: _core.Handle) -> None:
        while not handle.wait_for(0.2):
            self.job.check_time()

    def wait_until(self, event: threading.Event) -> None:
        while not event.wait(0.2):
            self.job.check_time()


class Job:
    """The threads of one run_ranks."""

    def __init__(self, size: int, options: _core.Settings | Sequence[_core.Settings]) -> None:
        self.world = _core.ThreadWorld(size)
        self.options = [options] * size if isinstance(options, _core.Settings) else options
        self.size = size
        self.has_hung = threading.Event()
        self.results: list[Any] = [None] * size
        self.errors: dict[int, str] = {}

    def check_time(self) -> None:
        if self.has_hung.is_set():
            raise TimeoutError(f"the ranks have not ended within {HANG_LIMIT} s")

    def run_rank(self, number: int, body: Callable[[ThreadRank], Any]) -> None:
        try:
            engine = _core.Engine.over_threads(self.world, number, self.options[number])
            rank = ThreadRank(self, engine)
            try:
                self.results[number] = body(rank)
                if not rank.is_stopped:
                    rank.leave("its work is done")
            except BaseException as error:
                rank.give_up(error)
                raise
            finally:
                if not rank.is_stopped:
                    engine.stop()
        except BaseException:
            self.errors[number] = traceback.format_exc()

    def run(self, body: Callable[[ThreadRank], Any]) -> list[Any]:
        threads = [
            threading.Thread(
                target=self.run_rank, args=(number, body), name=f"rank {number}", daemon=True
            )
            for number in range(self.size)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + HANG_LIMIT
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            stacks = "".join(f"{t.name} is thread {t.ident or 0:#018x}\n" for t in threads)
            stacks += all_stacks()
            self.has_hung.set()
            for thread in threads:
                thread.join(2.0)
            hung = [thread.name for thread in threads if thread.is_alive()]
            raise AssertionError(
                f"the ranks have not ended within {HANG_LIMIT} s (stuck in C++: {hung})\n{stacks}"
                + self.error_text()
            )
        if self.errors:
            raise AssertionError(self.error_text())
        return self.results

    def error_text(self) -> str:
        return "".join(f"\n--- rank {number}\n{text}" for number, text in self.errors.items())


def all_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def run_ranks(
    size: int,
    body: Callable[[ThreadRank], Any],
    options: _core.Settings | Sequence[_core.Settings] | None = None,
) -> list[Any]:
    """What `body` returns on each rank; fails with the traceback of every rank that raised.

    `options` are those of all ranks, or a list with those of each.
    """
    return Job(size, options or settings()).run(body)
