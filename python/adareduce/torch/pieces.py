"""How a call is cut into pieces that fit into little pinned memory. No copies are made here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from adareduce import _core
from adareduce.ops import Collective, ReduceOp
from adareduce.torch import streams
from adareduce.torch.host import to_tensor
from adareduce.torch.launching import DeviceStats

_TENSORS_IN_TITLE = 3


class Part(NamedTuple):
    """What a piece takes of one tensor. Blocks are dense views of GPU memory, of one dtype.

    Attributes:
        tensor: Its place in the call.
        sources: Blocks that are copied down, one after the other.
        targets: Blocks that the result is copied up to, one after the other.
        row: Shape of a row where the engine counts rows; None where it counts elements.
        whole: The tensor, where the piece takes all of its elements: the engine then sees its
            shape and strides, so that messages speak of them.
    """

    tensor: int
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    row: tuple[int, ...] | None = None
    whole: torch.Tensor | None = None


class Piece:
    """One request of a call that is cut into several."""

    def __init__(self, parts: list[Part], splits: Sequence[int] = (), *, gathers: bool) -> None:
        self.parts = parts
        self.splits = splits
        self.host_inputs: list[torch.Tensor] = []
        self.host_outputs: list[torch.Tensor | None] = []
        self._gathers = gathers  # the engine allocates the results

    def allocate(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Takes pinned memory; yields what must be copied down: to where, from where."""
        for part in self.parts:
            numel = sum(block.numel() for block in part.sources)
            flat = streams.empty_pinned(numel, part.sources[0].dtype)
            self.host_inputs.append(_shaped(flat, part.sources, part))
            yield from zip(_split_like(flat, part.sources), part.sources, strict=True)
            if self._gathers:
                self.host_outputs.append(None)
            elif part.row is None:
                self.host_outputs.append(self.host_inputs[-1])
            else:
                result = flat.new_empty(sum(block.numel() for block in part.targets))
                self.host_outputs.append(_shaped(result, part.targets, part))

    def results(self, request: _core.Handle) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What must be copied up once the request has ended: to where, from where."""
        if self._gathers:
            gathered = [
                to_tensor(memory, shape, host.dtype)
                for (memory, shape, _), host in zip(
                    request.gathered(), self.host_inputs, strict=True
                )
            ]
        else:
            gathered = [tensor for tensor in self.host_outputs if tensor is not None]
        for part, result in zip(self.parts, gathered, strict=True):
            flat = _flat(result)
            if part.row is not None:
                flat = streams.empty_pinned(flat.numel(), flat.dtype).copy_(flat)
            yield from zip(part.targets, _split_like(flat, part.targets), strict=True)

    def forget(self) -> None:
        """Gives the host memory back; torch keeps what is still being copied."""
        self.host_inputs.clear()
        self.host_outputs.clear()


def cut_elements(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    piece_bytes: int,
    *,
    divides: bool,
) -> list[Piece]:
    """Pieces of an allreduce or a broadcast: of at most ``piece_bytes`` where ``divides``.

    Otherwise tensors stay whole: as many to a piece as fit, at least one.
    """
    pieces: list[Piece] = []
    parts: list[Part] = []
    room = piece_bytes
    for place, (source, target) in enumerate(zip(inputs, outputs, strict=True)):
        sources, targets = _flat(source), _flat(target)
        size, begin = source.element_size(), 0
        while True:
            left = sources.numel() - begin
            take = min(left, max(room // size, 0)) if divides else left
            if parts and (take == 0 < left or take * size > max(room, 0)):
                pieces.append(Piece(parts, gathers=False))
                parts, room = [], piece_bytes
                continue
            take = max(take, min(left, 1))
            span = slice(begin, begin + take)
            whole = source if take == source.numel() else None
            parts.append(Part(place, [sources[span]], [targets[span]], whole=whole))
            begin, room = begin + take, room - take * size
            if begin == sources.numel():
                break
    return [*pieces, Piece(parts, gathers=False)] if parts else pieces


def cut_rows(
    collective: Collective,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    rows: Sequence[int],
    piece_bytes: int,
    rank: int,
    size: int,
) -> list[Piece]:
    """Pieces of an allgather, a reducescatter or an alltoall, whose rows come in blocks by rank.

    A piece takes equally many rows of every block, or what is left of it. ``rows`` is that of
    ``launching.launch``; the number of pieces is the same on all ranks.
    """
    pieces: list[Piece] = []
    for place, (source, target) in enumerate(zip(inputs, outputs, strict=True)):
        if collective == Collective.allgather:
            arriving = list(rows[place * size : (place + 1) * size])
            leaving, longest = [source.shape[0]], max(arriving)
        elif collective == Collective.alltoall:
            leaving = list(rows[rank * size : (rank + 1) * size])
            arriving, longest = list(rows[rank::size]), max(rows)
        else:
            each, more = divmod(source.shape[0], size)
            leaving = [each + (peer < more) for peer in range(size)]
            arriving, longest = [target.shape[0]], max(leaving)
        row = tuple(source.shape[1:])
        row_bytes = source.element_size() * torch.Size(row).numel()
        step = max(1, piece_bytes // max(1, row_bytes * size))
        for first in range(0, max(longest, 1), step):
            sources = _blocks(source, leaving, first, step)
            splits = (
                [block.shape[0] for block in sources] if collective == Collective.alltoall else ()
            )
            part = Part(place, sources, _blocks(target, arriving, first, step), row)
            pieces.append(Piece([part], splits, gathers=collective != Collective.reducescatter))
    return pieces


class Statistics:
    """Statistics of a call, collected from those of its pieces, which hold whole tensors."""

    def __init__(self, groups: Sequence[int], local_squares: Sequence[float] | None) -> None:
        self._groups = groups
        self._squares = local_squares
        self._rows = [[0.0] * 4 for _ in range(max(groups, default=-1) + 1)]
        self._orthogonality: list[float] = []
        self._nonfinite: list[int] = []
        self._has_begun: set[int] = set()

    def groups_of(self, piece: Piece) -> list[int]:
        """The groups of a piece's tensors, numbered from 0 within the piece."""
        here = self._numbers(piece)
        return [here.index(self._groups[part.tensor]) for part in piece.parts]

    def squares_of(self, piece: Piece) -> list[float]:
        """``local_squares`` of those groups; a group's share goes with its first piece."""
        if self._squares is None:
            return []
        return [
            0.0 if group in self._has_begun else self._squares[group]
            for group in self._numbers(piece)
        ]

    def add(
        self,
        piece: Piece,
        rows: Sequence[float],
        orthogonality: Sequence[float],
        nonfinite: Sequence[int],
    ) -> None:
        """Takes a piece's statistics. All four columns are sums over tensors, or linear in them."""
        for place, group in enumerate(self._numbers(piece) if rows else ()):
            for column in range(4):
                self._rows[group][column] += rows[4 * place + column]
        self._has_begun.update(self._numbers(piece))
        self._orthogonality += orthogonality
        self._nonfinite += nonfinite

    def write(self, statistics: DeviceStats, stream: streams.CopyStream) -> None:
        """Copies the totals up."""
        for target, values in (
            (statistics.groups, [value for row in self._rows for value in row]),
            (statistics.orthogonality, self._orthogonality),
            (statistics.nonfinite, self._nonfinite),
        ):
            if target is not None and target.numel() > 0:
                source = streams.empty_pinned(target.numel(), target.dtype)
                source.copy_(torch.tensor(values, dtype=target.dtype, device="cpu"))
                stream.copy(target.view(-1), source)

    def _numbers(self, piece: Piece) -> list[int]:
        return sorted({self._groups[part.tensor] for part in piece.parts})


