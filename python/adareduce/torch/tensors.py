"""What the engine must know of tensors, and which ones it cannot take.

A call may have thousands of tensors, or be over in a few microseconds. So what is asked of all of
them is mapped over them, without a loop in Python, and a single one is asked directly.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Sequence

import torch

from adareduce.ops import ReduceOp
from adareduce.torch import streams

# Of tensors that were checked: the dtypes, each once, in their order; and the addresses, where all
# are known to be contiguous.
Known = tuple[Collection[torch.dtype], list[int] | None]

_DTYPE_CODES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.bfloat16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bool: 9,
}
DTYPES = tuple(_DTYPE_CODES)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_FLOAT_CODES = {dtype: _DTYPE_CODES[dtype] for dtype in FLOAT_DTYPES}

_DTYPE = operator.attrgetter("dtype")
_LAYOUT = operator.attrgetter("layout")
_SHAPE = operator.attrgetter("shape")
_ADDRESS = torch.Tensor.data_ptr
_IS_CONTIGUOUS = torch.Tensor.is_contiguous
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_STRIDED = {torch.strided}
_FLOATS = set(FLOAT_DTYPES)
# Without a detour through Python, where torch has it.
_increment_version = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


def _versions_take_lists() -> bool:
    """Whether torch counts writes to many tensors at once, and skips those of inference mode."""
    with torch.inference_mode():
        of_inference = torch.empty(0, device="cpu")
    try:
        _increment_version([of_inference])
    except Exception:
        return False
    return True


_VERSIONS_TAKE_LISTS = _versions_take_lists()


def check_tensors(
    function: str,
    tensors: Sequence[torch.Tensor],
    *,
    in_place: bool,
    one_device: bool = True,
) -> Known:
    """Refuses what the engine cannot take.

    Args:
        function: Of the user's, for messages.
        tensors: What it was given.
        in_place: They will be written to, so that their strides count.
        one_device: They must lie on one.

    Returns:
        What was found out.

    Raises:
        TypeError: Something is not a tensor, or its dtype is not known.
        ValueError: A tensor is sparse, on another device than the others or on one that is neither
            the CPU nor a GPU, or not contiguous where that is needed.
    """
    known = _glance(tensors, in_place)
    if known is not None:
        return known
    count = len(tensors)
    for index, tensor in enumerate(tensors):
        which = "tensor" if count == 1 else f"tensor {index} of {count}"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{function}: {which} must be a torch.Tensor, got {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"{function}: {which} must be dense, got layout {tensor.layout}")
        device = streams.device_of(tensor)
        if device is None and tensor.device.type != "cpu":
            raise ValueError(
                f"{function}: {which} must be on the cpu or a CUDA device, got device"
                f" {tensor.device}"
            )
        if one_device and index > 0 and device != streams.device_of(tensors[0]):
            raise ValueError(
                f"{function}: all tensors must be on one device, got {tensors[0].device} for tensor"
                f" 0 and {tensor.device} for {which}"
            )
        if tensor.dtype not in _DTYPE_CODES:
            raise TypeError(
                f"{function}: {which} must have one of the dtypes"
                f" {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPE_CODES)},"
                f" got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if in_place and not tensor.is_contiguous() and dense_strides(tensor) is None:
            raise ValueError(
                f"{function}: {which} must be dense (contiguous, channels_last and the like), got"
                f" strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
            )
    return dict.fromkeys(map(_DTYPE, tensors)), None


def _glance(tensors: Sequence[torch.Tensor], in_place: bool) -> Known | None:
    """What is known where everything is as usual; None: they must be looked at one by one."""
    try:
        if len(tensors) == 1:
            (tensor,) = tensors
            if type(tensor) not in _PLAIN_TYPES or not streams.are_on_cpu(tensors):
                return None
            dtype = tensor.dtype
            is_usual = tensor.is_contiguous() if in_place else tensor.layout is torch.strided
            if not is_usual or dtype not in _DTYPE_CODES:
                return None
            return (dtype,), [tensor.data_ptr()] if in_place else None
        if not _PLAIN_TYPES.issuperset(map(type, tensors)) or not streams.are_on_cpu(tensors):
            return None
        dtypes = dict.fromkeys(map(_DTYPE, tensors))
        is_usual = (
            all(map(_IS_CONTIGUOUS, tensors))
            if in_place
            else _STRIDED.issuperset(map(_LAYOUT, tensors))
        )
        if not is_usual or not dtypes.keys() <= _DTYPE_CODES.keys():
            return None
        return dtypes, list(map(_ADDRESS, tensors)) if in_place else None
    except RuntimeError:
        # Sparse tensors are not contiguous or raise when asked; others have no address and raise.
        return None


def describe_plain(tensor: torch.Tensor) -> tuple[torch.Size, int, int] | None:
    """Shape, dtype code and address of a contiguous CPU tensor of floats; None for all others."""
    if (
        type(tensor) not in _PLAIN_TYPES
        or tensor.layout is not torch.strided
        or not streams.are_on_cpu((tensor,))
        or not tensor.is_contiguous()
    ):
        return None
    code = _FLOAT_CODES.get(tensor.dtype)
    return None if code is None else (tensor.shape, code, tensor.data_ptr())


def check_op(function: str, op: ReduceOp, dtypes: Iterable[torch.dtype]) -> None:
    """Refuses a reduction that means nothing for a dtype.

    Raises:
        TypeError: Adasum of something else than float types, Average or Sum of bool.
    """
    for dtype in dtypes:
        if dtype in _FLOATS:
            continue
        if op == ReduceOp.Adasum:
            rule = "float16, bfloat16, float32 or float64"
        elif op in (ReduceOp.Average, ReduceOp.Sum) and dtype == torch.bool:
            rule = "a number; Max and Min are the logical or and and"
        else:
            continue
        raise TypeError(
            f"{function}: dtype must be {rule} for op={op.name}, got"
            f" {str(dtype).removeprefix('torch.')}"
        )


def check_scales(
    function: str, dtypes: Collection[torch.dtype], prescale_factor: float, postscale_factor: float
) -> None:
    """Refuses factors where there is nothing to multiply.

    Raises:
        TypeError: A factor other than 1 for a bool tensor.
    """
    if prescale_factor == postscale_factor == 1.0:
        return
    if torch.bool in dtypes:
        raise TypeError(
            f"{function}: prescale_factor and postscale_factor must be 1 for bool tensors, got"
            f" {prescale_factor} and {postscale_factor}"
        )


def mark_written(tensors: Sequence[torch.Tensor]) -> None:
    """Lets autograd know that the engine wrote into these, as an in-place operation would."""
    if _VERSIONS_TAKE_LISTS:
        _increment_version(tensors)
        return
    for tensor in tensors:
        if not tensor.is_inference():
            _increment_version(tensor)


def describe_tensors(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor | None],
    groups: Sequence[int] | None,
    known: Known | None = None,
) -> list[tuple[Sequence[int], int, int, int, Sequence[int], int]]:
    """Tensors as the engine takes them: shape, dtype, addresses, strides, group of statistics.

    ``known`` is about ``inputs``; what it says is not asked again.
    """
    dtypes, addresses = ((), None) if known is None else known
    read = list(map(_ADDRESS, inputs)) if addresses is None else addresses
    written = read
    if outputs is not inputs:
        written = [0 if output is None else output.data_ptr() for output in outputs]
    if len(inputs) == 1 and groups is None:
        (tensor,) = inputs
        strides_of_it = () if addresses is not None else _strides_for_engine(tensor)
        code = _DTYPE_CODES[tensor.dtype]
        return [(tensor.shape, code, read[0], written[0], strides_of_it, 0)]
    count = len(inputs)
    strides: Iterable[tuple[int, ...]] = itertools.repeat((), count)
    if addresses is None and not all(map(_IS_CONTIGUOUS, inputs)):
        strides = map(_strides_for_engine, inputs)
    codes: Iterable[int] = map(_DTYPE_CODES.__getitem__, map(_DTYPE, inputs))
    if len(dtypes) == 1:
        (dtype,) = dtypes
        codes = itertools.repeat(_DTYPE_CODES[dtype], count)
    every_group = itertools.repeat(0, count) if groups is None else groups
    shapes = map(_SHAPE, inputs)
    return list(zip(shapes, codes, read, written, strides, every_group, strict=True))


def _strides_for_engine(tensor: torch.Tensor) -> tuple[int, ...]:
    return () if tensor.is_contiguous() else dense_strides(tensor) or ()


def dtype_code(dtype: torch.dtype) -> int:
    """The number that stands for a dtype in the compiled module."""
    return _DTYPE_CODES[dtype]


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of a tensor that fills its memory without gaps or overlap; None for others.

    0 where the extent is 1, since such a stride means nothing.
    """
    strides = tuple(
        0 if extent == 1 else stride
        for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    expected = 1
    for stride, extent in sorted(zip(strides, tensor.shape, strict=True)):
        if extent == 1:
            continue
        if stride != expected:
            return None
        expected *= extent
    return strides
