#pragma once
#include <cuda_runtime.h>

#include "base/errors.h"
#include "base/types.h"

namespace adareduce::cuda {

/// Throws DeviceError with the call's text, CUDA's words, file and line.
inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that is not sticky must not be reported twice
  throw DeviceError(concat(call, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
                           ", ", file, ":", line, ")"));
}
#define ADAREDUCE_CUDA(call) ::adareduce::cuda::check((call), #call, __FILE__, __LINE__)

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.native); }

/// Launches `kernel(args...)` on `blocks` x `threads` without dynamic shared memory. The only way
/// in which this project launches: a compiler without CUDA's syntax can read it, too.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, Stream stream,
            const Arguments&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = native(stream);
  ADAREDUCE_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...));
}

}  // namespace adareduce::cuda
