#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "transports/cuda_peer/device_facts.h"

namespace adareduce::cuda {

/// Bytes of all ranks in rank order: a collective call.
using Allgather = std::function<std::vector<std::string>(const std::string& mine)>;

/// Device memory of every rank of a node, mapped into this process: CUDA IPC between processes,
/// plain pointers between ranks that are threads of one process.
class PeerWindows {
 public:
  /// Collective; the current device is the rank's. `bytes` may differ between ranks and may be 0.
  /// Throws DeviceError on all ranks if it fails on one. The memory is zero.
  static std::unique_ptr<PeerWindows> make(Rank rank, const std::vector<DeviceFacts>& ranks,
                                           std::int64_t bytes, const Allgather& allgather);
  /// Gives this rank's memory back. Not collective: no peer may use it any more, and all must have
  /// closed theirs, which the caller makes sure of.
  virtual ~PeerWindows() = default;
  /// Unmaps the memory of the others; only the destructor may follow. Not collective.
  virtual void close() = 0;
  virtual void* of(Rank rank) const = 0;   ///< null where that rank's has no bytes
  virtual std::int64_t bytes() const = 0;  ///< of this rank's
};

}  // namespace adareduce::cuda
