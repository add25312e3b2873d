"""Where pip has put NCCL. Importing this module loads nothing, and neither does `folders`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_NAME = "libnccl.so.2"


def folders() -> list[str]:
    """Folders of installed packages that hold libnccl.so.2, in the order of ``sys.path``.

    Both nvidia-nccl-cu12 and nvidia-nccl-cu13 put it into ``nvidia/nccl/lib``. Not collective.

    Returns:
        Absolute paths, empty without such a package.
    """
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # no package at all below nvidia
        return []
    if package is None or package.submodule_search_locations is None:
        return []
    found = [Path(place).resolve() / "lib" for place in package.submodule_search_locations]
    return [str(folder) for folder in found if (folder / _NAME).is_file()]
