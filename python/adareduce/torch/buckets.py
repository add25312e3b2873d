"""Which parameters travel together. The same plan on every rank, from names and sizes alone."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch

from adareduce.runtime import ProcessSet
from adareduce.torch import streams
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.flat_buffers import Place, lay_out
from adareduce.torch.handles import Handle
from adareduce.torch.statistics import ReductionStats
from adareduce.torch.tensors import dense_strides


def cut_buckets(parameters: Sequence[torch.Tensor], bucket_bytes: int) -> list[list[torch.Tensor]]:
    """Cuts parameters into buckets of one dtype and device each.

    Args:
        parameters: In the order in which backward is expected to finish their gradients.
        bucket_bytes: A bucket is closed before it would exceed this; a parameter that is larger
            has a bucket of its own.

    Returns:
        The buckets, ordered by the last of their parameters.
    """
    finished: list[list[torch.Tensor]] = []
    growing: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    num_bytes: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        more = parameter.numel() * parameter.element_size()
        if kind in growing and num_bytes[kind] + more > bucket_bytes:
            finished.append(growing.pop(kind))
        if kind not in growing:
            growing[kind] = []
            num_bytes[kind] = 0
        growing[kind].append(parameter)
        num_bytes[kind] += more
    return in_order([*finished, *growing.values()], parameters)


def in_order(
    buckets: Iterable[list[torch.Tensor]], parameters: Sequence[torch.Tensor]
) -> list[list[torch.Tensor]]:
    """Buckets sorted by the last of their parameters: the order in which they become ready."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    return sorted(buckets, key=lambda bucket: max(places[id(parameter)] for parameter in bucket))


def name_of_request(title: str, names: Sequence[str]) -> str:
    """A request's name, as it appears in messages, with the names of its parameters."""
    return f"{title}: {names[0] if len(names) == 1 else f'{names[0]} ... {names[-1]}'}"


def check_known(
    parameters: Iterable[torch.Tensor], known: Container[int], names: Mapping[int, str]
) -> None:
    """Finds parameters whose gradients would be forgotten.

    Raises:
        ValueError: One requires a gradient and its id is not in ``known``.
    """
    for place, parameter in enumerate(parameters):
        if parameter.requires_grad and id(parameter) not in known:
            name = names.get(id(parameter), f"parameter {place}")
            raise ValueError(
                f"step: parameters must require a gradient from the beginning, got {name!r}, which"
                " began to later: make a new DistributedOptimizer, or use its add_param_group"
            )


