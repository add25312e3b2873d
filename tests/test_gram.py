"""Adasum's coefficients from a Gram matrix.

Oracle: the tree over vectors in long double, tests/reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 11, 16]
NUMEL = 300

Family = Callable[[np.random.Generator, int], list[NDArray]]


def independent(rng: np.random.Generator, size: int) -> list[NDArray]:
    return list(rng.standard_normal((size, NUMEL)))


def similar(rng: np.random.Generator, size: int) -> list[NDArray]:
    return list(rng.standard_normal(NUMEL) + 0.1 * rng.standard_normal((size, NUMEL)))


def opposed(rng: np.random.Generator, size: int) -> list[NDArray]:
    """Neighbours that point apart, but not so far that they nearly cancel."""
    common = rng.standard_normal(NUMEL)
    signs = np.array([1.0, -1.0] * size)[:size, None]
    return list(signs * common + 0.5 * rng.standard_normal((size, NUMEL)))


def tiny(rng: np.random.Generator, size: int) -> list[NDArray]:
    return [1e-30 * vector for vector in independent(rng, size)]


def large(rng: np.random.Generator, size: int) -> list[NDArray]:
    return [1e18 * vector for vector in similar(rng, size)]


def tiny_beside_large(rng: np.random.Generator, size: int) -> list[NDArray]:
    return [
        vector * (1e-30 if rank % 2 else 1e18) for rank, vector in enumerate(similar(rng, size))
    ]


def some_zero(rng: np.random.Generator, size: int) -> list[NDArray]:
    return [vector * (rank % 3 != 1) for rank, vector in enumerate(independent(rng, size))]


def all_zero(rng: np.random.Generator, size: int) -> list[NDArray]:
    return [np.zeros(NUMEL)] * size


def parallel(rng: np.random.Generator, size: int) -> list[NDArray]:
    common = rng.standard_normal(NUMEL)
    return [common * (1.0 + rank) for rank in range(size)]


FAMILIES: list[Family] = [
    independent,
    similar,
    opposed,
    tiny,
    large,
    tiny_beside_large,
    some_zero,
    all_zero,
    parallel,
]


def gram_of(vectors: Sequence[NDArray]) -> list[float]:
    """<g_i, g_j>, i <= j, row by row."""
    wide = np.array(vectors, np.longdouble)
    size = len(vectors)
    return [
        float(np.sum(wide[i] * wide[j], dtype=np.longdouble))
        for i in range(size)
        for j in range(i, size)
    ]


def weighted_sum(coefficients: Sequence[float], vectors: Sequence[NDArray]) -> NDArray:
    return np.sum(
        [np.longdouble(c) * g for c, g in zip(coefficients, vectors, strict=True)], axis=0
    )


def bound_from_gram(vectors: Sequence[NDArray], cancellation: float) -> float:
    """How far (2-norm) the Gram form may be from the tree of vectors.

    The bound of a tree of vectors whose products meet k roundings of d = 2^-53 holds here with
    k' = 2 P more of them, relative to the magnitudes of their terms. For the squared norm of a
    node those are `cancellation` times as large, and for the product of two nodes at most P times
    that, by Cauchy and Schwarz over the terms.
    """
    bound = reference.adasum_with_bound(vectors)[1]
    return bound * max(1.0, 2 * len(vectors) * cancellation)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_coefficients_of_a_gram_matrix_are_those_of_the_tree_of_vectors(
    family: Family, size: int, rng: np.random.Generator
) -> None:
    vectors = family(rng, size)
    result = testing.adasum_of_gram(size, gram_of(vectors))
    assert result["cancellation"] <= testing.MOST_CANCELLATION
    error = reference.norm(
        weighted_sum(result["coefficients"], vectors) - reference.adasum(vectors)
    )
    assert error <= bound_from_gram(vectors, result["cancellation"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_orthogonality_is_the_squared_norm_of_the_result_over_the_sum_of_squares(
    family: Family, size: int, rng: np.random.Generator
) -> None:
    vectors = family(rng, size)
    result = testing.adasum_of_gram(size, gram_of(vectors))
    squares = sum(reference.norm(vector) ** 2 for vector in vectors)
    if size == 1 or squares == 0:
        assert result["orthogonality"] == 1.0
        return
    expected = reference.norm(reference.adasum(vectors)) ** 2 / squares
    # (|x| + e)^2 - |x|^2 with |x|^2 <= squares, and the rounding of P^2 terms.
    error = bound_from_gram(vectors, result["cancellation"]) / np.sqrt(squares)
    assert result["orthogonality"] == pytest.approx(
        float(expected), rel=0, abs=float(2 * error + error**2) + size**2 * 2.0**-52
    )


@pytest.mark.parametrize("size", SIZES)
def test_parallel_vectors_are_weighed_by_the_depth_of_their_leaves(size: int) -> None:
    result = testing.adasum_of_gram(size, gram_of([np.ones(1)] * size))
    weights = reference.weights(reference.adasum_tree(size))
    assert result["coefficients"] == [weights[rank] for rank in range(size)]
    assert result["cancellation"] == 1.0


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal_vectors_are_added(size: int) -> None:
    result = testing.adasum_of_gram(size, gram_of(list(np.eye(size))))
    assert result == {
        "coefficients": [1.0] * size,
        "orthogonality": 1.0,
        "cancellation": 1.0,
    }


@pytest.mark.parametrize("size", [4, 8, 11, 16])
def test_partners_that_nearly_cancel_are_reported(size: int, rng: np.random.Generator) -> None:
    common = rng.standard_normal(NUMEL)
    vectors = [common * (-1) ** rank + 1e-4 * rng.standard_normal(NUMEL) for rank in range(size)]
    result = testing.adasum_of_gram(size, gram_of(vectors))
    # The sum of two such is about 1.5 * 1e-4 times as long as they are: see the shares.
    assert 1e7 < result["cancellation"] < 1e10
    assert result["cancellation"] > testing.MOST_CANCELLATION


def test_cancellation_of_the_result_itself_is_none(rng: np.random.Generator) -> None:
    """Nobody takes the root's products: two ranks need no second try."""
    vector = rng.standard_normal(NUMEL)
    near = -vector + 1e-4 * rng.standard_normal(NUMEL)
    assert testing.adasum_of_gram(2, gram_of([vector, near]))["cancellation"] == 1.0


