"""benchmarks/compare_cases.py: sets of tensors, and what a collective must make of them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from adareduce.bench.oracles import adasum

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_cases  # noqa: E402

FLOAT = torch.float32


# ---- cases --------------------------------------------------------------------------------------


def test_resnet50_is_161_tensors_with_25_557_032_parameters() -> None:
    case = compare_cases.make_case("resnet50", FLOAT)
    assert len(case.shapes) == 161
    assert sum(case.numels) == 25_557_032
    assert case.num_bytes == 4 * 25_557_032
    assert case.shapes[0] == (64, 3, 7, 7)


def test_bert_large_has_398_tensors_and_whole_it_has_335_million_parameters() -> None:
    whole = compare_cases.make_case("bert-large/1/1", FLOAT)
    assert len(whole.shapes) == 398
    # Embeddings, 24 layers, pooler, heads, from the paper's sizes: L = 24, H = 1024, A = 16.
    hidden, inner, words = 1024, 4096, 30522
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    embeddings = (words + 512 + 2) * hidden + 2 * hidden
    square = hidden * hidden + hidden
    heads = square + (square + 2 * hidden + words) + 2 * hidden + 2
    assert sum(whole.numels) == embeddings + 24 * layer + heads


def test_bert_large_is_scaled_to_the_memory_at_hand() -> None:
    def numel(available: int) -> int:
        return sum(compare_cases.make_case(compare_cases.bert_key(2, available), FLOAT).numels)

    sizes = [numel(gigabytes * 10**9) for gigabytes in (1000, 4, 2, 0)]
    assert sizes == sorted(sizes, reverse=True)
    assert 4 * sizes[0] > 320e6  # half the width, a quarter of the words
    assert sizes[0] > sizes[1] > sizes[-1]


def test_a_size_is_one_tensor_of_so_many_bytes() -> None:
    for key, num_bytes in (("4K", 4096), ("256M", 2**28), ("1G", 2**30)):
        for dtype in compare_cases.DTYPES.values():
            case = compare_cases.make_case(key, dtype)
            assert case.num_bytes == num_bytes
            assert not case.is_set


@pytest.mark.parametrize("text", ["", "4", "K", "0K", "-4K", "4T", "4.5K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size must be like 4K or 64M, got "):
        compare_cases.size_bytes(text)


# ---- contents and what must come out ------------------------------------------------------------


def filled(case: compare_cases.Case, size: int) -> list[list[torch.Tensor]]:
    """Each rank's tensors before a call."""
    result = []
    for rank in range(size):
        tensors = [torch.full((numel,), math.nan, dtype=case.dtype) for numel in case.numels]
        compare_cases.Contents(case, rank, size).fill(tensors)
        result.append(tensors)
    return result


MIXED = ((3, 5), (1,), (70_000,), (65_521,), (2, 65_521))  # around and beyond a period


@pytest.mark.parametrize("dtype", compare_cases.DTYPES.values(), ids=compare_cases.DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_sums_in_a_row_are_exact_up_to_the_most_calls(size: int, dtype: torch.dtype) -> None:
    case = compare_cases.Case("mixed", dtype, MIXED)
    contents = compare_cases.Contents(case, 0, size)
    most = compare_cases.most_calls(size, dtype)
    assert most >= (50 if size in (2, 4) else 2)
    ranks = filled(case, size)
    sums = [torch.stack(tensors).double().sum(dim=0) for tensors in zip(*ranks, strict=True)]
    for calls in (1, most):
        # float64 has the room for the powers of two; for others the numbers stay whole and small.
        results = [total * float(size) ** (calls - 1) for total in sums]
        assert all(torch.equal(r.to(dtype).double(), r) for r in results), "representable"
        given = [result.to(dtype) for result in results]
        assert contents.count_wrong("sum", calls, given) == 0
        given[2][66_000] += given[2][66_000] / 2 + 1
        assert contents.count_wrong("sum", calls, given) == 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_adasum_is_compared_with_float64_element_by_element(size: int) -> None:
    case = compare_cases.Case("mixed", FLOAT, MIXED)
    contents = compare_cases.Contents(case, 0, size)
    ranks = filled(case, size)
    # Of whole tensors, while the contents know periods and how often they repeat.
    results = [adasum(tensors, tensors[0].numel())[0] for tensors in zip(*ranks, strict=True)]
    given = [result.float() for result in results]
    for calls in (1, 7):
        assert contents.count_wrong("adasum", calls, given) == 0
    given[3][65_520] = 1.001 * given[3][65_520] + 1e-3
    assert contents.count_wrong("adasum", 1, given) == 1
    average = [sum(tensors) / size for tensors in zip(*ranks, strict=True)]
    assert contents.count_wrong("average", 1, average) == 0
    assert contents.count_wrong("adasum", 1, average) > 0


def test_an_untouched_input_a_swapped_tensor_and_a_shifted_block_are_wrong() -> None:
    case = compare_cases.Case("two", FLOAT, ((40_000,), (40_000,)))
    contents = compare_cases.Contents(case, 0, 2)
    mine, theirs = filled(case, 2)
    assert contents.count_wrong("sum", 1, mine) > 40_000
    sums = [a + b for a, b in zip(mine, theirs, strict=True)]
    assert contents.count_wrong("sum", 1, sums) == 0
    assert contents.count_wrong("sum", 1, sums[::-1]) > 40_000
    assert contents.count_wrong("sum", 1, [t.roll(4096) for t in sums]) > 40_000


def test_short_vectors_of_two_ranks_are_never_opposite() -> None:
    """Adasum computes what cancels by another, slower way, which gradients hardly ever take."""
    case = compare_cases.make_case("tiny2000", FLOAT)
    for mine, theirs in zip(*filled(case, 2), strict=True):
        if mine.numel() < 16:
            assert float(torch.dot(mine, theirs)) > 0
