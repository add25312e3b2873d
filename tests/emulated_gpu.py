"""CPU tensors that the Python layer takes for CUDA tensors, so that it runs without a GPU.

While a Gpu is on, every tensor that is given to a collective counts as one on device 0; inside
``host()`` none does. What replaces the compiled side:

* ``staged``: nothing; the pieces go through the real engine, as on the staged path.
* ``stand-in``: `Engine.launch` is played by the CPU engine, which sees the same addresses, rows
  and groups. It shows that Python hands over what it should, not that kernels work.
* ``emulated``: the module `_cuda`, built with ADAREDUCE_CUDA=EMULATED, whose path is in
  ADAREDUCE_TEST_EMULATED_CUDA. Its kernels run on the CPU; torch's own work does not lie on its
  streams, so synchronize() waits here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from adareduce import cuda_library, runtime
from adareduce.ops import Collective, CudaPath
from adareduce.torch import device as device_module
from adareduce.torch import launching, objects, optimizer_state, streams

EMULATED_CUDA = os.environ.get("ADAREDUCE_TEST_EMULATED_CUDA", "")
MODES = ("staged", "stand-in", "emulated")
WHY_NOT_EMULATED = "ADAREDUCE_TEST_EMULATED_CUDA names no module _cuda"
_WRITES_NO_TENSORS = (objects.broadcast_object, objects.allgather_object)


class Gpu:
    """What a test sees of its GPU. It may replace any attribute.

    Attributes:
        mode: One of MODES.
        device: Index of the GPU on which tensors are taken to lie.
        stream: The current stream, as a number.
        is_capturing: Whether it is being captured.
        recorded: (address of a tensor, stream) for every ``record_stream``.
        launches: Keyword arguments of every Engine.launch, in the stand-in.
        lies_here: Whether a tensor lies on the GPU rather than on the CPU.
        uuid: Of the GPU.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.device = 0
        self.stream = 0
        self.is_capturing = False
        self.is_on = True
        self.recorded: list[tuple[int, int]] = []
        self.launches: list[dict[str, Any]] = []
        self.lies_here: Callable[[torch.Tensor], bool] = lambda tensor: True
        self.uuid = f"GPU-{runtime.rank()}"

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """Tensors lie on the CPU inside."""
        was_on, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = was_on

    def device_of(self, tensor: torch.Tensor) -> int | None:
        return self.device if self.is_on and self.lies_here(tensor) else None


class ImmediateCopies:
    """A CopyStream whose copies are done at once."""

    def __init__(self, device: int) -> None:
        self.device = device

    def follow_current(self) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def mark(self) -> streams.Mark:
        return PassedMark()


