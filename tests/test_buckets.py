"""Which parameters travel together. Oracle: lists written by hand."""

from __future__ import annotations

import pytest
import torch

from adareduce.settings import Settings
from adareduce.torch import streams
from adareduce.torch.buckets import Bucket, cut_buckets, name_of_request
from adareduce.torch.optimizer_arguments import explicit_buckets


def parameters(*kinds: tuple[int, torch.dtype]) -> list[torch.Tensor]:
    return [torch.zeros(extent, dtype=dtype) for extent, dtype in kinds]


def places(buckets: list[list[torch.Tensor]], tensors: list[torch.Tensor]) -> list[list[int]]:
    number = {id(tensor): place for place, tensor in enumerate(tensors)}
    return [[number[id(tensor)] for tensor in bucket] for bucket in buckets]


F32, F16, F64 = torch.float32, torch.float16, torch.float64


@pytest.mark.parametrize(
    ("kinds", "num_bytes", "expected"),
    [
        ([], 100, []),
        ([(1, F32)] * 5, 12, [[0, 1, 2], [3, 4]]),
        ([(1, F32)] * 3, 0, [[0], [1], [2]]),
        ([(9, F32), (1, F32), (1, F32)], 12, [[0], [1, 2]]),  # larger than a bucket
        ([(2, F32), (2, F32), (1, F32)], 12, [[0], [1, 2]]),
        ([(0, F32), (3, F32), (0, F32)], 12, [[0, 1, 2]]),
        # The bucket of float32 is complete with parameter 2, that of float64 with 3.
        ([(1, F32), (1, F64), (1, F32), (1, F64)], 100, [[0, 2], [1, 3]]),
        # The first of float16 is cut off by its second, but complete before parameter 1.
        ([(4, F16), (1, F32), (4, F16), (1, F32)], 8, [[0], [2], [1, 3]]),
    ],
)
def test_buckets_hold_one_dtype_and_few_bytes_in_the_order_of_their_last(
    kinds, num_bytes, expected
):
    tensors = parameters(*kinds)
    assert places(cut_buckets(tensors, num_bytes), tensors) == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (None, [[0, 1], [2, 3], [4]]),
        (1, [[0, 1, 2, 3, 4]]),
        (2, [[0, 1], [2, 3, 4]]),
        (3, [[0], [1, 2], [3, 4]]),
        (9, [[0], [1], [2], [3], [4]]),
        ([[0, 4], [2, 1]], [[2, 1], [3], [0, 4]]),
        ([[], [3]], [[0, 1], [3], [2, 4]]),
    ],
)
def test_groups_say_what_travels_together(groups, expected):
    tensors = parameters(*[(1, F32)] * 5)
    if isinstance(groups, list):
        groups = [[tensors[place] for place in group] for group in groups]
    assert places(explicit_buckets(tensors, groups, 8), tensors) == expected


def test_frozen_parameters_of_a_group_are_left_out():
    tensors = parameters(*[(1, F32)] * 3)
    assert places(explicit_buckets(tensors[:2], [tensors], 8), tensors) == [[0, 1]]


def test_requests_are_named_by_their_first_and_last_parameter():
    assert name_of_request("gradients 0.1", ["a"]) == "gradients 0.1: a"
    assert name_of_request("gradients 0.1", ["a", "b", "c"]) == "gradients 0.1: a ... c"


def test_our_fusion_threshold_wins_over_horovods():
    def threshold(**variables):
        return Settings.from_environment(variables).fusion_threshold

    assert threshold() == 16 * 2**20
    assert threshold(HOROVOD_FUSION_THRESHOLD="7") == 7
    assert threshold(HOROVOD_FUSION_THRESHOLD="7", ADAREDUCE_FUSION_THRESHOLD="0") == 0
    for text in ("-1", "1e6", "1MB"):
        with pytest.raises(ValueError, match="number of bytes"):
            threshold(ADAREDUCE_FUSION_THRESHOLD=text)


def make_bucket(is_on_gpu: bool) -> Bucket:
    tensors = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    names = {id(tensor): f"p{place}" for place, tensor in enumerate(tensors)}
    bucket = Bucket("gradients 0.0", tensors, names, dict.fromkeys(names, 0))
    bucket.is_on_gpu = is_on_gpu
    return bucket


def test_names_of_requests_tell_steps_apart_but_on_a_gpu():
    # There each new name would be agreed on by the ranks' hosts.
    assert make_bucket(False).name_in(3) == "gradients 0.0: p0 ... p2, step 3"
    assert make_bucket(True).name_in(3) == make_bucket(True).name_in(4)


def test_presence_is_1_where_there_is_a_gradient():
    bucket = make_bucket(False)
    bucket.parameters[1].grad = torch.ones(2)
    bucket.prepare(sparse_as_dense=False)
    assert bucket.presence.tolist() == [0.0, 1.0, 0.0]
    bucket.prepare(sparse_as_dense=False)  # the others have zeros now
    assert bucket.presence.tolist() == [1.0, 1.0, 1.0]


def test_a_capture_needs_every_gradient(monkeypatch):
    monkeypatch.setattr(streams, "is_capturing", lambda: True)
    bucket = make_bucket(True)
    for parameter in bucket.parameters[:2]:
        parameter.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"'p2' must have a gradient while a CUDA graph is capt"):
        bucket.prepare(sparse_as_dense=False)
    bucket.parameters[2].grad = torch.ones(2)
    assert len(bucket.prepare(sparse_as_dense=False)) == 3
