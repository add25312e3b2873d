"""Runs tests/gpu/mpi under mpirun: ranks that share a GPU or have one each.

ADAREDUCE_TEST_RANKS (default "2 4") says how many, ADAREDUCE_TEST_WAYS which of WAYS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import device
import pytest

import mpirun

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_SECONDS = float(os.environ.get("ADAREDUCE_TEST_LIMIT_SECONDS", "300"))
_RANKS = [int(word) for word in os.environ.get("ADAREDUCE_TEST_RANKS", "2 4").split()]

# How ranks on one GPU can meet, by environment. NCCL refuses two ranks on a GPU, unless it is told
# to share (2.30.3 and later) or each rank claims another host: then they talk through sockets.
WAYS = {
    "auto": {},
    "peer": {"ADAREDUCE_CUDA_PATH": "peer"},
    "staged": {"ADAREDUCE_CUDA_PATH": "staged"},
    "nccl_hostid": {
        "ADAREDUCE_CUDA_PATH": "nccl", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0", "NCCL_RAS_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2", "ADAREDUCE_TEST_HOSTID": "1",
    },
    "nccl_shared": {
        "ADAREDUCE_CUDA_PATH": "nccl", "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4",
        "NCCL_RAS_ENABLE": "0", "NCCL_NVLS_ENABLE": "0",
    },
}  # fmt: skip
_WANTED = os.environ.get("ADAREDUCE_TEST_WAYS", "auto peer").split()
# A rank's own NCCL_HOSTID, which only the rank's own shell can know.
_HOSTID_SHELL = """
rank=${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}
if [ -n "$ADAREDUCE_TEST_HOSTID" ]; then export NCCL_HOSTID="rank$rank"; fi
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(mpirun.flavour() is None, reason="this build has no MPI")
@pytest.mark.parametrize("way", _WANTED)
@pytest.mark.parametrize("num_ranks", _RANKS)
def test_the_suite_passes_on_ranks(num_ranks: int, way: str) -> None:
    if device.is_emulated():
        pytest.skip("torch has no CUDA tensors here")
    command = ["sh", "-c", _HOSTID_SHELL, "sh", sys.executable, "-m", "pytest"]
    command += ["-p", "no:cacheprovider", "-q", "--tb=short", "--rootdir", str(ROOT)]
    result = mpirun.run(
        num_ranks,
        [*command, str(ROOT / "tests" / "gpu" / "mpi")],
        limit=_LIMIT_SECONDS,
        variables={"CUDA_DEVICE_MAX_CONNECTIONS": "32", **WAYS[way]},
    )
    print(result)
    assert result.returncode == 0, str(result)
    assert result.left_behind == []
    assert " passed" in result.out[0], str(result)
