#pragma once
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bootstrap/bootstrap.h"
#include "engine/cuda/device_execution.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/tickets.h"
#include "transports/cuda_peer/choose_path.h"
#include "transports/cuda_peer/peer_windows.h"

namespace adareduce::cuda {

/// Ranks with a GPU each, and what they share: a communicator, each other's memory, one stream.
///
/// Requests run on the group's own stream in the order of their launches; an event orders it behind
/// the caller's stream, another orders the caller's behind it. Work memory belongs to the group and
/// is used by one request after the other. What a captured launch has used is kept until the end.
class DeviceGroup {
 public:
  struct Args {
    Rank rank = 0;
    int size = 1;
    int device = 0;
    int path = 0;  ///< base/cuda_plugin.h
    Seconds deadline{600};
    std::string host;
    Allgather allgather;
  };
  /// Collective; blocks. Throws on all ranks or on none.
  explicit DeviceGroup(Args args);
  /// Waits for the GPU, unless the group was aborted.
  ~DeviceGroup();
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  int path() const { return choice_.path; }
  const std::string& why() const { return choice_.why; }
  Stream stream() const { return stream_->stream(); }
  int device() const { return args_.device; }
  int size() const { return args_.size; }

  /// Collective; blocks and may wait for the GPU. Throws on all ranks or on none.
  DevicePlan& prepare(Request request, std::vector<std::int64_t> rows);
  /// Collective. Waits for nothing. After an error some ranks may have launched more than others:
  /// the group is good for nothing but abort().
  std::unique_ptr<adareduce_cuda_ticket> launch(const DevicePlan& plan, const LaunchArgs& args,
                                                cudaStream_t caller);

  /// What has gone wrong on the device since, if anything. Any thread.
  std::optional<std::string> problem();
  /// Any thread.
  void abort(const std::string& text);

 private:
  struct Generation;  // windows of all ranks and the barriers on them
  struct Watched {
    std::shared_ptr<Event> begin, end;
    std::string what;
    std::chrono::steady_clock::time_point seen{};  // when it was found to have begun
  };

  void agree_on(const std::string& what, const std::string& error);
  void throw_if_aborted();
  void reserve(const DevicePlan& plan);
  void grow(DeviceBuffer& buffer, std::int64_t bytes);
  bool windows_are_too_small(const DevicePlan& plan) const;
  void make_windows(const DevicePlan& plan);
  Machinery machinery_for(const DevicePlan& plan);

  const Args args_;
  PathChoice choice_;
  std::vector<DeviceFacts> facts_;
  std::unique_ptr<OwnStream> stream_;
  std::shared_ptr<EventPool> events_;
  std::unique_ptr<Event> fork_;
  std::unique_ptr<NcclCommunicator> nccl_;
  std::unique_ptr<MappedWord> error_;  // of kernels that wait for peers

  std::vector<std::unique_ptr<DevicePlan>> plans_;
  std::vector<DeviceBuffer> tables_;
  DeviceBuffer data_, scratch_, numbers_;
  std::unique_ptr<Generation> generation_;
  bool has_captured_ = false;
  // What captured graphs may still use.
  std::vector<DeviceBuffer> kept_buffers_;
  std::vector<std::unique_ptr<Generation>> kept_generations_;

  std::mutex mutex_;
  std::optional<std::string> aborted_;  // guarded by mutex_
  std::deque<Watched> watched_;         // guarded by mutex_
};

}  // namespace adareduce::cuda
