"""How calls on CUDA tensors are agreed and enqueued, over a plugin that needs no GPU.

The oracle is the plugin's count of its own calls: what was made, prepared, launched and aborted, on
which rank; and the text of errors, which is to name every rank's call.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adareduce import _core
from device_ranks import DeviceRank, Gpus, run_with_gpus
from thread_ranks import run_ranks, settings

MAX_LAUNCHED = 1024  # csrc/engine/settings.h
AT_HAND = {"name": "x"}  # the call that `known` makes known


@pytest.fixture
def gpus() -> Gpus:
    return Gpus()


def known(rank: DeviceRank) -> None:
    """Two calls that all ranks have agreed on, and their plans."""
    rank.launch(**AT_HAND).wait()
    rank.launch(op="adasum").wait()
    rank.on_cpu.barrier()


def error_of(call: Callable[[], Any], kind: type[Exception] = _core.TransportError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


# ---- calls that agree ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_the_first_call_makes_the_group_and_a_plan_on_all_ranks(size: int, gpus: Gpus) -> None:
    for device in range(size):
        gpus.of(device).num_exchanges = 4

    def body(rank: DeviceRank) -> None:
        mine = np.arange(7, dtype=np.float64) + rank.rank
        output = np.zeros(7)
        handle = rank.launch("allreduce", [mine], outputs=[output])
        assert (rank.gpu.created, rank.gpu.prepared, rank.gpu.launched) == (1, 1, 1)
        assert np.array_equal(output, mine)
        assert handle.handle.stream() == rank.engine.cuda_stream(0) == 1000 + rank.rank
        handle.wait()
        assert rank.gpu.ordered == 1

    run_with_gpus(size, gpus, body)
    assert [gpus.of(device).destroyed for device in range(size)] == [1] * size
    assert [gpus.of(device).aborted for device in range(size)] == [0] * size


def test_a_known_call_is_launched_although_no_other_rank_has_made_it(gpus: Gpus) -> None:
    is_launched = threading.Event()

    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 1:
            rank.on_cpu.wait_until(is_launched)
        for turn in range(20):
            rank.launch(name=f"of turn {turn}", prescale=2.0**turn).wait()
        is_launched.set()
        assert rank.gpu.launched == 22
        assert rank.gpu.prepared == 2  # names and factors need no plan of their own

    run_with_gpus(2, gpus, body)
    assert gpus.of(0).released == gpus.of(1).released == 22


@dataclass
class Variant:
    """A call with a key of its own."""

    arrays: list[np.ndarray] = field(default_factory=lambda: [np.ones((2, 6), np.float32)])
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "collective": Variant(options={"collective": "broadcast"}),
    "root": Variant(options={"collective": "broadcast", "root": 1}),
    "op": Variant(options={"op": "adasum"}),
    "dtype": Variant([np.ones((2, 6), np.float64)]),
    "numel": Variant([np.ones((2, 7), np.float32)]),
    "rows": Variant([np.ones((3, 4), np.float32)]),
    "number of tensors": Variant([np.ones((2, 6), np.float32)] * 2),
    "statistics": Variant([np.ones((2, 6), np.float32)] * 2, {"groups": [0, 0]}),
    "groups": Variant([np.ones((2, 6), np.float32)] * 2, {"groups": [0, 1]}),
    "local squares": Variant(
        [np.ones((2, 6), np.float32)] * 2,
        {"groups": [0, 1], "local_squares": np.ones(2).ctypes.data},
    ),
}


def test_every_kind_of_call_has_a_plan_of_its_own_and_only_one(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        for _ in range(3):
            rank.launch(arrays=Variant().arrays).wait()
            for variant in VARIANTS.values():
                rank.launch(arrays=variant.arrays, **variant.options).wait()
        assert rank.gpu.prepared == 1 + len(VARIANTS)
        assert rank.gpu.launched == 3 * (1 + len(VARIANTS))

    run_with_gpus(2, gpus, body)


def test_calls_without_tensors_or_elements_are_calls(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        for _ in range(2):
            rank.launch(arrays=[]).wait()
            rank.launch(arrays=[np.ones(0, np.float32), np.ones((3, 0, 2), np.float64)]).wait()
        assert (rank.gpu.prepared, rank.gpu.launched) == (2, 4)

    run_with_gpus(3, gpus, body)


def test_pointers_of_statistics_reach_the_launch(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        stats, orthogonality, cancellation = np.zeros(4), np.zeros(2), np.zeros(2)
        nonfinite, squares = np.full(2, -1), np.array([6.25])
        for expected in (-1.0, 6.25):
            rank.launch(
                arrays=[np.ones(3, np.float32)] * 2,
                groups=[0, 0],
                prescale=0.5,
                postscale=0.25,
                local_squares=squares.ctypes.data if expected > 0 else 0,
                group_stats=stats.ctypes.data,
                orthogonality=orthogonality.ctypes.data,
                cancellation=cancellation.ctypes.data,
                nonfinite=nonfinite.ctypes.data,
            ).wait()
            assert stats[0] == expected
        assert (orthogonality[0], cancellation[0], list(nonfinite)) == (0.5, 0.25, [0, 1])

    run_with_gpus(2, gpus, body)


def test_rows_may_differ_between_ranks_and_are_known_to_the_plan(gpus: Gpus) -> None:
    rows = [2, 0, 3]

    def body(rank: DeviceRank) -> None:
        mine = np.ones((rows[rank.rank], 4), np.float32)
        for _ in range(2):
            all_rows = np.zeros((5, 4), np.float32)
            rank.launch("allgather", [mine], outputs=[all_rows], rows=rows).wait()
        table = [[1, 0, 1], [0, 0, 0], [0, 3, 0]]
        incoming = np.zeros((sum(row[rank.rank] for row in table), 4), np.float32)
        flat = [number for row in table for number in row]
        rank.launch("alltoall", [mine], outputs=[incoming], rows=flat).wait()
        assert (rank.gpu.last_rows, rank.gpu.last_row_numel) == (rows[rank.rank], 4)
        assert rank.gpu.last_numel == 4 * rows[rank.rank]
        # Empty here, but rows of another length elsewhere: known on all ranks or on none.
        mine, all_rows = np.ones((rows[rank.rank], 6), np.float32), np.zeros((5, 6), np.float32)
        rank.launch("allgather", [mine], outputs=[all_rows], rows=rows).wait()
        assert rank.gpu.prepared == 3
        assert rank.gpu.launches == b"ggtg"

    run_with_gpus(3, gpus, body)


def test_calls_on_both_devices_may_alternate(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        for turn in range(30):
            early = rank.launch(name=f"gpu {turn}")
            total = rank.on_cpu.allreduce(np.full(4, rank.rank + 1.0, np.float32))
            assert (total == 6.0).all()
            early.wait()
        assert (rank.gpu.launched, rank.gpu.prepared) == (30, 1)

    run_with_gpus(3, gpus, body)


def test_every_process_set_has_a_group_of_its_own(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        pair = rank.engine.add_process_set([0, 2])
        known(rank)
        if rank.rank != 1:
            assert rank.engine.cuda_stream(pair) == 0
            for _ in range(3):
                rank.launch(process_set=pair).wait()
        assert rank.gpu.created == (1 if rank.rank == 1 else 2)
        rank.on_cpu.barrier()
        # A set that breaks leaves the other one alone.
        if rank.rank == 0:
            rank.launch(process_set=pair)
        if rank.rank == 2:
            error_of(lambda: rank.on_cpu.broadcast(np.ones(3), 0, process_set=pair))
        if rank.rank == 0:
            rank.breakage()
        rank.launch().wait()
        rank.on_cpu.barrier()
        assert rank.gpu.aborted == (0 if rank.rank == 1 else 1)

    run_with_gpus(3, gpus, body)


def test_the_path_is_chosen_once_together_and_then_looked_up(gpus: Gpus) -> None:
    has_looked = threading.Event()

    def body(rank: DeviceRank) -> None:
        assert rank.engine.cuda_stream(0) == 0
        assert rank.engine.cuda_path(0, rank.rank) == (2, "memory of one process")
        assert (rank.gpu.created, rank.gpu.last_path) == (1, 2)
        if rank.rank == 1:
            rank.on_cpu.wait_until(has_looked)
        assert rank.engine.cuda_path(0, rank.rank)[0] == 2
        has_looked.set()
        rank.launch().wait()
        assert rank.gpu.created == 1

    run_with_gpus(2, gpus, body, wanted_path=lambda rank: 2)


def test_threads_of_one_rank_take_turns_in_the_plugin(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        errors: list[str] = []

        def call(number: int) -> None:
            try:
                for turn in range(100):
                    handle = rank.launch(name=f"{number}.{turn}", op=("sum", "max")[turn % 2])
                    handle.wait()
                    assert handle.is_finished()
            except BaseException as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert (rank.gpu.launched, rank.gpu.prepared, rank.gpu.overlaps) == (400, 2, 0)

    run_with_gpus(1, gpus, body)


# ---- disagreements -------------------------------------------------------------------------------


ODD: dict[str, tuple[Callable[[DeviceRank], Any], list[str]]] = {
    "another known call": (
        lambda rank: rank.launch(op="adasum"),
        ["op (", "Sum", "Adasum", "called allreduce(name='x', dtype=float32, device=cuda, op=Sum"],
    ),
    "another name": (
        lambda rank: rank.launch(name="y"),
        ["name (", "'x'", "'y'", "called allreduce(name='y'"],
    ),
    "another factor": (
        lambda rank: rank.launch(prescale=0.5),
        ["prescale_factor (", "0.5", "prescale_factor=0.5, shape=(5,))"],
    ),
    "a call on the CPU": (
        lambda rank: rank.on_cpu.allreduce(np.ones(5, np.float32)),
        ["device (", "cuda", "cpu", "called allreduce(name='x', dtype=float32, op=Sum"],
    ),
    "a new call": (
        lambda rank: rank.launch(op="max"),
        ["op (", "Sum", "Max", "called allreduce(name='x', dtype=float32, device=cuda, op=Max"],
    ),
    "a captured call": (
        lambda rank: rank.launch(op="adasum", is_capturing=True),
        ["op (", "Sum", "Adasum"],
    ),
    "a rejected call": (
        lambda rank: rank.on_cpu.reject("no such tensor"),
        ["rejected its own call: no such tensor"],
    ),
}


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", ODD)
def test_a_disagreement_with_a_launched_call_breaks_all_ranks(
    kind: str, size: int, gpus: Gpus
) -> None:
    odd_call, words = ODD[kind]
    odd = size - 1

    def body(rank: DeviceRank) -> str:
        known(rank)
        early = rank.launch(**AT_HAND) if rank.rank != odd else None
        if rank.rank == odd:
            # Those who wait for the others hear of it at once, those who launch at the next call.
            with contextlib.suppress(_core.TransportError):
                odd_call(rank)
        text = rank.breakage()
        for word in words:
            assert word in text
        assert f"rank {odd}" in text
        if early is not None:
            assert early.is_finished()
            assert text in error_of(early.wait)
        for call in (rank.launch, lambda: rank.on_cpu.allreduce(np.ones(3))):
            assert "cannot be used any more" in error_of(call)
        assert rank.gpu.aborted == 1
        # A peer's report may be cut off, the cause stands at its beginning.
        assert rank.gpu.abort_text.decode().startswith(text)
        return text

    texts = run_with_gpus(size, gpus, body)
    assert all("cannot be finished" in text or "reports:" in text for text in texts)


def test_a_rank_that_leaves_breaks_those_who_have_launched(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 2:
            rank.on_cpu.leave("ZeroDivisionError: division by zero", is_orderly=False)
        else:
            early = rank.launch()
            text = rank.breakage()
            assert "rank 2 has left: ZeroDivisionError: division by zero" in text
            assert text in error_of(early.wait)
            assert rank.gpu.aborted == 1

    run_with_gpus(3, gpus, body)


def test_calls_launched_behind_one_that_a_rank_has_left_break_the_set(gpus: Gpus) -> None:
    has_launched = threading.Event()

    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 1:
            rank.on_cpu.wait_until(has_launched)
            rank.on_cpu.leave("its work is done")
            return
        waiting = rank.on_cpu.submit("allreduce", [np.ones(3)])  # harmless by itself
        early = rank.launch()
        has_launched.set()
        assert "rank 1 has left: its work is done" in error_of(waiting.wait)
        assert "rank 1 has left: its work is done" in rank.breakage()
        error_of(early.wait)

    run_with_gpus(2, gpus, body)


NEW: dict[str, Callable[[DeviceRank], Any]] = {
    "another new call": lambda rank: rank.launch(op="max"),
    "a call on the CPU": lambda rank: rank.on_cpu.allreduce(np.ones(5, np.float32)),
    "another captured call": lambda rank: rank.launch(op="adasum", is_capturing=True),
}


@pytest.mark.parametrize(
    ("kind", "has_group"),
    # Nothing can be captured before there is a group.
    [(kind, has) for kind in NEW for has in (False, True) if has or "captured" not in kind],
)
def test_a_disagreement_on_new_calls_harms_nothing(kind: str, has_group: bool, gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        if has_group:
            known(rank)
        before = rank.gpu.launched
        call = NEW[kind] if rank.rank == 2 else lambda rank: rank.launch(op="min")
        text = error_of(lambda: call(rank), _core.DisagreementError)
        assert "op=Min" in text
        assert "ranks 0 and 1 called" in text
        assert (rank.gpu.launched, rank.gpu.aborted) == (before, 0)
        assert rank.gpu.created == (1 if has_group else 0)
        # The call that failed is not known.
        for _ in range(2):
            rank.launch(op="min").wait()
        rank.on_cpu.barrier()
        assert rank.gpu.launched == before + 2

    run_with_gpus(3, gpus, body)
    assert gpus.of(0).prepared == (3 if has_group else 1)


def test_a_captured_call_is_agreed_before_it_is_launched(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        # Known or not, nothing has been launched when they turn out to differ.
        text = error_of(
            lambda: rank.launch(op=("sum", "adasum")[rank.rank], is_capturing=True),
            _core.DisagreementError,
        )
        assert "op (rank 0: Sum; rank 1: Adasum)" in text
        rank.launch(is_capturing=True).wait()
        rank.launch(op="min", is_capturing=True).wait()
        rank.launch(op="min", is_capturing=rank.rank == 0).wait()
        rank.on_cpu.barrier()
        assert (rank.gpu.launched, rank.gpu.prepared, rank.gpu.aborted) == (5, 3, 0)

    run_with_gpus(2, gpus, body)


def test_a_set_without_a_group_refuses_to_be_captured_on_all_ranks(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        if rank.rank == 0:
            with pytest.raises(ValueError, match="call it once before capturing"):
                rank.launch_or_reject(is_capturing=True)
        else:
            text = error_of(rank.launch, _core.DisagreementError)
            assert "rank 0 rejected its own call: allreduce: the first call" in text
        rank.launch().wait()
        assert rank.gpu.created == 1

    run_with_gpus(3, gpus, body)


def test_the_wanted_path_must_be_that_of_all_ranks(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        text = error_of(lambda: rank.engine.cuda_path(0, rank.rank), _core.DisagreementError)
        assert "wanted CUDA path (ranks 0 and 1: nccl; rank 2: peer)" in text
        assert rank.gpu.created == 0

    run_with_gpus(3, gpus, body, wanted_path=lambda rank: 2 if rank == 2 else 1)


# ---- mistakes of one rank ------------------------------------------------------------------------


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": 7}, "device must be cuda:0, that of earlier calls"),
    "dtype": ({"arrays": [np.ones(3, np.int32)], "op": "adasum"}, "dtype must be one that Adasum"),
    "root": ({"collective": "broadcast", "root": 2}, "root_rank must be a rank"),
    "group": ({"groups": [3]}, "the group of tensor 0 must be in [0, 1), got 3"),
    "process set": ({"process_set": 4}, "process_set must be in [0, 1), got 4"),
    "no rows": ({"collective": "allgather"}, "rows must have 2 entries for 2 ranks, got 0"),
    "too many rows": ({"rows": [1]}, "rows must have 0 entries for 2 ranks, got 1"),
    "other rows": (
        {"collective": "allgather", "rows": [4, 5]},
        "tensor 0 must have as many rows as are announced, 4, got 5",
    ),
    "negative rows": (
        {"collective": "alltoall", "rows": [6, -1, 5, 0]},
        "rows must not be negative, got -1",
    ),
    "local squares of nothing": (
        {"local_squares": np.ones(1).ctypes.data},
        "local_squares must be given with statistics",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_launched(kind: str, gpus: Gpus) -> None:
    options, words = MISTAKES[kind]

    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 0:
            with pytest.raises(ValueError, match=re.escape(words)):
                rank.launch(**options)
        rank.launch().wait()
        rank.on_cpu.barrier()
        assert (rank.gpu.launched, rank.gpu.aborted) == (3, 0)

    run_with_gpus(2, gpus, body)


def test_memory_for_results_made_of_rows_must_be_there(gpus: Gpus) -> None:
    nowhere = SimpleNamespace(ctypes=SimpleNamespace(data=0))

    def body(rank: DeviceRank) -> None:
        for collective, rows in (("allgather", [5]), ("alltoall", [5]), ("reducescatter", [])):
            with pytest.raises(ValueError, match="the result of tensor 0 has elements but no mem"):
                rank.launch(collective, [np.ones((5, 2))], outputs=[nowhere], rows=rows)

    run_with_gpus(1, gpus, body)


def test_only_one_plugin_of_this_build_can_be_attached(gpus: Gpus) -> None:
    def body(rank: Any) -> None:
        with pytest.raises(ValueError, match="attach_cuda was not called"):
            rank.engine.cuda_path(0, 0)
        table = (ctypes.c_uint32 * 64).from_buffer_copy(
            ctypes.string_at(ctypes.addressof(gpus.table()), 256)
        )
        size = table[1]
        for index, wrong in ((0, 99), (1, size - 8)):
            right, table[index] = table[index], wrong
            with pytest.raises(ValueError, match=f"got .*{wrong}.*: it is of another build"):
                rank.engine.attach_cuda(gpus.capsule(table), 0)
            table[index] = right
        with pytest.raises(ValueError, match=r"must be a capsule named 'adareduce\.cuda_plugin'"):
            rank.engine.attach_cuda(gpus.capsule(name=b"another"), 0)
        with pytest.raises(ValueError, match="wanted_path must be"):
            rank.engine.attach_cuda(gpus.capsule(), 5)
        rank.engine.attach_cuda(gpus.capsule(), 0)
        with pytest.raises(ValueError, match="once per engine"):
            rank.engine.attach_cuda(gpus.capsule(), 0)

    run_ranks(1, body)


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("what", ["group", "plan"])
def test_a_group_or_plan_that_one_rank_cannot_make_raises_on_all(
    what: str, size: int, gpus: Gpus
) -> None:
    culprit = gpus.of(size - 1)
    if what == "group":
        culprit.refuse_create = 1
    else:
        culprit.refuse_prepare = 1

    def body(rank: DeviceRank) -> None:
        call = "allreduce(name='x', dtype=float32, device=cuda, op=Sum, shape=(5,))"
        with pytest.raises(_core.HorovodInternalError) as caught:
            rank.launch()
        # The first rank to hear of it breaks the set, and may be quicker than the plugin's answer.
        assert f"no memory for a {what} on GPU {size - 1}" in str(caught.value)
        assert str(caught.value).startswith(call)
        assert rank.gpu.launched == 0
        assert f"no memory for a {what}" in rank.breakage()
        assert "cannot be used any more" in error_of(rank.launch)

    run_with_gpus(size, gpus, body)


def test_a_launch_that_fails_on_one_rank_breaks_all(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 0:
            rank.gpu.refuse_launch = 1
            text = error_of(rank.launch, _core.DeviceError)
            assert text == "allreduce(name='x', device=cuda): an illegal address on GPU 0"
        else:
            rank.launch()
        assert "an illegal address on GPU 0" in rank.breakage()
        error_of(rank.launch)

    run_with_gpus(3, gpus, body)
    assert [gpus.of(device).aborted for device in range(3)] == [1] * 3


def test_an_error_on_the_device_is_found_while_nobody_calls(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        early = rank.launch()
        if rank.rank == 1:
            rank.gpu.refuse_check = 1
        text = rank.breakage()
        assert "the global process set: an asynchronous error on GPU 1" in text
        assert text in error_of(early.wait)

    run_with_gpus(2, gpus, body)
    assert [gpus.of(device).aborted for device in range(2)] == [1] * 2


def test_an_error_on_the_device_is_found_while_the_worker_is_busy(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 1:
            assert "an asynchronous error on GPU 0" in rank.breakage()
            return
        waiting = rank.on_cpu.submit("allreduce", [np.ones(3)])
        rank.gpu.refuse_check = 1
        assert "an asynchronous error on GPU 0" in error_of(waiting.wait)

    run_with_gpus(2, gpus, body)


def test_a_handle_tells_what_its_stream_refuses(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        handle = rank.launch()
        rank.gpu.refuse_order = 1
        assert error_of(handle.wait, _core.DeviceError).endswith(": a bad stream on GPU 0")

    run_with_gpus(1, gpus, body)


def test_a_caller_may_run_ahead_of_the_others_only_so_far(gpus: Gpus) -> None:
    is_over = threading.Event()

    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 1:
            rank.on_cpu.wait_until(is_over)
            return
        # It waits for the oldest, until the deadline of the comparison has passed.
        for _ in range(MAX_LAUNCHED):
            rank.launch()
        error_of(rank.launch)
        assert rank.gpu.launched == 2 + MAX_LAUNCHED
        text = rank.breakage()
        assert "gave up after 2 s: rank 1 is alive and has not made this call" in text
        assert "its last one was barrier()" in text
        is_over.set()

    run_with_gpus(2, gpus, body, settings(fail_after=2.0))
    assert gpus.of(0).aborted == 1


def test_a_caller_that_ran_ahead_goes_on_when_the_others_come(gpus: Gpus) -> None:
    is_ahead = threading.Event()

    def body(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 1:
            rank.on_cpu.wait_until(is_ahead)
        for turn in range(3 * MAX_LAUNCHED):
            rank.launch(name=str(turn))
            if turn == MAX_LAUNCHED - 1:
                is_ahead.set()
        assert rank.gpu.launched == 2 + 3 * MAX_LAUNCHED

    run_with_gpus(2, gpus, body)


# ---- the end -------------------------------------------------------------------------------------


def test_a_rank_leaves_when_its_gpu_has_come_to_rest(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        rank.gpu.is_unfinished = 1
        handle = rank.launch()
        assert not handle.is_finished()

        def finish() -> None:
            assert rank.gpu.destroyed == 0
            rank.gpu.is_unfinished = 0

        timer = threading.Timer(0.05, finish)
        timer.start()
        rank.on_cpu.leave("its work is done")
        assert rank.gpu.is_unfinished == 0
        rank.on_cpu.stop()
        timer.join()
        assert (rank.gpu.destroyed, rank.gpu.released, rank.gpu.aborted) == (1, 3, 0)
        # Handles may live on: there is nothing left to wait for.
        assert handle.is_finished()
        handle.wait()
        assert rank.gpu.ordered == 2
        assert handle.handle.stream() == 0

    run_with_gpus(2, gpus, body)


def test_a_gpu_that_never_comes_to_rest_is_given_up(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        rank.gpu.is_unfinished = 1
        handle = rank.launch()
        rank.on_cpu.leave("its work is done")
        assert "the GPU has not finished what was launched within 1 s" in rank.breakage()
        assert handle.is_finished()
        error_of(handle.wait)
        rank.on_cpu.stop()
        assert (rank.gpu.destroyed, rank.gpu.aborted) == (1, 1)

    run_with_gpus(1, gpus, body, settings(fail_after=1.0))


def test_an_engine_destroyed_before_it_left_aborts_its_gpu(gpus: Gpus) -> None:
    def body(rank: DeviceRank) -> None:
        known(rank)
        rank.gpu.is_unfinished = 1
        if rank.rank == 0:
            handle = rank.launch()
            rank.on_cpu.stop()
            error_of(handle.wait)
        else:
            assert "the engine was destroyed before shutdown()" in rank.breakage()
            error_of(rank.launch)

    run_with_gpus(2, gpus, body)
    assert [gpus.of(device).aborted for device in range(2)] == [1, 1]
    assert [gpus.of(device).destroyed for device in range(2)] == [1, 1]


def test_a_broken_job_can_be_followed_by_a_new_one(gpus: Gpus) -> None:
    def broken(rank: DeviceRank) -> None:
        known(rank)
        if rank.rank == 0:
            rank.launch()
        else:
            rank.on_cpu.reject("a mistake")
        rank.breakage()

    for _ in range(2):
        run_with_gpus(2, gpus, broken)
        run_with_gpus(2, gpus, known)
    assert (gpus.of(0).created, gpus.of(0).destroyed, gpus.of(0).aborted) == (4, 4, 2)


def test_a_group_that_is_never_made_ends_the_process_when_its_set_breaks(gpus: Gpus) -> None:
    gpus.of(0).block_create = 1
    fatal: list[str] = []

    def wait_for_fatal(rank: DeviceRank) -> None:
        try:
            while not fatal:
                level, text = rank.engine.next_event(0.2) or ("", "")
                fatal.extend([text] if level == "FATAL" else [])
                rank.on_cpu.job.check_time()
        finally:
            rank.gpu.block_create = 0  # nothing else could end it

    def body(rank: DeviceRank) -> None:
        reader = threading.Thread(target=wait_for_fatal, args=(rank,))
        if rank.rank == 0:
            reader.start()
        # Rank 1 waits in an exchange for rank 0, which is lost in create_group.
        assert "gave up after 2 s" in error_of(rank.launch)
        if rank.rank == 0:
            reader.join()
        assert rank.gpu.launched == 0

    run_with_gpus(2, gpus, body, settings(fail_after=2.0))
    assert "gave up after 2 s" in fatal[0]
    assert "A thread of this rank is in create_group on CUDA, which cannot be aborted" in fatal[0]


def test_a_group_that_takes_too_long_breaks_the_set(gpus: Gpus) -> None:
    gpus.of(0).block_create = 1

    def body(rank: DeviceRank) -> None:
        def release() -> None:
            text = rank.breakage()
            assert "create_group on CUDA: gave up after 1 s: not all ranks have come" in text
            rank.gpu.block_create = 0

        thread = threading.Thread(target=release)
        thread.start()
        assert "gave up after 1 s" in error_of(rank.launch)
        thread.join()
        assert rank.gpu.launched == 0

    run_with_gpus(1, gpus, body, settings(fail_after=1.0))
    assert (gpus.of(0).created, gpus.of(0).aborted, gpus.of(0).destroyed) == (1, 1, 1)


def test_a_fatal_event_ends_the_process_with_its_text() -> None:
    program = """
