"""Asynchronous calls, names and barriers. Oracle: what other ranks report beside the library."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from inputs import assert_equal, assert_library_works, integers, of_all_ranks, total

import adareduce.torch as hvd
from adareduce.torch import handles


@pytest.mark.openmpi_round
@pytest.mark.min_ranks(2)
def test_a_barrier_overtakes_pending_calls(rank, ranks):
    values = of_all_ranks(integers, (1000,), torch.float32)
    if rank == 0:
        handle = hvd.allreduce_async(values[rank], op=hvd.Sum)
        hvd.barrier()
        is_pending = not hvd.poll(handle)
        ranks.gather(None)  # only now do the others call
    else:
        hvd.barrier()
        ranks.gather(None)
        handle = hvd.allreduce_async(values[rank], op=hvd.Sum)
        is_pending = True
    assert is_pending
    assert_equal(hvd.synchronize(handle), total(values))


@pytest.mark.min_ranks(2)
def test_nobody_leaves_a_barrier_before_the_last_has_come(rank, size, ranks):
    # Not tmp_path: its clean-up is not made for several pytests at once.
    with tempfile.TemporaryDirectory() as mine:
        sign = Path(ranks.gather(mine)[0]) / "the-last-has-come"
        if rank == size - 1:
            sign.touch()
        hvd.barrier()
        assert sign.exists()
        ranks.gather(None)


@pytest.mark.min_ranks(2)
def test_poll_is_false_until_every_rank_has_called(rank, ranks):
    if rank == 0:
        handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum)
        was_finished = hvd.poll(handle)
        ranks.gather(None)
        assert not was_finished
    else:
        ranks.gather(None)
        handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum)
    hvd.synchronize(handle)
    assert hvd.poll(handle)


def test_poll_becomes_true_without_synchronize(rank, ranks):
    handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum)
    while not hvd.poll(handle):  # the watchdog ends this if it is wrong
        pass
    assert_equal(hvd.synchronize(handle), torch.full((3,), float(ranks.size)))


def test_a_name_is_in_use_until_its_handle_is_synchronised():
    handle = hvd.allreduce_async(torch.ones(3), name="x", op=hvd.Sum)
    with pytest.raises(ValueError, match=r"name must not be in use .*'x'"):
        hvd.allreduce_async(torch.ones(3), name="x", op=hvd.Sum)
    hvd.synchronize(handle)
    hvd.allreduce(torch.ones(3), name="x", op=hvd.Sum)


def test_a_name_is_free_again_after_an_error(rank, size):
    with pytest.raises((TypeError, hvd.HorovodInternalError)):
        hvd.allreduce(torch.ones(3, dtype=torch.bool if rank == 0 else torch.float32), name="y")
    assert_equal(hvd.allreduce(torch.ones(3), name="y", op=hvd.Sum), torch.full((3,), float(size)))


def test_temporary_tensors_live_until_their_call_has_ended(rank, size, ranks):
    handles = [hvd.allreduce_async(torch.full((5000,), i + 1.0), op=hvd.Sum) for i in range(20)]
    clutter = [torch.full((5000,), -1.0) for _ in range(50)]
    for i, handle in enumerate(handles):
        assert_equal(hvd.synchronize(handle), torch.full((5000,), (i + 1.0) * size))
    del clutter


def test_tensors_are_let_go_when_their_call_was_synchronised():
    def released(call):
        tensor = torch.ones(5)
        alive = weakref.ref(tensor)
        result = call(tensor)
        del tensor, result
        gc.collect()
        return alive() is None

    before = set(handles._in_flight)  # of other tests that dropped handles
    assert released(lambda tensor: hvd.allreduce_(tensor))
    assert released(lambda tensor: hvd.grouped_allreduce_([tensor, torch.ones(2)]))
    assert released(lambda tensor: hvd.broadcast_(tensor, 0))
    assert released(lambda tensor: hvd.synchronize(hvd.allreduce_async_(tensor)))
    assert set(handles._in_flight) <= before


def test_tensors_of_dropped_handles_do_not_pile_up():
    # At most twice as many as at the last look, when two calls were running, and a few.
    most = 2 * 2 + handles._FEWEST_TO_LOOK_FOR
    handles._in_flight.clear()  # of other tests; all of them have ended
    handles._most_in_flight = most
    alive = []
    for _ in range(40):
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        hvd.allreduce_async_(tensor, op=hvd.Sum)
        del tensor
        assert_library_works()  # behind it: it has ended
        assert sum(reference() is not None for reference in alive) <= most


def test_calls_that_wait_tell_the_engine_so(rank, size, monkeypatch):
    # Where the engine can work on the caller's thread, it is to do it for these and no others.
    waiting = []

    def run(engine, **arguments):
        waiting.append(arguments["collective"].name)
        return engine.submit(**arguments)

    monkeypatch.setattr(handles, "_run", run)
    calls = {
        "allreduce": lambda: hvd.allreduce_(torch.ones(3), name="x", op=hvd.Sum).tolist()
        == [size] * 3,
        "allreduce into new ones": lambda: hvd.allreduce(torch.ones(2)).tolist() == [1] * 2,
        "allreduce of several": lambda: len(hvd.grouped_allreduce_([torch.ones(3)] * 2)) == 2,
        "allreduce with statistics": lambda: hvd.grouped_allreduce_with_stats_([torch.ones(3)])[1]
        .nonfinite.tolist() == [0],
        "broadcast": lambda: hvd.broadcast_(torch.tensor([rank]), 0).tolist() == [0],
        "allgather": lambda: hvd.allgather(torch.ones(2)).tolist() == [1] * (2 * size),
        "reducescatter": lambda: hvd.reducescatter(torch.ones(size), op=hvd.Sum).tolist() == [size],
        "alltoall": lambda: hvd.alltoall(torch.ones(size)).tolist() == [1] * size,
        "barrier": lambda: hvd.barrier() is None,
    }  # fmt: skip
    for name, call in calls.items():
        waiting.clear()
        assert call(), name
        assert waiting == [name.split()[0]]
    waiting.clear()
    assert_equal(hvd.synchronize(hvd.allreduce_async(torch.ones(3))), torch.ones(3))
    assert waiting == []


def test_a_call_that_fails_while_it_waits_gives_back_its_name_and_its_tensors(rank, size):
    before = set(handles._in_flight)
    for _ in range(3):
        tensor = torch.ones(2 + rank)  # of another shape on each rank
        if size > 1:
            with pytest.raises(hvd.HorovodInternalError, match="shape"):
                hvd.allreduce_(tensor, name="x")
        else:
            hvd.allreduce_(tensor, name="x")
    assert set(handles._in_flight) <= before
    assert_library_works()


def test_a_handle_that_is_dropped_harms_nobody(rank, size):
    for i in range(20):
        hvd.allreduce_async(torch.full((5000,), float(i)), op=hvd.Sum)
    assert_library_works()


def test_several_threads_may_wait(size):
    from concurrent.futures import ThreadPoolExecutor

    handles = [hvd.allreduce_async(torch.full((100,), float(i)), op=hvd.Sum) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(hvd.synchronize, handles))
    for i, result in enumerate(results):
        assert_equal(result, torch.full((100,), float(i * size)))


@pytest.mark.min_ranks(2)
def test_tensors_outlive_ctrl_c_right_behind_the_submission(rank, size, ranks, monkeypatch):
    # The engine gives the wait back to Python, and the signal comes before anything else is done.
    tensor = torch.full((1000,), rank + 1.0)
    seen = weakref.ref(tensor)
    if rank == 0:
        run = handles._run

        def interrupted(*arguments, **options):
            run(*arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(handles, "_run", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            hvd.allreduce_(tensor, name="x", op=hvd.Sum)
        monkeypatch.setattr(handles, "_run", run)
        del tensor
        gc.collect()
        assert seen() is not None
        ranks.gather(None)
    else:
        ranks.gather(None)
        hvd.allreduce_(tensor, name="x", op=hvd.Sum)
    hvd.allreduce_(torch.ones(3))  # behind the other
    assert_equal(seen(), torch.full((1000,), size * (size + 1) / 2))
