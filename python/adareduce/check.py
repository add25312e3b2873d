"""``python -m adareduce.check``: does this installation work? A plain verdict in ten seconds.

    mpirun -n 4 python -m adareduce.check

Exit status 0: it does. Without mpirun one rank is tested, which sends nothing.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
from collections.abc import Sequence

# A check that waits in vain must end soon; what the user has set counts.
_DEADLINES = {"ADAREDUCE_WARN_AFTER_SECONDS": "10", "ADAREDUCE_FAIL_AFTER_SECONDS": "30"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks; rank 0 prints. Collective, blocks.

    Returns:
        The exit status: 0 where everything works, else 1; the same on all ranks.
    """
    parser = argparse.ArgumentParser(
        prog="python -m adareduce.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    for name, seconds in _DEADLINES.items():
        os.environ.setdefault(name, seconds)
    try:
        # Not above: an installation that does not load is to get its verdict too.
        import adareduce.torch as hvd
        from adareduce.bench import checks, machine, ranks
    except ImportError as error:
        print(f"adareduce does NOT work here: it does not load: {error}")
        return 1
    try:
        hvd.init()
    except (RuntimeError, ValueError) as error:  # HorovodInternalError is a RuntimeError
        if ranks.speaks_before_init():
            print(f"adareduce does NOT work here: {error}")
        return 1

    job = ranks.Ranks()
    hosts = ", ".join(f"{host} ({n})" for host, n in collections.Counter(job.hosts).items())
    job.print(f"{'ranks':<20}{job.size} on {hosts}")
    job.print(f"{'versions':<20}{machine.versions_line()}")
    failed = []
    for outcome in checks.run_checks(job):
        verdict = "ok" if outcome.passed else "FAILED"
        job.print(f"{outcome.name:<20}{verdict:<8}{outcome.remark}")
        if not outcome.passed:
            failed.append(outcome.name)
    if failed:
        job.print(f"adareduce does NOT work here: failed: {', '.join(failed)}.")
        return 1
    if job.size == 1:
        job.print("Only one rank was tested, which sends nothing; mpirun -n 2 tests two.")
    job.print(f"adareduce works on {job.size} rank{'s' if job.size > 1 else ''}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
