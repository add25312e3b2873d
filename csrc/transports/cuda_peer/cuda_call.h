#pragma once
#include <cuda_runtime.h>

#include <string>

#include "base/errors.h"

namespace adareduce::cuda {

/// Throws DeviceError with what was tried and CUDA's words.
inline void succeed(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that is not sticky must not be reported twice
  throw DeviceError(
      concat(what, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")"));
}

}  // namespace adareduce::cuda
