"""Which GPU a call is about, and how its tensors will travel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from adareduce.logs import logger
from adareduce.ops import CudaPath
from adareduce.runtime import (
    ChosenPath,
    ProcessSet,
    choose_cuda_path,
    global_process_set,
    rejected_on_all_ranks,
)
from adareduce.torch import host, streams


def cuda_path(
    process_set: ProcessSet = global_process_set, device: int | None = None
) -> ChosenPath:
    """How CUDA tensors of a process set travel, and why: ``cuda_path().path.name``.

    Collective over the process set and blocks, unless the set has been used with CUDA tensors.

    Args:
        process_set: The ranks.
        device: Of a set that has not been used: this rank's GPU; torch's current one by default.

    Raises:
        ValueError: This build has no CUDA, or the set has another GPU.
        HorovodInternalError: What ADAREDUCE_CUDA_PATH asks for is not possible, the ranks disagree,
            or one is lost.
    """
    with rejected_on_all_ranks(process_set):
        if device is None:
            used = process_set.cuda
            device = streams.current_device() if used is None else used.device
        return path_of(process_set, device)


def path_of(process_set: ProcessSet, device: int) -> ChosenPath:
    """As ``cuda_path``, inside ``rejected_on_all_ranks``; warns where the path is a poor one."""
    if process_set.cuda is None:
        if streams.is_capturing():
            raise ValueError(
                f"{process_set} must have been used with CUDA tensors before a graph is captured:"
                " make the same calls once before"
            )
        chosen = choose_cuda_path(process_set, device)
        everyones = host.gather_texts(streams.uuid_of(device), "GPUs", process_set)
        # Only now, when every rank has come this far: a rank that made a mistake chooses later,
        # and then all must.
        process_set.cuda = chosen
        if process_set.rank() == 0:
            _warn(process_set, chosen, everyones)
    if process_set.cuda.device != device:
        raise ValueError(
            f"a process set serves one GPU per rank, and {process_set} has"
            f" cuda:{process_set.cuda.device} since its first call; add a process set for the other"
        )
    return process_set.cuda


def _warn(process_set: ProcessSet, chosen: ChosenPath, everyones: Sequence[str]) -> None:
    if chosen.path == CudaPath.staged:
        logger.warning(
            "%s: CUDA tensors go through host memory, which is many times slower than NCCL or"
            " direct access between GPUs: %s",
            process_set,
            chosen.why,
        )
    shared = [uuid for uuid, count in Counter(everyones).items() if uuid and count > 1]
    if shared:
        logger.warning(
            "%s: several ranks share a GPU, which makes them wait for each other: %s",
            process_set,
            "; ".join(
                f"ranks {', '.join(_ranks_with(uuid, everyones, process_set))} have {uuid}"
                for uuid in shared
            ),
        )


def _ranks_with(uuid: str, everyones: Sequence[str], process_set: ProcessSet) -> list[str]:
    return [
        str(rank) for rank, theirs in zip(process_set.ranks, everyones, strict=True)
        if theirs == uuid
    ]  # fmt: skip
