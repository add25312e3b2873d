#pragma once
#include <string>

#include "base/types.h"
#include "transports/nccl/nccl_api.h"

namespace adareduce::cuda::nccl {

/// What a failed call throws; the communicator makes a DeviceError of it.
struct Failure {
  ncclResult_t result;
  std::string text;
};

/// NCCL's text for `result` and for its last error, and what to do where ranks share a GPU.
std::string words_of(const NcclFunctions& functions, ncclResult_t result);

/// Throws Failure with the call's text, NCCL's words, file and line.
void check(const NcclFunctions& functions, ncclResult_t result, const char* call, const char* file,
           int line);
/// `functions` has the function that `call` begins with.
#define ADAREDUCE_NCCL(functions, call) \
  ::adareduce::cuda::nccl::check((functions), (functions).call, #call, __FILE__, __LINE__)

/// NCCL's codes. Throw UsageError where it has none.
ncclDataType_t type_of(DType dtype);
ncclRedOp_t op_of(ReduceOp op);

}  // namespace adareduce::cuda::nccl
