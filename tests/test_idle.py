"""A job that waits for its user costs nothing."""

from __future__ import annotations

import os

import pytest

import mpirun

IDLE_SECONDS = 20
# The requirement is 1 s per 1,000 s of idling.
MOST_CPU_SECONDS = IDLE_SECONDS / 1000

PROGRAM = f"""
hvd.init()
hvd.allreduce(torch.ones(1000))
hvd.allreduce(torch.ones(1_000_000))  # through slots: wakes the workers, too
hvd.barrier()
begin = time.process_time()  # of all threads, MPI's own included
time.sleep({IDLE_SECONDS})
print(time.process_time() - begin)
"""

LATE_SECONDS = 0.5
LATE_CALLS = 4
# A caller looks busily for some 0.4 ms, and again when the request has become one like any other;
# then it wakes 5,000 times a second for 2 ms, and hands over to the worker. One that went on
# looking would use the whole time.
MOST_LATE_CPU_SECONDS = LATE_CALLS * LATE_SECONDS / 10

LATE_PROGRAM = f"""
from adareduce.runtime import current_job
hvd.init()
looks = lambda: current_job().engine.shared_memory(0).long_looks
for numel in (1000, 1_000_000):
    tensor = torch.ones(numel)
    hvd.allreduce_(tensor)
    used, looked = 0.0, 0
    for _ in range({LATE_CALLS}):
        hvd.barrier()
        if hvd.rank() == 0:
            time.sleep({LATE_SECONDS})
        begin, before = time.process_time(), looks()
        hvd.allreduce_(tensor)
        used += time.process_time() - begin
        looked += looks() - before
    print(used, looked)
"""

needs_mpi = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")


@needs_mpi
@pytest.mark.parametrize("workers", [1, 3])
def test_who_waits_for_a_late_rank_looks_for_long_and_soon_sleeps(workers: int) -> None:
    given = {"ADAREDUCE_WORKERS": str(workers)}
    result = mpirun.run(2, mpirun.script(LATE_PROGRAM), variables=given, limit=120.0)
    assert result.returncode == 0, str(result)
    has_cores = len(os.sched_getaffinity(0)) >= 2 * workers
    for line in result.out[1].splitlines():
        used, looked = line.split()
        assert float(used) < MOST_LATE_CPU_SECONDS, f"{used} s of CPU in {LATE_CALLS} calls"
        # Once in each call as a rule: a call that finds the barrier's request not yet taken down
        # is left to the engine's thread, which never looks for long.
        assert int(looked) > 0 if has_cores else int(looked) == 0


@needs_mpi
@pytest.mark.slow
@pytest.mark.openmpi_round
@pytest.mark.parametrize("workers", [1, 3])
def test_an_idle_job_uses_no_cpu(workers: int) -> None:
    variables = {"ADAREDUCE_WORKERS": str(workers)}
    result = mpirun.run(2, mpirun.script(PROGRAM), limit=120.0, variables=variables)
    assert result.returncode == 0, str(result)
    for rank, out in enumerate(result.out):
        assert float(out) < MOST_CPU_SECONDS, f"rank {rank} used {out.strip()} s of CPU"
