"""CUDA kernels, the peer path and NCCL. Importing it starts no CUDA."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TypedDict

from typing_extensions import CapsuleType

testing: ModuleType

class Gpu(TypedDict):
    name: str
    uuid: str
    capability: int  # 90
    multiprocessors: int
    memory_bytes: int

class Description(TypedDict):
    cuda_runtime: int  # 13000: the CUDA that is linked in
    cuda_driver: int  # the newest that the driver can serve; 0 without one
    gpus: list[Gpu]
    problem: str  # why there is no GPU to use
    nccl_version: int  # 22809; 0 where there is none
    nccl_path: str
    nccl_why_not: str

def plugin() -> CapsuleType: ...
def describe() -> Description: ...
def set_nccl_search_path(folders: Sequence[str]) -> None: ...
def gain_step(numbers: Mapping[str, float], memory: Mapping[str, int], stream: int) -> None: ...
