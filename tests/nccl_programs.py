"""What test_nccl_transport.py runs in processes of their own: nccl_programs.py NAME ARGUMENT...

A program ends with status 0 or an exception. Inputs are small integers, exact in every type, so
that results are compared with NumPy without a tolerance where nothing is divided.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from nccl_ranks import (
    FAKE,
    DeviceError,
    Memory,
    Rank,
    UsageError,
    check,
    decode,
    library,
    run_ranks,
)
from thread_ranks import DTYPES, OPS, STORAGE

FLOATS = ["float16", "bfloat16", "float32", "float64"]
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
REDUCE = {
    "sum": lambda inputs: inputs.sum(axis=0),
    "min": lambda inputs: inputs.min(axis=0),
    "max": lambda inputs: inputs.max(axis=0),
    "product": lambda inputs: inputs.prod(axis=0),
    "average": lambda inputs: inputs.mean(axis=0),
}


def inputs_of(dtype: str, size: int, numel: int) -> np.ndarray:
    """[size][numel], the same wherever it is called. Products of five fit into every type."""
    random = np.random.default_rng([size, numel, DTYPES[dtype]])
    low = 0 if dtype in ("uint8", "bool") else -2
    return random.integers(low, 2 if dtype == "bool" else 3, (size, numel)).astype(np.float64)


def expect(got: np.ndarray, want: np.ndarray, dtype: str, op: str, size: int) -> None:
    if op == "average":
        # 1/size, each product with it and each sum are rounded: no partial sum exceeds 2.
        bound = (2 * size + 1) * EPS[dtype] * 2
        assert np.abs(got.astype(np.float64) - want).max(initial=0.0) <= bound
    else:
        np.testing.assert_array_equal(got.astype(np.float64), want)


def raises(kind: type[Exception], part: str, body: Callable[[], object]) -> str:
    """The text of the error, which contains `part`."""
    with pytest.raises(kind, match=re.escape(part)) as caught:
        body()
    return str(caught.value)


def reductions(size: int) -> None:
    def program(rank: Rank) -> None:
        for op in REDUCE:
            for dtype in DTYPES:
                if not library.can_reduce(OPS[op], DTYPES[dtype]):
                    continue
                for numel in (0, 1, 37):
                    inputs = inputs_of(dtype, size, numel)
                    source = rank.memory(dtype, inputs[rank.rank])
                    target = rank.empty(dtype, numel)
                    rank.all_reduce(source, target, op)
                    rank.all_reduce(source, source, op)
                    rank.synchronize()
                    want = REDUCE[op](inputs)
                    expect(decode(target), want, dtype, op, size)
                    expect(decode(source), want, dtype, op, size)

                    wide = inputs_of(dtype, size, size * numel)
                    source = rank.memory(dtype, wide[rank.rank])
                    target = rank.empty(dtype, numel)
                    rank.reduce_scatter(source.address, target.address, numel, dtype, op)
                    mine = slice(rank.rank * numel, (rank.rank + 1) * numel)
                    rank.synchronize()
                    expect(decode(target), REDUCE[op](wide)[mine], dtype, op, size)
                    place = source.at(rank.rank * numel)
                    rank.reduce_scatter(source.address, place, numel, dtype, op)
                    rank.synchronize()
                    expect(decode(source)[mine], REDUCE[op](wide)[mine], dtype, op, size)

    run_ranks(size, program)


def moves(size: int) -> None:
    def program(rank: Rank) -> None:
        for dtype in DTYPES:
            for numel in (0, 1, 29):
                inputs = inputs_of(dtype, size, numel)
                source = rank.memory(dtype, inputs[rank.rank])
                target = rank.empty(dtype, size * numel)
                rank.all_gather(source.address, target.address, numel, dtype)
                rank.synchronize()
                np.testing.assert_array_equal(decode(target).reshape(size, numel), inputs)
                target.array[:] = 1
                place = target.at(rank.rank * numel)
                target.array[rank.rank * numel :][:numel] = source.array
                rank.all_gather(place, target.address, numel, dtype)
                rank.synchronize()
                np.testing.assert_array_equal(decode(target).reshape(size, numel), inputs)
                nbytes = numel * STORAGE[dtype].itemsize
                for root in range(size):
                    source = rank.memory(dtype, inputs[rank.rank])
                    target = rank.empty(dtype, numel)
                    rank.broadcast(source.address, target.address, nbytes, root)
                    rank.broadcast(source.address, source.address, nbytes, root)
                    rank.synchronize()
                    np.testing.assert_array_equal(decode(target), inputs[root])
                    np.testing.assert_array_equal(decode(source), inputs[root])

    run_ranks(size, program)


def exchanges(size: int) -> None:
    """Every rank sends a different number of bytes to every other, some none, in one exchange."""

    def numel(sender: int, receiver: int) -> int:
        return (sender * 5 + receiver * 3) % 7 * 40000  # more than a socket buffers

    def program(rank: Rank) -> None:
        for _ in range(2):
            outgoing = {
                peer: rank.memory("int32", np.arange(numel(rank.rank, peer)) + 100 * rank.rank)
                for peer in range(size)
                if peer != rank.rank
            }
            incoming = {
                peer: rank.empty("int32", numel(peer, rank.rank))
                for peer in range(size)
                if peer != rank.rank
            }

            def parts(of: dict[int, Memory]) -> list[tuple[int, int, int]]:
                return [(peer, memory.address, 4 * memory.numel) for peer, memory in of.items()]

            rank.start(parts(outgoing), parts(incoming))
            rank.start([], [])
            rank.synchronize()
            for peer, memory in incoming.items():
                want = np.arange(numel(peer, rank.rank)) + 100 * peer
                np.testing.assert_array_equal(decode(memory), want)

    run_ranks(size, program)


def halving(size: int) -> None:
    """The exchanges of recursive halving: each level sends one half and receives the other.

    Ranks beyond a power of two hand everything to their neighbour below and get it back.
    """
    numel = 61

    def program(rank: Rank) -> None:
        inputs = inputs_of("float32", size, numel)
        data, scratch = rank.memory("float32", inputs[rank.rank]), rank.empty("float32", numel)
        power = 1 << (size.bit_length() - 1)
        extra = size - power

        def exchange(peer: int, give: slice, keep: slice, source: Memory, target: Memory) -> None:
            rank.start(
                [(peer, source.at(give.start), 4 * (give.stop - give.start))],
                [(peer, target.at(keep.start), 4 * (keep.stop - keep.start))],
            )
            rank.synchronize()

        everything, nothing = slice(0, numel), slice(0, 0)
        is_folded = rank.rank < 2 * extra and rank.rank % 2 == 1
        if is_folded:
            exchange(rank.rank - 1, everything, nothing, data, scratch)
        else:
            if rank.rank < 2 * extra:
                exchange(rank.rank + 1, nothing, everything, data, scratch)
                data.array += scratch.array
            virtual = rank.rank // 2 if rank.rank < 2 * extra else rank.rank - extra
            physical = [2 * v if v < extra else v + extra for v in range(power)]
            own, levels, distance = everything, [], 1
            while distance < power:
                peer = physical[virtual ^ distance]
                middle = (own.start + own.stop) // 2
                low, high = slice(own.start, middle), slice(middle, own.stop)
                keep, give = (high, low) if virtual & distance else (low, high)
                exchange(peer, give, keep, data, scratch)
                data.array[keep] += scratch.array[keep]
                levels.append((peer, keep, give))
                own, distance = keep, 2 * distance
            for peer, keep, give in reversed(levels):
                exchange(peer, keep, give, data, data)
            if rank.rank < 2 * extra:
                exchange(rank.rank + 1, everything, nothing, data, data)
        if is_folded:
            exchange(rank.rank - 1, nothing, everything, data, data)
        np.testing.assert_array_equal(decode(data), inputs.sum(axis=0))

    run_ranks(size, program)


def groups(size: int) -> None:
    """An all-reduce and an all-gather are one launch; a captured one follows changed inputs."""
    numel = 1000

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.zeros(numel))
        rank.all_reduce(data, data, "sum")  # connects
        scalars = rank.empty("float64", 1)
        gathered = rank.empty("float64", size)
        result = rank.empty("float32", numel)

        def step() -> None:
            rank.begin_group()
            rank.all_reduce(data, result, "sum")
            rank.begin_group()
            rank.all_gather(scalars.address, gathered.address, 1, "float64")
            rank.end_group()
            rank.end_group()

        def set_and_check(factor: int, run: Callable[[], object]) -> None:
            rank.synchronize()
            inputs = factor * inputs_of("float32", size, numel)
            data.array[:] = inputs[rank.rank]
            scalars.array[:] = factor + rank.rank
            run()
            rank.synchronize()
            np.testing.assert_array_equal(decode(result), inputs.sum(axis=0))
            np.testing.assert_array_equal(decode(gathered), factor + np.arange(size))

        set_and_check(1, step)
        rank.begin_capture()
        step()
        graph, nodes = rank.end_capture()
        assert nodes == 1
        for factor in (2, 3, 5):
            set_and_check(factor, lambda: rank.replay(graph))
        set_and_check(7, step)

    run_ranks(size, program)


def mistakes(size: int) -> None:
    """Wrong arguments are refused before NCCL sees them, and the communicator works on."""

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(4))
        short = rank.memory("int16", np.ones(4))
        count = rank.memory("int32", np.ones(4))
        i16 = "all_reduce: dtype must be one that NCCL reduces by Sum, got int16"
        raises(UsageError, i16, lambda: rank.all_reduce(short, short, "sum"))
        raises(
            UsageError,
            "all_reduce: dtype must be one that NCCL reduces by Average, got int32",
            lambda: rank.all_reduce(count, count, "average"),
        )
        raises(UsageError, "Adasum", lambda: rank.all_reduce(data, data, "adasum"))
        raises(
            UsageError,
            "numel must be >= 0, got -1",
            lambda: rank.all_reduce(data, data, "sum", numel=-1),
        )
        raises(
            UsageError,
            f"broadcast: root must be one of the {size} ranks, got {size}",
            lambda: rank.broadcast(data.address, data.address, 16, size),
        )
        raises(
            UsageError,
            f"and not this one, got {rank.rank}",
            lambda: rank.start([(rank.rank, data.address, 16)], []),
        )
        raises(
            UsageError,
            "start: bytes must be >= 0, got -4",
            lambda: rank.start([], [((rank.rank + 1) % size, data.address, -4)]),
        )
        raises(UsageError, "no group is open", rank.end_group)
        raises(UsageError, "nobody has announced", rank.try_receive)
        # What was in the group is forgotten: only so does the last line agree on all ranks.
        if rank.rank == 0:
            rank.begin_group()
            rank.all_reduce(data, data, "sum")
            raises(UsageError, "int16", lambda: rank.all_reduce(short, short, "sum"))
            raises(UsageError, "no group is open", rank.end_group)
            raises(
                UsageError,
                "thrown inside a group",
                lambda: rank.leave_group_by_exception(data),
            )
        assert rank.async_error() == ""
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        np.testing.assert_array_equal(decode(data), np.full(4, size))

    run_ranks(size, program)


def refused_by_nccl() -> None:
    """NCCL's own refusal names rank, call, words, file and line; it ends the group as well."""

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        overlapping = Memory.__new__(Memory)
        overlapping.dtype, overlapping.numel = "float32", 4
        overlapping.address = data.at(2)
        text = raises(
            DeviceError,
            f"rank {rank.rank} of 2: ncclAllReduce(",
            lambda: rank.all_reduce(data, overlapping, "sum", numel=4),
        )
        for part in ("invalid argument", "the buffers overlap", "nccl_communicator.cpp:"):
            assert part in text
        rank.begin_group()
        raises(DeviceError, "overlap", lambda: rank.all_reduce(data, overlapping, "sum", numel=4))
        raises(UsageError, "no group is open", rank.end_group)
        # An argument that NCCL refuses has had no effect.
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        np.testing.assert_array_equal(decode(data), np.full(8, 2))
        # Anything else has.
        rank.begin_group()
        rank.all_reduce(data, data, "sum")
        rank.all_reduce(data, data, "sum")
        raises(DeviceError, "ncclGroupEnd()", rank.end_group)
        raises(DeviceError, "is gone: rank", lambda: rank.all_reduce(data, data, "sum"))
        rank.abort("never mind")
        raises(DeviceError, "ncclGroupEnd()", lambda: rank.all_reduce(data, data, "sum"))

    run_ranks(2, program)


