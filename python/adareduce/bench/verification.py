"""Counts wrong elements: beyond the bound, not repeatable, or not the same on all ranks."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence

import torch

from adareduce.bench.oracles import Expected
from adareduce.bench.ranks import Ranks

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def count_wrong(
    ranks: Ranks,
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    expected: Sequence[Sequence[Expected]],
    dtype: torch.dtype,
    *,
    ranks_agree: bool,
) -> int:
    """Wrong elements of one call, over all ranks; the same number everywhere. Collective.

    An element is wrong, once on each rank, if it is further from what is expected than the bound,
    or if its bits differ from those of the second call or (`ranks_agree`) of rank 0.

    Args:
        ranks: The channel between the ranks.
        first: Outputs of a call.
        second: Outputs of another call with the same inputs.
        expected: The stretches of each output, one after the other.
        dtype: Of the outputs.
        ranks_agree: All ranks must have the same outputs.
    """
    numels = [sum(stretch.numel for stretch in stretches) for stretches in expected]
    has_form = _has_form(first, numels, dtype) and _has_form(second, numels, dtype)
    if not all(ranks.gather(has_form)):
        return sum(numels) * ranks.size
    reference = _of_rank_0(ranks, first) if ranks_agree else None
    wrong = 0
    for index, (actual, again) in enumerate(zip(first, second, strict=True)):
        is_wrong = differs(actual.reshape(-1), expected[index])
        is_wrong |= bits(actual) != bits(again)
        if reference is not None:
            is_wrong |= bits(actual) != reference[index].to(actual.device)
        wrong += int(is_wrong.sum())
    return int(sum(ranks.gather(wrong)))


def differs(actual: torch.Tensor, expected: Sequence[Expected]) -> torch.Tensor:
    """Whether each element of a flat output is beyond its bound. NaN always is."""
    is_wrong = torch.zeros(actual.numel(), dtype=torch.bool, device=actual.device)
    begin = 0
    for stretch in expected:
        values = torch.roll(stretch.values, -stretch.start).to(actual.device)
        bound = None
        if stretch.bound is not None:
            bound = torch.roll(stretch.bound, -stretch.start).to(actual.device)
        end = begin + stretch.numel
        while begin < end:
            count = min(values.numel(), end - begin)
            part = actual[begin : begin + count]
            if bound is None:
                outside = part != values[:count]
            else:
                outside = ~((part.double() - values[:count]).abs() <= bound[:count])
            is_wrong[begin : begin + count] = outside
            begin += count
    return is_wrong


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their size, flat: tells 0.0 from -0.0, and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def _has_form(outputs: Sequence[torch.Tensor], numels: list[int], dtype: torch.dtype) -> bool:
    return [output.numel() for output in outputs] == numels and all(
        output.dtype == dtype for output in outputs
    )


def _of_rank_0(ranks: Ranks, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Rank 0's bits where a rank has others, else None: digests are cheaper than tensors."""
    digest = hashlib.blake2b()
    for output in outputs:
        flat = bits(output).cpu()
        # Not through NumPy, which need not be installed.
        digest.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
    if len(set(ranks.gather(digest.hexdigest()))) == 1:
        return None
    mine = [bits(output).cpu() for output in outputs] if ranks.rank == 0 else None
    theirs: list[torch.Tensor] = ranks.broadcast(mine)
    return theirs
