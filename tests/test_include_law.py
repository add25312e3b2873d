"""The walls of the house: which file may include or import which. See csrc/README.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# A layer may include itself and these.
ALLOWED = {
    "base": set(),
    "kernels": {"base"},
    "bootstrap": {"base"},
    "transports": {"base", "bootstrap"},
    "collectives": {"base", "kernels", "bootstrap", "transports"},
    "engine": {"base", "kernels", "bootstrap", "transports", "collectives"},
    "bindings": {"base", "kernels", "bootstrap", "transports", "collectives", "engine"},
}

# Headers of other libraries, and the only places (folders or files) that may include them.
CUDA = ("kernels/cuda/", "transports/nccl/", "transports/cuda_peer/", "engine/cuda/")
FOREIGN: dict[str, tuple[str, ...]] = {
    r"mpi(-ext)?\.h": ("transports/mpi/",),
    r"pybind11/.*": ("bindings/",),
    r"Python\.h": ("bindings/",),
    r"(torch|ATen|c10)/.*": (),
    r"(?!base/|kernels/)cuda.*\.h|cuda/.*|nvtx3/.*": CUDA,
    r"nccl\.h": (),  # declared by hand: any version of the library will do
}

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)
SOURCES = sorted(
    file.relative_to(CSRC)
    for file in CSRC.rglob("*")
    if file.suffix in {".h", ".cpp", ".cuh", ".cu"}
)


def includes_of(source: Path) -> list[str]:
    return INCLUDE.findall((CSRC / source).read_text())


def violations(source: Path, includes: list[str]) -> list[str]:
    layer = source.parts[0]
    found = []
    for included in includes:
        target = included.split("/")[0]
        if target in ALLOWED and target != layer and target not in ALLOWED[layer]:
            found.append(f"{source} includes {included}, but {layer} may not know {target}")
        for pattern, places in FOREIGN.items():
            if re.fullmatch(pattern, included) and not str(source).startswith(
                places or ("nowhere",)
            ):
                found.append(
                    f"{source} includes {included}, which belongs in {places or 'no file'}"
                )
    return found


def test_every_source_lies_in_a_layer():
    assert {source.parts[0] for source in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_no_file_includes_a_layer_to_its_right(source):
    assert violations(source, includes_of(source)) == []


@pytest.mark.parametrize(
    ("source", "included"),
    [
        ("kernels/x.cpp", "transports/transport.h"),
        ("transports/x.cpp", "kernels/kernels.h"),
        ("engine/x.cpp", "mpi.h"),
        ("collectives/x.cpp", "pybind11/pybind11.h"),
        ("bindings/x.cpp", "torch/extension.h"),
        ("bindings/x.cpp", "cuda_runtime.h"),
        ("kernels/x.cpp", "cuda_fp16.h"),
        ("transports/nccl/x.cpp", "nccl.h"),
    ],
)
def test_the_law_is_not_blind(source, included):
    assert violations(Path(source), [included])


def test_every_source_is_listed_by_name_in_the_build():
    cmake = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "cmake" / "cuda.cmake").read_text()
    assert "GLOB" not in cmake
    missing = [str(s) for s in SOURCES if s.suffix in {".cpp", ".cu"} and s.name not in cmake]
    assert missing == []


def imports_of(source: Path) -> set[str]:
    """Absolute names of all modules that a Python file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_nothing_but_the_torch_layer_imports_torch():
    package = ROOT / "python" / "adareduce"
    for source in package.rglob("*.py"):
        layer = source.relative_to(package).parts[0]
        imported = imports_of(source)
        if layer in ("torch", "bench", "check.py"):  # torch and what is built upon it
            continue
        # info.py reports torch's version and must work without it
        assert not any(name.startswith("adareduce.torch") for name in imported), source
        if source.name != "info.py":
            assert not any(name.split(".")[0] == "torch" for name in imported), source


def test_modules_below_the_runtime_do_not_know_it():
    package = ROOT / "python" / "adareduce"
    for name in ("settings.py", "ops.py", "logs.py", "mpi_library.py"):
        assert not any(
            module.startswith("adareduce.runtime") for module in imports_of(package / name)
        )
