#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"

namespace adareduce::cuda {

/// Bytes of all ranks in rank order: a collective call.
using Allgather = std::function<std::vector<std::string>(const std::string& mine)>;

/// What a rank says of its GPU, to choose a path and to open each other's memory. Plain data.
struct DeviceFacts {
  std::string host;  ///< equal for ranks of one node
  std::int64_t pid = 0;
  std::string gpu;  ///< UUID, equal for ranks that share a GPU
  int num_multiprocessors = 0;
  int driver_version = 0;
  int nccl_version = 0;  ///< 0: none
  std::string nccl_why_not;
  bool nccl_may_share_gpu = false;  ///< NCCL was told to take several ranks of one GPU
  bool can_share_memory = true;     ///< CUDA IPC works here
  std::string wanted_path;

  std::string to_bytes() const;
  static DeviceFacts from_bytes(const std::string& bytes);
};
DeviceFacts describe_device(int device);

/// Device memory of every rank of a node, mapped into this process: CUDA IPC between processes,
/// plain pointers between ranks that are threads of one process.
class PeerWindows {
 public:
  /// Collective. `bytes` may differ between ranks. Throws DeviceError on all ranks if it fails on
  /// one. The memory is zero.
  static std::unique_ptr<PeerWindows> make(Rank rank, const std::vector<DeviceFacts>& ranks,
                                           std::int64_t bytes, const Allgather& allgather);
  /// Not collective: the owner must be destroyed after all peers have finished with it, which the
  /// caller makes sure of.
  virtual ~PeerWindows() = default;
  virtual void* of(Rank rank) const = 0;
  virtual std::int64_t bytes() const = 0;  ///< of this rank's
};

}  // namespace adareduce::cuda
