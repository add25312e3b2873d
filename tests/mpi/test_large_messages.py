"""Above 2^31 bytes and elements. Oracle: a pattern at places that a truncated count would miss."""

from __future__ import annotations

import os

import pytest
import torch

import adareduce.torch as hvd

NUMEL = 2**31 // 4 + 4097  # float32: 2 GiB and a bit, not a multiple of anything
_NEEDED = 20 * 2**30 if os.environ.get("ADAREDUCE_TEST_LARGE") is None else 0


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


@pytest.mark.slow
def test_a_broadcast_above_two_to_the_31_bytes_arrives_whole(rank, size, ranks):
    if size != 2 or min(ranks.gather(available_bytes())) < _NEEDED:
        pytest.skip("needs 2 ranks and 20 GiB of free memory")
    tensor = torch.zeros(NUMEL)
    if rank == 0:
        tensor[:: 2**20] = 1.0
        tensor[-1] = 3.0
    hvd.broadcast_(tensor, 0)
    assert tensor[-1] == 3.0
    tensor[-1] = 0.0
    assert bool((tensor[:: 2**20] == 1.0).all())
    assert int(torch.count_nonzero(tensor)) == len(range(0, NUMEL, 2**20))


@pytest.mark.slow
def test_a_sum_of_more_than_two_to_the_31_elements_is_whole(rank, size, ranks):
    if size != 2 or min(ranks.gather(available_bytes())) < _NEEDED:
        pytest.skip("needs 2 ranks and 20 GiB of free memory")
    tensor = torch.full((2**31 + 4097,), rank + 1, dtype=torch.uint8)
    tensor[-1] = 7
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert tensor[-1] == 14
    tensor[-1] = 3
    for part in tensor.split(2**27):
        assert bool((part == 3).all())
