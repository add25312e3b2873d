"""Barrier: nobody goes on before everybody has come."""

from __future__ import annotations

from adareduce.ops import Collective
from adareduce.runtime import ProcessSet, global_process_set, rejected_on_all_ranks
from adareduce.torch.handles import hand_over, submit


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Waits until every rank has called it. Collective; does not wait for pending calls.

    Raises:
        HorovodInternalError: A rank is lost, has left, or did not come in time.
    """
    with rejected_on_all_ranks(process_set, is_barrier=True):
        request = submit(
            Collective.barrier, [], [], name=None, process_set=process_set, blocking=True
        )
    hand_over(request, lambda _: None, None, process_set, blocking=True)
