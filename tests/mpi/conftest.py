"""pytest on several ranks at once: ``mpirun -n P python -m pytest tests/mpi``.

Every rank runs the same tests. After each test the outcomes of all ranks are gathered, so that one
rank's failure fails the test on every rank, with the texts attributed to ranks; rank 0 prints.
A rank whose test fails leaves the job at once, so that the others, who may wait for it in a
collective, are not kept until a deadline; all ranks then begin the next test with a new init().
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from _pytest.runner import runtestprotocol

from adareduce import mpi_library

# For reference.py; behind this folder, whose modules must win.
sys.path.append(str(Path(__file__).resolve().parent.parent))

_LONGEST_TEXT = 20_000
# A test that takes longer hangs: every rank that is in it shows its stacks, then the job ends.
_STACKS_AFTER_SECONDS = float(os.environ.get("ADAREDUCE_TEST_STACKS_AFTER_SECONDS", "90"))
_END_AFTER_SECONDS = _STACKS_AFTER_SECONDS + 5.0

is_under_mpirun = mpi_library.launcher() is not None
if not is_under_mpirun:
    collect_ignore_glob = ["test_*.py"]  # tests/test_mpi_suite.py starts them


@pytest.hookimpl(trylast=True)  # after the terminal has its writer
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "min_ranks(n): needs at least n ranks")
    if is_under_mpirun:
        config.pluginmanager.register(_Gatherer(config), "adareduce-gatherer")


@pytest.fixture
def ranks() -> Any:
    """The channel beside the library: ranks.rank, ranks.size, ranks.gather(value)."""
    return _all_ranks


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """ADAREDUCE_TEST_DEVICE repeats tests as if on a GPU: one of emulated_gpu.MODES."""
    mode = os.environ.get("ADAREDUCE_TEST_DEVICE")
    if not mode or "gpu" in request.fixturenames:
        yield
        return
    from emulated_gpu import emulate

    with emulate(mode):
        yield


@pytest.fixture
def rank() -> int:
    return int(_all_ranks.rank)


@pytest.fixture
def size() -> int:
    return int(_all_ranks.size)


_all_ranks: Any = None


class _Gatherer:
    def __init__(self, config: pytest.Config) -> None:
        global _all_ranks
        os.environ.setdefault("ADAREDUCE_WARN_AFTER_SECONDS", "10")
        os.environ.setdefault("ADAREDUCE_FAIL_AFTER_SECONDS", "20")
        import adareduce.torch as hvd

        hvd.init()
        from all_ranks import AllRanks
        from mpi4py import MPI

        self._all = _all_ranks = AllRanks(MPI)
        # Output is not captured now: stacks go where mpirun collects this rank's stderr.
        self._stderr: TextIO = os.fdopen(os.dup(2), "w")
        if self._all.rank > 0:
            config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: SIM115

    def pytest_report_header(self) -> str:
        from adareduce.info import collect

        return f"ranks: {self._all.size}, MPI: {collect()['mpi'].get('built for')}"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = "\n".join(item.nodeid for item in session.items)
        digests = self._all.gather(hashlib.sha256(names.encode()).hexdigest())
        if len(set(digests)) > 1:
            self._all.end_job("the ranks have collected different tests")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("min_ranks")
        if marker is not None and self._all.size < marker.args[0]:
            pytest.skip(f"needs {marker.args[0]} ranks")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        with self._watchdog(item):
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            failed = [report for report in reports if report.failed]
            if failed:
                _leave_job(f"its test {item.name} has failed")
            must_renew = bool(failed) or _is_unusable(self._all.size)
            mine = (item.nodeid, _outcome(reports), _text(failed), must_renew)
            everyone = self._all.gather(mine, _END_AFTER_SECONDS)
            self._judge(item, reports, everyone)
            if any(theirs for *_, theirs in everyone):
                self._renew()
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _judge(self, item: pytest.Item, reports: list[Any], everyone: list[Any]) -> None:
        if len({nodeid for nodeid, *_ in everyone}) > 1:
            self._all.end_job(f"the ranks run different tests: {everyone}")
        outcomes = [outcome for _, outcome, *_ in everyone]
        if "failed" not in outcomes and len(set(outcomes)) == 1:
            return
        texts = [
            f"======== rank {rank} of {self._all.size}: {outcome} ========\n{text}".rstrip()
            for rank, (_, outcome, text, _) in enumerate(everyone)
            if text
        ]
        if "failed" not in outcomes:
            texts.append(f"the ranks must all skip a test or none, got {outcomes}")
        target = next((r for r in reports if r.failed), None) or next(
            (r for r in reports if r.when == "call"), reports[0]
        )
        target.outcome = "failed"
        target.longrepr = "\n".join(texts)
        target.sections = []

    def _renew(self) -> None:
        import adareduce.torch as hvd

        hvd.shutdown()
        self._all.gather(None)
        hvd.init()

    @contextlib.contextmanager
    def _watchdog(self, item: pytest.Item) -> Iterator[None]:
        why = f"{item.nodeid} takes more than {_END_AFTER_SECONDS:.0f} s on rank {self._all.rank}"
        timer = threading.Timer(_END_AFTER_SECONDS, self._all.end_job, [why])
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(_STACKS_AFTER_SECONDS, file=self._stderr)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()


def _outcome(reports: list[Any]) -> str:
    for outcome in ("failed", "skipped"):
        if any(report.outcome == outcome for report in reports):
            return outcome
    return "passed"


def _text(failed: list[Any]) -> str:
    parts = []
    for report in failed:
        parts.append(f"[{report.when}]\n{report.longreprtext}")
        parts += [f"--- {title} ---\n{content}" for title, content in report.sections]
    text = "\n".join(parts)
    return text if len(text) <= _LONGEST_TEXT else f"...{text[-_LONGEST_TEXT:]}"


def _leave_job(reason: str) -> None:
    from adareduce import runtime

    if runtime.is_initialized():
        runtime.current_job().engine.leave(reason=reason, is_orderly=False)


def _is_unusable(size: int) -> bool:
    """A new init() is needed before the next test; the same answer everywhere is not required."""
    from adareduce import runtime

    if not runtime.is_initialized() or runtime.size() != size:
        return True
    job = runtime.current_job()
    return bool(job.engine.breakage()) or len(job.process_sets) > 1