def test_partners_that_cancel_exactly_count_as_zero(rng: np.random.Generator) -> None:
    vector, other = rng.standard_normal((2, NUMEL))
    result = testing.adasum_of_gram(4, gram_of([vector, -vector, other, other]))
    assert result["cancellation"] == np.inf
    total = weighted_sum(result["coefficients"], [vector, -vector, other, other])
    assert reference.norm(total - other) <= 8 * reference.DOUBLE_ROUNDING * reference.norm(other)


def test_what_rounding_leaves_of_partners_that_cancel_counts_as_zero() -> None:
    """The squared norm of the first pair is 1e-16 of its terms: a rounding, not a vector."""
    one = 1.0 + 2.0**-52
    gram = [1.0, -one, 0.5, 0.5, 1.0, -0.5, -0.5, 1.0, 1.0, 1.0]
    result = testing.adasum_of_gram(4, gram)
    assert result["coefficients"][2:] == [0.5, 0.5]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("others", ["numbers", "zeros"])
def test_a_rank_that_is_not_finite_makes_its_own_coefficient_nan(
    size: int, value: float, others: str, rng: np.random.Generator
) -> None:
    for bad in range(size):
        vectors = [rng.standard_normal(9) * (others == "numbers") for _ in range(size)]
        vectors[bad][4] = value
        with np.errstate(invalid="ignore"):
            result = testing.adasum_of_gram(size, gram_of(vectors))
            total = weighted_sum(result["coefficients"], vectors)
        assert np.isnan(result["coefficients"][bad])
        assert np.isnan(total).all()
        assert not result["cancellation"] > testing.MOST_CANCELLATION, "vectors would not help"


def test_the_product_of_two_nodes_is_at_most_that_of_their_norms() -> None:
    result = testing.adasum_of_gram(2, [1.0, 1.0 + 2.0**-30, 1.0])
    assert result["coefficients"] == [0.5, 0.5]


def test_a_matrix_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="gram must have 6 numbers, got 5"):
        testing.adasum_of_gram(3, [1.0] * 5)
    with pytest.raises(ValueError, match="size must be at most 16, got 17"):
        testing.adasum_of_gram(17, [1.0] * 153)
