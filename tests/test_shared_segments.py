"""Memory that ranks of one node share: whoever cannot, all of them hear why, and nothing is left.

Oracle: bytes that tell rank and place; the lists of /proc of what a process maps and has open.
"""

from __future__ import annotations

import array
import ctypes
import gc
import os
import re
import resource
import signal
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adareduce import _core
from memory_ranks import LAYOUTS, End, Member, results, run_ranks

BYTES = 10_000
MIB = 1 << 20
CLONE_NEWUSER, PR_SET_DUMPABLE = 0x10000000, 4


def make(member: Member, count: int = BYTES, patience: float = 60.0, gather: Any = None) -> Any:
    chosen = gather or member.allgather
    return _core.testing.SharedWindows(member.rank, member.size, count, chosen, patience)


def holdings() -> tuple[list[str], Counter[str]]:
    """What this process maps of the library's memory, and the kinds of what it has open."""
    gc.collect()
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line]
    kinds: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # that of the list itself
            continue
        kinds[re.sub(r"\d+", "", target)] += 1
    return maps, kinds


def one_text(ends: list[End]) -> str:
    """The SharedMemoryError that all ranks have ended with."""
    assert {end.kind for end in ends} == {"error"}, ends
    texts = {end.value for end in ends}
    assert len(texts) == 1, texts
    text: str = texts.pop()
    assert text.startswith("SharedMemoryError: SharedWindows: the ranks of this node cannot share")
    return text


# --- sharing


def read_and_write(member: Member) -> list[bytes]:
    windows = make(member)
    for peer in range(member.size):
        assert windows.read(peer, 0, BYTES) == bytes(BYTES), "new memory is zero"
    member.barrier()
    for peer in range(member.size):  # one byte to each, and the last one of one's own
        windows.write(peer, member.rank, bytes([10 * member.rank + peer]))
    windows.write(member.rank, BYTES - 1, bytes([100 + member.rank]))
    member.barrier()
    seen = [windows.read(peer, 0, member.size) for peer in range(member.size)]
    seen.append(b"".join(windows.read(peer, BYTES - 1, 1) for peer in range(member.size)))
    member.barrier()
    return seen


@pytest.mark.parametrize("processes", LAYOUTS, ids=str)
def test_every_rank_reads_and_writes_every_window(processes: list[int]) -> None:
    size = len(processes)
    expected = [bytes(10 * writer + peer for writer in range(size)) for peer in range(size)]
    expected.append(bytes(100 + rank for rank in range(size)))
    assert results(run_ranks(read_and_write, processes)) == [expected] * size


def addresses(member: Member) -> list[int]:
    windows = make(member)
    found = [windows.address_of(peer) for peer in range(member.size)]
    member.barrier()
    return found


def test_ranks_of_one_process_have_one_address_for_one_memory() -> None:
    # Race detectors go by addresses.
    first, _, third = results(run_ranks(addresses, [0, 1, 0]))
    assert first == third
    assert len(set(first)) == 3


def sizes_seen(member: Member, sizes: list[int]) -> list[tuple[int, bool]]:
    windows = make(member, sizes[member.rank])
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
    windows = make(member)
    maps, now = holdings()
    member.barrier()
    del windows
    return now - before, len(maps), holdings() == ([], before)


def test_only_the_mappings_stay_and_they_go_with_the_last_reference() -> None:
    ends = results(run_ranks(nothing_open, [0, 1, 2]))
    assert ends == [(Counter(), 3, True)] * 3


def pages_in_memory(member: Member) -> list[int]:
    windows = make(member, 3 * MIB)
    starts = {f"{windows.address_of(peer):x}": peer for peer in range(member.size)}
    found, peer = [0] * member.size, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            peer = starts.get(line.split("-")[0].lstrip("0"))
        elif line.startswith("Rss:") and peer is not None:
            found[peer] = int(line.split()[1]) * 1024
    member.barrier()
    return found


def test_no_page_is_left_for_the_first_touch() -> None:
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert release is not None
    if tuple(map(int, release.groups())) < (5, 14):
        pytest.skip("this kernel maps pages one by one")
    assert results(run_ranks(pages_in_memory, [0, 1, 0])) == [[3 * MIB] * 3] * 3


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


# --- no room


