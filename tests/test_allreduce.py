"""All-reduce Sum and Average between ranks that are threads.

Oracle: integers in floats, whose sums are exact, and the sum in rank order of tests/reference.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from thread_ranks import ThreadRank, run_ranks

SIZES = [1, 2, 3, 4, 5, 8]
FLOATS = ["float32", "float64"]
SHAPES = [(), (1,), (5, 8), (0,), (16,), (17,), (3, 0, 2), (2, 3, 5), (1000,), (70_001,)]


def whole_numbers(rank: int, shape: tuple[int, ...], dtype: str) -> NDArray:
    """Between -50 and 50, different on every rank: sums over 8 ranks are exact in float32."""
    numel = int(np.prod(shape))
    return ((np.arange(numel) * (7 + 3 * rank) + 13 * rank) % 101 - 50).reshape(shape).astype(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sum_of_whole_numbers_is_exact(size: int, dtype: str) -> None:
    def body(rank: ThreadRank) -> list[NDArray]:
        inputs = [whole_numbers(rank.rank, shape, dtype) for shape in SHAPES]
        singly = [rank.allreduce(array) for array in inputs]
        together = rank.grouped_allreduce(inputs)
        for array, shape in zip(inputs, SHAPES, strict=True):
            assert reference.same_bits(array, whole_numbers(rank.rank, shape, dtype))
        for left, right in zip(singly, together, strict=True):
            assert reference.same_bits(left, right)
        return singly

    expected = [
        sum(whole_numbers(rank, shape, "int64") for rank in range(size)).astype(dtype)
        for shape in SHAPES
    ]
    for results in run_ranks(size, body):
        for result, total in zip(results, expected, strict=True):
            assert np.array_equal(result, total)
            assert result.dtype == total.dtype


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_average_divides_the_sum_in_double_and_rounds_once(size: int, dtype: str) -> None:
    shapes = [(5, 8), (33,), (0,), (1,)]

    def body(rank: ThreadRank) -> list[NDArray]:
        inputs = [whole_numbers(rank.rank, shape, dtype) for shape in shapes]
        return rank.grouped_allreduce(inputs, op="average")

    for results in run_ranks(size, body):
        for result, shape in zip(results, shapes, strict=True):
            total = sum(whole_numbers(rank, shape, "float64") for rank in range(size))
            assert np.array_equal(result, (total / size).astype(dtype))


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("op", ["sum", "average"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_run_in_rank_order_on_every_rank(
    size: int, op: str, dtype: str, rng: np.random.Generator
) -> None:
    shapes = [(5, 8), (0,), (1,), (4001,)]
    inputs = [
        [
            (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4)).astype(dtype)
            for _ in range(size)
        ]
        for shape in shapes
    ]
    divisor = size if op == "average" else 1.0
    expected = [reference.sum_in_rank_order(vectors, divisor) for vectors in inputs]

    def body(rank: ThreadRank) -> list[list[NDArray]]:
        mine = [vectors[rank.rank] for vectors in inputs]
        return [rank.grouped_allreduce(mine, op=op) for _ in range(2)]

    for runs in run_ranks(size, body):
        for results in runs:
            for result, total in zip(results, expected, strict=True):
                assert reference.same_bits(result, total)


@pytest.mark.parametrize("op", ["sum", "average"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_factors_multiply_before_and_after(
    op: str, dtype: str, rng: np.random.Generator
) -> None:
    size, prescale, postscale = 3, 1 / 3, -0.7
    inputs = [rng.standard_normal(123).astype(dtype) for _ in range(size)]
    scaled = [reference.scale(vector, prescale) for vector in inputs]
    total = reference.sum_in_rank_order(scaled, size if op == "average" else 1.0)
    expected = reference.scale(total, postscale)

    def body(rank: ThreadRank) -> NDArray:
        return rank.allreduce(inputs[rank.rank], op=op, prescale=prescale, postscale=postscale)

    for result in run_ranks(size, body):
        assert reference.same_bits(result, expected)


@pytest.mark.parametrize("op", ["sum", "average", "adasum"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_tensors_of_different_types_are_reduced_with_the_others_of_their_type(
    op: str, size: int, rng: np.random.Generator
) -> None:
    # Oracle: one call per type, bit for bit; those are compared with references elsewhere.
    dtypes = ["float64", "float32", "float32", "float64", "float32", "float64"]
    shapes = [(3,), (5, 8), (0,), (1000,), (17,), ()]
    inputs = [
        [
            np.asarray(rng.standard_normal(shape), dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        for _ in range(size)
    ]

    def body(rank: ThreadRank) -> None:
        mine = inputs[rank.rank]
        scales = {"prescale": 0.3, "postscale": 3.0}
        together = rank.grouped_allreduce(mine, op=op, **scales)
        for dtype in FLOATS:
            places = [i for i, name in enumerate(dtypes) if name == dtype]
            alone = rank.grouped_allreduce([mine[i] for i in places], op=op, **scales)
            for place, expected in zip(places, alone, strict=True):
                assert reference.same_bits(together[place], expected, dtype)

    run_ranks(size, body)


@pytest.mark.parametrize("op", ["sum", "average", "adasum"])
def test_a_call_without_tensors_returns(op: str) -> None:
    assert run_ranks(3, lambda rank: rank.grouped_allreduce([], op=op)) == [[]] * 3


@pytest.mark.parametrize("op", ["sum", "average", "adasum"])
def test_empty_tensors_need_no_memory(op: str) -> None:
    codes = {"average": 0, "sum": 1, "adasum": 2}

    def body(rank: ThreadRank) -> NDArray:
        handle = rank.engine.submit(
            process_set=0,
            collective=0,
            name="empty",
            op=codes[op],
            root=0,
            prescale=0.5,
            postscale=0.5,
            tensors=[((0,), 7, 0, 0, (), 0), ((3, 0), 7, 0, 0, (), 0)],
        )
        rank.wait_for(handle)
        handle.rethrow()
        return rank.allreduce(np.ones(3, np.float32))

    for result in run_ranks(3, body):
        assert result.tolist() == [3.0] * 3


def test_results_may_replace_the_inputs() -> None:
    def body(rank: ThreadRank) -> list[NDArray]:
        mine = [whole_numbers(rank.rank, shape, "float32") for shape in SHAPES]
        return rank.grouped_allreduce(mine, outputs=mine)

    for results in run_ranks(3, body):
        for result, shape in zip(results, SHAPES, strict=True):
            assert np.array_equal(
                result, sum(whole_numbers(rank, shape, "int64") for rank in range(3))
            )


def test_nothing_is_written_beside_the_tensors() -> None:
    numels = [1, 5, 16, 17, 31, 100]

    def body(rank: ThreadRank) -> None:
        memory = [np.full(count + 32, 7.0, np.float32) for count in numels]
        views = [array[16:-16] for array in memory]
        for view in views:
            view[:] = 1.0
        rank.grouped_allreduce(views, outputs=views)
        for array in memory:
            assert (array[:16] == 7.0).all()
            assert (array[-16:] == 7.0).all()
            assert (array[16:-16] == 3.0).all()

    run_ranks(3, body)


@pytest.mark.parametrize(
    ("op", "dtype"), [("adasum", "int32"), ("adasum", "bool"), ("sum", "bool"), ("average", "bool")]
)
def test_types_without_the_operation_are_refused_at_the_call(op: str, dtype: str) -> None:
    def body(rank: ThreadRank) -> NDArray:
        message = f"allreduce: dtype must be one that {op.title()} is defined for, got {dtype}"
        with pytest.raises(ValueError, match=message):
            rank.allreduce(np.ones(3, dtype), op=op)
        return rank.allreduce(np.ones(3, np.float32))

    for result in run_ranks(2, body):
        assert result.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "codes",
    [
        {"collective": 99},
        {"collective": 200},
        {"op": 6},
        {"dtype": 10},
        {"collective": 1, "dtype": 10},
        {"collective": 2, "dtype": 200},
    ],
    ids=str,
)
def test_unknown_codes_are_refused_and_take_no_turn(codes: dict[str, int]) -> None:
    def body(rank: ThreadRank) -> NDArray:
        array = np.ones(3, np.float32)
        request = {"collective": 0, "dtype": 7, "op": 1} | codes
        dtype = request.pop("dtype")
        if rank.rank == 1:
            with pytest.raises(ValueError, match="unknown"):
                rank.engine.submit(
                    process_set=0,
                    name="x",
                    root=0,
                    prescale=1.0,
                    postscale=1.0,
                    tensors=[((3,), dtype, array.ctypes.data, array.ctypes.data, (), 0)],
                    **request,
                )
        return rank.allreduce(array)

    for result in run_ranks(2, body):
        assert result.tolist() == [2.0] * 3
