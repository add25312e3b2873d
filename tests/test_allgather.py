"""All-gather between ranks that are threads. Oracle: np.concatenate of what the ranks brought."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from test_broadcast import bytes_of
from thread_ranks import DTYPES, ThreadRank, run_ranks

SIZES = [1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trailing", [(), (8,), (2, 3), (0,)])
def test_rows_of_all_ranks_follow_each_other_in_rank_order(
    size: int, trailing: tuple[int, ...]
) -> None:
    # Equal row counts, different ones, one rank without rows, only one with rows, none with rows.
    cases = [
        [5] * size,
        [rank + 1 for rank in range(size)],
        [3 * rank for rank in range(size)],
        [0] * (size - 1) + [4],
        [0] * size,
        [1000 if rank == 0 else rank % 2 for rank in range(size)],
    ]

    def body(rank: ThreadRank) -> list[NDArray]:
        return [
            rank.allgather(bytes_of(rank.rank, (rows[rank.rank], *trailing), "float32"))
            for rows in cases
        ]

    for results in run_ranks(size, body):
        for result, rows in zip(results, cases, strict=True):
            parts = [bytes_of(rank, (rows[rank], *trailing), "float32") for rank in range(size)]
            assert reference.same_bits(result, np.concatenate(parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_gathered_bit_by_bit(dtype: str) -> None:
    def body(rank: ThreadRank) -> NDArray:
        return rank.allgather(bytes_of(rank.rank, (rank.rank + 1, 3), dtype), dtype=dtype)

    expected = np.concatenate([bytes_of(rank, (rank + 1, 3), dtype) for rank in range(3)])
    for result in run_ranks(3, body):
        assert reference.same_bits(result, expected)


@pytest.mark.parametrize("size", SIZES)
def test_several_tensors_are_gathered_each_for_itself(size: int) -> None:
    def shapes(rank: int) -> list[tuple[int, ...]]:
        return [(rank, 2), (5,), (0, 7), (2 * (size - rank), 3, 2), (1,)]

    def body(rank: ThreadRank) -> list[NDArray]:
        mine = [bytes_of(rank.rank, shape, "int32") for shape in shapes(rank.rank)]
        return rank.submit("allgather", mine).gathered()

    expected = [
        np.concatenate([bytes_of(rank, shapes(rank)[t], "int32") for rank in range(size)])
        for t in range(5)
    ]
    for results in run_ranks(size, body):
        for result, total in zip(results, expected, strict=True):
            assert reference.same_bits(result, total)


@pytest.mark.parametrize("size", SIZES)
def test_tensors_of_all_types_are_gathered_together(size: int) -> None:
    dtypes = [*DTYPES, *reversed(DTYPES)]

    def mine(rank: int) -> list[NDArray]:
        return [bytes_of(rank, ((rank + i) % 4, 3), dtype) for i, dtype in enumerate(dtypes)]

    def body(rank: ThreadRank) -> list[NDArray]:
        return rank.submit("allgather", mine(rank.rank), dtype=dtypes).gathered()

    for results in run_ranks(size, body):
        by_tensor = zip(*(mine(rank) for rank in range(size)), strict=True)
        for result, parts in zip(results, by_tensor, strict=True):
            assert reference.same_bits(result, np.concatenate(parts))


def test_large_blocks_arrive_whole() -> None:
    numels = [300_000, 0, 500_001]

    def body(rank: ThreadRank) -> bool:
        result = rank.allgather(bytes_of(rank.rank, (numels[rank.rank],), "float64"))
        parts = [bytes_of(other, (numels[other],), "float64") for other in range(3)]
        return reference.same_bits(result, np.concatenate(parts))

    assert run_ranks(3, body) == [True] * 3


def test_the_results_outlive_their_engine() -> None:
    def body(rank: ThreadRank) -> tuple[object, list[int]]:
        pending = rank.submit("allgather", [np.full(4, rank.rank, np.int64)])
        pending.wait()
        [(memory, shape, _)] = pending.handle.gathered()
        return memory, shape

    for memory, shape in run_ranks(2, body):
        assert shape == [8]
        assert np.asarray(memory).view(np.int64).tolist() == [0] * 4 + [1] * 4


def test_nothing_at_all_can_be_gathered() -> None:
    assert run_ranks(3, lambda rank: rank.submit("allgather", []).gathered()) == [[]] * 3


def test_a_scalar_is_refused_at_the_call() -> None:
    def body(rank: ThreadRank) -> NDArray:
        with pytest.raises(
            ValueError, match="allgather: tensor 0 must have at least one dimension"
        ):
            rank.allgather(np.zeros((), np.float32))
        return rank.allgather(np.full(1, rank.rank, np.float32))

    for result in run_ranks(2, body):
        assert result.tolist() == [0.0, 1.0]
