#pragma once
#include <string>
#include <vector>

#include "transports/cuda_peer/device_facts.h"

namespace adareduce::cuda {

/// At most this many ranks read each other's memory: kMaxPeers of the kernels.
inline constexpr int kMostPeerRanks = 8;
/// NCCL 2.18 is the first that is supported, 2.30.3 the first that takes several ranks of one GPU.
inline constexpr int kOldestNccl = 21800;
inline constexpr int kOldestNcclForSharedGpus = 23003;

/// How the ranks of a group move data between their GPUs.
struct PathChoice {
  int path = 0;        ///< adareduce_cuda_path
  std::string why;     ///< one sentence, for people
  int num_blocks = 1;  ///< of kernels over peers' memory: all ranks of a GPU fit on it side by side
  /// One-shot Adasum may be used, whatever the path: kernels can read all ranks' memory.
  bool peer_memory_is_possible = false;
  std::string why_no_peer_memory;  ///< empty where it is possible
  std::string warning;             ///< for people; empty where there is nothing to warn of
};

/// The same on all ranks, for it is a function of what all have said, in rank order. The wanted
/// path is honoured or refused: throws UsageError where it cannot be had, DisagreementError where
/// the ranks want different ones. Otherwise NCCL, else peers' memory, else the host.
PathChoice choose_path(const std::vector<DeviceFacts>& ranks);

}  // namespace adareduce::cuda
