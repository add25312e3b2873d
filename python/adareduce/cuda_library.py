"""The module ``_cuda`` and the NCCL that it loads: whether they are there, and why not.

Nothing here needs torch. Importing ``_cuda`` starts no CUDA; CPU users never import it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

from adareduce import nccl_library

_HOW_TO_GET_IT = (
    "install adareduce where nvcc is, with ADAREDUCE_CUDA=ON, or set ADAREDUCE_CUDA_PATH=staged to"
    " send CUDA tensors through the host, slowly"
)


def is_built() -> bool:
    """Whether this build has the module. Does not import it."""
    return importlib.util.find_spec("adareduce._cuda") is not None


def why_missing() -> str:
    """Why the module was not built, in the words of the build; empty where they are not known."""
    try:
        from adareduce._build_info import BUILD
    except ImportError:
        return ""
    return BUILD.get("cuda_reason", "")


@functools.cache  # the path must be set once, before NCCL is looked for
def load() -> ModuleType:
    """The module ``_cuda``, told where pip puts NCCL. Not collective.

    Raises:
        ImportError: It was not built, or does not load; the text says why and what helps.
    """
    if not is_built():
        reason = why_missing()
        raise ImportError(
            f"this build of adareduce has no CUDA{f' ({reason})' if reason else ''}:"
            f" {_HOW_TO_GET_IT}"
        )
    try:
        module = importlib.import_module("adareduce._cuda")
    except ImportError as error:
        raise ImportError(f"adareduce._cuda does not load: {error}") from error
    module.set_nccl_search_path(nccl_library.folders())
    return module


def cuda_version(code: int) -> str:
    """13020 is "13.2"."""
    return f"{code // 1000}.{code % 1000 // 10}"


def nccl_version(code: int) -> str:
    """22809 is "2.28.9"."""
    return f"{code // 10_000}.{code // 100 % 100}.{code % 100}"
