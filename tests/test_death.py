"""What happens to a job when one of its processes dies, stops, ends early or is a fork.

Oracle: the operating system (exit codes, living processes) and the texts on each rank's stderr.
Times are limits of jobs and wide: the product's own promise is 10 s.
"""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

import mpirun
from mpirun import script

pytestmark = [
    pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI"),
    pytest.mark.openmpi_round,
]
LIMIT = 90.0  # of a job that takes a few seconds: more is a hang
ENDS_WITHIN = 30.0
VICTIM = 1

# Rank VICTIM says that it is ready and sleeps; the others wait for it in an all-reduce.
WAIT_FOR_VICTIM = f"""
hvd.init()
hvd.allreduce(torch.ones(10), name="before")
if hvd.rank() == {VICTIM}:
    mark("ready")
    time.sleep(600)
try:
    hvd.allreduce(torch.ones(10), name="x")
except hvd.HorovodInternalError as error:
    say("SAW", error)
    raise
"""


def assert_ended(result: mpirun.Result) -> None:
    """Ended by itself, not in peace, and nothing of it lives."""
    assert not result.timed_out, str(result)
    assert result.returncode != 0, str(result)
    assert result.left_behind == [], str(result)


def survivors_of(num_ranks: int) -> list[int]:
    return [rank for rank in range(num_ranks) if rank != VICTIM]


def test_a_killed_rank_ends_the_job() -> None:
    with mpirun.Job(3, script(WAIT_FOR_VICTIM)) as job:
        job.wait_for_file("ready")
        job.send_signal(VICTIM, signal.SIGKILL)
        result = job.wait(ENDS_WITHIN)
    assert_ended(result)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_survivors_of_a_killed_rank_raise_and_name_it(num_ranks: int) -> None:
    with mpirun.Job(num_ranks, script(WAIT_FOR_VICTIM), survive=True) as job:
        job.wait_for_file("ready")
        job.send_signal(VICTIM, signal.SIGKILL)
        result = job.wait(ENDS_WITHIN)
    for rank in survivors_of(num_ranks):
        assert f"rank {VICTIM}" in result.out[rank], str(result)
        assert "SAW allreduce(name='x'" in result.out[rank], str(result)
        assert "HorovodInternalError" in result.err[rank] or "TransportError" in result.err[rank]
    assert_ended(result)


@pytest.mark.skipif(mpirun.flavour() != "MPICH", reason="MPICH's way of telling survivors")
def test_the_signal_that_tells_survivors_of_a_death_kills_nobody() -> None:
    program = """
hvd.init()
mark(f"ready.{hvd.rank()}")
while not os.path.exists(os.path.join(os.environ["ADAREDUCE_TEST_FOLDER"], "signalled")):
    time.sleep(0.01)
hvd.allreduce(torch.ones(3))
say("DONE")
"""
    with mpirun.Job(2, script(program)) as job:
        for rank in (0, 1):
            job.wait_for_file(f"ready.{rank}")
            job.send_signal(rank, signal.SIGUSR1)
        (job.folder / "signalled").touch()
        result = job.wait(LIMIT)
    assert result.out == ["DONE\n"] * 2, str(result)
    assert result.returncode == 0, str(result)


def test_survivors_who_compute_hear_of_a_death_at_their_next_call() -> None:
    program = f"""
hvd.init()
if hvd.rank() == {VICTIM}:
    mark("ready")
    time.sleep(600)
while not os.path.exists(os.path.join(os.environ["ADAREDUCE_TEST_FOLDER"], "killed")):
    time.sleep(0.01)
for _ in range(1000):
    try:
        hvd.barrier()
    except hvd.HorovodInternalError as error:
        say("SAW", error)
        raise
"""
    with mpirun.Job(2, script(program), survive=True) as job:
        job.wait_for_file("ready")
        job.send_signal(VICTIM, signal.SIGKILL)
        (job.folder / "killed").touch()
        result = job.wait(ENDS_WITHIN)
    assert "SAW barrier()" in result.out[0], str(result)
    assert f"rank {VICTIM}" in result.out[0], str(result)
    assert_ended(result)