def mismatch(size: int, kind: str) -> None:
    """NCCL would hang or give wrong numbers; the fake says so on every rank that can know."""
    met = threading.Barrier(size, timeout=30)

    def program(rank: Rank) -> str:
        data, other = rank.memory("float32", np.ones(64)), rank.memory("float32", np.ones(64))
        rank.all_reduce(other, other, "sum")
        is_odd = rank.rank == size - 1
        if kind == "count":
            rank.all_reduce(data, data, "sum", numel=6 if is_odd else 5)
        elif kind == "op":
            rank.all_reduce(data, data, "max" if is_odd else "sum")
        elif kind == "root":
            rank.broadcast(data.address, data.address, 256, 1 if is_odd else 0)
        elif kind == "call" and is_odd:
            rank.all_gather(other.address, data.address, 8, "float32")
        elif kind == "bytes":
            peer = (rank.rank + 1) % size
            before = (rank.rank - 1) % size
            nbytes = 40 if is_odd else 44
            rank.start([(peer, data.address, nbytes)], [(before, other.address, 44)])
        else:
            rank.all_reduce(data, data, "sum")
        rank.synchronize()
        met.wait()
        error = rank.async_error()
        # A message concerns two ranks, and only its receiver can know.
        if kind != "bytes" or rank.rank == 0:
            written = other if kind == "bytes" else data
            assert error != ""
            assert (written.array[:5].view(np.uint8) == 0xFF).all()
        rank.abort("the ranks disagree")
        raises(DeviceError, "the ranks disagree", lambda: rank.all_reduce(data, data, "sum"))
        return error

    errors = run_ranks(size, program)
    assert any("invalid usage" in error and "is at" in error for error in errors), errors


