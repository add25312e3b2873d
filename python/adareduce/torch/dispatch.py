"""Where a checked call goes: to the worker, onto a stream, or through the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adareduce import _core
from adareduce.ops import Collective, CudaPath, ReduceOp
from adareduce.runtime import ChosenPath, ProcessSet
from adareduce.torch import streams
from adareduce.torch.device import path_of
from adareduce.torch.handles import Request, submit, take_name
from adareduce.torch.launching import launch
from adareduce.torch.staging import stage
from adareduce.torch.tensors import Known


def submit_named(
    function: str,
    collective: Collective,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor | None],
    *,
    name: str | None,
    process_set: ProcessSet,
    op: ReduceOp = ReduceOp.Sum,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    blocking: bool = False,
    known: Known | None = None,
    **options: Any,
) -> Request:
    """Starts a call and holds its name, which it gives back where the call is refused.

    Inside ``rejected_on_all_ranks``. With CPU tensors it is ``handles.submit``. With CUDA tensors,
    ``launching.launch`` or ``staging.stage``, whose options are those of ``launch``; ``blocking``
    and ``known`` mean nothing to them.

    Raises:
        ValueError: The name is in use, or the tensors' GPU cannot be used.
        HorovodInternalError: A rank is lost.
    """
    if name is not None:
        take_name(function, name, process_set)
    try:
        chosen = choose_path(function, inputs, process_set)
        if chosen is None:
            return submit(
                collective, inputs, outputs, name=name, process_set=process_set, op=op,
                prescale_factor=prescale_factor, postscale_factor=postscale_factor,
                blocking=blocking, known=known, **options,
            )  # fmt: skip
        start = stage if chosen.path == CudaPath.staged else launch
        return start(
            collective,
            [tensor.detach() for tensor in inputs],  # copies of them must not be differentiated
            [output for output in outputs if output is not None],
            device=chosen.device,
            name=name,
            process_set=process_set,
            op=op,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            **options,
        )
    except _core.DisagreementError as error:
        return _Disagreement(error)
    except Exception:
        if name is not None:
            process_set.names_in_use.discard(name)
        raise


class _Disagreement:
    """A call that the ranks did not agree on; as on the CPU, ``synchronize`` says so."""

    def __init__(self, error: _core.DisagreementError) -> None:
        self._error = error

    def is_finished(self) -> bool:
        return True

    def wait_for(self, _seconds: float) -> bool:
        return True

    def rethrow(self) -> None:
        raise self._error


def choose_path(
    function: str, tensors: Sequence[torch.Tensor], process_set: ProcessSet
) -> ChosenPath | None:
    """How checked tensors will travel; None: they lie on the CPU, or there are none.

    Collective at a set's first call with CUDA tensors. Inside ``rejected_on_all_ranks``.
    """
    device = streams.device_of(tensors[0]) if tensors else None
    if device is None:
        return None
    try:
        return path_of(process_set, device)
    except ValueError as error:
        which = "tensor" if len(tensors) == 1 else f"tensor 0 of {len(tensors)}"
        raise ValueError(
            f"{function}: {which} must be on a device that can be used here, got"
            f" {tensors[0].device}: {error}"
        ) from error
