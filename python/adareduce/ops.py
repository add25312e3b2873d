"""Codes that cross the border to the compiled module. They never change their numbers."""

from __future__ import annotations

import enum


class ReduceOp(enum.IntEnum):
    """How tensors of all ranks become one. See docs/algorithms.md."""

    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5


class Collective(enum.IntEnum):
    """What a request asks for."""

    allreduce = 0
    broadcast = 1
    allgather = 2
    barrier = 3
    reducescatter = 5
    alltoall = 6


class CudaPath(enum.IntEnum):
    """How CUDA tensors of a process set travel. See docs/gpu.md."""

    auto = 0
    nccl = 1
    peer = 2
    staged = 3
    single = 4


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Adasum = ReduceOp.Adasum
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product
