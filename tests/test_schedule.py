"""Schedules as values. Oracle: the tree of docs/algorithms.md as tests/reference.py writes it."""

from __future__ import annotations

import itertools

import pytest

from adareduce._core import testing
from reference import Tree, adasum_tree, leaves, weights

SIZES = range(1, 65)
NUMELS = [0, 1, 15, 16, 17, 40, 1000, 4096, 2**33 + 5]

Range = tuple[int, int]


def as_pairs(size: int) -> Tree:
    """The C++ table of the tree, as nested pairs."""
    trees: list[Tree] = list(range(size))
    for node in testing.adasum_tree(size):
        trees.append((trees[node["lower"]], trees[node["upper"]]))
    return trees[-1]


def owned_by(size: int, numel: int) -> list[Range]:
    """What every rank owns after the last level."""
    owned = []
    for rank in range(size):
        levels = testing.adasum_schedule(size, rank, numel)
        owned.append(levels[-1]["keep"] if levels else (0, numel))
    return owned


def covers(ranges: list[Range], whole: Range) -> bool:
    """The ranges meet end to end and fill `whole`, in some order; empty ones do not matter."""
    end = whole[0]
    for begin, stop in sorted(r for r in ranges if r[0] < r[1]):
        if begin != end:
            return False
        end = stop
    return end == max(whole)


def test_the_tree_is_the_one_of_the_definition() -> None:
    for size in SIZES:
        assert as_pairs(size) == adasum_tree(size)
        assert leaves(adasum_tree(size)) == list(range(size))


def test_trees_of_small_worlds_are_the_documented_ones() -> None:
    assert adasum_tree(1) == 0
    assert adasum_tree(2) == (0, 1)
    assert adasum_tree(3) == ((0, 1), 2)
    assert adasum_tree(5) == (((0, 1), 2), (3, 4))
    assert adasum_tree(6) == (((0, 1), (2, 3)), (4, 5))
    assert adasum_tree(7) == (((0, 1), (2, 3)), ((4, 5), 6))
    assert adasum_tree(8) == (((0, 1), (2, 3)), ((4, 5), (6, 7)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [1]),
        (2, [1 / 2] * 2),
        (3, [1 / 4, 1 / 4, 1 / 2]),
        (4, [1 / 4] * 4),
        (5, [1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4]),
        (6, [1 / 8] * 4 + [1 / 4] * 2),
        (7, [1 / 8] * 6 + [1 / 4]),
        (8, [1 / 8] * 8),
    ],
)
def test_weights_of_parallel_vectors_are_the_documented_ones(
    size: int, expected: list[float]
) -> None:
    assert testing.parallel_weights(size) == expected


def test_weights_are_two_to_minus_depth_and_add_up_to_one() -> None:
    for size in SIZES:
        by_rank = weights(adasum_tree(size))
        assert testing.parallel_weights(size) == [by_rank[rank] for rank in range(size)]
        assert sum(testing.parallel_weights(size)) == 1.0


@pytest.mark.parametrize("size", [0, -1])
def test_a_world_without_ranks_has_no_tree(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be positive, got {size}"):
        testing.adasum_tree(size)


def test_peers_mirror_each_other_level_by_level() -> None:
    for size, numel in itertools.product(SIZES, NUMELS):
        schedules = [testing.adasum_schedule(size, rank, numel) for rank in range(size)]
        for rank, levels in enumerate(schedules):
            for level in levels:
                peer = level["peer"]
                partners = [other for other in schedules[peer] if other["peer"] == rank]
                assert len(partners) == 1, f"ranks {rank} and {peer} must meet exactly once"
                partner = partners[0]
                assert partner["keep"] == level["give"]
                assert partner["give"] == level["keep"]
                assert partner["is_lower"] is not level["is_lower"]
                if level["group"] and partner["group"]:
                    assert partner["group"] == level["group"]


def test_keep_and_give_partition_what_the_rank_owned() -> None:
    for size, numel in itertools.product(SIZES, NUMELS):
        for rank in range(size):
            owned = (0, numel)
            for level in testing.adasum_schedule(size, rank, numel):
                assert covers([level["keep"], level["give"]], owned)
                owned = level["keep"]


def test_every_element_is_owned_by_exactly_one_rank_at_the_end() -> None:
    for size, numel in itertools.product(SIZES, NUMELS):
        assert covers(owned_by(size, numel), (0, numel))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 64])
def test_halves_differ_by_less_than_one_cache_line(size: int) -> None:
    for rank in range(size):
        for level in testing.adasum_schedule(size, rank, 2**33 + 5):
            (keep_begin, keep_end), (give_begin, give_end) = level["keep"], level["give"]
            assert all(bound % 16 == 0 or bound == 2**33 + 5 for bound in level["keep"])
            if keep_begin < keep_end and give_begin < give_end:
                assert abs((keep_end - keep_begin) - (give_end - give_begin)) <= 2 * 16


