"""The libraries that compare_peers.py compares, each in every form in which users call it.

A contender's name is "LIBRARY OP FORM". Forms of ours: `ordinary` tensors; `shared` ones, which lie
in memory of ``hvd.empty_shared``. Forms of the peers, where there are several tensors: `flat`, one
buffer that nobody packs, their best case; `packed`, copied into one buffer and back; and what the
library has itself. A peer is compared by its fastest form.
"""

from __future__ import annotations

import abc
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from compare_cases import Case
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

import adareduce.torch as hvd
from adareduce.bench.peers import Gloo, UnavailableError
from adareduce.bench.ranks import OtherRankError, Ranks

WITH_STATISTICS = ("resnet50",)  # sets that are also averaged with and without AdaScale's
_LONGEST_REASON = 160


@dataclass(frozen=True)
class Contender:
    """One call of one library.

    Attributes:
        name: "gloo sum flat".
        tensors: Flat tensors that have the inputs before the call and the results after it.
        run: The call; collective, blocks.
    """

    name: str
    tensors: Sequence[torch.Tensor]
    run: Callable[[], Any]

    @property
    def op(self) -> str:
        """What it computes: sum, average or adasum."""
        return self.name.split()[1]


class Buffers:
    """The memory of one case. Contenders that do not run at the same time use the same."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.separate = [torch.empty(shape, dtype=case.dtype) for shape in case.shapes]
        self._flat: torch.Tensor | None = None

    @property
    def is_one(self) -> bool:
        """Whether there is only one tensor."""
        return not self.case.is_set

    @property
    def flat(self) -> torch.Tensor:
        """One contiguous buffer: the only tensor, or as many elements as all together."""
        if self.is_one:
            return self.separate[0]
        if self._flat is None:
            self._flat = torch.empty(sum(self.case.numels), dtype=self.case.dtype)
        return self._flat

    def shared(self) -> list[torch.Tensor]:
        """The tensors as views of one buffer that all ranks of the node can address. Collective.

        Raises:
            UnavailableError: This adareduce has no such memory.
        """
        empty_shared = getattr(hvd, "empty_shared", None)
        if empty_shared is None:
            raise UnavailableError("this adareduce has no hvd.empty_shared")
        buffer = empty_shared((sum(self.case.numels),), dtype=self.case.dtype)
        parts = torch.split(buffer, self.case.numels)
        return [part.view(shape) for part, shape in zip(parts, self.case.shapes, strict=True)]

    def parts(self) -> list[torch.Tensor]:
        """The places of the tensors in ``flat``."""
        return list(torch.split(self.flat.view(-1), self.case.numels))


class Library(abc.ABC):
    """One of the libraries. All calls are collective."""

    name: str
    version: str | None = None  # of one that bench.machine.versions() does not know
    warmups: int = 3  # calls before any is measured

    @abc.abstractmethod
    def makers(self, buffers: Buffers) -> dict[str, Callable[[], Contender]]:
        """By name, what makes each contender; it raises where there is none."""

    def enter(self) -> bool:
        """Before calls that are measured; whether they must be warmed up again."""
        return False

    def leave(self) -> None:  # noqa: B027
        """After them: nothing of the library may use a core from here on."""

    def close(self) -> None:  # noqa: B027
        """Leaves for good."""


class Ours(Library):
    """This library, as users call it.

    It learns from its first calls of a size how to go through shared memory: what is measured are
    the calls after a program's first ones.
    """

    name = "ours"
    warmups = 30

    def makers(self, buffers: Buffers) -> dict[str, Callable[[], Contender]]:
        """Sum and Adasum of ordinary and of shared tensors; averages with statistics."""
        shared: list[torch.Tensor] = []  # one allocation for both operations

        def of_shared(name: str, op: hvd.ReduceOp) -> Contender:
            if not shared:
                shared.extend(buffers.shared())
            return _ours(name, op, shared)

        def of_ordinary(name: str, op: hvd.ReduceOp) -> Contender:
            return _ours(name, op, buffers.separate)

        makers: dict[str, Callable[[], Contender]] = {}
        for word, op in (("sum", hvd.Sum), ("adasum", hvd.Adasum)):
            for form, make in (("ordinary", of_ordinary), ("shared", of_shared)):
                name = f"ours {word} {form}"
                makers[name] = lambda make=make, name=name, op=op: make(name, op)  # type: ignore[misc]
        if buffers.case.key in WITH_STATISTICS:
            makers["ours average ordinary"] = lambda: of_ordinary(
                "ours average ordinary", hvd.Average
            )
            makers["ours average statistics"] = lambda: _with_statistics(buffers.separate)
        return makers


def _ours(name: str, op: hvd.ReduceOp, tensors: list[torch.Tensor]) -> Contender:
    flat = [tensor.view(-1) for tensor in tensors]
    if len(tensors) == 1:
        (tensor,) = tensors
        return Contender(name, flat, lambda: hvd.allreduce_(tensor, op=op))
    return Contender(name, flat, lambda: hvd.grouped_allreduce_(tensors, op=op))


def _with_statistics(tensors: list[torch.Tensor]) -> Contender:
    flat = [tensor.view(-1) for tensor in tensors]
    return Contender(
        "ours average statistics",
        flat,
        lambda: hvd.grouped_allreduce_with_stats_(tensors, op=hvd.Average),
    )


class TorchGloo(Library):
    """torch.distributed on gloo: a sum."""

    name = "gloo"

    def __init__(self, ranks: Ranks) -> None:
        self._group = Gloo(ranks)

    def makers(self, buffers: Buffers) -> dict[str, Callable[[], Contender]]:
        """One buffer; packed by torch's own functions; gloo's own list of tensors."""
        tensors = buffers.separate

        def packed() -> None:
            flat = _flatten_dense_tensors(tensors)
            dist.all_reduce(flat)
            torch._foreach_copy_(tensors, _unflatten_dense_tensors(flat, tensors))

        def coalesced() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, and the only way for gloo
                dist.all_reduce_coalesced(tensors)

        flat = buffers.flat
        makers = {"flat": lambda: Contender("gloo sum flat", buffers.parts(),
                                            lambda: dist.all_reduce(flat))}  # fmt: skip
        if not buffers.is_one:
            views = [tensor.view(-1) for tensor in tensors]
            makers["packed"] = lambda: Contender("gloo sum packed", views, packed)
            makers["coalesced"] = lambda: Contender("gloo sum coalesced", views, coalesced)
        return {f"gloo sum {form}": make for form, make in makers.items()}

    def close(self) -> None:
        """Leaves the process group."""
        self._group.close()


class Mpi4py(Library):
    """The job's MPI, called by mpi4py: a sum, in place."""

    name = "mpi"

    def __init__(self, ranks: Ranks) -> None:
        if ranks.comm is None:
            raise UnavailableError("this job runs without MPI")
        self._comm = ranks.comm.Dup()

    def makers(self, buffers: Buffers) -> dict[str, Callable[[], Contender]]:
        """One buffer; and packed."""
        from mpi4py import MPI

        comm, flat, tensors = self._comm, buffers.flat, buffers.separate

        def spec() -> list[Any]:
            if buffers.case.dtype == torch.float32:
                return [flat.numpy(), MPI.FLOAT]
            # NumPy has no such type, and few MPIs have.
            kind = getattr(MPI, "BFLOAT16_T", MPI.DATATYPE_NULL)
            if kind == MPI.DATATYPE_NULL:
                raise UnavailableError("not supported: this MPI has no bfloat16")
            return [flat.view(torch.int16).numpy(), kind]

        def of_flat() -> Contender:
            buffer = spec()
            return Contender(
                "mpi sum flat", buffers.parts(), lambda: comm.Allreduce(MPI.IN_PLACE, buffer)
            )

        def of_packed() -> Contender:
            buffer, parts = spec(), buffers.parts()
            views = [tensor.view(-1) for tensor in tensors]

            def packed() -> None:
                torch._foreach_copy_(parts, views)
                comm.Allreduce(MPI.IN_PLACE, buffer)
                torch._foreach_copy_(views, parts)

            return Contender("mpi sum packed", views, packed)

        makers = {"mpi sum flat": of_flat}
        if not buffers.is_one:
            makers["mpi sum packed"] = of_packed
        return makers

    def close(self) -> None:
        """Frees the communicator."""
        self._comm.Free()


