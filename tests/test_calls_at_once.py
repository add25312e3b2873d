"""All-reduces of one small tensor on the caller's thread, between ranks that are threads.

Oracle: whole numbers, whose sums are exact; the same call through the queue.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adareduce import _core
from thread_ranks import DTYPES, OPS, ThreadRank, run_ranks, settings

SHARED = settings(shared_memory=True)


def at_once(rank: ThreadRank, array: NDArray, op: str = "sum") -> NDArray:
    """As `rank.allreduce`, in place and without a name."""
    address = array.ctypes.data
    handle = rank.engine.allreduce_at_once(
        0, OPS[op], tuple(array.shape), DTYPES[array.dtype.name], address, address
    )
    if handle is not None:
        rank.wait_for(handle)
        handle.rethrow()
    return array


def whole_numbers(rank: int, numel: int) -> NDArray[np.float32]:
    return ((np.arange(numel) * 7 + 13 * rank) % 101).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("op", ["sum", "average", "adasum", "max"])
def test_calls_at_once_are_those_through_the_queue(size: int, shared_memory: bool, op: str) -> None:
    numels = [0, 1, 17, 1000, 9000, 70_000]

    def body(rank: ThreadRank) -> None:
        for numel in numels:
            mine = whole_numbers(rank.rank, numel)
            expected = rank.allreduce(mine.copy(), op=op)
            assert at_once(rank, mine, op).tobytes() == expected.tobytes()

    run_ranks(size, body, settings(shared_memory=shared_memory))


def test_queued_calls_go_first() -> None:
    def body(rank: ThreadRank) -> list[float]:
        handles = [
            rank.submit("allreduce", [np.full(100_000, float(i), np.float32)], name=f"{i}")
            for i in range(5)
        ]
        last = at_once(rank, np.full(3, 5.0, np.float32))
        return [handle.wait()[0][0] for handle in handles] + [last[0]]

    for values in run_ranks(3, body, SHARED):
        assert values == [0, 3, 6, 9, 12, 15]


def test_a_request_under_way_keeps_its_workspace() -> None:
    # From 17 ranks on Adasum travels as messages, through the workspace.
    size = 17
    inputs = np.random.default_rng(0).standard_normal((size, 64)).astype(np.float32)

    def body(rank: ThreadRank) -> None:
        mine = inputs[rank.rank]
        expected = rank.allreduce(mine.copy(), op="adasum")
        for i in range(30):
            pending = rank.submit("allreduce", [mine.copy()], op="adasum")
            sums = at_once(rank, np.ones(128 + 24 * i, np.float32))
            assert (sums == size).all()
            assert pending.wait()[0].tobytes() == expected.tobytes()

    run_ranks(size, body, SHARED)


@pytest.mark.parametrize("numel", [4, 70_000])
def test_a_disagreement_raises_on_all_ranks_and_harms_nothing(numel: int) -> None:
    def body(rank: ThreadRank) -> float:
        with pytest.raises(_core.DisagreementError, match="shape"):
            at_once(rank, np.ones(numel + rank.rank % 2, np.float32))
        return float(at_once(rank, np.ones(numel, np.float32))[0])

    assert run_ranks(3, body, SHARED) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("numel", [4, 70_000])
def test_what_has_ended_well_has_no_handle(numel: int) -> None:
    def body(rank: ThreadRank) -> int:
        array = np.zeros(numel, np.float32)
        address = array.ctypes.data
        with_handle = 0
        for _ in range(100):
            handle = rank.engine.allreduce_at_once(0, OPS["sum"], (numel,), 7, address, address)
            if handle is not None:  # another thread drives, or a rank is late
                with_handle += 1
                rank.wait_for(handle)
        return with_handle

    assert min(run_ranks(2, body, SHARED)) < 100


def test_others_may_use_the_queue() -> None:
    def body(rank: ThreadRank) -> list[float]:
        values = []
        for i in range(20):
            mine = np.full(10, float(i), np.float32)
            is_mine = (i + rank.rank) % 2 == 0
            result = at_once(rank, mine) if is_mine else nameless(rank, mine)
            values.append(float(result[0]))
        return values

    def nameless(rank: ThreadRank, array: NDArray) -> NDArray:
        return rank.submit("allreduce", [array], name="").wait()[0]

    for values in run_ranks(2, body, SHARED):
        assert values == [2.0 * i for i in range(20)]


def test_a_rank_that_comes_late_is_waited_for() -> None:
    others_wait = threading.Barrier(3)

    def body(rank: ThreadRank) -> Any:
        array = np.ones(5, np.float32)
        if rank.rank == 2:
            others_wait.wait()
            return at_once(rank, array)[0]
        # What the caller cannot finish the worker does.
        address = array.ctypes.data
        handle = rank.engine.allreduce_at_once(0, OPS["sum"], (5,), 7, address, address)
        assert handle is not None
        assert not handle.is_finished()
        others_wait.wait()
        rank.wait_for(handle)
        handle.rethrow()
        return array[0]

    assert run_ranks(3, body, SHARED) == [3.0, 3.0, 3.0]


def test_a_departure_ends_a_call_at_once() -> None:
    def body(rank: ThreadRank) -> None:
        if rank.rank == 1:
            return  # it leaves
        with pytest.raises(_core.TransportError, match="rank 1 has left: its work is done"):
            at_once(rank, np.ones(5, np.float32))

    run_ranks(2, body, SHARED)


def test_what_no_collective_can_do_is_refused() -> None:
    def body(rank: ThreadRank) -> None:
        array = np.ones(5, np.int32)
        with pytest.raises(ValueError, match="dtype must be one that Adasum is defined for"):
            at_once(rank, array, "adasum")
        assert at_once(rank, array)[0] == 2

    run_ranks(2, body, SHARED)
