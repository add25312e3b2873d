"""CUDA tensors through pinned host memory, for process sets where nothing better works.

Pieces follow each other: while the engine's worker reduces one, the next is copied down and the
previous one goes up. The host waits for the reductions, so nothing here can be captured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from adareduce.ops import Collective, ReduceOp
from adareduce.runtime import ProcessSet
from adareduce.torch import pieces, streams
from adareduce.torch.handles import Handle, submit
from adareduce.torch.launching import DeviceStats, Launch
from adareduce.torch.pieces import Piece

# Bytes of a piece: copies of this size reach a PCIe link's speed, and three pieces are little
# pinned memory. Not tuned: no GPU was at hand.
PIECE_BYTES = 8 * 2**20
_PIECES_UNDER_WAY = 3  # one on its way down, one being reduced, one on its way up


class _Copies:
    """The copies behind a staged call."""

    def __init__(self, mark: streams.Mark) -> None:
        self._mark = mark

    def is_finished(self) -> bool:
        return self._mark.is_passed()

    def order(self, _stream: int) -> None:
        self._mark.order()

    def stream(self) -> int:
        return self._mark.stream()


def stage(
    collective: Collective,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    *,
    device: int,
    name: str | None,
    process_set: ProcessSet,
    op: ReduceOp = ReduceOp.Sum,
    root: int = 0,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    rows: Sequence[int] = (),
    groups: Sequence[int] | None = None,
    local_squares: torch.Tensor | None = None,
    statistics: DeviceStats | None = None,
) -> Launch:
    """Runs a call through the host; the arguments are those of ``launching.launch``.

    Collective; blocks until the last piece has been reduced. An error after the first piece, the
    loss of a rank say, leaves the outputs partly written.

    Raises:
        ValueError: The caller's stream is being captured.
        HorovodInternalError: The ranks disagree, or one is lost.
    """
    if streams.is_capturing():
        raise ValueError(
            f"{collective.name}: stream must not be captured where CUDA tensors go through the"
            " host (see hvd.cuda_path()), got one that is"
        )
    if collective in (Collective.allreduce, Collective.broadcast):
        divides = op != ReduceOp.Adasum and statistics is None
        cut = pieces.cut_elements(inputs, outputs, PIECE_BYTES, divides=divides)
    else:
        cut = pieces.cut_rows(
            collective, inputs, outputs, rows, PIECE_BYTES, process_set.rank(), process_set.size()
        )
    names = pieces.names_of(cut, collective, inputs, op, name, groups)
    squares = None if local_squares is None else local_squares.tolist()
    sums = None if groups is None else pieces.Statistics(groups, squares)
    is_read = collective != Collective.broadcast or process_set.rank() == root
    down, up = streams.CopyStream(device), streams.CopyStream(device)
    down.follow_current()
    up.follow_current()  # outputs may be in use there
    options = {
        "process_set": process_set,
        "op": op,
        "root": root,
        "prescale_factor": prescale_factor,
        "postscale_factor": postscale_factor,
    }
    try:
        _run(collective, cut, names, sums, down, up, is_read=is_read, options=options)
    except Exception:
        up.mark().wait()  # what is under way writes into memory that nobody keeps any more
        raise
    if sums is not None and statistics is not None:
        sums.write(statistics, up)
    written = [*outputs] if statistics is None else [*outputs, *statistics.tensors()]
    return Launch(_Copies(up.mark()), device, inputs, written)


def _run(
    collective: Collective,
    cut: Sequence[Piece],
    names: Sequence[str | None],
    sums: pieces.Statistics | None,
    down: streams.CopyStream,
    up: streams.CopyStream,
    *,
    is_read: bool,
    options: dict[str, Any],
) -> None:
    leaving: deque[streams.Mark] = deque()
    arriving = _copy_down(cut[0], down, is_read=is_read)
    for number, piece in enumerate(cut):
        arriving.wait()
        request = submit(
            collective,
            piece.host_inputs,
            piece.host_outputs,
            name=names[number],
            splits=piece.splits,
            groups=None if sums is None else sums.groups_of(piece),
            local_squares=() if sums is None else sums.squares_of(piece),
            **options,
        )
        if number + 1 < len(cut):
            if len(leaving) == _PIECES_UNDER_WAY - 1:
                leaving.popleft().wait()
            arriving = _copy_down(cut[number + 1], down, is_read=is_read)
        Handle(request, lambda _: None, None, set()).synchronize()
        if sums is not None:
            sums.add(piece, *request.statistics())
        for target, source in piece.results(request):
            up.copy(target, source)
        piece.forget()
        leaving.append(up.mark())


def _copy_down(piece: Piece, stream: streams.CopyStream, *, is_read: bool) -> streams.Mark:
    for host, device in piece.allocate():
        if is_read:
            stream.copy(host, device)
    return stream.mark()
