"""Inputs that every rank can compute for all ranks, so that no oracle needs communication."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import adareduce.torch as hvd

FLOATS = [torch.float32, torch.float64]
ALL_DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.bool,
]  # fmt: skip
SHAPES = [(), (0,), (1,), (5,), (8,), (3, 0, 2), (17, 33), (40_003,)]


def integers(rank: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers in any dtype: sums over few ranks are exact, whatever their order."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    values = torch.randint(-9, 10, tuple(shape), generator=generator)
    return (
        (values > 0)
        if dtype == torch.bool
        else (values.abs() if dtype == torch.uint8 else values).to(dtype)
    )


def normals(rank: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random numbers whose norms differ between ranks."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * (rank + 1)).to(
        dtype
    )


def of_all_ranks(make: object, *arguments: object) -> list[torch.Tensor]:
    """make(rank, *arguments) for every rank."""
    return [make(rank, *arguments) for rank in range(hvd.size())]  # type: ignore[operator]


def total(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, exact for integers."""
    return torch.stack([tensor.to(torch.float64) for tensor in tensors]).sum(0).to(tensors[0].dtype)


def arrays(tensors: Sequence[torch.Tensor]) -> list[NDArray]:
    return [tensor.numpy() for tensor in tensors]


def bits(tensor: torch.Tensor) -> bytes:
    """Shape and bytes of a tensor: tells 0.0 from -0.0."""
    return repr((tuple(tensor.shape), tensor.dtype)).encode() + _bytes(tensor)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal values, shape and dtype, without a tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_library_works() -> None:
    """An all-reduce of exact integers; run it after errors that must leave the library usable."""
    values = of_all_ranks(integers, (7,), torch.float32, 99)
    assert_equal(hvd.allreduce(values[hvd.rank()], op=hvd.Sum), total(values))


def rank_words(ranks: Sequence[int]) -> str:
    """As messages name ranks: "rank 3", "ranks 0, 1 and 2"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def norm(values: NDArray) -> float:
    return float(np.linalg.norm(values.astype(np.longdouble).ravel()))
