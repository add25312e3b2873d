#pragma once
#include <chrono>
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

/// How long an abort waits for a thread to come out of NCCL, and then for NCCL. What takes longer
/// is a call that waits for a peer, which only the abort can end, or an abort that waits for a
/// graph.
inline constexpr std::chrono::seconds kGrace{2};

/// Calls ncclCommDestroy or ncclCommAbort, which says what it likes: the communicator is gone.
/// `is_in_graph`: a launch was captured, and the wait is bounded.
void end_communicator(ncclResult_t (*end)(ncclComm_t), ncclComm_t comm, bool is_in_graph);

/// For a thread beside which others may be capturing a graph: its calls of CUDA let them be.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// NCCL's codes. Throw UsageError where it has none.
ncclDataType_t type_of(DType dtype);
ncclRedOp_t op_of(ReduceOp op);

}  // namespace adareduce::cuda::nccl
