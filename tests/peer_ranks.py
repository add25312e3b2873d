"""P virtual ranks of one process that run the kernels over each other's memory.

    ranks = PeerRanks(library, size=3, dtype="float32", segments=[(0, 40)], numel=48)
    ranks.write(inputs)
    ranks.adasum()
    outputs = ranks.read("out")

The same library runs on the CPU, through tests/cuda_emulation, and on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from numpy.typing import NDArray

import cpp_build
from adareduce._core import testing
from cuda_build import EMULATION
from thread_ranks import DTYPES, STORAGE

PLACES = {
    name: place
    for place, name in enumerate(
        ["in", "out", "orthogonality", "cancellation", "squares", "flags", "epochs"]
    )
}
OPS = {"sum": 0, "min": 1, "max": 2, "product": 3}
LONG = ctypes.c_int64
PER_SEGMENT = {"orthogonality": 1, "cancellation": 1, "squares": 2}

Segments = Sequence[tuple[int, int]]
Pieces = Sequence[tuple[int, int, int, int]]


SOURCE = cpp_build.ROOT / "tests/cuda_peer"
CSRC = cpp_build.ROOT / "csrc"


@pytest.fixture(scope="session")
def peer_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libcuda_peer.so: kernels, windows and the C interfaces of tests/cuda_peer."""
    sources = [
        SOURCE,
        EMULATION,
        CSRC / "kernels",
        CSRC / "base",
        CSRC / "transports" / "cuda_peer",
    ]
    options = "-DCMAKE_BUILD_TYPE=Release"
    folder = cpp_build.build(request, tmp_path_factory, "cuda-peer", SOURCE, sources, options)
    return folder / "libcuda_peer.so"


def load(path: Path) -> ctypes.CDLL:
    """The library, with the interface of tests/cuda_peer/peer_ranks.cpp."""
    library = ctypes.CDLL(str(path))
    for name in ("make", "write", "read", "adasum", "reduce", "set_pieces", "copy", "replay"):
        getattr(library, f"peers_{name}").restype = ctypes.c_char_p
    for name in ("wait", "wait_for", "hold", "write_later", "arrivals"):
        getattr(library, f"peers_{name}").restype = ctypes.c_char_p
    library.peers_error_word.restype = ctypes.c_uint32
    return library


def shard(library: ctypes.CDLL, numel: int, rank: int, size: int) -> tuple[int, int]:
    bounds = (LONG * 2)()
    library.peers_shard(LONG(numel), rank, size, bounds)
    return bounds[0], bounds[1]


class PeerRanks:
    """All ranks. Calls enqueue on every rank's stream; `read` waits."""

    def __init__(
        self,
        library: ctypes.CDLL,
        size: int,
        dtype: str,
        segments: Segments,
        numel: int,
        blocks: int = 3,
        deadline_seconds: float = 60.0,
        in_place: bool = False,
    ) -> None:
        self.library, self.size, self.numel = library, size, numel
        self.segments, self.storage = list(segments), STORAGE[dtype]
        nodes = testing.adasum_tree(size)
        count = len(self.segments)
        self.ranks = ctypes.c_void_p()
        self._call(
            "make",
            size,
            blocks,
            DTYPES[dtype],
            LONG(numel),
            LONG(count),
            (LONG * count)(*[offset for offset, _ in self.segments]),
            (LONG * count)(*[length for _, length in self.segments]),
            ctypes.c_uint64(int(deadline_seconds * 1e9)),
            int(in_place),
            bytes(node["lower"] for node in nodes),
            bytes(node["upper"] for node in nodes),
            ctypes.byref(self.ranks),
        )

    def __enter__(self) -> PeerRanks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.library.peers_free(self.ranks)

    def write(self, inputs: Sequence[NDArray], place: str = "in") -> None:
        """One whole fused buffer per rank."""
        for rank, values in enumerate(inputs):
            kept = np.ascontiguousarray(values)
            self._of_ranks("write", rank, PLACES[place], kept.ctypes.data_as(ctypes.c_void_p), kept)

    def read(self, place: str) -> list[NDArray]:
        """What every rank holds, after all that was enqueued."""
        self.wait()
        return [self.read_of(rank, place) for rank in range(self.size)]

    def read_of(self, rank: int, place: str) -> NDArray:
        """What one rank holds, after all that was enqueued for it."""
        self._of_ranks("wait_for", rank)
        if place in PER_SEGMENT:
            values = np.empty(PER_SEGMENT[place] * len(self.segments), np.float64)
        else:
            values = np.empty(self.numel, self.storage)
        to = values.ctypes.data_as(ctypes.c_void_p)
        self._of_ranks("read", rank, PLACES[place], to, values)
        return values

    def adasum(self, captures: bool = False, absent: int = -1) -> None:
        self._of_ranks("adasum", int(captures), absent)

    def reduce(
        self,
        op: str,
        divisor: float = 1.0,
        keeps: Sequence[tuple[int, int]] | None = None,
        squares: bool = False,
        captures: bool = False,
        absent: int = -1,
    ) -> None:
        flat = None if keeps is None else (LONG * (2 * self.size))(*[b for k in keeps for b in k])
        factor = ctypes.c_double(divisor)
        self._of_ranks("reduce", OPS[op], factor, flat, int(squares), int(captures), absent)

    def copy(self, pieces: Sequence[Pieces] | None, captures: bool = False) -> None:
        """`pieces[rank]`: (from_offset, to_offset, bytes, rank to read); None: as before."""
        for rank, mine in enumerate(pieces or []):
            flat = (LONG * (4 * len(mine)))(*[number for piece in mine for number in piece])
            self._of_ranks("set_pieces", rank, flat, LONG(len(mine)))
        self._of_ranks("copy", int(captures), -1)

    def replay(self) -> None:
        """What was captured, once."""
        self._of_ranks("replay")

    def wait(self) -> None:
        self._of_ranks("wait")

    def hold(self, rank: int) -> None:
        """What is enqueued on the rank's stream from now on waits for release()."""
        self._of_ranks("hold", rank)

    def write_later(self, rank: int, values: NDArray) -> None:
        """The rank's input, in stream order."""
        kept = np.ascontiguousarray(values)
        self._of_ranks("write_later", rank, kept.ctypes.data_as(ctypes.c_void_p), kept)

    def release(self, rank: int) -> None:
        self.library.peers_release(self.ranks, rank)

    def arrivals(self, rank: int) -> list[int]:
        """How many barriers every rank has come to, as `rank` sees it; does not wait."""
        epochs = []
        for peer in range(self.size):
            epoch = ctypes.c_uint32()
            self._of_ranks("arrivals", rank, peer, ctypes.byref(epoch))
            epochs.append(epoch.value)
        return epochs

    def error_words(self) -> list[int]:
        return [int(self.library.peers_error_word(self.ranks, rank)) for rank in range(self.size)]

    def set_error_word(self, rank: int, word: int) -> None:
        self.library.peers_set_error_word(self.ranks, rank, ctypes.c_uint32(word))

    def _of_ranks(self, name: str, *args: object) -> None:
        if args and isinstance(args[-1], np.ndarray):
            args = (*args[:-1], LONG(args[-1].nbytes))
        self._call(name, self.ranks, *args)

    def _call(self, name: str, *args: object) -> None:
        text = getattr(self.library, f"peers_{name}")(*args)
        if text is not None:
            raise RuntimeError(text.decode())
