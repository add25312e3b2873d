"""The life of a job: init, shutdown, who is there, and what happens when a process ends.

There is one engine per process. Everything here is about when it comes and goes; what it does
stands in ``csrc/engine``.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Literal

from adareduce import _core, cuda_library, logs, mpi_library
from adareduce.ops import CudaPath
from adareduce.settings import Settings

HorovodInternalError = _core.HorovodInternalError

_ORDERLY_EXIT = "its program has ended"
# How long the survivors of a broken job get to print their own errors before the job is ended.
_LAST_WORDS_SECONDS = 2.0
_TURN_SECONDS = 0.5
_MOST_TURNS = 8
_WAIT_SECONDS = 0.2  # between two looks for Ctrl-C; waits themselves cost nothing


@dataclass(frozen=True)
class ChosenPath:
    """How the CUDA tensors of a process set travel.

    Attributes:
        path: Not ``auto``; the same on all ranks.
        why: In one line.
        device: This rank's GPU, as torch counts them. A process set serves one.
    """

    path: CudaPath
    why: str
    device: int


class ProcessSet:
    """Some of the ranks of a job, for collectives among them.

    Args:
        ranks: Global ranks, increasing. At ``init(process_sets=...)`` or ``add_process_set``, both
            collective over all ranks, the set becomes usable.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks: list[int] = [int(rank) for rank in ranks]
        self.process_set_id: int | None = None
        self.names_in_use: set[str] = set()
        self.num_reducers = 0  # numbers the names of their requests
        self.cuda: ChosenPath | None = None  # since its first call with CUDA tensors

    def size(self) -> int:
        """Number of ranks in the set."""
        return len(self.ranks)

    def rank(self) -> int:
        """Place of this rank in the set.

        Raises:
            ValueError: This rank is not in the set, or init() was not called.
        """
        if not self.included():
            raise ValueError(f"rank {rank()} is not in the process set of ranks {self.ranks}")
        return self.ranks.index(rank())

    def included(self) -> bool:
        """Whether this rank is in the set."""
        return rank() in self.ranks

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


global_process_set = ProcessSet([])


@dataclass
class _Job:
    """What lives between init and shutdown."""

    engine: _core.Engine
    log: logs.EventThread
    cuda_path: CudaPath = CudaPath.auto  # wanted
    has_cuda: bool = False  # the engine has the module _cuda
    process_sets: list[ProcessSet] = field(default_factory=list)


@dataclass
class _Process:
    """What lives as long as the process."""

    job: _Job | None = None
    mpi: ModuleType | None = None  # mpi4py.MPI, once loaded
    owns_mpi: bool = False  # init() initialised it and must finalise it
    is_broken: bool = False  # a rank is lost: MPI_Finalize would wait for it for ever
    error: str | None = None  # the exception that ends this process
    hooks_are_set: bool = False
    forked_from: int | None = None


_process = _Process()
_lock = threading.RLock()


def init(
    comm: Sequence[int] | Any | None = None,
    process_sets: Sequence[ProcessSet] | Literal["dynamic"] | None = None,
) -> None:
    """Connects this process with the other ranks. Collective, blocks; a second call does nothing.

    Under mpirun the ranks are those of MPI. A process that was not started by a launcher is a job
    of one rank; it needs no MPI if none was built in.

    Args:
        comm: None for all ranks; a list of ranks, increasing, that form the job (call it on those
            only); or an mpi4py communicator, which is duplicated.
        process_sets: Sets to make at once, as ``add_process_set`` does. "dynamic" is accepted: sets
            can always be added.

    Raises:
        ValueError: ``comm`` or a setting in the environment is not of its form.
        RuntimeError: There is no usable MPI, or two.
        HorovodInternalError: A rank did not come within ADAREDUCE_FAIL_AFTER_SECONDS.
    """
    with _lock:
        if _process.job is not None:
            return
        _check_not_forked()
        settings = Settings.from_environment()
        _set_hooks()
        try:
            engine = _connect(comm, settings)
        except HorovodInternalError:
            _process.is_broken = True
            raise
        if comm is None and engine.size == 1:
            _check_not_scattered()
        logs.set_up(engine.rank, engine.size, settings.log_level)
        _process.job = _Job(engine, logs.EventThread(engine), settings.cuda_path)
        _process.is_broken = False
        _adopt_process_set(global_process_set, list(range(engine.size)), 0)
        if process_sets is not None and process_sets != "dynamic":
            for process_set in process_sets:
                add_process_set(process_set)


