"""What results must be: float64 or exact integers, from all ranks' inputs. No code of the library.

``Expected`` describes one stretch of an output; inputs repeat, so one period describes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from adareduce.bench.inputs import PERIOD

Tree: TypeAlias = "int | tuple[Tree, Tree]"

_SMALLEST_SQUARED_NORM = 2.0**-511  # docs/algorithms.md: below it a vector counts as zero
_DOUBLE_ROUNDING = 2.0**-53


@dataclass(frozen=True)
class Expected:
    """Element i of a stretch must be values[(start + i) % len(values)], up to the bound there.

    Attributes:
        values: One period: float64 with a bound, else of the output's dtype.
        bound: Largest error of each element; None: equal.
        start: Where in the period the stretch begins.
        numel: Elements of the stretch.
    """

    values: torch.Tensor
    bound: torch.Tensor | None
    start: int
    numel: int


def copied(values: torch.Tensor, start: int, numel: int) -> Expected:
    """What a collective that only moves data must deliver."""
    return Expected(values, None, start, numel)


def reduced(
    op: str, periods: Sequence[torch.Tensor], start: int, numel: int, total_numel: int
) -> Expected:
    """A stretch of the reduction of all ranks' tensors.

    Args:
        op: As on the command line.
        periods: The tensor of every rank, or its first period.
        start: Where the stretch begins in the tensor.
        numel: Elements of the stretch.
        total_numel: Elements of the whole tensor.
    """
    values: torch.Tensor
    bound: torch.Tensor | None = None
    if op == "adasum":
        values, bound = adasum(periods, total_numel)
    elif periods[0].dtype.is_floating_point and op not in ("min", "max"):
        values, bound = _rounded(op, periods)
    else:
        values = _exact(op, periods)
    return Expected(values, bound, start, numel)


def adasum(periods: Sequence[torch.Tensor], numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adasum of one tensor by the recursion of docs/algorithms.md, and a bound of the error.

    With unit roundoff u of the dtype, a node w = s_a a + s_b b whose operands are wrong by at most
    E_a, E_b elementwise, and by e_a = |E_a| / |a|, e_b relative to their norms, is wrong by
        E_w = s_a E_a + s_b E_b + d_a |a| + d_b |b| + u |w|,
        d_a = |b| / (2 |a|) (3 e_a + e_b + k 2^-53)  for the share s_a = 1 - <a,b> / (2 |a|^2),
    to first order, where k = numel / 16 + ranks + 16 roundings meet a product on its way into a sum
    of 16 lanes. A quarter is added for higher orders. float64 counts twice: this is float64 too.

    Args:
        periods: The tensor of every rank, or its first period.
        numel: Elements of the whole tensor: how often each element of a period counts.
    """
    dtype = periods[0].dtype
    unit = torch.finfo(dtype).eps / 2 * (2 if dtype == torch.float64 else 1)
    count = periods[0].numel()
    repeats = torch.full((count,), numel // count if count else 0, dtype=torch.float64)
    repeats[: numel - (numel // count if count else 0) * count] += 1
    roundings = (numel / 16 + len(periods) + 16) * _DOUBLE_ROUNDING

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.dot(a * repeats, b))

    def visit(tree: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(tree, int):
            leaf = periods[tree].double()
            return leaf, torch.zeros_like(leaf)
        (a, a_error), (b, b_error) = visit(tree[0]), visit(tree[1])
        ab, aa, bb = dot(a, b), dot(a, a), dot(b, b)
        a_share, b_share = _share(ab, aa), _share(ab, bb)
        value = a_share * a + b_share * b
        a_wrong = _relative(dot(a_error, a_error), aa)
        b_wrong = _relative(dot(b_error, b_error), bb)
        a_slip = 0.5 * _relative(bb, aa) * (3 * a_wrong + b_wrong + roundings)
        b_slip = 0.5 * _relative(aa, bb) * (3 * b_wrong + a_wrong + roundings)
        error = abs(a_share) * a_error + abs(b_share) * b_error
        error += a_slip * a.abs() + b_slip * b.abs()
        error += unit * value.abs() + torch.finfo(dtype).smallest_normal * unit
        return value, error

    value, error = visit(adasum_tree(len(periods)))
    return value, 1.25 * error


def adasum_tree(size: int) -> Tree:
    """Who is combined with whom, as nested pairs (lower, upper) of ranks."""
    core = 1 << (size.bit_length() - 1)
    folded = size - core
    nodes: list[Tree] = [(2 * pair, 2 * pair + 1) for pair in range(folded)]
    nodes += range(2 * folded, size)
    # Distance doubling meets neighbours first, and everybody ends with the same node.
    while len(nodes) > 1:
        nodes = [(nodes[i], nodes[i + 1]) for i in range(0, len(nodes), 2)]
    return nodes[0]


def squared_norms(periods: Sequence[torch.Tensor], numel: int) -> float:
    """Sum over the ranks of |g|^2 of one tensor, from its periods."""
    total = 0.0
    for period in periods:
        squares = period.double().square()
        whole = numel // PERIOD if numel > PERIOD else 1
        rest = numel - whole * squares.numel()
        total += whole * float(squares.sum()) + float(squares[:rest].sum())
    return total


def _rounded(op: str, periods: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    # P ranks: P - 1 operations and a division in the accumulator's type, which is float32 for half
    # types, and a rounding to the result's type; doubled, because float64 is no better than itself.
    dtype = periods[0].dtype
    wide = torch.stack([period.double() for period in periods])
    accumulator = max(torch.finfo(torch.float64).eps, min(_eps(dtype), _eps(torch.float32))) / 2
    roundings = 2 * (len(periods) + 2) * accumulator
    if op == "prod":
        values = wide.prod(dim=0)
        magnitude = values.abs()
    else:
        divisor = len(periods) if op == "avg" else 1
        values = wide.sum(dim=0) / divisor
        magnitude = wide.abs().sum(dim=0) / divisor
    smallest = torch.finfo(dtype).smallest_normal * _eps(dtype)
    bound = roundings * magnitude + smallest
    if _eps(dtype) > _eps(torch.float32):
        bound += _eps(dtype) / 2 * (values.abs() + bound)
    return values, bound


def _exact(op: str, periods: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = periods[0].dtype
    wide = torch.stack(list(periods)) if dtype.is_floating_point else _as_int64(periods)
    if op == "min":
        values = wide.amin(dim=0)
    elif op == "max":
        values = wide.amax(dim=0)
    elif op == "prod":
        values = wide.prod(dim=0)
    else:
        values = wide.sum(dim=0)
        if op == "avg":
            values = torch.trunc(values.double() / len(periods))
    return values.to(dtype)


def _as_int64(periods: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([period.to(torch.int64) for period in periods])


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _share(dot: float, squared_norm: float) -> float:
    return 1.0 if squared_norm < _SMALLEST_SQUARED_NORM else 1 - dot / (2 * squared_norm)


def _relative(squared: float, squared_norm: float) -> float:
    return 0.0 if squared_norm < _SMALLEST_SQUARED_NORM else float((squared / squared_norm) ** 0.5)