def test_a_rank_that_dies_during_large_messages_is_named() -> None:
    program = f"""
hvd.init()
big = torch.ones(2_000_000)
for i in range(100000):
    if i == 20 and hvd.rank() == {VICTIM}:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        hvd.allreduce(big, op=hvd.Adasum)
    except hvd.HorovodInternalError as error:
        say("SAW", error)
        raise
"""
    result = mpirun.run(3, script(program), limit=LIMIT, survive=True)
    for rank in survivors_of(3):
        assert "SAW allreduce" in result.out[rank], str(result)
        assert f"rank {VICTIM}" in result.out[rank], str(result)
    assert_ended(result)


def test_a_dead_member_of_a_process_set_is_named_by_its_global_rank() -> None:
    program = """
hvd.init()
some = hvd.add_process_set([1, 2])
if hvd.rank() == 2:
    mark("ready")
    time.sleep(600)
if hvd.rank() == 1:
    try:
        hvd.allreduce(torch.ones(3), name="x", process_set=some)
    except hvd.HorovodInternalError as error:
        say("SAW", error)
        raise
"""
    with mpirun.Job(3, script(program), survive=True) as job:
        job.wait_for_file("ready")
        job.send_signal(2, signal.SIGKILL)
        result = job.wait(ENDS_WITHIN)
    # Right behind the call: MPI's own words, which count ranks of the set, may follow.
    assert re.match(r"SAW allreduce\(name='x'.*shape=\(3,\)\): rank 2\b", result.out[1]), str(
        result
    )
    assert_ended(result)


def test_a_death_ends_programs_that_initialised_mpi_themselves() -> None:
    # mpi4py's own MPI_Finalize at exit would wait for the dead rank for ever.
    with mpirun.Job(2, script("import mpi4py.MPI\n" + WAIT_FOR_VICTIM), survive=True) as job:
        job.wait_for_file("ready")
        job.send_signal(VICTIM, signal.SIGKILL)
        result = job.wait(ENDS_WITHIN)
    assert "SAW allreduce(name='x'" in result.out[0], str(result)
    assert_ended(result)


def test_a_stopped_rank_is_named_at_the_deadline() -> None:
    variables = {"ADAREDUCE_WARN_AFTER_SECONDS": "2", "ADAREDUCE_FAIL_AFTER_SECONDS": "4"}
    with mpirun.Job(3, script(WAIT_FOR_VICTIM), variables=variables) as job:
        job.wait_for_file("ready")
        job.send_signal(VICTIM, signal.SIGSTOP)
        for rank in survivors_of(3):
            ended = job.wait_until(lambda rank=rank: "SAW" in job.output("out", rank), ENDS_WITHIN)
            assert ended, str(job.wait(0))
        result = job.wait(ENDS_WITHIN)
    for rank in survivors_of(3):
        assert "gave up after 4 s" in result.out[rank], str(result)
        assert f"rank {VICTIM} does not answer" in result.out[rank], str(result)
        assert "WARNING" in result.err[rank], str(result)
        assert f"rank {VICTIM} does not answer" in result.err[rank], str(result)
    assert_ended(result)


def test_a_late_rank_is_named_with_its_last_call() -> None:
    variables = {"ADAREDUCE_WARN_AFTER_SECONDS": "1", "ADAREDUCE_FAIL_AFTER_SECONDS": "3"}
    result = mpirun.run(2, script(WAIT_FOR_VICTIM), limit=LIMIT, variables=variables)
    assert f"rank {VICTIM} is alive and has not made this call" in result.out[0], str(result)
    assert "its last one was allreduce(name='before'" in result.out[0], str(result)
    assert_ended(result)