class Bucket:
    """Parameters whose gradients are one request, and how far this step has come with them.

    Args:
        title: Name of the request; the parameters' names are added.
        parameters: Those of the bucket.
        names: Of all parameters, by id.
        group_of: Number of the parameter group of all parameters, by id.
        sharers: The ranks in whose flat buffers gradients lie; None: gradients lie anywhere.

    Attributes:
        num_copied: Gradients that were copied into a flat buffer, since they had come elsewhere.
    """

    def __init__(
        self,
        title: str,
        parameters: Sequence[torch.Tensor],
        names: Mapping[int, str],
        group_of: Mapping[int, int],
        sharers: ProcessSet | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.names = [names[id(parameter)] for parameter in parameters]
        self.title = name_of_request(title, self.names)
        groups = [group_of[id(parameter)] for parameter in parameters]
        self.group_numbers = sorted(set(groups))
        # The statistics' row of each tensor; the last is that of `presence`, which nobody reads.
        self.rows = [self.group_numbers.index(group) for group in groups]
        self.rows.append(len(self.group_numbers))
        # Which parameters have a gradient here; it is sent along to learn which have one anywhere.
        self.presence = torch.ones(
            len(parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self._places: list[Place] = []
        if sharers is not None:
            *self._places, place_of_presence = lay_out([*parameters, self.presence], sharers)
            self.presence = place_of_presence.tensor
        # A parameter that is listed twice has its gradient where it is listed first.
        first = {id(p): place for place, p in reversed(list(enumerate(parameters)))}
        self._is_first = [first[id(p)] == place for place, p in enumerate(parameters)]
        self.num_copied = 0
        self.is_on_gpu = streams.device_of(self.presence) is not None
        self.handle: Handle | None = None
        self.contexts: list[Any] = []
        self.stats: ReductionStats | None = None
        likes = [torch.empty_like(parameter, device="meta") for parameter in parameters]
        self._strides = [like.stride() for like in likes]
        self._dense_strides = [dense_strides(like) for like in likes]
        self._squares: torch.Tensor | None = None
        self.reset()

    def name_in(self, step: int) -> str:
        """The request's name in a step, so that no rank meets another in another step.

        On a GPU it is always the same: ranks agree on a name once and not in every step, and a
        graph is replayed in many. Their requests are counted instead.
        """
        return self.title if self.is_on_gpu else f"{self.title}, step {step}"

    def reset(self) -> None:
        """Begins a step."""
        self.passes = [0] * len(self.parameters)
        self.num_waiting = len(self.parameters)
        self._gradients: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._missing: list[int] = []
        self._seen: dict[int, torch.Tensor] = {}
        if self._squares is not None:
            self._squares.zero_()

    def adopt(self, place: int) -> None:
        """Makes a gradient that was just accumulated lie in the flat buffer, if there is one."""
        parameter = self.parameters[place]
        gradient = parameter.grad
        if not self._places or not self._is_first[place] or gradient is None:
            return
        # Sparse ones are added up as they are; prepare() refuses what is left.
        if (
            gradient.layout == torch.strided
            and not gradient.requires_grad
            and gradient.dtype == parameter.dtype
        ):
            gradient = self._put(place, gradient)
            if gradient is not parameter.grad:
                parameter.grad = gradient

    def _put(self, place: int, gradient: torch.Tensor) -> torch.Tensor:
        room = self._places[place]
        if gradient.dtype != room.tensor.dtype:
            raise ValueError(
                f"backward: the gradient of {self.names[place]!r} must have its parameter's dtype"
                f" {room.tensor.dtype} with gradient_as_bucket_view=True, got {gradient.dtype}"
            )
        self.num_copied += room.take(gradient)
        return room.tensor

    def see(self, place: int, gradient: torch.Tensor) -> None:
        """Takes the square of one pass's gradient, before it is accumulated."""
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64)
        # Only a gradient that is accumulated counts; torch.autograd.grad comes here too.
        self._seen[place] = norm.square()

    def keep_squares(self, place: int) -> None:
        """Adds what ``see`` saw, after the gradient was accumulated."""
        if place in self._seen:
            self.squares[self.rows[place]] += self._seen.pop(place)

    @property
    def squares(self) -> torch.Tensor:
        """float64: for each row of the statistics the sum over the passes of |gradient|^2."""
        if self._squares is None:
            self._squares = torch.zeros(
                len(self.group_numbers) + 1, dtype=torch.float64, device=self.presence.device
            )
        return self._squares

    def prepare(self, sparse_as_dense: bool) -> list[torch.Tensor]:
        """Makes every gradient one that can be reduced in place, and returns them.

        Raises:
            ValueError: A gradient is sparse, or requires a gradient itself.
            RuntimeError: One is missing while a CUDA graph is captured.
        """
        self._missing = []
        self._gradients = [
            self._usable_gradient(place, sparse_as_dense) for place in range(len(self.parameters))
        ]
        self._versions = [gradient._version for gradient in self._gradients]
        if self._missing and self.is_on_gpu and streams.is_capturing():
            raise RuntimeError(
                f"backward: {self.names[self._missing[0]]!r} must have a gradient while a CUDA"
                " graph is captured, got none: whether another rank has one is read by the host"
            )
        self.presence.fill_(1)
        for place in self._missing:
            self.presence[place].zero_()  # a list of places would be uploaded
        return self._gradients

    def _usable_gradient(self, place: int, sparse_as_dense: bool) -> torch.Tensor:
        parameter = self.parameters[place]
        gradient = parameter.grad
        if gradient is None:
            self._missing.append(place)
            if self._places:
                gradient = self._places[place].tensor.zero_()
            else:
                gradient = torch.zeros_like(parameter)
        elif gradient.layout != torch.strided:
            if not sparse_as_dense:
                raise ValueError(
                    f"backward: the gradient of {self.names[place]!r} must be dense, got layout"
                    f" {gradient.layout}; use sparse_as_dense=True"
                )
            gradient = gradient.to_dense()
        elif gradient.requires_grad:
            raise ValueError(
                f"backward: the gradient of {self.names[place]!r} must not require a gradient, got"
                " one of backward(create_graph=True)"
            )
        # The ranks must agree on strides, so everybody takes the parameter's.
        usual = self._strides[place]
        if self._places:
            gradient = self._put(place, gradient)
            if not self._is_first[place]:
                return gradient
        elif gradient.stride() != usual and dense_strides(gradient) != self._dense_strides[place]:
            gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
        if gradient is not parameter.grad:
            parameter.grad = gradient
        return gradient

    def check_untouched(self) -> None:
        """Finds out whether gradients were changed while they were being reduced.

        Raises:
            RuntimeError: One was.
        """
        for name, parameter, gradient, version, is_first in zip(
            self.names, self.parameters, self._gradients, self._versions, self._is_first,
            strict=True,
        ):  # fmt: skip
            is_other = parameter.grad is not gradient and (is_first or not self._places)
            if is_other or gradient._version != version:
                raise RuntimeError(
                    f"step: the gradient of {name!r} must not be touched while it is being reduced,"
                    " got one that was changed or replaced: call synchronize() first, and step()"
                    " in skip_synchronize()"
                )

    def finish(self, results: Sequence[torch.Tensor], compression: type[Compressor]) -> None:
        """Takes what came out of the reduction."""
        if compression is not Compression.none:
            plain = [
                compression.decompress(result, context)
                for result, context in zip(results, self.contexts, strict=True)
            ]
            torch._foreach_copy_(self._gradients, plain)

    def drop_what_nobody_has(self) -> None:
        """Takes away gradients that no rank has. Blocks where this rank lacks one, and only there.

        All ranks know then; a rank that has every gradient knows without reading.
        """
        if not self._missing:
            return
        numbers = self.presence.tolist()
        for place in self._missing:
            if numbers[place] == 0:
                self.parameters[place].grad = None
