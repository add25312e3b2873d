#pragma once
#include <functional>
#include <memory>
#include <string>

#include "transports/transport.h"

namespace adareduce::cuda {

/// What became of looking for NCCL; the search runs once per process.
struct NcclStatus {
  int version = 0;      ///< 22809 for 2.28.9; 0 where there is none to use
  std::string path;     ///< of the library
  std::string why_not;  ///< in words, where version is 0
};
const NcclStatus& nccl_status();
/// Whether `dtype` is one that NCCL can reduce.
bool nccl_can_reduce(ReduceOp op, DType dtype);

/// One communicator of NCCL, bound to one stream. As a Transport, its exchanges are groups of sends
/// and receives of device memory that are enqueued on that stream: they are complete for whoever
/// uses the stream as soon as `start` returns. Tags are ignored. Every call is collective in NCCL's
/// sense and never waits for the GPU.
class NcclCommunicator : public Transport {
 public:
  /// Collective, blocks: `broadcast(bytes)` hands rank 0's bytes to all. The current device must be
  /// set. Throws DeviceError. Cannot be interrupted: NCCL has no way.
  static std::unique_ptr<NcclCommunicator> make(
      Rank rank, int size, Stream stream,
      const std::function<std::string(const std::string&)>& broadcast);

  /// A group of NCCL: all calls between become one launch.
  virtual void begin_group() = 0;
  virtual void end_group() = 0;

  virtual void all_reduce(const void* in, void* out, std::int64_t numel, DType dtype,
                          ReduceOp op) = 0;
  /// in: `numel` elements, out: size * numel; in may be its place in out.
  virtual void all_gather(const void* in, void* out, std::int64_t numel, DType dtype) = 0;
  /// in: size * numel, out: numel.
  virtual void reduce_scatter(const void* in, void* out, std::int64_t numel, DType dtype,
                              ReduceOp op) = 0;
  virtual void broadcast(const void* in, void* out, std::int64_t bytes, Rank root) = 0;

  /// Empty, or NCCL's words on an error that happened after a call had returned. Any thread.
  virtual std::string async_error() = 0;
  /// ncclCommAbort: what waits on the device ends. Any thread. Later calls throw.
  virtual void abort() = 0;
};

}  // namespace adareduce::cuda
