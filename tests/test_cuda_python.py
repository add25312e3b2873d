"""CUDA tensors in the Python layer, without a GPU: checks, lifetimes, pieces, settings, info.

What torch.cuda would answer is replaced; the oracle is what was asked of the replacements, or a
plain torch expression.
"""

from __future__ import annotations

import gc
import itertools
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adareduce.torch as hvd
import mpirun
from adareduce import cuda_library, info
from adareduce.ops import Collective, CudaPath, ReduceOp
from adareduce.settings import Settings
from adareduce.torch import launching, pieces, staging, streams
from adareduce.torch.handles import Handle
from adareduce.torch.launching import Launch
from emulated_gpu import ImmediateCopies, PassedMark

GROUP_STREAM = 99


class Cuda:
    """What torch.cuda would know."""

    def __init__(self) -> None:
        self.stream = 1
        self.is_capturing = False
        self.devices: dict[int, int] = {}  # by the tensor's address
        self.recorded: list[tuple[int, int]] = []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    state = Cuda()
    monkeypatch.setattr(streams, "device_of", lambda tensor: state.devices.get(tensor.data_ptr()))
    monkeypatch.setattr(streams, "are_on_cpu", lambda tensors: False)  # look at each
    monkeypatch.setattr(streams, "current", lambda device: state.stream)
    monkeypatch.setattr(streams, "is_capturing", lambda device=None: state.is_capturing)
    monkeypatch.setattr(streams, "empty_pinned", lambda n, dtype: torch.empty(n, dtype=dtype))
    monkeypatch.setattr(
        streams,
        "record",
        lambda tensor, device: state.recorded.append((id(tensor), state.stream)),
    )
    yield state
    launching._in_flight.clear()


class Work:
    """What the engine would have enqueued."""

    def __init__(self) -> None:
        self.is_done = False
        self.questions = 0
        self.ordered: list[int] = []

    def is_finished(self) -> bool:
        self.questions += 1
        return self.is_done

    def order(self, stream: int) -> None:
        self.ordered.append(stream)

    def stream(self) -> int:
        return GROUP_STREAM


def handle_of(launch: Launch, result: object = "result") -> Handle:
    return Handle(launch, lambda _: result, None, set())


# ---- streams and lifetimes -----------------------------------------------------------------------


def test_synchronize_orders_the_current_stream_and_waits_for_nothing(cuda):
    work = Work()
    handle = handle_of(Launch(work, 0, [torch.ones(3)], []))
    assert not hvd.poll(handle)
    cuda.stream = 7
    assert hvd.synchronize(handle) == "result"
    assert work.ordered == [7]
    assert not work.is_done


def test_every_stream_that_synchronises_is_ordered(cuda):
    # A second thread has a stream of its own: the first one's order does not help it.
    work = Work()
    handle = handle_of(Launch(work, 0, [], []))
    for cuda.stream in (1, 2, 3):
        hvd.synchronize(handle)
    assert work.ordered == [1, 2, 3]


def test_poll_asks_the_gpu(cuda):
    work = Work()
    handle = handle_of(Launch(work, 0, [], []))
    assert not hvd.poll(handle)
    work.is_done = True
    assert hvd.poll(handle)


def test_a_dropped_handle_keeps_its_tensors_until_the_gpu_is_done(cuda):
    work, tensor = Work(), torch.ones(3)
    alive = weakref.ref(tensor)
    handle = handle_of(Launch(work, 0, [tensor], []))
    del handle, tensor
    Launch(Work(), 0, [], [])
    gc.collect()
    assert alive() is not None
    work.is_done = True
    Launch(Work(), 0, [], [])
    gc.collect()
    assert alive() is None


def test_inputs_are_free_once_their_own_stream_comes_after_the_call(cuda):
    work, tensor = Work(), torch.ones(3)
    alive = weakref.ref(tensor)
    handle = handle_of(Launch(work, 0, [tensor], []))
    del tensor
    hvd.synchronize(handle)
    gc.collect()
    assert alive() is None, "the next use of this memory is on the stream that was ordered"
    assert cuda.recorded == []
    assert not work.is_done


