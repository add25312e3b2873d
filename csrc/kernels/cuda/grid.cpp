#include "kernels/cuda/grid.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/cuda/launch.h"

namespace adareduce::cuda {
namespace {

constexpr int kWarpThreads = 32;

std::int64_t resident_blocks(const void* kernel, int threads, int device) {
  int processors = 0;
  int blocks = 0;
  ADAREDUCE_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  ADAREDUCE_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(processors) * blocks);
}

}  // namespace

std::int64_t blocks_for(const void* kernel, int threads, std::int64_t work) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::int64_t> known;
  int device = 0;
  ADAREDUCE_CUDA(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  const auto entry = known.try_emplace({kernel, device}, 0).first;
  // 0: the look-up has failed before.
  if (entry->second == 0) entry->second = resident_blocks(kernel, threads, device);
  const std::int64_t warps = threads / kWarpThreads;
  return std::clamp<std::int64_t>((work + warps - 1) / warps, 1, entry->second);
}

}  // namespace adareduce::cuda
