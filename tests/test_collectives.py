"""Reduce-scatter, all-to-all, all ops and dtypes, and statistics, between thread ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reference
from adareduce import _core
from adareduce._core import testing
from test_instruction_sets import FLOATS, INTEGERS, doubles_of, rounded, summed, values
from thread_ranks import DTYPES, STORAGE, Job, ThreadRank, over_messages, run_ranks, settings

SIZES = [1, 2, 3, 4, 5]
SHAPES = [(), (5, 8), (0,), (33,), (7, 3), (1000,)]
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def inputs_of(
    rng: np.random.Generator, size: int, dtype: str, shapes=SHAPES
) -> list[list[NDArray]]:
    """By rank and tensor."""
    return [
        [values(rng, int(np.prod(shape)), dtype).reshape(shape) for shape in shapes]
        for _ in range(size)
    ]


def expected_of(op: str, arrays: list[NDArray], dtype: str) -> NDArray:
    flat = [np.atleast_1d(array).ravel() for array in arrays]
    if op in ("sum", "average"):
        divisor = len(arrays) if op == "average" else 1.0
        if dtype == "int64" and op == "average" and len(arrays) > 1:
            with np.errstate(over="ignore"):
                total = np.add.reduce(np.stack(flat), axis=0)
            quotients = np.trunc(total.astype(np.float64) / len(arrays))
            return np.array([min(int(q), 2**63 - 1) for q in quotients], np.int64)
        return summed(flat, dtype, divisor)
    if dtype in FLOATS:
        wide = np.float64 if dtype == "float64" else np.float32
        flat = [doubles_of(array, dtype).astype(wide) for array in flat]
    reduce = {"min": np.minimum, "max": np.maximum, "product": np.multiply}[op]
    result = flat[0]
    for array in flat[1:]:
        with np.errstate(over="ignore"):
            result = reduce(result, array)
    return rounded(result, dtype) if dtype in FLOATS else result.astype(dtype)


CASES = [
    (op, dtype)
    for op in ["sum", "average", "min", "max", "product"]
    for dtype in [*FLOATS, *INTEGERS, "bool"]
    if not (dtype == "bool" and op in ("sum", "average"))
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_all_reduce_of_every_type(size: int, op: str, dtype: str, rng: np.random.Generator) -> None:
    inputs = inputs_of(rng, size, dtype)

    def body(rank: ThreadRank) -> list[NDArray]:
        return rank.grouped_allreduce(inputs[rank.rank], op=op, dtype=dtype)

    for results in run_ranks(size, body):
        for place, result in enumerate(results):
            expected = expected_of(op, [inputs[r][place] for r in range(size)], dtype)
            assert reference.same_bits(np.atleast_1d(result).ravel(), expected), place


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_reduce_scatter_gives_each_rank_its_rows_of_the_all_reduce(
    size: int, op: str, dtype: str, rng: np.random.Generator
) -> None:
    shapes = [(5, 8), (0, 3), (33,), (7, 3), (2,), (100, 0)]
    inputs = inputs_of(rng, size, dtype, shapes)

    def body(rank: ThreadRank) -> None:
        mine = inputs[rank.rank]
        firsts = [
            sum(shape[0] // size + (r < shape[0] % size) for r in range(rank.rank))
            for shape in shapes
        ]
        counts = [shape[0] // size + (rank.rank < shape[0] % size) for shape in shapes]
        outputs = [
            np.zeros((count, *shape[1:]), STORAGE[dtype])
            for count, shape in zip(counts, shapes, strict=True)
        ]
        rank.submit("reducescatter", mine, outputs=outputs, op=op, dtype=dtype).wait()
        whole = rank.grouped_allreduce(mine, op=op, dtype=dtype)
        for output, all_rows, first, count in zip(outputs, whole, firsts, counts, strict=True):
            assert reference.same_bits(output, all_rows[first : first + count])

    run_ranks(size, body)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bool", "int16"])
def test_all_to_all_transposes_blocks_of_any_length(size: int, dtype: str) -> None:
    def rows(sender: int, receiver: int) -> int:
        return (3 * sender + 2 * receiver) % 4

    def block(sender: int, receiver: int) -> NDArray:
        numbers = np.arange(rows(sender, receiver) * 3) + 7 * sender + receiver
        return numbers.reshape(-1, 3).astype(dtype)

    def body(rank: ThreadRank) -> NDArray:
        mine = np.concatenate([block(rank.rank, r) for r in range(size)])
        splits = [rows(rank.rank, r) for r in range(size)]
        pending = rank.submit("alltoall", [mine], splits=splits)
        (result,) = pending.gathered()
        ((_, _, received),) = pending.handle.gathered()
        assert received == [rows(r, rank.rank) for r in range(size)]
        return result

    for receiver, result in enumerate(run_ranks(size, body)):
        expected = np.concatenate([block(sender, receiver) for sender in range(size)])
        assert reference.same_bits(result, expected)


@pytest.mark.parametrize("splits", [[1, 1], [1, -1, 3], [1, 1, 2], []])
def test_splits_that_do_not_add_up_are_refused(splits: list[int]) -> None:
    def body(rank: ThreadRank) -> NDArray:
        with pytest.raises(ValueError, match="alltoall: splits"):
            rank.submit("alltoall", [np.ones((3, 2), np.float32)], splits=splits)
        return rank.allreduce(np.ones(1, np.float32))

    run_ranks(3, body)


# ---- statistics ----------------------------------------------------------------------------------

STAT_SHAPES = [(40,), (0,), (5, 8), (1000,), (17,), (3,)]
GROUPS = [1, 0, 0, 3, 1, 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["average", "sum"])
def test_variance_and_norm_come_with_the_reduction(
    size: int, dtype: str, op: str, rng: np.random.Generator
) -> None:
    # Gradients that agree: sigma^2 is what is left of a difference of large numbers.
    truth = [rng.standard_normal(shape) for shape in STAT_SHAPES]
    inputs = [
        [rounded(t + 0.1 * rng.standard_normal(t.shape), dtype) for t in truth] for _ in range(size)
    ]

    def body(rank: ThreadRank) -> tuple:
        plain = rank.grouped_allreduce(inputs[rank.rank], op=op, dtype=dtype)
        pending = rank.submit("allreduce", inputs[rank.rank], op=op, dtype=dtype, groups=GROUPS)
        for result, expected in zip(pending.wait(), plain, strict=True):
            assert reference.same_bits(result, expected)
        rows, orthogonality, nonfinite = pending.handle.statistics()
        assert orthogonality == []
        assert nonfinite == [0] * len(STAT_SHAPES)
        return np.array(rows).reshape(4, 4)

    rows_of_ranks = run_ranks(size, body)
    for rows in rows_of_ranks:
        assert reference.same_bits(rows, rows_of_ranks[0])
    rows = rows_of_ranks[0]
    assert (rows[2, :2] == 0).all()  # nobody's group
    for group in set(GROUPS):
        wide = [
            np.concatenate(
                [doubles_of(inputs[r][t], dtype).ravel() for t in range(6) if GROUPS[t] == group]
            )
            for r in range(size)
        ]
        total = sum(float(np.sum(vector**2)) for vector in wide)
        mean = float(np.sum((sum(wide) / size) ** 2))
        # Both are added in double, whatever the type.
        assert rows[group, 0] == pytest.approx(total, rel=1e-12)
        assert abs(rows[group, 1] - mean) <= 1e-12 * total / size
        if size == 1:
            assert np.isnan(rows[group, 2:]).all()
            continue
        variance = sum(float(np.sum((vector - sum(wide) / size) ** 2)) for vector in wide)
        variance /= size - 1
        scale = 1e-6 * total / size
        assert abs(rows[group, 2] - variance) <= scale
        assert abs(rows[group, 3] - (mean - variance / size)) <= scale


@pytest.mark.parametrize("size", SIZES)
def test_squares_that_the_caller_gives_count_once(size: int) -> None:
    # Oracle: exact sums. Two dtypes are two parts of a request.
    def body(rank: ThreadRank) -> list[float]:
        arrays = [np.full(40, 2.0, np.float32), np.ones(1000, np.float64)]
        given = [10.0 + rank.rank, 100.0 * rank.rank]
        pending = rank.submit("allreduce", arrays, op="average", groups=[0, 1],
                              local_squares=given)  # fmt: skip
        pending.wait()
        rows: list[float] = pending.handle.statistics()[0]
        return rows

    ranks = sum(range(size))
    for rows in run_ranks(size, body):
        assert rows[0::4] == [10.0 * size + ranks, 100.0 * ranks]
        assert rows[1::4] == [160.0, 1000.0]
        assert np.isnan([rows[2::4], rows[3::4]]).all(), "of how many gradients is not known"


def test_squares_must_fit_the_groups() -> None:
    def body(rank: ThreadRank) -> NDArray:
        with pytest.raises(ValueError, match="local_squares must have one entry for each of 1"):
            rank.submit("allreduce", [np.ones(3, np.float32)], op="average", groups=[0],
                        local_squares=[1.0, 2.0])  # fmt: skip
        return rank.allreduce(np.ones(1, np.float32))

    run_ranks(2, body)


@over_messages
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("op", ["average", "adasum"])
def test_statistics_cost_no_message_and_no_pass(
    size: int, op: str, rng: np.random.Generator
) -> None:
    inputs = inputs_of(rng, size, "float32", STAT_SHAPES)

    def count(groups: list[int] | None) -> tuple[int, int, dict]:
        world = _core.ThreadWorld(size)
        testing.reset_counted_work()
        start = threading.Barrier(size)
        counts = []

        def one_rank(number: int) -> None:
            engine = _core.Engine.over_threads(world, number, settings(), True)
            rank = ThreadRank(Job(size, settings()), engine)
            rank.grouped_allreduce(inputs[number], op=op, groups=groups)
            start.wait(20)
            before = world.traffic()
            start.wait(20)
            rank.grouped_allreduce(inputs[number], op=op, groups=groups)
            start.wait(20)
            after = world.traffic()
            counts.append((after[0] - before[0], after[1] - before[1]))
            start.wait(20)
            rank.leave("done")
            engine.stop()

        threads = [threading.Thread(target=one_rank, args=(n,)) for n in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(set(counts)) == 1, counts
        return *counts[0], testing.counted_work()

    messages, sent, work = count(None)
    messages_with, sent_with, work_with = count(GROUPS)
    assert messages_with == messages
    assert work_with.keys() == work.keys()
    for entry in work:
        calls, elements = work_with[entry]
        assert calls == work[entry][0], entry
        # Shards have one length where statistics travel: up to a line of padding for each.
        slack = 2 * 16 * size * size if entry == "reduce" and op == "average" else 0
        # Rows of statistics are reduced by the same kernel.
        slack += 2 * size * size * 8 * len(GROUPS) if op == "adasum" and entry == "reduce" else 0
        assert abs(elements - work[entry][1]) <= slack, entry
    assert 0 < sent_with - sent <= size * size * (8 * 8 * len(GROUPS) + 4 * 32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_orthogonality_comes_with_adasum(size: int, dtype: str, rng: np.random.Generator) -> None:
    shapes = [(40,), (0,), (1000,), (3,)]
    inputs = inputs_of(rng, size, dtype, shapes)

    def body(rank: ThreadRank) -> tuple:
        plain = rank.grouped_allreduce(inputs[rank.rank], op="adasum", dtype=dtype)
        pending = rank.submit(
            "allreduce", inputs[rank.rank], op="adasum", dtype=dtype, groups=[0] * 4
        )
        for result, expected in zip(pending.wait(), plain, strict=True):
            assert reference.same_bits(result, expected)
        return plain, pending.handle.statistics()

    outcomes = run_ranks(size, body)
    for _, statistics in outcomes:
        assert statistics == outcomes[0][1]
    plain, (groups, orthogonality, nonfinite) = outcomes[0]
    assert groups == []
    assert nonfinite == [0] * 4
    for place, result in enumerate(plain):
        total = sum(float(np.sum(doubles_of(inputs[r][place], dtype) ** 2)) for r in range(size))
        if total == 0:
            assert orthogonality[place] == 1.0
            continue
        exact = float(np.sum(doubles_of(result, dtype) ** 2)) / total
        # The result was rounded once more than the statistics know.
        assert abs(orthogonality[place] - exact) <= 8 * UNIT[dtype] + 1e-12
        assert 0 <= orthogonality[place] <= 1 + 8 * UNIT[dtype]


def test_inf_and_nan_are_counted_in_their_tensor_alone() -> None:
    def body(rank: ThreadRank) -> list:
        arrays = [np.ones(20, np.float32) for _ in range(3)]
        if rank.rank == 1:
            arrays[1][[3, 5]] = np.inf, np.nan
        counts = []
        for op in ["average", "sum", "adasum"]:
            pending = rank.submit("allreduce", arrays, op=op, groups=[0, 0, 0])
            pending.wait()
            counts.append(pending.handle.statistics()[2])
        return counts

    for counts in run_ranks(3, body):
        assert counts == [[0, 2, 0], [0, 2, 0], [0, 20, 0]]


# ---- Adasum of workers in one process ------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_local_adasum_is_the_adasum_of_ranks(
    workers: int, dtype: str, rng: np.random.Generator
) -> None:
    import adareduce.torch as hvd

    kind = getattr(torch, dtype)
    rows = [
        [torch.from_numpy(rng.standard_normal(shape)).to(kind) for shape in [(40,), (0,), (3, 5)]]
        for _ in range(workers)
    ]
    kept = [[tensor.clone() for tensor in row] for row in rows]
    results, orthogonality = hvd.local_adasum(rows)
    for row, copies in zip(rows, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, copies, strict=True))
    for place, result in enumerate(results):
        vectors = [row[place].double().numpy() for row in rows]
        exact = reference.adasum(vectors)
        length = sum(float(np.linalg.norm(vector)) for vector in vectors)
        assert result.dtype == kind
        error = np.linalg.norm(result.double().numpy() - exact.astype(np.float64))
        assert error <= 8 * UNIT[dtype] * length  # a rounding per level, up to 5 levels
        squares = sum(float(np.sum(vector**2)) for vector in vectors)
        expected = float(np.sum(exact**2)) / squares if squares else 1.0
        assert float(orthogonality[place]) == pytest.approx(expected, abs=16 * UNIT[dtype] + 1e-12)


def test_local_adasum_refuses_what_does_not_match() -> None:
    import adareduce.torch as hvd

    with pytest.raises(ValueError, match="at least one entry"):
        hvd.local_adasum([])
    with pytest.raises(ValueError, match="worker 1 must have tensors of the shapes"):
        hvd.local_adasum([[torch.ones(3)], [torch.ones(4)]])
    with pytest.raises(TypeError, match="got int64"):
        hvd.local_adasum([[torch.ones(3, dtype=torch.int64)]])


def test_codes_of_dtypes_are_all_tested() -> None:
    assert set(DTYPES) == {*FLOATS, *INTEGERS, "bool"}
