"""The kernels that benchmarks/gpu_kernels.py measures, and what torch does instead of each."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
from device import CODES, Machine, lay_out


@dataclass(frozen=True)
class Contender:
    """A kernel, or what torch does instead. `touches`: arrays that it reads or writes."""

    name: str
    touches: float
    run: Callable[[Buffers], Any]
    beside: str = ""  # the kernel of ours that does this work


class Buffers:
    """One set: tensors, the fused buffers that they make, and everything that kernels write."""

    def __init__(self, machine: Machine, numels: list[int], dtype: torch.dtype) -> None:
        self.machine, self.dtype = machine, dtype
        self.segments, self.numel = lay_out(numels)
        self.handle = machine.testing.Buffer(self.segments, CODES[dtype])
        self.tensors = [self._random(numel) for numel in numels]
        self.lower, self.upper = self._random(self.numel), self._random(self.numel)
        self.out = machine.nothing(self.numel, dtype)
        self.stats = machine.nothing(3 * len(numels))
        self.squares = machine.nothing(len(numels))
        self.nonfinite = machine.nothing(len(numels), torch.int64)
        self.pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.lowers, self.uppers = self.views(self.lower), self.views(self.upper)
        self.outs = self.views(self.out)

    def _random(self, numel: int) -> torch.Tensor:
        values = torch.rand(numel, device=self.machine.device, dtype=torch.float32)
        return (values - 0.25).to(self.dtype)

    def views(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """The tensors inside a fused buffer."""
        return [fused[offset : offset + numel] for offset, numel in self.segments]


def pair_stats(b: Buffers, accumulator: str = "") -> None:
    b.machine.testing.pair_stats(b.handle, b.lower.data_ptr(), b.upper.data_ptr(), 0, b.numel,
                                 b.stats.data_ptr(), b.machine.stream(), accumulator)  # fmt: skip


def pair_combine(b: Buffers) -> None:
    b.machine.testing.pair_combine(b.handle, b.lower.data_ptr(), b.upper.data_ptr(), 0, b.numel,
                                   b.stats.data_ptr(), b.out.data_ptr(),
                                   b.machine.stream())  # fmt: skip


def pack(b: Buffers, squares: bool = False) -> None:
    b.machine.testing.pack(b.handle, b.pointers, b.out.data_ptr(), 1.0,
                           b.squares.data_ptr() if squares else 0, b.machine.stream())  # fmt: skip


def unpack(b: Buffers, counts: bool = False) -> None:
    b.machine.testing.unpack(b.handle, b.lower.data_ptr(), b.pointers, 1.0,
                             b.nonfinite.data_ptr() if counts else 0,
                             b.squares.data_ptr() if counts else 0,
                             b.machine.stream())  # fmt: skip


def foreach_stats(b: Buffers) -> None:
    torch._foreach_norm(b.lowers)
    torch._foreach_norm(b.uppers)
    torch._foreach_norm(torch._foreach_mul(b.lowers, b.uppers), 1)


def dots(b: Buffers) -> None:
    for lower, upper in zip(b.lowers, b.uppers, strict=True):
        torch.stack([lower.dot(upper), lower.dot(lower), upper.dot(upper)])


def foreach_combine(b: Buffers) -> None:
    scaled = torch._foreach_mul(b.lowers, [0.75] * len(b.lowers))
    torch._foreach_add_(scaled, torch._foreach_mul(b.uppers, [0.75] * len(b.uppers)))


def combine_expression(b: Buffers) -> None:
    for lower, upper, out in zip(b.lowers, b.uppers, b.outs, strict=True):
        torch.add(0.75 * lower, upper, alpha=0.75, out=out)


def foreach_pack_and_norm(b: Buffers) -> None:
    torch._foreach_copy_(b.outs, b.tensors)
    torch._foreach_norm(b.outs)


# Yardsticks, ours, and theirs. foreach_* are torch's multi_tensor_apply. _foreach_norm reads one
# operand, where pair_stats reads two; foreach_stats takes three norms and a product, whose sum
# of absolute values it forms.
YARDSTICK = Contender("copy", 2, lambda b: b.out.copy_(b.lower))
OURS = [
    Contender("pair_stats", 2, pair_stats),
    Contender("pair_stats_f32", 2, lambda b: pair_stats(b, "f32")),
    Contender("pair_combine", 3, pair_combine),
    Contender("pack", 2, pack),
    Contender("pack_and_squares", 2, lambda b: pack(b, squares=True)),
    Contender("unpack", 2, unpack),
    Contender("unpack_and_statistics", 2, lambda b: unpack(b, counts=True)),
]
THEIRS = [
    Contender("foreach_norm", 1, lambda b: torch._foreach_norm(b.lowers), "pair_stats"),
    Contender("foreach_stats", 7, foreach_stats, "pair_stats"),
    Contender("dots", 6, dots, "pair_stats"),
    Contender("foreach_combine", 7, foreach_combine, "pair_combine"),
    Contender("combine_expression", 5, combine_expression, "pair_combine"),
    Contender("foreach_copy", 2, lambda b: torch._foreach_copy_(b.outs, b.tensors), "pack"),
    Contender("cat", 2, lambda b: torch.cat(b.tensors), "pack"),
    Contender("foreach_copy_and_norm", 3, foreach_pack_and_norm, "pack_and_squares"),
    Contender("foreach_copy_back", 2, lambda b: torch._foreach_copy_(b.tensors, b.lowers),
              "unpack"),
]  # fmt: skip


def numels_of(name: str, dtype: torch.dtype) -> list[int]:
    """Elements of the tensors of a set."""
    if name == "tiny2000":  # 1 to 64 elements: launches are all
        return [1 + 37 * index % 64 for index in range(2000)]
    if name == "small2000":  # 8 Ki elements on average, odd numbers
        return [257 * (1 + 37 * index % 64) for index in range(2000)]
    tensors, total = (20, 2**16) if name == "smoke" else (200, 2**30 // dtype.itemsize)
    # From 1 to `tensors` parts, mixed, and an element more, so that few end on 16 bytes.
    unit = total // (tensors * (tensors + 1) // 2)
    return [unit * (1 + 7 * index % tensors) + 1 for index in range(tensors)]


def wrong(buffers: Buffers) -> list[str]:
    """Names of kernels whose results are not torch's."""
    guilty = []
    pair_stats(buffers)
    buffers.machine.wait()
    table = buffers.stats.view(-1, 3)
    for row, lower, upper in zip(table.tolist(), buffers.lowers, buffers.uppers, strict=True):
        a, b = lower.double(), upper.double()
        scale = math.sqrt(float(a @ a) * float(b @ b)) + 1e-30
        expected = (float(a @ b), float(a @ a), float(b @ b))
        if not all(abs(f - e) <= 1e-10 * (scale + abs(e)) for f, e in zip(row, expected,
                                                                        strict=True)):  # fmt: skip
            guilty.append("pair_stats")
            break
    buffers.out.fill_(float("nan"))
    pair_combine(buffers)
    buffers.machine.wait()
    unit = torch.finfo(buffers.dtype).eps
    for (dot, aa, bb), lower, upper, out in zip(
        table.tolist(), buffers.lowers, buffers.uppers, buffers.outs, strict=True
    ):
        a, b = (1 - dot / (2 * aa)) * lower.double(), (1 - dot / (2 * bb)) * upper.double()
        if not bool(((out.double() - (a + b)).abs() <= unit * (a.abs() + b.abs())).all()):
            guilty.append("pair_combine")
            break
    buffers.out.fill_(float("nan"))
    pack(buffers, squares=True)
    buffers.machine.wait()
    pairs = list(zip(buffers.tensors, buffers.outs, strict=True))
    if not all(torch.equal(tensor, out) for tensor, out in pairs):
        guilty.append("pack")
    for tensor in buffers.tensors:
        tensor.fill_(float("nan"))
    unpack(buffers, counts=True)
    buffers.machine.wait()
    pairs = list(zip(buffers.tensors, buffers.lowers, strict=True))
    if not all(torch.equal(tensor, lower) for tensor, lower in pairs):
        guilty.append("unpack")
    return guilty