class Horovod(Library):
    """Horovod over the job's MPI, started anew for each turn: its thread never sleeps for long."""

    name = "horovod"

    def __init__(self, ranks: Ranks) -> None:
        try:
            self._hvd = importlib.import_module("horovod.torch")
        except ImportError as error:
            raise UnavailableError("not installed") from error
        if not self._hvd.mpi_built():
            raise UnavailableError("this Horovod was built without MPI")
        self._hvd.init()
        size = self._hvd.size()
        self._hvd.shutdown()
        self.version = importlib.import_module("horovod").__version__
        if size != ranks.size:
            raise UnavailableError(f"Horovod sees {size} ranks, there are {ranks.size}")

    def makers(self, buffers: Buffers) -> dict[str, Callable[[], Contender]]:
        """Sum and Adasum: one grouped call, or a call for each tensor as its optimizer does."""
        horovod, tensors = self._hvd, buffers.separate
        flat = [tensor.view(-1) for tensor in tensors]
        makers: dict[str, Callable[[], Contender]] = {}
        for word, op in (("sum", horovod.Sum), ("adasum", horovod.Adasum)):
            # Without a name each call has a new one, which its cache of responses never finds.
            def grouped(op: Any = op, word: str = word) -> None:
                horovod.grouped_allreduce_(tensors, op=op, name=word)

            def each(op: Any = op, word: str = word) -> None:
                handles = [
                    horovod.allreduce_async_(tensor, op=op, name=f"{word} {index}")
                    for index, tensor in enumerate(tensors)
                ]
                for handle in handles:
                    horovod.synchronize(handle)

            forms = {"each": each} if buffers.is_one else {"grouped": grouped, "each": each}
            for form, run in forms.items():
                name = f"horovod {word} {form}"
                makers[name] = lambda name=name, run=run: Contender(name, flat, run)  # type: ignore[misc]
        return makers

    def enter(self) -> bool:
        """Starts its thread; buffers and caches are new."""
        self._hvd.init()
        return True

    def leave(self) -> None:
        """Ends its thread."""
        self._hvd.shutdown()


KINDS: tuple[type[Library], ...] = (TorchGloo, Mpi4py, Horovod)


def connected(ranks: Ranks) -> tuple[list[Library], dict[str, str]]:
    """Ours and the peers that this job can hold; and by name why the others are missing."""
    libraries: list[Library] = [Ours()]
    missing = {}
    for kind in KINDS:
        make: Any = kind
        library, reason = attempt(ranks, lambda make=make: make(ranks))  # type: ignore[misc]
        if library is None:
            missing[kind.name] = reason
        else:
            libraries.append(library)
    return libraries, missing


def attempt(ranks: Ranks, make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, or None and the reason, the same on all ranks. Collective."""
    try:
        try:
            made = make()
        except OtherRankError:
            raise
        except Exception as error:  # whatever another library raises, it cannot do this
            lines = str(error).strip().splitlines() or [""]
            ranks.announce(lines[0][:_LONGEST_REASON] or type(error).__name__)
        ranks.gather(None)
    except OtherRankError as error:
        return None, error.reason
    return made, ""
