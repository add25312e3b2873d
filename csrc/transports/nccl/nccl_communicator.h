#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "transports/transport.h"

namespace adareduce::cuda {

/// What became of looking for NCCL; the search runs once per process.
struct NcclStatus {
  int version = 0;      ///< 22809 for 2.28.9; 0 where there is none to use
  std::string path;     ///< of the library
  std::string why_not;  ///< in words, where version is 0
};
const NcclStatus& nccl_status();
/// Whether NCCL reduces elements of `dtype` by `op` to what the other paths give, but for rounding:
/// not averages of integers, whose sums wrap in NCCL. Its Min and Max of floats pass over NaN,
/// which the others keep.
bool nccl_can_reduce(ReduceOp op, DType dtype);

/// One communicator of NCCL, bound to one stream. As a Transport, its exchanges are groups of sends
/// and receives of device memory that are enqueued on that stream: they are complete for whoever
/// uses the stream as soon as `start` returns (inside a group: as soon as it ends). Tags are
/// ignored. Every call is collective in NCCL's sense and never waits for the GPU; the first between
/// two ranks connects them, and waits for the peer. One thread at a time, but for async_error and
/// abort. A call that throws inside a group has dropped the group.
class NcclCommunicator : public Transport {
 public:
  /// Collective, blocks: `broadcast(bytes)` hands rank 0's bytes to all. The current device must be
  /// set. Throws DeviceError. Cannot be interrupted: NCCL has no way.
  static std::unique_ptr<NcclCommunicator> make(
      Rank rank, int size, Stream stream,
      const std::function<std::string(const std::string&)>& broadcast);

  /// A group of NCCL: all calls between become one launch. See NcclGroup.
  virtual void begin_group() = 0;
  virtual void end_group() = 0;
  /// Closes an open group, whose calls are forgotten; nothing if none is open.
  virtual void drop_group() noexcept = 0;

  /// In place where in == out.
  virtual void all_reduce(const void* in, void* out, std::int64_t numel, DType dtype,
                          ReduceOp op) = 0;
  /// in: `numel` elements, out: size * numel; in may be its place in out.
  virtual void all_gather(const void* in, void* out, std::int64_t numel, DType dtype) = 0;
  /// in: size * numel, out: numel; out may be its place in in.
  virtual void reduce_scatter(const void* in, void* out, std::int64_t numel, DType dtype,
                              ReduceOp op) = 0;
  virtual void broadcast(const void* in, void* out, std::int64_t bytes, Rank root) = 0;

  /// Empty, or NCCL's words on an error that happened after a call had returned; after `abort`, its
  /// reason. Any thread.
  virtual std::string async_error() = 0;
  /// ncclCommAbort: what waits on the device ends. Any thread. Later calls throw DeviceError with
  /// `why`. All ranks must do it, or those that do not stay in their calls. A second call does
  /// nothing.
  virtual void abort(std::string_view why = {}) = 0;
};

/// The group of a scope: one launch at `end`; none if the scope is left by an exception.
class NcclGroup {
 public:
  explicit NcclGroup(NcclCommunicator& communicator) : communicator_(&communicator) {
    communicator.begin_group();
  }
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;
  ~NcclGroup() {
    if (communicator_ != nullptr) communicator_->drop_group();
  }
  void end() { std::exchange(communicator_, nullptr)->end_group(); }

 private:
  NcclCommunicator* communicator_;
};

}  // namespace adareduce::cuda