def _connect(comm: Sequence[int] | Any | None, settings: Settings) -> _core.Engine:
    core_settings = _core.Settings(
        warn_after=settings.warn_after,
        fail_after=settings.fail_after,
        shared_memory=settings.shared_memory,
        workers=settings.workers,
    )
    if comm is None and mpi_library.expected() is None and mpi_library.launcher() is None:
        return _core.Engine.over_threads(_core.ThreadWorld(1), 0, core_settings)

    was_initialised = "mpi4py.MPI" in sys.modules and sys.modules["mpi4py.MPI"].Is_initialized()
    mpi = mpi_library.load()
    if _process.mpi is None:
        _process.mpi = mpi
        _process.owns_mpi = not was_initialised
    if mpi.Is_finalized():
        raise RuntimeError("init: MPI has been finalised and cannot be initialised again")
    from adareduce import _mpi

    communicator, ranks = mpi.COMM_WORLD, []
    if isinstance(comm, mpi.Comm):
        if comm == mpi.COMM_NULL:
            raise ValueError("init: comm must be a communicator, got MPI.COMM_NULL")
        communicator = comm
    elif comm is not None:
        ranks = _check_ranks("init: comm", comm, mpi.COMM_WORLD.Get_size())
        if mpi.COMM_WORLD.Get_rank() not in ranks:
            raise ValueError(
                f"init: comm must contain the calling rank {mpi.COMM_WORLD.Get_rank()}, got {ranks}"
            )
    if mpi.Get_library_version().startswith("MPICH"):
        _outlive_peers()
    return _core.Engine.over_mpi(_mpi.plugin(), mpi._handleof(communicator), ranks, core_settings)


def _outlive_peers() -> None:
    # MPICH's mpirun -disable-auto-cleanup tells survivors of a death by SIGUSR1, whose default is
    # to die as well. The engine notices deaths by itself.
    with contextlib.suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, lambda signum, frame: None)


def _check_not_scattered() -> None:
    # Launchers that are no mpirun leave each process alone where MPI does not speak their language.
    for sign, variable in (
        ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
        ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
    ):
        size = os.environ.get(variable, "")
        if sign in os.environ and size.isdecimal() and int(size) > 1:
            raise RuntimeError(
                f"init: a launcher started {size} processes ({variable}={size}), but each became a"
                " job of one; start them with the mpirun of the MPI that python -m adareduce.info"
                " names"
            )


