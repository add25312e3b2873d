"""The collectives: which inputs they get, what they move, what must come out.

Conventions of nccl-tests: the size of a row is that of the largest buffer of a rank (the output of
an allgather, the input of a reducescatter), and busbw = algbw x factor. docs/performance.md derives
the factors.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch

import adareduce.torch as hvd
from adareduce.bench import presets
from adareduce.bench.arguments import Settings
from adareduce.bench.inputs import Source, poison, touch
from adareduce.bench.oracles import Expected, copied, reduced, squared_norms

_OPS = {"avg": "Average", "sum": "Sum", "prod": "Product", "min": "Min", "max": "Max",
        "adasum": "Adasum"}  # fmt: skip


# Of mean |g_i|^2: docs/algorithms.md, "Variance and norm".
_STATISTICS_TOLERANCE = 1e-6


class Case(abc.ABC):
    """One row: a collective on tensors of given sizes. Nothing here is collective but ``run*``.

    Args:
        settings: The command line.
        total: Bytes of the row, for this collective rounded down to whole elements; or the
            tensors' numbers of elements.
        rank: This rank.
        size: Number of ranks.
    """

    redop = "none"
    root = -1
    ranks_agree = True  # all ranks have the same outputs

    def __init__(self, settings: Settings, total: int | list[int], rank: int, size: int) -> None:
        self.settings = settings
        self.rank = rank
        self.size = size
        self.dtype = settings.dtype
        self.numels = self._split(total // self.dtype.itemsize) if isinstance(total, int) else total
        self._source = Source(self.dtype, settings.op if self.redop != "none" else "none", size)
        self.inputs = [
            self._source.tensor(rank, index, numel).to(settings.device)
            for index, numel in enumerate(self.numels)
        ]

    @staticmethod
    @abc.abstractmethod
    def factor(size: int) -> float:
        """Busbw is algbw times this, for `size` ranks."""

    @abc.abstractmethod
    def run(self) -> list[torch.Tensor]:
        """Out of place, into new tensors. Collective, blocks."""

    @abc.abstractmethod
    def expected(self) -> list[list[Expected]]:
        """What each output of this rank must be, stretch by stretch."""

    def touch(self) -> None:
        """Reads the inputs, so that every contender finds its own in the cache, if they fit."""
        for tensor in self.inputs:
            touch(tensor)

    @property
    def num_bytes(self) -> int:
        """The size of the row."""
        return sum(self.numels) * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Elements, as nccl-tests counts them: those of one rank's part, where there are parts."""
        return sum(self.numels)

    def _split(self, numel: int) -> list[int]:
        """Elements of the inputs of a row of `numel` elements: as equal as they can be."""
        unit = self._unit()
        layers = self.settings.layers if isinstance(self.settings.layers, int) else 1
        units, parts = numel // unit, max(1, min(layers, numel // unit))
        return [unit * (units // parts + (part < units % parts)) for part in range(parts)]

    def _unit(self) -> int:
        """Elements of a row come in multiples of this."""
        return 1

    def periods(self, index: int) -> list[torch.Tensor]:
        """The first period of every rank's tensor number `index`."""
        return [self._source.period(rank, index, self.numels[index]) for rank in range(self.size)]


class InPlaceCase(Case):
    """What can leave its outputs in the inputs."""

    @abc.abstractmethod
    def run_in_place(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Into the buffers that ``restore`` has filled. Collective, blocks."""

    def restore(self, buffers: Sequence[torch.Tensor]) -> None:
        """Puts the inputs into the buffers of ``run_in_place``."""
        for buffer, tensor in zip(buffers, self.inputs, strict=True):
            buffer.copy_(tensor)


class Reduction(Case):
    """What does arithmetic."""

    def __init__(self, settings: Settings, total: int | list[int], rank: int, size: int) -> None:
        self.redop = settings.op
        self._op = hvd.ReduceOp[_OPS[settings.op]]
        super().__init__(settings, total, rank, size)


class Allreduce(Reduction, InPlaceCase):
    """Everybody gets the reduction of all."""

    @staticmethod
    def factor(size: int) -> float:
        """A rank sends and receives this share of the buffer at least, by rings and halving."""
        return 2 * (size - 1) / size

    def run(self) -> list[torch.Tensor]:
        """Out of place."""
        if len(self.inputs) == 1:
            return [hvd.allreduce(self.inputs[0], op=self._op)]
        return hvd.grouped_allreduce(self.inputs, op=self._op)

    def run_in_place(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """In place."""
        if len(buffers) == 1:
            return [hvd.allreduce_(buffers[0], op=self._op)]
        return hvd.grouped_allreduce_(buffers, op=self._op)

    def run_plain(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """The call that ``run_with_stats`` is compared with."""
        return hvd.grouped_allreduce_(buffers, op=self._op)

    def run_with_stats(
        self, buffers: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], hvd.ReductionStats]:
        """In place, with AdaScale's statistics."""
        return hvd.grouped_allreduce_with_stats_(buffers, op=self._op)

    def count_wrong_statistics(self, stats: hvd.ReductionStats) -> int:
        """How many of a reduction's statistics are further from float64 than they may be."""
        squares = [squared_norms(self.periods(i), numel) for i, numel in enumerate(self.numels)]
        unit = torch.finfo(self.dtype).eps
        if stats.orthogonality is not None:
            # Each level of the tree rounds the result to the type.
            norms = [squared_norms([o[0].values], n) for o, n in zip(self.expected(), self.numels,
                                                                     strict=True)]  # fmt: skip
            levels = self.size.bit_length()
            expected = [norm / square for norm, square in zip(norms, squares, strict=True)]
            allowed = 4 * levels * unit + _STATISTICS_TOLERANCE
            found = stats.orthogonality.tolist()
            return sum(not abs(f - e) <= allowed for f, e in zip(found, expected, strict=True))
        assert stats.groups is not None
        total = sum(squares)
        of_mean = 0.0
        for index, numel in enumerate(self.numels):
            mean = torch.stack([period.double() for period in self.periods(index)]).mean(dim=0)
            of_mean += squared_norms([mean], numel)
        row = stats.groups[0].tolist()
        errors = [row[0] - total, row[1] - of_mean]
        if self.size > 1:
            variance = (total - self.size * of_mean) / (self.size - 1)
            errors += [row[2] - variance, row[3] - (of_mean - variance / self.size)]
        return sum(not abs(e) <= _STATISTICS_TOLERANCE * total / self.size for e in errors)

    def expected(self) -> list[list[Expected]]:
        """The reduction."""
        return [
            [reduced(self.redop, self.periods(index), 0, numel, numel)]
            for index, numel in enumerate(self.numels)
        ]


class Reducescatter(Reduction):
    """Everybody gets a part of the reduction of all."""

    ranks_agree = False

    @staticmethod
    def factor(size: int) -> float:
        """Everything but its own part leaves a rank."""
        return (size - 1) / size

    def run(self) -> list[torch.Tensor]:
        """Out of place."""
        if len(self.inputs) == 1:
            return [hvd.reducescatter(self.inputs[0], op=self._op)]
        return hvd.grouped_reducescatter(self.inputs, op=self._op)

    def expected(self) -> list[list[Expected]]:
        """This rank's part of the reduction."""
        stretches = []
        for index, numel in enumerate(self.numels):
            part = numel // self.size
            stretches.append(
                [reduced(self.redop, self.periods(index), self.rank * part, part, numel)]
            )
        return stretches

    @property
    def count(self) -> int:
        """Elements that a rank gets."""
        return sum(self.numels) // self.size

    def _unit(self) -> int:
        return self.size


class Allgather(Case):
    """Everybody gets what everybody has."""

    @staticmethod
    def factor(size: int) -> float:
        """Everything but its own part reaches a rank."""
        return (size - 1) / size

    def run(self) -> list[torch.Tensor]:
        """Out of place."""
        if len(self.inputs) == 1:
            return [hvd.allgather(self.inputs[0])]
        return hvd.grouped_allgather(self.inputs)

    def expected(self) -> list[list[Expected]]:
        """The inputs of all ranks, one after the other."""
        return [
            [copied(period, 0, numel) for period in self.periods(index)]
            for index, numel in enumerate(self.numels)
        ]

    @property
    def num_bytes(self) -> int:
        """The output."""
        return super().num_bytes * self.size

    def _split(self, numel: int) -> list[int]:
        return super()._split(numel // self.size)


class Alltoall(Case):
    """Everybody gets a part from everybody."""

    ranks_agree = False

    @staticmethod
    def factor(size: int) -> float:
        """Everything but its part for itself leaves a rank."""
        return (size - 1) / size

    def run(self) -> list[torch.Tensor]:
        """Out of place."""
        result = hvd.alltoall(self.inputs[0])
        assert isinstance(result, torch.Tensor)  # no splits went in
        return [result]

    def expected(self) -> list[list[Expected]]:
        """This rank's part of all ranks' inputs."""
        part = self.numels[0] // self.size
        return [[copied(period, self.rank * part, part) for period in self.periods(0)]]

    @property
    def count(self) -> int:
        """Elements that a rank gets from another."""
        return self.numels[0] // self.size

    def _unit(self) -> int:
        return self.size


class Broadcast(InPlaceCase):
    """Everybody gets what the root has."""

    def __init__(self, settings: Settings, total: int | list[int], rank: int, size: int) -> None:
        self.root = settings.root
        super().__init__(settings, total, rank, size)

    @staticmethod
    def factor(size: int) -> float:
        """Everything leaves the root."""
        return 1.0

    def run(self) -> list[torch.Tensor]:
        """Out of place."""
        return [hvd.broadcast(self.inputs[0], self.root)]

    def run_in_place(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """In place."""
        return [hvd.broadcast_(buffers[0], self.root)]

    def restore(self, buffers: Sequence[torch.Tensor]) -> None:
        """The root's input; the others are poisoned."""
        if self.rank == self.root:
            super().restore(buffers)
        else:
            for buffer in buffers:
                poison(buffer)

    def expected(self) -> list[list[Expected]]:
        """The root's input."""
        numel = self.numels[0]
        return [[copied(self._source.period(self.root, 0, numel), 0, numel)]]


class Barrier(Case):
    """Nobody goes on before everybody has come; latency only."""

    @staticmethod
    def factor(size: int) -> float:
        """No data."""
        return 0.0

    def run(self) -> list[torch.Tensor]:
        """Waits."""
        hvd.barrier()
        return []

    def expected(self) -> list[list[Expected]]:
        """Nothing."""
        return []

    def _split(self, numel: int) -> list[int]:
        return []


_CASES: dict[str, type[Case]] = {
    "allreduce": Allreduce,
    "reducescatter": Reducescatter,
    "allgather": Allgather,
    "alltoall": Alltoall,
    "broadcast": Broadcast,
    "barrier": Barrier,
}


def make_case(settings: Settings, num_bytes: int, rank: int, size: int) -> Case:
    """The row of a size in bytes, or of the preset."""
    total: int | list[int] = num_bytes
    if isinstance(settings.layers, str):
        total = [math.prod(shape) for shape in presets.PRESETS[settings.layers]()]
    return _CASES[settings.collective](settings, total, rank, size)


def factor(collective: str, size: int) -> float:
    """Busbw / algbw of a collective over `size` ranks."""
    return _CASES[collective].factor(size)
