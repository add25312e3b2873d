"""One-shot Adasum over the memory of peers: the real kernels, run by the emulated CUDA runtime.

Oracle: the tree over vectors in long double, tests/reference.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from half_types import from_storage, to_storage
from peer_ranks import PeerRanks, load, peer_library, shard
from thread_ranks import STORAGE

__all__ = ["peer_library"]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
# Half the distance between neighbours near 1, and of subnormals; half types round by way of float.
UNIT = {
    "float16": 2.0**-11 + 2.0**-24,
    "bfloat16": 2.0**-8 + 2.0**-24,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}
SPACING = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}

Vectors = list[NDArray]  # float64, one per rank, of one segment or of the whole fused buffer
Family = Callable[[np.random.Generator, int, int], Vectors]


@pytest.fixture(scope="session")
def library(peer_library: Path) -> ctypes.CDLL:
    return load(peer_library)


def independent(rng: np.random.Generator, size: int, numel: int) -> Vectors:
    return list(rng.standard_normal((size, numel)))


def similar(rng: np.random.Generator, size: int, numel: int) -> Vectors:
    return list(rng.standard_normal(numel) + 0.1 * rng.standard_normal((size, numel)))


def cancelling(rng: np.random.Generator, size: int, numel: int) -> Vectors:
    signs = np.array([1.0, -1.0] * size)[:size, None]
    return list(signs * rng.standard_normal(numel) + 1e-4 * rng.standard_normal((size, numel)))


def laid_out(numels: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    segments, numel = testing.lay_out(list(numels))
    return list(segments), int(numel)


def of_segment(vectors: Vectors, segment: tuple[int, int]) -> Vectors:
    return [vector[segment[0] : sum(segment)] for vector in vectors]


def allowed(vectors: Vectors, dtype: str, cancellation: float) -> tuple[NDArray, float]:
    """The result in long double, and how far (2-norm) the Gram form may be from it.

    As for a Gram matrix in general (test_gram.py), with sums of any order instead of 16 lanes; a
    tensor that was redone in vectors depends on no cancellation. One rounding to the dtype.
    """
    expected, bound = reference.adasum_with_bound(vectors)
    size, count = len(vectors), vectors[0].size
    factor = 1.0 if cancellation > testing.MOST_CANCELLATION else cancellation
    bound = bound * 2 * size * factor
    rounding = UNIT[dtype] * (reference.norm(expected) + bound) + SPACING[dtype] * np.sqrt(count)
    return expected, float(bound + rounding)


def run(
    library: ctypes.CDLL,
    vectors: Vectors,
    dtype: str,
    segments: list[tuple[int, int]],
    blocks: int = 3,
) -> dict[str, list[NDArray]]:
    """Adasum; the ranks hold the same bits of everything."""
    numel = vectors[0].size
    with PeerRanks(library, len(vectors), dtype, segments, numel, blocks=blocks) as ranks:
        ranks.write([to_storage(vector, dtype) for vector in vectors])
        ranks.adasum()
        found = {place: ranks.read(place) for place in ("out", "orthogonality", "cancellation")}
        assert ranks.error_words() == [0] * len(vectors)
    for place, values in found.items():
        for other in values[1:]:
            assert reference.same_bits(values[0], other), f"the ranks differ in {place}"
    return found


def check(
    library: ctypes.CDLL,
    vectors: Vectors,
    dtype: str,
    segments: list[tuple[int, int]],
    blocks: int = 3,
) -> dict[str, list[NDArray]]:
    """The same, compared with the reference; padding stays as it was."""
    vectors = [from_storage(to_storage(vector, dtype), dtype) for vector in vectors]
    found = run(library, vectors, dtype, segments, blocks)
    result = from_storage(found["out"][0], dtype)
    is_padding = np.ones(result.size, bool)
    for index, segment in enumerate(segments):
        is_padding[segment[0] : sum(segment)] = False
        if segment[1] == 0:
            assert found["orthogonality"][0][index] == 1.0
            continue
        mine = of_segment(vectors, segment)
        cancellation = found["cancellation"][0][index]
        expected, bound = allowed(mine, dtype, cancellation)
        error = reference.norm(result[segment[0] : sum(segment)].astype(np.longdouble) - expected)
        assert error <= bound, f"segment {index} is off by {error}, allowed {bound}"
        squares = sum(reference.norm(vector) ** 2 for vector in mine)
        if len(vectors) == 1 or squares == 0:
            assert found["orthogonality"][0][index] == 1.0
            continue
        # (|x| + e)^2 - |x|^2 with |x|^2 <= squares, before the result is rounded.
        _, inner = allowed(mine, "float64", cancellation)
        share = float(inner / np.sqrt(squares))
        assert found["orthogonality"][0][index] == pytest.approx(
            float(reference.norm(expected) ** 2 / squares), rel=0, abs=2 * share + share**2
        )
    padding = np.repeat(is_padding, STORAGE[dtype].itemsize)
    assert not found["out"][0].view(np.uint8)[padding].any()
    return found


# ---- agreement with the reference -------------------------------------------------------------

SHAPES: dict[str, list[int]] = {
    "one vector": [1000],
    "[5, 8]": [40],
    "odd sizes": [40, 231, 1, 101, 4],
    "empty ones between": [0, 40, 0, 17, 0],
    "only empty": [0, 0],
    "single elements": [1] * 7,
    "several items": [3, 9001, 6],
    "many tiny": [1 + i % 5 for i in range(60)],
    "no tensors": [],
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_agrees_with_the_tree_of_vectors(
    library: ctypes.CDLL, shape: str, dtype: str, size: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out(SHAPES[shape])
    check(library, independent(rng, size, numel), dtype, segments)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_segments_may_begin_anywhere(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    segments = [(1, 3), (4, 29), (35, 300), (335, 1), (336, 64), (417, 4097)]
    for dtype in FLOATS:
        check(library, similar(rng, size, 4600), dtype, segments)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_bits_depend_neither_on_the_number_of_blocks_nor_on_the_run(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([5, 20_000, 0, 40, 9000, 1])
    vectors = cancelling(rng, size, numel)
    first = run(library, vectors, "float32", segments, blocks=1)
    for blocks in [1, 2, 7]:
        again = run(library, vectors, "float32", segments, blocks)
        for place, values in first.items():
            assert reference.same_bits(values[0], again[place][0]), (blocks, place)


def test_a_segment_of_many_runs_of_items_is_added_up_by_a_whole_block(
    library: ctypes.CDLL, rng: np.random.Generator
) -> None:
    """More than 64 slots for one segment on one rank."""
    segments, numel = laid_out([7, 600_000, 40])
    check(library, similar(rng, 2, numel), "float32", segments)


# ---- range ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("scales", [(1e-30, 1e-30), (1e18, 1e18), (1e-30, 1e18), (1e-44, 1e-44)])
def test_squares_that_float_cannot_hold_are_no_trouble(
    library: ctypes.CDLL, scales: tuple[float, float], size: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 100])
    vectors = similar(rng, size, numel)
    scaled = [vector * scales[rank % 2] for rank, vector in enumerate(vectors)]
    check(library, scaled, "float32", segments)


@pytest.mark.parametrize("scale", [1e-76, 1e75, 1e150])
def test_float64_keeps_its_range(
    library: ctypes.CDLL, scale: float, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 100])
    check(library, [scale * v for v in similar(rng, 5, numel)], "float64", segments)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_zero_ranks_add_nothing(library: ctypes.CDLL, size: int, rng: np.random.Generator) -> None:
    segments, numel = laid_out([40, 100])
    vectors = [v * (rank % 3 != 1) for rank, v in enumerate(independent(rng, size, numel))]
    check(library, vectors, "float32", segments)
    check(library, [np.zeros(numel)] * size, "float32", segments)


# ---- partners that nearly cancel --------------------------------------------------------------


def gram_error(vectors: Vectors, expected: NDArray) -> float:
    """How far the Gram form is off when nothing is redone."""
    size = len(vectors)
    gram = [float(vectors[i] @ vectors[j]) for i in range(size) for j in range(i, size)]
    coefficients = testing.adasum_of_gram(size, gram)["coefficients"]
    total = np.sum([c * v for c, v in zip(coefficients, vectors, strict=True)], axis=0)
    return float(reference.norm(total - expected))


@pytest.mark.parametrize("size", [4, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_partners_that_nearly_cancel_are_redone_in_vectors(
    library: ctypes.CDLL, dtype: str, size: int, rng: np.random.Generator
) -> None:
    """Some of the segments: the others keep the coefficients of their Gram matrix."""
    segments, numel = laid_out([40, 5000, 0, 300, 17, 1000, 2])
    common = independent(rng, size, numel)
    apart = cancelling(rng, size, numel)
    vectors = [near.copy() for near in common]
    flagged = [1, 3, 5]
    for index in flagged:
        begin, end = segments[index][0], sum(segments[index])
        for rank in range(size):
            vectors[rank][begin:end] = apart[rank][begin:end]
    found = check(library, vectors, dtype, segments, blocks=2)
    cancellation = found["cancellation"][0]
    assert (cancellation[flagged] > 1e6).all()
    assert (cancellation[[0, 2, 4]] < testing.MOST_CANCELLATION).all()
    if dtype == "float64":
        for index in flagged:
            begin, end = segments[index][0], sum(segments[index])
            mine = of_segment(vectors, segments[index])
            expected = reference.adasum(mine)
            error = reference.norm(found["out"][0][begin:end] - expected)
            assert gram_error(mine, expected) > 10 * error, "the Gram form would have done"


def test_partners_that_cancel_exactly_count_as_zero(
    library: ctypes.CDLL, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40])
    a, b = independent(rng, 2, numel)
    found = run(library, [a, -a, b, b], "float64", segments)
    assert found["cancellation"][0][0] == np.inf
    left = reference.norm(found["out"][0][:40] - b[:40])  # of a - a and of b / 2 + b / 2
    assert left <= 8 * 2.0**-53 * (reference.norm(a[:40]) + reference.norm(b[:40]))


def test_two_ranks_are_never_redone(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    segments, numel = laid_out([40])
    found = check(library, cancelling(rng, 2, numel), "float64", segments)
    assert found["cancellation"][0].tolist() == [1.0]


# ---- what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_segment_that_is_not_finite_leaves_the_others_alone(
    library: ctypes.CDLL, value: float, size: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 300, 17, 200])
    vectors = independent(rng, size, numel)
    begin, end = segments[3][0], sum(segments[3])
    for rank, apart in enumerate(cancelling(rng, size, numel)):
        vectors[rank][begin:end] = apart[begin:end]
    before = run(library, vectors, "float32", segments)
    vectors[size - 1][segments[1][0] + 7] = value
    with np.errstate(invalid="ignore"):
        after = run(library, vectors, "float32", segments)
    bad = np.zeros(numel, bool)
    bad[segments[1][0] : sum(segments[1])] = True
    assert np.isnan(after["out"][0][bad]).all()
    assert reference.same_bits(after["out"][0][~bad], before["out"][0][~bad])
    assert np.isnan(after["orthogonality"][0]).tolist() == [False, True, False, False]


# ---- requests one after the other -------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_replays_of_a_captured_graph_follow_changed_inputs(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 5000, 3])
    families: list[Family] = [independent, cancelling, similar, cancelling, independent]
    with PeerRanks(library, size, "float32", segments, numel) as ranks:
        ranks.adasum(captures=True)
        for family in families:
            vectors = [to_storage(v, "float32") for v in family(rng, size, numel)]
            ranks.write(vectors)
            ranks.replay()
            expected = run(library, [v.astype(np.float64) for v in vectors], "float32", segments)
            for rank, out in enumerate(ranks.read("out")):
                assert reference.same_bits(out, expected["out"][0]), rank


def test_epochs_may_wrap_around(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    segments, numel = laid_out([40, 300])
    size, blocks = 3, 2
    vectors = cancelling(rng, 8, numel)[:size]
    expected = run(library, vectors, "float32", segments)
    with PeerRanks(library, size, "float32", segments, numel, blocks=blocks) as ranks:
        ranks.write([np.full(blocks, 2**32 - 2, np.uint32)] * size, "epochs")
        ranks.write([np.full(blocks * 8, 2**32 - 2, np.uint32)] * size, "flags")
        ranks.write([to_storage(vector, "float32") for vector in vectors])
        for _ in range(3):
            ranks.adasum()
        assert reference.same_bits(ranks.read("out")[0], expected["out"][0])
        assert ranks.error_words() == [0] * size


@pytest.mark.parametrize("size", [2, 5])
def test_results_may_replace_the_inputs(
    library: ctypes.CDLL, size: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 5000, 3])
    vectors = cancelling(rng, size, numel)
    expected = run(library, vectors, "float32", segments)["out"][0]
    with PeerRanks(library, size, "float32", segments, numel, in_place=True) as ranks:
        ranks.write([to_storage(vector, "float32") for vector in vectors])
        ranks.adasum()
        for result in ranks.read("in"):
            for begin, length in segments:
                part = slice(begin, begin + length)
                assert reference.same_bits(result[part], expected[part])


# ---- ranks that do not come -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "absent"), [(2, 1), (3, 0), (8, 5)])
def test_a_rank_that_never_launches_is_named_when_the_deadline_has_passed(
    library: ctypes.CDLL, size: int, absent: int, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 300])
    with PeerRanks(library, size, "float32", segments, numel, deadline_seconds=0.2) as ranks:
        ranks.write([to_storage(v, "float32") for v in independent(rng, size, numel)])
        ranks.adasum(absent=absent)
        ranks.wait()
        words = [word for rank, word in enumerate(ranks.error_words()) if rank != absent]
        assert words == [1 + absent] * (size - 1)
        assert ranks.error_words()[absent] == 0
        ranks.adasum(absent=absent)  # nobody waits any more
        ranks.wait()


def test_the_host_ends_all_waits_by_the_error_word(
    library: ctypes.CDLL, rng: np.random.Generator
) -> None:
    segments, numel = laid_out([40, 300])
    with PeerRanks(library, 3, "float32", segments, numel, deadline_seconds=0) as ranks:
        ranks.adasum(absent=2)
        for rank in range(3):
            ranks.set_error_word(rank, 77)
        ranks.wait()
        assert ranks.error_words() == [77] * 3


# ---- shards and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_shards_are_those_of_the_other_transports(library: ctypes.CDLL, size: int) -> None:
    for numel in [0, 1, 15, 16, 17, 48, 1000, 2**40 + 5]:
        for rank in range(size):
            assert shard(library, numel, rank, size) == testing.shard_of(numel, rank, size)


def test_other_types_are_refused_by_name(library: ctypes.CDLL) -> None:
    message = "peer_adasum: dtype must be one that it is defined for, got int32"
    with (
        PeerRanks(library, 2, "int32", [(0, 4)], 16) as ranks,
        pytest.raises(RuntimeError, match=message),
    ):
        ranks.adasum()


def test_more_than_eight_ranks_are_refused(library: ctypes.CDLL) -> None:
    message = "peer_adasum: view must be of 1 to 8 ranks, got 9"
    with (
        PeerRanks(library, 9, "float32", [(0, 4)], 16) as ranks,
        pytest.raises(RuntimeError, match=message),
    ):
        ranks.adasum()