def _check_ranks(argument: str, ranks: Sequence[int], size: int) -> list[int]:
    try:
        checked = [operator.index(rank) for rank in ranks]
    except TypeError as error:
        raise ValueError(
            f"{argument} must be a list of ranks or an mpi4py communicator, got {ranks!r}"
        ) from error
    is_increasing = all(a < b for a, b in itertools.pairwise(checked))
    if not checked or not is_increasing or checked[0] < 0 or checked[-1] >= size:
        raise ValueError(f"{argument} must hold increasing ranks in [0, {size}), got {checked}")
    return checked


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Makes a process set usable. Collective over all ranks of the job, in one order; blocks.

    Args:
        process_set: A set, or its ranks.

    Returns:
        The set.

    Raises:
        ValueError: A set of these ranks exists, or the ranks are not increasing ranks of the job.
    """
    job = current_job()
    with rejected_on_all_ranks(global_process_set, is_barrier=True):
        if not isinstance(process_set, ProcessSet):
            process_set = ProcessSet(process_set)
        ranks = _check_ranks("add_process_set: ranks", process_set.ranks, job.engine.size)
        for other in job.process_sets:
            if other.ranks == ranks:
                raise ValueError(f"add_process_set: ranks {ranks} are those of {other} already")
    process_set_id = job.engine.add_process_set(ranks)
    _adopt_process_set(process_set, ranks, process_set_id)
    return process_set


def _adopt_process_set(process_set: ProcessSet, ranks: list[int], process_set_id: int) -> None:
    process_set.ranks = ranks
    process_set.process_set_id = process_set_id
    process_set.names_in_use = set()
    process_set.num_reducers = 0
    process_set.cuda = None
    current_job().process_sets.append(process_set)


def shutdown() -> None:
    """Leaves the job. Collective; blocks until every rank has called it or has ended.

    Runs by itself when the program ends. A rank that is still computing may take its time; one that
    is lost is reported after ADAREDUCE_FAIL_AFTER_SECONDS. Afterwards init() works again.
    """
    with _lock:
        if _process.job is not None:
            _leave(_process.job, "it has called shutdown()", is_orderly=True)


def _leave(job: _Job, reason: str, *, is_orderly: bool) -> None:
    try:
        for handle in job.engine.leave(reason=reason, is_orderly=is_orderly):
            while not handle.wait_for(_WAIT_SECONDS):
                pass
        breakage = job.engine.breakage()
    except KeyboardInterrupt:
        breakage = "interrupted while waiting for the other ranks"
    if breakage:
        _process.is_broken = True
        logs.logger.info("shutdown: %s", breakage)
    _process.job = None
    for process_set in job.process_sets:
        process_set.process_set_id = None
    job.log.stop()
    job.engine.stop()


def current_job() -> _Job:
    """The running job.

    Raises:
        ValueError: init() was not called, or not in this process.
    """
    job = _process.job
    if job is None:
        _check_not_forked()
        raise ValueError("adareduce has not been initialised; call hvd.init() first")
    return job


def choose_cuda_path(process_set: ProcessSet, device: int) -> ChosenPath:
    """Asks the engine how CUDA tensors of a process set travel. Collective; blocks the first time.

    Raises:
        ValueError: There is no CUDA in this build.
        HorovodInternalError: What ADAREDUCE_CUDA_PATH asks for is not possible, the ranks disagree,
            or one is lost.
    """
    job = current_job()
    if process_set.process_set_id is None:
        raise ValueError(f"process_set must be added with add_process_set, got {process_set}")
    if not job.has_cuda:
        if job.cuda_path == CudaPath.staged and not cuda_library.is_built():
            return ChosenPath(CudaPath.staged, "ADAREDUCE_CUDA_PATH is staged", device)
        try:
            module = cuda_library.load()
        except ImportError as error:
            raise ValueError(str(error)) from error
        job.engine.attach_cuda(module.plugin(), job.cuda_path)
        job.has_cuda = True
    code, why = job.engine.cuda_path(process_set.process_set_id, device)
    return ChosenPath(CudaPath(code), why, device)


def is_initialized() -> bool:
    """Whether init() has been called and shutdown() has not."""
    return _process.job is not None


def rank() -> int:
    """This process among all of the job, in [0, size())."""
    return current_job().engine.rank


def size() -> int:
    """Number of ranks of the job."""
    return current_job().engine.size


def local_rank() -> int:
    """This process among those of its node, in [0, local_size())."""
    return current_job().engine.local_rank


def local_size() -> int:
    """Number of ranks on this node."""
    return current_job().engine.local_size


def cross_rank() -> int:
    """This node among those that have a rank with this local_rank."""
    return current_job().engine.cross_rank


def cross_size() -> int:
    """Number of nodes that have a rank with this local_rank."""
    return current_job().engine.cross_size


def is_homogeneous() -> bool:
    """Whether every node holds the same number of ranks."""
    return current_job().engine.is_homogeneous


def nccl_built() -> int:
    """NCCL's version code, such as 22809 for 2.28.9, of the library that CUDA tensors would use.

    0 in builds without CUDA, or where there is no NCCL. Loads NCCL and asks CUDA for its devices,
    so call it after processes have been forked, not before.
    """
    if not cuda_library.is_built():
        return 0
    return int(cuda_library.load().describe()["nccl_version"])


def cuda_built() -> bool:
    """Whether this build has CUDA kernels, also where there is no GPU. Loads nothing."""
    return cuda_library.is_built()


def rocm_built() -> bool:
    """Whether this build has ROCm kernels: no."""
    return False


def gloo_built() -> bool:
    """Whether this build has Gloo: no."""
    return False


def gloo_enabled() -> bool:
    """Whether the running job uses Gloo: no."""
    return False


def ddl_built() -> bool:
    """Whether this build has IBM's DDL: no."""
    return False