def test_groups_are_powers_of_two_that_share_the_pair() -> None:
    for size in SIZES:
        numel = 16 * 64 * 64
        schedules = [testing.adasum_schedule(size, rank, numel) for rank in range(size)]
        for rank, levels in enumerate(schedules):
            for depth, level in enumerate(levels):
                group = level["group"]
                if not group:  # this rank hands over its vector and sits out
                    assert level["keep"][0] == level["keep"][1]
                    assert depth == len(levels) - 1
                    continue
                assert group == sorted(set(group))
                assert rank in group
                assert len(group) & (len(group) - 1) == 0
                # The members own the whole vector of the node, each a part of its own.
                peers = {rank, level["peer"]}
                assert len(group) == 1 or peers <= set(group)
                parts = []
                for member in group:
                    [same] = [other for other in schedules[member] if other["group"] == group]
                    parts.append(same["keep"])
                assert covers(parts, (0, numel))


@pytest.mark.parametrize("size", range(1, 18))
@pytest.mark.parametrize("numel", [1, 40, 333, 16 * 64])
def test_walking_the_schedule_with_symbols_gives_the_tree(size: int, numel: int) -> None:
    schedules = [testing.adasum_schedule(size, rank, numel) for rank in range(size)]
    data: list[list[Tree | None]] = [[rank] * numel for rank in range(size)]
    positions = [0] * size

    # Reduce-scatter, pair by pair, as soon as both sides have come to their common level.
    def next_pair() -> tuple[int, int] | None:
        for rank in range(size):
            if positions[rank] == len(schedules[rank]):
                continue
            level = schedules[rank][positions[rank]]
            peer = level["peer"]
            theirs = schedules[peer][positions[peer] :]
            if level["is_lower"] and theirs and theirs[0]["peer"] == rank:
                return rank, peer
        return None

    order = []
    while (pair := next_pair()) is not None:
        lower, upper = pair
        before = data[lower].copy(), data[upper].copy()
        for side in pair:
            keep, give = (schedules[side][positions[side]][key] for key in ("keep", "give"))
            for i in range(*keep):
                assert before[0][i] is not None
                assert before[1][i] is not None
                data[side][i] = (before[0][i], before[1][i])
            for i in range(*give):
                data[side][i] = None
        order.append((pair, [positions[lower], positions[upper]]))
        positions[lower] += 1
        positions[upper] += 1
    assert positions == [len(levels) for levels in schedules], "the schedules lock each other up"

    # Allgather: the same pairs backward.
    for (lower, upper), (lower_level, upper_level) in reversed(order):
        for side, level, other in ((lower, lower_level, upper), (upper, upper_level, lower)):
            for i in range(*schedules[side][level]["give"]):
                data[side][i] = data[other][i]
    assert data == [[adasum_tree(size)] * numel] * size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 64])
def test_broadcast_trees_reach_every_rank_once_from_every_root(size: int) -> None:
    for root in range(size):
        places = [testing.broadcast_schedule(rank, size, root) for rank in range(size)]
        assert places[root][0] == -1
        for rank, (parent, children) in enumerate(places):
            assert rank == root or rank in places[parent][1]
            assert all(places[child][0] == rank for child in children)
        reached, rounds, told = [root], 0, {root}
        while len(told) < size:
            children = [child for rank in reached for child in places[rank][1]]
            assert not told.intersection(children)
            assert len(children) == len(set(children))
            assert children
            told.update(children)
            reached, rounds = children, rounds + 1
        assert rounds <= max(0, size - 1).bit_length()


def test_shards_follow_each_other_in_rank_order_and_cover_everything() -> None:
    for size, numel in itertools.product(SIZES, NUMELS):
        end = 0
        lengths = []
        for rank in range(size):
            begin, stop = testing.shard_of(numel, rank, size)
            assert begin == end
            assert stop >= begin
            end = stop
            lengths.append(stop - begin)
        assert end == numel
        # All as long as the first, but for the last one that has anything, and none that is longer.
        filled = [length for length in lengths if length]
        assert all(length == lengths[0] for length in filled[:-1])
        assert lengths[0] == max(lengths)
        assert lengths[0] * size < numel + 16 * size + 16


@pytest.mark.parametrize(
    "numels",
    [[], [0], [1], [0, 0, 40, 0, 17], [16, 16], [5] * 100, [2**33 + 5, 1, 2**33]],
)
def test_tensors_lie_one_after_the_other_on_cache_lines(numels: list[int]) -> None:
    segments, numel = testing.lay_out(numels)
    assert [count for _, count in segments] == numels
    end = 0
    for offset, count in segments:
        assert offset == end
        end = offset + -(-count // 16) * 16
    assert numel == end
