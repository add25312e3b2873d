"""Counters in shared memory that one rank advances and others wait for.

Oracle: exact integers; a wake-up that got lost makes a rank hang, which fails the test.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from adareduce import _core
from memory_ranks import LAYOUTS, End, Member, results, run_ranks

testing = _core.testing
EPOCH = testing.EPOCH_BYTES
WINDOW = 4 * EPOCH  # epochs at 0 and EPOCH, or one epoch and two words
UNLIMITED = float("inf")
LAST = (1 << 32) - 1

# How ranks wait. Those that only sleep find every wake-up that gets lost.
PATIENCE = {
    "asleep": (0, 0, UNLIMITED),
    "after yields": (0, 3, UNLIMITED),
    "after pauses": (300, 2, UNLIMITED),
    "in naps": (5, 1, 1e-4),
    "awake": (50, 1, 0.0),
}


def make(member: Member) -> Any:
    return testing.SharedWindows(member.rank, member.size, WINDOW, member.allgather)


def alone() -> Any:
    return testing.SharedWindows(0, 1, WINDOW, lambda mine: [mine])


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (0, 0, True),
        (0, 1, False),
        (1, 0, True),
        (LAST, 0, False),
        (0, LAST, True),
        (5, LAST - 5, True),
        (LAST - 5, 5, False),
        ((1 << 31) - 1, 0, True),
        ((1 << 31) + 1, 0, False),
    ],
)
def test_epochs_compare_by_their_signed_difference(value: int, target: int, expected: bool) -> None:
    assert testing.has_reached(value, target) is expected


def test_epochs_have_two_cache_lines_of_their_own() -> None:
    assert EPOCH == 128


@pytest.mark.parametrize("first", [0, LAST - 2])
def test_poll_sees_what_has_been_reached_and_not_more(first: int) -> None:
    windows = alone()
    testing.advance_epoch(windows, 0, first)
    wait = testing.EpochWait(windows, 0, (first + 2) & LAST)
    for step, expected in ((1, False), (2, True), (3, True)):
        testing.advance_epoch(windows, 0, (first + step) & LAST)
        assert wait.poll() is expected
        assert wait.first_lagging == int(expected)
    other = testing.EpochWait(windows, EPOCH, 1)
    assert not other.poll(), "another epoch of the same window has not moved"


@pytest.mark.parametrize("patience", [(0, 0, 0.0), (10, 2, 0.0), (0, 0, 1e-3), (3, 1, 1e-3)])
def test_a_wait_in_vain_ends_with_false_and_leaves_no_sleeper(
    patience: tuple[int, int, float],
) -> None:
    windows = alone()
    wait = testing.EpochWait(windows, 0, 1)
    assert wait.wait(testing.Patience(*patience)) is False
    assert testing.epoch_of(windows, 0, 0) == (0, 0)
    testing.advance_epoch(windows, 0, 1)
    assert wait.wait(testing.Patience(*patience)) is True


def walk(member: Member, patience: tuple[int, int, float], first: int, rounds: int) -> Any:
    windows = make(member)
    testing.advance_epoch(windows, 0, first)
    member.barrier()
    wrong = testing.walk_epochs(windows, first, rounds, testing.Patience(*patience))
    member.barrier()
    return wrong, testing.epoch_of(windows, member.rank, 0)


@pytest.mark.parametrize("name", PATIENCE)
@pytest.mark.parametrize("processes", LAYOUTS, ids=str)
def test_ranks_walk_in_step_over_the_wrap_around(processes: list[int], name: str) -> None:
    rounds = 4000
    first = LAST - rounds // 2
    ends = results(run_ranks(walk, processes, PATIENCE[name], first, rounds))
    assert ends == [(0, ((first + rounds) & LAST, 0))] * len(processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [[0, 0], [0, 1], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]], ids=str)
def test_no_wake_up_gets_lost_in_many_rounds(processes: list[int]) -> None:
    rounds = 100_000
    ends = results(run_ranks(walk, processes, PATIENCE["asleep"], 0, rounds))
    assert ends == [(0, (rounds, 0))] * len(processes)


def until_asleep(windows: Any, rank: int, count: int) -> None:
    while testing.epoch_of(windows, rank, 0)[1] != count:
        os.sched_yield()


def test_everybody_who_sleeps_for_one_epoch_is_woken() -> None:
    windows = alone()
    woken = []

    def sleep() -> None:
        wait = testing.EpochWait(windows, 0, 2)
        woken.append(wait.wait(testing.Patience(0, 0, UNLIMITED)))

    threads = [threading.Thread(target=sleep, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    until_asleep(windows, 0, len(threads))
    testing.advance_epoch(windows, 0, 1)  # not enough: they sleep on
    until_asleep(windows, 0, len(threads))
    assert not woken
    testing.advance_epoch(windows, 0, 2)
    for thread in threads:
        thread.join(60.0)
    assert woken == [True] * len(threads)
    assert testing.epoch_of(windows, 0, 0) == (2, 0)


def interrupt_a_sleep(member: Member) -> tuple[bool, int]:
    windows = make(member)
    signals = []
    signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))

    def kill() -> None:
        until_asleep(windows, 0, 1)
        while not signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.sched_yield()

    killer = threading.Thread(target=kill)
    killer.start()
    reached = testing.EpochWait(windows, 0, 1).wait(testing.Patience(0, 0, UNLIMITED))
    killer.join()
    return reached, testing.epoch_of(windows, 0, 0)[1]


def test_a_signal_ends_a_sleep_so_that_control_c_is_heard() -> None:
    assert results(run_ranks(interrupt_a_sleep, [0])) == [(False, 0)]


def kill_a_sleeper(member: Member) -> tuple[int, int]:
    windows = make(member)
    pids = member.allgather(b"%d" % os.getpid())
    patience = testing.Patience(0, 0, UNLIMITED)
    if member.rank == 1:
        testing.EpochWait(windows, 0, 1).wait(patience)
        raise AssertionError("rank 1 should have been killed")
    until_asleep(windows, 0, 1)
    if member.rank == 0:
        os.kill(int(pids[1]), signal.SIGKILL)
    with pytest.raises(ConnectionError):
        member.barrier()  # until it is dead
    # It stays counted, and the others wake each other as before.
    for number in range(1, 2000):
        if member.rank == 0:
            testing.advance_epoch(windows, 0, number)
        reached = testing.EpochWait(windows, 0, number, [2 - member.rank]).wait(patience)
        assert reached is True
        if member.rank == 2:
            testing.advance_epoch(windows, 0, number)
    if member.rank == 2:
        until_asleep(windows, 2, 0)  # rank 0 counts itself out after it was woken
    value, sleepers = testing.epoch_of(windows, member.rank, 0)
    return value, sleepers


def test_a_waiter_killed_in_its_sleep_disturbs_nobody() -> None:
    first, dead, third = run_ranks(kill_a_sleeper, [0, 1, 2])
    assert dead.kind == "death"
    assert first == End("result", (1999, 1)), "the dead one stays counted"
    assert third == End("result", (1999, 0))


def wait_for_a_rank_that_dies(member: Member) -> tuple[bool, int]:
    windows = make(member)
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    testing.advance_epoch(windows, 0, 1)
    wait = testing.EpochWait(windows, 0, 1)
    reached = [wait.wait(testing.Patience(3, 1, 1e-3)) for _ in range(3)]
    return any(reached), wait.first_lagging


def test_a_wait_for_a_dead_rank_comes_back_and_names_it() -> None:
    ends = run_ranks(wait_for_a_rank_that_dies, [0, 1])
    assert ends[0] == End("result", (False, 1))
