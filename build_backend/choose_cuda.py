"""Whether a build of adareduce has the CUDA module, by the environment variable ADAREDUCE_CUDA."""

from __future__ import annotations

from collections.abc import Mapping

from choose_mpi import OFF, ChoiceError

_SETTINGS = {
    "": "AUTO",
    "auto": "AUTO",
    "on": "ON",
    "yes": "ON",
    "1": "ON",
    "emulated": "EMULATED",
} | dict.fromkeys(OFF, "OFF")


def choose(environ: Mapping[str, str]) -> str:
    """CMake's ADAREDUCE_CUDA: AUTO, ON, OFF or EMULATED.

    Args:
        environ: Environment variables. Which nvcc and which architectures is for CMake's own
            CUDACXX and CUDAARCHS to say.

    Raises:
        ChoiceError: ADAREDUCE_CUDA is none of the settings.
    """
    setting = environ.get("ADAREDUCE_CUDA", "").strip()
    try:
        return _SETTINGS[setting.lower()]
    except KeyError:
        raise ChoiceError(
            "ADAREDUCE_CUDA must be 'auto' (where there is an nvcc), 'on', 'off' or 'emulated' (for"
            f" tests), got {setting!r}"
        ) from None
