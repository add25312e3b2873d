"""States of optimizers and objects of all ranks. Oracle: the root's, computed by every rank."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, assert_library_works
from training import loss_of, make_model

import adareduce.torch as hvd

KINDS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "plain SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True, betas=(0.5, 0.9)),
    "tensor rate": lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr), capturable=False),
    "LBFGS": lambda p, lr: torch.optim.LBFGS(p, lr=lr, max_iter=3),
}


def train(kind, rate, steps):
    """An optimizer that has seen data which do not depend on the rank."""
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), rate)
    inputs = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    optimizer.param_groups[0]["note"] = ("steps", steps)
    return optimizer


def assert_same(actual, wanted):
    if isinstance(wanted, torch.Tensor):
        assert_equal(actual, wanted)
    elif isinstance(wanted, dict):
        assert actual.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(actual[key], value)
    elif isinstance(wanted, list):
        assert len(actual) == len(wanted)
        for a, b in zip(actual, wanted, strict=True):
            assert_same(a, b)
    else:
        assert actual == wanted


@pytest.mark.parametrize("who_has_state", ["root", "others", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_the_roots_state_and_options(kind, who_has_state, rank, size):
    root = size - 1
    roots_steps = 0 if who_has_state == "others" else 2
    steps = roots_steps if rank == root else (0 if who_has_state == "root" else 3)
    optimizer = train(kind, 0.1 * (rank + 1), steps)
    hvd.broadcast_optimizer_state(optimizer, root_rank=root)
    wanted = train(kind, 0.1 * (root + 1), roots_steps).state_dict()
    assert_same(optimizer.state_dict(), wanted)


def test_a_distributed_optimizer_goes_on_from_the_roots_state(rank, ranks):
    model = make_model()
    inner = torch.optim.Adam(model.parameters(), lr=0.01 if rank == 0 else 1.0)
    if rank == 0:
        loss_of(model, 0).backward()
        inner.step()
    optimizer = hvd.DistributedOptimizer(inner)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert inner.state is optimizer.state
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    steps = [float(state["step"]) for state in optimizer.state.values()]
    assert steps == [2.0] * 4
    weights = [p.detach().numpy().tobytes() for p in model.parameters()]
    assert len(set(map(tuple, ranks.gather(weights)))) == 1


@pytest.mark.min_ranks(2)
def test_groups_of_other_sizes_raise_everywhere(rank):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(parameters[: 2 if rank == 1 else 3], lr=0.1)
    error = ValueError if rank == 1 else hvd.HorovodInternalError
    with pytest.raises(error, match=r"groups of the root's sizes \[3\], got \[2\]"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_library_works()


def test_options_that_cannot_be_pickled_raise_everywhere(rank):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    if rank == 0:
        optimizer.param_groups[0]["schedule"] = lambda step: step
    error = TypeError if rank == 0 else hvd.HorovodInternalError
    with pytest.raises(error, match="something that pickle takes"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_library_works()


@pytest.mark.openmpi_round
def test_allgather_object_gives_every_rank_all_objects(rank, size):
    objects = [{"rank": r, "text": "x" * (10_000 * r), "none": None} for r in range(size)]
    assert hvd.allgather_object(objects[rank]) == objects
    assert hvd.allgather_object(rank, name="ranks") == [*range(size)]


def test_allgather_object_of_a_process_set(rank, size):
    members = hvd.global_process_set if size == 1 else hvd.add_process_set([size - 1])
    if rank == size - 1:
        assert hvd.allgather_object("me", process_set=members) == ["me"]


def test_allgather_object_that_cannot_be_pickled_raises_everywhere(rank):
    error = TypeError if rank == 0 else hvd.HorovodInternalError
    with pytest.raises(error, match="allgather_object: obj must be something that pickle takes"):
        hvd.allgather_object((lambda: None) if rank == 0 else 1)
    assert_library_works()
