"""The build backend's choice of MPI, and what an installed package consists of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import adareduce
import choose_cuda
from choose_mpi import ChoiceError, choose, isolated_prefixes

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.openmpi_round


def make_mpi(prefix: Path, wheel: str = "mpich") -> Path:
    """A folder that looks like an environment with an MPI wheel; returns its mpicc."""
    mpicc = prefix / "bin" / "mpicc"
    mpicc.parent.mkdir(parents=True)
    mpicc.write_text("#!/bin/sh\n")
    mpicc.chmod(0o755)
    (prefix / "lib" / wheel).mkdir(parents=True)
    (prefix / "lib" / "libmpi.so.12").touch()
    return mpicc


def path_of(*prefixes: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join(str(prefix / "bin") for prefix in prefixes)}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The prefix of an environment without MPI."""
    prefix = tmp_path / "empty"
    (prefix / "bin").mkdir(parents=True)
    return prefix


def test_the_users_mpicc_comes_before_the_wheel_in_the_environment(tmp_path):
    make_mpi(tmp_path / "environment")
    mine = make_mpi(tmp_path / "mine")
    choice = choose({"ADAREDUCE_MPI": str(mine)}, tmp_path / "environment")
    assert (choice.mpicc, choice.place) == (mine, "outside")


def test_the_wheel_in_the_environment_comes_before_the_mpicc_on_path(tmp_path):
    own = make_mpi(tmp_path / "environment", "openmpi")
    make_mpi(tmp_path / "cluster")
    choice = choose(path_of(tmp_path / "cluster"), tmp_path / "environment")
    assert (choice.mpicc, choice.place, choice.requires) == (own, "environment", ())


def test_the_mpicc_on_path_comes_before_a_wheel_that_would_have_to_be_brought(tmp_path, empty):
    mpicc = make_mpi(tmp_path / "cluster")
    choice = choose(path_of(empty, tmp_path / "cluster"), empty)
    assert (choice.mpicc, choice.place, choice.requires) == (mpicc, "outside", ())


def test_what_lies_in_pips_build_environment_does_not_hide_the_clusters_mpicc(tmp_path, empty):
    make_mpi(tmp_path / "overlay")
    mpicc = make_mpi(tmp_path / "cluster")
    variables = path_of(tmp_path / "overlay", tmp_path / "cluster")
    assert choose(variables, empty, [tmp_path / "overlay"]).mpicc == mpicc


def test_without_any_mpi_the_mpich_wheel_is_requested_and_then_used(tmp_path, empty):
    first = choose(path_of(empty), empty)
    assert first.mpicc is None
    assert [name.partition(">")[0] for name in first.requires] == ["mpich"]
    brought = make_mpi(tmp_path / "overlay")
    second = choose(path_of(tmp_path / "overlay", empty), empty, [tmp_path / "overlay"])
    assert (second.mpicc, second.place, second.requires) == (brought, "build", ())


def test_a_wheel_asked_for_by_name_is_requested_although_another_is_there(tmp_path):
    make_mpi(tmp_path / "environment", "mpich")
    choice = choose({"ADAREDUCE_MPI": "openmpi"}, tmp_path / "environment")
    assert [name.partition(">")[0] for name in choice.requires] == ["openmpi"]


def test_the_activated_environment_counts_where_the_build_has_one_of_its_own(tmp_path, empty):
    own = make_mpi(tmp_path / "activated")
    variables = {"VIRTUAL_ENV": str(tmp_path / "activated"), "PATH": ""}
    assert choose(variables, empty).mpicc == own
    # Under pip sys.prefix is the target, and another environment may happen to be activated.
    assert choose(variables, empty, [tmp_path / "overlay"]).mpicc is None


@pytest.mark.parametrize("word", ["off", "OFF", "none", "0"])
def test_off_means_no_mpi_and_no_wheel(tmp_path, word):
    make_mpi(tmp_path)
    choice = choose({"ADAREDUCE_MPI": word}, tmp_path)
    assert (choice.mpicc, choice.requires) == (None, ())


def test_a_setting_that_is_no_executable_is_refused_with_its_value(tmp_path, empty):
    with pytest.raises(ChoiceError, match=r"must be the path of an mpicc.*'/no/such/mpicc'"):
        choose({"ADAREDUCE_MPI": "/no/such/mpicc"}, empty)


def test_an_mpicc_without_its_library_is_no_mpi_of_the_environment(tmp_path):
    mpicc = make_mpi(tmp_path)
    (tmp_path / "lib" / "libmpi.so.12").unlink()
    assert choose({"PATH": str(mpicc.parent)}, tmp_path).place == "outside"


@pytest.mark.parametrize(
    ("word", "choice"),
    [("", "AUTO"), (" Auto", "AUTO"), ("on", "ON"), ("1", "ON"), ("off", "OFF"), ("none", "OFF")],
)
def test_the_setting_of_cuda_is_cmakes(word, choice):
    assert choose_cuda.choose({"ADAREDUCE_CUDA": word}) == choice


def test_cuda_is_built_where_there_is_an_nvcc_unless_somebody_says_otherwise():
    assert choose_cuda.choose({}) == "AUTO"