class PassedMark:
    def is_passed(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def order(self) -> None:
        pass

    def stream(self) -> int:
        return 99


@contextlib.contextmanager
def emulate(mode: str) -> Iterator[Gpu]:
    """Turns a Gpu on. The same on all ranks; process sets choose their paths anew."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = Gpu(mode)
        patch.setattr(streams, "device_of", gpu.device_of)
        patch.setattr(
            streams, "are_on_cpu", lambda tensors: all(gpu.device_of(t) is None for t in tensors)
        )
        patch.setattr(streams, "current_device", lambda: gpu.device)
        patch.setattr(streams, "uuid_of", lambda device: gpu.uuid)
        patch.setattr(streams, "current", lambda device: gpu.stream)
        patch.setattr(streams, "is_capturing", lambda device=None: gpu.is_capturing)
        patch.setattr(streams, "on", lambda device: contextlib.nullcontext())
        patch.setattr(
            streams,
            "record",
            lambda tensor, device: gpu.recorded.append((tensor.data_ptr(), gpu.stream)),
        )
        patch.setattr(streams, "empty_pinned", lambda numel, dtype: torch.empty(numel, dtype=dtype))
        patch.setattr(streams, "CopyStream", ImmediateCopies)
        # Whether this build has the real module must not decide; _load gives another.
        patch.setattr(cuda_library, "is_built", lambda: False)
        _keep_objects_on_the_host(patch, gpu)
        {"staged": _stage, "stand-in": _stand_in, "emulated": _load}[mode](patch, gpu)
        _forget_paths()
        try:
            yield gpu
        finally:
            gpu.is_capturing = gpu.is_on = False
            _forget_paths()


def _forget_paths() -> None:
    if runtime.is_initialized():
        for process_set in runtime.current_job().process_sets:
            process_set.cuda = None


def _keep_objects_on_the_host(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    # Their tensors are made by the library, on the CPU.
    def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with gpu.host():
                return function(*arguments, **options)

        return call

    import adareduce.torch as hvd

    for function in _WRITES_NO_TENSORS:
        wrapped = on_host(function)
        for module in (hvd, objects, optimizer_state):
            if hasattr(module, function.__name__):
                patch.setattr(module, function.__name__, wrapped)


def _stage(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    def choose(process_set: runtime.ProcessSet, device: int) -> runtime.ChosenPath:
        return runtime.ChosenPath(CudaPath.staged, "a test asks for it", device)

    patch.setattr(device_module, "choose_cuda_path", choose)


def _stand_in(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    def choose(process_set: runtime.ProcessSet, device: int) -> runtime.ChosenPath:
        return runtime.ChosenPath(CudaPath.peer, "a stand-in", device)

    def job_with_launch() -> Any:
        return SimpleNamespace(engine=StandInEngine(runtime.current_job(), gpu))

    patch.setattr(device_module, "choose_cuda_path", choose)
    patch.setattr(launching, "current_job", job_with_launch)


def _load(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    module = _emulated_module()
    patch.setattr(cuda_library, "is_built", lambda: True)
    patch.setattr(cuda_library, "load", lambda: module)
    enqueue_only = launching.Launch.wait_for

    def wait_for(self: launching.Launch, seconds: float) -> bool:
        read = list(self._inputs)  # the host's allocator knows nothing of streams
        enqueue_only(self, seconds)
        while not self.is_finished():  # the device's own deadline ends this
            pass
        del read
        return True

    patch.setattr(launching.Launch, "wait_for", wait_for)


@functools.cache
def _emulated_module() -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("adareduce._cuda", EMULATED_CUDA)
    spec = importlib.util.spec_from_file_location("adareduce._cuda", EMULATED_CUDA, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class EmulatedRuntime:
    """Streams and graphs of the emulated CUDA runtime that the module is linked to."""

    # Its functions are those of C++, by the names that GCC and Clang give them.
    _NAMES = {  # noqa: RUF012
        "create": "_Z25cudaStreamCreateWithFlagsPP11CUstream_stj",
        "begin": "_Z22cudaStreamBeginCaptureP11CUstream_st21cudaStreamCaptureMode",
        "end": "_Z20cudaStreamEndCaptureP11CUstream_stPP10CUgraph_st",
        "instantiate": "_Z20cudaGraphInstantiatePP14CUgraphExec_stP10CUgraph_sty",
        "launch": "_Z15cudaGraphLaunchP14CUgraphExec_stP11CUstream_st",
        "wait": "_Z21cudaStreamSynchronizeP11CUstream_st",
    }

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        maps = Path("/proc/self/maps").read_text().split()
        (path,) = {word for word in maps if "libcuda_emulation" in word}
        self._library = ctypes.CDLL(path)
        stream = ctypes.c_void_p()
        self._call("create", ctypes.byref(stream), ctypes.c_uint(1))
        self._stream = stream

    @contextlib.contextmanager
    def capture(self) -> Iterator[ctypes.c_void_p]:
        """Records what is called inside; the graph can be replayed afterwards."""
        executable, graph = ctypes.c_void_p(), ctypes.c_void_p()
        self._gpu.stream = self._stream.value or 0
        self._call("begin", self._stream, ctypes.c_int(0))
        self._gpu.is_capturing = True
        try:
            yield executable
        finally:
            self._gpu.is_capturing = False
            self._call("end", self._stream, ctypes.byref(graph))
            self._gpu.stream = 0
        self._call("instantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))

    def replay(self, executable: ctypes.c_void_p) -> None:
        """Runs a graph and waits for it."""
        self._call("launch", executable, self._stream)
        self._call("wait", self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, self._NAMES[name])(*arguments)
        assert status == 0, f"{name}: error {status}"


class StandInEngine:
    """``Engine.launch``, by the CPU engine."""

    def __init__(self, job: Any, gpu: Gpu) -> None:
        self._engine = job.engine
        self._sets = job.process_sets
        self._gpu = gpu

    def launch(
        self,
        *,
        process_set: int,
        device: int,
        stream: int,
        is_capturing: bool,
        tensors: Sequence[Any],
        rows: Sequence[int],
        local_squares: int,
        group_stats: int,
        orthogonality: int,
        cancellation: int,
        nonfinite: int,
        collective: int,
        **options: Any,
    ) -> StandInHandle:
        (ranks,) = [s.ranks for s in self._sets if s.process_set_id == process_set]
        mine, size = ranks.index(runtime.rank()), len(ranks)
        self._gpu.launches.append(
            {"device": device, "stream": stream, "is_capturing": is_capturing, "rows": list(rows),
             "collective": collective, "tensors": list(tensors), **options}
        )  # fmt: skip
        gathers = collective in (Collective.allgather, Collective.alltoall)
        is_alltoall = collective == Collective.alltoall
        num_groups = 1 + max((tensor[5] for tensor in tensors), default=-1)
        request = self._engine.submit(
            process_set=process_set,
            collective=collective,
            tensors=[(*t[:3], 0, *t[4:]) for t in tensors] if gathers else tensors,
            splits=rows[mine * size : (mine + 1) * size] if is_alltoall else (),
            local_squares=_doubles(local_squares, num_groups) if local_squares else (),
            **options,
        )
        addresses = (group_stats, orthogonality, nonfinite, cancellation)
        outputs = [tensor[3] for tensor in tensors] if gathers else []
        return StandInHandle(request, outputs, addresses, len(tensors))


class StandInHandle:
    """A DeviceHandle whose stream is the CPU engine's worker."""

    def __init__(
        self, request: Any, outputs: list[int], addresses: tuple[int, ...], count: int
    ) -> None:
        self._request = request
        self._outputs = outputs
        self._addresses = addresses
        self._count = count
        self.ordered_streams: list[int] = []

    def is_finished(self) -> bool:
        return bool(self._request.is_finished())

    def stream(self) -> int:
        return 99

    def order(self, stream: int) -> None:
        self.ordered_streams.append(stream)
        while not self._request.wait_for(1.0):
            pass
        self._request.rethrow()
        for address, (memory, _, _) in zip(
            self._outputs, self._request.gathered() if self._outputs else (), strict=True
        ):
            ctypes.memmove(address, bytes(memory), memoryview(memory).nbytes)
        groups_at, orthogonality_at, nonfinite_at, cancellation_at = self._addresses
        if nonfinite_at:
            groups, orthogonality, nonfinite = self._request.statistics()
            _write(groups_at, groups, ctypes.c_double)
            _write(orthogonality_at, orthogonality, ctypes.c_double)
            _write(nonfinite_at, nonfinite, ctypes.c_int64)
            _write(cancellation_at, [1.0] * self._count, ctypes.c_double)


def _doubles(address: int, count: int) -> list[float]:
    return list((ctypes.c_double * count).from_address(address))


def _write(address: int, values: Sequence[Any], kind: Any) -> None:
    if address:
        (kind * len(values)).from_address(address)[:] = list(values)
