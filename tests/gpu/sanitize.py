"""A short walk through the kernels, for compute-sanitizer, which makes everything slow.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py

Tensors end where an allocation ends (torch's caching is switched off), so that a read beyond one is
seen. Ranks of the peer kernels wait for each other in kernels, which a tool that serialises kernels
would hang; they are left out with --no-peers.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from device import CODES, FLOATS, Machine, lay_out

NUMELS = [5, 8, 0, 1, 4097, 9001]


def main(arguments: list[str]) -> int:
    """Prints what was run; returns the exit status."""
    machine = Machine()
    for dtype in FLOATS:
        walk(machine, dtype)
    print("kernels: done", flush=True)
    if "--no-peers" not in arguments:
        for size in (2, 4):
            meet(machine, size)
        print("peer kernels: done", flush=True)
    return 0


def walk(machine: Machine, dtype: torch.dtype) -> None:
    """Every entry of the table once."""
    testing, stream = machine.testing, machine.stream()
    segments, numel = lay_out(NUMELS)
    buffer = testing.Buffer(segments, CODES[dtype])
    lower, upper, out = (torch.rand(numel, device=machine.device).to(dtype) for _ in range(3))
    tensors = [torch.rand(n + 1, device=machine.device).to(dtype)[1:] for n in NUMELS]
    pointers = [tensor.data_ptr() for tensor in tensors]
    stats, squares = machine.nothing(3 * len(NUMELS)), machine.nothing(len(NUMELS))
    nonfinite = machine.nothing(len(NUMELS), torch.int64)
    groups = machine.put(torch.zeros(2, dtype=torch.float64))
    group_of = machine.put(torch.zeros(len(NUMELS), dtype=torch.int32))
    pair = (buffer, lower.data_ptr(), upper.data_ptr())
    for begin, end in ((0, numel), (3, numel - 5)):
        testing.pair_stats(*pair, begin, end, stats.data_ptr(), stream)
        testing.pair_combine(*pair, begin, end, stats.data_ptr(), out.data_ptr(), stream)
    testing.pack(buffer, pointers, out.data_ptr(), 0.5, squares.data_ptr(), stream)
    testing.unpack(buffer, out.data_ptr(), pointers, 0.5, nonfinite.data_ptr(),
                   squares.data_ptr(), stream)  # fmt: skip
    both = [lower.data_ptr(), upper.data_ptr()]
    for op in range(4):
        testing.reduce(CODES[dtype], op, both, out.data_ptr(), numel, 1.0, stream)
    testing.reduce_squares(buffer, both, out.data_ptr(), 0, numel, 2.0, group_of.data_ptr(),
                           groups.data_ptr(), stream)  # fmt: skip
    machine.wait()


def meet(machine: Machine, size: int) -> None:
    """One-shot kernels of `size` ranks, with few blocks."""
    segments, numel = lay_out(NUMELS)
    peers = machine.testing.PeerRanks(size, numel, CODES[torch.float32], segments, 2, 60.0)
    streams, alive = machine.streams(size)
    for rank in range(size):
        tensor = torch.rand(numel, device=machine.device)
        machine.testing.copy(tensor.data_ptr(), tensor.nbytes, peers.input(rank), machine.stream())
    machine.wait()
    peers.adasum(streams)
    machine.wait()
    squares = [machine.nothing(2 * len(NUMELS)) for _ in range(size)]
    peers.reduce(0, 2.0, streams, [tensor.data_ptr() for tensor in squares])
    machine.wait()
    if peers.error() != 0:
        raise RuntimeError(f"rank {peers.error() - 1} did not come")
    del alive


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
