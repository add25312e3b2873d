#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace adareduce::cuda {

/// What a rank says of its GPU, to choose a path and to open each other's memory. Plain data.
struct DeviceFacts {
  std::string host;  ///< equal for ranks of one node
  std::int64_t pid = 0;
  std::uint64_t process = 0;  ///< a random number, equal for ranks that are threads of one process
  std::string gpu;            ///< UUID, equal for ranks that share a GPU
  int num_multiprocessors = 0;
  int driver_version = 0;           ///< as CUDA numbers them: 13000 for 13.0
  int nccl_version = 0;             ///< 22809 for 2.28.9; 0: none
  std::string nccl_why_not;         ///< in words, where nccl_version is 0
  bool nccl_may_share_gpu = false;  ///< NCCL was told to take several ranks of one GPU
  std::string nccl_host;            ///< NCCL_HOSTID: ranks with different ones pass for two nodes
  bool can_share_memory = true;     ///< CUDA IPC works here
  std::vector<std::string> unreachable;  ///< UUIDs of GPUs here whose memory this one cannot read
  int wanted_path = 0;                   ///< adareduce_cuda_path

  std::string to_bytes() const;
  /// Throws UsageError where these are not bytes of to_bytes().
  static DeviceFacts from_bytes(const std::string& bytes);
  friend bool operator==(const DeviceFacts&, const DeviceFacts&) = default;
};

/// What this process can say of a GPU; host, NCCL's version and the wanted path are the caller's.
/// Makes that GPU the calling thread's current one. Throws DeviceError.
DeviceFacts describe_device(int device);

}  // namespace adareduce::cuda