def test_another_stream_that_synchronises_has_the_memory_recorded(cuda):
    given, result = torch.ones(3), torch.ones(3)
    handle = handle_of(Launch(Work(), 0, [given], [result]))
    cuda.stream = 5
    hvd.synchronize(handle)
    # That stream comes after the group's, whose own end shutdown() brings.
    assert sorted(cuda.recorded) == sorted([(id(given), 5), (id(result), 5)])


def test_a_call_asks_about_no_more_than_the_oldest_that_is_under_way(cuda):
    # Oracle: a count. Otherwise a step of n calls would ask n^2 / 2 times.
    works = [Work() for _ in range(20)]
    launches = [Launch(work, 0, [], []) for work in works]
    assert [work.questions for work in works] == [19] + [0] * 19
    assert len(launches) == len(launching._in_flight)


def test_nothing_is_asked_of_the_gpu_while_a_graph_is_captured(cuda):
    before = Work()
    kept = Launch(before, 0, [torch.ones(3)], [])
    cuda.is_capturing = True
    work = Work()
    handle = handle_of(Launch(work, 0, [torch.ones(3)], [torch.ones(3)]))
    assert hvd.poll(handle)  # it runs when the graph does
    hvd.synchronize(handle)
    assert (before.questions, work.questions) == (0, 0)
    assert list(launching._in_flight) == [kept]


@pytest.mark.parametrize("is_captured", [True, False])
def test_a_handle_must_not_cross_the_edge_of_a_capture(cuda, is_captured):
    cuda.is_capturing = is_captured
    work = Work()
    handle = handle_of(Launch(work, 0, [], []))
    cuda.is_capturing = not is_captured
    with pytest.raises(ValueError, match="on the same side of a graph's capture"):
        hvd.synchronize(handle)
    assert work.ordered == []
    cuda.is_capturing = is_captured
    assert hvd.synchronize(handle) == "result"


def test_an_error_of_the_gpu_is_raised_again_and_frees_the_name(cuda):
    class Broken(Work):
        def order(self, stream: int) -> None:
            raise hvd.HorovodInternalError("the group was aborted")

    names = {"x"}
    handle = Handle(Launch(Broken(), 0, [], []), lambda _: None, "x", names)
    for _ in range(2):
        with pytest.raises(hvd.HorovodInternalError, match="the group was aborted"):
            hvd.synchronize(handle)
    assert names == set()


# ---- checks --------------------------------------------------------------------------------------


def test_devices_other_than_cpu_and_cuda_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"allreduce: tensor must be on the cpu or a CUDA device, got device meta"
    ):
        hvd.allreduce(torch.empty(3, device="meta"))


def test_tensors_on_several_devices_are_refused_by_number(cuda):
    tensors = [torch.ones(3), torch.ones(3), torch.ones(3)]
    cuda.devices[tensors[2].data_ptr()] = 1
    for call in (hvd.grouped_allreduce_, hvd.grouped_allgather, hvd.grouped_allreduce_with_stats):
        with pytest.raises(
            ValueError, match=r"all tensors must be on one device, .* for tensor 2 of 3"
        ):
            call(tensors)


def test_squares_must_lie_beside_the_tensors(cuda):
    squares = torch.ones(1, dtype=torch.float64)
    cuda.devices[squares.data_ptr()] = 0
    with pytest.raises(ValueError, match="local_squares must be on the tensors' device"):
        hvd.grouped_allreduce_with_stats([torch.ones(3)], local_squares=squares)


def test_local_adasum_is_for_the_cpu(cuda):
    tensor = torch.ones(3)
    cuda.devices[tensor.data_ptr()] = 0
    with pytest.raises(ValueError, match="local_adasum: tensors must be on the cpu"):
        hvd.local_adasum([[tensor]])


