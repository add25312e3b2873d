"""What users set through environment variables.

Horovod's names are understood where the meaning is the same; ours win where both are set.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from adareduce.ops import CudaPath

# Small enough that a large model has several buckets, whose reductions overlap with backward; large
# enough that a message's latency does not count.
DEFAULT_FUSION_THRESHOLD = 16 * 2**20
MOST_WORKERS = 64  # Workers::kMost in csrc/collectives/workers.h

_NEVER = 1e9  # seconds, 30 years

_LOG_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}
_CUDA_PATHS = (CudaPath.auto, CudaPath.nccl, CudaPath.peer, CudaPath.staged)


@dataclass(frozen=True)
class Settings:
    """How long to wait, how much to say, how much to send at once.

    Attributes:
        warn_after: Seconds after which a wait for other ranks is reported, and again after as long.
            ADAREDUCE_WARN_AFTER_SECONDS, HOROVOD_STALL_CHECK_TIME_SECONDS.
        fail_after: Seconds after which it becomes an error.
            ADAREDUCE_FAIL_AFTER_SECONDS, HOROVOD_STALL_SHUTDOWN_TIME_SECONDS; 0 means never.
        log_level: Of the logger "adareduce". ADAREDUCE_LOG_LEVEL, HOROVOD_LOG_LEVEL.
        fusion_threshold: Bytes of gradients that an optimizer puts into one request; 0: a request
            for each parameter. ADAREDUCE_FUSION_THRESHOLD, HOROVOD_FUSION_THRESHOLD.
        cuda_path: How CUDA tensors travel: auto, nccl, peer or staged; what was asked for is taken
            or is an error. ADAREDUCE_CUDA_PATH.
        shared_memory: Whether ranks of one node meet in shared memory, where they can; the others
            follow a rank that does not. ADAREDUCE_SHARED_MEMORY: on or off.
        workers: Threads of this rank that share the work of a large call in shared memory, the
            caller's among them: 1 to 64. Ranks may differ. ADAREDUCE_WORKERS.
    """

    warn_after: float = 60.0
    fail_after: float = 600.0
    log_level: int = logging.WARNING
    fusion_threshold: int = DEFAULT_FUSION_THRESHOLD
    cuda_path: CudaPath = CudaPath.auto
    shared_memory: bool = True
    workers: int = 1

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Reads the variables.

        Raises:
            ValueError: A variable is not of its form; names it and its value.
        """
        return cls(
            warn_after=_seconds(
                environ, "ADAREDUCE_WARN_AFTER_SECONDS", "HOROVOD_STALL_CHECK_TIME_SECONDS", 60.0
            ),
            fail_after=_seconds(
                environ,
                "ADAREDUCE_FAIL_AFTER_SECONDS",
                "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS",
                600.0,
            ),
            log_level=_log_level(environ),
            fusion_threshold=_bytes(
                environ,
                "ADAREDUCE_FUSION_THRESHOLD",
                "HOROVOD_FUSION_THRESHOLD",
                DEFAULT_FUSION_THRESHOLD,
            ),
            cuda_path=_cuda_path(environ),
            shared_memory=_switch(environ, "ADAREDUCE_SHARED_MEMORY", True),
            workers=_workers(environ),
        )


def _first_set(environ: Mapping[str, str], *names: str) -> tuple[str, str] | None:
    for name in names:
        if environ.get(name):
            return name, environ[name]
    return None


def _seconds(environ: Mapping[str, str], ours: str, horovods: str, default: float) -> float:
    found = _first_set(environ, ours, horovods)
    if found is None:
        return default
    name, text = found
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"{name} must be a number of seconds, 0 or more, got {text!r}")
    return min(seconds, _NEVER) if seconds > 0 else _NEVER


def _bytes(environ: Mapping[str, str], ours: str, horovods: str, default: int) -> int:
    found = _first_set(environ, ours, horovods)
    if found is None:
        return default
    name, text = found
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{name} must be a number of bytes, 0 or more, got {text!r}")
    return int(text)


def _log_level(environ: Mapping[str, str]) -> int:
    found = _first_set(environ, "ADAREDUCE_LOG_LEVEL", "HOROVOD_LOG_LEVEL")
    if found is None:
        return logging.WARNING
    name, text = found
    if text.lower() not in _LOG_LEVELS:
        raise ValueError(f"{name} must be one of {', '.join(_LOG_LEVELS)}, got {text!r}")
    return _LOG_LEVELS[text.lower()]


def _cuda_path(environ: Mapping[str, str]) -> CudaPath:
    found = _first_set(environ, "ADAREDUCE_CUDA_PATH")
    if found is None:
        return CudaPath.auto
    name, text = found
    choices = {path.name: path for path in _CUDA_PATHS}
    if text.lower() not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {text!r}")
    return choices[text.lower()]


def _workers(environ: Mapping[str, str]) -> int:
    found = _first_set(environ, "ADAREDUCE_WORKERS")
    if found is None:
        return 1
    name, text = found
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9
    if not is_number or not 1 <= int(text) <= MOST_WORKERS:
        raise ValueError(f"{name} must be a number of threads, 1 to {MOST_WORKERS}, got {text!r}")
    return int(text)


def _switch(environ: Mapping[str, str], name: str, default: bool) -> bool:
    found = _first_set(environ, name)
    if found is None:
        return default
    text = found[1].lower()
    if text not in ("on", "off"):
        raise ValueError(f"{name} must be on or off, got {found[1]!r}")
    return text == "on"
