"""The report of what kernels need: it reads ptxas rightly and does not let a spill pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernel_resources  # noqa: E402
from kernel_resources import Usage  # noqa: E402

# As nvcc 13.0 prints it, of two architectures and between lines of a build.
LOG = """\
[3/9] Building CUDA object pair.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9adareduce4cuda11pair_kernelIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN9adareduce4cuda11pair_kernelIfEEvPT_
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compile time = 1.782 ms
ptxas info    : Compiling entry function '_ZN9adareduce4cuda11pair_kernelIfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for slow_path_of_a_division
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _ZN9adareduce4cuda11pair_kernelIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for another_slow_path
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers
[4/9] Linking
"""
PAIR = "_ZN9adareduce4cuda11pair_kernelIfEEvPT_"


def test_registers_stack_spills_and_shared_memory_are_read_by_architecture() -> None:
    assert kernel_resources.parse(LOG) == [
        Usage(PAIR, "80", 40, 16, 12, 20, 1024),
        Usage(PAIR, "90a", 38, 0, 0, 0, 0),
    ]


def test_names_are_as_in_the_source() -> None:
    names = {
        "void adareduce::cuda::(anonymous namespace)::pair_kernel<float, (int)2>(Args)":
            "pair_kernel<float, (int)2>",
        "adareduce::cuda::_GLOBAL__N__877d7608_7_pair_cu_c0da1755::f(double const*)": "f",
        "_Zunknown": "_Zunknown",
    }  # fmt: skip
    assert [kernel_resources.short(name) for name in names] == list(names.values())


@pytest.mark.parametrize(
    ("name", "stack", "spilled", "is_guilty"),
    [
        ("pair_kernel<float>", 0, 0, False),
        ("pair_kernel<float>", 0, 4, True),
        ("pair_kernel<float>", 16, 0, True),
        ("finalise_kernel", 0, 4, False),
        ("pair_kernel<finalise>", 0, 4, True),  # the kernel's name counts, not its arguments
    ],
)
def test_only_small_kernels_may_use_local_memory(
    name: str, stack: int, spilled: int, is_guilty: bool
) -> None:
    usage = Usage("k", "90", 32, stack, spilled, spilled, 0)
    guilty = kernel_resources.spilling([usage], {"k": name}, kernel_resources._SMALL)
    assert guilty == ([usage] if is_guilty else [])


def test_a_spill_is_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, file = tmp_path / "build.log", tmp_path / "rows.jsonl"
    log.write_text(LOG)
    assert kernel_resources.main(["--log", str(log), "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "40 spill 12+20" in printed
    assert "FAILED" in printed
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["architecture"], row["registers"]) for row in rows] == [("80", 40), ("90a", 38)]
    # On the other architecture alone nothing is amiss.
    log.write_text(LOG[LOG.index("for 'sm_80'") :].partition("Compile time")[2])
    assert kernel_resources.main(["--log", str(log)]) == 0


def test_a_build_without_kernels_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "build.log").write_text("[1/1] Linking\n")
    assert kernel_resources.main(["--log", str(tmp_path / "build.log")]) == 1
