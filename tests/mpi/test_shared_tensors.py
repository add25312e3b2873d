"""Tensors in memory that all ranks can address: hvd.empty_shared, and what is reduced there.

Oracle: the same call with ordinary tensors, bit for bit; exact integers; the operating system's
list of this process's memory. Which way a request went is counted by the engine: ways.py. Where the
ranks share no memory the tensors are ordinary ones, and all but the counts must be the same.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from inputs import (
    ALL_DTYPES,
    SHAPES,
    arrays,
    assert_equal,
    assert_library_works,
    bits,
    integers,
    normals,
    of_all_ranks,
    total,
)
from ways import Watch, Ways, is_shared

import adareduce.torch as hvd
import reference

FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = [hvd.Sum, hvd.Average, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product]
# Bytes that go with the header; kPayloadBytes in csrc/transports/shared_memory/shared_memory.h.
SMALL_BYTES = 64 << 10
# Elements of any dtype that exceed that and fill several tiles of 16384 elements for each rank.
LARGE = 150_007
NAME_OF_MEMORY = "memfd:adareduce"  # as /proc lists it


def mapped_segments() -> list[int]:
    """Sizes of the shared segments of this process, in bytes."""
    sizes = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if NAME_OF_MEMORY in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            sizes.append(end - begin)
    return sizes


def lies_in_shared_memory(tensor: torch.Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return NAME_OF_MEMORY in line
    return False


def shared_copy(value: torch.Tensor) -> torch.Tensor:
    return hvd.empty_shared(value.shape, dtype=value.dtype).copy_(value)


def side_by_side(values: Sequence[torch.Tensor], begin: int = 0) -> list[torch.Tensor]:
    """Copies of tensors of one dtype in one region, the first at element `begin`."""
    flat = hvd.empty_shared(begin + sum(v.numel() for v in values), dtype=values[0].dtype)
    places = []
    for value in values:
        places.append(flat[begin : begin + value.numel()].view(value.shape).copy_(value))
        begin += value.numel()
    return places


def in_place(count: int = 1) -> Ways:
    """What is expected of `count` large requests over shared tensors."""
    return Ways(in_place=count) if is_shared() else Ways()


# ---- the tensor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_empty_shared_gives_zeros_of_this_shape_and_dtype(shape, dtype, rank, ranks):
    tensor = hvd.empty_shared(shape, dtype=dtype)
    assert_equal(tensor, torch.zeros(shape, dtype=dtype))
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    assert lies_in_shared_memory(tensor) == (is_shared() and tensor.numel() > 0)
    value = integers(rank, shape, dtype)
    ranks.gather(None)
    tensor.copy_(value)
    ranks.gather(None)  # nobody writes into another's
    assert_equal(tensor, value)


def test_sizes_are_given_as_to_torch_empty():
    assert hvd.empty_shared(3, 4).shape == (3, 4)
    assert hvd.empty_shared((3, 4)).shape == (3, 4)
    assert hvd.empty_shared([3, 4]).shape == (3, 4)
    assert hvd.empty_shared(torch.Size([5])).shape == (5,)
    assert hvd.empty_shared(7).shape == (7,)
    assert hvd.empty_shared(()).shape == ()
    assert hvd.empty_shared(2).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert hvd.empty_shared(2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.min_ranks(2)
def test_ranks_that_disagree_about_bytes_raise_on_every_rank(rank, size):
    # The same bytes in another shape are no disagreement.
    assert hvd.empty_shared(6 if rank == 0 else (2, 3)).numel() == 6
    with pytest.raises(hvd.HorovodInternalError) as raised:
        hvd.empty_shared(100 if rank == 0 else 101)
    text = str(raised.value)
    for part in ("empty_shared(", "400", "404", "bytes", "rank 0", "disagree"):
        assert part in text, text
    call = hvd.barrier if rank == size - 1 else lambda: hvd.empty_shared(100)
    with pytest.raises(hvd.HorovodInternalError, match="disagree") as raised:
        call()
    assert "empty_shared" in str(raised.value)
    assert_library_works()
    assert hvd.empty_shared(3).shape == (3,)


MISTAKES = {
    "negative": (lambda: hvd.empty_shared(3, -1), ValueError, "size must not be negative"),
    "not a number": (lambda: hvd.empty_shared(2.5), TypeError, "."),
    "a type without code": (
        lambda: hvd.empty_shared(3, dtype=torch.complex64), TypeError, "complex64"
    ),
    "beyond all addresses": (
        lambda: hvd.empty_shared(1 << 40, 1 << 40), ValueError, "size must be below"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_raises_on_every_rank(mistake, rank, size):
    call, error, words = MISTAKES[mistake]
    if rank == size - 1:
        with pytest.raises(error, match=words):
            call()
    else:
        with pytest.raises(hvd.HorovodInternalError, match=f"rank {size - 1} rejected") as raised:
            hvd.empty_shared(3)
        assert re.search(words, str(raised.value)), str(raised.value)
    assert_library_works()
    assert hvd.empty_shared(3).shape == (3,)


@pytest.mark.min_ranks(3)
def test_a_process_set_shares_memory_of_its_own(rank, size):
    members = hvd.add_process_set([*range(1, size)])
    if not members.included():
        with pytest.raises(ValueError, match=f"does not contain rank {rank}"):
            hvd.empty_shared(LARGE, process_set=members)
        return
    values = {other: integers(other, (LARGE,), torch.float32) for other in members.ranks}
    tensor = hvd.empty_shared(LARGE, process_set=members).copy_(values[rank])
    watch = Watch(members)
    hvd.allreduce_(tensor, op=hvd.Sum, process_set=members)
    assert watch.went() == (Ways(in_place=1) if is_shared(members) else Ways())
    assert_equal(tensor, total(list(values.values())))


@pytest.mark.min_ranks(3)
def test_memory_of_one_process_set_is_ordinary_to_another(rank, size):
    members = hvd.add_process_set([*range(1, size)])
    values = of_all_ranks(integers, (LARGE,), torch.float32)
    if members.included():
        tensor = hvd.empty_shared(LARGE, process_set=members)
    else:
        tensor = torch.empty(LARGE)
    tensor.copy_(values[rank])
    watch = Watch()
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert watch.went() == (Ways(through_slots=1) if is_shared() else Ways())
    assert_equal(tensor, total(values))


def test_a_process_set_that_was_not_added_is_refused():
    with pytest.raises(ValueError, match="process_set must be added"):
        hvd.empty_shared(3, process_set=hvd.ProcessSet([0]))


def test_a_tensor_outlives_shutdown_and_its_memory_goes_with_it(rank, size):
    tensor = shared_copy(torch.full((LARGE,), float(rank)))
    view = tensor[7:9]
    was_shared = is_shared()
    hvd.shutdown()
    gc.collect()
    per_tensor = size if was_shared else 0  # those of all ranks are mapped
    assert len(mapped_segments()) == per_tensor
    assert_equal(tensor, torch.full((LARGE,), float(rank)))
    del tensor
    gc.collect()
    assert len(mapped_segments()) == per_tensor  # the view has it
    assert_equal(view + 1, torch.full((2,), rank + 1.0))
    del view
    gc.collect()
    assert mapped_segments() == []
    hvd.init()
    assert_library_works()


def test_a_tensor_of_an_earlier_init_is_reduced_as_an_ordinary_one(rank):
    values = of_all_ranks(integers, (LARGE,), torch.float32)
    tensor = shared_copy(values[rank])
    hvd.shutdown()
    hvd.init()
    watch = Watch()
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert watch.went() == (Ways(through_slots=1) if is_shared() else Ways())
    assert_equal(tensor, total(values))


def test_memory_that_is_given_back_can_be_had_again(rank, size):
    gc.collect()
    before = mapped_segments()
    values = of_all_ranks(integers, (LARGE,), torch.float32)
    for _ in range(12):
        tensor = shared_copy(values[rank])
        hvd.allreduce_(tensor, op=hvd.Sum)
        assert_equal(tensor, total(values))
        del tensor
    assert mapped_segments() == before


@pytest.mark.min_ranks(2)
def test_ranks_may_give_back_different_tensors(rank, size):
    values = of_all_ranks(integers, (LARGE,), torch.float32)
    first, second = shared_copy(values[rank]), shared_copy(values[rank])
    if rank == 0:
        first = torch.empty(LARGE).copy_(first)  # its memory is freed, or used again for the next
    third = shared_copy(values[rank])
    watch = Watch()
    for tensor, went in ((first, Ways(through_slots=1)), (second, in_place()), (third, in_place())):
        hvd.allreduce_(tensor, op=hvd.Sum)
        assert watch.went() == (went if is_shared() else Ways())
        assert_equal(tensor, total(values))


def test_more_than_there_is_raises_on_every_rank_and_leaves_nothing(rank):
    if not is_shared():
        pytest.skip("an ordinary tensor is the operating system's matter")
    gc.collect()
    before = mapped_segments()
    for numel in (1 << 50, 1 << 46):
        with pytest.raises(hvd.HorovodInternalError, match=r"cannot share memory.* are left"):
            hvd.empty_shared(numel, dtype=torch.uint8)
        assert mapped_segments() == before
        assert_library_works()
    assert hvd.empty_shared(3).shape == (3,)


# ---- reductions in place ------------------------------------------------------------------------


def assert_as_ordinary(places, values, op, **arguments):
    """Reduces shared tensors and ordinary ones; equal bits."""
    expected = hvd.grouped_allreduce(values, op=op, **arguments)
    hvd.grouped_allreduce_(places, op=op, **arguments)
    for tensor, other in zip(places, expected, strict=True):
        assert bits(tensor) == bits(other)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("numel", [1, 1000, 33_000, LARGE, 1_000_003])
def test_reductions_in_place_have_the_bits_of_ordinary_ones(numel, op, dtype, rank):
    value = normals(rank, (numel,), dtype)
    tensor = shared_copy(value)
    watch = Watch()
    assert_as_ordinary([tensor], [value], op)
    if is_shared():
        is_small = numel * dtype.itemsize <= SMALL_BYTES
        assert watch.went() == (
            Ways(on_boards=2) if is_small else Ways(through_slots=1, in_place=1)
        )


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_in_place_are_in_rank_order(dtype, op, rank, size):
    # Oracle: tests/reference.py, bit for bit.
    values = of_all_ranks(normals, (LARGE,), dtype)
    tensor = shared_copy(values[rank])
    hvd.allreduce_(tensor, op=op)
    expected = reference.sum_in_rank_order(arrays(values), size if op == hvd.Average else 1.0)
    assert reference.same_bits(tensor.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adasum_in_place_agrees_with_the_tree(dtype, rank):
    # Oracle: the long double tree and its bound.
    values = of_all_ranks(normals, (LARGE,), dtype)
    tensor = shared_copy(values[rank])
    hvd.allreduce_(tensor, op=hvd.Adasum)
    expected, bound = reference.adasum_with_bound(arrays(values))
    assert reference.norm(tensor.numpy() - expected) <= bound


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Min, hvd.Max], ids=str)
def test_whole_numbers_in_place(op, dtype, rank):
    values = of_all_ranks(integers, (LARGE,), dtype)
    tensor = shared_copy(values[rank])
    watch = Watch()
    hvd.allreduce_(tensor, op=op)
    assert watch.went() == in_place()
    stacked = torch.stack(values)
    expected = {
        hvd.Sum: total(values), hvd.Min: stacked.amin(0), hvd.Max: stacked.amax(0)
    }  # fmt: skip
    assert_equal(tensor, expected[op])


SHAPES_OF_GROUP = [(LARGE,), (5,), (0,), (), (100, 333), (1,), (3, 0), (20_001,)]


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average, hvd.Adasum, hvd.Max], ids=str)
@pytest.mark.parametrize("layout", ["one region", "a region each", "element 1", "backwards"])
def test_groups_in_place(layout, op, rank):
    values = [normals(rank, shape, torch.float32, i) for i, shape in enumerate(SHAPES_OF_GROUP)]
    if layout == "a region each":
        places = [shared_copy(value) for value in values]
    elif layout == "backwards":
        places = side_by_side(values[::-1])[::-1]
    else:
        places = side_by_side(values, begin=1 if layout == "element 1" else 0)
    watch = Watch()
    assert_as_ordinary(places, values, op)
    if is_shared():
        assert watch.went() == Ways(through_slots=1, in_place=1)


@pytest.mark.parametrize("begin", [1, 3, 31])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_views_at_odd_offsets_write_nothing_outside(begin, dtype, rank):
    values = of_all_ranks(integers, (LARGE,), dtype)
    flat = hvd.empty_shared(begin + LARGE + 5, dtype=dtype).fill_(77)
    view = flat[begin : begin + LARGE].copy_(values[rank])
    watch = Watch()
    hvd.allreduce_(view, op=hvd.Sum)
    assert watch.went() == in_place()
    assert_equal(view, total(values))
    assert (flat[:begin] == 77).all()
    assert (flat[begin + LARGE :] == 77).all()


def test_dtypes_in_one_request(rank):
    # One after the other through the same slots, where a quick rank must not overtake a slow one.
    specs = [(LARGE, torch.float32), (40_001, torch.bfloat16), (9, torch.float64)]
    specs.append((LARGE, torch.float64))
    for op in 4 * (hvd.Sum, hvd.Adasum):
        values = [normals(rank, (n,), dtype, i) for i, (n, dtype) in enumerate(specs)]
        places = [shared_copy(value) for value in values]
        watch = Watch()
        assert_as_ordinary(places, values, op)
        assert watch.went().in_place == in_place().in_place


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average, hvd.Adasum], ids=str)
def test_postscale_in_place(op, rank):
    value = normals(rank, (LARGE,), torch.float32)
    tensor = shared_copy(value)
    watch = Watch()
    assert_as_ordinary([tensor], [value], op, postscale_factor=0.3)
    assert watch.went().in_place == in_place().in_place


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Adasum], ids=str)
def test_prescale_goes_through_slots(op, rank):
    value = normals(rank, (LARGE,), torch.float32)
    tensor = shared_copy(value)
    watch = Watch()
    assert_as_ordinary([tensor], [value], op, prescale_factor=0.3)
    assert watch.went() == (Ways(through_slots=2) if is_shared() else Ways())


@pytest.mark.min_ranks(2)
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Adasum], ids=str)
@pytest.mark.parametrize("difference", ["place", "region", "no region", "one of two"])
def test_tensors_at_different_places_go_through_slots(difference, op, rank, size):
    is_odd = rank == size - 1
    value = normals(rank, (LARGE,), torch.float32)
    first, second = hvd.empty_shared(LARGE + 8), hvd.empty_shared(LARGE + 8)
    tensor = {
        "place": first[8:] if is_odd else first[:-8],
        "region": (second if is_odd else first)[:-8],
        "no region": torch.empty(LARGE) if is_odd else first[:-8],
        "one of two": first[:-8],
    }[difference].copy_(value)
    tensors, values = [tensor], [value]
    if difference == "one of two":
        tensors.append(torch.ones(3) if is_odd else hvd.empty_shared(3).fill_(1))
        values.append(torch.ones(3))
        if is_odd:
            hvd.empty_shared(3)
    watch = Watch()
    assert_as_ordinary(tensors, values, op)
    assert watch.went() == (Ways(through_slots=2) if is_shared() else Ways())


def test_a_result_elsewhere_goes_through_slots(rank):
    values = of_all_ranks(integers, (LARGE,), torch.float32)
    tensor = shared_copy(values[rank])
    watch = Watch()
    result = hvd.allreduce(tensor, op=hvd.Sum)
    assert watch.went() == (Ways(through_slots=1) if is_shared() else Ways())
    assert_equal(result, total(values))
    assert_equal(tensor, values[rank])


def test_a_view_with_gaps_is_refused_as_ever(rank):
    tensor = hvd.empty_shared(300, 400)
    with pytest.raises(ValueError, match="contiguous"):
        hvd.allreduce_(tensor[:, ::2], op=hvd.Sum)
    assert_library_works()


def test_dense_strides_in_another_order(rank):
    values = of_all_ranks(integers, (30, 700, 10), torch.float32)
    tensor = shared_copy(values[rank].transpose(0, 2).contiguous()).transpose(0, 2)
    watch = Watch()
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert watch.went() == in_place()
    assert_equal(tensor, total(values))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average, hvd.Adasum], ids=str)
def test_statistics_in_place_are_those_of_ordinary_tensors(op, dtype, rank, size):
    shapes = [(LARGE,), (0,), (1001,), (65, 700)]
    values = [normals(rank, shape, dtype, i) for i, shape in enumerate(shapes)]
    values[0][rank :: 10 * size][:40] = math.inf
    values[3].view(-1)[size - 1 - rank] = math.nan
    groups = None if op == hvd.Adasum else [0, 1, 0, 2]
    places = side_by_side(values, begin=1)
    expected, about_ordinary = hvd.grouped_allreduce_with_stats(values, groups, op=op)
    watch = Watch()
    _, about_shared = hvd.grouped_allreduce_with_stats_(places, groups, op=op)
    assert watch.went() == in_place()
    for tensor, other in zip(places, expected, strict=True):
        assert bits(tensor) == bits(other)
    assert_equal(about_shared.nonfinite, about_ordinary.nonfinite)
    counts = [int((~torch.isfinite(tensor)).sum()) for tensor in places]
    assert about_shared.nonfinite.tolist() == counts
    for mine, theirs in ((about_shared.groups, about_ordinary.groups),
                         (about_shared.orthogonality, about_ordinary.orthogonality)):  # fmt: skip
        assert (mine is None) == (theirs is None)
        assert mine is None or bits(mine) == bits(theirs)


def test_local_squares_with_tensors_in_place(rank, size):
    tensor = shared_copy(torch.ones(LARGE))
    watch = Watch()
    _, statistics = hvd.grouped_allreduce_with_stats_(
        [tensor], op=hvd.Average, local_squares=torch.tensor([rank + 0.5], dtype=torch.float64)
    )
    assert watch.went() == in_place()
    # Oracle: exact numbers.
    assert statistics.groups[0, :2].tolist() == [sum(r + 0.5 for r in range(size)), float(LARGE)]


def test_many_requests_at_once_in_place(rank):
    values = [of_all_ranks(integers, (n,), torch.float32, n) for n in (LARGE, 3, 50_000, 200_001)]
    places = [shared_copy(v[rank]) for v in values]
    watch = Watch()
    for round_ in range(3):
        for place, v in zip(places, values, strict=True):
            place.copy_(v[rank])
        handles = [hvd.allreduce_async_(place, op=hvd.Sum) for place in places]
        hvd.barrier()
        for handle, v in zip(reversed(handles), reversed(values), strict=True):
            assert_equal(hvd.synchronize(handle), total(v))
        assert watch.went().in_place == in_place(3).in_place, round_


def test_the_number_of_workers_is_that_of_the_environment():
    expected = int(os.environ.get("ADAREDUCE_WORKERS") or 1) if is_shared() else 1
    assert hvd.shared_memory_choices().workers == expected


def test_autograd_notices_what_is_reduced_in_place(rank, size):
    tensor = hvd.empty_shared(LARGE).fill_(rank + 1.0)
    version = tensor._version
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert tensor._version > version
    weight = torch.ones(LARGE, requires_grad=True)
    product = (weight * tensor).sum()  # saves the tensor for backward
    hvd.allreduce_(tensor, op=hvd.Sum)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_ranks_take_what_broadcast_and_gathers_leave_in_shared_memory(rank, size):
    values = of_all_ranks(integers, (LARGE,), torch.float32)
    tensor = shared_copy(values[rank])
    hvd.broadcast_(tensor, size - 1)
    assert_equal(tensor, values[-1])
    tensor.copy_(values[rank])
    assert_equal(hvd.allgather(tensor), torch.cat(values))
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert_equal(tensor, total(values))
