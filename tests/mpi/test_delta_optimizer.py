"""DistributedOptimizer with Adasum: steps of the ranks are combined, not gradients.

Oracle: reference_training.py and the Adasum tree of reference.py, in float64; or exact integers.
"""

from __future__ import annotations

import pytest
import torch
from inputs import assert_equal, assert_library_works, bits
from training import (
    ADAM,
    MOMENTUM,
    OPTIMIZERS,
    assert_course,
    assert_equal_on_all_ranks,
    assert_weights,
    loss_of,
    make_model,
    make_sgd,
    weights_of,
)

import adareduce.torch as hvd
import reference
import reference_training as expected


def distribute(optimizer, **arguments):
    return hvd.DistributedOptimizer(optimizer, op=hvd.Adasum, **arguments)


@pytest.mark.openmpi_round
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_losses_and_weights_are_those_of_one_process(rule, passes, dtype, size, ranks):
    make_optimizer, make_rule = OPTIMIZERS[rule]
    model = make_model(dtype)
    optimizer = distribute(make_optimizer(model.parameters()), backward_passes_per_step=passes)
    course = expected.train("adasum", make_rule, size=size, passes=passes)
    assert_course(model, optimizer, course, passes)
    assert_equal_on_all_ranks(model, ranks)


@pytest.mark.parametrize("variant", [{"foreach": True}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("kind", ["momentum", "Adam"])
def test_foreach_and_fused_optimizers_work(kind, variant, size):
    make_optimizer, make_rule = (make_sgd, MOMENTUM[1]) if kind == "momentum" else ADAM
    model = make_model()
    optimizer = distribute(make_optimizer(model.parameters(), **variant))
    assert_course(model, optimizer, expected.train("adasum", make_rule, size=size, steps=8))


@pytest.mark.parametrize("threshold", ["0", "100"])
def test_several_requests_give_the_same_weights(threshold, size, monkeypatch):
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", threshold)
    model = make_model()
    optimizer = distribute(ADAM[0](model.parameters()))
    assert_course(model, optimizer, expected.train("adasum", ADAM[1], size=size, steps=5))


def test_bfloat16_follows_the_float64_course_within_its_rounding(size, ranks):
    model = make_model(torch.bfloat16)
    optimizer = distribute(make_sgd(model.parameters()))
    steps = 6
    course = expected.train("adasum", MOMENTUM[1], size=size, steps=steps)
    before = weights_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    # A weight of up to 2 is rounded (2^-8) when the model is made and twice in a step: by the
    # optimizer and when the combined change is added.
    assert_weights(model, course.weights[-1], tolerance=2 * (1 + 2 * steps) * 2.0**-8)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(model), strict=True))
    assert_equal_on_all_ranks(model, ranks)


def test_sgd_without_momentum_is_adasum_of_the_gradients(size):
    model, other = make_model(), make_model()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.05))
    plain = torch.optim.SGD(other.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(other, step).backward()
        hvd.grouped_allreduce_([p.grad for p in other.parameters()], op=hvd.Adasum)
        plain.step()
    assert_weights(model, weights_of(other))


def test_compressed_changes_are_rounded(size):
    class Single(hvd.Compression.none):
        @staticmethod
        def compress(tensor):
            return tensor.float(), tensor.dtype

        @staticmethod
        def decompress(tensor, ctx):
            return tensor.to(ctx)

    model = make_model()
    optimizer = distribute(make_sgd(model.parameters()), compression=Single)
    course = expected.train("adasum", MOMENTUM[1], size=size)
    assert_course(model, optimizer, course, tolerance=60 * 2.0**-24)
    error = (weights_of(model)[0] - torch.tensor(course.weights[-1][0])).abs().max()
    assert error > 2.0**-40


# ---- what is local ------------------------------------------------------------------------------


def test_clipping_is_that_of_each_rank(size):
    model = make_model()
    optimizer = distribute(make_sgd(model.parameters()))
    course = expected.train("adasum", MOMENTUM[1], size=size, clip=0.05)

    def clip_and_step():
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with optimizer.skip_synchronize():
            optimizer.step()

    assert_course(model, optimizer, course, take_step=clip_and_step)


@pytest.mark.min_ranks(2)
def test_the_state_is_that_of_each_rank(rank, ranks):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = distribute(torch.optim.SGD([p], lr=1.0, momentum=0.5))
    (p.sum() * (rank + 1)).backward()
    optimizer.step()
    assert_equal(optimizer.state[p]["momentum_buffer"], torch.full((2,), rank + 1.0))
    assert_equal(p.grad, torch.full((2,), rank + 1.0))


def test_any_number_of_passes_is_added(rank, size):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = distribute(torch.optim.SGD([p], lr=1.0))
    for _ in range(3):
        (p.sum() * (rank + 1)).backward()
    optimizer.step()
    # Parallel changes: their mean, with the tree's weights.
    weights = reference.weights(reference.adasum_tree(size))
    change = -3 * sum(weights[r] * (r + 1) for r in range(size))
    torch.testing.assert_close(p.detach(), torch.full((3,), change, dtype=torch.float64))


def test_parameters_without_gradient_add_nothing(rank, size):
    everywhere, nowhere, here = (
        torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)
    )
    optimizer = distribute(
        torch.optim.SGD([everywhere, nowhere, here], lr=1.0, momentum=0.9, weight_decay=0.5)
    )
    used = everywhere.sum() + (here.sum() if rank == size - 1 else 0)
    used.backward()
    optimizer.step()
    change = torch.full((2,), -0.5, dtype=torch.float64)  # the gradient is 1 + 0.5 * 1, minus 2
    torch.testing.assert_close(everywhere.detach(), change)
    assert_equal(here.detach(), change)
    assert_equal(nowhere.detach(), torch.ones(2, dtype=torch.float64))
    assert nowhere not in optimizer.state