def fail_and_work_on(member: Member, counts: list[int]) -> str:
    before = holdings()
    try:
        make(member, counts[member.rank])
    except _core.SharedMemoryError:
        assert holdings() == before
        read_and_write(member)
        raise
    raise AssertionError("there was room")


@pytest.mark.parametrize("greedy", [[0], [1], [0, 1, 2]], ids=str)
def test_more_than_the_machine_has_raises_on_all_ranks(greedy: list[int]) -> None:
    counts = [1 << 50 if rank in greedy else BYTES for rank in range(3)]
    text = one_text(run_ranks(fail_and_work_on, [0, 1, 2], counts))
    assert f"allocating {sum(counts)} bytes for all ranks, of which " in text


def test_sizes_beyond_all_numbers_raise() -> None:
    text = one_text(run_ranks(fail_and_work_on, [0, 1], [(1 << 63) - 1] * 2))
    assert f"allocating {(1 << 63) - 1} bytes for all ranks" in text
    text = one_text(run_ranks(fail_and_work_on, [0, 1], [BYTES, -1]))
    assert "rank 1: bytes must be 0 or more, got -1" in text


def test_what_fits_each_rank_but_not_all_together_is_refused() -> None:
    half = _core.testing.room_for_shared_memory() * 6 // 10
    text = one_text(run_ranks(fail_and_work_on, [0, 1, 2], [half] * 3))
    assert "bytes for all ranks, of which " in text


def with_limit(member: Member, limited: int, kind: int, count: int) -> None:
    if member.rank == limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which ends the process
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        limit = {resource.RLIMIT_AS: mapped + 8 * MIB, resource.RLIMIT_FSIZE: MIB}[kind]
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    before = holdings()
    own = count if member.rank == 0 else BYTES
    try:
        make(member, own)
    finally:
        if member.rank == limited:
            resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)
        assert holdings() == before


@pytest.mark.parametrize(
    ("limited", "kind", "problem"),
    [
        (0, resource.RLIMIT_AS, f"rank 0: mapping {32 * MIB} bytes: Cannot allocate memory"),
        (1, resource.RLIMIT_AS, f"rank 1: opening the memory of rank 0: mapping {32 * MIB} bytes"),
        (0, resource.RLIMIT_FSIZE, "(ulimit -f) is 1048576: File too large"),
    ],
)
def test_limits_of_one_process_raise_on_all_ranks(limited: int, kind: int, problem: str) -> None:
    text = one_text(run_ranks(with_limit, [0, 1, 2], limited, kind, 32 * MIB))
    assert problem in text
    assert "; rank" not in text, "nobody else has a problem"


def without_descriptors(member: Member, at_gather: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    calls = 0

    def forbid() -> None:
        free = os.dup(0)  # the lowest number that is free
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))

    def gather(mine: bytes) -> list[bytes]:
        nonlocal calls
        calls += 1
        parts = member.allgather(mine)
        if calls == at_gather and member.rank == 1:
            forbid()
        return parts

    before = holdings()
    if at_gather == 0 and member.rank == 1:
        forbid()
    try:
        make(member, 0 if member.rank == 1 else BYTES, gather=gather)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert holdings() == before


@pytest.mark.parametrize(
    ("at_gather", "problem"),
    [
        (0, "rank 1: making a socket for descriptors: Too many open files"),
        (1, "rank 1: rank 0 sent a descriptor that this process could not take (ulimit -n?)"),
    ],
)
def test_a_rank_without_free_descriptors_raises_on_all(at_gather: int, problem: str) -> None:
    assert problem in one_text(run_ranks(without_descriptors, [0, 1, 2], at_gather))


def allocate_among_signals(member: Member) -> int:
    ticks = 0

    def tick(*_: object) -> None:
        nonlocal ticks
        ticks += 1

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        windows = make(member, 64 * MIB)
        while ticks == 0:
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return sum(windows.read(peer, 0, 64 * MIB) != bytes(64 * MIB) for peer in range(member.size))


def test_signals_do_not_disturb_an_allocation() -> None:
    assert results(run_ranks(allocate_among_signals, [0, 1])) == [0, 0]


# --- forgeries and strangers


class Offer:
    """What a rank says before it allocates: "version bytes room token token socket"."""

    def __init__(self, text: bytes) -> None:
        self.words = text.split()
        self.socket = b"\0" + self.words[5]
        self.tokens = int(self.words[3]), int(self.words[4])

    def encode(self) -> bytes:
        return b" ".join(self.words)


