"""Which way the requests of this rank went: with headers, through slots, in place, as messages."""

from __future__ import annotations

from typing import NamedTuple

import adareduce.torch as hvd


class Ways(NamedTuple):
    """How many requests have gone which way; see SharedRoutes in csrc/engine/shared_node.h."""

    on_boards: int = 0
    through_slots: int = 0
    in_place: int = 0
    as_messages: int = 0


def is_shared(process_set: hvd.ProcessSet = hvd.global_process_set) -> bool:
    """Whether the ranks of a process set share memory."""
    return hvd.shared_memory_choices(process_set).used


def ways(process_set: hvd.ProcessSet = hvd.global_process_set) -> Ways:
    """All requests since the process set was made."""
    return Ways(*hvd.shared_memory_choices(process_set).requests.values())


class Watch:
    """The requests since it was made."""

    def __init__(self, process_set: hvd.ProcessSet = hvd.global_process_set) -> None:
        self._process_set = process_set
        self._before = ways(process_set)

    def went(self) -> Ways:
        """What has been added since the last call."""
        now = ways(self._process_set)
        added = Ways(*(after - before for before, after in zip(self._before, now, strict=True)))
        self._before = now
        return added
