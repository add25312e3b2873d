"""Memory that ranks of one node share, and what becomes of it when they die.

Oracle: bytes that tell rank and place; the lists of /proc of what a process maps and has open.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memory_ranks import (
    LAYOUTS,
    End,
    Member,
    holdings,
    make_windows,
    read_and_write,
    results,
    run_ranks,
)

MIB = 1 << 20
CLONE_NEWUSER, PR_SET_DUMPABLE = 0x10000000, 4


# --- sharing


@pytest.mark.parametrize("processes", LAYOUTS, ids=str)
def test_every_rank_reads_and_writes_every_window(processes: list[int]) -> None:
    size = len(processes)
    expected = [bytes(10 * writer + peer for writer in range(size)) for peer in range(size)]
    expected.append(bytes(100 + rank for rank in range(size)))
    assert results(run_ranks(read_and_write, processes)) == [expected] * size


def addresses(member: Member) -> list[int]:
    windows = make_windows(member)
    found = [windows.address_of(peer) for peer in range(member.size)]
    member.barrier()
    return found


def test_ranks_of_one_process_have_one_address_for_one_memory() -> None:
    # Race detectors go by addresses.
    first, _, third = results(run_ranks(addresses, [0, 1, 0]))
    assert first == third
    assert len(set(first)) == 3


def sizes_seen(member: Member, sizes: list[int]) -> list[tuple[int, bool]]:
    windows = make_windows(member, sizes[member.rank])
    for peer, count in enumerate(sizes):
        assert windows.read(peer, 0, count) == bytes(count)
    member.barrier()
    return [(windows.bytes_of(p), windows.address_of(p) != 0) for p in range(member.size)]


@pytest.mark.parametrize("sizes", [[64, 0, 5_000_000], [0, 0], [0, 1], [4096, 4097, 0, 0, 1]])
def test_windows_may_differ_in_size_and_be_empty(sizes: list[int]) -> None:
    expected = [(count, count > 0) for count in sizes]
    seen = results(run_ranks(sizes_seen, list(range(len(sizes))), sizes))
    assert seen == [expected] * len(sizes)


def test_more_ranks_than_a_socket_holds_letters() -> None:
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    size = min(max(24, 2 * limit), 64)
    sizes = [8 + rank for rank in range(size)]
    expected = [(count, True) for count in sizes]
    assert results(run_ranks(sizes_seen, [rank % 2 for rank in range(size)], sizes)) == (
        [expected] * size
    )


def nothing_open(member: Member) -> tuple[Counter[str], int, bool]:
    _, before = holdings()
    windows = make_windows(member)
    maps, now = holdings()
    member.barrier()
    del windows
    return now - before, len(maps), holdings() == ([], before)


def test_only_the_mappings_stay_and_they_go_with_the_last_reference() -> None:
    ends = results(run_ranks(nothing_open, [0, 1, 2]))
    assert ends == [(Counter(), 3, True)] * 3


def mapped(member: Member, count: int, what: str) -> list[tuple[int, int]]:
    """Of each rank's window of `count` bytes the address, and the bytes of a line of smaps."""
    windows = make_windows(member, count)
    starts = {f"{windows.address_of(peer):x}": peer for peer in range(member.size)}
    found, peer = [0] * member.size, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            peer = starts.get(line.split("-")[0].lstrip("0"))
        elif line.startswith(f"{what}:") and peer is not None:
            found[peer] = int(line.split()[1]) * 1024
    member.barrier()
    return [(windows.address_of(peer), found[peer]) for peer in range(member.size)]


def kernel() -> tuple[int, ...]:
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert release is not None
    return tuple(map(int, release.groups()))


def test_no_page_is_left_for_the_first_touch() -> None:
    if kernel() < (5, 14):
        pytest.skip("this kernel maps pages one by one")
    for windows in results(run_ranks(mapped, [0, 1, 0], 3 * MIB, "Rss")):
        assert [in_memory for _, in_memory in windows] == [3 * MIB] * 3


def test_large_memory_is_made_of_huge_pages_in_all_processes() -> None:
    thp = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if kernel() < (6, 1) or not thp.exists() or int(thp.read_text()) != 2 * MIB:
        pytest.skip("this kernel has no huge pages of 2 MiB for who asks for them")
    if "[deny]" in thp.with_name("shmem_enabled").read_text():
        pytest.skip("this kernel is told to have no huge pages in shared memory")
    # 16 whole ones, of which some may not be had where memory is in pieces, and a remainder.
    windows = results(run_ranks(mapped, [0, 1, 0], 33 * MIB + 4096, "ShmemPmdMapped"))
    for of_rank in windows:
        assert [address % (2 * MIB) for address, _ in of_rank] == [0] * 3
        assert all(2 * MIB <= huge <= 32 * MIB for _, huge in of_rank)


