"""One MPI library per process: what is refused, and with which words.

Everything that loads a library runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adareduce import mpi_library

pytestmark = pytest.mark.openmpi_round

HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
SRUN = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": "9", "SLURM_PROCID": "0"}

LIBRARY = mpi_library.expected()
needs_mpi = pytest.mark.skipif(
    LIBRARY is None or importlib.util.find_spec("mpi4py") is None,
    reason="this build has no MPI, or mpi4py is missing",
)


def load_in_new_process(
    before: str = "", after: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs load() between two pieces of code; a RuntimeError's text goes to stdout."""
    script = (
        f"{before}\n"
        "from adareduce import mpi_library\n"
        "try:\n"
        "    MPI = mpi_library.load()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "    raise SystemExit(3)\n"
        f"{after}\n"
        "MPI.Finalize()\n"
    )
    # The tests may themselves run under an mpirun, whose marks would reach the child.
    marks = ("PMI_", "PMIX_", "OMPI_COMM_", "MPI_LOCAL", "HYDI_", "MPI4PY_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(marks)}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refusal(before: str = "", **variables: str) -> str:
    result = load_in_new_process(before, **variables)
    assert result.returncode == 3, result.stdout + result.stderr
    return result.stdout


def test_each_mpirun_is_recognised():
    hydra = mpi_library.launcher(HYDRA)
    open_mpi = mpi_library.launcher(OPEN_MPI)
    assert hydra is not None
    assert (hydra.family, hydra.size) == ("MPICH", 2)
    assert open_mpi is not None
    assert (open_mpi.family, open_mpi.size) == ("Open MPI", 2)


@pytest.mark.parametrize("variables", [{}, SRUN, HYDRA | OPEN_MPI])
def test_no_mpirun_or_an_uncertain_one_is_not_judged(variables):
    assert mpi_library.launcher(variables) is None


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"..MPICH Version..", "MPICH"),
        (b"..ompi_mpi_comm_world..MPICH..", "Open MPI"),
        (b"..Intel(R) MPI Library..MPICH..", "Intel MPI"),
        (b"nothing", "an unknown MPI"),
        (b"", "an unknown MPI"),
    ],
)
def test_vendor_is_read_from_the_file(tmp_path, content, name):
    file = tmp_path / "libmpi.so.12"
    file.write_bytes(content)
    assert mpi_library.vendor(file) == name


@pytest.mark.parametrize("place", ["environment", "build"])
def test_the_environments_library_is_preferred_to_the_one_built_with(monkeypatch, tmp_path, place):
    info = pytest.importorskip("adareduce._build_info")
    baked = tmp_path / "elsewhere" / "libmpi.so.12"
    own = tmp_path / "lib" / "libmpi.so.12"
    for file in (baked, own):
        file.parent.mkdir()
        file.touch()
    built = {"vendor": "MPICH", "version": "5", "soname": own.name, "mpicc": "", "place": place}
    monkeypatch.setattr(info, "MPI", built | {"library": str(baked)})
    monkeypatch.setattr(mpi_library, "_environment_folders", lambda: [own.parent])
    assert mpi_library.expected().path == own
    own.unlink()
    assert mpi_library.expected().path == baked
    baked.unlink()
    assert mpi_library.expected().path is None


@needs_mpi
def test_load_gives_an_initialised_mpi_and_one_library():
    result = load_in_new_process(
        after="import mpi4py\n"
        "assert MPI.Query_thread() == MPI.THREAD_MULTIPLE\n"
        "assert mpi4py.rc.finalize is False\n"
        "print(MPI.COMM_WORLD.size, *map(str, mpi_library.loaded()))"
    )
    assert result.returncode == 0, result.stderr
    size, *libraries = result.stdout.split()
    assert size == "1"
    assert libraries == [os.path.realpath(LIBRARY.path)]


@needs_mpi
def test_load_accepts_an_mpi4py_that_was_imported_before():
    result = load_in_new_process(
        before="from mpi4py import MPI", after="print(MPI.Is_initialized())"
    )
    if LIBRARY.path.parent != Path(sys.prefix, "lib"):
        pytest.skip("mpi4py alone finds the environment's library, this build is for another")
    assert result.stdout.strip() == "True", result.stdout + result.stderr


@needs_mpi
@pytest.mark.parametrize("name", ["libmpi.so.12", "libmpi.so.40", "libmpi_abi.so.1"])
def test_another_library_in_the_process_is_refused_whatever_its_name(tmp_path, name):
    # Any shared object will do: what counts is a second file that is called like an MPI. One of the
    # names is that of the right library, which the loader alone would not tell apart.
    intruder = tmp_path / name
    shutil.copy(importlib.util.find_spec("adareduce._core").origin, intruder)
    text = refusal(f"import ctypes; ctypes.CDLL({str(intruder)!r})")
    assert text.startswith("init: two MPI libraries in one process")
    assert str(LIBRARY.path) in text
    assert f"({intruder}) is loaded too" in text
    assert LIBRARY.vendor in text
    assert "ADAREDUCE_MPI" in text


@needs_mpi
def test_the_mpirun_of_the_other_family_is_refused():
    other = HYDRA if LIBRARY.vendor == "Open MPI" else OPEN_MPI
    text = refusal(**other)
    assert ("MPICH's mpirun" if other is HYDRA else "Open MPI's mpirun") in text
    assert LIBRARY.vendor in text
    assert "job of one" in text
    assert "ADAREDUCE_MPI" in text


@needs_mpi
def test_an_mpi4py_of_the_other_family_is_refused_before_it_is_imported():
    other = "mpich" if LIBRARY.vendor == "Open MPI" else "openmpi"
    text = refusal(MPI4PY_MPIABI=other)
    assert "mpi4py does not work with" in text
    assert "unset MPI4PY_MPIABI" in text


@needs_mpi
def test_a_missing_mpi4py_is_named_with_the_cure():
    text = refusal("import sys; sys.modules['mpi4py'] = None")
    assert "mpi4py is needed" in text
    assert "pip install" in text


def test_a_build_without_mpi_says_how_to_get_one():
    text = refusal(
        "import sys, types\n"
        "info = sys.modules['adareduce._build_info'] = types.ModuleType('info')\n"
        "info.MPI = None"
    )
    assert "has no MPI" in text
    assert "install" in text


def test_a_library_that_is_gone_is_named_with_the_places_looked_at():
    text = refusal(
        "import sys, types\n"
        "info = sys.modules['adareduce._build_info'] = types.ModuleType('info')\n"
        "info.MPI = dict(vendor='MPICH', version='5', soname='libmpi.so.99', mpicc='',\n"
        "                place='outside', library='/no/such/libmpi.so.99')"
    )
    assert "there is no /no/such/libmpi.so.99" in text
    assert "pip install 'adareduce[mpich]'" in text
