#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <cstddef>

/// The part of NCCL's C interface that is used, declared by hand under NCCL's own names: its header
/// belongs to one version, the library that is found at run time may be any from 2.18 on.
/// tests/test_nccl_declarations.py compares this file with the headers of several versions.
namespace adareduce::cuda::nccl {

struct ncclComm;
using ncclComm_t = ncclComm*;

/// Handed from rank 0 to all by whoever makes a communicator. Passed by value.
struct ncclUniqueId {
  char internal[128];
};

enum ncclResult_t : unsigned {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
};

enum ncclDataType_t : unsigned {
  ncclInt8 = 0,
  ncclUint8 = 1,
  ncclInt32 = 2,
  ncclUint32 = 3,
  ncclInt64 = 4,
  ncclUint64 = 5,
  ncclFloat16 = 6,
  ncclFloat32 = 7,
  ncclFloat64 = 8,
  ncclBfloat16 = 9,
};

enum ncclRedOp_t : unsigned {
  ncclSum = 0,
  ncclProd = 1,
  ncclMax = 2,
  ncclMin = 3,
  ncclAvg = 4,
};

/// NCCL's value for "not set"; pointers are null.
inline constexpr int kConfigUndefined = INT_MIN;

/// The struct of NCCL 2.17 to 2.24. Later ones have grown at the end: a library copies the smaller
/// of `size` and its own size, and gives every field that is younger than `version` its default.
/// So `version` says for which NCCL this was written, not which one is loaded: a field of theirs
/// lies in the padding behind splitShare.
struct ncclConfig_t {
  std::size_t size = sizeof(ncclConfig_t);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = kConfigUndefined;
  int cgaClusterSize = kConfigUndefined;
  int minCTAs = kConfigUndefined;
  int maxCTAs = kConfigUndefined;
  const char* netName = nullptr;
  int splitShare = kConfigUndefined;
};

/// NCCL's functions, each under its own name; looked up when the library is loaded.
struct NcclFunctions {
  ncclResult_t (*ncclGetVersion)(int* version);
  ncclResult_t (*ncclGetUniqueId)(ncclUniqueId* id);
  ncclResult_t (*ncclCommInitRankConfig)(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                         ncclConfig_t* config);
  ncclResult_t (*ncclCommDestroy)(ncclComm_t comm);
  ncclResult_t (*ncclCommAbort)(ncclComm_t comm);
  ncclResult_t (*ncclCommGetAsyncError)(ncclComm_t comm, ncclResult_t* error);
  const char* (*ncclGetErrorString)(ncclResult_t result);
  const char* (*ncclGetLastError)(ncclComm_t comm);
  ncclResult_t (*ncclGroupStart)();
  ncclResult_t (*ncclGroupEnd)();
  ncclResult_t (*ncclAllReduce)(const void* send, void* receive, std::size_t count,
                                ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                                cudaStream_t stream);
  ncclResult_t (*ncclReduceScatter)(const void* send, void* receive, std::size_t receive_count,
                                    ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                                    cudaStream_t stream);
  ncclResult_t (*ncclAllGather)(const void* send, void* receive, std::size_t send_count,
                                ncclDataType_t type, ncclComm_t comm, cudaStream_t stream);
  ncclResult_t (*ncclBroadcast)(const void* send, void* receive, std::size_t count,
                                ncclDataType_t type, int root, ncclComm_t comm,
                                cudaStream_t stream);
  ncclResult_t (*ncclSend)(const void* data, std::size_t count, ncclDataType_t type, int peer,
                           ncclComm_t comm, cudaStream_t stream);
  ncclResult_t (*ncclRecv)(void* data, std::size_t count, ncclDataType_t type, int peer,
                           ncclComm_t comm, cudaStream_t stream);
};

/// X(name) for each member of NcclFunctions.
#define ADAREDUCE_NCCL_FUNCTIONS(X) \
  X(ncclGetVersion)                 \
  X(ncclGetUniqueId)                \
  X(ncclCommInitRankConfig)         \
  X(ncclCommDestroy)                \
  X(ncclCommAbort)                  \
  X(ncclCommGetAsyncError)          \
  X(ncclGetErrorString)             \
  X(ncclGetLastError)               \
  X(ncclGroupStart)                 \
  X(ncclGroupEnd)                   \
  X(ncclAllReduce) X(ncclReduceScatter) X(ncclAllGather) X(ncclBroadcast) X(ncclSend) X(ncclRecv)

}  // namespace adareduce::cuda::nccl
