#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/cuda_plugin.h"
#include "engine/presence.h"

namespace adareduce {

/// The CUDA side of one process set, behind the C table: callers one at a time, while the worker
/// may look after it and end it. Exists from make() to destroy(). All may be called by any thread.
class CudaGroup {
 public:
  /// A call of the plugin that may wait for peers, and since when.
  struct Blocking {
    const char* what;
    Clock::time_point since;
  };

  // Of callers. They throw DeviceError for what the plugin refuses, TransportError after abort().

  /// Collective; blocks.
  void make(const adareduce_cuda_plugin& plugin, const adareduce_cuda_group_args& args);
  bool exists() const { return exists_.load(std::memory_order_acquire); }
  /// Which GPU; only of a group that exists.
  int device() const { return device_; }
  /// The path and why; only of a group that exists.
  std::pair<int, std::string> path();
  /// cudaStream_t of the group; null if there is none.
  void* stream();
  /// Collective; blocks.
  adareduce_cuda_plan* prepare(const adareduce_cuda_request& request);
  /// Collective. `is_captured`: its end says nothing about the GPU.
  adareduce_cuda_ticket* launch(adareduce_cuda_plan* plan, const adareduce_cuda_launch_args& args,
                                bool is_captured);
  /// Nothing to be done after an orderly destroy().
  void order(adareduce_cuda_ticket* ticket, void* stream);
  bool is_done(adareduce_cuda_ticket* ticket);
  /// Gives a ticket back, at the next launch. Never blocks.
  void retire(adareduce_cuda_ticket* ticket);
  /// The GPU has worked off all launches that were not captured, or was told to forget them.
  bool is_idle();
  /// Waits for the GPU unless aborted; check() and abort() do nothing from now on.
  void destroy();

  /// Around waits inside make() and prepare() that have a deadline of their own.
  void suspend_blocking();
  void resume_blocking();

  // Of the worker, or of whoever finds that the process set cannot go on.

  /// What has gone wrong on the device, once.
  std::optional<std::string> check();
  /// Every later call of a caller throws `text`. The first one counts.
  void abort(const std::string& text);
  std::optional<Blocking> blocking();

 private:
  [[noreturn]] void raise(int32_t status, const adareduce_error& error);
  void throw_if_aborted();
  void release_retired();
  void set_blocking(const char* what);
  void reset_blocking();

  std::mutex calls_;  // one call at a time, as the table wants it; first of the two
  std::unordered_set<adareduce_cuda_ticket*> tickets_;  // guarded by calls_
  adareduce_cuda_ticket* last_ = nullptr;               // of a launch that was not captured

  std::mutex life_;  // held while check and abort run, so that the group stays; never for long
  const adareduce_cuda_plugin* plugin_ = nullptr;  // set by make(), then constant
  adareduce_cuda_group* group_ = nullptr;          // written under both
  int device_ = 0;                                 // as plugin_
  std::string abort_text_;                         // guarded by life_
  std::optional<Blocking> blocking_;               // guarded by life_
  std::atomic<bool> exists_{false};
  std::atomic<bool> is_aborted_{false};

  std::mutex retired_mutex_;
  std::vector<adareduce_cuda_ticket*> retired_;
};

/// The caller's end of a launched request. Any thread may use it, also after the engine's end.
class DeviceHandle {
 public:
  /// `call` names it in errors.
  DeviceHandle(std::shared_ptr<CudaGroup> group, std::string call)
      : group_(std::move(group)), call_(std::move(call)) {}
  ~DeviceHandle();
  DeviceHandle(const DeviceHandle&) = delete;
  DeviceHandle& operator=(const DeviceHandle&) = delete;

  /// The GPU is done, or the process set is broken. Does not block.
  bool is_finished() const;
  /// What is enqueued on `stream` from now on comes after the request. Does not wait for the GPU.
  /// Throws TransportError when the process set is broken.
  void order(void* stream) const;
  /// cudaStream_t on which it runs.
  void* stream() const { return group_->stream(); }

 private:
  friend class DeviceCalls;
  std::shared_ptr<CudaGroup> group_;
  std::string call_;
  adareduce_cuda_ticket* ticket_ = nullptr;
};

}  // namespace adareduce