def names_of(
    cut: Sequence[Piece],
    collective: Collective,
    tensors: Sequence[torch.Tensor],
    op: ReduceOp,
    name: str | None,
    groups: Sequence[int] | None,
) -> list[str | None]:
    """Names of the pieces' requests: the call's own for a single piece, which is the whole call.

    Otherwise they hold all that ranks must agree on, so that they do before anything is written.
    """
    if len(cut) == 1:
        return [name]
    words = []
    for tensor in tensors:
        # Rows may differ between ranks, except where they are reduced or copied.
        skip = int(collective in (Collective.allgather, Collective.alltoall))
        dtype = str(tensor.dtype).removeprefix("torch.")
        words.append(f"{dtype}{tuple(tensor.shape[skip:])}")
        if not tensor.is_contiguous():
            words[-1] += f" with strides {tuple(tensor.stride())}"
    digest = hashlib.sha256(repr((op, words, groups)).encode()).hexdigest()[:16]
    shown = ", ".join(words[:_TENSORS_IN_TITLE])
    more = len(words) - _TENSORS_IN_TITLE
    rest = f" and {more} more" if more > 0 else ""
    title = f"{name or collective.name} through the host of {shown}{rest} ({digest})"
    return [f"{title}, piece {number} of {len(cut)}" for number in range(len(cut))]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _blocks(tensor: torch.Tensor, rows: Sequence[int], first: int, step: int) -> list[torch.Tensor]:
    """Rows ``first`` to ``first + step`` of every block, as far as it has them."""
    blocks, start = [], 0
    for count in rows:
        begin, end = min(first, count), min(first + step, count)
        blocks.append(tensor.detach()[start + begin : start + end])
        start += count
    return blocks


def _split_like(flat: torch.Tensor, blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    numels = [block.numel() for block in blocks]
    return [
        part.view(block.shape)
        for part, block in zip(flat.split_with_sizes(numels), blocks, strict=True)
    ]


def _shaped(flat: torch.Tensor, blocks: Sequence[torch.Tensor], part: Part) -> torch.Tensor:
    if part.whole is not None:
        return flat.as_strided(part.whole.shape, part.whole.stride())
    if part.row is not None:
        return flat.view(sum(block.shape[0] for block in blocks), *part.row)
    return flat
