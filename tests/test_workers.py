"""Threads that share the work of a rank: the option ADAREDUCE_WORKERS.

Oracles: the same calls with one worker, bit for bit; the operating system's list of threads.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce import _core
from adareduce._core import testing
from adareduce.settings import MOST_WORKERS, Settings
from half_types import to_storage
from test_collectives import FLOATS
from test_instruction_sets import values
from test_shared_collectives import RING, nearly_cancelling
from thread_ranks import COLLECTIVES, DTYPES, OPS, ThreadRank, run_ranks, settings

Tensors = list[NDArray]
HELPER = "adareduce-"  # how the threads are called, with a number behind


def helpers() -> list[str]:
    """The threads of this process that Workers have made."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if name.startswith(HELPER):
            names.append(name)
    return sorted(names)


def helpers_become(expected: list[str]) -> bool:
    """A thread that has been joined may stay in the list for a moment."""
    end = time.monotonic() + 20
    while helpers() != expected and time.monotonic() < end:
        os.sched_yield()
    return helpers() == expected


@pytest.fixture(autouse=True)
def _no_helpers_of_another_test() -> None:
    assert helpers_become([])


# ---- the threads ---------------------------------------------------------------------------------


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_helpers_may_use_the_cores_that_their_maker_had_not_those_of_a_bound_caller() -> None:
    cores = os.sched_getaffinity(0)
    workers = testing.Workers(3)
    os.sched_setaffinity(0, {min(cores)})
    try:
        workers.run(3, meeting=3)
        found = [
            os.sched_getaffinity(int(task.name))
            for task in Path("/proc/self/task").iterdir()
            if (task / "comm").read_text().startswith(HELPER)
        ]
    finally:
        os.sched_setaffinity(0, cores)
    assert found == [cores, cores]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("may_spin", [True, False])
def test_every_item_is_done_once(count: int, may_spin: bool) -> None:
    workers = testing.Workers(count)
    if not may_spin:
        workers.stop_spinning()
    for _ in range(20):
        for items in (0, 1, 2, 7, 100, 1001):
            calls, threads = workers.run(items)
            assert calls == [1] * items
            assert threads <= count


@pytest.mark.parametrize("count", [2, 3, 8])
def test_as_many_threads_as_asked_for_work_at_the_same_time(count: int) -> None:
    workers = testing.Workers(count)
    for items in (count, 3 * count):
        calls, threads = workers.run(items, meeting=count)
        assert calls == [1] * items
        assert threads == count


def test_threads_are_made_for_the_first_run_and_end_with_their_owner() -> None:
    assert helpers() == []
    one, three = testing.Workers(1), testing.Workers(3)
    one.run(100)
    three.run(0)
    three.run(1)
    assert helpers() == []
    three.run(3, meeting=3)
    assert helpers() == ["adareduce-1", "adareduce-2"]
    three.run(3, meeting=3)
    assert helpers() == ["adareduce-1", "adareduce-2"]
    del three
    assert helpers_become([])
    del one


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_error_of_an_item_reaches_the_caller(count: int) -> None:
    workers = testing.Workers(count)
    for failing in (0, 1, 37, 99):
        with pytest.raises(ValueError, match=f"^item {failing}$"):
            workers.run(100, failing=failing)
        assert workers.run(100)[0] == [1] * 100, "the next run is sound"


def test_the_error_of_another_thread_reaches_the_caller() -> None:
    workers = testing.Workers(3)
    for _ in range(50):
        # All three are there, so that one of the items is another thread's.
        with pytest.raises(ValueError, match=r"^item \d$"):
            workers.run(3, meeting=3, fails_elsewhere=True)
        assert workers.run(3, meeting=3)[0] == [1] * 3


def test_two_callers_at_the_same_time_both_get_their_work_done() -> None:
    workers = testing.Workers(3)
    wrong: list[object] = []

    def call() -> None:
        for items in range(300):
            calls, _ = workers.run(items)
            if calls != [1] * items:
                wrong.append(calls)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_workers_that_have_nothing_to_do_sleep() -> None:
    # Three threads that look around for the time that a fourth one needs to use a second of CPU
    # would use as much as they get; asleep they use next to nothing.
    workers = testing.Workers(4)
    workers.run(4, meeting=4)

    def ticks_of_helpers() -> int:
        used = 0
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().startswith(HELPER):
                fields = (task / "stat").read_text().rsplit(") ", 1)[1].split()
                used += int(fields[11]) + int(fields[12])
        return used

    assert len(helpers()) == 3
    before, begin = ticks_of_helpers(), time.thread_time()
    while time.thread_time() - begin < 1.0:
        pass
    # They may look around for a moment after the run.
    assert ticks_of_helpers() - before <= 0.1 * os.sysconf("SC_CLK_TCK")


