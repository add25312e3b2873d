#pragma once
#include "engine/cuda/device_plan.h"
#include "transports/nccl/nccl_communicator.h"

namespace adareduce::cuda {

/// Memory of the ranks of a group as one rank sees it; null and empty without peers.
struct PeerMemory {
  std::vector<char*> in, out;
  std::vector<double*> scalars;
  std::vector<std::uint32_t*> flags;
  PeerSync sync;
};

/// What a launch works with.
struct Machinery {
  Rank rank = 0;
  int size = 1;
  const KernelTable* kernels = nullptr;
  NcclCommunicator* nccl = nullptr;
  const PeerMemory* peers = nullptr;
  Stream stream;  ///< all work goes here
  char* data = nullptr;
  char* scratch = nullptr;
  char* numbers = nullptr;
};

/// Where tensors and results lie, on the device; arrays of pointers on the host.
struct LaunchArgs {
  const void* const* inputs = nullptr;
  void* const* outputs = nullptr;
  double prescale = 1.0;
  double postscale = 1.0;
  const double* local_squares = nullptr;
  double* group_stats = nullptr;
  double* orthogonality = nullptr;
  double* cancellation = nullptr;
  std::int64_t* nonfinite = nullptr;
};

/// Enqueues a request. Collective; waits for nothing and uploads nothing.
void enqueue(const Machinery& machinery, const DevicePlan& plan, const LaunchArgs& args);

}  // namespace adareduce::cuda
