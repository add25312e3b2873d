"""Ranks as threads that call on "CUDA" tensors: host memory behind tests/cpp/device_plugin.c.

The plugin's launches copy inputs to outputs and count; which of its calls fail, and on which GPU,
is set through ``GPUS.of(device)``. Rank r of the job has GPU r.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adareduce import _core
from thread_ranks import COLLECTIVES, DTYPES, OPS, ThreadRank, run_ranks

ROOT = Path(__file__).resolve().parent.parent
CAPSULE_NAME = b"adareduce.cuda_plugin"
MOST_DEVICES = 8


class Gpu(ctypes.Structure):
    """device_state of tests/cpp/device_plugin.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in (
                *("created", "prepared", "launched", "ordered", "checked", "aborted"),
                *("destroyed", "released", "refuse_create", "refuse_prepare", "refuse_launch"),
                *("refuse_check", "refuse_order", "block_create", "is_blocked", "is_unfinished"),
                *("num_exchanges", "overlaps"),
            )
        ),
        *((name, ctypes.c_longlong) for name in ("last_numel", "last_rows", "last_row_numel")),
        ("last_path", ctypes.c_int),
        ("abort_text", ctypes.c_char * 2000),
        ("launches", ctypes.c_char * 4096),
    )


class Gpus:
    """The plugin, compiled and loaded, as good as new."""

    def __init__(self) -> None:
        self.library = load_plugin()
        self.library.test_device.restype = ctypes.POINTER(Gpu)
        for device in range(MOST_DEVICES):
            ctypes.memset(self.library.test_device(device), 0, ctypes.sizeof(Gpu))

    def of(self, device: int) -> Gpu:
        gpu: Gpu = self.library.test_device(device).contents
        return gpu

    def table(self) -> ctypes.c_void_p:
        return ctypes.c_void_p.in_dll(self.library, "test_plugin")

    def capsule(self, table: Any = None, name: bytes = CAPSULE_NAME) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        return new(ctypes.addressof(self.table() if table is None else table), name, None)


@functools.cache
def load_plugin() -> ctypes.CDLL:
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None
    )
    if compiler is None:
        pytest.skip("no C compiler for the plugin of these tests")
    folder = Path(tempfile.mkdtemp(prefix="adareduce-plugin-"))
    try:
        library = folder / "device_plugin.so"
        source = ROOT / "tests/cpp/device_plugin.c"
        options = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC")
        subprocess.run(
            [compiler, *options, "-shared", f"-I{ROOT / 'csrc'}", source, "-o", library],
            check=True,
            timeout=120,
        )
        return ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder)  # it is loaded


class Launched:
    """A request on the device. Keeps its arrays alive."""

    def __init__(self, handle: _core.DeviceHandle, arrays: Sequence[NDArray]) -> None:
        self.handle, self.arrays = handle, arrays

    def is_finished(self) -> bool:
        return self.handle.is_finished()

    def wait(self) -> None:
        """Its error, if the process set is broken."""
        self.handle.order(0)


class DeviceRank:
    """A rank and its GPU."""

    def __init__(self, rank: ThreadRank, gpus: Gpus, wanted_path: int = 0) -> None:
        self.on_cpu, self.gpus = rank, gpus
        self.rank, self.size, self.engine = rank.rank, rank.size, rank.engine
        self.gpu = gpus.of(rank.rank)
        self.engine.attach_cuda(gpus.capsule(), wanted_path)

    def launch(
        self,
        collective: str = "allreduce",
        arrays: Sequence[NDArray] | None = None,
        *,
        outputs: Sequence[NDArray] | None = None,
        name: str = "x",
        dtype: str | None = None,
        op: str = "sum",
        root: int = 0,
        prescale: float = 1.0,
        postscale: float = 1.0,
        process_set: int = 0,
        rows: Sequence[int] = (),
        groups: Sequence[int] | None = None,
        device: int | None = None,
        is_capturing: bool = False,
        **pointers: int,
    ) -> Launched:
        inputs = [np.ones(5, np.float32)] if arrays is None else list(arrays)
        results = inputs if outputs is None else list(outputs)
        handle = self.engine.launch(
            process_set=process_set,
            device=self.rank if device is None else device,
            stream=0,
            is_capturing=is_capturing,
            collective=COLLECTIVES[collective],
            name=name,
            op=OPS[op],
            root=root,
            prescale=prescale,
            postscale=postscale,
            tensors=[
                (a.shape, DTYPES[dtype or a.dtype.name], a.ctypes.data, b.ctypes.data, (), group)
                for a, b, group in zip(inputs, results, groups or [0] * len(inputs), strict=True)
            ],
            rows=rows,
            has_statistics=groups is not None,
            **pointers,
        )
        return Launched(handle, [*inputs, *results])

    def launch_or_reject(self, **options: Any) -> Launched:
        """As Python's collectives do: a mistake takes the place of the call."""
        try:
            return self.launch(**options)
        except ValueError as error:
            self.on_cpu.reject(str(error))
            raise

    def breakage(self) -> str:
        """Why the job is broken; waits until it is."""
        while not (text := self.engine.breakage()):
            self.on_cpu.job.check_time()
        return text


def run_with_gpus(
    size: int,
    gpus: Gpus,
    body: Callable[[DeviceRank], Any],
    options: _core.Settings | None = None,
    wanted_path: Callable[[int], int] = lambda rank: 0,
) -> list[Any]:
    """``run_ranks`` for ranks with a GPU each."""
    return run_ranks(
        size, lambda rank: body(DeviceRank(rank, gpus, wanted_path(rank.rank))), options
    )
