"""Finds out whether the host looks at a tensor's value: on a GPU it would wait there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What item(), bool(), float(), int(), ==, nonzero() and the like become.
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique", "masked_select")
# What reads memory without telling anybody.
_METHODS = ("tolist", "numpy", "__array__", "cpu")


class HostReadError(AssertionError):
    """The host has read a tensor."""


class _Guard(TorchDispatchMode):
    def __init__(self, may_read: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._may_read = may_read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).removeprefix("aten.").split(".")[0]
        if name in _READS and not self._may_read(args[0]):
            raise HostReadError(f"the host has read a tensor by {func}")
        return func(*args, **(kwargs or {}))


def is_step_on_the_host(optimizer: Any, tensor: torch.Tensor) -> bool:
    """Whether it is one of Adam's step counts that torch would keep on the host of a GPU, too."""
    return any(
        optimizer.state.get(parameter, {}).get("step") is tensor
        for group in optimizer.param_groups
        if not (group.get("fused") or group.get("capturable"))
        for parameter in group["params"]
    )


@contextlib.contextmanager
def no_host_reads(optimizer: Any = None) -> Iterator[None]:
    """Within this, a read of a tensor raises HostReadError, but for ``is_step_on_the_host``."""

    def may_read(tensor: torch.Tensor) -> bool:
        return optimizer is not None and is_step_on_the_host(optimizer, tensor)

    def refuse(name: str) -> Any:
        def method(*_: Any, **__: Any) -> Any:
            raise HostReadError(f"the host has read a tensor by {name}")

        return method

    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse(name)))
        stack.enter_context(_Guard(may_read))
        yield
