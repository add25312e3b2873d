"""Ranks that share memory, and one that dies or stops at any point of its work.

Oracle: the operating system (exit codes, living processes, CPU time) and the survivors' texts.
Times are limits of jobs and wide.
"""

from __future__ import annotations

import re
import signal

import pytest

import mpirun
from mpirun import script

pytestmark = pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
LIMIT = 90.0
ENDS_WITHIN = 30.0
NUM_RANKS = 3
VICTIM = 1
SURVIVORS = [rank for rank in range(NUM_RANKS) if rank != VICTIM]

# Every rank draws the same calls. A timer whose signal nobody handles ends the victim in the middle
# of whatever it does then, as kill -9 would: its code does not run any more.
LOOP = """
import random
hvd.init()
rank, size = hvd.rank(), hvd.size()
calls = random.Random({seed})
places = [hvd.empty_shared(n) for n in (30_000, 400_001)]
hvd.barrier()
if rank == {victim}:
    delay = random.Random({seed} + 1000).uniform(*{delay})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, delay)
done = 0
try:
    while True:
        kind = calls.choice({kinds})
        op = calls.choice([hvd.Sum, hvd.Average, hvd.Adasum, hvd.Max])
        numel = calls.choice([1, 1000, 20_000, 100_003, 1_500_000])
        if kind == "ordinary":
            hvd.allreduce_(torch.ones(numel), op=op)
        elif kind == "group":
            hvd.grouped_allreduce_([torch.ones(numel), torch.ones(7), torch.ones(50_000)], op=op)
        elif kind == "in place":
            hvd.allreduce_(calls.choice(places).fill_(1), op=op)
        elif kind == "broadcast":
            hvd.broadcast_(torch.ones(numel), numel % size)
        elif kind == "gather":
            hvd.allgather(torch.ones(numel))
        elif kind == "barrier":
            hvd.barrier()
        elif kind == "allocate":
            places[calls.randrange(2)] = hvd.empty_shared(numel)
        done += 1
except hvd.HorovodInternalError as error:
    say("SAW", error)
    say("FACTS", done, any("memfd:adareduce" in line for line in open("/proc/self/maps")))
    raise
"""
ALL_KINDS = ["ordinary", "group", "in place", "broadcast", "gather", "barrier", "allocate"]


def loop(seed: int, kinds: list[str], delay: tuple[float, float]) -> list[str]:
    return script(LOOP.format(seed=seed, kinds=kinds, delay=delay, victim=VICTIM))


def assert_survivors_saw(result: mpirun.Result, words: str) -> None:
    """They raised, named the victim, and nothing of the job lives."""
    assert not result.timed_out, str(result)
    assert result.returncode != 0, str(result)
    assert result.left_behind == [], str(result)
    for rank in SURVIVORS:
        assert re.search(rf"SAW \w+\(.*{words}", result.out[rank]), str(result)
        assert "FACTS" in result.out[rank], str(result)
        assert "Error" in result.err[rank], str(result)


@pytest.mark.parametrize(("seed", "workers"), [(0, 1), (1, 3), (2, 1), (3, 3)])
def test_survivors_of_a_death_at_a_random_point_raise_and_name_it(seed: int, workers: int) -> None:
    program = loop(seed, ALL_KINDS, (0.0, 0.5))
    variables = {"ADAREDUCE_WORKERS": str(workers)}
    result = mpirun.run(NUM_RANKS, program, limit=LIMIT, survive=True, variables=variables)
    assert_survivors_saw(result, f"rank {VICTIM}")


@pytest.mark.parametrize("seed", range(2))
def test_survivors_of_a_death_during_allocations_raise_and_name_it(seed: int) -> None:
    result = mpirun.run(NUM_RANKS, loop(seed, ["allocate"], (0.0, 0.1)), limit=LIMIT, survive=True)
    assert_survivors_saw(result, f"rank {VICTIM}")


def test_the_run_after_a_death_is_sound() -> None:
    died = mpirun.run(NUM_RANKS, loop(9, ["in place"], (0.0, 0.1)), limit=LIMIT, survive=True)
    assert_survivors_saw(died, f"rank {VICTIM}")
    program = """
hvd.init()
tensor = hvd.empty_shared(400_001).fill_(hvd.rank())
hvd.allreduce_(tensor, op=hvd.Sum)
say(tensor.unique().tolist())
"""
    result = mpirun.run(NUM_RANKS, script(program), limit=LIMIT)
    assert result.returncode == 0, str(result)
    assert result.out == [f"{[float(sum(range(NUM_RANKS)))]}\n"] * NUM_RANKS, str(result)


# Of a core: two threads that wait for 4 s without sleeping would use more than 4 s.
MOST_CPU_SECONDS = 2.0


@pytest.mark.parametrize("kinds", [["ordinary", "in place"], ["allocate"]], ids=str)
def test_those_who_wait_for_a_stopped_rank_sleep_warn_and_fail(kinds: list[str]) -> None:
    program = f"""
import threading
{LOOP.format(seed=5, kinds=kinds, delay=(600, 600), victim=VICTIM)}
"""
    program = program.replace("done += 1", "done += 1; used = time.process_time(); mark('ready')")
    program = program.replace(
        'say("SAW", error)', 'say("SAW", error); say("CPU", time.process_time() - used)'
    )
    variables = {"ADAREDUCE_WARN_AFTER_SECONDS": "2", "ADAREDUCE_FAIL_AFTER_SECONDS": "4"}
    with mpirun.Job(NUM_RANKS, script(program), variables=variables, survive=True) as job:
        job.wait_for_file("ready")
        job.send_signal(VICTIM, signal.SIGSTOP)
        for rank in SURVIVORS:
            ended = job.wait_until(lambda rank=rank: "CPU" in job.output("out", rank), ENDS_WITHIN)
            assert ended, str(job.wait(0))
        job.send_signal(VICTIM, signal.SIGKILL)
        result = job.wait(ENDS_WITHIN)
    assert_survivors_saw(result, "gave up after 4 s")
    for rank in SURVIVORS:
        assert f"rank {VICTIM} does not answer" in result.out[rank], str(result)
        assert "WARNING" in result.err[rank], str(result)
        used = float(result.out[rank].split("CPU ")[1].split()[0])
        assert used < MOST_CPU_SECONDS, str(result)


def test_ctrl_c_in_an_allocation_is_told_to_the_others() -> None:
    program = """
hvd.init()
folder = os.environ["ADAREDUCE_TEST_FOLDER"]
if hvd.rank() == 0:
    try:
        mark("ready")
        hvd.empty_shared(1000)
    except KeyboardInterrupt:
        say("INTERRUPTED")
    mark("interrupted")
else:
    while not os.path.exists(os.path.join(folder, "interrupted")):
        time.sleep(0.01)
    try:
        hvd.empty_shared(1000)
    except hvd.HorovodInternalError as error:
        say("SAW", error)
hvd.shutdown()
hvd.init()
say(hvd.allreduce_(hvd.empty_shared(100_000).fill_(1), op=hvd.Sum).unique().tolist())
"""
    with mpirun.Job(2, script(program)) as job:
        job.wait_for_file("ready")
        job.send_signal(0, signal.SIGINT)
        result = job.wait(ENDS_WITHIN)
    assert result.returncode == 0, str(result)
    assert result.out[0] == "INTERRUPTED\n[2.0]\n", str(result)
    assert re.match(r"SAW empty_shared\(4000 bytes\): .*rank 0", result.out[1]), str(result)
    assert result.out[1].endswith("[2.0]\n"), str(result)
    assert result.left_behind == []
