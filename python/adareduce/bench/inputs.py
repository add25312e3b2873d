"""Inputs that every rank can compute for all ranks, so that no oracle needs communication.

A tensor repeats a random pattern of at most ``PERIOD`` elements. What an elementwise reduction must
give has the same period, so an oracle costs little however large the tensor is.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# A prime: no cut of a tensor into shards, halves or pieces falls on it, so that whatever lands in a
# wrong place differs from what belongs there.
PERIOD = 1_048_573
_LARGEST_INTEGER = 2**40  # sums of thousands of ranks divide exactly enough in float64
_RANKS_WITH_FACTORS = 3  # 3 * 3 * 3 fits into int8
_LARGEST_EXPONENT = 8.0  # products of floats stay in [2^-8, 2^8], in float16's range


@dataclass(frozen=True)
class Source:
    """Makes the inputs of one row.

    Attributes:
        dtype: Of the elements.
        op: As on the command line; "none" where data are only moved. Nothing overflows under it.
        size: Number of ranks.
    """

    dtype: torch.dtype
    op: str
    size: int

    def period(self, rank: int, index: int, numel: int) -> torch.Tensor:
        """The first min(numel, PERIOD) elements of a rank's tensor number `index`, flat."""
        count = min(numel, PERIOD)
        generator = self._generator(rank, index, numel)
        if self.dtype.is_floating_point:
            if self.op == "prod":
                exponents = (2 * torch.rand(count, generator=generator) - 1) / self.size
                signs = 2 * torch.randint(2, (count,), generator=generator) - 1
                return (torch.exp2(_LARGEST_EXPONENT * exponents) * signs).to(self.dtype)
            # A part in common, so that Adasum meets vectors that are neither orthogonal nor equal.
            common = torch.rand(count, generator=self._generator(-1, index, numel))
            return (2 * torch.rand(count, generator=generator) + common - 1.5).to(self.dtype)
        low, high = self._integers(rank)
        return torch.randint(low, high + 1, (count,), generator=generator).to(self.dtype)

    def tensor(self, rank: int, index: int, numel: int) -> torch.Tensor:
        """The whole tensor, flat."""
        period = self.period(rank, index, numel)
        if numel <= PERIOD:
            return period
        whole = numel // PERIOD * PERIOD
        tensor = torch.empty(numel, dtype=self.dtype)
        tensor[:whole].view(-1, PERIOD).copy_(period)
        tensor[whole:] = period[: numel - whole]
        return tensor

    def _integers(self, rank: int) -> tuple[int, int]:
        if self.dtype == torch.bool:
            return 0, 1
        limits = torch.iinfo(self.dtype)
        high = min(limits.max, _LARGEST_INTEGER)
        if self.op == "prod":
            return 1, 3 if rank < _RANKS_WITH_FACTORS else 1
        if self.op in ("sum", "avg"):
            high //= self.size
        return (0 if limits.min == 0 else -high), high

    def _generator(self, rank: int, index: int, numel: int) -> torch.Generator:
        seed = zlib.crc32(f"{rank} {index} {numel} {self.dtype} {self.op}".encode())
        return torch.Generator().manual_seed(seed)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrites a tensor with what no result contains (NaN) or hardly ever does (a pattern)."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    tensor.view(torch.uint8).fill_(1 if tensor.dtype == torch.bool else 0x5A)
    return tensor


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within this, tensors that Python makes without contents are poisoned.

    Outputs of reductions and broadcasts are made so; an element that is never written shows. What
    all-gather and all-to-all return is allocated by the engine and is not reached.
    """
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *arguments, **keywords: poison(make(*arguments, **keywords))

    torch.empty, torch.empty_like = poisoned(empty), poisoned(empty_like)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def touch(tensor: torch.Tensor) -> None:
    """Reads a tensor."""
    tensor.reshape(-1).view(torch.uint8).sum()