def letter(tokens: tuple[int, int], device: int, inode: int, count: int) -> bytes:
    return struct.pack("<7Qq", *tokens, 1, 1, 2, device, inode, count)


def post(to: bytes, text: bytes, descriptor: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
        sender.sendmsg([text], [rights], 0, to)


def with_forged_offers(member: Member, forge: Callable[[Member, list[bytes]], None]) -> None:
    calls = 0

    def gather(mine: bytes) -> list[bytes]:
        nonlocal calls
        calls += 1
        parts = member.allgather(mine)
        if calls == 1:
            forge(member, parts)
            member.barrier()  # forged letters are the first ones
        return parts

    before = holdings()
    try:
        windows = make(member, patience=0.5, gather=gather)
        assert windows.read(1, 0, BYTES) == bytes(BYTES)
        member.barrier()
        del windows
    finally:
        assert holdings() == before


def forge_text(member: Member, parts: list[bytes]) -> None:
    parts[1] = b"windows-0 nonsense"


def forge_bytes(member: Member, parts: list[bytes]) -> None:
    if member.rank == 0:
        offer = Offer(parts[1])
        offer.words[1] = str(BYTES - 1).encode()
        parts[1] = offer.encode()


def forge_token(member: Member, parts: list[bytes]) -> None:
    if member.rank == 0:
        offer = Offer(parts[1])
        offer.words[3] = str(offer.tokens[0] ^ 1).encode()
        parts[1] = offer.encode()


def forge_socket(member: Member, parts: list[bytes]) -> None:
    if member.rank == 0:
        offer = Offer(parts[1])
        offer.words[5] = b"nobody"
        parts[1] = offer.encode()


def forge_descriptor(member: Member, parts: list[bytes]) -> None:
    # With the right token, size and inode; but its size could change, and reading could then kill.
    if member.rank == 2:
        number = os.memfd_create("forged")
        os.truncate(number, -(-BYTES // resource.getpagesize()) * resource.getpagesize())
        status = os.fstat(number)
        text = letter(Offer(parts[1]).tokens, status.st_dev, status.st_ino, BYTES)
        post(Offer(parts[0]).socket, text, number)
        os.close(number)


def forge_inode(member: Member, parts: list[bytes]) -> None:
    if member.rank == 2:
        with open("/proc/self/exe", "rb") as file:
            text = letter(Offer(parts[1]).tokens, 1, 1, BYTES)
            post(Offer(parts[0]).socket, text, file.fileno())


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (forge_text, "rank 1: described its memory in a way that this version does not understand"),
        (forge_bytes, f"rank 0: rank 1 offered {BYTES - 1} bytes and sent {BYTES}"),
        (forge_token, "rank 0: rank 1 was silent for 0.5"),
        (forge_socket, "rank 0: rank 1 has gone"),
        (forge_descriptor, "rank 0: opening the memory of rank 1: what was to be 10000 bytes"),
        (forge_inode, "rank 0: opening the memory of rank 1: what was to be 10000 bytes"),
    ],
)
def test_a_forged_offer_raises_on_all_ranks(forge: Callable[..., None], problem: str) -> None:
    assert problem in one_text(run_ranks(with_forged_offers, [0, 1, 2], forge))


def send_strange_letters(member: Member, parts: list[bytes]) -> None:
    if member.rank == 2:
        with open("/proc/self/exe", "rb") as file:
            for text in (b"", b"hello", letter((1, 2), 3, 4, 5), bytes(1000)):
                post(Offer(parts[0]).socket, text, file.fileno())


def test_letters_of_strangers_are_thrown_away() -> None:
    results(run_ranks(with_forged_offers, [0, 1, 2], send_strange_letters))


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
        make(member, patience=1e6, gather=gather)  # it is not time that ends it
    finally:
        assert holdings() == before


@pytest.mark.parametrize("when", ["before gather 1", "after gather 1", "before gather 2"])
def test_a_rank_that_dies_on_the_way_leaves_nothing(when: str) -> None:
    ends = run_ranks(die_in_the_middle, [0, 1, 2], when)
    assert [end.kind for end in ends] == ["error", "death", "error"]
    for end in (ends[0], ends[2]):
        assert end.value == "ConnectionError: a rank has ended"


def outlive_the_creator(member: Member) -> bytes | None:
    windows = make(member)
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

    make(member, gather=gather)


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