# ---- the setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "workers"), [("", 1), ("1", 1), ("3", 3), ("64", 64)])
def test_the_number_of_workers_is_read_from_the_environment(text: str, workers: int) -> None:
    assert Settings.from_environment({"ADAREDUCE_WORKERS": text}).workers == workers
    assert Settings.from_environment({}).workers == 1


@pytest.mark.parametrize("wrong", ["0", "65", "-1", "2.0", "two", "1e3", " 2", "٣", "9" * 50])
def test_a_wrong_number_of_workers_is_refused(wrong: str) -> None:
    text = f"ADAREDUCE_WORKERS must be a number of threads, 1 to {MOST_WORKERS}, got {wrong!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Settings.from_environment({"ADAREDUCE_WORKERS": wrong})


@pytest.mark.parametrize("wrong", [-1, 0, MOST_WORKERS + 1])
def test_the_engine_refuses_a_wrong_number_of_workers(wrong: int) -> None:
    text = rf"^Settings: workers must be 1 \.\.\. {MOST_WORKERS}, got {wrong}$"
    with pytest.raises(ValueError, match=text):
        settings(workers=wrong)
    with pytest.raises(ValueError, match=rf"count must be 1 \.\.\. {MOST_WORKERS}, got {wrong}$"):
        testing.Workers(wrong)
    settings(workers=MOST_WORKERS)


def options_of(workers: Sequence[int], **others: Any) -> list[_core.Settings]:
    """Settings of ranks that share memory, by rank."""
    return [settings(shared_memory=True, workers=count, **others) for count in workers]


def with_workers(workers: Sequence[int], body: Callable[[ThreadRank], Any], **others: Any) -> Any:
    """What `body` returns on ranks with these numbers of workers."""
    most: list[int] = []

    def checked(rank: ThreadRank) -> Any:
        facts = rank.engine.shared_memory(0)
        assert facts.is_used, facts.why_not
        assert facts.workers == workers[rank.rank]
        result = body(rank)
        most.append(len(helpers()))
        return result

    results = run_ranks(len(workers), checked, options_of(workers, **others))
    # The last one to look has seen everybody's.
    assert max(most) <= sum(count - 1 for count in workers)
    assert (max(most) > 0) == (max(workers) > 1), "what was measured is something else"
    return results


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This thread, and those that it makes, may use so many cores."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < count:
        pytest.skip(f"needs {count} cores")
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        (1, [1, 1], ["", ""]),  # ranks alone are the launcher's business
        (2, [1, 1], ["", ""]),
        (1, [2, 1], ["this rank has 2 workers (ADAREDUCE_WORKERS) and may use 1 core", ""]),
        (1, [3, 2], ["this rank has 3 workers (ADAREDUCE_WORKERS) and may use 1 core",
                     "this rank has 2 workers (ADAREDUCE_WORKERS) and may use 1 core"]),
        (2, [1, 2, 2],
         ["", "the 3 ranks of this node have 5 workers (ADAREDUCE_WORKERS) and may use 2 cores",
          ""]),
        (3, [1, 2], ["", ""]),
    ],
)  # fmt: skip
def test_more_workers_than_cores_are_reported_once(
    cores: int, workers: list[int], expected: list[str]
) -> None:
    def body(rank: ThreadRank) -> list[tuple[str, str]]:
        rank.engine.add_process_set(list(range(rank.size)))  # says nothing new
        return rank.events()

    with on_cores(cores):
        by_rank = run_ranks(len(workers), body, options_of(workers))
    for events, text in zip(by_rank, expected, strict=True):
        assert events == ([("WARNING", f"{text}: they take turns")] if text else [])


def test_ranks_that_share_no_memory_have_no_workers() -> None:
    def body(rank: ThreadRank) -> None:
        rank.allreduce(np.ones(1_000_000, np.float32))
        assert helpers() == []
        assert rank.engine.shared_memory(0).workers == 1

    run_ranks(2, body, settings(shared_memory=False, workers=3))


# ---- bits ----------------------------------------------------------------------------------------

SIZES = [2, 3, 5]
# Tensors that are long, short and empty; of several chunks together, and of several parts each.
NUMELS = [70_001, 3, 0, 300_000, 17, 1, 33_333, 250_000, *range(1, 40)]


