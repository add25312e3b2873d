"""The CUDA side of the kernel table on NumPy arrays: the real .cu files, run by the emulation.

    stats = Kernels(folder).pair_stats(lower, upper, segments, (0, numel))

Dtypes are those of tests/thread_ranks.py; bfloat16 is uint16 and must be named.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

import cpp_build
from cuda_build import EMULATION
from thread_ranks import DTYPES

Segments = list[tuple[int, int]]
F64, F32 = 0, 1  # accumulators
ALIGNMENT = 16  # bytes; what fused buffers start on

SOURCE = cpp_build.ROOT / "tests/cuda_kernels"
CSRC = cpp_build.ROOT / "csrc"


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    sources = [SOURCE, EMULATION, CSRC / "kernels", CSRC / "base"]
    folder = cpp_build.build(
        request, tmp_path_factory, "cuda-kernels", SOURCE, sources, "-DCMAKE_BUILD_TYPE=Release"
    )
    return Kernels(folder / "libcuda_kernels.so")


def aligned(numel: int, dtype: DTypeLike, misalignment: int = 0) -> NDArray:
    """Memory that starts `misalignment` bytes behind a multiple of 16, filled with 0xa5."""
    width = np.dtype(dtype).itemsize
    memory = np.full(numel * width + 2 * ALIGNMENT, 0xA5, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT + misalignment
    return memory[begin : begin + numel * width].view(dtype)


def aligned_copy(array: NDArray, misalignment: int = 0) -> NDArray:
    copy = aligned(array.size, array.dtype, misalignment)
    copy[:] = array
    return copy


def _address(array: NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _addresses(arrays: Sequence[NDArray]) -> Any:
    return (ctypes.c_void_p * max(1, len(arrays)))(*[array.ctypes.data for array in arrays])


class Kernels:
    """One method per entry. Arrays are used where they lie. Errors raise ValueError."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.last_error.restype = ctypes.c_char_p
        self._library.make_table.restype = ctypes.c_void_p
        for name in ("kernel_runs", "host_waits", "num_items"):
            getattr(self._library, name).restype = ctypes.c_int64

    def kernel_runs(self) -> int:
        return int(self._library.kernel_runs())

    def host_waits(self) -> int:
        return int(self._library.host_waits())

    def _call(self, name: str, *arguments: Any) -> None:
        converted = [
            ctypes.c_int64(argument) if isinstance(argument, int) else argument
            for argument in arguments
        ]
        if getattr(self._library, name)(*converted) != 0:
            raise ValueError(self._library.last_error().decode())

    def items(self, segments: Segments) -> list[tuple[int, int, int]]:
        """(begin, numel, segment) of each."""
        with _Table(self._library, segments) as table:
            rows = np.empty((self._library.num_items(table), 3), np.int64)
            self._library.get_items(table, ctypes.c_void_p(_address(rows)))
        return [(int(a), int(b), int(c)) for a, b, c in rows]

    def items_in(self, segments: Segments, bounds: tuple[int, int]) -> range:
        """Indices of the items that have elements inside the bounds."""
        found = np.empty(2, np.int64)
        with _Table(self._library, segments) as table:
            self._library.get_items_in(table, *map(ctypes.c_int64, bounds), _pointer(found))
        return range(int(found[0]), int(found[1]))

    def pair_stats(
        self,
        lower: NDArray,
        upper: NDArray,
        segments: Segments,
        bounds: tuple[int, int],
        dtype: str | None = None,
        accumulator: int = F64,
    ) -> NDArray[np.float64]:
        stats = np.full((len(segments), 3), np.nan)
        with _Table(self._library, segments) as table:
            self._call(
                "pair_stats", table, accumulator, DTYPES[dtype or lower.dtype.name],
                _pointer(lower), _pointer(upper), *bounds, _pointer(stats),
            )  # fmt: skip
        return stats

    def pair_combine(
        self,
        lower: NDArray,
        upper: NDArray,
        segments: Segments,
        bounds: tuple[int, int],
        stats: NDArray[np.float64],
        out: NDArray,
        dtype: str | None = None,
    ) -> None:
        with _Table(self._library, segments) as table:
            self._call(
                "pair_combine", table, DTYPES[dtype or lower.dtype.name],
                _pointer(lower), _pointer(upper), *bounds, _pointer(stats), _pointer(out),
            )  # fmt: skip

    def pack(
        self,
        tensors: Sequence[NDArray],
        segments: Segments,
        scale: float,
        fused: NDArray,
        dtype: str,
        squares: NDArray[np.float64] | None = None,
        accumulator: int = F64,
    ) -> None:
        with _Table(self._library, segments) as table:
            self._call(
                "pack", table, accumulator, DTYPES[dtype], _addresses(tensors),
                ctypes.c_double(scale), _pointer(fused), fused.size, _pointer(squares),
            )  # fmt: skip

    def unpack(
        self,
        fused: NDArray,
        segments: Segments,
        scale: float,
        tensors: Sequence[NDArray],
        dtype: str,
        nonfinite: NDArray[np.int64] | None = None,
        squares: NDArray[np.float64] | None = None,
        accumulator: int = F64,
    ) -> None:
        with _Table(self._library, segments) as table:
            self._call(
                "unpack", table, accumulator, DTYPES[dtype], _pointer(fused), _addresses(tensors),
                ctypes.c_double(scale), _pointer(nonfinite), _pointer(squares),
            )  # fmt: skip

    def reduce(
        self, op: int, inputs: Sequence[NDArray], divisor: float, out: NDArray, dtype: str
    ) -> None:
        self._call(
            "reduce", DTYPES[dtype], op, _addresses(inputs), len(inputs),
            ctypes.c_double(divisor), _pointer(out), out.size,
        )  # fmt: skip

    def reduce_squares(
        self,
        inputs: Sequence[NDArray],
        divisor: float,
        out: NDArray,
        bounds: tuple[int, int],
        segments: Segments,
        group_of: Sequence[int],
        squares: NDArray[np.float64],
        dtype: str,
    ) -> None:
        """Adds to `squares`, [groups, 2]."""
        groups = np.array(group_of, np.int32)
        with _Table(self._library, segments) as table:
            self._call(
                "reduce_squares", table, DTYPES[dtype], _addresses(inputs), len(inputs),
                ctypes.c_double(divisor), _pointer(out), *bounds, _pointer(groups),
                _pointer(squares),
            )  # fmt: skip

    def contribute_leaf_squares(
        self, of_node: NDArray[np.float64], carried: NDArray[np.float64], contributes: bool
    ) -> None:
        self._call(
            "contribute_leaf_squares", of_node.size, _pointer(of_node), _pointer(carried),
            int(contributes),
        )  # fmt: skip

    def collect_leaf_squares(
        self,
        carried: NDArray[np.float64],
        pair_stats: NDArray[np.float64],
        are_leaves: tuple[bool, bool],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Squares of the node, orthogonality."""
        of_node, orthogonality = np.full(carried.size, np.nan), np.full(carried.size, np.nan)
        self._call(
            "collect_leaf_squares", carried.size, _pointer(of_node), _pointer(carried),
            _pointer(pair_stats), *map(int, are_leaves), _pointer(orthogonality),
        )  # fmt: skip
        return of_node, orthogonality

    def copy(self, source: NDArray, target: NDArray, size: int) -> None:
        self._call("copy", _pointer(source), size, _pointer(target))

    def group_stats(
        self,
        group_of: Sequence[int],
        num_groups: int,
        squares: NDArray[np.float64],
        result_squares: NDArray[np.float64],
        squares_are_of_groups: bool = False,
        result_is_mean_times: float = 1.0,
        has_estimates: bool = True,
    ) -> NDArray[np.float64]:
        """`squares` is [ranks, segments] or [ranks, groups]."""
        out = np.full((num_groups, 4), -1.0)
        groups = np.array(group_of, np.int32)
        self._call(
            "group_stats", groups.size, _pointer(groups), num_groups, len(squares),
            _pointer(squares), int(squares_are_of_groups), _pointer(result_squares),
            ctypes.c_double(result_is_mean_times), int(has_estimates), _pointer(out),
        )  # fmt: skip
        return out


def _pointer(array: NDArray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_address(array))


class _Table:
    """Segments and their items, while they are needed."""

    def __init__(self, library: ctypes.CDLL, segments: Segments) -> None:
        self._library = library
        self._segments = segments

    def __enter__(self) -> ctypes.c_void_p:
        rows = np.array(self._segments, np.int64)
        self._table = ctypes.c_void_p(
            self._library.make_table(_pointer(rows), ctypes.c_int64(len(self._segments)))
        )
        return self._table

    def __exit__(self, *exception: object) -> None:
        self._library.free_table(self._table)
