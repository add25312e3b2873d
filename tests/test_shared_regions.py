"""Memory that users allocate together and collectives find by its address.

Oracle: intervals in Python; identity numbers that count the allocations.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from adareduce import _core
from memory_ranks import Member, results, run_ranks

testing = _core.testing
Place = tuple[int, int]


def alone(count: int) -> Any:
    return testing.SharedWindows(0, 1, count, lambda mine: [mine])


def test_the_first_and_the_last_byte_of_a_region_are_found_and_none_beyond() -> None:
    regions = testing.SharedRegions()
    region = regions.add(alone(1000))
    start = region.address
    assert region.bytes == 1000
    assert regions.find(start, 1000) == (0, 0)
    assert regions.find(start + 999, 1) == (0, 999)
    assert regions.find(start + 400, 0) == (0, 400), "an empty tensor"
    for address, count in [
        (start - 1, 1),
        (start - 1, 2),
        (start, 1001),
        (start + 999, 2),
        (start + 1000, 0),
        (start + 1000, 1),
        (0, 0),
        (start, -1),
        (start, (1 << 63) - 1),
    ]:
        assert regions.find(address, count) is None, (address - start, count)


def test_each_of_many_regions_is_found(rng: np.random.Generator) -> None:
    regions = testing.SharedRegions()
    sizes = [int(n) for n in rng.integers(1, 20_000, 40)]
    held = {number: regions.add(alone(size)) for number, size in enumerate(sizes)}
    for gone in rng.permutation(40)[:15]:
        del held[int(gone)]
    intervals = [(r.address, r.address + r.bytes, number) for number, r in held.items()]
    low, high = min(i[0] for i in intervals) - 100, max(i[1] for i in intervals) + 100

    def oracle(address: int, count: int) -> Place | None:
        for begin, end, number in intervals:
            if begin <= address < end and address + count <= end:
                return number, address - begin
        return None

    found = 0
    for _ in range(5000):
        # Near regions' borders, where things go wrong, and anywhere.
        begin, end, _number = intervals[int(rng.integers(len(intervals)))]
        near = int(rng.choice([begin, end, int(rng.integers(begin, end))]))
        address = near + int(rng.integers(-3, 4)) if rng.random() < 0.9 else rng.integers(low, high)
        count = int(rng.choice([0, 1, 2, end - begin, int(rng.integers(0, 20_000))]))
        expected = oracle(int(address), count)
        assert regions.find(int(address), count) == expected
        found += expected is not None
    assert found > 500


def test_a_region_is_lost_with_its_last_reference_and_its_number_is_not_used_again() -> None:
    regions = testing.SharedRegions()
    first = regions.add(alone(1000))
    second = regions.add(alone(1000))
    assert (first.id, second.id) == (0, 1)
    address = first.address
    assert regions.find(address, 4) == (0, 0)
    del first
    assert regions.find(address, 4) is None
    third = regions.add(alone(1000))
    assert third.id == 2
    assert regions.find(third.address, 4) == (2, 0), "most often at the address of the first"
    assert regions.find(second.address + 8, 4) == (1, 8)


def test_memory_at_the_address_of_a_lost_region_is_not_found() -> None:
    # The region that was found last is remembered: it must not outlive itself.
    regions = testing.SharedRegions()
    again = 0
    for _ in range(50):
        region = regions.add(alone(1 << 20))
        address = region.address
        assert regions.find(address, 1) is not None
        del region
        unregistered = alone(1 << 20)
        again += unregistered.address_of(0) == address
        assert regions.find(unregistered.address_of(0), 1) is None
        assert regions.find(address, 1) is None
    assert again > 0, "the kernel uses addresses again, or else this test shows nothing"


def test_registries_do_not_find_each_others_regions() -> None:
    one, other = testing.SharedRegions(), testing.SharedRegions()
    region = one.add(alone(100))
    assert one.find(region.address, 1) == (0, 0)
    assert other.find(region.address, 1) is None
    mine = other.add(alone(100))
    assert one.find(mine.address, 1) is None
    assert other.find(mine.address, 1) == (0, 0)
    assert one.find(region.address, 1) == (0, 0)


def test_a_region_outlives_the_registry() -> None:
    regions = testing.SharedRegions()
    windows = alone(100)
    region = regions.add(windows)
    assert regions.find(region.address, 1) == (0, 0)
    del regions
    windows.write(0, 0, b"still here")
    assert (region.id, region.bytes, windows.read(0, 0, 10)) == (0, 100, b"still here")
    del region


def allocate_together(member: Member, sizes: list[list[int]]) -> list[Any]:
    regions = testing.SharedRegions()
    held, seen = [], []
    for counts in sizes:
        count = counts[member.rank]
        windows = testing.SharedWindows(member.rank, member.size, count, member.allgather)
        region = regions.add(windows)
        held.append(region)
        place = regions.find(region.address + count // 2, 1) if count else None
        peers = [windows.address_of(peer) for peer in range(member.size) if peer != member.rank]
        seen.append((region.id, region.bytes, place, [regions.find(a, 1) for a in peers]))
    member.barrier()
    return seen


@pytest.mark.parametrize("processes", [[0], [0, 1], [0, 1, 0], [0, 1, 2, 3, 0]], ids=str)
def test_numbers_of_regions_are_equal_on_all_ranks(processes: list[int]) -> None:
    size = len(processes)
    sizes = [[100 + rank for rank in range(size)], [0] * (size - 1) + [5000], [4096] * size]
    ends = results(run_ranks(allocate_together, processes, sizes))
    for rank, seen in enumerate(ends):
        for number, (identity, count, place, of_peers) in enumerate(seen):
            assert identity == number
            assert count == sizes[number][rank]
            assert place == ((number, count // 2) if count else None)
            assert of_peers == [None] * (size - 1), "a peer's memory is no tensor of this rank"


def test_threads_find_while_others_add_and_free() -> None:
    regions = testing.SharedRegions()
    kept = [regions.add(alone(4096)) for _ in range(3)]
    errors: list[object] = []
    is_over = threading.Event()

    def churn() -> None:
        while not is_over.is_set():
            region = regions.add(alone(4096))
            if regions.find(region.address + 7, 1) != (region.id, 7):
                errors.append(region.id)

    def look() -> None:
        for step in range(20_000):
            region = kept[step % len(kept)]
            if regions.find(region.address + 5, 4) != (region.id, 5):
                errors.append(step)

    churners = [threading.Thread(target=churn) for _ in range(2)]
    lookers = [threading.Thread(target=look) for _ in range(3)]
    for thread in churners + lookers:
        thread.start()
    for thread in lookers:
        thread.join()
    is_over.set()
    for thread in churners:
        thread.join()
    assert not errors
