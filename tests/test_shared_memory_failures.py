"""Memory that ranks of one node cannot share: all of them hear why, and nothing is left.

Oracle: one text on all ranks; what /proc says a process maps and has open, before and after.
"""

from __future__ import annotations

import array
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable

import pytest

from adareduce import _core
from memory_ranks import (
    BYTES,
    Member,
    holdings,
    make_windows,
    one_text,
    read_and_write,
    results,
    run_ranks,
)

MIB = 1 << 20


# --- no room


def fail_and_work_on(member: Member, counts: list[int]) -> str:
    before = holdings()
    try:
        make_windows(member, counts[member.rank])
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
        make_windows(member, own)
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
        make_windows(member, 0 if member.rank == 1 else BYTES, gather=gather)
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
        windows = make_windows(member, 64 * MIB)
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
        windows = make_windows(member, patience=0.5, gather=gather)
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
