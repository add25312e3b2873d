"""The calls that compare_versions.py measures: what every version has, with exact results.

Inputs and expectations are compare_cases.py's; a training step has whole numbers as weights and
inputs, so that its gradients are whole numbers, too, and the optimizer's step is known.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from compare_cases import Case, Contents, make_case, most_calls

import adareduce.torch as hvd
from adareduce.bench.oracles import reduced

_FLOAT = torch.float32
_OPS = {"sum": hvd.Sum, "average": hvd.Average, "adasum": hvd.Adasum}
_WIDTHS = (256, 512, 512, 10)  # of the perceptron: 399,370 parameters
_BATCH = 32


class Call(abc.ABC):
    """One call of the library with its inputs.

    Attributes:
        case: The tensors.
        calls: In a row, which are one sample. Fixed, so that no version has another start.
        samples: In each turn.
    """

    case: Case
    calls: int = 1
    samples: int = 1

    @abc.abstractmethod
    def prepare(self) -> None:
        """Writes the inputs; not measured."""

    @abc.abstractmethod
    def run(self) -> Any:
        """The call; collective, blocks."""

    @abc.abstractmethod
    def count_wrong(self) -> int:
        """Elements that are not what ``calls`` calls must leave on this rank."""


class Memory:
    """Tensors by case. Calls that do not run at the same time have the same."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._made: dict[str, tuple[Case, Contents, list[torch.Tensor]]] = {}

    def of(self, key: str) -> tuple[Case, Contents, list[torch.Tensor]]:
        """The case, its contents and this rank's tensors."""
        if key not in self._made:
            case = make_case(key, _FLOAT)
            tensors = [torch.empty(shape) for shape in case.shapes]
            self._made[key] = (case, Contents(case, self.rank, self.size), tensors)
        return self._made[key]

    def of_rank(self, key: str, rank: int) -> torch.Tensor:
        """What a rank begins with in a case of one tensor."""
        case = make_case(key, _FLOAT)
        tensor = torch.empty(case.shapes[0])
        Contents(case, rank, self.size).fill([tensor.view(-1)])
        return tensor


class Reduction(Call):
    """``allreduce_`` of one tensor, ``grouped_allreduce_`` of several, or the asynchronous call."""

    def __init__(
        self, memory: Memory, key: str, op: str, calls: int = 1, is_async: bool = False
    ) -> None:
        self.case, self._contents, self._tensors = memory.of(key)
        self._flat = [tensor.view(-1) for tensor in self._tensors]
        self._word, self._op = op, _OPS[op]
        self.calls = min(calls, most_calls(memory.size, _FLOAT))
        self.samples = 5 if calls > 1 else 1
        self._call = self._form(is_async)

    def _form(self, is_async: bool) -> Callable[[], Any]:
        op, tensors, tensor = self._op, self._tensors, self._tensors[0]
        if is_async:
            return lambda: hvd.synchronize(hvd.allreduce_async_(tensor, op=op))
        if len(tensors) == 1:
            return lambda: hvd.allreduce_(tensor, op=op)
        return lambda: hvd.grouped_allreduce_(tensors, op=op)

    def prepare(self) -> None:
        self._contents.fill(self._flat)

    def run(self) -> Any:
        self._call()

    def count_wrong(self) -> int:
        return self._contents.count_wrong(self._word, self.calls, self._flat)


class Broadcast(Call):
    """``broadcast_`` of rank 0's tensor."""

    def __init__(self, memory: Memory, key: str) -> None:
        self.case, self._contents, (self._tensor,) = memory.of(key)
        self._expected = memory.of_rank(key, 0)

    def prepare(self) -> None:
        self._contents.fill([self._tensor.view(-1)])

    def run(self) -> Any:
        hvd.broadcast_(self._tensor, root_rank=0)

    def count_wrong(self) -> int:
        return int((self._tensor != self._expected).sum())