def mixed(size: int) -> list[list[int]]:
    """Numbers of workers by rank: the same, and different ones."""
    return [[3] * size, [1 + (rank + 1) % 3 for rank in range(size)]]


def same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return reference.same_bits(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return reference.same_bits(np.array(left), np.array(right))


def assert_same_with_workers(size: int, body: Callable[[ThreadRank], Any], **others: Any) -> None:
    expected = with_workers([1] * size, body, **others)
    for workers in mixed(size):
        results = with_workers(workers, body, **others)
        for rank in range(size):
            assert same_bits(results[rank], expected[rank]), (workers, rank)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [*FLOATS, "int32"])
def test_element_by_element_workers_change_no_bit(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    inputs = [[values(rng, numel, dtype) for numel in NUMELS] for _ in range(size)]
    ops = ["sum", "average", "min", "max", "product"]

    def body(rank: ThreadRank) -> list[Tensors]:
        mine = inputs[rank.rank]
        results = [rank.grouped_allreduce(mine, op=op, dtype=dtype) for op in ops]
        results.append(rank.grouped_allreduce(mine, dtype=dtype, prescale=0.5, postscale=3.0))
        return results

    assert_same_with_workers(size, body)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_workers_change_no_bit_of_adasum(size: int, dtype: str, rng: np.random.Generator) -> None:
    # Some tensors nearly cancel, and take the way by level.
    by_tensor = [
        nearly_cancelling(rng, size, (numel,)) if place % 4 == 3
        else [rng.standard_normal(numel) + 0.3 for _ in range(size)]
        for place, numel in enumerate(NUMELS)
    ]  # fmt: skip
    inputs = [[to_storage(by[rank], dtype) for by in by_tensor] for rank in range(size)]

    def body(rank: ThreadRank) -> list[Any]:
        outcomes: list[Any] = []
        for options in ({}, {"prescale": 0.5, "postscale": 2.0}):
            pending = rank.submit("allreduce", inputs[rank.rank], op="adasum", dtype=dtype,
                                  groups=[0] * len(NUMELS), **options)  # fmt: skip
            outcomes.append((pending.wait(), *pending.handle.statistics()))
        return outcomes

    assert_same_with_workers(size, body)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["sum", "average", "adasum"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_workers_change_no_bit_of_statistics(
    size: int, op: str, dtype: str, rng: np.random.Generator
) -> None:
    inputs = [[to_storage(rng.standard_normal(numel), dtype) for numel in NUMELS]
              for _ in range(size)]  # fmt: skip
    for place in (7, 69_990):  # two threads' parts of one tensor
        inputs[size - 1][0][place] = to_storage(np.array([np.inf]), dtype)[0]
    inputs[0][3][1234] = to_storage(np.array([np.nan]), dtype)[0]
    groups = [place % 3 + 2 * (place % 2) for place in range(len(NUMELS))]
    num_groups = max(groups) + 1
    given = [[1.0 + rank + group for group in range(num_groups)] for rank in range(size)]

    def body(rank: ThreadRank) -> list[Any]:
        outcomes = []
        # The infinities are of the first and the third tensor: others' sums are numbers.
        clean = [tensor if place not in (0, 3) else np.ones_like(tensor)
                 for place, tensor in enumerate(inputs[rank.rank])]  # fmt: skip
        for tensors in (inputs[rank.rank], clean):
            for local_squares in ([], given[rank.rank]) if op != "adasum" else ([],):
                pending = rank.submit("allreduce", tensors, op=op, dtype=dtype, groups=groups,
                                      local_squares=local_squares)  # fmt: skip
                outcomes.append((pending.wait(), *pending.handle.statistics()))
        assert outcomes[0][3][0] >= 2
        assert outcomes[0][3][3] >= 1
        assert sum(outcomes[-1][3]) == 0
        return outcomes

    assert_same_with_workers(size, body)


def test_sums_over_a_long_tensor_keep_their_order(rng: np.random.Generator) -> None:
    # Hundreds of parts whose sums round differently in any other order, several times.
    size, numel = 2, 2_000_000
    inputs = [rng.standard_normal(numel) * 2.0 ** rng.integers(-20, 20, numel) for _ in range(size)]

    def body(rank: ThreadRank) -> list[Any]:
        outcomes = []
        for op in ["sum", "adasum"] * 3:
            pending = rank.submit("allreduce", [inputs[rank.rank]], op=op, groups=[0])
            pending.wait()
            outcomes.append(pending.handle.statistics())
        return outcomes

    for choice in range(len(testing.SharedTuning.choices())):
        assert_same_with_workers(size, body, shared_choice=choice)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workers_change_no_bit_of_tensors_that_all_can_address(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    inputs = [[values(rng, numel, dtype) for numel in NUMELS] for _ in range(size)]
    width = inputs[0][0].itemsize
    begins = np.cumsum([0, *(-(-numel * width // 64) * 64 for numel in NUMELS)])

    def body(rank: ThreadRank) -> list[Any]:
        region = rank.engine.empty_shared(process_set=0, bytes=int(begins[-1]))
        assert region is not None
        memory = np.frombuffer(region, np.uint8)
        places = [memory[begin : begin + numel * width].view(inputs[0][0].dtype)
                  for begin, numel in zip(begins, NUMELS, strict=False)]  # fmt: skip
        outcomes = []
        before = rank.engine.shared_memory(0).requests[2]
        for op in ["sum", "average", "adasum", "max"]:
            for place, mine in zip(places, inputs[rank.rank], strict=True):
                place[:] = mine
            rank.barrier()
            groups = None if op == "max" else [place % 2 for place in range(len(NUMELS))]
            pending = rank.submit("allreduce", places, outputs=places, op=op, dtype=dtype,
                                  groups=groups, postscale=2.0)  # fmt: skip
            results = [result.copy() for result in pending.wait()]
            outcomes.append((results, pending.handle.statistics()))
            rank.barrier()
        assert rank.engine.shared_memory(0).requests[2] - before == 4, "they are not in place"
        return outcomes

    assert_same_with_workers(size, body)


@pytest.mark.parametrize("size", SIZES)
def test_workers_change_no_bit_of_other_collectives(size: int, rng: np.random.Generator) -> None:
    rows = [400_000, 3, 0, 17 * size]
    inputs = [[values(rng, count, "float32") for count in rows] for _ in range(size)]
    matrices = [values(rng, (20_000 + 7 * rank) * 9, "float32").reshape(-1, 9)
                for rank in range(size)]  # fmt: skip

    def body(rank: ThreadRank) -> list[Any]:
        mine = inputs[rank.rank]
        shares = [count // size + (rank.rank < count % size) for count in rows]
        outcomes = []
        for op in ("sum", "average"):
            outputs = [np.zeros(share, np.float32) for share in shares]
            outcomes.append(rank.submit("reducescatter", mine, outputs=outputs, op=op).wait())
        outcomes.append(rank.submit("broadcast", mine, root=size - 1).wait())
        outcomes.append([rank.allgather(matrices[rank.rank])])
        assert reference.same_bits(outcomes[-1][0], np.concatenate(matrices))
        return outcomes

    assert_same_with_workers(size, body)


@pytest.mark.slow
def test_workers_change_no_bit_of_a_tensor_that_passes_twice(rng: np.random.Generator) -> None:
    numel = (RING + (3 << 20)) // 4 + 77
    inputs = [rng.standard_normal(numel).astype(np.float32) for _ in range(3)]

    def body(rank: ThreadRank) -> list[NDArray]:
        return [rank.allreduce(inputs[rank.rank], op="adasum")]

    assert_same_with_workers(3, body, shared_choice=0)


# ---- several sets --------------------------------------------------------------------------------


def test_two_sets_at_work_at_the_same_time_share_the_workers_of_their_rank() -> None:
    # Two threads of each rank, which do the work of their calls themselves: the second one to come
    # finds the workers taken.
    numel = 1_000_000

    def body(rank: ThreadRank) -> None:
        sets = [0, rank.engine.add_process_set([0, 1, 2])]
        wrong: list[object] = []

        def call(process_set: int) -> None:
            for step in range(20):
                mine = np.full(numel, float(rank.rank + step), np.float32)
                tensor = ([numel], DTYPES["float32"], mine.ctypes.data, mine.ctypes.data, (), 0)
                handle = rank.engine.run(
                    process_set=process_set, collective=COLLECTIVES["allreduce"], name="x",
                    op=OPS["sum"], root=0, prescale=1.0, postscale=1.0, tensors=[tensor],
                )  # fmt: skip
                rank.wait_for(handle)
                handle.rethrow()
                if not (mine == 3.0 + 3.0 * step).all():
                    wrong.append((process_set, step))

        callers = [threading.Thread(target=call, args=(process_set,)) for process_set in sets]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert wrong == []

    with_workers([3, 2, 3], body)
