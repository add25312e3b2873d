"""What training scripts import: ``import adareduce.torch as hvd``.

Names and signatures follow Horovod's PyTorch API. Importing this initialises no MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from adareduce import runtime
from adareduce.ops import Adasum, Average, Max, Min, Product, ReduceOp, Sum
from adareduce.runtime import (
    HorovodInternalError,
    ProcessSet,
    add_process_set,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    rocm_built,
    shutdown,
    size,
)
from adareduce.torch.adascale import AdaScale
from adareduce.torch.allgather import (
    allgather,
    allgather_async,
    grouped_allgather,
    grouped_allgather_async,
)
from adareduce.torch.allreduce import (
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
)
from adareduce.torch.alltoall import alltoall, alltoall_async
from adareduce.torch.barrier import barrier
from adareduce.torch.broadcast import broadcast, broadcast_, broadcast_async, broadcast_async_
from adareduce.torch.compression import Compression
from adareduce.torch.device import cuda_path
from adareduce.torch.device_gain import Progress
from adareduce.torch.gain import GainEstimator
from adareduce.torch.gradients import GradientReducer
from adareduce.torch.handles import Handle, poll, synchronize
from adareduce.torch.objects import allgather_object, broadcast_object, broadcast_parameters
from adareduce.torch.optimizer import DistributedOptimizer
from adareduce.torch.optimizer_state import broadcast_optimizer_state
from adareduce.torch.reducescatter import (
    grouped_reducescatter,
    grouped_reducescatter_async,
    reducescatter,
    reducescatter_async,
)
from adareduce.torch.schedules import AdaScaleSchedule, LinearScalingWarmup, tabulate
from adareduce.torch.shared_tensors import (
    SharedMemoryChoices,
    empty_shared,
    shared_memory_choices,
)
from adareduce.torch.statistics import (
    ReductionStats,
    grouped_allreduce_with_stats,
    grouped_allreduce_with_stats_,
    grouped_allreduce_with_stats_async,
    grouped_allreduce_with_stats_async_,
    local_adasum,
)
from adareduce.torch.threads import warn_if_oversubscribed


def init(
    comm: Sequence[int] | Any | None = None,
    process_sets: Sequence[ProcessSet] | Literal["dynamic"] | None = None,
) -> None:
    """See ``adareduce.runtime.init``: connects this process with the other ranks."""
    is_first = not is_initialized()
    runtime.init(comm, process_sets)
    if is_first:
        warn_if_oversubscribed()


__all__ = [
    "AdaScale",
    "AdaScaleSchedule",
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "GainEstimator",
    "GradientReducer",
    "Handle",
    "HorovodInternalError",
    "LinearScalingWarmup",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Progress",
    "ReduceOp",
    "ReductionStats",
    "SharedMemoryChoices",
    "Sum",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "cuda_path",
    "ddl_built",
    "empty_shared",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_allreduce_with_stats",
    "grouped_allreduce_with_stats_",
    "grouped_allreduce_with_stats_async",
    "grouped_allreduce_with_stats_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_adasum",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "rocm_built",
    "shared_memory_choices",
    "shutdown",
    "size",
    "synchronize",
    "tabulate",
]
