// Squares of segments become statistics of groups of segments.
//
// Numerics. Double. Ranks are added in their order; a group's segments go round-robin to the
// threads of a block, then lanes, then warps (block_sum.cuh): the same bits on all ranks.
#include "kernels/coefficients.h"
#include "kernels/cuda/block_sum.cuh"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.h"

namespace adareduce::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStatsPerGroup = 4;

__device__ double sum_over_rows(const double* squares, std::int64_t numel, std::int64_t at,
                                int num_rows) {
  double sum = 0;
  for (int r = 0; r < num_rows; ++r) sum += squares[r * numel + at];
  return sum;
}

// A block per group.
__global__ void __launch_bounds__(kThreads) stats_of_groups(GroupStatsArgs args) {
  const std::int64_t group = blockIdx.x;
  double sums[2] = {0, 0};  // over ranks, of the result
  for (std::int64_t s = threadIdx.x; s < args.num_segments; s += kThreads) {
    if (args.group_of[s] != group) continue;
    if (!args.squares_are_of_groups)
      sums[0] += sum_over_rows(args.squares, args.num_segments, s, args.num_rows);
    sums[1] += args.result_squares[s];
  }
  sum_over_block(sums);
  if (threadIdx.x != 0) return;
  const double of_ranks = args.squares_are_of_groups
                              ? sum_over_rows(args.squares, args.num_groups, group, args.num_rows)
                              : sums[0];
  const double of_mean = sums[1] / (args.result_is_mean_times * args.result_is_mean_times);
  const VarianceAndNorm estimate = variance_and_norm(of_ranks, of_mean, args.num_ranks);
  double* out = args.out + group * kStatsPerGroup;
  out[0] = of_ranks;
  out[1] = of_mean;
  // Of one gradient there are none, even where the two squares were rounded differently.
  const bool has_estimates = args.has_estimates && args.num_ranks > 1;
  out[2] = has_estimates ? estimate.variance : nan("");
  out[3] = has_estimates ? estimate.squared_norm : nan("");
}

}  // namespace

void group_stats(const GroupStatsArgs& args, Stream stream) {
  if (args.num_groups > 0) launch(stats_of_groups, args.num_groups, kThreads, stream, args);
}

}  // namespace adareduce::cuda
