"""Ranks that do not want the same, come late, leave or never come; ranks are threads.

Oracle: the parts that a message must have (tensor, both signatures, ranks on each side), untouched
outputs, and exact sums of a later all-reduce.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adareduce import _core
from thread_ranks import (
    HANG_LIMIT,
    STORAGE,
    Pending,
    ThreadRank,
    over_messages,
    run_ranks,
    settings,
)

UNTOUCHED = 77


@dataclass(frozen=True)
class Call:
    """One request in words, and how an error message must write it."""

    text: str
    collective: str = "allreduce"
    shapes: tuple[tuple[int, ...], ...] = ((5,),)
    dtype: str | tuple[str, ...] = "float32"
    name: str = "grad/fc.bias"
    options: dict[str, Any] = field(default_factory=dict)

    def submit(self, rank: ThreadRank) -> tuple[Pending, list[NDArray]]:
        dtypes = [self.dtype] * len(self.shapes) if isinstance(self.dtype, str) else self.dtype
        tensors = list(zip(self.shapes, dtypes, strict=True))
        inputs = [np.ones(shape, STORAGE[dtype]) for shape, dtype in tensors]
        outputs = [np.full(shape, UNTOUCHED, STORAGE[dtype]) for shape, dtype in tensors]
        pending = rank.submit(
            self.collective,
            inputs,
            outputs=outputs,
            name=self.name,
            dtype=dtypes,
            **self.options,
        )
        return pending, outputs


def assert_all_is_well(rank: ThreadRank) -> None:
    numel = 40
    mine = np.arange(numel, dtype=np.float32) * (rank.rank + 1)
    total = np.arange(numel) * sum(range(1, rank.size + 1))
    assert np.array_equal(rank.allreduce(mine, name="afterwards"), total)
    assert rank.engine.breakage() == ""


def error_of(pending: Pending) -> str:
    """The text of the DisagreementError that a request ends with."""
    with pytest.raises(_core.DisagreementError) as caught:
        pending.wait()
    return str(caught.value)


SUM = Call("allreduce(name='grad/fc.bias', dtype=float32, op=Sum, shape=(5,))")
TWO = replace(
    SUM,
    text="allreduce(name='grad/fc.bias', dtype=float32, op=Sum, 2 tensors of shapes (5,), (2, 3))",
    shapes=((5,), (2, 3)),
)
BROADCAST = Call(
    "broadcast(name='grad/fc.bias', dtype=float32, root_rank=0, shape=(5,))",
    "broadcast",
    options={"root": 0},
)
ALLGATHER = Call(
    "allgather(name='grad/fc.bias', dtype=float32, shape=(*, 3))", "allgather", ((4, 3),)
)

# What the ranks disagree on: its name in the message, and both calls with their values of it.
DISAGREEMENTS: dict[str, tuple[str, Call, str, Call, str]] = {
    "shape": (
        "shape",
        SUM,
        "(5,)",
        Call(
            "allreduce(name='grad/fc.bias', dtype=float32, op=Sum, shape=(5, 1))", shapes=((5, 1),)
        ),
        "(5, 1)",
    ),
    "empty shape": (
        "shape",
        SUM,
        "(5,)",
        Call("allreduce(name='grad/fc.bias', dtype=float32, op=Sum, shape=(0,))", shapes=((0,),)),
        "(0,)",
    ),
    "dtype": (
        "dtype",
        SUM,
        "float32",
        Call("allreduce(name='grad/fc.bias', dtype=float64, op=Sum, shape=(5,))", dtype="float64"),
        "float64",
    ),
    "order of dtypes": (
        "dtype",
        replace(
            TWO,
            text=TWO.text.replace("=float32", "=(float32, float64)"),
            dtype=("float32", "float64"),
        ),
        "(float32, float64)",
        replace(
            TWO,
            text=TWO.text.replace("=float32", "=(float64, float32)"),
            dtype=("float64", "float32"),
        ),
        "(float64, float32)",
    ),
    "op": (
        "op",
        SUM,
        "Sum",
        Call(
            "allreduce(name='grad/fc.bias', dtype=float32, op=Adasum, shape=(5,))",
            options={"op": "adasum"},
        ),
        "Adasum",
    ),
    "average": (
        "op",
        SUM,
        "Sum",
        Call(
            "allreduce(name='grad/fc.bias', dtype=float32, op=Average, shape=(5,))",
            options={"op": "average"},
        ),
        "Average",
    ),
    "collective": ("collective", SUM, "allreduce", BROADCAST, "broadcast"),
    "another collective": ("collective", SUM, "allreduce", ALLGATHER, "allgather"),
    "root": (
        "root_rank",
        BROADCAST,
        "0",
        replace(BROADCAST, text=BROADCAST.text.replace("rank=0", "rank=2"), options={"root": 2}),
        "2",
    ),
    "name": (
        "name",
        SUM,
        "'grad/fc.bias'",
        replace(SUM, text=SUM.text.replace("bias", "weight"), name="grad/fc.weight"),
        "'grad/fc.weight'",
    ),
    "prescale": (
        "prescale_factor",
        SUM,
        "1",
        Call(
            "allreduce(name='grad/fc.bias', dtype=float32, op=Sum, "
            "prescale_factor=0.1, shape=(5,))",
            options={"prescale": 0.1},
        ),
        "0.1",
    ),
    "postscale": (
        "postscale_factor",
        SUM,
        "1",
        Call(
            "allreduce(name='grad/fc.bias', dtype=float32, op=Sum, "
            "postscale_factor=1.0000000000000002, shape=(5,))",
            options={"postscale": 1 + 2.0**-52},
        ),
        "1.0000000000000002",
    ),
    "second tensor": (
        "shape of tensor 1",
        TWO,
        "(2, 3)",
        replace(TWO, text=TWO.text.replace("(2, 3)", "(3, 2)"), shapes=((5,), (3, 2))),
        "(3, 2)",
    ),
    "number of tensors": (
        "number of tensors",
        TWO,
        "2",
        replace(
            TWO,
            text=TWO.text.replace("2 tensors", "3 tensors").replace("(2, 3)", "(2, 3), (1,)"),
            shapes=((5,), (2, 3), (1,)),
        ),
        "3",
    ),
    "rows of another length": (
        "shape",
        ALLGATHER,
        "(*, 3)",
        replace(ALLGATHER, text=ALLGATHER.text.replace("3)", "4)"), shapes=((4, 4),)),
        "(*, 4)",
    ),
}


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_a_disagreement_raises_everywhere_and_harms_nothing(kind: str, odd: int) -> None:
    size = 3
    what, common, common_value, other, other_value = DISAGREEMENTS[kind]
    others = [rank for rank in range(size) if rank != odd]
    many = f"ranks {others[0]} and {others[1]}"
    one = f"rank {odd}"
    sides = [f"{many}: {common_value}", f"{one}: {other_value}"]
    calls = [f"{many} called {common.text}", f"{one} called {other.text}"]
    if odd == 0:
        sides.reverse()
        calls.reverse()

    def body(rank: ThreadRank) -> str:
        assert_all_is_well(rank)
        mine = other if rank.rank == odd else common
        pending, outputs = mine.submit(rank)
        text = error_of(pending)
        assert text.startswith(f"{mine.text}: the ranks disagree on ")
        assert f"{what} ({'; '.join(sides)})" in text
        assert f"Calls: {'; '.join(calls)}." in text
        for output in outputs:
            assert (output == UNTOUCHED).all()
        assert_all_is_well(rank)
        return text.split(": the ranks disagree", 1)[1]

    texts = run_ranks(size, body)
    assert texts == texts[:1] * size


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_every_rank_of_any_world_hears_of_one_that_differs(size: int) -> None:
    def body(rank: ThreadRank) -> None:
        for odd in range(size):
            name = "theirs" if rank.rank == odd else "ours"
            array, output = np.ones(9, np.float32), np.full(9, UNTOUCHED, np.float32)
            text = error_of(rank.submit("allreduce", [array], outputs=[output], name=name))
            assert f"rank {odd}: 'theirs'" in text
            assert (output == UNTOUCHED).all()
        assert_all_is_well(rank)

    run_ranks(size, body)


def test_every_side_of_a_disagreement_of_many_is_listed() -> None:
    def body(rank: ThreadRank) -> None:
        shape = (3 + rank.rank % 3,)
        text = error_of(rank.submit("allreduce", [np.ones(shape, np.float32)], name="w"))
        sides = "shape (ranks 0 and 3: (3,); ranks 1 and 4: (4,); rank 2: (5,))"
        assert f"the ranks disagree on {sides}." in text
        assert_all_is_well(rank)

    run_ranks(5, body)


def test_only_the_first_differences_are_spelled_out() -> None:
    def body(rank: ThreadRank) -> None:
        count = 6
        shapes = [(3 + rank.rank + i,) for i in range(count)]
        arrays = [np.ones(shape, np.float32) for shape in shapes]
        text = error_of(rank.submit("allreduce", arrays))
        for i in range(3):
            assert f"shape of tensor {i} (rank 0: ({3 + i},); rank 1: ({4 + i},))" in text
        assert " and 3 more." in text
        assert_all_is_well(rank)

    run_ranks(2, body)


def test_calls_in_another_order_raise_once_each() -> None:
    def body(rank: ThreadRank) -> None:
        names = ["first", "second"] if rank.rank != 1 else ["second", "first"]
        outputs = [np.full(5, UNTOUCHED, np.float32) for _ in names]
        pending = [
            rank.submit("allreduce", [np.ones(5, np.float32)], outputs=[output], name=name)
            for name, output in zip(names, outputs, strict=True)
        ]
        assert "name (ranks 0 and 2: 'first'; rank 1: 'second')" in error_of(pending[0])
        assert "name (ranks 0 and 2: 'second'; rank 1: 'first')" in error_of(pending[1])
        assert all((output == UNTOUCHED).all() for output in outputs)
        assert_all_is_well(rank)

    run_ranks(3, body)


def test_calls_without_a_name_are_numbered_alike_on_all_ranks() -> None:
    # Names, rejections and barriers on some ranks must not put the numbers of the others out.
    def body(rank: ThreadRank) -> None:
        array = np.ones(5, np.float32)
        if rank.rank == 1:
            rank.reject("mistake")
        else:
            assert "'allreduce.noname.0'" in error_of(rank.submit("allreduce", [array], name=""))
        rank.barrier()
        rank.allreduce(array, name="mine")
        assert (rank.allreduce(array, name="") == 3.0).all()
        mine = np.ones(5 + rank.rank % 2, np.float32)
        text = error_of(rank.submit("allreduce", [mine], name=""))
        assert text.count("'allreduce.noname.3'") == 3  # of this call and of both sides
        assert " name (" not in text
        assert (rank.broadcast(array, 0, name="") == 1.0).all()
        assert_all_is_well(rank)

    run_ranks(3, body)


def test_shapes_of_equal_size_are_told_apart() -> None:
    def body(rank: ThreadRank) -> None:
        shape = (5, 8) if rank.rank else (8, 5)
        text = error_of(rank.submit("allreduce", [np.ones(shape, np.float32)]))
        assert "shape (rank 0: (8, 5); rank 1: (5, 8))" in text
        assert_all_is_well(rank)

    run_ranks(2, body)


@pytest.mark.parametrize("is_barrier", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_call_that_one_rank_rejects_raises_on_the_others(size: int, is_barrier: bool) -> None:
    culprit = size - 1
    reason = "allreduce: tensor must be contiguous, got strides (1, 512)"

    def body(rank: ThreadRank) -> None:
        output = np.full(5, UNTOUCHED, np.float32)
        if rank.rank == culprit:
            rank.reject(reason, is_barrier=is_barrier)
        elif is_barrier:
            text = error_of(rank.submit("barrier"))
            assert text == f"barrier(): rank {culprit} rejected its own call: {reason}"
        else:
            text = error_of(rank.submit("allreduce", [np.ones(5, np.float32)], outputs=[output]))
            assert text.startswith("allreduce(name='x', dtype=float32, op=Sum, shape=(5,)): ")
            assert text.endswith(f"rank {culprit} rejected its own call: {reason}")
        assert (output == UNTOUCHED).all()
        rank.barrier()
        assert_all_is_well(rank)

    run_ranks(size, body)


def test_all_who_reject_a_call_are_named() -> None:
    def body(rank: ThreadRank) -> None:
        if rank.rank in (0, 2):
            rank.reject(f"mistake of {rank.rank}")
        else:
            text = error_of(rank.submit("allreduce", [np.ones(5, np.float32)]))
            assert "rank 0 rejected its own call: mistake of 0" in text
            assert "rank 2 rejected its own call: mistake of 2" in text
        assert_all_is_well(rank)

    run_ranks(4, body)


@over_messages
def test_a_buffer_that_no_memory_holds_raises_and_harms_nothing() -> None:
    def body(rank: ThreadRank) -> None:
        address = np.ones(1, np.float32).ctypes.data  # never read: the agreement fails first
        handle = rank.engine.submit(
            process_set=0,
            collective=0,
            name="huge",
            op=1,
            root=0,
            prescale=1.0,
            postscale=1.0,
            tensors=[((2**55,), 7, address, address, (), 0)],
        )
        rank.wait_for(handle)
        with pytest.raises(_core.DisagreementError) as caught:
            handle.rethrow()
        for other in range(rank.size):
            assert f"rank {other} could not prepare its call: not enough memory" in str(
                caught.value
            )
        assert_all_is_well(rank)

    run_ranks(3, body)


# ---- order and queues ----------------------------------------------------------------------------


def test_a_barrier_overtakes_requests_that_wait() -> None:
    have_looked = {0: threading.Event(), 2: threading.Event()}

    def body(rank: ThreadRank) -> None:
        if rank.rank == 1:
            rank.barrier()
            for has_looked in have_looked.values():
                rank.wait_until(has_looked)
            assert_all_is_well(rank)
            return
        numel = 40
        mine = np.arange(numel, dtype=np.float32) * (rank.rank + 1)
        early = rank.submit("allreduce", [mine], name="afterwards")
        rank.barrier()
        assert not early.is_finished()
        have_looked[rank.rank].set()
        assert np.array_equal(early.wait()[0], np.arange(numel) * 6)

    run_ranks(3, body)


def test_no_rank_passes_a_barrier_before_the_last_has_come() -> None:
    arrivals: list[int] = []

    def body(rank: ThreadRank) -> None:
        for turn in range(1, 101):
            arrivals.append(rank.rank)
            rank.barrier()
            assert len(arrivals) >= turn * rank.size

    run_ranks(4, body)


def test_requests_queue_up_and_run_in_order() -> None:
    count = 300

    def body(rank: ThreadRank) -> None:
        pending = []
        for i in range(count):
            mine = np.full(1 + i % 50, rank.rank + i, np.float32)
            if i % 3 == 2:
                pending.append(rank.submit("broadcast", [mine], root=i % rank.size, name=str(i)))
            else:
                pending.append(rank.submit("allreduce", [mine], name=str(i)))
        for i, request in enumerate(pending):
            expected = i % rank.size + i if i % 3 == 2 else 3 * i + 3
            [result] = request.wait()
            assert (result == expected).all(), i
            assert all(earlier.is_finished() for earlier in pending[:i])

    run_ranks(3, body)


def test_disagreements_in_a_full_queue_hit_only_their_own_requests() -> None:
    bad = {3, 4, 20, 39}

    def body(rank: ThreadRank) -> None:
        pending = []
        for i in range(40):
            if i in bad and rank.rank == i % 3:
                rank.reject(f"mistake {i}")
                pending.append(None)
            else:
                pending.append(rank.submit("allreduce", [np.full(7, i, np.float32)], name=str(i)))
        for i, request in enumerate(pending):
            if request is None:
                continue
            if i in bad:
                assert f"rank {i % 3} rejected its own call: mistake {i}" in error_of(request)
            else:
                assert (request.wait()[0] == 3 * i).all()

    run_ranks(3, body)


@pytest.mark.parametrize("seed", range(4))
def test_overlapping_process_sets_do_not_lock_each_other_up(seed: int) -> None:
    members = [[0, 1, 2], [0, 1], [1, 2], [0, 2]]
    calls_per_set = 12

    def body(rank: ThreadRank) -> None:
        ids = [0] + [rank.engine.add_process_set(ranks) for ranks in members[1:]]
        assert ids == [0, 1, 2, 3]
        mine = [i for i in ids if rank.rank in members[i]]
        # Every rank shuffles its sets in a way of its own; inside a set the order is common.
        order = np.repeat(mine, calls_per_set)
        np.random.default_rng([seed, rank.rank]).shuffle(order)
        turns: dict[int, int] = dict.fromkeys(mine, 0)
        pending: list[tuple[int, int, Pending]] = []
        for process_set in (int(i) for i in order):
            turn = turns[process_set]
            turns[process_set] += 1
            array = np.full(40, 10.0 * turn + rank.rank, np.float64)
            op = ("sum", "adasum", "average")[turn % 3]
            name = f"{process_set}/{turn}"
            request = rank.submit("allreduce", [array], op=op, name=name, process_set=process_set)
            pending.append((process_set, turn, request))
        for process_set, turn, request in pending:
            ranks = members[process_set]
            total = sum(10.0 * turn + member for member in ranks)
            [result] = request.wait()
            if turn % 3 == 0:
                assert (result == total).all()
            if turn % 3 == 2:
                assert (result == total / len(ranks)).all()
            if turn % 3 == 1:  # parallel vectors: the weighted mean, rounded at most 12 times
                weights = [1 / 4, 1 / 4, 1 / 2] if len(ranks) == 3 else [1 / 2] * 2
                mean = sum(w * (10.0 * turn + r) for w, r in zip(weights, ranks, strict=True))
                assert np.allclose(result, mean, rtol=40 * 2.0**-53, atol=0)
        assert_all_is_well(rank)

    run_ranks(3, body)


def test_synchronous_calls_on_overlapping_sets_give_right_results() -> None:
    members = [[0, 1], [1, 2], [0, 2]]

    def body(rank: ThreadRank) -> None:
        ids = [rank.engine.add_process_set(ranks) for ranks in members]
        for _ in range(20):
            for process_set, ranks in zip(ids, members, strict=True):
                if rank.rank in ranks:
                    mine = np.full(3, 2.0**rank.rank, np.float32)
                    result = rank.allreduce(mine, process_set=process_set)
                    assert (result == sum(2.0**member for member in ranks)).all()
            assert_all_is_well(rank)

    run_ranks(3, body)


def test_messages_of_a_process_set_name_global_ranks() -> None:
    def body(rank: ThreadRank) -> None:
        pair = rank.engine.add_process_set([1, 3])
        if rank.rank in (1, 3):
            array = np.ones(rank.rank, np.float32)
            text = error_of(rank.submit("allreduce", [array], process_set=pair))
            assert "shape (rank 1: (1,); rank 3: (3,))" in text
            # The root is a place in the set.
            mine = np.full(2, rank.rank, np.float32)
            assert (rank.broadcast(mine, 1, process_set=pair) == 3).all()
        else:
            with pytest.raises(ValueError, match=f"{pair} does not contain rank {rank.rank}"):
                rank.barrier(process_set=pair)
        with pytest.raises(ValueError, match=r"process_set must be in \[0, 2\), got 9"):
            rank.barrier(process_set=9)
        assert_all_is_well(rank)

    run_ranks(4, body)


@pytest.mark.parametrize("ranks", [[], [1, 0], [0, 0], [-1, 0], [0, 3]])
def test_process_sets_of_impossible_ranks_are_refused(ranks: list[int]) -> None:
    def body(rank: ThreadRank) -> None:
        with pytest.raises(ValueError, match="add_process_set: ranks must be increasing"):
            rank.engine.add_process_set(ranks)
        assert_all_is_well(rank)

    run_ranks(3, body)


def test_ranks_that_want_different_process_sets_all_hear_of_it() -> None:
    def body(rank: ThreadRank) -> None:
        wanted = [0, 1] if rank.rank != 1 else [1, 2]
        with pytest.raises(_core.DisagreementError) as caught:
            rank.engine.add_process_set(wanted)
        text = str(caught.value)
        assert text.startswith(f"add_process_set(ranks=[{wanted[0]} and {wanted[1]}])")
        assert "ranks (ranks 0 and 2: [0 and 1]; rank 1: [1 and 2])" in text
        assert rank.engine.add_process_set([0, 2]) == 1  # the number has not been used up
        if rank.rank == 1:
            with pytest.raises(_core.DisagreementError) as caught:
                rank.barrier()
        else:
            with pytest.raises(_core.DisagreementError) as caught:
                rank.engine.add_process_set([0, 2])
        assert "collective (ranks 0 and 2: add_process_set; rank 1: barrier)" in str(caught.value)
        assert_all_is_well(rank)

    run_ranks(3, body)


def test_a_process_set_can_be_added_while_requests_wait() -> None:
    def body(rank: ThreadRank) -> None:
        pending = []
        if rank.rank != 2:
            pending.append(rank.submit("allreduce", [np.ones(5, np.float32)], name="early"))
        pair = rank.engine.add_process_set([0, 1])
        if rank.rank != 2:
            mine = np.full(3, rank.rank + 1, np.float32)
            assert (rank.allreduce(mine, process_set=pair) == 3.0).all()
            assert not pending[0].is_finished()
        rank.barrier()
        if rank.rank == 2:
            pending.append(rank.submit("allreduce", [np.ones(5, np.float32)], name="early"))
        assert (pending[0].wait()[0] == 3.0).all()
        assert_all_is_well(rank)

    run_ranks(3, body)


# ---- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_orderly", [True, False])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_calls_without_a_rank_that_has_left_name_it_and_its_reason(
    size: int, is_orderly: bool
) -> None:
    reason = "it raised KeyError: 'lr'"
    all_have_submitted = threading.Barrier(size, timeout=HANG_LIMIT)

    def body(rank: ThreadRank) -> None:
        assert_all_is_well(rank)
        if rank.rank == size - 1:
            all_have_submitted.wait()
            rank.leave(reason, is_orderly=is_orderly)
            assert rank.engine.breakage() == ""
            return
        output = np.full(5, UNTOUCHED, np.float32)
        queued = [
            rank.submit("allreduce", [np.ones(5, np.float32)], outputs=[output], name=f"w{i}")
            for i in range(3)
        ]
        queued.append(rank.submit("barrier"))
        all_have_submitted.wait()
        for i, request in enumerate(queued):
            call = "barrier()" if i == 3 else f"allreduce(name='w{i}', dtype=float32, "
            with pytest.raises(_core.TransportError) as caught:
                request.wait()
            assert str(caught.value).startswith(call)
            assert f": rank {size - 1} has left: {reason}" in str(caught.value)
        assert (output == UNTOUCHED).all()
        with pytest.raises(_core.TransportError) as caught:
            rank.allreduce(np.ones(5, np.float32), name="later")
        assert f"cannot be used any more: rank {size - 1} has left: {reason}" in str(caught.value)
        assert "allreduce(name='later'" in str(caught.value)

    run_ranks(size, body)


def test_leaving_together_breaks_nothing_and_ends_what_was_queued_before() -> None:
    def body(rank: ThreadRank) -> None:
        request = rank.submit("allreduce", [np.ones(5, np.float32)])
        rank.leave("done")
        assert (request.wait()[0] == 4.0).all()
        assert rank.engine.breakage() == ""
        with pytest.raises(_core.TransportError, match=r"this rank has called shutdown\(\)"):
            rank.barrier()

    run_ranks(4, body)


def test_leaving_twice_is_harmless() -> None:
    def body(rank: ThreadRank) -> None:
        rank.leave("done")
        assert rank.engine.leave(reason="again", is_orderly=True) == []

    run_ranks(3, body)


def test_an_engine_destroyed_before_it_left_is_reported() -> None:
    def body(rank: ThreadRank) -> None:
        if rank.rank == 0:
            rank.stop()
            return
        with pytest.raises(_core.TransportError) as caught:
            rank.allreduce(np.ones(5, np.float32), name="w")
        text = str(caught.value)
        assert "allreduce(name='w'" in text
        assert "rank 0 reports: the engine was destroyed before shutdown()" in text
        assert "rank 0 reports" in rank.engine.breakage()

    run_ranks(3, body)


# ---- deadlines -----------------------------------------------------------------------------------

# An idle engine looks around twice a second: it must have had the time to answer.
IMPATIENT = {"warn_after": 0.7, "fail_after": 2.4}


def test_a_deadline_names_the_missing_rank_that_is_alive_and_the_late_one_hears_of_it() -> None:
    has_failed = threading.Event()

    def body(rank: ThreadRank) -> str:
        assert_all_is_well(rank)
        if rank.rank == 1:
            rank.wait_until(has_failed)
            with pytest.raises(_core.TransportError) as caught:
                rank.allreduce(np.ones(5, np.float32), name="w")
            text = str(caught.value)
            assert "reports: allreduce(name='w'" in text  # not a deadline of its own
        else:
            with pytest.raises(_core.TransportError) as caught:
                rank.allreduce(np.ones(5, np.float32), name="w")
            text = str(caught.value)
            assert text.startswith("allreduce(name='w', dtype=float32, op=Sum, shape=(5,))")
            has_failed.set()
            warnings = [event for level, event in rank.events() if level == "WARNING"]
            assert "allreduce(name='w'" in warnings[-1]
            assert "rank 1 is alive and has not made this call" in warnings[-1]
            assert "Gives up after 2.4 s" in warnings[-1]
        assert "gave up after 2.4 s" in text
        assert "(request 1 of the global process set)" in text
        assert "rank 1 is alive and has not made this call, its last one was " in text
        assert "allreduce(name='afterwards', dtype=float32, op=Sum, shape=(40,))" in text
        assert "rank 0 is" not in text
        assert "rank 2 is" not in text
        # A broken set refuses whatever comes, on every rank, and says why.
        for collective in ("allreduce", "barrier"):
            with pytest.raises(_core.TransportError) as refused:
                rank.submit(collective)
            assert "the global process set cannot be used any more" in str(refused.value)
            assert "gave up after 2.4 s" in str(refused.value)
            assert "shutdown() and init()" in str(refused.value)
        assert "rank 1 is alive" in rank.engine.breakage()
        return text

    run_ranks(3, body, settings(**IMPATIENT))
    run_ranks(3, assert_all_is_well)  # new engines in the same process


def test_a_deadline_of_a_barrier_names_all_who_are_missing() -> None:
    has_failed = threading.Event()

    def body(rank: ThreadRank) -> None:
        if rank.rank in (0, 3):
            rank.wait_until(has_failed)
            return
        with pytest.raises(_core.TransportError) as caught:
            rank.barrier()
        has_failed.set()
        text = str(caught.value)
        assert "barrier() (request 0 of the global process set): gave up after 2.4 s" in text
        for missing in (0, 3):
            assert f"rank {missing} is alive and has not made this call or any before it" in text

    run_ranks(4, body, settings(**IMPATIENT))


def test_a_rank_that_waits_for_the_others_to_leave_is_not_impatient() -> None:
    # Its fifth warning comes after its deadline, and nothing breaks: the others are alive.
    has_warned = threading.Event()

    def body(rank: ThreadRank) -> None:
        if rank.rank == 0:
            handles = rank.engine.leave(reason="training is over", is_orderly=True)
            warnings = 0
            while warnings < 5:
                event = rank.engine.next_event(0.1)
                warnings += event is not None
                rank.job.check_time()
            assert rank.engine.breakage() == ""
            has_warned.set()
            for handle in handles:
                rank.wait_for(handle)
                handle.rethrow()
        else:
            rank.wait_until(has_warned)
            assert rank.engine.breakage() == ""
            rank.leave("evaluation is over")

    run_ranks(3, body, settings(warn_after=0.4, fail_after=1.6))


def test_a_deadline_breaks_only_the_process_set_that_waits() -> None:
    has_failed = threading.Event()

    def body(rank: ThreadRank) -> None:
        pair = rank.engine.add_process_set([0, 1])
        if rank.rank == 0:
            with pytest.raises(_core.TransportError) as caught:
                rank.allreduce(np.ones(5, np.float32), process_set=pair)
            assert f"(request 0 of process set {pair}): gave up after 2.4 s: rank 1 is" in str(
                caught.value
            )
            has_failed.set()
        rank.wait_until(has_failed)
        mine = np.full(5, rank.rank, np.float32)
        assert (rank.allreduce(mine) == 3.0).all()

    run_ranks(3, body, settings(**IMPATIENT))


def test_a_broken_job_can_be_followed_by_any_number_of_new_ones() -> None:
    def broken(rank: ThreadRank) -> None:
        if rank.rank == 0:
            rank.stop()
            return
        with pytest.raises(_core.TransportError):
            rank.allreduce(np.ones(5, np.float32))

    for size in (2, 3, 4):
        run_ranks(size, broken)
        run_ranks(size, assert_all_is_well)


def test_engines_of_different_jobs_live_side_by_side() -> None:
    def inner(rank: ThreadRank) -> float:
        return float(rank.allreduce(np.ones(5, np.float32))[0])

    def body(rank: ThreadRank) -> None:
        assert run_ranks(2 + rank.rank, inner) == [2.0 + rank.rank] * (2 + rank.rank)
        assert_all_is_well(rank)

    run_ranks(3, body)


# ---- idling --------------------------------------------------------------------------------------


def cpu_time_of(wait: Callable[[], object]) -> float:
    before = time.process_time()
    wait()
    return time.process_time() - before


def test_idle_engines_cost_next_to_no_processor_time() -> None:
    size, seconds = 4, 3.0
    is_measured = threading.Event()

    def body(rank: ThreadRank) -> float:
        assert_all_is_well(rank)
        rank.barrier()
        spent = 0.0
        if rank.rank == 0:
            spent = cpu_time_of(lambda: is_measured.wait(seconds))
            is_measured.set()
        else:
            is_measured.wait(HANG_LIMIT)
        rank.barrier()
        return spent

    # Processor time of the whole process: 4 engines, 6 looks around each. 10 ms per second would
    # be 1 % of one core.
    assert run_ranks(size, body)[0] < 0.030
