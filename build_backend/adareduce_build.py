"""PEP 517 backend: scikit-build-core, told which MPI to build for, and whether with CUDA."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as skbuild
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import choose_cuda
from choose_mpi import ChoiceError, MpiChoice, choose, isolated_prefixes

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def _choice() -> MpiChoice:
    try:
        return choose(os.environ, Path(sys.prefix), isolated_prefixes())
    except ChoiceError as error:
        raise SystemExit(f"adareduce: {error}") from None


def _with_cuda(settings: Settings) -> dict[str, Any]:
    try:
        choice = choose_cuda.choose(os.environ)
    except ChoiceError as error:
        raise SystemExit(f"adareduce: {error}") from None
    print(f"adareduce: CUDA: {choice}", flush=True)
    return {"cmake.define.ADAREDUCE_CUDA": choice} | (settings or {})


def _with_mpi(settings: Settings) -> dict[str, Any]:
    choice = _choice()
    if choice.requires:
        # Requested, but not brought: pip --no-build-isolation leaves that to the user.
        wheels = " ".join(choice.requires)
        if os.environ.get("ADAREDUCE_MPI"):
            raise SystemExit(
                f"adareduce: {choice.reason} is not installed; run pip install '{wheels}' first"
            )
        print(
            f"adareduce: building without MPI: no mpicc in {sys.prefix} or on PATH;"
            f" for MPI run pip install '{wheels}' first, or set ADAREDUCE_MPI"
        )
        choice = MpiChoice(None, "no MPI was found")
    print(f"adareduce: {choice}", flush=True)
    defines = {
        "ADAREDUCE_MPI": "OFF" if choice.mpicc is None else "ON",
        "ADAREDUCE_MPI_REASON": choice.reason,
        "ADAREDUCE_MPI_PLACE": choice.place,
    }
    if choice.mpicc is not None:
        defines["MPI_C_COMPILER"] = str(choice.mpicc)
    return {f"cmake.define.{key}": value for key, value in defines.items()} | (settings or {})


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*skbuild.get_requires_for_build_wheel(config_settings), *_choice().requires]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*skbuild.get_requires_for_build_editable(config_settings), *_choice().requires]


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    settings = _with_mpi(_with_cuda(config_settings))
    return skbuild.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    settings = _with_mpi(_with_cuda(config_settings))
    return skbuild.build_editable(wheel_directory, settings, metadata_directory)
