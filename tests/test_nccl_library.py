"""Where Python says that NCCL lies. Oracle: files that the test has made."""

from __future__ import annotations

import importlib
import sys

import pytest

from adareduce import nccl_library


@pytest.fixture
def alone(monkeypatch):
    """Puts folders in front of the path, where no package of NVIDIA is known but theirs."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    path: list[str] = []
    monkeypatch.setattr(sys, "path", path)
    importlib.invalidate_caches()
    yield lambda folder: path.insert(0, folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        sys.modules.pop(name)


def install(folder, *files):
    for file in files:
        (folder / "nvidia" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "nvidia" / file).touch()
    return str(folder)


def test_an_installed_package_is_found(alone, tmp_path):
    alone(install(tmp_path, "nccl/lib/libnccl.so.2", "nccl/include/nccl.h"))
    assert nccl_library.folders() == [str(tmp_path / "nvidia" / "nccl" / "lib")]


def test_a_package_without_the_library_is_none(alone, tmp_path):
    alone(install(tmp_path, "nccl/include/nccl.h"))
    assert nccl_library.folders() == []


def test_another_package_of_nvidia_is_none(alone, tmp_path):
    alone(install(tmp_path, "cublas/lib/libcublas.so.12"))
    assert nccl_library.folders() == []


def test_without_packages_there_are_no_folders(alone):
    assert nccl_library.folders() == []


def test_every_place_of_the_path_counts(alone, tmp_path):
    places = [tmp_path / "b", tmp_path / "a"]
    for place in reversed(places):
        alone(install(place, "nccl/lib/libnccl.so.2"))
    assert nccl_library.folders() == [str(place / "nvidia" / "nccl" / "lib") for place in places]
