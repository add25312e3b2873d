// C functions for tests/nccl_ranks.py: NcclCommunicator on the emulated CUDA runtime. They return
// 0, or 1 and a text in failure(), which begins with the class of the error.
#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/errors.h"
#include "transports/nccl/nccl_communicator.h"
#include "transports/nccl/nccl_library.h"

using namespace adareduce;
using namespace adareduce::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string text;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const UsageError& error) {
    text = concat("UsageError: ", error.what());
  } catch (const DeviceError& error) {
    text = concat("DeviceError: ", error.what());
  } catch (const std::exception& error) {
    text = concat("another error: ", error.what());
  }
  return 1;
}

void require(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorName(status));
}

DType dtype_of(int code) { return static_cast<DType>(code); }
ReduceOp op_of(int code) { return static_cast<ReduceOp>(code); }

}  // namespace

struct Ranked {
  cudaStream_t stream = nullptr;
  std::unique_ptr<NcclCommunicator> communicator;
};

EXPORT const char* failure() { return text.c_str(); }

EXPORT int status(const char** path, const char** why_not) {
  const NcclStatus& found = nccl_status();
  *path = found.path.c_str();
  *why_not = found.why_not.c_str();
  return found.version;
}
EXPORT int set_search_path(const char* folder) {
  return guarded([&] { set_nccl_search_path({folder}); });
}
EXPORT const char* version_text(int version) {
  text = nccl_version_text(version);
  return text.c_str();
}
EXPORT const char* libraries_in(const char* maps) {
  text.clear();
  for (const std::string& path : nccl_libraries_in(maps)) text += path + "\n";
  return text.c_str();
}
EXPORT int can_reduce(int op, int dtype) { return nccl_can_reduce(op_of(op), dtype_of(dtype)); }

/// `exchange` gets this rank's bytes and writes rank 0's, at most 4096, into `out`.
EXPORT int make(int rank, int size, int device, int (*exchange)(const char*, int, char*),
                Ranked** out) {
  return guarded([&] {
    auto ranked = std::make_unique<Ranked>();
    require(cudaSetDevice(device));
    require(cudaStreamCreateWithFlags(&ranked->stream, cudaStreamNonBlocking));
    ranked->communicator =
        NcclCommunicator::make(rank, size, {ranked->stream}, [&](const std::string& mine) {
          std::string all(4096, '\0');
          const int bytes = exchange(mine.data(), static_cast<int>(mine.size()), all.data());
          all.resize(static_cast<std::size_t>(bytes));
          return all;
        });
    *out = ranked.release();
  });
}
EXPORT void destroy(Ranked* ranked) {
  ranked->communicator.reset();
  // What is enqueued must be done before its memory is freed, even while another thread captures.
  auto mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaStreamSynchronize(ranked->stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaStreamDestroy(ranked->stream);
  delete ranked;
}

EXPORT int allocate(int device, std::int64_t bytes, void** out) {
  return guarded([&] {
    require(cudaSetDevice(device));
    require(cudaMalloc(out, static_cast<std::size_t>(bytes)));
  });
}
EXPORT void release(void* memory) { cudaFree(memory); }

EXPORT int all_reduce(Ranked* r, const void* in, void* out, std::int64_t numel, int dtype, int op) {
  return guarded([&] { r->communicator->all_reduce(in, out, numel, dtype_of(dtype), op_of(op)); });
}
EXPORT int all_gather(Ranked* r, const void* in, void* out, std::int64_t numel, int dtype) {
  return guarded([&] { r->communicator->all_gather(in, out, numel, dtype_of(dtype)); });
}
EXPORT int reduce_scatter(Ranked* r, const void* in, void* out, std::int64_t numel, int dtype,
                          int op) {
  return guarded(
      [&] { r->communicator->reduce_scatter(in, out, numel, dtype_of(dtype), op_of(op)); });
}
EXPORT int broadcast(Ranked* r, const void* in, void* out, std::int64_t bytes, int root) {
  return guarded([&] { r->communicator->broadcast(in, out, bytes, root); });
}

/// `parts` are {is_send, peer, address, bytes} each. Fails if the exchange is not complete at once.
EXPORT int start(Ranked* r, const std::int64_t* parts, int num_parts) {
  return guarded([&] {
    std::vector<SendPart> sends;
    std::vector<RecvPart> receives;
    for (const std::int64_t* part = parts; part != parts + 4 * num_parts; part += 4) {
      const auto peer = static_cast<Rank>(part[1]);
      auto* data = reinterpret_cast<void*>(part[2]);
      if (part[0] != 0)
        sends.push_back({peer, data, part[3]});
      else
        receives.push_back({peer, data, part[3]});
    }
    if (!r->communicator->start(0, sends, receives)->test())
      throw std::logic_error("an exchange that is enqueued must be complete");
  });
}

EXPORT int begin_group(Ranked* r) {
  return guarded([&] { r->communicator->begin_group(); });
}
EXPORT int end_group(Ranked* r) {
  return guarded([&] { r->communicator->end_group(); });
}
/// A group with one all-reduce of `numel` floats in place, left by an exception.
EXPORT int leave_group_by_exception(Ranked* r, void* data, std::int64_t numel) {
  return guarded([&] {
    NcclGroup group(*r->communicator);
    r->communicator->all_reduce(data, data, numel, DType::f32, ReduceOp::sum);
    throw UsageError("thrown inside a group");
  });
}

EXPORT int synchronize(Ranked* r) {
  return guarded([&] { require(cudaStreamSynchronize(r->stream)); });
}
EXPORT const char* async_error(Ranked* r) {
  text = r->communicator->async_error();
  return text.c_str();
}
EXPORT void abort_communicator(Ranked* r, const char* why) { r->communicator->abort(why); }
EXPORT void abandon(Ranked* r) { r->communicator->abandon(); }
EXPORT int try_receive(Ranked* r) {
  return guarded([&] {
    std::byte buffer[8];
    std::int64_t bytes = 0;
    r->communicator->try_receive(0, buffer, bytes);
  });
}

EXPORT int begin_capture(Ranked* r) {
  return guarded(
      [&] { require(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal)); });
}
EXPORT int begin_global_capture(Ranked* r) {
  return guarded([&] { require(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeGlobal)); });
}
EXPORT int end_capture(Ranked* r, cudaGraphExec_t* out, int* num_nodes) {
  return guarded([&] {
    cudaGraph_t graph = nullptr;
    require(cudaStreamEndCapture(r->stream, &graph));
    std::size_t count = 0;
    require(cudaGraphGetNodes(graph, nullptr, &count));
    *num_nodes = static_cast<int>(count);
    require(cudaGraphInstantiate(out, graph));
    require(cudaGraphDestroy(graph));
  });
}
EXPORT int replay(Ranked* r, cudaGraphExec_t graph) {
  return guarded([&] { require(cudaGraphLaunch(graph, r->stream)); });
}
