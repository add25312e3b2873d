"""How the way through shared memory is chosen. Oracle: times that the test makes up."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from adareduce._core import testing

CHOICES = testing.SharedTuning.choices()
MIB = 1 << 20
BYTES = 20 * MIB
FEW = 8 * len(CHOICES)  # requests after which one is preferred
LONG = 4000


def run(
    tuning: testing.SharedTuning,
    requests: int,
    seconds: Sequence[float],
    nbytes: int = BYTES,
    is_adasum: bool = False,
    is_caller: bool = True,
) -> list[int]:
    """What was proposed, where a request with choice c takes seconds[c]."""
    proposed = []
    for _ in range(requests):
        choice = tuning.propose(is_adasum, nbytes, is_caller)
        tuning.record(is_adasum, nbytes, is_caller, choice, seconds[choice])
        proposed.append(choice)
    return proposed


def times(fastest: int, ratio: float = 2.0) -> list[float]:
    return [1.0 if choice == fastest else ratio for choice in range(len(CHOICES))]


def test_the_choices_differ() -> None:
    assert len(CHOICES) == len(set(CHOICES)) >= 2


def test_the_first_is_taken_until_others_have_been_tried_now_and_then() -> None:
    # A short program must not spend its calls on trials: none of its first three is one.
    proposed = run(testing.SharedTuning(), FEW, times(0))
    assert proposed[:3] == [0, 0, 0]
    counts = Counter(proposed)
    assert all(counts[choice] >= 2 for choice in range(len(CHOICES)))
    assert counts[0] >= 0.7 * FEW


@pytest.mark.parametrize("fastest", range(len(CHOICES)))
def test_the_fastest_is_preferred_and_the_others_are_still_visited(fastest: int) -> None:
    tuning = testing.SharedTuning()
    run(tuning, FEW, times(fastest))
    counts = Counter(run(tuning, LONG, times(fastest)))
    assert counts[fastest] >= 0.9 * LONG
    assert min(counts[choice] for choice in range(len(CHOICES))) >= 10
    (row,) = tuning.rows()
    assert row == ("element by element, 16 MiB to 32 MiB", CHOICES[fastest], FEW + LONG)


@pytest.mark.parametrize("later", range(1, len(CHOICES)))
def test_it_notices_when_another_has_become_better(later: int) -> None:
    tuning = testing.SharedTuning()
    run(tuning, LONG, times(0))
    run(tuning, LONG, times(later))
    counts = Counter(run(tuning, LONG, times(later)))
    assert counts[later] >= 0.9 * LONG


@pytest.mark.parametrize("later", range(1, len(CHOICES)))
def test_it_changes_over_within_a_round_of_trials(later: int) -> None:
    # Cores have moved: the best one has become a little slower, another one much faster.
    tuning = testing.SharedTuning()
    run(tuning, LONG, times(0))
    seconds = [1.2] * len(CHOICES)
    seconds[later] = 0.9
    proposed = run(tuning, 60, seconds)
    assert Counter(proposed[40:])[later] >= 15


def test_it_notices_when_the_best_has_become_slow() -> None:
    tuning = testing.SharedTuning()
    seconds = [1.0 + 0.5 * choice for choice in range(len(CHOICES))]
    run(tuning, LONG, seconds)
    seconds[0] = 5.0
    counts = Counter(run(tuning, 200, seconds))
    assert counts[1] >= 150


@pytest.mark.parametrize("ratio", [1.05, 3.0])
@pytest.mark.parametrize("slow", [[0], [0, 1]], ids=["one of seven", "two of seven"])
def test_slow_requests_now_and_then_change_nothing(slow: list[int], ratio: float) -> None:
    # Another process had the core for a while.
    tuning = testing.SharedTuning()
    seconds = times(1, ratio)
    run(tuning, LONG, seconds)
    proposed = []
    for number in range(400):
        choice = tuning.propose(False, BYTES, True)
        took = 50.0 if number % 7 in slow else seconds[choice]
        tuning.record(False, BYTES, True, choice, took)
        proposed.append(choice)
    assert Counter(proposed)[1] >= 0.9 * len(proposed)


def test_one_that_is_quick_by_chance_does_not_stay() -> None:
    tuning = testing.SharedTuning()
    seconds = times(0, 1.5)
    run(tuning, LONG, seconds)
    dice = random.Random(5)
    proposed = []
    for _ in range(LONG):
        choice = tuning.propose(False, BYTES, True)
        took = 0.9 if choice == 2 and dice.random() < 0.25 else seconds[choice]
        tuning.record(False, BYTES, True, choice, took)
        proposed.append(choice)
    assert Counter(proposed)[0] >= 0.9 * LONG


def test_calls_of_another_size_do_not_disturb() -> None:
    # The last bucket of a step is smaller, and a byte of it takes longer.
    tuning = testing.SharedTuning()
    seconds = times(1, 1.1)
    for _ in range(LONG):
        run(tuning, 1, seconds)
        run(tuning, 1, [0.6 * s for s in seconds], nbytes=BYTES // 3)
    proposed = []
    for _ in range(LONG):
        proposed += run(tuning, 1, seconds)
        proposed += run(tuning, 1, [0.6 * s for s in seconds], nbytes=BYTES // 3)
    assert Counter(proposed)[1] >= 0.9 * len(proposed)


def test_the_first_sample_may_be_slow() -> None:
    # It pays for memory that is touched for the first time.
    tuning = testing.SharedTuning()
    seen = set()
    while 2 not in seen:
        choice = tuning.propose(False, BYTES, True)
        tuning.record(False, BYTES, True, choice, 50.0 if choice == 2 else times(2)[choice])
        seen.add(choice)
    counts = Counter(run(tuning, FEW + LONG, times(2)))
    assert counts[2] >= 0.9 * LONG


def test_calls_of_one_class_that_differ_do_not_keep_it_from_the_best() -> None:
    # Two buckets of a step, a byte of one of which takes longer.
    tuning = testing.SharedTuning()
    dice = random.Random(3)
    proposed = []
    for number in range(LONG):
        scale = (1.3 if number % 2 else 1.0) * (1 + 0.03 * dice.gauss(0, 1))
        proposed += run(tuning, 1, [scale * s for s in times(1, 1.5)])
    assert Counter(proposed)[1] >= 0.9 * LONG


def test_times_that_scatter_do_not_cost_trials() -> None:
    tuning = testing.SharedTuning()
    dice = random.Random(4)
    proposed = []
    for _ in range(LONG):
        scale = 1 + 0.15 * dice.gauss(0, 1)
        proposed += run(tuning, 1, [scale * s for s in times(1, 2.0)])
    assert Counter(proposed)[1] >= 0.9 * LONG


@pytest.mark.parametrize(
    ("nbytes", "label"),
    [
        ((256 << 10) - 1, "below 256 KiB"),
        (256 << 10, "256 KiB to 512 KiB"),
        (MIB - 1, "512 KiB to 1 MiB"),
        (MIB, "1 MiB to 2 MiB"),
        (256 * MIB - 1, "128 MiB to 256 MiB"),
        (256 * MIB, "from 256 MiB"),
        (1 << 40, "from 256 MiB"),
    ],
)
def test_sizes_have_names(nbytes: int, label: str) -> None:
    tuning = testing.SharedTuning()
    run(tuning, 1, times(0), nbytes)
    ((what, _, _),) = tuning.rows()
    assert what == f"element by element, {label}"


def test_kinds_and_sizes_are_learnt_apart() -> None:
    tuning = testing.SharedTuning()
    sizes = [MIB, 4 * MIB, 20 * MIB, 100 * MIB, 300 * MIB]
    for number, nbytes in enumerate(sizes):
        for is_adasum in (False, True):
            fastest = (number + is_adasum) % len(CHOICES)
            run(tuning, FEW, times(fastest), nbytes, is_adasum)
    rows = tuning.rows()
    assert len(rows) == len({what for what, _, _ in rows}) == 2 * len(sizes)
    expected = [CHOICES[(number + is_adasum) % len(CHOICES)]
                for is_adasum in (False, True) for number in range(len(sizes))]  # fmt: skip
    assert [choice for _, choice, _ in rows] == expected
    assert {requests for _, _, requests in rows} == {FEW}


def test_the_engine_s_thread_learns_by_itself_and_only_what_it_can_tell_apart() -> None:
    tuning = testing.SharedTuning()
    run(tuning, FEW, times(3))
    proposed = run(tuning, LONG, times(1), is_caller=False)
    assert Counter(proposed)[1] >= 0.9 * LONG
    alike = [number for number, text in enumerate(CHOICES) if "short looks" in text]
    assert alike
    assert not set(proposed) & set(alike)  # the same to it as one with long looks
    assert tuning.rows() == [
        ("element by element, 16 MiB to 32 MiB", CHOICES[3], FEW),
        ("element by element, 16 MiB to 32 MiB, in the background", CHOICES[1], LONG),
    ]


def test_requests_that_end_without_a_time_use_up_no_trial() -> None:
    # They failed, or went another way in the end.
    tuning = testing.SharedTuning()
    for _ in range(100):
        tuning.propose(False, BYTES, True)
    run(tuning, FEW, times(3))
    (row,) = tuning.rows()
    assert row[1] == CHOICES[3]


def test_what_moves_nothing_teaches_nothing() -> None:
    tuning = testing.SharedTuning()
    run(tuning, FEW, times(2), nbytes=MIB)
    for _ in range(50):
        tuning.record(False, 0, True, 0, 0.0)
        tuning.record(False, MIB, True, len(CHOICES) + 1, 0.0)
    (row,) = tuning.rows()
    assert row[1] == CHOICES[2]
