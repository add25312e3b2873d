#include "engine/cuda/describe.h"

#include <cuda_runtime.h>

#include <cstdio>

namespace adareduce::cuda {
namespace {

std::string uuid_text(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof uuid.bytes; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += digits;
  }
  return text;
}

}  // namespace

CudaDescription describe_cuda() {
  CudaDescription result;
  (void)cudaRuntimeGetVersion(&result.runtime_version);
  (void)cudaDriverGetVersion(&result.driver_version);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    result.problem = cudaGetErrorString(status);
    return result;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    result.gpus.push_back({properties.name, uuid_text(properties.uuid),
                           10 * properties.major + properties.minor, properties.multiProcessorCount,
                           static_cast<std::int64_t>(properties.totalGlobalMem)});
  }
  if (result.gpus.empty()) result.problem = "CUDA sees no GPU";
  return result;
}

}  // namespace adareduce::cuda
