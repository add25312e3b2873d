"""How ranks meet on GPUs, by environment. Standard library only."""

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

# Before each rank's command: its own NCCL_HOSTID, which only the rank itself can know.
EACH_RANK = (
    "sh",
    "-c",
    'rank=${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}; if [ -n "$ADAREDUCE_TEST_HOSTID" ];'
    ' then export NCCL_HOSTID="rank$rank"; fi; exec "$@"',
    "sh",
)
