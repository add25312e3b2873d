"""Process sets. Oracle: exact integers over the members."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, assert_library_works, integers, total

import adareduce.torch as hvd


def check_collectives(process_set: hvd.ProcessSet, seed: int) -> None:
    rank = hvd.rank()
    values = {other: integers(other, (11,), torch.float32, seed) for other in process_set.ranks}
    result = hvd.allreduce(values[rank], op=hvd.Sum, process_set=process_set)
    assert_equal(result, total(list(values.values())))
    root = process_set.ranks[-1]
    assert_equal(hvd.broadcast(values[rank], root, process_set=process_set), values[root])
    gathered = hvd.allgather(values[rank], process_set=process_set)
    assert_equal(gathered, torch.cat([values[other] for other in process_set.ranks]))
    assert hvd.broadcast_object(rank, root, process_set=process_set) == root
    hvd.barrier(process_set=process_set)


@pytest.mark.openmpi_round
@pytest.mark.min_ranks(2)
def test_even_and_odd_ranks_reduce_among_themselves(rank, size):
    even = hvd.add_process_set(range(0, size, 2))
    odd = hvd.add_process_set(hvd.ProcessSet(range(1, size, 2)))
    mine, others = (odd, even) if rank % 2 else (even, odd)
    assert (mine.included(), others.included()) == (True, False)
    assert mine.rank() == rank // 2
    assert mine.size() == len(range(rank % 2, size, 2))
    with pytest.raises(ValueError, match=f"rank {rank} is not in the process set"):
        others.rank()
    check_collectives(mine, seed=1)
    check_collectives(hvd.global_process_set, seed=2)


@pytest.mark.openmpi_round
@pytest.mark.min_ranks(3)
def test_overlapping_sets_may_interleave_differently_on_their_ranks(rank, size):
    # {0, 1} and {1, ..., P-1} overlap in rank 1, which submits in the order that suits nobody else.
    lower, upper = hvd.add_process_set([0, 1]), hvd.add_process_set(range(1, size))
    sets = [s for s in (lower, upper, hvd.global_process_set) if s.included()]
    if rank % 2:
        sets.reverse()
    for round_ in range(5):
        handles = [
            hvd.allreduce_async(
                integers(rank, (500,), torch.float32, round_), op=hvd.Sum, process_set=s
            )
            for s in sets
        ]
        for process_set, handle in zip(sets, handles, strict=True):
            values = [integers(other, (500,), torch.float32, round_) for other in process_set.ranks]
            assert_equal(hvd.synchronize(handle), total(values))


def test_a_set_of_one_rank_works_alone(rank, size):
    sets = [hvd.add_process_set([other]) for other in range(size)] if size > 1 else []
    if sets:
        check_collectives(sets[rank], seed=3)


@pytest.mark.min_ranks(2)
def test_adasum_in_a_set_is_that_of_its_ranks(rank, size):
    # Oracle: Adasum of equal vectors is that vector; the other ranks' would change it.
    some = hvd.add_process_set(range(1, size))
    if some.included():
        value = integers(0, (9,), torch.float64)
        assert_equal(hvd.allreduce(value, op=hvd.Adasum, process_set=some), value)


@pytest.mark.min_ranks(2)
def test_a_rank_outside_a_set_is_refused_and_harms_nobody(rank, size):
    some = hvd.add_process_set([0])
    if rank > 0:
        with pytest.raises(ValueError, match=r"process_set .* rank"):
            hvd.allreduce(torch.zeros(3), process_set=some)
        with pytest.raises(ValueError, match=r"process_set .* rank"):
            hvd.barrier(process_set=some)
    assert_library_works()


@pytest.mark.min_ranks(2)
def test_the_root_of_a_set_is_a_global_rank(rank, size):
    some = hvd.add_process_set(range(1, size))
    if some.included():
        with pytest.raises(ValueError, match="root_rank must be one of the ranks"):
            hvd.broadcast(torch.zeros(3), 0, process_set=some)


@pytest.mark.min_ranks(2)
def test_a_disagreement_in_a_set_names_global_ranks_and_spares_the_others(rank, size):
    some = hvd.add_process_set(range(1, size))
    if some.included() and some.size() > 1:
        count = 4 if rank == size - 1 else 3
        with pytest.raises(hvd.HorovodInternalError, match=rf"rank {size - 1}: \(4,\)"):
            hvd.allreduce(torch.zeros(count), name="x", process_set=some)
        check_collectives(some, seed=4)
    assert_library_works()


def test_sets_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match="are those of"):
        hvd.add_process_set(range(size))
    for ranks in ([], [size], [-1], [0, 0]):
        with pytest.raises(ValueError, match="must hold increasing ranks"):
            hvd.add_process_set(ranks)
    with pytest.raises(ValueError, match="must be added with add_process_set"):
        hvd.allreduce(torch.zeros(3), process_set=hvd.ProcessSet([0]))


@pytest.mark.min_ranks(2)
def test_ranks_that_add_different_sets_are_told_so(rank, size):
    with pytest.raises(hvd.HorovodInternalError, match=r"disagree.*add_process_set"):
        hvd.add_process_set([0] if rank == 0 else [1])
    assert_library_works()


@pytest.mark.min_ranks(2)
def test_a_rank_that_adds_an_impossible_set_does_not_keep_the_others_waiting(rank, size):
    if rank == size - 1:
        with pytest.raises(ValueError, match="must hold increasing ranks"):
            hvd.add_process_set([0, 0])
    else:
        with pytest.raises(hvd.HorovodInternalError, match=f"rank {size - 1} rejected"):
            hvd.add_process_set([0])
    assert_library_works()


def test_sets_can_be_given_to_init(rank, size):
    hvd.shutdown()
    first = hvd.ProcessSet([size - 1])
    hvd.init(process_sets=[first] if size > 1 else None)
    if size > 1 and first.included():
        check_collectives(first, seed=5)
    assert_library_works()
