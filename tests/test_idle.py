"""A job that waits for its user costs nothing."""

from __future__ import annotations

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


@pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
@pytest.mark.slow
@pytest.mark.openmpi_round
@pytest.mark.parametrize("workers", [1, 3])
def test_an_idle_job_uses_no_cpu(workers: int) -> None:
    variables = {"ADAREDUCE_WORKERS": str(workers)}
    result = mpirun.run(2, mpirun.script(PROGRAM), limit=120.0, variables=variables)
    assert result.returncode == 0, str(result)
    for rank, out in enumerate(result.out):
        assert float(out) < MOST_CPU_SECONDS, f"rank {rank} used {out.strip()} s of CPU"
