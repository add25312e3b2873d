"""What compare_peers.py reduces: sizes and sets of tensors, their contents, and what must come out.

Elements are small whole numbers, so that the sum of all ranks is exact in every type that has eight
bits of precision; Adasum is compared with float64 (``bench/oracles.py``). A tensor repeats a
pattern of a prime length, so a block that lands in a wrong place is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adareduce.bench import presets
from adareduce.bench.oracles import Expected, reduced
from adareduce.bench.verification import differs

PERIOD = 65_521  # the largest prime below 2^16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETS = ("resnet50", "bert-large", "tiny2000")
ALIASES = {"resnet": "resnet50", "bert": "bert-large", "tiny": "tiny2000"}
# Divisors of BERT-large's width and vocabulary, from 320 MB to what fits anywhere. The whole model,
# whose calls take seconds, is measured where "bert-large/1/1" is asked for.
BERT_DIVISORS = ((2, 4), (4, 16), (8, 64))
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_LARGEST = 3
_SHORT = 16  # elements; shorter vectors of two ranks are easily opposite
_COMMON = -1  # a rank's number where the part is meant that all ranks have in common
_MOST_DOUBLINGS = 100  # sums of so many calls in a row stay below 2^127, with room for the inputs
# Per rank: the tensors, a flat buffer, shared memory, what is packed, and what libraries allocate.
_COPIES_OF_A_SIZE, _COPIES_OF_A_SET = 4, 6
_PROCESS_BYTES = 400 * 2**20


@dataclass(frozen=True)
class Case:
    """Tensors that are reduced in one call.

    Attributes:
        key: "64M", "resnet50", "bert-large/2/4": a size, a set, a set with divisors.
        dtype: Of the elements.
        shapes: Of the tensors.
    """

    key: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numels(self) -> list[int]:
        """Elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_bytes(self) -> int:
        """Of all tensors of a rank."""
        return sum(self.numels) * self.dtype.itemsize

    @property
    def is_set(self) -> bool:
        """Whether these are the tensors of a model rather than one of a given size."""
        return len(self.shapes) > 1

    def memory_bytes(self, num_ranks: int) -> int:
        """What all ranks together need at most to measure it."""
        copies = _COPIES_OF_A_SET if self.is_set else _COPIES_OF_A_SIZE
        return num_ranks * (copies * self.num_bytes + _PROCESS_BYTES)


