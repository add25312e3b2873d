"""Reductions and copies over the memory of peers, run by the emulated CUDA runtime.

Oracles: the CPU's kernels, bit for bit; float64 for squares; slices of arrays for copies.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from half_types import from_storage, to_storage
from peer_ranks import OPS, PeerRanks, load, peer_library, shard
from thread_ranks import DTYPES, STORAGE

__all__ = ["peer_library"]
SIZES = [1, 2, 3, 4, 5, 8]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
NUMELS = [1, 16, 1000, 5003]
HANG_LIMIT = 40.0


@pytest.fixture(scope="session")
def library(peer_library: Path) -> ctypes.CDLL:
    return load(peer_library)


def numbers(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    """Values whose sums depend on the order, and for integers any bits."""
    if dtype in FLOATS:
        values = rng.standard_normal(numel) * 2.0 ** rng.integers(-5, 6, numel)
        return to_storage(values, dtype)
    storage = np.dtype(np.uint8) if dtype == "bool" else STORAGE[dtype]
    bits = np.frombuffer(rng.bytes(numel * storage.itemsize), storage).copy()
    return (bits % 2).astype(bool) if dtype == "bool" else bits


def by_the_cpu(dtype: str, op: str, inputs: Sequence[NDArray], divisor: float) -> NDArray:
    out = np.empty(inputs[0].size, STORAGE[dtype])
    testing.reduce(DTYPES[dtype], OPS[op], list(inputs), divisor, out, out.size)
    return out


# ---- peer_reduce -------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "op"), [(t, op) for t in DTYPES for op in OPS if (t, op) != ("bool", "sum")]
)
def test_every_rank_receives_the_bits_of_the_cpu(
    library: ctypes.CDLL, dtype: str, op: str, size: int, rng: np.random.Generator
) -> None:
    for numel in NUMELS:
        inputs = [numbers(rng, numel, dtype) for _ in range(size)]
        divisors = [1.0, float(size), 0.3] if op == "sum" else [1.0]
        with PeerRanks(library, size, dtype, [], numel) as ranks:
            ranks.write(inputs)
            for divisor in divisors:
                ranks.reduce(op, divisor)
                expected = by_the_cpu(dtype, op, inputs, divisor)
                for out in ranks.read("out"):
                    assert reference.same_bits(out, expected), (numel, divisor)
            assert ranks.error_words() == [0] * size


@pytest.mark.parametrize("op", ["min", "max", "sum", "product"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_of_one_rank_is_nan_for_all(
    library: ctypes.CDLL, dtype: str, op: str, rng: np.random.Generator
) -> None:
    for bad in range(3):
        inputs = [numbers(rng, 40, dtype) for _ in range(3)]
        inputs[bad][17] = to_storage(np.array([np.nan]), dtype)[0]
        with PeerRanks(library, 3, dtype, [], 40) as ranks:
            ranks.write(inputs)
            ranks.reduce(op)
            for out in ranks.read("out"):
                is_nan = np.isnan(from_storage(out, dtype))
                assert np.flatnonzero(is_nan).tolist() == [17]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_scattered_results_are_what_each_rank_keeps(
    library: ctypes.CDLL, size: int, dtype: str, rng: np.random.Generator
) -> None:
    numel = 5003
    cuts = np.sort(rng.integers(0, numel, size - 1)).tolist()
    keeps = list(zip([0, *cuts], [*cuts, numel], strict=True))
    keeps[0] = (5, 5)  # nothing
    inputs = [numbers(rng, numel, dtype) for _ in range(size)]
    expected = by_the_cpu(dtype, "sum", inputs, 1.0)
    poison = np.frombuffer(b"\xa5" * numel * expected.itemsize, expected.dtype)
    with PeerRanks(library, size, dtype, [], numel) as ranks:
        ranks.write(inputs)
        ranks.write([poison] * size, "out")
        ranks.reduce("sum", keeps=keeps)
        for (begin, end), out in zip(keeps, ranks.read("out"), strict=True):
            whole = poison.copy()
            whole[begin:end] = expected[begin:end]
            assert reference.same_bits(out, whole)


def accumulated(inputs: Sequence[NDArray], dtype: str, divisor: float) -> NDArray[np.float64]:
    """The result before it is rounded: added in the accumulator's type, divided in double."""
    kind = np.float64 if dtype == "float64" else np.float32
    total = from_storage(inputs[0], dtype).astype(kind)
    for vector in inputs[1:]:
        total = total + from_storage(vector, dtype).astype(kind)
    return total.astype(np.float64) / divisor


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scatters", [False, True])
def test_squares_are_those_of_all_inputs_and_of_the_result(
    library: ctypes.CDLL, scatters: bool, dtype: str, size: int, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out([40, 0, 9000, 1, 17])
    inputs = [numbers(rng, numel, dtype) for _ in range(size)]
    keeps = [shard(library, numel, rank, size) for rank in range(size)] if scatters else None
    for divisor in [1.0, float(size)]:
        with PeerRanks(library, size, dtype, segments, numel) as ranks:
            ranks.write(inputs)
            ranks.reduce("sum", divisor, keeps=keeps, squares=True)
            outs, squares = ranks.read("out"), ranks.read("squares")
        for other in squares[1:]:
            assert reference.same_bits(other, squares[0])
        result = accumulated(inputs, dtype, divisor)
        expected = by_the_cpu(dtype, "sum", inputs, divisor)
        for index, (begin, length) in enumerate(segments):
            part = slice(begin, begin + length)
            wide = [from_storage(vector[part], dtype) for vector in inputs]
            # Every term meets less than 4 * numel * size roundings; the result's quotient, two.
            relative = (4 * length * size + 4) * 2.0**-53
            of_inputs = float(sum(reference.norm(vector) ** 2 for vector in wide))
            of_result = float(reference.norm(result[part]) ** 2)
            assert squares[0][index] == pytest.approx(of_inputs, rel=relative)
            assert squares[0][len(segments) + index] == pytest.approx(of_result, rel=relative)
            for rank, out in enumerate(outs):
                low, high = (0, numel) if keeps is None else keeps[rank]
                mine = slice(max(low, begin), max(low, begin, min(high, begin + length)))
                assert reference.same_bits(out[mine], expected[mine])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_replays_of_captured_reductions_follow_changed_inputs(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out([40, 5000])
    with PeerRanks(library, size, "float32", segments, numel) as ranks:
        ranks.reduce("sum", float(size), squares=True, captures=True)
        for _ in range(3):
            inputs = [numbers(rng, numel, "float32") for _ in range(size)]
            ranks.write(inputs)
            ranks.replay()
            expected = by_the_cpu("float32", "sum", inputs, float(size))
            for out in ranks.read("out"):
                for begin, length in segments:
                    part = slice(begin, begin + length)
                    assert reference.same_bits(out[part], expected[part])


def test_results_may_replace_the_inputs(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    inputs = [numbers(rng, 5003, "float32") for _ in range(3)]
    with PeerRanks(library, 3, "float32", [], 5003, in_place=True) as ranks:
        ranks.write(inputs)
        ranks.reduce("sum", 3.0)
        for out in ranks.read("in"):
            assert reference.same_bits(out, by_the_cpu("float32", "sum", inputs, 3.0))


@pytest.mark.parametrize(
    ("dtype", "call", "message"),
    [
        ("bool", {"op": "sum"}, "dtype must be one that it is defined for, got bool"),
        ("float32", {"op": "max", "divisor": 2.0}, "divisor must be 1 except for sums, got 2"),
        ("int32", {"op": "sum", "squares": True}, "squares must be those of a sum of floats"),
        ("float32", {"op": "min", "squares": True}, "squares must be those of a sum of floats"),
    ],
)
def test_what_has_no_meaning_is_refused(
    library: ctypes.CDLL, dtype: str, call: dict[str, object], message: str
) -> None:
    with (
        PeerRanks(library, 2, dtype, [(0, 16)], 16) as ranks,
        pytest.raises(RuntimeError, match=f"peer_reduce: {message}"),
    ):
        ranks.reduce(**call)  # type: ignore[arg-type]


# ---- peer_copy ---------------------------------------------------------------------------

BYTES = 200_000


def random_pieces(
    rng: np.random.Generator, size: int, lengths: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """One after the other in the output, with gaps; from anywhere."""
    pieces, at = [], 0
    for length in lengths:
        at += int(rng.integers(0, 20))
        start, rank = int(rng.integers(0, BYTES - length)), int(rng.integers(0, size))
        pieces.append((start, at, length, rank))
        at += length
    return pieces


@pytest.mark.parametrize("size", SIZES)
def test_copies_move_the_bytes_of_their_pieces_and_no_others(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    inputs = [np.frombuffer(rng.bytes(BYTES), np.uint8) for _ in range(size)]
    poison = np.full(BYTES, 0xA5, np.uint8)
    lengths = [0, 1, 15, 16, 17, 31, 100, 4096, 33_000, 70_001, 3, 0, 1000]
    aligned = [(1024 * i, 1024 * i, 512, 0) for i in range(8)]
    pieces = [random_pieces(rng, size, lengths) for _ in range(size)]
    pieces[0] = aligned
    with PeerRanks(library, size, "uint8", [], BYTES) as ranks:
        ranks.write(inputs)
        ranks.write([poison] * size, "out")
        ranks.copy(pieces)
        for mine, out in zip(pieces, ranks.read("out"), strict=True):
            expected = poison.copy()
            for start, to, length, rank in mine:
                expected[to : to + length] = inputs[rank][start : start + length]
            assert reference.same_bits(out, expected)
        assert ranks.error_words() == [0] * size


def test_copies_between_all_alignments(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    inputs = [np.frombuffer(rng.bytes(BYTES), np.uint8) for _ in range(2)]
    pieces = [
        (100 + start, 64 * (17 * start + to) + to, 45, 1) for start in range(17) for to in range(17)
    ]
    with PeerRanks(library, 2, "uint8", [], BYTES) as ranks:
        ranks.write(inputs)
        ranks.copy([pieces, []])
        out = ranks.read("out")[0]
    for start, to, length, rank in pieces:
        assert reference.same_bits(out[to : to + length], inputs[rank][start : start + length])


# ---- one after the other -----------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_requests_of_all_kinds_follow_each_other_without_a_pause(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    """Results go into the next request: a barrier that lets a rank through too early shows."""
    segments, numel = testing.lay_out([40, 3000, 9])
    vectors = [rng.standard_normal(numel).astype(np.float32) for _ in range(size)]
    pieces = [[(0, 4 * (numel - 16), 64, (rank + 1) % size)] for rank in range(size)]
    results = []
    for pauses in [True, False]:
        with PeerRanks(library, size, "float32", segments, numel, in_place=True) as ranks:
            ranks.write(vectors)
            for _ in range(4):
                for request in [
                    lambda: ranks.adasum(),
                    lambda: ranks.copy(pieces),
                    lambda: ranks.reduce("sum", 2.0, squares=True),
                    lambda: ranks.reduce("max"),
                ]:
                    request()
                    if pauses:
                        ranks.wait()
            results.append(ranks.read("in") + ranks.read("squares"))
            assert ranks.error_words() == [0] * size
    for paused, unpaused in zip(*results, strict=True):
        assert reference.same_bits(paused, unpaused)


def release_when_awaited(ranks: PeerRanks) -> None:
    """Rank 0, when all others have come to their first barrier."""
    deadline = time.monotonic() + HANG_LIMIT
    while min(ranks.arrivals(0)[1:]) == 0 and time.monotonic() < deadline:
        pass
    assert min(ranks.arrivals(0)[1:]) == 1
    ranks.release(0)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("request_", ["adasum", "reduce", "copy"])
def test_no_rank_reads_an_input_that_its_owner_has_not_finished(
    library: ctypes.CDLL, request_: str, size: int, rng: np.random.Generator
) -> None:
    """Rank 0 writes its input late: when all others have come to their first barrier."""
    segments, numel = testing.lay_out([40, 100])
    vectors = [rng.standard_normal(numel).astype(np.float32) for _ in range(size)]
    pieces = [[(0, 0, 4 * numel, 0)]] * size
    results = []
    for late in [False, True]:
        with PeerRanks(library, size, "float32", segments, numel, blocks=1) as ranks:
            if late:
                ranks.write([np.zeros(numel, np.float32), *vectors[1:]])
                ranks.hold(0)
                ranks.write_later(0, vectors[0])
            else:
                ranks.write(vectors)
            if request_ == "adasum":
                ranks.adasum()
            elif request_ == "reduce":
                ranks.reduce("sum")
            else:
                ranks.copy(pieces)
            if late:
                release_when_awaited(ranks)
            results.append(ranks.read("out"))
    for early_out, late_out in zip(*results, strict=True):
        assert reference.same_bits(early_out, late_out)


@pytest.mark.parametrize("request_", ["adasum", "reduce", "squares"])
@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_that_has_finished_holds_all_results(
    library: ctypes.CDLL, early: int, request_: str, rng: np.random.Generator
) -> None:
    """All segments lie in one rank's shard: the other one has nothing to do but to wait."""
    half = 32_768
    segments = [(half * (1 - early), half)]
    vectors = [rng.standard_normal(2 * half).astype(np.float32) for _ in range(2)]
    mine = slice(segments[0][0], sum(segments[0]))
    with PeerRanks(library, 2, "float32", segments, 2 * half, blocks=1) as ranks:
        ranks.write(vectors)
        for _ in range(5):
            ranks.write([np.zeros(2 * half, np.float32)] * 2, "out")
            if request_ == "adasum":
                ranks.adasum()
            else:
                ranks.reduce("sum", squares=request_ == "squares")
            seen = ranks.read_of(early, "out")
            assert reference.same_bits(seen[mine], ranks.read("out")[early][mine])


@pytest.mark.parametrize("request_", ["scatter", "copy"])
def test_an_input_may_change_as_soon_as_its_rank_has_finished(
    library: ctypes.CDLL, request_: str, rng: np.random.Generator
) -> None:
    """Rank 0 wants nothing, and its stream overwrites what rank 1 reads."""
    numel = 65_536
    vectors = [rng.standard_normal(numel).astype(np.float32) for _ in range(2)]
    for _ in range(5):
        with PeerRanks(library, 2, "float32", [], numel, blocks=1) as ranks:
            ranks.write(vectors)
            ranks.hold(0)  # it comes last, and is the first to go on
            if request_ == "scatter":
                ranks.reduce("sum", keeps=[(0, 0), (0, numel)])
                expected = vectors[0] + vectors[1]
            else:
                ranks.copy([[], [(0, 0, 4 * numel, 0)]])
                expected = vectors[0]
            ranks.write_later(0, np.full(numel, np.nan, np.float32))
            release_when_awaited(ranks)
            assert reference.same_bits(ranks.read_of(1, "out"), expected)
