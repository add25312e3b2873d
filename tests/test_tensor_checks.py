"""The quick look at many tensors refuses what the slow one refuses, in the same words.

Oracle: the texts, written by hand; and for what the engine gets, each tensor's own attributes.
"""

from __future__ import annotations

import pytest
import torch

from adareduce.ops import ReduceOp
from adareduce.torch import tensors as checks
from adareduce.torch.tensors import (
    check_op,
    check_scales,
    check_tensors,
    dense_strides,
    describe_tensors,
    dtype_code,
    mark_written,
)

GOOD = torch.ones(2, 3)


class Odd(torch.Tensor):
    """A subclass is looked at by itself."""


BAD = [
    (3.0, TypeError, "must be a torch.Tensor, got float"),
    (None, TypeError, "must be a torch.Tensor, got NoneType"),
    (torch.eye(3).to_sparse(), ValueError, "must be dense, got layout torch.sparse_coo"),
    (torch.ones(3, device="meta"), ValueError, "must be on the cpu or a CUDA device, got device"),
    (torch.ones(3, dtype=torch.complex64), TypeError, "must have one of the dtypes uint8, int8,"),
    (torch.ones(4, 3)[:, ::2], ValueError, r"got strides \(3, 2\) for shape \(4, 2\)"),
    (torch.ones(1).expand(4), ValueError, r"got strides \(0,\) for shape \(4,\)"),
]


@pytest.mark.parametrize(("bad", "error", "text"), BAD)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("others", [0, 1, 40])
def test_what_cannot_be_taken_is_refused_alone_and_among_others(bad, error, text, in_place, others):
    if not in_place and "strides" in text:
        check_tensors("allreduce", [*[GOOD] * others, bad], in_place=False)
        return
    which = "tensor" if others == 0 else f"tensor {others} of {others + 2}"
    after = [] if others == 0 else [GOOD]
    with pytest.raises(error, match=f"^allreduce: {which} must .*{text.removeprefix('must ')}"):
        check_tensors("allreduce", [*[GOOD] * others, bad, *after], in_place=in_place)


@pytest.mark.parametrize("make", ["to_sparse_csr", "to_sparse_csc", "to_mkldnn"])
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_layouts_that_raise_when_asked_are_named(make, others):
    if make == "to_mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    bad = getattr(torch.eye(3), make)()
    for in_place in (False, True):
        with pytest.raises(ValueError, match=r"must be dense, got layout torch\.(sparse_cs|_mkl)"):
            check_tensors("broadcast", [*[GOOD] * others, bad], in_place=in_place)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_dtypes_are_found_in_their_order(quick, in_place, monkeypatch):
    if not quick:
        monkeypatch.setattr(checks, "_glance", lambda *_: None)
    every = [torch.ones(2, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.int64)]
    dtypes, _ = check_tensors("allreduce", every, in_place=in_place)
    assert list(dtypes) == [torch.int64, torch.bool]
    assert list(check_tensors("allreduce", [], in_place=in_place)[0]) == []
    with pytest.raises(TypeError, match=r"for op=Adasum, got int64"):
        check_op("allreduce", ReduceOp.Adasum, dtypes)
    with pytest.raises(TypeError, match=r"for op=Sum, got bool"):
        check_op("allreduce", ReduceOp.Sum, dtypes)
    check_op("allreduce", ReduceOp.Max, dtypes)
    with pytest.raises(TypeError, match=r"must be 1 for bool tensors, got 2\.0 and 1\.0"):
        check_scales("allreduce", dtypes, 2.0, 1.0)
    check_scales("allreduce", dtypes, 1.0, 1.0)
    check_scales("allreduce", [torch.float32], 2.0, 3.0)


def expected_of(tensor, output, group):
    strides = () if tensor.is_contiguous() else dense_strides(tensor)
    address = 0 if output is None else output.data_ptr()
    return (
        tuple(tensor.shape), dtype_code(tensor.dtype), tensor.data_ptr(), address, strides, group,
    )  # fmt: skip


MANY = [
    torch.ones(3, 4),
    torch.nn.Parameter(torch.ones(2, 5).half()),
    torch.ones(()),
    torch.ones(0, 3, dtype=torch.int8),
    torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.ones(4, 3).t(),
]
CONTIGUOUS = [torch.ones(n) for n in range(5)]


@pytest.mark.parametrize("tensors", [MANY, CONTIGUOUS, MANY[:1], MANY[4:5], MANY[1:3], []])
@pytest.mark.parametrize("outputs", ["in place", "others", "none"])
@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("uses_known", [False, True])
def test_tensors_are_described_by_their_attributes(tensors, outputs, has_groups, uses_known):
    tensors = list(tensors)
    written = {
        "in place": tensors,
        "others": [torch.empty_like(tensor) for tensor in tensors],
        "none": [None] * len(tensors),
    }[outputs]
    groups = [k % 3 for k in range(len(tensors))] if has_groups else None
    known = check_tensors("allreduce", tensors, in_place=True) if uses_known else None
    described = describe_tensors(tensors, written, groups, known)
    assert described == [
        expected_of(tensor, output, k % 3 if has_groups else 0)
        for k, (tensor, output) in enumerate(zip(tensors, written, strict=True))
    ]


@pytest.mark.parametrize("takes_lists", [True, False])
def test_autograd_knows_what_was_written_except_in_inference_mode(takes_lists, monkeypatch):
    if takes_lists and not checks._VERSIONS_TAKE_LISTS:
        pytest.skip("this torch takes one tensor at a time")
    if not takes_lists:
        public = torch.autograd.graph.increment_version
        monkeypatch.setattr(checks, "_VERSIONS_TAKE_LISTS", False)
        monkeypatch.setattr(checks, "_increment_version", public)
    with torch.inference_mode():
        of_inference = torch.ones(2)
    written = [torch.ones(2), torch.ones(3)]
    before = [tensor._version for tensor in written]
    mark_written([written[0], of_inference, written[1]])
    assert [tensor._version for tensor in written] == [version + 1 for version in before]


def test_subclasses_are_taken():
    odd = torch.ones(3).as_subclass(Odd)
    dtypes, addresses = check_tensors("allreduce", [odd, GOOD], in_place=True)
    assert list(dtypes) == [torch.float32]
    assert addresses is None
