"""Distributed optimizers that a GPU can step without its host, with CPU tensors.

Oracle: the same optimizer in torch's plain loop, which never saw a step that was skipped.
"""

from __future__ import annotations

import math

import pytest
import torch
from adascale_reference import groups_of, loss_of, make_model
from no_host_reads import HostReadError, no_host_reads
from training import step_with_scaler

import adareduce.torch as hvd

# Roundings of float64, of which a fused kernel may make others than the loop does, over six steps.
NEAR = {"rtol": 1e-12, "atol": 1e-13}
MAKERS = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.05, **o),
    "momentum": lambda p, **o: torch.optim.SGD(p, lr=0.05, momentum=0.9, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=0.01, eps=1e-2, **o),
}


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_a_fused_one_with_a_grad_scaler_skips_on_all_ranks_and_the_host_reads_nothing(
    op, name, clips, rank, size, ranks
):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaled, plain = make_model(), make_model()
    first = hvd.DistributedOptimizer(MAKERS[name](groups_of(scaled), fused=True), op=op)
    second = hvd.DistributedOptimizer(MAKERS[name](groups_of(plain), foreach=False), op=op)
    # Memory that is not initialised must not be zero by luck.
    rubbish = [torch.full_like(p, math.nan) for _ in range(8) for p in scaled.parameters()]
    del rubbish
    for step in range(6):
        overflows = step in (0, 3)
        before = [p.detach().clone() for p in scaled.parameters()]
        first.zero_grad()
        loss = loss_of(scaled, step, rank)
        scaler.scale(loss * (math.inf if overflows and rank == size - 1 else 1.0)).backward()
        with no_host_reads():
            step_with_scaler(scaler, first, clips)
        scaler.update()
        if overflows:
            assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters(), strict=True))
        else:
            second.zero_grad()
            loss_of(plain, step, rank).backward()
            second.step()
        for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, **NEAR)
    bits = [p.detach().numpy().tobytes() for p in scaled.parameters()]
    assert all(theirs == bits for theirs in ranks.gather(bits)), "the ranks have different bits"


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_one_that_is_not_fused_is_asked_by_the_host(op, rank):
    # What docs/optimizer.md admits: torch cannot skip such a step on a GPU.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = make_model()
    optimizer = hvd.DistributedOptimizer(MAKERS["SGD"](groups_of(model), foreach=True), op=op)
    scaler.scale(loss_of(model, 0, rank)).backward()
    with pytest.raises(HostReadError), no_host_reads():
        scaler.step(optimizer)
    optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum, hvd.Adasum])
def test_without_a_grad_scaler_the_host_reads_nothing(op, name, rank):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(MAKERS[name](groups_of(model), foreach=True), op=op)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        with no_host_reads(optimizer):
            optimizer.step()


def test_presence_is_read_only_by_a_rank_that_lacks_a_gradient(rank, size):
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0))
    sum(p.sum() for p in parameters[: 1 if rank == 0 else 2]).backward()
    if rank == 0:
        with pytest.raises(HostReadError), no_host_reads():
            optimizer.step()
        optimizer.reducer.abandon(RuntimeError("nothing is left"))
        optimizer.zero_grad()
    else:
        with no_host_reads():
            optimizer.step()
