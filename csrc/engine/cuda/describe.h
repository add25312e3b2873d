#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace adareduce::cuda {

struct Gpu {
  std::string name;
  std::string uuid;
  int capability = 0;  ///< 90 for compute capability 9.0
  int num_multiprocessors = 0;
  std::int64_t memory_bytes = 0;
};

/// What CUDA says of this machine. `problem` is CUDA's words where there is no GPU to use.
struct CudaDescription {
  int runtime_version = 0;  ///< 13000 for 13.0, linked in
  int driver_version = 0;   ///< the newest that the driver can serve; 0 without a driver
  std::vector<Gpu> gpus;
  std::string problem;
};
CudaDescription describe_cuda();

}  // namespace adareduce::cuda
