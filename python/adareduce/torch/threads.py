"""A word of warning where ranks would fight for the same cores."""

from __future__ import annotations

import os

import torch

from adareduce import runtime
from adareduce.logs import logger

_has_warned = False


def warn_if_oversubscribed() -> None:
    """Warns once, on one rank per node, when its ranks' torch threads outnumber its cores."""
    global _has_warned
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    ranks = runtime.local_size()
    if _has_warned or ranks == 1 or threads == 1 or runtime.local_rank() != 0:
        return
    # A launcher that binds ranks to cores has shared them out already.
    if "OMP_NUM_THREADS" in os.environ or threads < cores or cores < ranks:
        return
    _has_warned = True
    logger.warning(
        "%d ranks on this node compute with %d threads each on %d cores; set OMP_NUM_THREADS=%d",
        ranks,
        threads,
        cores,
        max(1, cores // ranks),
    )