def abort_of_a_launch(size: int) -> None:
    """Rank 0 is alone in an all-reduce; another thread aborts, and everything comes to an end."""
    met = threading.Barrier(size, timeout=30)

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        if rank.rank == 0:
            rank.all_reduce(data, data, "sum")
            aborts = [
                threading.Thread(target=rank.abort, args=("rank 1 is silent",)) for _ in range(2)
            ]
            for thread in aborts:
                thread.start()
            rank.synchronize()
            for thread in aborts:
                thread.join()
            assert rank.async_error() == "rank 1 is silent"
            for call in (
                lambda: rank.all_reduce(data, data, "sum"),
                lambda: rank.all_gather(data.address, data.address, 1, "float32"),
                lambda: rank.reduce_scatter(data.address, data.address, 1, "float32", "sum"),
                lambda: rank.broadcast(data.address, data.address, 4, 0),
                lambda: rank.start([], []),
                rank.begin_group,
            ):
                raises(DeviceError, f"rank 0 of {size}: NCCL's communicator is gone: rank 1", call)
            rank.destroy()  # while the others have not even heard of it
        met.wait()
        if rank.rank != 0:
            for _ in range(2):  # the first may find what rank 0 had sent
                rank.all_reduce(data, data, "sum")
                rank.synchronize()
            error = rank.async_error()
            assert "is gone" in error, error
            rank.destroy()

    run_ranks(size, program, destroy=False)


