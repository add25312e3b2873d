#pragma once
#include <cstdint>

#include "kernels/kernels.h"

namespace adareduce::cuda {

/// Blocks for `work` warps of a kernel whose grid strides over them: as many as the current GPU
/// holds at a time, but none without work. At least 1. Looked up once per kernel and GPU.
std::int64_t blocks_for(const void* kernel, int threads, std::int64_t work);

template <typename... Parameters>
std::int64_t blocks_for(void (*kernel)(Parameters...), int threads, std::int64_t work) {
  return blocks_for(reinterpret_cast<const void*>(kernel), threads, work);
}

}  // namespace adareduce::cuda
