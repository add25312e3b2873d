#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/cuda_group.h"
#include "engine/device_request.h"
#include "engine/process_set.h"
#include "engine/wakeup.h"

namespace adareduce {

/// Requests on CUDA tensors of one process set. The calling thread enqueues them on its GPU; the
/// worker compares them with those of the other ranks, see docs/design.md.
///
/// Any thread may call; one call runs at a time, so that the order of agreement is that of the GPU.
class DeviceCalls {
 public:
  /// Called a few times a second in waits; what it throws ends the wait.
  using Poll = std::function<void()>;

  /// `host` is equal for ranks of one node. `wakeup` is the worker's.
  DeviceCalls(const adareduce_cuda_plugin& plugin, int wanted_path, std::shared_ptr<ProcessSet> set,
              const Settings& settings, std::string host, Wakeup& wakeup);
  DeviceCalls(const DeviceCalls&) = delete;
  DeviceCalls& operator=(const DeviceCalls&) = delete;

  /// The path between the ranks' GPUs and why. The first call of a set is collective and blocks;
  /// afterwards it only looks.
  std::pair<int, std::string> path(int device, const Poll& poll);

  /// Enqueues `request` behind what is on the caller's stream. Waits for the other ranks only where
  /// its key is new to the process set, where a graph is captured, or where too many requests have
  /// not been compared yet. Throws UsageError before the request has taken its place in the
  /// sequence, DisagreementError where no harm was done, else DeviceError or TransportError.
  std::shared_ptr<DeviceHandle> launch(Request request, const DeviceArguments& arguments,
                                       const Poll& poll);

  /// cudaStream_t of the set's group; null before its first call.
  void* stream() { return group_->stream(); }

  /// Returns when the GPU has worked off what was launched, but not what graphs replay; breaks the
  /// set where it does not in time.
  void wait_for_gpu(const Poll& poll);
  /// The same where all ranks have left the set in agreement.
  void wait_if_left() {
    if (set_->is_over()) wait_for_gpu({});
  }
  /// Gives the GPU's side back. Waits for the GPU, unless the set is broken.
  void destroy() { group_->destroy(); }

 private:
  /// The library's arguments of a launch, kept for the next one.
  struct Pointers {
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
  };
  /// One caller after the other. No std::timed_mutex: ThreadSanitizer does not know it.
  struct Turns {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_taken = false;  // guarded by mutex
  };
  /// A caller's turn, until its end.
  class Turn {
   public:
    Turn(Turns& turns, const Poll& poll);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Turns& turns_;
  };
  struct Exchange {
    DeviceCalls* calls = nullptr;
    const Poll* poll = nullptr;
    std::exception_ptr error;
  };

  static int32_t allgather(void* context, const void* mine, int64_t bytes, void* all,
                           adareduce_error* error);
  void gather(const void* mine, std::int64_t bytes, void* all, const Poll& poll);

  void check_device(int device, std::string_view function) const;
  std::shared_ptr<Handle> submit(Request request);
  void agree(Request request, const Poll& poll);
  void make_room(const Poll& poll);
  adareduce_cuda_plan* agree_and_prepare(const Request& request, const Signature& key,
                                         const Poll& poll);
  void make_group(int device, const Poll& poll);
  void fail(const std::string& text);
  template <typename Step>
  void or_fail(const std::string& call, Step step);

  const adareduce_cuda_plugin& plugin_;
  const int wanted_path_;
  const std::shared_ptr<ProcessSet> set_;
  const std::shared_ptr<CudaGroup> group_;
  const Settings settings_;
  const std::string host_;
  Wakeup& wakeup_;

  Turns turns_;
  // Of whoever has the turn.
  std::unordered_map<Signature, adareduce_cuda_plan*, SignatureHash> plans_;  // agreed on
  std::deque<std::shared_ptr<Handle>> launched_;  // not yet compared, or not known to be
  Pointers pointers_;
  Exchange exchange_;
};

}  // namespace adareduce