def abort_of_a_call() -> None:
    """The first call of two ranks waits for the peer inside NCCL; an abort frees it."""
    started, ended = threading.Event(), threading.Event()

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        if rank.rank == 0:
            watchdog = threading.Thread(target=lambda: (started.wait(), rank.abort("too long")))
            watchdog.start()
            started.set()
            text = raises(DeviceError, "rank 0 of 2: ", lambda: rank.all_reduce(data, data, "sum"))
            assert "internal error" in text or "too long" in text, text
            watchdog.join()
            raises(DeviceError, "too long", lambda: rank.all_reduce(data, data, "sum"))
            ended.set()
        ended.wait()
        rank.abandon()

    run_ranks(2, program)


def abort_in_a_group() -> None:
    """An abort waits until the thread with an open group has left it, and the group is dropped."""

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        rank.begin_group()
        rank.all_reduce(data, data, "sum")
        if rank.rank == 0:
            rank.abort("from the same thread")
            raises(UsageError, "no group is open", rank.end_group)
        else:
            watchdog = threading.Thread(target=rank.abort, args=("from another",))
            watchdog.start()
            while rank.async_error() == "" and watchdog.is_alive():
                try:
                    rank.all_reduce(data, data, "max", numel=0)
                except DeviceError:
                    break
            watchdog.join()
            assert rank.async_error() == "from another"
            raises(UsageError, "no group is open", rank.end_group)
        raises(DeviceError, "from", lambda: rank.all_reduce(data, data, "sum"))

    run_ranks(2, program)