class Allgather(Call):
    """``allgather`` of a tensor of each rank."""

    calls, samples = 4, 2

    def __init__(self, memory: Memory, key: str) -> None:
        self.case, self._contents, (self._tensor,) = memory.of(key)
        self._expected = torch.cat([memory.of_rank(key, rank) for rank in range(memory.size)])
        self._result = torch.empty(0)

    def prepare(self) -> None:
        self._contents.fill([self._tensor.view(-1)])
        self._result = torch.empty(0)

    def run(self) -> Any:
        self._result = hvd.allgather(self._tensor)

    def count_wrong(self) -> int:
        if self._result.shape != self._expected.shape:
            return self._expected.numel()
        return int((self._result != self._expected).sum())


class TrainingStep(Call):
    """A step of SGD with learning rate 1 on a perceptron, by ``DistributedOptimizer``.

    Every step begins with the same weights w, so it must leave w - Average(gradients), or
    w - Adasum(gradients), which a float64 oracle knows of all ranks' gradients.
    """

    samples = 3

    def __init__(self, memory: Memory, op: str) -> None:
        generator = torch.Generator().manual_seed(1)
        layers: list[torch.nn.Module] = []
        for inner, outer in itertools.pairwise(_WIDTHS):
            layers += [torch.nn.Linear(inner, outer), torch.nn.ReLU()]
        self._model = torch.nn.Sequential(*layers[:-1])
        self._weights = list(self._model.parameters())
        for weight in self._weights:
            weight.data = torch.randint(-1, 2, weight.shape, generator=generator).float()
        self._start = [weight.detach().clone() for weight in self._weights]
        self.case = Case(f"step-{op}", _FLOAT, tuple(tuple(w.shape) for w in self._weights))
        gradients = [self._gradients(rank) for rank in range(memory.size)]
        word = {"average": "avg"}.get(op, op)
        self._expected = []
        for start, *of_ranks in zip(self._start, *gradients, strict=True):
            numel = start.numel()
            found = reduced(word, of_ranks, 0, numel, numel)
            after = start.view(-1).double() - found.values.double()
            # The oracle's own bound, and the roundings of w - start and start + result.
            bound = 2 * torch.finfo(_FLOAT).eps * (after.abs() + start.view(-1).abs())
            self._expected.append((after, bound if found.bound is None else bound + found.bound))
        self._inputs = self._inputs_of(memory.rank)
        self._optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self._weights, lr=1.0),
            named_parameters=list(self._model.named_parameters()),
            op=_OPS[op],
        )

    def _inputs_of(self, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + rank)
        return torch.randint(-1, 2, (_BATCH, _WIDTHS[0]), generator=generator).float()

    def _gradients(self, rank: int) -> list[torch.Tensor]:
        loss = self._model(self._inputs_of(rank)).sum()
        return [g.reshape(-1) for g in torch.autograd.grad(loss, self._weights)]

    def prepare(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._start)

    def run(self) -> Any:
        self._optimizer.zero_grad()
        self._model(self._inputs).sum().backward()
        self._optimizer.step()

    def count_wrong(self) -> int:
        wrong = 0
        for weight, (after, bound) in zip(self._weights, self._expected, strict=True):
            distance = (weight.detach().view(-1).double() - after).abs()
            wrong += int((~(distance <= bound)).sum())  # NaN is wrong
        return wrong


MAKERS: dict[str, Callable[[Memory], Call]] = {
    "sum-4K": lambda memory: Reduction(memory, "4K", "sum", calls=50),
    "async-4K": lambda memory: Reduction(memory, "4K", "sum", calls=50, is_async=True),
    "sum-64K": lambda memory: Reduction(memory, "64K", "sum", calls=20),
    "sum-1M": lambda memory: Reduction(memory, "1M", "sum", calls=4),
    "sum-16M": lambda memory: Reduction(memory, "16M", "sum"),
    "adasum-1M": lambda memory: Reduction(memory, "1M", "adasum", calls=4),
    "sum-resnet50": lambda memory: Reduction(memory, "resnet50", "sum"),
    "adasum-resnet50": lambda memory: Reduction(memory, "resnet50", "adasum"),
    "sum-tiny2000": lambda memory: Reduction(memory, "tiny2000", "sum", calls=2),
    "broadcast-16M": lambda memory: Broadcast(memory, "16M"),
    "allgather-1M": lambda memory: Allgather(memory, "1M"),
    "step-average": lambda memory: TrainingStep(memory, "average"),
    "step-adasum": lambda memory: TrainingStep(memory, "adasum"),
}
