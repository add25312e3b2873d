"""Where the tests' CUDA memory lies: on a GPU, or on the CPU under the emulation of `_cuda`."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from adareduce import _core

# A module _cuda that was built with ADAREDUCE_CUDA=EMULATED and is not installed.
_EMULATED = os.environ.get("ADAREDUCE_TEST_EMULATED_CUDA", "")


def why_not() -> str | None:
    """Why nothing here can run; None if it can."""
    if _EMULATED:
        return None
    if importlib.util.find_spec("adareduce._cuda") is None:
        return "this build has no module _cuda"
    if is_emulated() or torch.cuda.is_available():
        return None
    return "there is no GPU"


def is_emulated() -> bool:
    """Whether `_cuda` runs kernels on the CPU."""
    if _EMULATED:
        return True
    try:
        from adareduce._build_info import BUILD
    except ImportError:
        return False
    return BUILD.get("cuda") == "emulated"


def _load() -> ModuleType:
    if not _EMULATED:
        return importlib.import_module("adareduce._cuda")
    loader = importlib.machinery.ExtensionFileLoader("adareduce._cuda", _EMULATED)
    spec = importlib.util.spec_from_file_location("adareduce._cuda", _EMULATED, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Machine:
    """The device under test, real or emulated. Tensors live where kernels may follow pointers."""

    def __init__(self) -> None:
        self.module: Any = _load()
        self.testing: Any = self.module.testing
        self.is_emulated = is_emulated()
        self.device = torch.device("cpu" if self.is_emulated else "cuda")

    def stream(self) -> int:
        """The stream on which tensors here are made."""
        return 0 if self.is_emulated else torch.cuda.current_stream().cuda_stream

    def streams(self, count: int) -> tuple[list[int], Any]:
        """Streams of their own, and what keeps them alive. They come after all work so far."""
        self.testing.synchronize()
        if self.is_emulated:
            return [self.testing.make_stream() for _ in range(count)], None
        made = [torch.cuda.Stream() for _ in range(count)]
        return [stream.cuda_stream for stream in made], made

    def wait(self) -> None:
        """Until everything has run; errors of kernels are raised here."""
        self.testing.synchronize()

    def nothing(self, numel: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Memory in which an element that nobody writes is noticed: NaN, or a pattern."""
        tensor = torch.empty(numel, dtype=dtype, device=self.device)
        if dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        tensor.view(torch.uint8).fill_(0x5A)
        return tensor

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        return tensor.to(self.device, copy=True)


CODES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4,
    torch.float16: 5, torch.bfloat16: 6, torch.float32: 7, torch.float64: 8, torch.bool: 9,
}  # fmt: skip
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

DOUBLE = 2.0**-53  # one rounding in float64


def random(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Between -0.75 and 1.25, so that sums do not vanish."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator, dtype=torch.float64) * 2 - 0.75).to(dtype)


def clipped(segment: tuple[int, int], begin: int, end: int) -> slice:
    """The elements of a segment inside [begin, end)."""
    offset, numel = segment
    low = min(max(begin, offset), offset + numel)
    return slice(low, max(low, min(end, offset + numel)))


def unit_of(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 as the kernels round it: half types by way of float32."""
    half = dtype in (torch.float16, torch.bfloat16)
    return (exact.float() if half else exact).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers: tells 0.0 from -0.0, and NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def lay_out(numels: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Segments of a fused buffer and its number of elements, as the engine lays them out."""
    segments, numel = _core.testing.lay_out(numels)
    return segments, numel