def abandoned() -> None:
    """A rank that has given up does not wait for the others when it is destroyed."""
    left = threading.Event()

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        if rank.rank == 0:
            rank.abandon()
            rank.destroy()
            left.set()
        else:
            left.wait()
            rank.destroy()

    run_ranks(2, program, destroy=False)


def graphs_stay(size: int, how: str) -> None:
    """NCCL frees no communicator while a graph holds a launch of it; nobody waits for that."""
    met = threading.Barrier(size, timeout=30)

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        rank.all_reduce(data, data, "sum")
        rank.begin_capture()
        rank.all_reduce(data, data, "sum")
        graph, _ = rank.end_capture()
        rank.replay(graph)
        rank.synchronize()
        np.testing.assert_array_equal(decode(data), np.full(8, size**2))
        met.wait()
        if how == "abort":
            rank.abort("enough")
            raises(DeviceError, "enough", lambda: rank.all_reduce(data, data, "sum"))

    run_ranks(size, program)


def asynchronous_error() -> None:
    """Words of an error that happens later; the communicator is aborted when it is destroyed."""
    met = threading.Barrier(2, timeout=30)
    fail = ctypes.CDLL(str(FAKE)).fakeNcclFail

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        assert rank.async_error() == ""
        met.wait()
        if rank.rank == 0:
            fail(0, 2, b"the cable has gone")
            text = rank.async_error()
            assert text == "rank 0 of 2: system error: the cable has gone", text
            rank.abort()
            raises(DeviceError, "the cable has gone", lambda: rank.all_reduce(data, data, "sum"))
        met.wait()
        if rank.rank == 1:
            rank.all_reduce(data, data, "sum")
            rank.synchronize()
            assert "remote error: rank 0 is gone" in rank.async_error()

    run_ranks(2, program)


def capture_elsewhere() -> None:
    """Making, asking and aborting a communicator leaves another thread's capture alone."""
    ready = threading.Barrier(2, timeout=30)

    def program(rank: Rank) -> None:
        single: list[Rank] = []
        data = rank.memory("float32", np.ones(8))
        ready.wait()
        if rank.rank == 0:
            rank.begin_capture(everywhere=True)
            ready.wait()
            ready.wait()
            _, nodes = rank.end_capture()
            assert nodes == 0
            ready.wait()
        else:
            ready.wait()
            single.append(Rank(0, 1, lambda mine: mine, 3))
            assert single[0].async_error() == ""
            single[0].abort()
            Rank(0, 1, lambda mine: mine, 4).destroy()
            ready.wait()
            ready.wait()
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        np.testing.assert_array_equal(decode(data), np.full(8, 2))

    run_ranks(2, program)


