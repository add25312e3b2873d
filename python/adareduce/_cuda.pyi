"""CUDA kernels, the peer path and NCCL. Importing it starts no CUDA."""

from collections.abc import Sequence
from typing import TypedDict

from typing_extensions import CapsuleType

class Gpu(TypedDict):
    name: str
    uuid: str
    sms: int
    memory: int  # bytes
    capability: str  # "9.0"

class Nccl(TypedDict):
    code: int  # 22809; 0 where there is none
    version: str
    path: str
    why_not: str

class Description(TypedDict):
    runtime: str  # the CUDA that it was built with, "13.0"
    driver: str  # the newest CUDA that the driver knows; empty without one
    why_not: str  # why there is no GPU
    gpus: list[Gpu]
    nccl: Nccl

def plugin() -> CapsuleType: ...
def describe() -> Description: ...
def set_nccl_search_path(folders: Sequence[str]) -> None: ...