def make_case(key: str, dtype: torch.dtype) -> Case:
    """The case of a key; ValueError where there is none."""
    name, *divisors = key.split("/")
    if name == "bert-large":
        width, words = map(int, divisors or BERT_DIVISORS[0])
        shapes = presets.bert_large(width, words)
    elif name in presets.PRESETS:
        shapes = presets.PRESETS[name]()
    else:
        shapes = [(size_bytes(key) // dtype.itemsize,)]
    return Case(key, dtype, tuple(shapes))


def size_bytes(text: str) -> int:
    """Bytes of "4K", "64M", "1G"; ValueError for anything else."""
    number, unit = text[:-1], text[-1:].upper()
    if not number.isdecimal() or int(number) == 0 or unit not in _UNITS:
        raise ValueError(f"a size must be like 4K or 64M, got {text!r}")
    return int(number) * _UNITS[unit]


def bert_key(num_ranks: int, available_bytes: int) -> str:
    """BERT-large with the smallest divisors with which it fits into so much memory."""
    keys = [f"bert-large/{width}/{words}" for width, words in BERT_DIVISORS]
    for key in keys:
        if make_case(key, torch.float32).memory_bytes(num_ranks) <= available_bytes:
            return key
    return keys[-1]


def available_memory() -> int:
    """Bytes that processes may still allocate: the machine's, or what this control group is left.

    Source: proc(5), MemAvailable; the kernel's cgroup-v2, memory.max and memory.current.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    available = kibibytes * 2**10
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


class Contents:
    """The tensors' elements before a call and after it, known to every rank without communicating.

    Args:
        case: The tensors.
        rank: Whose elements ``fill`` writes.
        size: Number of ranks.
    """

    def __init__(self, case: Case, rank: int, size: int) -> None:
        self._case = case
        self._size = size
        self._mine = [self.period(rank, index) for index in range(len(case.shapes))]
        self._short = [i for i, numel in enumerate(case.numels) if numel < PERIOD]
        self._long = [i for i, numel in enumerate(case.numels) if numel >= PERIOD]
        self._expected: dict[tuple[str, int], list[Expected]] = {}
        self._short_expected: dict[tuple[str, int], Expected] = {}

    def period(self, rank: int, index: int) -> torch.Tensor:
        """The first min(numel, PERIOD) elements of a rank's tensor number `index`."""
        # A part in common, as gradients have: neither orthogonal nor equal.
        common = self._integers(_COMMON, index, 1)
        integers = common + self._integers(rank, index, _LARGEST - 1)
        if integers.numel() < _SHORT:
            # Gradients do not cancel exactly, which Adasum would compute in another, slower way.
            integers = integers.abs().clamp(min=1)
        return integers.to(self._case.dtype)

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Writes this rank's elements into flat tensors."""
        if self._short:  # at once, for there may be thousands
            torch._foreach_copy_(
                [tensors[i] for i in self._short], [self._mine[i] for i in self._short]
            )
        for index in self._long:
            tensor, period = tensors[index], self._mine[index]
            whole = tensor.numel() // PERIOD * PERIOD
            tensor[:whole].view(-1, PERIOD).copy_(period)
            tensor[whole:] = period[: tensor.numel() - whole]

    def count_wrong(self, op: str, calls: int, tensors: Sequence[torch.Tensor]) -> int:
        """Elements that are not what `calls` calls in a row, in place, must leave on this rank."""
        expected = self._after_all(op, calls)
        wrong = sum(int(differs(tensors[i], [expected[i]]).sum()) for i in self._long)
        if self._short:
            if (op, calls) not in self._short_expected:
                self._short_expected[op, calls] = _joined([expected[i] for i in self._short])
            joined = torch.cat([tensors[i] for i in self._short])
            wrong += int(differs(joined, [self._short_expected[op, calls]]).sum())
        return wrong

    def expected(self, op: str) -> list[list[Expected]]:
        """What one call must leave, as ``verification.count_wrong`` wants it."""
        return [[expected] for expected in self._after_all(op, 1)]

    def _after_all(self, op: str, calls: int) -> list[Expected]:
        if (op, calls) not in self._expected:
            indices = range(len(self._case.shapes))
            self._expected[op, calls] = [self._after(op, calls, index) for index in indices]
        return self._expected[op, calls]

    def _after(self, op: str, calls: int, index: int) -> Expected:
        numel = self._case.numels[index]
        periods = [self.period(rank, index) for rank in range(self._size)]
        if op == "sum":
            total = torch.stack([period.double() for period in periods]).sum(dim=0)
            # From the second call on all ranks have the same, which each call multiplies.
            total *= float(self._size) ** (calls - 1)
            return Expected(total.to(self._case.dtype), None, 0, numel)
        # The Adasum, and the average, of equal tensors are these tensors.
        return reduced({"average": "avg"}.get(op, op), periods, 0, numel, numel)

    def _integers(self, rank: int, index: int, largest: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1 + index + 10_000 * (rank + 1))
        count = min(self._case.numels[index], PERIOD)
        return torch.randint(-largest, largest + 1, (count,), generator=generator)


def _joined(parts: Sequence[Expected]) -> Expected:
    """What tensors one after the other must be; none of them repeats."""
    values = torch.cat([part.values for part in parts])
    bounds = [part.bound for part in parts if part.bound is not None]
    return Expected(values, torch.cat(bounds) if bounds else None, 0, values.numel())


def most_calls(size: int, dtype: torch.dtype) -> int:
    """How many sums in a row, in place, remain exact and finite."""
    if size & (size - 1) == 0:
        return _MOST_DOUBLINGS // max(1, size.bit_length() - 1)
    most = round(2 / torch.finfo(dtype).eps)  # up to here whole numbers are exact
    return max(1, 1 + int(math.log(most / (_LARGEST * size), size)))
