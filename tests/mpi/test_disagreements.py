"""Calls that do not fit together: every rank hears of it, in parts, and the library works on.

Oracle: the message's parts, and an exact all-reduce afterwards. The last rank is the odd one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from inputs import assert_equal, assert_library_works, rank_words

import adareduce.torch as hvd

pytestmark = pytest.mark.min_ranks(2)

Call = Callable[[], Any]


class Case(NamedTuple):
    usual: Call
    odd: Call
    field: str
    usual_value: str
    odd_value: str  # empty: whatever stands for no value
    parts: tuple[str, ...] = ()  # further parts of the message


def reduce(numel: int = 3, dtype: torch.dtype = torch.float32, **arguments: Any) -> Call:
    arguments = {"name": "x", "op": hvd.Sum} | arguments
    return lambda: hvd.allreduce(torch.ones(numel, dtype=dtype), **arguments)


def group(*shapes: tuple[int, ...]) -> Call:
    return lambda: hvd.grouped_allreduce([torch.ones(s) for s in shapes], name="g", op=hvd.Sum)


def broadcast(root: int, numel: int = 3) -> Call:
    return lambda: hvd.broadcast(torch.ones(numel), root, name="b")


def gather(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Call:
    return lambda: hvd.allgather(torch.ones(shape, dtype=dtype), name="a")


CASES = {
    "shape": Case(reduce(3), reduce(4), "shape", "(3,)", "(4,)", ("shape=(3,)", "shape=(4,)")),
    "dtype": Case(reduce(), reduce(dtype=torch.float64), "dtype", "float32", "float64"),
    "op": Case(reduce(), reduce(op=hvd.Adasum), "op", "Sum", "Adasum", ("op=Sum", "op=Adasum")),
    "name": Case(reduce(), reduce(name="y"), "name", "'x'", "'y'"),
    "no name": Case(reduce(), reduce(name=None), "name", "'x'", ""),
    "prescale": Case(reduce(), reduce(prescale_factor=0.5), "prescale_factor", "1", "0.5"),
    "postscale": Case(
        reduce(postscale_factor=0.1), reduce(postscale_factor=0.2), "postscale_factor", "0.1", "0.2"
    ),
    "collective": Case(reduce(), broadcast(0), "collective", "allreduce", "broadcast"),
    "gather or reduce": Case(gather((3,)), reduce(), "collective", "allgather", "allreduce"),
    "root": Case(broadcast(0), broadcast(1), "root_rank", "0", "1"),
    "broadcast shape": Case(broadcast(0), broadcast(0, 5), "shape", "(3,)", "(5,)"),
    "gather columns": Case(gather((2, 3)), gather((2, 4)), "shape", "(*, 3)", "(*, 4)"),
    "gather dimensions": Case(gather((2, 3)), gather((2,)), "shape", "(*, 3)", "(*,)"),
    "gather dtype": Case(gather((2,)), gather((2,), torch.int8), "dtype", "float32", "int8"),
    "group size": Case(
        group((2,), (3,)), group((2,), (3,), (4,)), "number of tensors", "2", "3", ("3 tensors",)
    ),
    "second tensor": Case(
        group((2,), (3, 3)), group((2,), (3, 4)), "shape of tensor 1", "(3, 3)", "(3, 4)"
    ),
}


@pytest.mark.openmpi_round
@pytest.mark.parametrize("case", CASES)
def test_a_disagreement_names_field_values_and_ranks_on_every_rank(case, rank, size, ranks):
    expected = CASES[case]
    call = expected.odd if rank == size - 1 else expected.usual
    with pytest.raises(hvd.HorovodInternalError) as raised:
        call()
    message = str(raised.value)
    usual = f"{rank_words(range(size - 1))}: {expected.usual_value}"
    odd = f"rank {size - 1}: {expected.odd_value}"
    assert f"{expected.field} ({usual}; {odd}{')' if expected.odd_value else ''}" in message
    for part in (
        f"{rank_words(range(size - 1))} called",
        f"rank {size - 1} called",
        *expected.parts,
    ):
        assert part in message
    verdicts = ranks.gather(message.partition("the ranks disagree")[2])
    assert len(set(verdicts)) == 1, "the ranks were told different things"
    assert_library_works()


@pytest.mark.min_ranks(3)
def test_every_side_of_a_disagreement_is_listed(rank, size):
    with pytest.raises(hvd.HorovodInternalError) as raised:
        hvd.allreduce(torch.ones(rank + 1), name="x")
    for other in range(size):
        assert f"rank {other}: ({other + 1},)" in str(raised.value)
    assert_library_works()


def test_a_missing_call_shows_as_a_shifted_sequence(rank, size):
    # The odd rank has skipped the first call: its second meets the others' first.
    name = "first" if rank < size - 1 else "second"
    with pytest.raises(hvd.HorovodInternalError, match=r"name \(.*'first'.*'second'"):
        hvd.allreduce(torch.ones(2), name=name)
    assert_library_works()  # both sides have made one call


def test_nothing_is_written_when_the_ranks_disagree(rank, size):
    tensors = [torch.full((4,), float(rank)), torch.full((5 + (rank == 0),), float(rank))]
    with pytest.raises(hvd.HorovodInternalError):
        hvd.grouped_allreduce_(tensors, op=hvd.Sum)
    for tensor in tensors:
        assert_equal(tensor, torch.full_like(tensor, float(rank)))


def test_calls_queued_behind_a_disagreement_still_run(rank, size):
    wrong = hvd.allreduce_async(torch.ones(3 + (rank == 0)), name="wrong", op=hvd.Sum)
    right = hvd.allreduce_async(torch.ones(3), name="right", op=hvd.Sum)
    assert_equal(hvd.synchronize(right), torch.full((3,), float(size)))
    with pytest.raises(hvd.HorovodInternalError, match="'wrong'"):
        hvd.synchronize(wrong)


REJECTIONS: dict[str, tuple[Call, Call, type[Exception], str]] = {
    "dtype": (
        reduce(), reduce(dtype=torch.int32, op=hvd.Adasum), TypeError,
        "allreduce: dtype must be float16",
    ),
    "strides": (
        lambda: hvd.allreduce_(torch.ones(2, 3)), lambda: hvd.allreduce_(torch.ones(2, 6)[:, ::2]),
        ValueError, "allreduce: tensor must be dense",
    ),
    "op": (reduce(), reduce(op=99), ValueError, "allreduce: op must be one of"),
    "op and average": (reduce(), reduce(average=True), ValueError, "only one of average and op"),
    "root": (broadcast(0), broadcast(99), ValueError, "broadcast: root_rank must be one of"),
    "scalar": (gather((3,)), gather(()), ValueError, "at least one dimension"),
    "not a tensor": (
        reduce(), lambda: hvd.allreduce("x"), TypeError, "must be a torch.Tensor, got str",
    ),
    "second of a group": (
        group((2,), (3,)), lambda: hvd.grouped_allreduce([torch.ones(2), None]), TypeError,
        "tensor 1 of 2 must be a torch.Tensor",
    ),
    "compression": (reduce(), reduce(compression="fp16"), TypeError, "compression must be one of"),
    "scale factor": (
        reduce(), reduce(prescale_factor="much"), ValueError, "could not convert string to float",
    ),
    "object": (
        lambda: hvd.broadcast_object(1, root_rank=0),
        lambda: hvd.broadcast_object(1, root_rank=99), ValueError, "root_rank must be one of",
    ),
    "parameters": (
        lambda: hvd.broadcast_parameters({"a": torch.ones(2)}, 0),
        lambda: hvd.broadcast_parameters({"a": "text"}, 0), TypeError,
        "broadcast_parameters: tensor must be a torch.Tensor",
    ),
    "group of two dtypes": (
        lambda: hvd.grouped_allreduce([torch.ones(2), torch.ones(2).double()], op=hvd.Sum),
        lambda: hvd.grouped_allreduce([torch.ones(2), torch.ones(2).int()], op=hvd.Adasum),
        TypeError,
        "dtype must be float16",
    ),
    "parameters of two dtypes": (
        lambda: hvd.broadcast_parameters({"a": torch.ones(2), "b": torch.ones(2).int()}, 0),
        lambda: hvd.broadcast_parameters({"a": torch.ones(2), "b": None}, 0), TypeError,
        "must be a torch.Tensor, got NoneType",
    ),
}  # fmt: skip


@pytest.mark.openmpi_round
@pytest.mark.parametrize("case", REJECTIONS)
def test_a_mistake_of_one_rank_raises_on_all(case, rank, size):
    usual, mistaken, kind, words = REJECTIONS[case]
    if rank == size - 1:
        with pytest.raises(kind, match=re.escape(words)):
            mistaken()
    else:
        with pytest.raises(hvd.HorovodInternalError, match=re.escape(words)) as raised:
            usual()
        assert f"rank {size - 1} rejected its own call: {kind.__name__}: " in str(raised.value)
    assert_library_works()


def test_groups_with_different_numbers_of_dtypes_leave_the_library_usable(rank, size):
    tensors = [torch.ones(2), torch.ones(2, dtype=torch.float64 if rank == 0 else torch.float32)]
    with pytest.raises(hvd.HorovodInternalError, match="disagree"):
        hvd.grouped_allreduce(tensors, op=hvd.Sum)
    assert_library_works()


def test_models_with_different_numbers_of_dtypes_leave_the_library_usable(rank, size):
    params = {
        "a": torch.ones(2),
        "b": torch.ones(2, dtype=torch.int64 if rank == 0 else torch.float32),
    }
    with pytest.raises(hvd.HorovodInternalError, match="disagree"):
        hvd.broadcast_parameters(params, root_rank=0)
    assert_library_works()
