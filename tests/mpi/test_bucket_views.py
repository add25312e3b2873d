"""gradient_as_bucket_view: gradients that lie side by side, in what is handed to the engine.

Oracle: the same training without, bit for bit: sums are in the same order.
"""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from inputs import assert_equal, assert_library_works, bits
from torch.nn import functional
from training import integer_parameters, plain_sgd, step_with_scaler
from ways import Watch, is_shared

import adareduce.torch as hvd
from adareduce.torch import delta, flat_buffers, gradients

ALIGNMENT = 16  # elements; kShardAlignment in csrc/collectives/shards.h
STEPS = 4


class Net(torch.nn.Module):
    """Convolutions in channels_last, a table, a branch that is not always taken, two dtypes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(7, 12)
        self.convolution = torch.nn.Conv2d(3, 5, 3)
        self.unused = torch.nn.Linear(3, 2)
        self.branch = torch.nn.Linear(5, 5)
        self.frozen = torch.nn.Linear(5, 5).requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))  # no dimension
        self.nothing = torch.nn.Parameter(torch.zeros(0, 4))
        self.last = torch.nn.Linear(5, 3).to(torch.float64)
        self.to(memory_format=torch.channels_last)

    def forward(self, words, takes_branch):
        images = self.table(words).view(-1, 3, 4, 4)
        hidden = self.convolution(images).mean((2, 3)) + self.nothing.sum()
        if takes_branch:
            hidden = hidden + self.branch(hidden).tanh()
        return self.last((self.frozen(hidden) * self.scale).double())


def loss_of(model, step, micro_batch=0):
    torch.manual_seed(1000 * step + 10 * hvd.rank() + micro_batch)
    words = torch.randint(0, 7, (2, 4))
    takes_branch = (step + hvd.rank()) % 2 == 0  # of several ranks, some
    return functional.mse_loss(model(words, takes_branch), torch.randn(2, 3).double())


def groups_of(model):
    return [
        {"params": [*model.convolution.parameters(), *model.last.parameters()], "lr": 0.1},
        {"params": [p for n, p in model.named_parameters() if "conv" not in n and "last" not in n]},
    ]


def make_adam(model):
    return torch.optim.Adam(groups_of(model), lr=0.05, weight_decay=0.01)


def make_momentum(model):
    return torch.optim.SGD(groups_of(model), lr=0.05, momentum=0.9)


def distribute(model, as_views, make=make_adam, **arguments):
    return hvd.DistributedOptimizer(
        make(model), model.named_parameters(), gradient_as_bucket_view=as_views, **arguments
    )


def state_of(model):
    """The bits of all weights and gradients, and how the latter lie."""
    return [
        (name, bits(p.detach()), None if p.grad is None else (bits(p.grad), p.grad.stride()))
        for name, p in model.named_parameters()
    ]


def backward(model, step, passes=1):
    for micro_batch in range(passes):
        (loss_of(model, step, micro_batch) / passes).backward()


def course_of(as_views, train, **arguments):
    """States of a training, step by step, of ``train(model, optimizer, step)``."""
    model = Net()
    optimizer = distribute(model, as_views, **arguments)
    states = []
    for step in range(STEPS):
        train(model, optimizer, step)
        states.append(state_of(model))
    return states


def assert_same_course(train, **arguments):
    plain = course_of(False, train, **arguments)
    assert course_of(True, train, **arguments) == plain
    assert plain[0] != plain[-1]


@pytest.fixture(autouse=True)
def _several_buckets(monkeypatch):
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", "300")


@pytest.fixture
def launches(monkeypatch):
    """The tensors of every request, as they are when it is made: (address, elements)."""
    seen = []
    for module, name in (
        (gradients, "grouped_allreduce_async_"),
        (gradients, "grouped_allreduce_with_stats_async_"),
        (delta, "grouped_allreduce_async_"),
    ):
        original = getattr(module, name)

        def watched(tensors, *arguments, function=original, **options):
            seen.append([(tensor.data_ptr(), tensor.numel()) for tensor in tensors])
            return function(tensors, *arguments, **options)

        monkeypatch.setattr(module, name, watched)
    return seen


@pytest.fixture
def buffers(monkeypatch):
    """All flat buffers that are made."""
    made = []

    def watched(*arguments, function=flat_buffers.allocate):
        made.append(function(*arguments))
        return made[-1]

    monkeypatch.setattr(flat_buffers, "allocate", watched)
    return made


# ---- the same training --------------------------------------------------------------------------


@pytest.mark.openmpi_round
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum, hvd.Adasum])
def test_weights_and_gradients_are_those_without_views(op, passes, set_to_none):
    def train(model, optimizer, step):
        optimizer.zero_grad(set_to_none)
        backward(model, step, passes)
        optimizer.step()

    assert_same_course(train, op=op, backward_passes_per_step=passes)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("way", ["model", "none", "replaced", "data", "alias", "other strides"])
def test_gradients_that_users_remove_or_replace_come_back(way):
    def train(model, optimizer, step):
        for p in model.parameters():
            gradient = p.grad
            if gradient is None:
                continue
            if way == "replaced":
                p.grad = torch.zeros_like(p)
            elif way == "data":
                gradient.data = torch.zeros_like(p)
            elif way == "alias":
                gradient.zero_()
                p.grad = gradient.detach()
            elif way == "other strides":
                p.grad = torch.zeros(p.shape, dtype=p.dtype)
            elif way == "none":
                p.grad = None
        if way == "model":
            model.zero_grad()
        optimizer.reducer.reset()
        backward(model, step)
        optimizer.step()

    assert_same_course(train)


def test_gradients_set_by_hand_are_reduced(rank, size):
    for as_views in (False, True):
        (p,) = integer_parameters(5)
        optimizer = plain_sgd([p], gradient_as_bucket_view=as_views)
        for step in range(3):
            optimizer.zero_grad()
            p.grad = torch.full_like(p, rank + 1.0 + step)
            optimizer.step()
        total = sum(r + 1.0 + step for r in range(size) for step in range(3))
        assert_equal(p.detach(), torch.full_like(p, -total).detach())


def test_one_part_of_the_buffer_as_the_gradient_of_another():
    # Overlaps where it is to be copied to.
    p, q = integer_parameters(16, 16)
    optimizer = plain_sgd([p, q], gradient_as_bucket_view=True)
    (q.sum() + 2 * p.sum()).backward()
    optimizer.synchronize()
    whole = torch.empty(0, dtype=p.dtype).set_(p.grad.untyped_storage(), 0, (32,), (1,))
    whole.copy_(torch.arange(32))
    p.grad, q.grad = whole[8:24], whole[::2]
    sums = [torch.arange(8.0, 24.0), torch.arange(0.0, 32.0, 2)]
    optimizer.synchronize()
    first_to_be_copied = q  # the last parameter is the first of its bucket
    assert_equal(first_to_be_copied.grad, sums[1].double() * hvd.size())


@pytest.mark.parametrize("as_views", [False, True])
def test_a_parameter_that_is_listed_twice_counts_twice_in_requests_and_once_in_grad(
    as_views, rank, size
):
    p, q = integer_parameters(3, 2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        inner = torch.optim.SGD([p, q, p], lr=1.0)
    optimizer = hvd.DistributedOptimizer(inner, op=hvd.Sum, gradient_as_bucket_view=as_views)
    for _ in range(2):
        optimizer.zero_grad()
        ((p.sum() + q.sum()) * (rank + 1)).backward()
        optimizer.step()
        assert_equal(p.grad, torch.full_like(p.grad, size * (size + 1) / 2))
    assert_equal(q.detach(), torch.full_like(q, -size * (size + 1)).detach())
    assert_equal(p.detach(), torch.full_like(p, -2 * size * (size + 1)).detach())


def test_parameters_that_share_memory_have_gradients_of_their_own(rank, size):
    memory = torch.zeros(4, dtype=torch.float64)
    p, q = torch.nn.Parameter(memory), torch.nn.Parameter(memory)
    optimizer = plain_sgd([p, q], gradient_as_bucket_view=True)
    ((p.sum() + 2 * q.sum()) * (rank + 1)).backward()
    optimizer.synchronize()
    total = size * (size + 1) / 2
    assert_equal(p.grad, torch.full_like(p.grad, total))
    assert_equal(q.grad, torch.full_like(q.grad, 2 * total))


def test_clipping_in_place():
    def train(model, optimizer, step):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with optimizer.skip_synchronize():
            optimizer.step()

    assert_same_course(train)


@pytest.mark.parametrize("clips", [False, True])
def test_gradient_scalers(clips):
    scalers = {}

    def train(model, optimizer, step):
        scaler = scalers.setdefault(
            id(optimizer), torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        )
        optimizer.zero_grad()
        overflows = step == 1 and hvd.rank() == 0
        scaler.scale(loss_of(model, step) * (float("inf") if overflows else 1.0)).backward()
        step_with_scaler(scaler, optimizer, clips, max_norm=0.01)
        scaler.update()

    assert_same_course(train)


@pytest.mark.parametrize("wraps", ["plain", "distributed"])
@pytest.mark.parametrize("passes", [1, 2])
def test_adascale_and_its_statistics(passes, wraps):
    def course(as_views):
        model = Net()
        if wraps == "plain":
            optimizer = hvd.AdaScale(
                make_momentum(model), backward_passes_per_step=passes, scale=3.0,
                gradient_as_bucket_view=as_views,
            )  # fmt: skip
        else:
            inner = distribute(model, as_views, make_momentum, backward_passes_per_step=passes)
            optimizer = hvd.AdaScale(inner, scale=3.0)
        states = []
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, passes)
            optimizer.step()
            found = [optimizer.tau, optimizer.gains, optimizer.variance, optimizer.squared_norm]
            states.append((state_of(model), [bits(value) for value in found]))
        return states

    assert course(True) == course(False)


def test_adascale_of_a_distributed_optimizer_is_not_told_of_views():
    with pytest.raises(ValueError, match="gradient_as_bucket_view must be given to the Distrib"):
        hvd.AdaScale(distribute(Net(), True, make_momentum), gradient_as_bucket_view=True)


def test_shorter_types_on_the_way():
    def train(model, optimizer, step):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()

    class Short(hvd.Compression.none):
        @staticmethod
        def compress(tensor):
            return tensor.to(torch.bfloat16), tensor.dtype

        @staticmethod
        def decompress(tensor, ctx):
            return tensor.to(ctx)

    assert_same_course(train, compression=Short)


@pytest.mark.parametrize("passes", [1, 2])
def test_sparse_gradients_are_made_dense_on_demand(passes, rank):
    def weights(as_views):
        torch.manual_seed(5)
        table = torch.nn.Embedding(6, 3, sparse=True)
        optimizer = plain_sgd(
            table.parameters(), sparse_as_dense=True, gradient_as_bucket_view=as_views,
            backward_passes_per_step=passes,
        )  # fmt: skip
        for step in range(3):
            optimizer.zero_grad()
            for micro_batch in range(passes):
                words = torch.tensor([rank, rank, 5 - micro_batch])
                table(words).square().sum().backward()
            optimizer.step()
            assert table.weight.grad.layout == torch.strided, step
        return bits(table.weight.detach())

    assert weights(True) == weights(False)


@pytest.mark.min_ranks(2)
def test_a_gradient_that_cannot_be_reduced_raises_everywhere(rank):
    p, table = integer_parameters(2, 4)
    table = torch.nn.Parameter(table.detach().view(4, 1))
    optimizer = plain_sgd([p, table], gradient_as_bucket_view=True)
    rows = functional.embedding(torch.tensor([1, 2]), table, sparse=rank == 1)
    loss = rows.sum() + p.sum()
    if rank == 1:
        with pytest.raises(ValueError, match=r"must be dense, got layout torch\.sparse_coo"):
            loss.backward()
    else:
        loss.backward()
        with pytest.raises(hvd.HorovodInternalError, match="must be dense"):
            optimizer.step()
    optimizer.zero_grad()
    p.sum().backward()
    optimizer.step()
    assert_library_works()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_with_a_graph_is_refused_and_one_without_is_taken(rank, size):
    # create_graph=True makes autograd add out of place, also to a gradient that is there.
    for as_views in (False, True):
        (p,) = integer_parameters(3)
        optimizer = plain_sgd([p], gradient_as_bucket_view=as_views)
        p.grad = torch.ones_like(p)
        (p.sum() * (rank + 1)).backward(create_graph=True)
        optimizer.step()
        assert_equal(p.detach(), torch.full_like(p, -size - size * (size + 1) / 2).detach())
        optimizer.zero_grad()
        with pytest.raises(ValueError, match=r"must not require a gradient.*create_graph"):
            (p * p).sum().backward(create_graph=True)
        optimizer.zero_grad()
        assert_library_works()


def test_gradients_touched_during_a_reduction_are_noticed():
    for touch in ("change", "replace", "remove"):
        p, q = integer_parameters(2, 2)
        optimizer = plain_sgd([p, q], gradient_as_bucket_view=True)
        (p.sum() + q.sum()).backward()
        if touch == "change":
            q.grad.mul_(2)
        else:
            q.grad = None if touch == "remove" else torch.ones_like(q)
        with pytest.raises(RuntimeError, match=r"'parameter 1 of group 0' must not be touched"):
            optimizer.step()
        optimizer.zero_grad()


# ---- the life of an optimizer -------------------------------------------------------------------


def test_groups_added_later_have_buffers_too(rank, size, launches, buffers):
    p, q = integer_parameters(2, 3)
    optimizer = plain_sgd([p], gradient_as_bucket_view=True)
    p.sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 2.0})
    optimizer.zero_grad()
    ((p.sum() + q.sum()) * (rank + 1)).backward()
    optimizer.step()
    assert_equal(p.detach(), torch.full_like(p, -size - size * (size + 1) / 2).detach())
    assert_equal(q.detach(), torch.full_like(q, -size * (size + 1)).detach())
    assert_lie_in(launches[-1], buffers[-1])


def test_a_new_optimizer_takes_the_parameters_over(rank, size):
    (p,) = integer_parameters(3)
    former = plain_sgd([p], gradient_as_bucket_view=True)
    p.sum().backward()
    former.step()
    optimizer = plain_sgd([p], gradient_as_bucket_view=True)  # the gradient lies elsewhere
    p.sum().backward()  # and is added to
    optimizer.step()
    assert_equal(p.detach(), torch.full_like(p, -size - (size + size * size)).detach())
    assert former.reducer.num_copied == 1
    assert optimizer.reducer.num_copied == 1


def test_gradients_outlive_the_optimizer(rank, size):
    p, q = integer_parameters(3, 3)
    optimizer = plain_sgd([p, q], gradient_as_bucket_view=True)
    (p.sum() + q.sum()).backward()
    optimizer.step()
    del optimizer
    gc.collect()
    (p.sum() * rank).backward()
    assert_equal(p.grad, torch.full_like(p.grad, float(size + rank)))
    assert_equal(q.grad, torch.full_like(q.grad, float(size)))


def test_gradients_outlive_shutdown_and_are_used_again():
    def train(model, optimizer, step):
        backward(model, step)  # adds to the gradients that are there
        optimizer.step()
        hvd.shutdown()
        hvd.init()

    assert_same_course(train)


def test_state_dicts_hold_nothing_of_the_buffers(rank):
    def train_and_save(as_views):
        model = Net()
        optimizer = distribute(model, as_views)
        backward(model, 0)
        optimizer.step()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        other = Net()
        resumed = distribute(other, as_views)
        saved = torch.load(io.BytesIO(file.getvalue()))
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        backward(other, 1)
        resumed.step()
        return len(file.getvalue()), state_of(other)

    assert train_and_save(True) == train_and_save(False)


def test_copies_of_models_and_gradients_are_independent(rank, size):
    p, q = integer_parameters(3, 3)
    model = torch.nn.ParameterList([p, q])
    optimizer = plain_sgd(model.parameters(), gradient_as_bucket_view=True)
    (p.sum() + 2 * q.sum()).backward()
    optimizer.step()
    twin, gradient = copy.deepcopy(model), copy.deepcopy(q.grad)
    optimizer.zero_grad(set_to_none=False)
    assert_equal(gradient, torch.full_like(q.grad, 2.0 * size))
    assert_equal(twin[1].detach(), torch.full_like(q, -2.0 * size).detach())


@pytest.mark.min_ranks(2)
def test_ranks_outside_the_process_set_have_no_buffers(rank, size, buffers):
    members = hvd.add_process_set([*range(size - 1)])
    for op in (hvd.Sum, hvd.Adasum):
        (p,) = integer_parameters(2)
        optimizer = plain_sgd([p], process_set=members, gradient_as_bucket_view=True, op=op)
        p.sum().backward()
        optimizer.step()
        total = size - 1 if members.included() and op == hvd.Sum else 1
        assert_equal(p.detach(), torch.full_like(p, -float(total)).detach())
    assert len(buffers) == (2 if members.included() else 0)


# ---- where gradients lie ------------------------------------------------------------------------


def assert_lie_in(request, *flats):
    """Every tensor lies in a buffer, at a multiple of 16 elements, behind those before it."""
    ends = {}
    for address, numel in request:
        if numel == 0:
            continue
        (flat,) = (
            flat
            for flat in flats
            if flat.data_ptr() <= address < flat.data_ptr() + flat.nbytes
        )  # fmt: skip
        begin, remainder = divmod(address - flat.data_ptr(), flat.element_size())
        assert remainder == 0
        assert begin == -(-ends.get(id(flat), 0) // ALIGNMENT) * ALIGNMENT
        ends[id(flat)] = begin + numel
    for flat in flats:
        assert flat.numel() == max(1, -(-ends.get(id(flat), 0) // ALIGNMENT)) * ALIGNMENT


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
@pytest.mark.parametrize("zero", ["optimizer", "model", "data", "nothing is set to None"])
@pytest.mark.parametrize("threshold", ["0", "300", "100000"])
def test_what_is_launched_lies_in_the_buffers(threshold, zero, op, launches, buffers, monkeypatch):
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", threshold)
    model = Net()
    optimizer = distribute(model, True, op=op)
    num_requests = len(buffers)  # every request has one dtype here
    for step in range(3):
        if zero in ("model", "data"):
            for p in model.parameters():
                if zero == "data" and p.grad is not None:
                    p.grad.data = torch.zeros_like(p)
            if zero == "model":
                model.zero_grad()
            if op != hvd.Adasum:
                optimizer.reducer.reset()
        else:
            optimizer.zero_grad(set_to_none=zero == "optimizer")
        launches.clear()
        backward(model, step)
        optimizer.step()
        assert len(launches) == num_requests
        for request, flat in zip(launches, buffers, strict=True):
            assert_lie_in(request, flat)
    assert len(buffers) == num_requests, "buffers must be made once"


def test_a_request_of_several_dtypes_has_a_buffer_for_each(launches, buffers):
    parameters = [
        torch.nn.Parameter(torch.zeros(n, dtype=dtype))
        for n, dtype in ((3, torch.float32), (17, torch.float64), (20, torch.float32))
    ]
    optimizer = plain_sgd(parameters, groups=[parameters], gradient_as_bucket_view=True)
    sum(k * p.double().sum() for k, p in enumerate(parameters)).backward()
    optimizer.step()
    for k, p in enumerate(parameters):
        assert_equal(p.detach(), torch.full_like(p, -k * float(hvd.size())).detach())
    assert [flat.dtype for flat in buffers] == [torch.float32, torch.float64]
    assert len(launches) == 1
    assert_lie_in(launches[0], *buffers)


@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_that_stay_in_the_buffers_are_not_copied(passes, buffers):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), backward_passes_per_step=passes,
        gradient_as_bucket_view=True,
    )  # fmt: skip
    copied = []
    for step in range(4):
        # From the second step on gradients are zeroed where they lie; the last one makes new ones.
        optimizer.zero_grad(set_to_none=step == 3)
        for _ in range(passes):
            model(torch.full((3, 4), 1.0 + step)).square().mean().backward()
            (flat,) = buffers  # from the first pass on
            for p in model.parameters():
                assert flat.data_ptr() <= p.grad.data_ptr() < flat.data_ptr() + flat.nbytes
        optimizer.step()
        copied.append(optimizer.reducer.num_copied)
    assert copied == [4, 4, 4, 8]


def test_without_views_nothing_is_allocated_or_copied(buffers):
    model = Net()
    optimizer = distribute(model, False)
    backward(model, 0)
    optimizer.step()
    assert buffers == []
    assert optimizer.reducer.num_copied == 0


# ---- with shared memory -------------------------------------------------------------------------


@pytest.mark.min_ranks(2)
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("kind", ["Sum", "Average", "Adasum", "AdaScale"])
def test_buckets_are_reduced_where_they_lie(kind, passes, monkeypatch):
    # Oracle: the same training without views, and the engine's counts of ways.
    monkeypatch.setenv("ADAREDUCE_FUSION_THRESHOLD", "300000")
    numel_of = [(150, 401), (401,), (401, 300), (300,), (300, 3), (3,)]

    def course(as_views):
        torch.manual_seed(7)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in numel_of]
        inner = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        arguments = {"backward_passes_per_step": passes, "gradient_as_bucket_view": as_views}
        if kind == "AdaScale":
            optimizer = hvd.AdaScale(inner, scale=2.0, **arguments)
        else:
            optimizer = hvd.DistributedOptimizer(inner, op=getattr(hvd, kind), **arguments)
        watch, states, went = Watch(), [], []
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for micro_batch in range(passes):
                torch.manual_seed(100 * step + 10 * hvd.rank() + micro_batch)
                # The bias of the last layer has no gradient on the first rank.
                used = parameters[:-1] if hvd.rank() == 0 else parameters
                sum((p * torch.randn_like(p)).sum() for p in used).backward()
            optimizer.step()
            states.append([bits(p.detach()) for p in parameters])
            went.append(watch.went())
        return states, went

    expected, went_without = course(False)
    states, went = course(True)
    assert states == expected
    if is_shared():
        assert all(ways.in_place == 0 and ways.through_slots > 0 for ways in went_without)
        assert all(ways.in_place > 0 and ways.through_slots == 0 for ways in went), went
        assert [w.in_place for w in went] == [w.through_slots for w in went_without]
