"""What ``DistributedOptimizer`` is told: names of parameters, and which of them travel together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adareduce.ops import ReduceOp
from adareduce.runtime import ProcessSet
from adareduce.torch.buckets import cut_buckets, in_order
from adareduce.torch.compression import Compressor


@dataclass
class Options:
    """What ``DistributedOptimizer`` was told, checked, as far as its forms need it."""

    names: dict[int, str] | None
    groups: int | Sequence[Sequence[torch.Tensor]] | None
    bucket_bytes: int
    op: ReduceOp
    predivide_factor: float
    passes_per_step: int
    compression: type[Compressor]
    sparse_as_dense: bool
    gradient_as_bucket_view: bool
    process_set: ProcessSet

    def names_of(self, groups: Sequence[Sequence[torch.Tensor]]) -> list[str]:
        """A name for each parameter of an optimizer's groups."""
        names = self.names or {}
        return [
            names.get(id(parameter), f"parameter {place} of group {number}")
            for number, group in enumerate(groups)
            for place, parameter in enumerate(group)
        ]

    def buckets_of(self, groups: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """The parameters that require a gradient, as they travel together.

        Backward is expected to go through the names, or else the groups, from the last to the
        first.
        """
        parameters = [parameter for group in groups for parameter in group]
        if self.names is not None:
            places = {key: place for place, key in enumerate(self.names)}
            parameters.sort(key=lambda parameter: places.get(id(parameter), len(places)))
        trainable = [parameter for parameter in reversed(parameters) if parameter.requires_grad]
        return explicit_buckets(trainable, self.groups, self.bucket_bytes)


def explicit_buckets(
    parameters: Sequence[torch.Tensor],
    groups: int | Sequence[Sequence[torch.Tensor]] | None,
    bucket_bytes: int,
) -> list[list[torch.Tensor]]:
    """Buckets as ``DistributedOptimizer(groups=...)`` asks for them.

    Args:
        parameters: Those that require a gradient, in the order in which backward finishes them.
        groups: A number of buckets, which get equally many parameters; or lists of parameters, a
            bucket each: the parameters in none of them are cut by size.
        bucket_bytes: As for ``cut_buckets``.
    """
    if groups is None:
        return cut_buckets(parameters, bucket_bytes)
    if isinstance(groups, int):
        count = min(groups, len(parameters))
        cuts = [len(parameters) * number // count for number in range(count + 1)] if count else []
        return [list(parameters[a:b]) for a, b in itertools.pairwise(cuts)]
    known = {id(parameter) for parameter in parameters}
    listed = {id(tensor) for group in groups for tensor in group}
    buckets = [[tensor for tensor in group if id(tensor) in known] for group in groups]
    rest = [parameter for parameter in parameters if id(parameter) not in listed]
    return in_order(
        [*(bucket for bucket in buckets if bucket), *cut_buckets(rest, bucket_bytes)], parameters
    )


def check_groups(groups: Any, parameters: Iterable[torch.Tensor]) -> None:
    """Refuses a ``groups=`` that is not of its form.

    Raises:
        ValueError: Neither a positive number nor lists of parameters, each listed once.
    """
    if groups is None:
        return
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 1:
            raise ValueError(f"DistributedOptimizer: groups must be at least 1, got {groups}")
        return
    if not isinstance(groups, list | tuple) or not all(isinstance(g, list | tuple) for g in groups):
        raise ValueError(
            "DistributedOptimizer: groups must be a number or a list of lists of parameters, got"
            f" {groups!r:.80}"
        )
    known = {id(parameter) for parameter in parameters}
    seen: set[int] = set()
    for number, group in enumerate(groups):
        for tensor in group:
            if not isinstance(tensor, torch.Tensor) or id(tensor) not in known:
                what = type(tensor).__name__
                raise ValueError(
                    "DistributedOptimizer: groups must consist of parameters of the optimizer, got"
                    f" another {what} in group {number}"
                )
            if id(tensor) in seen:
                raise ValueError(
                    "DistributedOptimizer: groups must list a parameter once, got one of group"
                    f" {number} twice"
                )
            seen.add(id(tensor))


def check_names(named_parameters: Any, parameters: Sequence[torch.Tensor]) -> dict[int, str] | None:
    """Names by the parameter's id, in the order given; None where there are none.

    Raises:
        ValueError: Not pairs of name and parameter, a name twice, or a parameter without a name.
    """
    if named_parameters is None:
        return None
    if isinstance(named_parameters, Mapping):
        named_parameters = named_parameters.items()
    named = list(named_parameters)
    for entry in named:
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise ValueError(
                "DistributedOptimizer: named_parameters must be pairs of name and parameter, as"
                f" model.named_parameters() gives them, got an entry {entry!r:.80}"
            )
    twice = [name for name, count in Counter(str(name) for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(
            f"DistributedOptimizer: named_parameters must have unique names, got {', '.join(twice)}"
            " more than once"
        )
    names = {id(parameter): str(name) for name, parameter in named}
    missing = [place for place, parameter in enumerate(parameters) if id(parameter) not in names]
    if missing:
        shapes = ", ".join(str(tuple(parameters[place].shape)) for place in missing[:5])
        raise ValueError(
            "DistributedOptimizer: named_parameters must name all parameters of the optimizer, got"
            f" none for {len(missing)} of {len(parameters)}, with the shapes {shapes}"
        )
    return names
