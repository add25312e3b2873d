"""Windows of device memory between processes and threads, on the emulated CUDA runtime.

Oracle: exact integers that tell rank and place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer_ranks import peer_library
from window_ranks import Member, Rank, filled, run_ranks

__all__ = ["peer_library"]
NUMEL = 1000
BLOCKS = 3
COUNTERS = 8 * BLOCKS  # of 4 bytes, as a float
WINDOW = 4 * (2 * NUMEL + COUNTERS)

# Which ranks are threads of one process.
PROCESSES = [[0], [0, 1], [0, 1, 2], [0, 0, 0], [0, 1, 0], [0, 1, 2, 3, 4]]


def results(ends: list[tuple[str, Any]]) -> list[Any]:
    assert [kind for kind, _ in ends] == ["result"] * len(ends), ends
    return [value for _, value in ends]


def read_everybody(member: Member) -> list[list[float]]:
    assert member.bytes() == WINDOW
    assert not member.read(member.rank, np.ones(WINDOW, np.uint8)).any(), "new memory is zero"
    member.barrier()
    member.write(member.rank, filled(member, NUMEL))
    member.barrier()
    return [member.read(peer, np.empty(NUMEL, np.float32)).tolist() for peer in range(member.size)]


@pytest.mark.parametrize("processes", PROCESSES, ids=str)
def test_every_rank_reads_every_window(peer_library: Path, processes: list[int]) -> None:
    ranks = [Rank(process, WINDOW, read_everybody) for process in processes]
    expected = [[1000.0 * peer + i for i in range(NUMEL)] for peer in range(len(ranks))]
    for seen in results(run_ranks(str(peer_library), ranks)):
        assert seen == expected


def write_to_everybody(member: Member) -> list[float]:
    for peer in range(member.size):
        value = np.full(1, 10.0 * member.rank + peer, np.float32)
        member.write(peer, value, offset=4 * member.rank)
    member.barrier()
    return member.read(member.rank, np.empty(member.size, np.float32)).tolist()


def test_every_rank_writes_to_every_window(peer_library: Path) -> None:
    ranks = [Rank(process, WINDOW, write_to_everybody) for process in [0, 1, 1]]
    seen = results(run_ranks(str(peer_library), ranks))
    assert seen == [[10.0 * sender + rank for sender in range(3)] for rank in range(3)]


def sum_over_windows(member: Member) -> tuple[list[float], int]:
    member.write(member.rank, filled(member, NUMEL))
    word = member.sum(NUMEL, BLOCKS, repeats=3)
    return member.read(member.rank, np.empty(NUMEL, np.float32), 4 * NUMEL).tolist(), word


@pytest.mark.parametrize("processes", [[0, 1], [0, 1, 0], [0, 1, 2, 3]], ids=str)
def test_kernels_of_several_processes_sum_over_their_windows(
    peer_library: Path, processes: list[int]
) -> None:
    size = len(processes)
    ranks = [Rank(process, WINDOW, sum_over_windows) for process in processes]
    expected = [float(size * i + 1000 * sum(range(size))) for i in range(NUMEL)]
    for values, word in results(run_ranks(str(peer_library), ranks)):
        assert word == 0
        assert values == expected


def sum_without_rank_one(member: Member) -> int:
    return 0 if member.rank == 1 else member.sum(NUMEL, BLOCKS, deadline=0.2)


def test_a_process_that_does_not_come_is_named_when_the_deadline_has_passed(
    peer_library: Path,
) -> None:
    ranks = [Rank(process, WINDOW, sum_without_rank_one) for process in range(3)]
    assert results(run_ranks(str(peer_library), ranks)) == [2, 0, 2]


def window_sizes(member: Member) -> tuple[int, list[bool]]:
    return member.bytes(), [member.window(peer) is not None for peer in range(member.size)]


def test_windows_may_differ_in_size_and_be_empty(peer_library: Path) -> None:
    sizes = [64, 0, 5_000_000]
    ranks = [Rank(process, size, window_sizes) for process, size in enumerate(sizes)]
    seen = results(run_ranks(str(peer_library), ranks))
    assert seen == [(size, [True, False, True]) for size in sizes]


@pytest.mark.parametrize("processes", [[0, 1, 2], [0, 1, 0]], ids=str)
def test_an_allocation_that_fails_on_one_rank_raises_on_all(
    peer_library: Path, processes: list[int]
) -> None:
    ranks = [Rank(process, WINDOW, read_everybody) for process in processes]
    ranks[1].environment["CUDA_EMULATION_FAIL_ALLOCATION"] = "1"  # after that of describe_device
    ends = run_ranks(str(peer_library), ranks)
    assert {kind for kind, _ in ends} == {"error"}
    assert len({text for _, text in ends}) == 1, "one text"
    assert "rank 1: allocating 2097152 bytes: out of memory" in ends[0][1]


def test_a_rank_without_its_gpu_leaves_no_one_waiting(peer_library: Path) -> None:
    ranks = [Rank(process, WINDOW, read_everybody) for process in range(2)]
    ranks[1].device = 5
    ends = run_ranks(str(peer_library), ranks)
    assert [kind for kind, _ in ends] == ["error", "error"]
    assert "choosing GPU 5: invalid device ordinal" in ends[1][1]


def test_gpus_of_one_process_reach_each_other(peer_library: Path) -> None:
    ranks = [Rank(0, WINDOW, read_everybody, device=index) for index in range(2)]
    ranks[0].environment["CUDA_EMULATION_DEVICES"] = "2"
    expected = [[1000.0 * peer + i for i in range(NUMEL)] for peer in range(2)]
    assert results(run_ranks(str(peer_library), ranks)) == [expected, expected]
