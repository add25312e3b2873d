"""Broadcast between ranks that are threads. Oracle: the bytes of the root."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from thread_ranks import DTYPES, STORAGE, ThreadRank, run_ranks

SIZES = [1, 2, 3, 4, 5, 8]
PIECE = 1 << 20  # bytes; csrc/collectives/broadcast.h


def bytes_of(owner: int, shape: tuple[int, ...], dtype: str) -> NDArray:
    """Arbitrary bits that tell whose they are."""
    storage = STORAGE[dtype]
    numel = int(np.prod(shape))
    rng = np.random.default_rng([owner, numel])
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(numel * storage.itemsize), storage).reshape(shape).copy()


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_the_bytes_of_any_root(size: int) -> None:
    shape = (5, 8)

    def body(rank: ThreadRank) -> list[NDArray]:
        mine = bytes_of(rank.rank, shape, "float32")
        results = [rank.broadcast(mine, root) for root in range(size)]
        assert reference.same_bits(mine, bytes_of(rank.rank, shape, "float32"))
        return results

    for results in run_ranks(size, body):
        for root, result in enumerate(results):
            assert reference.same_bits(result, bytes_of(root, shape, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_moved_bit_by_bit(dtype: str) -> None:
    shapes = [(7, 3), (0,), (1,), ()]

    def body(rank: ThreadRank) -> list[NDArray]:
        mine = [bytes_of(rank.rank, shape, dtype) for shape in shapes]
        return rank.submit("broadcast", mine, root=1, dtype=dtype).wait()

    for results in run_ranks(3, body):
        for result, shape in zip(results, shapes, strict=True):
            assert reference.same_bits(result, bytes_of(1, shape, dtype))


@pytest.mark.parametrize("size", SIZES)
def test_tensors_of_all_types_travel_together(size: int) -> None:
    dtypes = [*DTYPES, *reversed(DTYPES)]
    shapes = [(1 + 3 * i % 7, i % 4) for i in range(len(dtypes))]

    def body(rank: ThreadRank) -> list[NDArray]:
        mine = [bytes_of(rank.rank, *tensor) for tensor in zip(shapes, dtypes, strict=True)]
        return rank.submit("broadcast", mine, root=size - 1, dtype=dtypes).wait()

    for results in run_ranks(size, body):
        for result, shape, dtype in zip(results, shapes, dtypes, strict=True):
            assert reference.same_bits(result, bytes_of(size - 1, shape, dtype))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("numel", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 12_345])
def test_messages_longer_than_a_piece_arrive_whole(size: int, numel: int) -> None:
    root = size - 1

    def body(rank: ThreadRank) -> bool:
        result = rank.broadcast(bytes_of(rank.rank, (numel,), "uint8"), root)
        return reference.same_bits(result, bytes_of(root, (numel,), "uint8"))

    assert run_ranks(size, body) == [True] * size


@pytest.mark.parametrize("size", SIZES)
def test_several_tensors_and_empty_ones_travel_together(size: int) -> None:
    shapes = [(0,), (5, 8), (3,), (0, 4), (1,)]

    def body(rank: ThreadRank) -> list[NDArray]:
        mine = [bytes_of(rank.rank, shape, "float64") for shape in shapes]
        return rank.submit("broadcast", mine, root=size // 2).wait()

    for results in run_ranks(size, body):
        for result, shape in zip(results, shapes, strict=True):
            assert reference.same_bits(result, bytes_of(size // 2, shape, "float64"))


def test_broadcast_in_place_keeps_the_root_and_replaces_the_others() -> None:
    def body(rank: ThreadRank) -> NDArray:
        mine = bytes_of(rank.rank, (99,), "int64")
        return rank.broadcast(mine, 2, outputs=[mine])

    for result in run_ranks(4, body):
        assert reference.same_bits(result, bytes_of(2, (99,), "int64"))


def test_nothing_at_all_can_be_broadcast() -> None:
    assert run_ranks(3, lambda rank: rank.submit("broadcast", [], root=1).wait()) == [[]] * 3


@pytest.mark.parametrize("root", [-1, 2, 100])
def test_a_root_outside_the_set_is_refused_at_the_call(root: int) -> None:
    def body(rank: ThreadRank) -> NDArray:
        message = f"broadcast: root_rank must be .* 2 ranks, got place {root}"
        with pytest.raises(ValueError, match=message):
            rank.broadcast(np.zeros(3, np.float32), root)
        return rank.broadcast(np.full(3, rank.rank, np.float32), 1)

    for result in run_ranks(2, body):
        assert result.tolist() == [1.0] * 3