_WITHOUT_CUDA = """
from adareduce import cuda_library
from adareduce.torch import streams
from emulated_gpu import ImmediateCopies
cuda_library.is_built = lambda: False
hvd.init()
streams.device_of = lambda tensor: 0
streams.are_on_cpu = lambda tensors: False
streams.is_capturing = lambda device=None: False
try:
    hvd.allreduce(torch.ones(3))
except ValueError as error:
    say(error)
say(hvd.cuda_built(), hvd.nccl_built())
"""


def run_script(text: str, **variables: str) -> mpirun.Result:
    here = str(Path(__file__).parent)
    result = mpirun.run(
        0, mpirun.script(f"sys.path.insert(0, {here!r})\n{text}"), limit=120.0, variables=variables
    )
    assert result.returncode == 0, str(result)
    return result


def test_a_build_without_cuda_says_so_and_what_helps():
    said = run_script(_WITHOUT_CUDA).out[0]
    assert "allreduce: tensor must be on a device that can be used here, got cpu" in said
    assert "this build of adareduce has no CUDA" in said
    assert "ADAREDUCE_CUDA=ON" in said
    assert "ADAREDUCE_CUDA_PATH=staged" in said
    assert "False 0" in said


def test_a_build_without_cuda_sends_through_the_host_where_it_is_told_to():
    script = _WITHOUT_CUDA + (
        "streams.uuid_of = lambda device: 'GPU-0'\n"
        "streams.current = lambda device: 0\n"
        "streams.CopyStream = ImmediateCopies\n"
        "streams.empty_pinned = lambda numel, dtype: torch.empty(numel, dtype=dtype)\n"
        "say(hvd.allreduce(torch.arange(3.0), op=hvd.Sum).tolist(), hvd.cuda_path(device=0))\n"
    )
    script = script.replace("hvd.allreduce(torch.ones(3))\n", "pass\n")
    result = run_script(script, ADAREDUCE_CUDA_PATH="staged")
    assert "[0.0, 1.0, 2.0] ChosenPath(path=<CudaPath.staged: 3>" in result.out[0]
    assert result.err[0].count("CUDA tensors go through host memory") == 1


def test_cpu_tensors_touch_nothing_of_cuda():
    said = run_script(
        "def refuse(*arguments, **options):\n"
        "    raise AssertionError('torch.cuda was used')\n"
        "for name in ('current_stream', 'current_device', 'is_current_stream_capturing', 'Event',\n"
        "             'Stream', 'ExternalStream', 'get_device_properties', 'is_available'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "hvd.init()\n"
        "hvd.allreduce(torch.ones(3)), hvd.allgather(torch.ones(3))\n"
        "hvd.broadcast(torch.ones(3), 0), hvd.reducescatter(torch.ones(3))\n"
        "hvd.grouped_allreduce_with_stats([torch.ones(3)]), hvd.alltoall(torch.ones(3))\n"
        "hvd.broadcast_parameters({'w': torch.ones(3)}, 0), hvd.allgather_object(3)\n"
        "say('adareduce._cuda' in sys.modules, torch.cuda.is_initialized())\n"
    ).out[0]
    assert "False False" in said


# ---- pieces --------------------------------------------------------------------------------------

SHAPES = [(5,), (0,), (40, 3), (), (7, 11), (2, 0)]


