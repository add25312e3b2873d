"""The benchmark on CUDA tensors, as far as it can be looked at without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adareduce.bench import arguments, gpu, machine
from adareduce.bench.peers import NAMES
from adareduce.bench.report import Table
from adareduce.bench.timing import Contender, HostClock, measure

FOUND = {
    "gpu": {"name": "A GPU", "memory_bytes": 80 * 2**30, "l2_bytes": 50 * 2**20},
    "gpu_versions": {"cuda": "13.0", "nccl": "2.28.9"},
    "path": "peer",
    "path_why": "all ranks share a GPU",
}


def parse(monkeypatch: pytest.MonkeyPatch, command: str, has_gpu: bool = True) -> Any:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    return arguments.parse(command.split())


def test_cuda_tensors_need_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, "allreduce --device cuda", has_gpu=False)
    assert "--device must be cpu: torch sees no GPU" in capsys.readouterr().err
    assert parse(monkeypatch, "allreduce --device cuda").on_gpu
    assert not parse(monkeypatch, "allreduce").on_gpu


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("barrier --device cuda", "--device must be cpu for barrier"),
        ("allreduce -G 1", "--cudagraph must be 0 without --device cuda, got 1"),
        ("allreduce --device cuda -G 2", "invalid choice: 2"),
    ],
)
def test_what_makes_no_sense_on_a_gpu_is_refused(
    command: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, command)
    assert message in capsys.readouterr().err


def test_the_header_names_gpu_path_and_each_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions_line", lambda: "versions")
    settings = parse(monkeypatch, "allreduce --device cuda --peers -G 1 -o adasum")
    text = Table(settings).header([" Rank  0 device cuda:0 [A GPU, uuid]"], gpu.header(FOUND))
    assert "# A GPU, 80 GiB, L2 50 MiB, CUDA 13.0, NCCL 2.28.9\n" in text
    assert "# path: peer: all ranks share a GPU\n" in text
    assert "Rank  0 device cuda:0 [A GPU, uuid]" in text
    assert "captured once and replayed" in text
    assert "# nccl: no Adasum there; this is the sum\n" in text
    assert text.splitlines()[-2].split().count("nccl") == 1
    assert "gloo" not in text


def test_the_peer_of_cuda_tensors_is_nccl() -> None:
    assert NAMES == {"cpu": ("gloo", "mpi"), "cuda": ("nccl",)}


@pytest.mark.parametrize(
    ("code", "text"), [(22809, "2.28.9"), (23003, "2.30.3"), (2708, "2.7.8"), (0, "none")]
)
def test_nccls_code_is_read_as_a_version(code: int, text: str) -> None:
    assert gpu.nccl_text(code) == text


def test_a_clock_settles_before_the_ranks_meet_and_measures_nothing_else() -> None:
    log: list[str] = []

    class Clock(HostClock):
        def settle(self) -> None:
            log.append("settle")

        def seconds(self, run: Any) -> float:
            run()
            return 2.5

    ranks: Any = SimpleNamespace(align=lambda: log.append("align"), gather=lambda value: [value])
    contender = Contender("ours", lambda: log.append("run"), lambda: log.append("prepare"))
    found = measure([contender], ranks, 0, 1, Clock())
    assert log == ["prepare", "settle", "align", "run"]
    assert found["ours"].tolist() == [2.5]


def test_a_copy_that_is_installed_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAREDUCE_BENCH_COMMIT", "0123abc")
    assert machine.commit() == "0123abc"
