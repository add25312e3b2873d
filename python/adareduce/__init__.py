"""Collective communication for PyTorch: Adasum, averages and sums for any number of ranks.

Training scripts use ``import adareduce.torch as hvd``. Importing this package loads neither torch
nor MPI.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("adareduce")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