@pytest.mark.parametrize("piece_bytes", [1, 8, 100, 10**6])
def test_pieces_of_elements_cover_every_element_once(piece_bytes):
    tensors = [torch.zeros(shape, dtype=torch.int32) for shape in SHAPES]
    cut = pieces.cut_elements(tensors, tensors, piece_bytes, divides=True)
    for piece in cut:
        sizes = [block.numel() for part in piece.parts for block in part.sources]
        assert sum(sizes) * 4 <= max(piece_bytes, 4)
        for part in piece.parts:
            part.sources[0].add_(1)
    assert all(bool((tensor == 1).all()) for tensor in tensors)
    assert {part.tensor for piece in cut for part in piece.parts} == set(range(len(SHAPES)))
    smallest = -(-4 * sum(tensor.numel() for tensor in tensors) // max(piece_bytes, 4))
    assert smallest <= len(cut) <= smallest + len(tensors)


def test_pieces_of_whole_tensors_keep_them_whole():
    tensors = [torch.zeros(shape) for shape in SHAPES]
    cut = pieces.cut_elements(tensors, tensors, 100, divides=False)
    assert [[part.tensor for part in piece.parts] for piece in cut] == [[0, 1], [2], [3], [4, 5]]
    for part in (part for piece in cut for part in piece.parts):
        assert part.whole is tensors[part.tensor]


def test_a_piece_shows_the_engine_a_whole_tensors_shape_and_strides(cuda):
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    (piece,) = pieces.cut_elements([tensor], [tensor], 10**6, divides=True)
    for target, source in piece.allocate():
        target.copy_(source)
    assert piece.host_inputs[0].stride() == tensor.stride()
    assert torch.equal(piece.host_inputs[0], tensor)


def rows_of(collective: Collective, size: int) -> tuple[list[int], list[torch.Tensor]]:
    """A table of rows, and each rank's input with numbers of its own."""
    if collective == Collective.allgather:
        table = [3 * rank % 5 for rank in range(size)]
        lengths = table
    elif collective == Collective.alltoall:
        table = [(3 * sender + receiver) % 4 for sender in range(size) for receiver in range(size)]
        lengths = [sum(table[rank * size : (rank + 1) * size]) for rank in range(size)]
    else:
        table, lengths = [], [2 * size + 1] * size
    inputs = [
        (torch.arange(3 * length) + 1000 * rank).reshape(length, 3)
        for rank, length in enumerate(lengths)
    ]
    return table, inputs


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
def test_pieces_of_rows_bring_every_row_to_its_place(piece_bytes, size):
    # Oracle: the definition of each collective, by torch.cat and slices.
    for collective in (Collective.allgather, Collective.alltoall, Collective.reducescatter):
        table, inputs = rows_of(collective, size)
        if collective == Collective.allgather:
            expected = [torch.cat(inputs)] * size
        elif collective == Collective.alltoall:
            sent = [
                tensor.split(table[rank * size : (rank + 1) * size])
                for rank, tensor in enumerate(inputs)
            ]
            expected = [torch.cat([blocks[rank] for blocks in sent]) for rank in range(size)]
        else:
            each = [len(inputs[0]) // size + (rank < len(inputs[0]) % size) for rank in range(size)]
            expected = list(torch.stack(inputs).sum(0).split(each))
        outputs = [torch.full_like(result, -1) for result in expected]
        cuts = [
            pieces.cut_rows(collective, [i], [o], table, piece_bytes, rank, size)
            for rank, (i, o) in enumerate(zip(inputs, outputs, strict=True))
        ]
        assert len({len(cut) for cut in cuts}) == 1, "ranks must make equally many requests"
        for of_ranks in zip(*cuts, strict=True):
            exchange(collective, [piece.parts[0] for piece in of_ranks])
        for output, result in zip(outputs, expected, strict=True):
            assert torch.equal(output, result), collective


def exchange(collective: Collective, parts: list[pieces.Part]) -> None:
    """What the engine does with one piece of every rank."""
    for rank, part in enumerate(parts):
        if collective == Collective.allgather:
            arriving = [torch.cat(theirs.sources) for theirs in parts]
        elif collective == Collective.alltoall:
            arriving = [theirs.sources[rank] for theirs in parts]
        else:
            rows = torch.stack([torch.cat(theirs.sources) for theirs in parts]).sum(0)
            each, more = divmod(len(rows), len(parts))
            first = rank * each + min(rank, more)
            arriving = [rows[first : first + each + (rank < more)]]
        for target, values in zip(part.targets, arriving, strict=True):
            target.copy_(values)


def test_statistics_of_pieces_add_up_and_a_share_counts_once():
    tensors = [torch.ones(4) for _ in range(5)]
    groups = [2, 0, 2, 2, 0]
    cut = pieces.cut_elements(tensors, tensors, 32, divides=False)  # two tensors to a piece
    sums = pieces.Statistics(groups, [10.0, 20.0, 30.0])
    shares = []
    for piece in cut:
        numbers = sums.groups_of(piece)
        assert sorted(set(numbers)) == list(range(max(numbers) + 1))
        shares.append(sums.squares_of(piece))
        count = max(numbers) + 1
        rows = [float(numbers.count(number)) for number in range(count) for _ in range(4)]
        sums.add(piece, rows, [], [part.tensor for part in piece.parts])
    assert shares == [[10.0, 30.0], [0.0], [0.0]]
    room = launching.DeviceStats(
        torch.empty(3, 4, dtype=torch.float64), None, None, torch.empty(5, dtype=torch.int64)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "empty_pinned", lambda n, dtype: torch.empty(n, dtype=dtype))
        sums.write(room, ImmediateCopies(0))
    assert room.groups.tolist() == [[2.0] * 4, [0.0] * 4, [3.0] * 4]
    assert room.nonfinite.tolist() == [0, 1, 2, 3, 4]


def test_names_of_pieces_tell_calls_apart():
    def names(tensors: list[torch.Tensor], name: str | None = "w", **options: Any) -> list[Any]:
        arguments = {"op": ReduceOp.Sum, "groups": None} | options
        cut = pieces.cut_elements(tensors, tensors, 8, divides=True)
        return pieces.names_of(cut, Collective.allreduce, tensors, name=name, **arguments)

    usual = [torch.ones(2, 3), torch.ones(5)]
    assert names([torch.ones(2)]) == ["w"]
    first = names(usual)[0]
    assert first.startswith("w through the host of float32(2, 3), float32(5,) (")
    others = [names([torch.ones(3, 2), torch.ones(5)])[0], names(usual, op=ReduceOp.Min)[0],
              names(usual, groups=[0, 1])[0], names(usual, None)[0],
              names([usual[0].double(), usual[1]])[0]]  # fmt: skip
    assert len({first, *others}) == 6


# ---- the pipeline --------------------------------------------------------------------------------


class Story:
    """What happens to the pieces, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.unpassed = itertools.count()


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> Story:
    story = Story()
    names = itertools.cycle(["down", "up"])

    class Recorded(ImmediateCopies):
        def __init__(self, device: int) -> None:
            super().__init__(device)
            self.name, self.count = next(names), itertools.count()

        def mark(self) -> streams.Mark:
            number = next(self.count)
            story.events.append(f"{self.name} {number}")
            mark = PassedMark()
            mark.wait = lambda: story.events.append(f"wait {self.name} {number}")
            return mark

    class Reduction:
        def __init__(self, number: int) -> None:
            self.number = number

        def is_finished(self) -> bool:
            return True

        def wait_for(self, seconds: float) -> bool:
            story.events.append(f"reduced {self.number}")
            return True

        def rethrow(self) -> None:
            pass

    numbers = itertools.count()

    def submit(*arguments: Any, **options: Any) -> Reduction:
        number = next(numbers)
        story.events.append(f"submit {number}")
        return Reduction(number)

    monkeypatch.setattr(streams, "CopyStream", Recorded)
    monkeypatch.setattr(staging, "submit", submit)
    monkeypatch.setattr(staging, "PIECE_BYTES", 40)
    return story


def run_staged(numel: int) -> None:
    members = types.SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    tensor = torch.ones(numel)
    staging.stage(
        Collective.allreduce, [tensor], [tensor], device=0, name=None, process_set=members
    )


def test_the_next_piece_is_on_its_way_while_one_is_reduced(story):
    run_staged(50)  # five pieces of ten elements
    at = story.events.index
    for piece in range(4):
        assert at(f"submit {piece}") < at(f"down {piece + 1}") < at(f"reduced {piece}")
        assert at(f"up {piece}") < at(f"submit {piece + 1}")
    assert "wait up 4" not in story.events, "the host does not wait for the last copies"


def test_three_pieces_at_most_are_in_pinned_memory(story):
    run_staged(100)
    at = story.events.index
    for piece in range(3, 10):  # its copy down begins when the third before it is up
        assert at(f"wait up {piece - 3}") < at(f"down {piece}")


def test_the_staged_path_refuses_to_be_captured(story, cuda):
    cuda.is_capturing = True
    with pytest.raises(ValueError, match="allreduce: stream must not be captured"):
        run_staged(5)
    assert story.events == []


# ---- settings, build, info -----------------------------------------------------------------------


def test_the_path_is_a_setting():
    assert Settings.from_environment({}).cuda_path == CudaPath.auto
    for name in ("auto", "nccl", "peer", "staged"):
        chosen = Settings.from_environment({"ADAREDUCE_CUDA_PATH": name}).cuda_path
        assert chosen == CudaPath[name]
    for wrong in ("single", "gpu"):
        with pytest.raises(ValueError, match=f"one of auto, nccl, peer, staged, got '{wrong}'"):
            Settings.from_environment({"ADAREDUCE_CUDA_PATH": wrong})


def described(**changes: Any) -> dict[str, Any]:
    gpu = {"name": "A GPU", "uuid": "GPU-1", "capability": 90, "multiprocessors": 132,
           "memory_bytes": 141 * 2**30}  # fmt: skip
    return {"cuda_runtime": 13000, "cuda_driver": 13020, "gpus": [gpu], "problem": "",
            "nccl_version": 22809, "nccl_path": "/lib/libnccl.so.2",
            "nccl_why_not": ""} | changes  # fmt: skip


@pytest.fixture
def with_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    def describe(**changes: Any) -> dict[str, str]:
        module = types.SimpleNamespace(describe=lambda: described(**changes))
        monkeypatch.setattr(cuda_library, "is_built", lambda: True)
        monkeypatch.setattr(cuda_library, "load", lambda: module)
        return info._cuda()

    return describe


def test_info_names_cuda_driver_gpus_and_nccl(with_module):
    facts = with_module()
    assert facts["runtime"] == "13.0"
    assert facts["driver"] == "serves CUDA 13.2"
    assert facts["gpu 0"] == "A GPU, sm_90, 132 SMs, 141 GiB, GPU-1"
    assert facts["nccl"] == "2.28.9, /lib/libnccl.so.2"
    assert facts["enabled"].startswith("NCCL, peer memory in a node, staging")
    assert hvd.nccl_built() == 22809


def test_info_says_what_is_missing_and_why(with_module):
    facts = with_module(nccl_version=0, nccl_path="", nccl_why_not="no libnccl.so.2 was found")
    assert facts["nccl"] == "none (no libnccl.so.2 was found)"
    assert facts["enabled"].startswith("peer memory in a node, staging")
    assert hvd.nccl_built() == 0
    facts = with_module(gpus=[], cuda_driver=0, problem="no CUDA-capable device is detected")
    assert facts["driver"] == "none"
    assert facts["enabled"] == "nothing: no CUDA-capable device is detected"


def test_info_speaks_of_a_build_without_cuda(monkeypatch):
    build = pytest.importorskip("adareduce._build_info").BUILD
    monkeypatch.setattr(cuda_library, "is_built", lambda: False)
    monkeypatch.setitem(build, "cuda_reason", "no nvcc was found")
    assert info._cuda()["built for"] == "none (no nvcc was found)"
    with pytest.raises(ImportError, match=r"no CUDA \(no nvcc was found\): install adareduce"):
        cuda_library.load()