def one_gpu(part: str) -> None:
    """Several ranks on one GPU: a sentence, or it works."""
    failed = []

    def program(rank: Rank) -> None:
        data = rank.memory("float32", np.ones(8))
        rank.all_reduce(data, data, "sum")
        rank.synchronize()
        np.testing.assert_array_equal(decode(data), np.full(8, 2))

    try:
        run_ranks(2, program, device_of=lambda rank: 0)
    except DeviceError as error:
        failed.append(str(error))
    if part == "works":
        assert not failed
        return
    assert "ncclCommInitRankConfig(" in failed[0]
    assert "Several ranks share one GPU" in failed[0]
    assert part in failed[0]


def rank_of_a_job(rank: str, size: str, id_file: str) -> None:
    """One process of several; rank 0 tells its id on stdout, the others get it as an argument."""

    def exchange(mine: bytes) -> bytes:
        if rank == "0":
            print(mine.hex(), flush=True)
            return mine
        return bytes.fromhex(id_file)

    made = Rank(int(rank), int(size), exchange)
    inputs = inputs_of("float32", int(size), 5000)
    data = made.memory("float32", inputs[int(rank)])
    made.all_reduce(data, data, "sum")
    made.synchronize()
    np.testing.assert_array_equal(decode(data), inputs.sum(axis=0))
    print("ready", flush=True)
    if sys.stdin.readline().strip() == "go":  # the others are killed or told to go on
        made.all_reduce(data, data, "max")
        made.synchronize()
        text = made.async_error()
        print(text, flush=True)
        if text:
            made.abort(text)
    made.destroy()


def status() -> None:
    path, why_not = ctypes.c_char_p(), ctypes.c_char_p()
    version = library.status(ctypes.byref(path), ctypes.byref(why_not))
    print(version, (path.value or b"").decode(), (why_not.value or b"").decode(), sep="\n")


def status_with_search_path(folder: str) -> None:
    check(library.set_search_path(folder.encode()))
    status()
    raises(
        UsageError,
        "must be called before NCCL is searched for",
        lambda: check(library.set_search_path(b"/")),
    )


def status_with_loaded(*paths: str) -> None:
    for path in paths:
        ctypes.CDLL(path)
    status()


def pure_parts() -> None:
    def versions(*codes: int) -> list[str]:
        return [library.version_text(code).decode() for code in codes]

    assert versions(21801, 22809, 23007, 2708) == ["2.18.1", "2.28.9", "2.30.7", "2.7.8"]
    maps = b"""
7f01-7f02 r-xp 00000000 08:01 11 /opt/a b/libnccl.so.2.28.9
7f02-7f03 r--p 00001000 08:01 11 /opt/a b/libnccl.so.2.28.9
7f03-7f04 r-xp 00000000 08:01 12 /usr/lib/libnccl-net.so
7f04-7f05 r-xp 00000000 08:01 13 /usr/lib/libncclx.so
7f05-7f06 r-xp 00000000 08:02 11 /usr/lib/libnccl.so.2
7f06-7f07 r-xp 00000000 00:00 0
7f07-7f08 r-xp 00000000 08:01 11 /elsewhere/libnccl.so
"""
    found = library.libraries_in(maps).decode().split("\n")[:-1]
    assert found == ["/opt/a b/libnccl.so.2.28.9", "/usr/lib/libnccl.so.2"], found
    can = {
        op: {dtype for dtype in DTYPES if library.can_reduce(OPS[op], DTYPES[dtype])} for op in OPS
    }
    integers = {"uint8", "int8", "int32", "int64"}
    everything = {*integers, "bool", *FLOATS}
    assert can == {
        "average": set(FLOATS),
        "sum": integers | set(FLOATS),
        "adasum": set(),
        "min": everything,
        "max": everything,
        "product": everything,
    }


def make_without_nccl() -> None:
    """All ranks fail alike, and none waits for another."""
    raises(DeviceError, "NCCL cannot be used", lambda: run_ranks(2, lambda rank: None))


if __name__ == "__main__":
    name, *texts = sys.argv[1:]
    is_job = name == "rank_of_a_job"  # whose arguments are words
    globals()[name](*(int(text) if text.isdigit() and not is_job else text for text in texts))
