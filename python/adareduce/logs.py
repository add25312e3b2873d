"""The logger "adareduce": every line names its rank."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading

from adareduce import _core

logger = logging.getLogger("adareduce")


def set_up(rank: int, size: int, level: int) -> None:
    """Gives the logger a handler that writes to stderr, unless the program gave it one."""
    logger.setLevel(level)
    if any(not isinstance(handler, _RankHandler) for handler in logger.handlers):
        return
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(_RankHandler(rank, size))
    logger.propagate = False


class _RankHandler(logging.StreamHandler):  # type: ignore[type-arg]
    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        host = socket.gethostname().replace("%", "%%")
        prefix = f"[%(asctime)s rank {rank} of {size} on {host}]"
        self.setFormatter(logging.Formatter(f"{prefix} adareduce %(levelname)s: %(message)s"))


class EventThread:
    """Logs what the engine's worker reports. Sleeps in between."""

    def __init__(self, engine: _core.Engine) -> None:
        self._engine = engine
        self._thread = threading.Thread(target=self._run, name="adareduce-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when everything reported so far has been logged."""
        self._engine.close_log()
        self._thread.join()

    def _run(self) -> None:
        while True:
            event = self._engine.next_event(3600.0)
            if event is not None:
                level, text = event
                logger.log(getattr(logging, level), text)
                if level == "FATAL":
                    _end_process()
            elif self._engine.is_log_closed():
                return


def _end_process() -> None:
    # A thread is in a call of NCCL that nothing can end, such as the making of a communicator one
    # of whose ranks has died. An exception would never reach it, and an ordinary exit would wait.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a pipe that nobody reads any more
            stream.flush()
    os._exit(1)
