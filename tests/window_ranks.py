"""Ranks that make windows of device memory together: processes, or threads of one process.

`run_ranks(library, [Rank(...), ...])` returns what `Member.work` of every rank has returned.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

HANG_LIMIT = 60.0  # seconds
LONG = ctypes.c_int64
EXCHANGE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, LONG, ctypes.c_void_p, LONG, ctypes.POINTER(LONG)
)
# Hands a rank's bytes to all ranks and returns everybody's.
Allgather = Callable[[bytes], list[bytes]]


@dataclass
class Rank:
    """What one rank is told. Ranks of equal `process` are threads of one process."""

    process: int
    bytes: int
    work: Callable[[Member], Any]
    device: int = 0
    environment: dict[str, str] = field(default_factory=dict)


class Member:
    """One rank with its windows."""

    def __init__(
        self, library: str, rank: int, size: int, options: Rank, allgather: Allgather
    ) -> None:
        self.library = ctypes.CDLL(library)
        self.library.window_rank_of.restype = ctypes.c_void_p
        self.library.window_rank_bytes.restype = LONG
        for name in ("make", "copy", "sum"):
            getattr(self.library, f"window_rank_{name}").restype = ctypes.c_char_p
        self.rank, self.size, self.allgather = rank, size, allgather
        self.windows = ctypes.c_void_p()

        def exchange(mine: int, count: int, into: int, capacity: int, lengths: Any) -> int:
            try:
                parts = allgather(ctypes.string_at(mine, count))
            except (EOFError, OSError, threading.BrokenBarrierError):
                return 1
            for index, part in enumerate(parts):
                assert len(part) <= capacity
                ctypes.memmove(into + index * capacity, part, len(part))
                lengths[index] = len(part)
            return 0

        callback = EXCHANGE(exchange)
        made = ctypes.byref(self.windows)
        self._call("make", rank, size, options.device, LONG(options.bytes), callback, made)

    def barrier(self) -> None:
        self.allgather(b"")

    def window(self, peer: int) -> int | None:
        address: int | None = self.library.window_rank_of(self.windows, peer)
        return address

    def bytes(self) -> int:
        return int(self.library.window_rank_bytes(self.windows))

    def write(self, peer: int, values: NDArray, offset: int = 0) -> None:
        to = ctypes.c_void_p((self.window(peer) or 0) + offset)
        self._call("copy", to, values.ctypes.data_as(ctypes.c_void_p), LONG(values.nbytes))

    def read(self, peer: int, values: NDArray, offset: int = 0) -> NDArray:
        """Fills `values` from a rank's window."""
        source = ctypes.c_void_p((self.window(peer) or 0) + offset)
        self._call("copy", values.ctypes.data_as(ctypes.c_void_p), source, LONG(values.nbytes))
        return values

    def sum(self, numel: int, blocks: int, repeats: int = 1, deadline: float = 30.0) -> int:
        """peer_reduce over the windows; returns the error word."""
        word = ctypes.c_uint32()
        limit = ctypes.c_double(deadline)
        count = LONG(numel)
        args = (self.windows, self.rank, count, blocks, repeats, limit, ctypes.byref(word))
        self._call("sum", *args)
        return word.value

    def free(self) -> None:
        self.library.window_rank_free(self.windows)

    def _call(self, name: str, *args: object) -> None:
        text = getattr(self.library, f"window_rank_{name}")(*args)
        if text is not None:
            raise RuntimeError(text.decode())


def _run_rank(library: str, rank: int, size: int, options: Rank, pipe: Connection) -> None:
    def allgather(mine: bytes) -> list[bytes]:
        pipe.send(("bytes", mine))
        if not pipe.poll(HANG_LIMIT):
            raise EOFError
        parts: list[bytes] = pipe.recv()
        return parts

    try:
        member = Member(library, rank, size, options, allgather)
        result = options.work(member)
        member.barrier()  # peers have finished with this rank's memory
        member.free()
        pipe.send(("result", result))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _run_process(library: str, size: int, ranks: dict[int, Rank], pipes: list[Connection]) -> None:
    for options in ranks.values():
        os.environ.update(options.environment)
    threads = [
        threading.Thread(target=_run_rank, args=(library, rank, size, options, pipe))
        for (rank, options), pipe in zip(ranks.items(), pipes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_ranks(library: str, ranks: Sequence[Rank]) -> list[tuple[str, Any]]:
    """("result", value) or ("error", text) of every rank."""
    context = multiprocessing.get_context("spawn")
    size = len(ranks)
    here, there = zip(*[context.Pipe() for _ in ranks], strict=True)
    processes = []
    for process in sorted({options.process for options in ranks}):
        members = {r: options for r, options in enumerate(ranks) if options.process == process}
        pipes = [there[rank] for rank in members]
        args = (library, size, members, pipes)
        processes.append(context.Process(target=_run_process, args=args, daemon=True))
        processes[-1].start()
    for pipe in there:
        pipe.close()
    try:
        return _exchange(list(here))
    finally:
        for running in processes:
            running.join(HANG_LIMIT)
            running.kill()


def _exchange(pipes: list[Connection]) -> list[tuple[str, Any]]:
    """Serves the ranks' all-gathers until each has ended; an ended one has empty bytes."""
    ended: dict[int, tuple[str, Any]] = {}
    while len(ended) < len(pipes):
        parts = [b""] * len(pipes)
        for rank, pipe in enumerate(pipes):
            if rank in ended:
                continue
            assert pipe.poll(HANG_LIMIT), f"rank {rank} hangs"
            kind, value = pipe.recv()
            if kind == "bytes":
                parts[rank] = value
            else:
                ended[rank] = (kind, value)
        for rank, pipe in enumerate(pipes):
            if rank not in ended:
                pipe.send(parts)
    return [ended[rank] for rank in range(len(pipes))]


def filled(member: Member, numel: int) -> NDArray[np.float32]:
    """What a rank writes in these tests: numbers that tell rank and place."""
    return (np.arange(numel) + 1000 * member.rank).astype(np.float32)
