"""What a job of benchmarks/compare_peers.py writes, made up."""

from __future__ import annotations

from typing import Any


def job_line(mpi: str, seconds: dict[str, float], **changed: Any) -> dict[str, Any]:
    """What a job says of a case: every repeat took as long; 5 were near and 5 far."""
    return {
        "case": "resnet50", "dtype": "float32", "bytes": 102_228_128, "tensors": 161, "ranks": 2,
        "seconds": {name: [time] * 11 for name, time in seconds.items()},
        "calls": dict.fromkeys(seconds, 1), "wrong": dict.fromkeys(seconds, 0),
        "round_trips_ns": [80.0] * 6 + [400.0] * 6, "unavailable": {}, "choices": None,
        "missing": {"horovod": "not installed"}, "settings": {}, "shares_cores": False,
        "date": "2000-01-01T00:00:00+00:00", "commit": "0123456789abcdef",
        "machine": {"cpu": "a CPU", "usable_cores": 2}, "versions": {"torch": "2", "mpi": mpi},
        **changed,
    }  # fmt: skip


OURS = {"ours sum ordinary": 0.011, "ours adasum ordinary": 0.0165}
MPICH = {**OURS, "gloo sum flat": 0.1, "gloo sum packed": 0.15, "mpi sum flat": 0.055,
         "mpi sum packed": 0.08}  # fmt: skip
OPENMPI = {**OURS, "gloo sum flat": 0.1, "mpi sum flat": 0.022}
