#include "transports/nccl/nccl_call.h"

#include <future>
#include <string_view>
#include <thread>
#include <utility>

#include "base/errors.h"
#include "transports/nccl/nccl_library.h"

namespace adareduce::cuda {
namespace nccl {
std::string words_of(const NcclFunctions& functions, ncclResult_t result) {
  std::string text = functions.ncclGetErrorString(result);
  const char* last = functions.ncclGetLastError(nullptr);
  if (last != nullptr && *last != '\0') text += concat(": ", last);
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  // 2.18 to 2.29 and from 2.30 on.
  if (text.find("Duplicate GPU") == std::string::npos &&
      text.find("using the same GPU") == std::string::npos)
    return text;
  constexpr int kMultiRankGpu = 23003;  // knows NCCL_MULTI_RANK_GPU_ENABLE
  const int version = nccl_status().version;
  text += concat(
      ". Several ranks share one GPU, which NCCL ", nccl_version_text(version),
      version < kMultiRankGpu ? " refuses" : " refuses unless NCCL_MULTI_RANK_GPU_ENABLE=1 is set",
      ": give every rank a GPU of its own, or use the peer path, which serves them");
  return text;
}

void check(const NcclFunctions& functions, ncclResult_t result, const char* call, const char* file,
           int line) {
  if (result == ncclSuccess) return;
  const std::string_view path = file;
  const auto name = path.substr(path.rfind('/') + 1);
  throw Failure{result,
                concat(call, ": ", words_of(functions, result), " (", name, ":", line, ")")};
}

// Both calls wait until the last graph is destroyed that a launch was captured in (commDestroySync
// in NCCL's init.cc), and users keep graphs for long.
void end_communicator(ncclResult_t (*end)(ncclComm_t), ncclComm_t comm, bool is_in_graph) {
  if (!is_in_graph) {
    (void)end(comm);
    return;
  }
  std::packaged_task<void()> task([end, comm] {
    const RelaxedCapture relaxed;
    (void)end(comm);
  });
  const std::future<void> done = task.get_future();
  std::thread(std::move(task)).detach();
  done.wait_for(kGrace);
}

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
    case DType::boolean:
      return ncclUint8;
    case DType::i8:
      return ncclInt8;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
    case DType::f16:
      return ncclFloat16;
    case DType::bf16:
      return ncclBfloat16;
    case DType::f32:
      return ncclFloat32;
    case DType::f64:
      return ncclFloat64;
    case DType::i16:
      break;
  }
  throw UsageError(concat("NCCL has no elements of type ", name_of(dtype)));
}

ncclRedOp_t op_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::average:
      return ncclAvg;
    case ReduceOp::sum:
      return ncclSum;
    case ReduceOp::min:
      return ncclMin;
    case ReduceOp::max:
      return ncclMax;
    case ReduceOp::product:
      return ncclProd;
    case ReduceOp::adasum:
      break;
  }
  throw UsageError(concat("NCCL has no reduction ", name_of(op)));
}

}  // namespace nccl

bool nccl_can_reduce(ReduceOp op, DType dtype) {
  const bool is_float =
      dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32 || dtype == DType::f64;
  switch (op) {
    case ReduceOp::average:
      return is_float;
    case ReduceOp::sum:
      return dtype != DType::i16 && dtype != DType::boolean;
    case ReduceOp::min:
    case ReduceOp::max:
    case ReduceOp::product:
      return dtype != DType::i16;
    case ReduceOp::adasum:
      break;
  }
  return false;
}

}  // namespace adareduce::cuda