import time
from adareduce import logs

class Engine:
    events = [("WARNING", "before"), ("FATAL", "stuck for good"), ("WARNING", "after")]
    def next_event(self, seconds):
        return self.events.pop(0)
    def is_log_closed(self):
        return False

logs.set_up(3, 4, 0)
print("printed before", end="")
logs.EventThread(Engine())
while True:
    time.sleep(1)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "WARNING: before" in done.stderr
    assert "rank 3 of 4" in done.stderr
    assert "CRITICAL: stuck for good" in done.stderr
    assert "after" not in done.stderr
    assert done.stdout == "printed before"


def test_ctrl_c_ends_a_wait_and_breaks_the_set(gpus: Gpus) -> None:
    # Rank 0 is the main thread, which is the one that hears of Ctrl-C.
    gpus.of(1).block_create = 1
    world = _core.ThreadWorld(2)
    errors: list[str] = []

    def other() -> None:
        engine = _core.Engine.over_threads(world, 1, settings())
        engine.attach_cuda(gpus.capsule(), 0)
        try:
            engine.cuda_path(0, 1)
        except _core.TransportError as error:
            errors.append(str(error))
        engine.stop()

    def interrupt() -> None:
        # Both have agreed when one is here, and rank 0 can only be waiting for the exchange.
        while not gpus.of(1).is_blocked:
            pass
        _thread.interrupt_main()

    threads = [threading.Thread(target=body) for body in (other, interrupt)]
    for thread in threads:
        thread.start()
    engine = _core.Engine.over_threads(world, 0, settings())
    engine.attach_cuda(gpus.capsule(), 0)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.cuda_path(0, 0)
    finally:
        gpus.of(1).block_create = 0
        for thread in threads:
            thread.join()
    assert "cuda_path(): interrupted" in errors[0]
    assert "cuda_path(): interrupted" in engine.breakage()
    engine.stop()