def ccl_built() -> bool:
    """Whether this build has oneCCL: no."""
    return False


def mpi_built() -> bool:
    """Whether this build has MPI."""
    return mpi_library.expected() is not None


def mpi_enabled() -> bool:
    """Whether the running job uses MPI."""
    return current_job() is not None and _process.mpi is not None


def mpi_threads_supported() -> bool:
    """Whether MPI lets several threads call it: always, since init() insists."""
    return mpi_enabled()


# ---- the end of the process ---------------------------------------------------------------------


def _set_hooks() -> None:
    if _process.hooks_are_set:
        return
    _process.hooks_are_set = True
    previous = sys.excepthook

    def remember_error(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        _process.error = f"{kind.__name__}: {error}" if str(error) else kind.__name__
        previous(kind, error, traceback)

    sys.excepthook = remember_error
    atexit.register(_at_exit)
    os.register_at_fork(after_in_child=_forget_after_fork)


def _at_exit() -> None:
    if _process.forked_from is not None:
        return
    _flush_streams()
    job = _process.job
    if job is not None:
        error = _process.error
        if error is not None and job.engine.size > 1 and not job.engine.breakage():
            logs.logger.warning(
                "ending because of %s; telling the other ranks at their next collective (Ctrl-C:"
                " at once)",
                error,
            )
        _leave(job, error or _ORDERLY_EXIT, is_orderly=error is None)
    mpi = _process.mpi
    if mpi is None or mpi.Is_finalized():
        return
    if not _process.is_broken:
        if _process.owns_mpi:
            mpi.Finalize()
        return
    # The lost rank cannot take part in Finalize, so the job is aborted. The other survivors are
    # given time to say what they saw, and one rank aborts before the others try: several at once
    # make Open MPI's launcher hang.
    _flush_streams()
    if os.environ.get("OMPI_MCA_mpi_ft_enable") == "1":  # noqa: SIM112
        # mpirun --with-ft ulfm spares survivors, and returns 0 where the last of them aborts.
        os._exit(1)
    turn = min(mpi.COMM_WORLD.Get_rank(), _MOST_TURNS)
    time.sleep(_LAST_WORDS_SECONDS + turn * _TURN_SECONDS)
    mpi.COMM_WORLD.Abort(1)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a pipe that nobody reads any more
            stream.flush()


def _forget_after_fork() -> None:
    # Neither the worker thread nor MPI exist here. The objects must not be destroyed either: their
    # destructors would wait for that thread.
    job = _process.job
    if job is not None or _process.mpi is not None:
        _process.forked_from = os.getppid()
    if job is not None:
        job.engine.forget()
        _process.job = None
        global_process_set.process_set_id = None


def _check_not_forked() -> None:
    if _process.forked_from is not None:
        raise ValueError(
            f"adareduce was initialised in process {_process.forked_from}, of which this one is a"
            " fork; only the original can communicate (start processes before init(), or with the"
            " spawn method)"
        )


class rejected_on_all_ranks:  # noqa: N801
    """Around the checks and the submission of one call: a mistake raises on the other ranks too.

    A call that raises here takes its place in the sequence of calls, so that the others, who may
    have made a correct one, do not wait for it.
    """

    __slots__ = ("_is_barrier", "_process_set")

    def __init__(self, process_set: ProcessSet, *, is_barrier: bool = False) -> None:
        self._process_set = process_set
        self._is_barrier = is_barrier

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, HorovodInternalError):
            reject_call(self._process_set, error, is_barrier=self._is_barrier)
        # Of HorovodInternalError the others know.


def reject_call(
    process_set: ProcessSet, error: Exception, *, count: int = 1, is_barrier: bool = False
) -> None:
    """Takes the place of ``count`` calls that this rank will not make, because of ``error``."""
    job = _process.job
    process_set_id = getattr(process_set, "process_set_id", None)
    if job is None or process_set_id is None:
        return
    for _ in range(count):
        job.engine.reject(
            process_set=process_set_id,
            is_barrier=is_barrier,
            reason=f"{type(error).__name__}: {error}",
        )
