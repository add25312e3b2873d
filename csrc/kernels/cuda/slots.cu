// Sums over segments and groups of what items have left in their slots.
//
// Numerics. Double. A segment's items go round-robin to the threads of one block, whose number
// depends on the table and the range alone; then lanes, then warps in their order: the same bits
// from run to run. Relative error of a sum of k slots: about (k / threads + 37) * 2^-53.
#include <algorithm>

#include "kernels/cuda/block_sum.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/slots.h"

namespace adareduce::cuda {
namespace {

struct SegmentSlots {
  double* slots;
  const std::int64_t* first;
  std::int64_t items_begin;
  std::int64_t items_end;

  __device__ std::int64_t begin(std::int64_t segment) const {
    return first[segment] > items_begin ? first[segment] : items_begin;
  }
  __device__ std::int64_t end(std::int64_t segment) const {
    return first[segment + 1] < items_end ? first[segment + 1] : items_end;
  }
};

// The sums over one segment, by the whole block; on thread 0.
template <int columns>
__device__ void sum_over_segment(const SegmentSlots& slots, std::int64_t segment,
                                 double (&sums)[columns]) {
  const std::int64_t end = slots.end(segment);
#pragma unroll
  for (int c = 0; c < columns; ++c) sums[c] = 0;
#pragma unroll 4
  for (std::int64_t i = slots.begin(segment) + threadIdx.x; i < end; i += blockDim.x)
#pragma unroll
    for (int c = 0; c < columns; ++c) sums[c] += slots.slots[i * kSlotsPerItem + c];
  sum_over_block(sums);
}

// A block per segment.
template <int columns>
__global__ void __launch_bounds__(1024)
    add_slots_of_segments(SegmentSlots slots, int num_sums, double* sums, std::int64_t* counts) {
  double of_segment[columns];
  sum_over_segment(slots, blockIdx.x, of_segment);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int c = 0; c < columns; ++c) {
    if (c < num_sums)
      sums[blockIdx.x * static_cast<std::int64_t>(num_sums) + c] = of_segment[c];
    else
      counts[blockIdx.x] = static_cast<std::int64_t>(of_segment[c]);
  }
}

constexpr int kGroupColumns = 2;

// Leaves a segment's sums behind the two numbers of its first item.
__global__ void __launch_bounds__(1024) add_slots_in_place(SegmentSlots slots) {
  double of_segment[kGroupColumns];
  sum_over_segment(slots, blockIdx.x, of_segment);
  const std::int64_t first = slots.begin(blockIdx.x);
  if (threadIdx.x != 0 || first >= slots.end(blockIdx.x)) return;
  for (int c = 0; c < kGroupColumns; ++c)
    slots.slots[first * kSlotsPerItem + kGroupColumns + c] = of_segment[c];
}

constexpr int kGroupThreads = 256;

// One block. Group g belongs to thread g % kGroupThreads, which reads all segments in their order;
// so nobody has to know how many groups there are.
__global__ void __launch_bounds__(kGroupThreads)
    add_segments_to_groups(SegmentSlots slots, std::int64_t num_segments,
                           const std::int32_t* group_of, double* groups) {
  __shared__ std::int32_t group[kGroupThreads];
  __shared__ double values[kGroupThreads][kGroupColumns];
  const int self = static_cast<int>(threadIdx.x);
  std::int32_t current = -1;
  double sums[kGroupColumns] = {};
  for (std::int64_t base = 0; base < num_segments; base += kGroupThreads) {
    const std::int64_t segment = base + self;
    group[self] = -1;
    if (segment < num_segments && slots.begin(segment) < slots.end(segment)) {
      group[self] = group_of[segment];
      for (int c = 0; c < kGroupColumns; ++c)
        values[self][c] = slots.slots[slots.begin(segment) * kSlotsPerItem + kGroupColumns + c];
    }
    __syncthreads();
    for (int i = 0; i < kGroupThreads; ++i) {
      if (group[i] < 0 || group[i] % kGroupThreads != self) continue;
      if (group[i] != current) {
        for (int c = 0; c < kGroupColumns; ++c) {
          if (current >= 0) groups[current * std::int64_t{kGroupColumns} + c] = sums[c];
          sums[c] = groups[group[i] * std::int64_t{kGroupColumns} + c];
        }
        current = group[i];
      }
      for (int c = 0; c < kGroupColumns; ++c) sums[c] += values[i][c];
    }
    __syncthreads();
  }
  for (int c = 0; c < kGroupColumns; ++c)
    if (current >= 0) groups[current * std::int64_t{kGroupColumns} + c] = sums[c];
}

// One warp where segments are small, so that thousands of them run at a time.
int threads_for(const SegmentTable& segments) {
  const std::int64_t* first = segments.items->first_on_host;
  std::int64_t most = 0;
  for (std::int64_t s = 0; s < segments.count; ++s) most = std::max(most, first[s + 1] - first[s]);
  return most <= 64 ? kWarp : most <= 2048 ? 256 : 1024;
}

SegmentSlots slots_of(const SegmentTable& segments, Range items) {
  return {segments.items->slots, segments.items->first_on_device, items.begin, items.end};
}

}  // namespace

void add_slots(const AddSlotsArgs& args, Stream stream) {
  const int columns = args.num_sums + (args.counts != nullptr ? 1 : 0);
  if (args.segments->count == 0 || columns == 0) return;
  const auto kernel = columns == 1   ? add_slots_of_segments<1>
                      : columns == 2 ? add_slots_of_segments<2>
                                     : add_slots_of_segments<3>;
  launch(kernel, args.segments->count, threads_for(*args.segments), stream,
         slots_of(*args.segments, args.items), args.num_sums, args.sums, args.counts);
}

void add_slots_to_groups(const AddSlotsToGroupsArgs& args, Stream stream) {
  if (args.items.empty()) return;
  const SegmentSlots slots = slots_of(*args.segments, args.items);
  launch(add_slots_in_place, args.segments->count, threads_for(*args.segments), stream, slots);
  launch(add_segments_to_groups, 1, kGroupThreads, stream, slots, args.segments->count,
         args.group_of, args.groups);
}

}  // namespace adareduce::cuda
