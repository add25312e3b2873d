"""Ranks that share memory: processes, or threads of one process, without MPI and without torch.

`run_ranks(body, processes, *args)` calls `body(member, *args)` on every rank; `processes` says
which ranks are threads of one process. It serves the ranks' all-gathers.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from adareduce import _core

HANG_LIMIT = 60.0  # seconds
BYTES = 10_000  # of a window, where a test does not care

# Which ranks are threads of one process.
LAYOUTS = [[0], [0, 0], [0, 1], [0, 1, 2], [0, 1, 0], [0, 1, 2, 3], [0, 1, 1, 2, 0]]


@dataclass
class End:
    """How a rank has ended: "result", "error" (a text) or "death" (nothing)."""

    kind: str
    value: Any = None


class Member:
    """One rank, and what it does together with the others."""

    def __init__(self, rank: int, size: int, pipe: Connection) -> None:
        self.rank, self.size, self._pipe = rank, size, pipe

    def allgather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes in rank order; ConnectionError where a rank has ended."""
        self._pipe.send(("bytes", mine))
        if not self._pipe.poll(HANG_LIMIT):
            raise TimeoutError("an allgather hangs")
        parts: list[bytes] | None = self._pipe.recv()
        if parts is None:
            raise ConnectionError("a rank has ended")
        return parts

    def barrier(self) -> None:
        self.allgather(b"")


Body = Callable[..., Any]


def _run_rank(body: Body, args: Sequence[Any], rank: int, size: int, pipe: Connection) -> None:
    try:
        pipe.send(("result", body(Member(rank, size, pipe), *args)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, AssertionError):
            text = traceback.format_exc()
        pipe.send(("error", text))
    finally:
        pipe.close()


def _run_process(
    body: Body, args: Sequence[Any], size: int, ranks: list[int], pipes: list[Connection]
) -> None:
    if len(ranks) == 1:  # in the main thread, where signals arrive
        return _run_rank(body, args, ranks[0], size, pipes[0])
    threads = [
        threading.Thread(target=_run_rank, args=(body, args, rank, size, pipe))
        for rank, pipe in zip(ranks, pipes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_ranks(body: Body, processes: Sequence[int], *args: Any) -> list[End]:
    """How every rank has ended. Whoever hangs is killed, and the test fails."""
    # Forked from a process without threads that has imported what takes long.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adareduce._core", "pytest"])
    size = len(processes)
    here, there = zip(*[context.Pipe() for _ in processes], strict=True)
    started = []
    for process in sorted(set(processes)):
        ranks = [rank for rank, its in enumerate(processes) if its == process]
        pipes = [there[rank] for rank in ranks]
        started.append(
            context.Process(target=_run_process, args=(body, args, size, ranks, pipes), daemon=True)
        )
        started[-1].start()
    for pipe in there:
        pipe.close()
    try:
        return _serve(list(here))
    finally:
        for running in started:
            running.join(5.0)
            running.kill()
            running.join()


def _serve(pipes: list[Connection]) -> list[End]:
    """Answers all-gathers until every rank has ended; one that misses a rank fails on the rest."""
    ends: dict[int, End] = {}
    waiting: dict[int, bytes] = {}
    while len(ends) < len(pipes):
        asked = {p: r for r, p in enumerate(pipes) if r not in ends and r not in waiting}
        ready = wait(list(asked), HANG_LIMIT)
        assert ready, f"ranks {list(asked.values())} hang, {list(waiting)} wait"
        for pipe, rank in asked.items():
            if pipe not in ready:
                continue
            try:
                kind, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                ends[rank] = End("death")
                continue
            if kind == "bytes":
                waiting[rank] = value
            else:
                ends[rank] = End(kind, value)
        if ends or len(waiting) == len(pipes):
            parts = None if ends else [waiting[rank] for rank in range(len(pipes))]
            for rank in waiting:
                with contextlib.suppress(BrokenPipeError):  # it has died since: read above, soon
                    pipes[rank].send(parts)
            waiting.clear()
    return [ends[rank] for rank in range(len(pipes))]


def results(ends: Sequence[End]) -> list[Any]:
    """What the bodies have returned; fails where one has not."""
    assert [end.kind for end in ends] == ["result"] * len(ends), ends
    return [end.value for end in ends]


def make_windows(
    member: Member, count: int = BYTES, patience: float = 60.0, gather: Any = None
) -> Any:
    """SharedWindows of all ranks; collective."""
    chosen = gather or member.allgather
    return _core.testing.SharedWindows(member.rank, member.size, count, chosen, patience)


def holdings() -> tuple[list[str], Counter[str]]:
    """What this process maps of the library's memory, and the kinds of what it has open."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line for line in lines if "memfd:adareduce" in line]
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


def read_and_write(member: Member, count: int = BYTES) -> list[bytes]:
    """The first bytes of every window and the last ones, after all have written to all."""
    windows = make_windows(member, count)
    for peer in range(member.size):
        assert windows.read(peer, 0, count) == bytes(count), "new memory is zero"
    member.barrier()
    for peer in range(member.size):  # one byte to each, and the last one of one's own
        windows.write(peer, member.rank, bytes([10 * member.rank + peer]))
    windows.write(member.rank, count - 1, bytes([100 + member.rank]))
    member.barrier()
    seen = [windows.read(peer, 0, member.size) for peer in range(member.size)]
    seen.append(b"".join(windows.read(peer, count - 1, 1) for peer in range(member.size)))
    member.barrier()
    return seen