def test_an_unknown_setting_of_cuda_is_refused():
    with pytest.raises(ChoiceError, match=r"ADAREDUCE_CUDA must be .* got '90'"):
        choose_cuda.choose({"ADAREDUCE_CUDA": "90"})


def test_pips_build_environments_are_known_by_sys_path(monkeypatch, tmp_path):
    own = sysconfig.get_path("purelib")
    overlay = tmp_path / "any-name" / "lib" / "python3" / "site-packages"
    others = [entry for entry in sys.path if os.path.basename(entry) != "site-packages"]
    monkeypatch.setattr(sys, "path", [*others, str(overlay)])
    assert isolated_prefixes() == [tmp_path / "any-name"]
    # A cluster's PYTHONPATH looks alike, but leaves the interpreter's own packages in place.
    monkeypatch.setattr(sys, "path", [*others, str(overlay), own])
    assert isolated_prefixes() == []


def run_python(*arguments: str, **variables: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | variables,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_version_is_the_one_of_pyproject():
    stated = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert adareduce.__version__ == importlib.metadata.version("adareduce") == stated[1]


def test_every_source_file_is_named_in_cmakelists():
    files = [ROOT / "CMakeLists.txt", ROOT / "cmake" / "cuda.cmake"]
    listed = {name for file in files for name in re.findall(r"[\w/]+\.cpp", file.read_text())}
    found = {file.relative_to(ROOT).as_posix() for file in (ROOT / "csrc").rglob("*.cpp")}
    # A layer's files are listed without the layer's folder, kernels of CUDA without theirs.
    kernels = "csrc/kernels/cuda/"
    missing = {
        name
        for name in found
        if not listed & {name, name.split("/", 2)[2], name.removeprefix(kernels)}
    }
    assert not missing


def test_info_reports_the_modules_and_the_mpi_as_json():
    found = json.loads(run_python("-m", "adareduce.info", "--json", ADAREDUCE_TEST_MARK="seen"))
    assert found["adareduce"] == importlib.metadata.version("adareduce")
    assert found["modules"]["_core"] == "loads"
    assert found["environment"]["ADAREDUCE_TEST_MARK"] == "seen"
    assert found["mpi"]["built for"]
    assert found["mpi"].get("loaded now", "none") == "none"


def test_info_prints_a_table():
    lines = run_python("-m", "adareduce.info").splitlines()
    assert any(line.split()[:2] == ["_core", "loads"] for line in lines)
    assert max(map(len, lines)) < 300


def test_info_works_without_torch_and_mpi4py():
    script = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['mpi4py'] = sys.modules['numpy'] = None\n"
        "sys.argv = ['info']\n"
        "runpy.run_module('adareduce.info', run_name='__main__')\n"
    )
    assert "_core" in run_python("-c", script)


@pytest.mark.parametrize("name", ["adareduce", "adareduce._core", "adareduce.torch"])
def test_importing_loads_no_mpi(name):
    script = (
        f"import {name}, sys\n"
        "print('libmpi' in open('/proc/self/maps').read(), 'mpi4py.MPI' in sys.modules)\n"
    )
    assert run_python("-c", script).split() == ["False", "False"]


def dynamic_section(name: str) -> dict[str, list[str]]:
    """DT_NEEDED and DT_RUNPATH of a module of the package (64-bit little-endian ELF)."""
    spec = importlib.util.find_spec(f"adareduce.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} was not built")
    data = Path(spec.origin).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    offset, entry_size, count = (
        struct.unpack_from("<Q", data, 40)[0],
        *struct.unpack_from("<HH", data, 58),
    )
    # Of a section header: type, file offset, size, and the index of its string table.
    headers = [struct.unpack_from("<IIQQQQII", data, offset + i * entry_size) for i in range(count)]
    dynamic = next(header for header in headers if header[1] == 6)
    strings = headers[dynamic[6]][4]
    found: dict[str, list[str]] = {"needed": [], "runpath": []}
    for at in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<qQ", data, at)
        kind = {1: "needed", 15: "runpath", 29: "runpath"}.get(tag)
        if kind is not None:
            start = strings + value
            found[kind].append(data[start : data.index(b"\0", start)].decode())
    return found


def test_core_links_neither_mpi_nor_cuda_nor_torch():
    needed = dynamic_section("_core")["needed"]
    assert any(name.startswith("libstdc++") for name in needed), "the reader finds what is there"
    assert not [name for name in needed if re.match(r"lib(p?mpi|cu|nccl|torch|c10)", name)]


def test_cuda_module_needs_no_library_of_cuda_or_torch():
    # Its runtime is linked statically, and NCCL is looked for when it is wanted.
    needed = dynamic_section("_cuda")["needed"]
    assert any(name.startswith("libstdc++") for name in needed), "the reader finds what is there"
    assert not [name for name in needed if re.match(r"lib(p?mpi|cu|nccl|torch|c10)", name)]


def test_mpi_module_looks_in_the_environment_and_in_no_temporary_folder():
    section = dynamic_section("_mpi")
    assert [name for name in section["needed"] if name.startswith("libmpi")]
    folders = ":".join(section["runpath"]).split(":")
    assert "$ORIGIN/../../.." in folders
    assert not [folder for folder in folders if "pip-" in folder]