ENDINGS = {
    "exception": ("raise RuntimeError('the disk is full')", "RuntimeError: the disk is full"),
    "exit 0": ("sys.exit(0)", "has left"),
    "exit 3": ("sys.exit(3)", "has left"),
    "end of the program": ("pass", "has left"),
    "keyboard interrupt": (
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        "KeyboardInterrupt",
    ),
    "own error in a call": ("hvd.allreduce(torch.ones(3, dtype=torch.bool))", "TypeError"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_one_rank_is_told_to_those_who_wait(ending: str) -> None:
    code, cause = ENDINGS[ending]
    program = f"""
hvd.init()
hvd.allreduce(torch.ones(10), name="before")
if hvd.rank() == {VICTIM}:
    {code}
else:
    try:
        hvd.allreduce(torch.ones(10), name="x")
    except hvd.HorovodInternalError as error:
        say("SAW", error)
        raise
"""
    num_ranks = 3 if ending == "exception" else 2
    result = mpirun.run(num_ranks, script(program), limit=ENDS_WITHIN)
    for rank in survivors_of(num_ranks):
        assert "SAW allreduce(name='x'" in result.out[rank], str(result)
        assert f"rank {VICTIM}" in result.out[rank], str(result)
        assert cause in result.out[rank], str(result)
    assert_ended(result)


def test_an_exception_while_calls_are_pending_ends_the_job() -> None:
    program = f"""
hvd.init()
handles = [hvd.allreduce_async(torch.ones(100_000), name=f"x{{i}}") for i in range(5)]
if hvd.rank() == {VICTIM}:
    raise RuntimeError("the disk is full")
handles += [hvd.allreduce_async(torch.ones(100_000), name=f"y{{i}}") for i in range(5)]
try:
    for handle in handles:
        hvd.synchronize(handle)
except hvd.HorovodInternalError as error:
    say("SAW", error)
    raise
"""
    result = mpirun.run(2, script(program), limit=ENDS_WITHIN)
    assert "SAW allreduce(name='y0'" in result.out[0], str(result)
    assert f"rank {VICTIM} has left: RuntimeError: the disk is full" in result.out[0], str(result)
    assert_ended(result)


def test_ctrl_c_of_the_whole_job_is_prompt() -> None:
    program = """
hvd.init()
if hvd.rank() == 0:
    mark("ready")
    time.sleep(600)
hvd.allreduce(torch.ones(3))
"""
    with mpirun.Job(2, script(program)) as job:
        job.wait_for_file("ready")
        for rank in (0, 1):
            job.send_signal(rank, signal.SIGINT)
        result = job.wait(ENDS_WITHIN)
    for rank in (0, 1):
        assert "KeyboardInterrupt" in result.err[rank], str(result)
    assert_ended(result)


def test_ctrl_c_ends_a_wait_for_a_rank_that_does_not_come() -> None:
    program = """
hvd.init()
if hvd.rank() == 0:
    handle = hvd.allreduce_async(torch.ones(3), name="x")
    mark("ready")
    try:
        hvd.synchronize(handle)
    except KeyboardInterrupt:
        say("INTERRUPTED")
        mark("interrupted")
else:
    folder = os.environ["ADAREDUCE_TEST_FOLDER"]
    while not os.path.exists(os.path.join(folder, "interrupted")):
        time.sleep(0.01)
    hvd.allreduce(torch.ones(3), name="x")
hvd.barrier()
say("DONE")
"""
    with mpirun.Job(2, script(program)) as job:
        job.wait_for_file("ready")
        job.send_signal(0, signal.SIGINT)
        result = job.wait(ENDS_WITHIN)
    assert result.out[0].split() == ["INTERRUPTED", "DONE"], str(result)
    assert result.out[1].split() == ["DONE"], str(result)
    assert result.returncode == 0, str(result)


def test_a_job_that_ends_well_says_nothing_and_returns_0() -> None:
    result = mpirun.run(3, script("hvd.init()\nhvd.allreduce(torch.ones(3))\n"), limit=LIMIT)
    assert result.returncode == 0, str(result)
    assert result.out + result.err + [result.launcher] == [""] * 7, str(result)
    assert result.left_behind == []


def test_a_rank_that_finishes_late_is_awaited() -> None:
    # Rank 0 evaluates for longer than the deadline after everybody else has finished.
    program = """
hvd.init()
hvd.allreduce(torch.ones(3))
if hvd.rank() == 0:
    time.sleep(6)
    say("EVALUATED")
"""
    variables = {"ADAREDUCE_WARN_AFTER_SECONDS": "1", "ADAREDUCE_FAIL_AFTER_SECONDS": "2"}
    result = mpirun.run(2, script(program), limit=LIMIT, variables=variables)
    assert result.returncode == 0, str(result)
    assert result.out[0] == "EVALUATED\n"


def test_init_with_a_missing_rank_raises_at_the_deadline() -> None:
    # mpi4py has initialised MPI everywhere, but the last rank does not call init().
    program = """
from mpi4py import MPI
if MPI.COMM_WORLD.Get_rank() == 2:
    mark("ready")
    time.sleep(600)
try:
    hvd.init()
except hvd.HorovodInternalError as error:
    say("SAW", error)
    raise
"""
    variables = {"ADAREDUCE_FAIL_AFTER_SECONDS": "4"}
    result = mpirun.run(3, script(program), limit=ENDS_WITHIN, variables=variables)
    assert any("SAW" in out and "rank 2" in out for out in result.out[:2]), str(result)
    assert_ended(result)


def test_a_forked_child_is_told_so_and_ends_normally() -> None:
    program = """
hvd.init()
hvd.allreduce(torch.ones(3))
sys.stdout.flush()
child = os.fork()
if child == 0:
    for call in (hvd.rank, hvd.init, hvd.barrier, lambda: hvd.allreduce(torch.ones(3))):
        try:
            call()
        except ValueError as error:
            say("CHILD", error)
    hvd.shutdown()
    say("INITIALISED", hvd.is_initialized())
    sys.exit(0)
_, status = os.waitpid(child, 0)
say("STATUS", status)
hvd.allreduce(torch.ones(3))
"""
    result = mpirun.run(2, script(program), limit=LIMIT)
    assert result.returncode == 0, str(result)
    for out in result.out:
        assert out.count("CHILD adareduce was initialised in process") == 4, str(result)
        assert "INITIALISED False" in out, str(result)
        assert "STATUS 0" in out, str(result)


def test_dataloader_workers_forked_after_init_touch_nothing() -> None:
    program = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.full((3,), float(index))

hvd.init()
total = torch.zeros(3)
for _ in range(3):
    for batch in torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=2):
        total += hvd.allreduce(batch.sum(0), op=hvd.Sum)
say(total.tolist())
"""
    result = mpirun.run(2, script(program), limit=LIMIT)
    assert result.returncode == 0, str(result)
    assert result.out == [f"{[3.0 * 2 * sum(range(64))] * 3}\n"] * 2, str(result)
    assert [err for err in result.err if "adareduce" in err] == [], str(result)


def test_a_program_without_mpirun_is_a_job_of_one_rank() -> None:
    program = "hvd.init()\nsay(hvd.rank(), hvd.size(), hvd.allreduce(torch.ones(2)).tolist())\n"
    result = mpirun.run(0, script(program), limit=LIMIT)
    assert result.returncode == 0, str(result)
    assert result.out == ["0 1 [1.0, 1.0]\n"], str(result)
    assert result.err == [""], str(result)


def test_importing_the_package_does_not_initialise_mpi() -> None:
    program = "say('mpi4py.MPI' in sys.modules, hvd.is_initialized(), hvd.mpi_built())\n"
    result = mpirun.run(0, script(program), limit=LIMIT)
    assert result.out == ["False False True\n"], str(result)


def test_cores_that_all_ranks_would_use_are_mentioned_once() -> None:
    program = """
os.environ.pop("OMP_NUM_THREADS")
torch.set_num_threads(len(os.sched_getaffinity(0)))
hvd.init(); hvd.shutdown(); hvd.init()
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    result = mpirun.run(2, script(program), limit=LIMIT)
    lines = [line for err in result.err for line in err.splitlines() if "OMP_NUM_THREADS" in line]
    assert len(lines) == 1, str(result)
    assert "rank 0 of 2" in lines[0]
    assert result.returncode == 0


def test_the_launcher_helper_sees_what_is_left_behind() -> None:
    # Oracle of the other tests: a daemon that outlives its rank must show.
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n"
    command = [sys.executable, "-c", program]
    with mpirun.Job(0, command) as job:
        result = job.wait(LIMIT)
        assert len(result.left_behind) == 1
        assert job.processes() == {}
