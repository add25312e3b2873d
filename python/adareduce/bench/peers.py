"""The same collectives by torch.distributed's gloo and NCCL and by MPI itself, to compare with.

Adasum, which they lack, is compared with their sum; an average is their sum, divided. They work on
one contiguous tensor, also where ours is cut into layers: no packing, their best case.
"""

from __future__ import annotations

import abc
import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from adareduce.bench.cases import Case
from adareduce.bench.inputs import touch
from adareduce.bench.ranks import OtherRankError, Ranks
from adareduce.bench.timing import Contender
from adareduce.bench.verification import differs

_TIME_LIMIT = datetime.timedelta(seconds=60)
_LONGEST_REASON = 80


class UnavailableError(Exception):
    """A peer cannot do this; the text says why."""


class Peer(abc.ABC):
    """Another library. All calls are collective."""

    name: str

    @abc.abstractmethod
    def contender(self, case: Case) -> tuple[Contender, torch.Tensor]:
        """The same collective on buffers of its own, and where the result will be, flat.

        Raises:
            UnavailableError: There is none.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Leaves the group."""


class Distributed(Peer):
    """torch.distributed over one of its backends, with a store of its own."""

    def __init__(self, ranks: Ranks) -> None:
        if not dist.is_available() or not self.is_available():
            raise UnavailableError(f"this torch has no {self.name}")
        is_one_host = len(set(ranks.hosts)) == 1
        if is_one_host:
            os.environ.setdefault(f"{self.name.upper()}_SOCKET_IFNAME", "lo")
        host = "localhost" if is_one_host else ranks.hosts[0]
        is_first = ranks.rank == 0
        store: Any = None
        if is_first:  # port 0: one that is free
            store = _tcp_store(host, 0, is_first=True)
        port = ranks.broadcast(store.port if is_first else None)
        if not is_first:
            store = _tcp_store(host, port, is_first=False)
        dist.init_process_group(
            self.name, store=store, rank=ranks.rank, world_size=ranks.size, timeout=_TIME_LIMIT
        )

    @staticmethod
    @abc.abstractmethod
    def is_available() -> bool:
        """Whether torch was built with the backend."""

    def contender(self, case: Case) -> tuple[Contender, torch.Tensor]:
        """In place where ours is."""
        collective, size = case.settings.collective, case.size
        source = _whole(case)
        buffer = source.clone()
        group_op = getattr(dist.ReduceOp, _GROUP_OPS.get(case.redop, "SUM"))
        # Renamed in newer releases of torch, which warn of the old names.
        gather_into = _function("all_gather_single", "all_gather_into_tensor")
        reduce_scatter_into = _function("reduce_scatter_single", "reduce_scatter_tensor")
        divide = case.redop == "avg"

        def restore() -> None:
            buffer.copy_(source)

        if collective == "allreduce":

            def allreduce() -> None:
                dist.all_reduce(buffer, op=group_op)
                if divide:
                    _divide(buffer, size)

            return Contender(self.name, allreduce, restore), buffer
        if collective == "reducescatter":
            part = torch.empty(source.numel() // size, dtype=source.dtype, device=source.device)

            def reducescatter() -> None:
                reduce_scatter_into(part, buffer, op=group_op)
                if divide:
                    _divide(part, size)

            return Contender(self.name, reducescatter, restore), part
        if collective == "allgather":
            gathered = torch.empty(source.numel() * size, dtype=source.dtype, device=source.device)
            return Contender(
                self.name, lambda: gather_into(gathered, source), lambda: touch(source)
            ), gathered
        if collective == "alltoall":
            return Contender(
                self.name, lambda: dist.all_to_all_single(buffer, source), lambda: touch(source)
            ), buffer
        if collective == "broadcast":
            return Contender(self.name, lambda: dist.broadcast(buffer, case.root), restore), buffer
        return Contender(self.name, dist.barrier), buffer

    def close(self) -> None:
        """Leaves the process group."""
        dist.destroy_process_group()


class Gloo(Distributed):
    """For tensors of the CPU."""

    name = "gloo"

    @staticmethod
    def is_available() -> bool:
        """Whether torch was built with it."""
        return dist.is_gloo_available()


class Nccl(Distributed):
    """For tensors of GPUs, on torch's own communicator of torch's current GPU."""

    name = "nccl"

    @staticmethod
    def is_available() -> bool:
        """Whether torch was built with it."""
        return dist.is_nccl_available()


class Mpi(Peer):
    """MPI through mpi4py, on a communicator of its own and NumPy buffers."""

    name = "mpi"

    def __init__(self, ranks: Ranks) -> None:
        if ranks.comm is None:
            raise UnavailableError("this job runs without MPI")
        self._comm = ranks.comm.Dup()

    def contender(self, case: Case) -> tuple[Contender, torch.Tensor]:
        """From a buffer into another."""
        from mpi4py import MPI

        comm, size = self._comm, case.size
        if case.dtype in (torch.float16, torch.bfloat16):
            raise UnavailableError("mpi4py has no half types")
        if case.dtype == torch.bool and case.redop != "none":
            raise UnavailableError("MPI has no arithmetic for bool")
        op = {"prod": MPI.PROD, "min": MPI.MIN, "max": MPI.MAX}.get(case.redop, MPI.SUM)
        divide = case.redop == "avg"
        whole = _whole(case)
        source = whole.numpy()

        def output(numel: int) -> torch.Tensor:
            return torch.empty(numel, dtype=case.dtype)

        calls: dict[str, tuple[int, Callable[[Any], Any]]] = {
            "allreduce": (source.size, lambda out: comm.Allreduce(source, out, op)),
            "reducescatter": (
                source.size // size,
                lambda out: comm.Reduce_scatter_block(source, out, op=op),
            ),
            "allgather": (source.size * size, lambda out: comm.Allgather(source, out)),
            "alltoall": (source.size, lambda out: comm.Alltoall(source, out)),
            "broadcast": (source.size, lambda out: comm.Bcast(out, case.root)),
            "barrier": (0, lambda _: comm.Barrier()),
        }
        numel, call = calls[case.settings.collective]
        result = output(numel)
        if case.settings.collective == "broadcast":
            result.copy_(whole)  # what the root sends
        array = result.numpy()

        def run() -> None:
            call(array)
            if divide:
                _divide(result, size)

        sent = result if case.settings.collective == "broadcast" else whole
        return Contender(self.name, run, lambda: touch(sent)), result

    def close(self) -> None:
        """Frees the communicator."""
        self._comm.Free()


NAMES = {"cpu": (Gloo.name, Mpi.name), "cuda": (Nccl.name,)}
_KINDS: dict[str, tuple[type[Peer], ...]] = {"cpu": (Gloo, Mpi), "cuda": (Nccl,)}
_GROUP_OPS = {"prod": "PRODUCT", "min": "MIN", "max": "MAX"}


class Peers:
    """The peers of a run, and why those are missing that are. Collective; close it."""

    def __init__(self, ranks: Ranks, device: str) -> None:
        self._ranks = ranks
        self._connected: dict[str, Peer] = {}
        self.missing: dict[str, str] = {}
        for kind in _KINDS[device]:
            make: Any = kind
            peer, reason = self._attempt(lambda make=make: make(ranks))  # type: ignore[misc]
            if peer is None:
                self.missing[kind.name] = reason
            else:
                self._connected[kind.name] = peer

    def contenders(self, case: Case) -> tuple[list[Contender], dict[str, str]]:
        """Those that can do it, tried once; and by name why the others cannot."""
        able, missing = [], dict(self.missing)
        for name, peer in self._connected.items():
            contender, reason = self._attempt(lambda peer=peer: _tried(case, *peer.contender(case)))  # type: ignore[misc]
            if contender is None:
                missing[name] = reason
            else:
                able.append(contender)
        return able, missing

    def close(self) -> None:
        """Leaves all groups."""
        for peer in self._connected.values():
            peer.close()

    def _attempt(self, make: Callable[[], Any]) -> tuple[Any, str]:
        """What is made, or None and the reason, the same on all ranks."""
        try:
            try:
                made = make()
            except OtherRankError:
                raise
            except Exception as error:  # whatever another library raises, it is not available
                reason = (str(error).strip().splitlines() or [""])[0][:_LONGEST_REASON]
                self._ranks.announce(reason or type(error).__name__)
            self._ranks.gather(None)
        except OtherRankError as error:
            return None, error.reason
        return made, ""


def _tried(case: Case, contender: Contender, result: torch.Tensor) -> Contender:
    """The contender, after one call whose result was looked at.

    Raises:
        UnavailableError: It was wrong.
    """
    contender.prepare()
    contender.run()
    is_half = case.dtype in (torch.float16, torch.bfloat16)  # summed as the peer likes
    is_comparable = case.redop not in ("adasum", "none") and not is_half
    # Of several tensors only all-reduce leaves the parts where the oracle has them.
    is_in_order = len(case.inputs) == 1 or case.settings.collective == "allreduce"
    if case.settings.check and is_in_order and (is_comparable or case.redop == "none"):
        outputs = case.expected()
        numels = [sum(stretch.numel for stretch in output) for output in outputs]
        parts = torch.split(result, numels)
        wrong = sum(
            int(differs(part, output).sum()) for part, output in zip(parts, outputs, strict=True)
        )
        if wrong:
            raise UnavailableError(f"{wrong} of {result.numel()} elements are wrong")
    return contender


def _whole(case: Case) -> torch.Tensor:
    if not case.inputs:
        return torch.empty(0, dtype=case.dtype, device=case.settings.device)
    return torch.cat(case.inputs)


def _divide(tensor: torch.Tensor, size: int) -> None:
    if tensor.dtype.is_floating_point:
        tensor.div_(size)
    else:
        tensor.div_(size, rounding_mode="trunc")


def _function(*names: str) -> Callable[..., Any]:
    found: Callable[..., Any] = next(getattr(dist, n) for n in names if hasattr(dist, n))
    return found


def _tcp_store(host: str, port: int, *, is_first: bool) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_first, timeout=_TIME_LIMIT, wait_for_workers=False
    )
