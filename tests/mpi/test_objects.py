"""Models and Python objects. Oracle: the root's values, computed on every rank from its seed."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, assert_library_works, bits

import adareduce.torch as hvd


def make_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    ).to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 4, 4))  # BatchNorm's buffers, an int64 among them
    for _ in range(seed):
        model(torch.randn(2, 3, 4, 4))
    return model


@pytest.mark.openmpi_round
def test_broadcast_parameters_copies_a_state_dict_with_buffers(rank, size):
    root = size - 1
    model = make_model(rank)
    assert not model[0].weight.is_contiguous()
    strides = model[0].weight.stride()
    hvd.broadcast_parameters(model.state_dict(), root_rank=root)
    expected = make_model(root).state_dict()
    for name, tensor in model.state_dict().items():
        assert bits(tensor) == bits(expected[name]), name
    assert model[0].weight.stride() == strides


def test_broadcast_parameters_takes_named_parameters_and_double(rank):
    model = make_model(rank).double()
    hvd.broadcast_parameters(model.named_parameters(), root_rank=0)
    for mine, roots in zip(model.parameters(), make_model(0).double().parameters(), strict=True):
        assert_equal(mine, roots)


def test_broadcast_parameters_of_nothing_is_nothing():
    hvd.broadcast_parameters({}, root_rank=0)
    assert_library_works()


@pytest.mark.parametrize("params", [[torch.zeros(2)], [("a", torch.zeros(2), 3)]])
def test_broadcast_parameters_refuses_what_has_no_names(params):
    with pytest.raises(ValueError, match="params must be a dict or pairs of name and tensor"):
        hvd.broadcast_parameters(params, root_rank=0)


@pytest.mark.openmpi_round
@pytest.mark.parametrize(
    "obj", [None, 17, {"epoch": 3, "best": [0.25, None]}, "x" * 100_000], ids=type
)
def test_broadcast_object_gives_every_rank_the_roots_object(obj, rank, size):
    for root in range(size):
        assert hvd.broadcast_object(obj if rank == root else "something else", root) == obj


def test_broadcast_object_that_cannot_be_pickled_raises_everywhere(rank):
    error = TypeError if rank == 0 else hvd.HorovodInternalError
    with pytest.raises(error, match="broadcast_object: obj must be something that pickle takes"):
        hvd.broadcast_object(lambda: None, root_rank=0)
    assert_library_works()
