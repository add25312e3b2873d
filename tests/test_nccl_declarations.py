"""The declarations of NCCL that are written by hand, against NVIDIA's headers and libraries.

Headers are those of an installed nvidia-nccl wheel and all nccl.h below the folders that
ADAREDUCE_NCCL_HEADERS names (tests/nccl_headers.py makes one). Oracle: the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DECLARATIONS = ROOT / "csrc" / "transports" / "nccl" / "nccl_api.h"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

# What nccl.h includes of CUDA beside the runtime's header, which the emulation has.
STAND_INS = {
    "cuda_fp16.h": "",
    "cuda_fp8.h": "",
    "cuda_bf16.h": "#define __CUDA_BF16_TYPES_EXIST__\n",
}


def headers() -> list[Path]:
    folders = [Path(f) for f in os.environ.get("ADAREDUCE_NCCL_HEADERS", "").split(os.pathsep) if f]
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        spec = None
    if spec is not None:
        folders += [Path(f) for f in spec.submodule_search_locations or []]
    return sorted({header.resolve() for folder in folders for header in folder.rglob("nccl.h")})


def version_of(header: Path) -> tuple[int, int, int]:
    text = header.read_text()
    parts = [re.search(rf"#define NCCL_{p} +(\d+)", text) for p in ("MAJOR", "MINOR", "PATCH")]
    major, minor, patch = (int(part[1]) for part in parts if part)
    return major, minor, patch


HEADERS = headers()
for_each_header = pytest.mark.parametrize(
    "header",
    HEADERS
    or [
        pytest.param(
            None,
            marks=pytest.mark.skip("no nccl.h: neither a wheel nor ADAREDUCE_NCCL_HEADERS is here"),
        )
    ],
    ids=lambda header: ".".join(map(str, version_of(header))) if header else "none",
)


def compile_with(header: Path, scratch: Path, declarations: str) -> str:
    """The compiler's complaints about these declarations beside that header."""
    for name, content in STAND_INS.items():
        (scratch / name).write_text(content)
    ours = scratch / "transports" / "nccl" / "nccl_api.h"
    ours.parent.mkdir(parents=True, exist_ok=True)
    ours.write_text(declarations)
    emulation = ROOT / "tests" / "cuda_emulation" / "include"
    assert COMPILER is not None, "no C++ compiler was found"
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof"]
    includes = [scratch, header.parent, emulation]
    command += [f"-I{folder}" for folder in includes]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "cpp" / "nccl_declarations.cpp")],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr


@for_each_header
def test_declarations_agree_with_the_header(header, tmp_path):
    assert compile_with(header, tmp_path, DECLARATIONS.read_text()) == ""


@pytest.mark.skipif(not HEADERS, reason="no nccl.h is here")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ncclAvg = 4", "ncclAvg = 5"),
        ("ncclBfloat16 = 9", "ncclBfloat16 = 10"),
        ("ncclInvalidUsage = 5", "ncclInvalidUsage = 6"),
        ("char internal[128]", "char internal[256]"),
        ("int minCTAs = kConfigUndefined;", ""),
        ("0xcafebeef", "0xcafebeee"),
        ("(ncclUniqueId* id)", "(char* id)"),
        ("std::size_t send_count", "int send_count"),
        ("ncclDataType_t type, int root,", "int root, ncclDataType_t type,"),
        ("int peer,\n", ""),
        ("const void* data, std::size_t count", "void* data, std::size_t count"),
        ("X(ncclCommAbort)", ""),
    ],
)
def test_the_comparison_is_not_blind(right, wrong, tmp_path):
    text = DECLARATIONS.read_text()
    assert right in text
    complaint = compile_with(HEADERS[0], tmp_path, text.replace(right, wrong, 1))
    assert "static assertion failed" in complaint or "error: static_assert" in complaint


# Runs in a process of its own: two NCCL libraries must not meet.
ASK_LIBRARY = """
import ctypes, json, sys
nccl = ctypes.CDLL(sys.argv[1])
version = ctypes.c_int()
status = nccl.ncclGetVersion(ctypes.byref(version))
missing = [name for name in sys.argv[2:] if not hasattr(nccl, name)]
# As Communicator::drop_group does it: a refused call, and the end of the group.
dropped = [
    nccl.ncclGroupStart(),
    nccl.ncclSend(None, ctypes.c_size_t(0), 0, 0, None, None),
    nccl.ncclGroupEnd(),
]
after = [nccl.ncclGroupStart(), nccl.ncclGroupEnd()]
print(json.dumps([status, version.value, missing, dropped, after]))
"""


@for_each_header
def test_the_library_has_the_functions_and_forgets_a_group_after_a_refused_call(header):
    library = header.parent.parent / "lib" / "libnccl.so.2"
    if not library.exists():
        pytest.skip(f"{library} is not there")
    names = re.findall(r"X\((nccl\w+)\)", DECLARATIONS.read_text())
    done = subprocess.run(
        [sys.executable, "-c", ASK_LIBRARY, str(library), *names],
        capture_output=True,
        text=True,
        check=True,
    )
    major, minor, patch = version_of(header)
    version = 10000 * major + 100 * minor + patch
    success, invalid_argument = 0, 4
    assert len(names) > 10
    assert done.stdout.strip() == (
        f"[{success}, {version}, [], [{success}, {invalid_argument}, {invalid_argument}], "
        f"[{success}, {success}]]"
    )
