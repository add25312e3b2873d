#pragma once
#include "collectives/context.h"
#include "collectives/shards.h"
#include "collectives/task.h"

namespace adareduce {

/// How several ranks' elements become one.
struct Reduction {
  Elementwise op = Elementwise::sum;
  double divisor = 1.0;
};

/// Where the squares of a reduction go; none without groups.
struct SquaresOutput {
  const std::int32_t* group_of = nullptr;  ///< per segment
  std::int64_t num_groups = 0;
  double* squares = nullptr;  ///< [groups][kSquaresPerGroup], of this rank's shard
};

/// Elements of scratch that reduce_scatter needs on `rank`.
std::int64_t reduce_scatter_scratch_numel(const Shards& shards, Rank rank);

/// Reduces each rank's shard over all ranks, in rank order, in its place in `buffer.data`. What
/// lies in other shards is lost to nobody: it stays. Collective. Direct messages: every rank sends
/// every peer that one's shard, in one exchange. The arguments stay until the task has ended.
Task reduce_scatter(Context context, FusedBuffer buffer, const Shards& shards, Reduction reduction,
                    SquaresOutput output);

}  // namespace adareduce
