#pragma once
#include <vector>

#include "kernels/kernels.h"

namespace adareduce::cuda {

/// A fused buffer's items, on the host: what ItemTable points to. Pure.
struct Items {
  std::vector<Item> items;
  std::vector<std::int64_t> first;  ///< [segments + 1]
};
Items make_items(const TensorSegment* segments, std::int64_t count);
/// Indices of the items that have elements in `range`. Reads `on_host`.
Range items_in(const ItemTable& items, Range range);

/// What sums are accumulated in, inside an item; above it is always double, as reduce_squares is.
enum class Accumulator { f64, f32 };

/// The CUDA side of the kernel table, with the CPU's contracts; kernels run in stream order and no
/// entry waits. Every SegmentTable needs `on_device` and `items`. Fused buffers start on 16 bytes,
/// tensors wherever their type may. Sums are taken in the fixed order of the items; their slots
/// serve one stream at a time. At most 3,840 inputs of a reduction. Throws DeviceError where a
/// launch fails.
const KernelTable& cuda_kernels(Accumulator accumulator = Accumulator::f64);

/// {sum |g_i|^2, |x|^2} become {sum |g_i|^2, |mean|^2, sigma^2, mu^2} of each group of segments.
struct GroupStatsArgs {
  std::int64_t num_segments = 0;
  const std::int32_t* group_of = nullptr;  ///< on the device, per segment
  std::int64_t num_groups = 0;
  int num_ranks = 1;  ///< how many gradients the estimates are made of
  /// [rows][segments], a row of each rank, added in this order; or [rows][groups] where
  /// `squares_are_of_groups`.
  int num_rows = 1;
  const double* squares = nullptr;
  bool squares_are_of_groups = false;
  const double* result_squares = nullptr;  ///< [segments] of the result
  double result_is_mean_times = 1.0;       ///< the result is the mean times this
  bool has_estimates = true;               ///< else sigma^2 and mu^2 are NaN
  double* out = nullptr;                   ///< [groups][4]
};
void group_stats(const GroupStatsArgs& args, Stream stream);

}  // namespace adareduce::cuda
