"""Ranks of NcclCommunicator on the emulated CUDA runtime, as threads of this process.

The libraries are those that tests/cuda_emulation/nccl/testing builds; the folder comes in the
environment variable NCCL_TESTING. Every wait is bounded by the time limit of the process.
"""

from __future__ import annotations

import ctypes
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thread_ranks import DTYPES, OPS, STORAGE

_FOLDER = Path(os.environ["NCCL_TESTING"])
FAKE = _FOLDER / "fake_nccl" / "libnccl.so.2"
_EXCHANGE = ctypes.CFUNCTYPE(c_int, c_void_p, c_int, c_void_p)

library = ctypes.CDLL(str(_FOLDER / "libnccl_testing.so"))
library.failure.restype = c_char_p
library.version_text.restype = c_char_p
library.libraries_in.restype = c_char_p
library.async_error.restype = c_char_p
for _name, _types in {
    "make": [c_int, c_int, c_int, _EXCHANGE, POINTER(c_void_p)],
    "destroy": [c_void_p],
    "allocate": [c_int, c_int64, POINTER(c_void_p)],
    "release": [c_void_p],
    "all_reduce": [c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int],
    "all_gather": [c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "reduce_scatter": [c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int],
    "broadcast": [c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "start": [c_void_p, POINTER(c_int64), c_int],
    "begin_group": [c_void_p],
    "end_group": [c_void_p],
    "leave_group_by_exception": [c_void_p, c_void_p, c_int64],
    "synchronize": [c_void_p],
    "async_error": [c_void_p],
    "abort_communicator": [c_void_p, c_char_p],
    "abandon": [c_void_p],
    "try_receive": [c_void_p],
    "begin_capture": [c_void_p],
    "begin_global_capture": [c_void_p],
    "end_capture": [c_void_p, POINTER(c_void_p), POINTER(c_int)],
    "replay": [c_void_p, c_void_p],
}.items():
    getattr(library, _name).argtypes = _types


class UsageError(Exception):
    pass


class DeviceError(Exception):
    pass


def check(status: int) -> None:
    if status == 0:
        return
    kind, _, text = library.failure().decode().partition(": ")
    raise {"UsageError": UsageError, "DeviceError": DeviceError}.get(kind, RuntimeError)(text)


class Memory:
    """Emulated device memory, which NumPy can see."""

    def __init__(self, device: int, dtype: str, numel: int) -> None:
        self.dtype, self.numel = dtype, numel
        storage = STORAGE[dtype]
        pointer = c_void_p()
        check(library.allocate(device, max(numel * storage.itemsize, 1), ctypes.byref(pointer)))
        assert pointer.value is not None
        self.address: int = pointer.value
        raw = (ctypes.c_char * (numel * storage.itemsize)).from_address(self.address)
        self.array: NDArray[Any] = np.frombuffer(raw, dtype=storage)

    def at(self, element: int) -> int:
        return self.address + element * STORAGE[self.dtype].itemsize


class Rank:
    """One rank's communicator and stream; its methods are those of NcclCommunicator."""

    def __init__(
        self, rank: int, size: int, exchange: Callable[[bytes], bytes], device: int | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self._memory: list[Memory] = []
        self.device = rank if device is None else device

        def hand_around(mine: int, length: int, out: int) -> int:
            answer = exchange(ctypes.string_at(mine, length))
            ctypes.memmove(out, answer, len(answer))
            return len(answer)

        self._native = c_void_p()
        callback = _EXCHANGE(hand_around)
        check(library.make(rank, size, self.device, callback, ctypes.byref(self._native)))

    def memory(self, dtype: str, values: Any) -> Memory:
        values = np.asarray(values).ravel()
        memory = self.empty(dtype, values.size)
        memory.array[:] = encode(dtype, values)
        return memory

    def empty(self, dtype: str, numel: int) -> Memory:
        self._memory.append(Memory(self.device, dtype, numel))
        return self._memory[-1]

    def all_reduce(self, source: Memory, target: Memory, op: str, numel: int | None = None) -> None:
        count = source.numel if numel is None else numel
        code = DTYPES[source.dtype]
        check(
            library.all_reduce(self._native, source.address, target.address, count, code, OPS[op])
        )

    def all_gather(self, source: int, target: int, numel: int, dtype: str) -> None:
        check(library.all_gather(self._native, source, target, numel, DTYPES[dtype]))

    def reduce_scatter(self, source: int, target: int, numel: int, dtype: str, op: str) -> None:
        check(library.reduce_scatter(self._native, source, target, numel, DTYPES[dtype], OPS[op]))

    def broadcast(self, source: int, target: int, nbytes: int, root: int) -> None:
        check(library.broadcast(self._native, source, target, nbytes, root))

    def start(
        self, sends: Sequence[tuple[int, int, int]], receives: Sequence[tuple[int, int, int]]
    ) -> None:
        """Parts are (peer, address, bytes)."""
        rows = [(1, *part) for part in sends] + [(0, *part) for part in receives]
        flat = [number for row in rows for number in row]
        check(library.start(self._native, (c_int64 * max(len(flat), 1))(*flat), len(rows)))

    def begin_group(self) -> None:
        check(library.begin_group(self._native))

    def end_group(self) -> None:
        check(library.end_group(self._native))

    def leave_group_by_exception(self, data: Memory) -> None:
        check(library.leave_group_by_exception(self._native, data.address, data.numel))

    def synchronize(self) -> None:
        check(library.synchronize(self._native))

    def async_error(self) -> str:
        return str(library.async_error(self._native).decode())

    def abort(self, why: str = "") -> None:
        library.abort_communicator(self._native, why.encode())

    def abandon(self) -> None:
        library.abandon(self._native)

    def try_receive(self) -> None:
        check(library.try_receive(self._native))

    def begin_capture(self, everywhere: bool = False) -> None:
        begin = library.begin_global_capture if everywhere else library.begin_capture
        check(begin(self._native))

    def end_capture(self) -> tuple[c_void_p, int]:
        """An executable graph and the number of its nodes."""
        graph, nodes = c_void_p(), c_int()
        check(library.end_capture(self._native, ctypes.byref(graph), ctypes.byref(nodes)))
        return graph, nodes.value

    def replay(self, graph: c_void_p) -> None:
        check(library.replay(self._native, graph))

    def destroy(self) -> None:
        """Frees the memory, too, where the emulation looks for writes beside it."""
        library.destroy(self._native)
        for memory in self._memory:
            library.release(memory.address)


def encode(dtype: str, values: NDArray[Any]) -> NDArray[Any]:
    """Bits of exact values in the element type; bfloat16 is the upper half of float32."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), "not a bfloat16"
        return (bits >> 16).astype(np.uint16)
    return values.astype(STORAGE[dtype])


def decode(memory: Memory) -> NDArray[Any]:
    if memory.dtype == "bfloat16":
        return (memory.array.astype(np.uint32) << 16).view(np.float32)
    return memory.array.copy()


def run_ranks(
    size: int,
    program: Callable[[Rank], Any],
    device_of: Callable[[int], int] = lambda rank: rank,
    destroy: bool = True,
) -> list[Any]:
    """What `program` returns on each rank; the first exception of any is raised."""
    arrived = threading.Barrier(size, timeout=30)
    first: list[bytes] = []
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []

    def run(number: int) -> None:
        def exchange(mine: bytes) -> bytes:
            if number == 0:
                first.append(mine)
            arrived.wait()
            return first[0]

        rank = None
        try:
            rank = Rank(number, size, exchange, device_of(number))
            results[number] = program(rank)
            if destroy:
                rank.destroy()
        except BaseException as error:
            failures.append((number, error))
            traceback.print_exc()
            if rank is not None:
                rank.abort("the program has failed")  # or the others wait

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0][1]
    return results
