#pragma once
// What pack and unpack share: which tensors meet which items, and what lies between them.
#include <algorithm>

#include "kernels/cuda/grid.h"
#include "kernels/cuda/item_walk.cuh"
#include "kernels/cuda/launch.h"

namespace adareduce::cuda {

/// Vectors that a lane has under way.
inline constexpr int kTransferUnroll = 4;

/// Where the element with index 0 of the fused buffer would lie in each tensor: a tensor's address
/// minus the segment's offset, modulo 2^64. A kernel's parameter, so that nothing is uploaded.
template <int capacity>
struct Origins {
  std::uintptr_t of[capacity];
};
inline constexpr int kCapacities[] = {64, 480, 3840};

/// What squares are summed in, or that they are not.
enum class Squares : int { none, f32, f64 };

/// One pack or unpack.
struct Transfer {
  ItemWalk walk;
  char* fused;
  std::int64_t num_items;      ///< of the whole table
  std::int64_t numel;          ///< of the fused buffer, where `packs`
  std::int64_t first_segment;  ///< of this launch
  double* slots;
  double scale;
  int width;
  bool packs;
  Squares squares;
  bool counts;
};

/// The elements between this item and the next, and those before the first, become zero.
__device__ inline void zero_padding(const Transfer& transfer, std::int64_t i, const Item& item) {
  const auto zero = [&](std::int64_t begin, std::int64_t end) {
#pragma unroll 1
    for (std::int64_t b = begin * transfer.width + lane_of_warp(); b < end * transfer.width;
         b += kWarp)
      transfer.fused[b] = 0;
  };
  if (i == 0) zero(0, item.begin);
  zero(item.begin + item.numel,
       i + 1 < transfer.num_items ? transfer.walk.items[i + 1].begin : transfer.numel);
}

/// Launches `kernel` for the tensors of the segments `which`, at most as many as its capacity.
template <int capacity>
void launch_with_origins(void (*kernel)(Transfer, Origins<capacity>), Transfer transfer,
                         const SegmentTable& segments, const void* const* tensors, Range which,
                         Stream stream) {
  Origins<capacity> origins;
  for (std::int64_t s = which.begin; s < which.end; ++s)
    origins.of[s - which.begin] =
        reinterpret_cast<std::uintptr_t>(tensors[s]) -
        static_cast<std::uintptr_t>(segments.on_host[s].offset * transfer.width);
  std::fill(origins.of + which.size(), origins.of + capacity, std::uintptr_t{0});
  transfer.first_segment = which.begin;
  transfer.walk.first = segments.items->first_on_host[which.begin];
  transfer.walk.last = segments.items->first_on_host[which.end];
  const std::int64_t work = transfer.walk.last - transfer.walk.first;
  if (work == 0) return;
  launch(kernel, blocks_for(kernel, kItemThreads, work), kItemThreads, stream, transfer, origins);
}

/// As few launches as their parameters allow.
template <typename Kernels>
void launch_for_all(const Transfer& transfer, const SegmentTable& segments,
                    const void* const* tensors, Stream stream) {
  for (std::int64_t begin = 0; begin < segments.count;) {
    const std::int64_t end = std::min<std::int64_t>(segments.count, begin + kCapacities[2]);
    const auto launch_one = [&]<int capacity>() {
      if constexpr (capacity >= Kernels::kLeast)
        launch_with_origins(Kernels::template of<capacity>(), transfer, segments, tensors,
                            {begin, end}, stream);
    };
    const std::int64_t needed = std::max<std::int64_t>(end - begin, Kernels::kLeast);
    if (needed <= kCapacities[0])
      launch_one.template operator()<kCapacities[0]>();
    else if (needed <= kCapacities[1])
      launch_one.template operator()<kCapacities[1]>();
    else
      launch_one.template operator()<kCapacities[2]>();
    begin = end;
  }
}

/// Moves bytes as they are.
void move_tensors(const Transfer& transfer, const SegmentTable& segments,
                  const void* const* tensors, Stream stream);

}  // namespace adareduce::cuda