def test_gradients_of_a_closure_stay_local(size):
    model = make_model()
    optimizer = distribute(ADAM[0](model.parameters()))
    course = expected.train("adasum", ADAM[1], size=size, steps=4)
    for step, weights in enumerate(course.weights):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() == pytest.approx(course.losses[step][hvd.rank()][0])
        assert_weights(model, weights)


# A scheduler that was made for the inner optimizer does not see the outer one's steps.
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_it_is_one_of_its_class_and_keeps_hooks_and_schedulers():
    model = make_model()
    inner = torch.optim.Adam(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, step_size=1, gamma=0.5)
    optimizer = distribute(inner)
    assert isinstance(optimizer, torch.optim.Adam)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    before = weights_of(model)
    loss_of(model, 0).backward()
    optimizer.step()
    scheduler.step()
    assert seen == ["after"]
    assert optimizer.state is inner.state
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not torch.equal(before[0], weights_of(model)[0])


def test_parameters_can_be_added(rank, size):
    p, q = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = distribute(torch.optim.SGD([p], lr=1.0))
    optimizer.add_param_group({"params": [q]})
    (p.sum() + q[rank % 2]).backward()
    optimizer.step()
    assert_equal(p.detach(), -torch.ones_like(p))
    basis = [-torch.eye(2, dtype=torch.float64)[r % 2].numpy() for r in range(size)]
    torch.testing.assert_close(q.detach(), torch.tensor(reference.adasum(basis).astype(float)))


@pytest.mark.min_ranks(2)
def test_a_smaller_process_set_trains_by_itself(size):
    members = hvd.add_process_set([*range(size - 1)])
    model = make_model()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.05), process_set=members)
    if members.included():
        course = expected.train("adasum", lambda: expected.Sgd(0.05), size=size - 1)
        assert_course(model, optimizer, course)
    else:
        before = weights_of(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, 0) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        own = [w - 0.05 * p.grad for w, p in zip(before, model.parameters(), strict=True)]
        assert_weights(model, own)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.min_ranks(2)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_fails_on_one_rank_raises_everywhere_and_changes_no_weight(
    scaled, rank, size, monkeypatch, ranks
):
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", "0")
    model = make_model(torch.float32)
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=scaled)
    before = weights_of(model)

    def fail(*_):
        model[0].weight.data.fill_(7)
        raise ArithmeticError("no step today")

    hook = optimizer.register_step_pre_hook(fail) if rank == size - 1 else None
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(
        ArithmeticError if rank == size - 1 else hvd.HorovodInternalError, match="no step today"
    ):
        scaler.step(optimizer)
    assert [bits(w) for w in weights_of(model)] == [bits(w) for w in before]
    assert_library_works()
    if hook is not None:
        hook.remove()
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()
    assert_equal_on_all_ranks(model, ranks)
    assert bits(model[0].weight) != bits(before[0])


@pytest.mark.min_ranks(2)
def test_ranks_with_other_models_raise_and_change_no_weight(rank):
    parameters = [torch.nn.Parameter(torch.zeros(3 + (k == rank == 1))) for k in range(2)]
    optimizer = distribute(torch.optim.SGD(parameters, lr=1.0), groups=2)
    sum(p.sum() for p in parameters).backward()
    with pytest.raises(hvd.HorovodInternalError, match=r"shape .*\(4,\)"):
        optimizer.step()
    for p in parameters:  # also those of the request that went well
        assert_equal(p.detach(), torch.zeros_like(p).detach())
    assert_library_works()