# --- processes that may not look into each other


def non_dumpable(member: Member) -> list[bytes]:
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0) == 0
    return read_and_write(member)


def in_a_user_namespace(member: Member) -> list[bytes] | None:
    # As containers without privileges do, one for each rank.
    may = ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0
    if not all(part == b"y" for part in member.allgather(b"y" if may else b"n")):
        return None
    return read_and_write(member)


@pytest.mark.parametrize("body", [non_dumpable, in_a_user_namespace])
def test_processes_that_may_not_trace_each_other_share_memory(body: Callable[..., Any]) -> None:
    seen = results(run_ranks(body, [0, 1, 2]))
    if seen[0] is None:
        pytest.skip("this machine allows no user namespaces")
    assert seen == results(run_ranks(read_and_write, [0, 0, 0]))


# --- deaths


def die_in_the_middle(member: Member, when: str) -> None:
    calls = 0

    def gather(mine: bytes) -> list[bytes]:
        nonlocal calls
        calls += 1
        dies = member.rank == 1
        if dies and when == f"before gather {calls}":
            os.kill(os.getpid(), signal.SIGKILL)
        parts = member.allgather(mine)
        if dies and when == f"after gather {calls}":
            os.kill(os.getpid(), signal.SIGKILL)
        return parts

    before = holdings()
    try:
        make_windows(member, patience=1e6, gather=gather)  # it is not time that ends it
    finally:
        assert holdings() == before


@pytest.mark.parametrize("when", ["before gather 1", "after gather 1", "before gather 2"])
def test_a_rank_that_dies_on_the_way_leaves_nothing(when: str) -> None:
    ends = run_ranks(die_in_the_middle, [0, 1, 2], when)
    assert [end.kind for end in ends] == ["error", "death", "error"]
    for end in (ends[0], ends[2]):
        assert end.value == "ConnectionError: a rank has ended"


def outlive_the_creator(member: Member) -> bytes | None:
    windows = make_windows(member)
    windows.write(0, 5, b"%d" % member.rank) if member.rank == 0 else None
    member.barrier()
    if member.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ConnectionError):
        member.barrier()  # it is dead
    windows.write(0, 6, b"written after its death")
    seen: bytes = windows.read(0, 5, 24)
    del windows
    assert holdings()[0] == []
    return seen


def test_memory_outlives_the_process_that_has_made_it() -> None:
    dead, alive = run_ranks(outlive_the_creator, [0, 1])
    assert dead.kind == "death"
    assert alive == End("result", b"0written after its death")


def inodes_of(process: str) -> set[str]:
    """Of the library's memory that a process maps or has open."""
    found: set[str] = set()
    try:
        with open(f"/proc/{process}/maps") as file:
            found.update(line.split()[4] for line in file if "memfd:adareduce" in line)
        for number in os.listdir(f"/proc/{process}/fd"):
            path = f"/proc/{process}/fd/{number}"
            if "memfd:adareduce" in os.readlink(path):
                found.add(str(os.stat(path).st_ino))
    except OSError:  # it has ended meanwhile
        pass
    return found


def all_die(member: Member, place: str) -> None:
    offers: list[bytes] = []

    def gather(mine: bytes) -> list[bytes]:
        parts = member.allgather(mine)
        if not offers:
            offers.extend(parts)
        else:  # all have made and opened everything
            note = f"{offers[member.rank].split()[5].decode()} {' '.join(inodes_of('self'))}"
            Path(place, str(member.rank)).write_text(note)
            member.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return parts

    make_windows(member, gather=gather)


def test_nothing_is_left_when_all_are_killed(tmp_path: Path) -> None:
    ends = run_ranks(all_die, [0, 1, 2], str(tmp_path))
    assert [end.kind for end in ends] == ["death"] * 3
    notes = [Path(tmp_path, str(rank)).read_text().split() for rank in range(3)]
    sockets, inodes = [note[0] for note in notes], set(notes[0][1:])
    assert len(inodes) == 3
    # Memory without a name lives as long as somebody maps it or has it open.
    for process in filter(str.isdigit, os.listdir("/proc")):
        assert not inodes & inodes_of(process)
    names = Path("/proc/net/unix").read_text()
    assert not any(name in names for name in sockets)
