#pragma once
// How a warp walks through an item: 16-byte vectors in the middle, single elements at both ends.
#include "kernels/cuda/device.cuh"
#include "kernels/kernels.h"

namespace adareduce::cuda {

/// Threads of a block in which every warp has an item of its own.
inline constexpr int kItemThreads = 256;
/// Such blocks of a processor. More would leave fewer than 64 registers, and ptxas would put
/// arithmetic between loads that should be under way together.
inline constexpr int kItemBlocks = 4;

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline std::int64_t warp_of_grid() {
  return static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}
__device__ inline std::int64_t warps_of_grid() {
  return static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarp);
}

/// sum + x * y with one rounding.
__device__ inline float add_product(float sum, float x, float y) { return fmaf(x, y, sum); }
__device__ inline double add_product(double sum, double x, double y) { return fma(x, y, sum); }

/// The items that a launch works on, and the elements that it may touch.
struct ItemWalk {
  const Item* items = nullptr;
  std::int64_t first = 0;
  std::int64_t last = 0;
  Range range;

  __device__ Range part(const Item& item) const {
    const std::int64_t end = item.begin + item.numel;
    return {item.begin > range.begin ? item.begin : range.begin, end < range.end ? end : range.end};
  }
};

/// A part of an item (at most kItemNumel elements) of a buffer that starts on 16 bytes. What its
/// whole vectors leave, at both ends, is fewer elements than a warp has lanes.
template <typename T>
struct Lattice {
  static constexpr int kNumel = Vector<T>::kNumel;
  static_assert(2 * (kNumel - 1) <= kWarp);
  std::int64_t begin;
  std::int64_t vectors_begin;
  int num_vectors;
  int num_before;
  int num_edges;

  __device__ explicit Lattice(Range part) {
    const std::int64_t first = (part.begin + kNumel - 1) / kNumel * kNumel;
    const std::int64_t last = part.end / kNumel * kNumel;
    begin = part.begin;
    vectors_begin = first < part.end ? first : part.end;
    num_vectors = last > first ? static_cast<int>(last - first) / kNumel : 0;
    num_before = static_cast<int>(vectors_begin - begin);
    num_edges = static_cast<int>(part.end - begin) - num_vectors * kNumel;
  }
  /// Which element the edge `i` is, i < num_edges.
  __device__ std::int64_t edge(int i) const {
    return begin + i + (i < num_before ? 0 : num_vectors * kNumel);
  }
  __device__ std::int64_t vector(int v) const { return vectors_begin + v * kNumel; }
};

}  // namespace adareduce::cuda
